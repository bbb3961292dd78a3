"""Networks, batches and loops that several processes and their one-process reference share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

import adler

STEPS = 8
EXACT: dict[str, Any] = {"measure": adler.Measure.every_step()}
DIFFERENCE: dict[str, Any] = {"measure": adler.Measure.every_step("finite_difference")}
EVERY_THIRD: dict[str, Any] = {"measure": adler.Measure(every=3, fraction=1.0, warmup=0)}
GUARDS: dict[str, Any] = {"guard": adler.Guard(2.0, max_kl=0.1, max_relative_change=0.1)}
MUON: dict[str, Any] = {"kind": adler.AdlerMuon, "matrices": ["*weight"], "tests": True}
# Under a direction that does not depend on the gradient's scale, and by far.
CLIPPED: dict[str, Any] = {"kind": adler.AdlerAdam, "clip": 0.01, "adam_eps": 1e-12}


def network(batchnorm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    middle = nn.BatchNorm1d(7) if batchnorm else nn.Tanh()
    return nn.Sequential(
        nn.Linear(4, 7), middle, nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)
    ).double()


def joint_batches(count: int = STEPS, size: int = 12, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 4, generator=generator, dtype=torch.float64),
            torch.randint(3, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def shares(x: Tensor, y: Tensor, ranks: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.chunk(ranks), y.chunk(ranks), strict=True))


def uneven_shares(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Two, the second half as long as the first."""
    return [(x[:8], y[:8]), (x[8:], y[8:])]


class Barrier(nn.Module):
    """A loss whose value, but not its gradient, is infinite where a target is negative."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        wall = torch.where(targets.min() < 0, torch.inf, 0.0)
        return nn.functional.cross_entropy(outputs, targets.clamp(min=0)) + wall


def whole(tensor: Tensor) -> Tensor:
    """A copy of all of it, wherever its parts are."""
    full = getattr(tensor, "full_tensor", None)
    return tensor.detach().clone() if full is None else full().detach().clone()


def outputs_in_a_test(model: nn.Module) -> Tensor:
    """In eval mode, without gradients."""
    generator = torch.Generator().manual_seed(2)
    model.eval()
    with torch.no_grad():
        found: Tensor = model(torch.randn(2, 4, dtype=torch.float64, generator=generator))
    model.train()
    return found.clone()


def train(
    model: nn.Module,
    optimizer: adler.Adler | adler.AdlerAdam | adler.AdlerMuon | adler.AdlerScheduleFree,
    batches: Iterable[list[tuple[Tensor, Tensor]]],
    criterion: Callable[..., Tensor],
    before_step: Callable[[], None] = lambda: None,
    tests: bool = False,
    clip: float = 0.0,
) -> dict[str, Any]:
    """A step for each list of batches, whose mean loss it descends; what every step did.

    With ``tests`` also what the model says in a test before each step; with ``clip`` gradients are
    no longer than that.
    """
    steps, tested = [], []
    for parts in batches:
        if tests:
            tested.append(outputs_in_a_test(model))
        optimizer.zero_grad()
        for x, y in parts:
            (criterion(model(x), y) / len(parts)).backward()
        before_step()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        assert optimizer.last_step is not None
        told = optimizer.last_step._replace(consistency=torch.zeros(()))  # unknown between ranks
        steps.append([float(number) for number in told])
    names = [name for name, _ in model.named_parameters()]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        "steps": steps,
        "params": torch.cat([whole(p).flatten() for p in params]),
        "buffers": [b.clone() for b in model.buffers()],
        "names": names,
        "tested": tested,
        "average": [optimizer.param_groups[0][key] for key in ("rate_total", "rate_weight")],
    }
