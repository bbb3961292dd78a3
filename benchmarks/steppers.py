"""Ways to make a training step: this library's, and what one would write or pick instead.

Every peer of the measurement finds the same number (the curvature of this batch's loss along its
gradient, or a step length from it) by its own package or the usual recipe, and steps by it. Others
are optimizers that one would pick instead, as `benchmarks.suite` runs them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import adler
from adler import Measure
from adler.curvature.jacobian import differentiable_attention
from benchmarks.suite.methods import method
from benchmarks.suite.steppers import Setting

__all__ = [
    "BASE",
    "DEFAULT",
    "LOW_COST",
    "OURS",
    "PEERS",
    "OptimizedStepper",
    "Step",
    "Stepper",
    "measured",
    "of_suite",
    "optimized",
]

Step = Callable[[Tensor, Tensor], None]
Stepper = Callable[[nn.Module, nn.Module], Step]


class OptimizedStepper(Protocol):
    """A `Stepper` that can also compute the loss under autocast to bfloat16."""

    def __call__(self, model: nn.Module, criterion: nn.Module, *, autocast: bool = False) -> Step:
        """Begins."""


BASE = "SGD"


def optimized(
    make: Callable[[nn.Module, nn.Module], torch.optim.Optimizer],
) -> OptimizedStepper:
    """The plain loop."""

    def stepper(model: nn.Module, criterion: nn.Module, *, autocast: bool = False) -> Step:
        optimizer = make(model, criterion)

        def step(x: Tensor, y: Tensor) -> None:
            optimizer.zero_grad()
            with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
                loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()

        return step

    return stepper


def measured(kind: Callable[..., torch.optim.Optimizer], measure: Measure) -> OptimizedStepper:
    """An optimizer of this library."""
    return optimized(lambda model, loss: kind(model.parameters(), model, loss, measure=measure))


def of_suite(name: str) -> OptimizedStepper:
    """A method of `benchmarks.suite`, as it is run there, in a run that does not end soon."""

    def stepper(model: nn.Module, criterion: nn.Module, *, autocast: bool = False) -> Step:
        setting = Setting(model, criterion, 1e-3, 10**6, 10**3, batches=lambda: iter(()))
        trained = method(name).make(setting)
        trained.train()

        def step(x: Tensor, y: Tensor) -> None:
            trained.optimizer.zero_grad()
            with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
                loss = criterion(model(x), y)
            loss.backward()
            trained.after_backward(loss)

        return step

    return stepper


# As after the first hundred steps.
DEFAULT = Measure(warmup=0)
LOW_COST = dataclasses.replace(Measure.low_cost(), warmup=0)

OURS: dict[str, Stepper] = {
    BASE: optimized(lambda model, _: torch.optim.SGD(model.parameters(), lr=1e-3)),
    "forward": measured(adler.Adler, Measure.every_step()),
    "finite_difference": measured(adler.Adler, Measure.every_step("finite_difference")),
    "double_backward": measured(adler.Adler, Measure.every_step("double_backward")),
    "low_cost": measured(adler.Adler, LOW_COST),
    # Measures at the first step only: all that is not a replay.
    "all but the measurement": measured(adler.Adler, Measure(every=10**9, warmup=0)),
    "AdamW": of_suite("adamw"),
    # As by default, once the first hundred steps are over.
    "AdlerScheduleFree": measured(adler.AdlerScheduleFree, DEFAULT),
    "AdlerScheduleFree, low_cost": measured(adler.AdlerScheduleFree, LOW_COST),
    "Adler": measured(adler.Adler, DEFAULT),
    "AdlerAdam": measured(adler.AdlerAdam, DEFAULT),
    "AdlerMuon": measured(adler.AdlerMuon, DEFAULT),
    "AdlerScheduleFree, every step": measured(adler.AdlerScheduleFree, Measure.every_step()),
}


def _update(model: nn.Module, gradients: list[Tensor], c: Tensor) -> None:
    """``θ ← θ − min(g·g / c, 1e-3) g``: bounded, since untrained curvature can be anything."""
    with torch.no_grad():
        slope = sum(float((g * g).sum()) for g in gradients)
        rate = min(slope / max(float(c), 1e-12), 1e-3)
        for p, g in zip(model.parameters(), gradients, strict=True):
            p.add_(g, alpha=-rate)


def _dot(a: Any, b: Any) -> Tensor:
    return torch.stack([(s * t).sum() for s, t in zip(a, b, strict=True)]).sum()


def curvlinops(model: nn.Module, criterion: nn.Module) -> Step:
    """`curvlinops-for-pytorch`: the GGN as a linear operator, applied to the gradient."""
    from curvlinops import GGNLinearOperator  # only who measures needs it

    def step(x: Tensor, y: Tensor) -> None:
        model.zero_grad()
        criterion(model(x), y).backward()
        params = list(model.parameters())
        gradients = [p.grad for p in params if p.grad is not None]
        data: Any = [(x, y)]
        with differentiable_attention():
            operator = GGNLinearOperator(model, criterion, params, data, check_deterministic=False)
            product = operator @ gradients
        _update(model, gradients, _dot(gradients, product))

    return step


def backpack(model: nn.Module, criterion: nn.Module) -> Step:
    """`backpack-for-pytorch`: its GGN-vector product, on the graph of the training forward."""
    from backpack.hessianfree.ggnvp import ggn_vector_product

    def step(x: Tensor, y: Tensor) -> None:
        model.zero_grad()
        with differentiable_attention():
            outputs = model(x)
            loss = criterion(outputs, y)
            loss.backward(retain_graph=True)
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            product = ggn_vector_product(loss, outputs, model, gradients)
        _update(model, gradients, _dot(gradients, product))

    return step


def pearlmutter(model: nn.Module, criterion: nn.Module) -> Step:
    """The Hessian (not the GGN) along the gradient, by differentiating twice.

    Source: B. A. Pearlmutter, Fast exact multiplication by the Hessian, 1994.
    """

    def step(x: Tensor, y: Tensor) -> None:
        params = list(model.parameters())
        with differentiable_attention():
            loss = criterion(model(x), y)
            graph = torch.autograd.grad(loss, params, create_graph=True)
            gradients = [g.detach() for g in graph]
            product = torch.autograd.grad(_dot(graph, gradients), params)
        _update(model, gradients, _dot(gradients, product))

    return step


def gen_optim(model: nn.Module, criterion: nn.Module) -> Step:
    """`gen-optim`: a parabola through losses on both sides of the iterate, every step."""
    from GeN import lr_parabola

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        lr_parabola(
            model,
            optimizer,
            criterion,
            tr_iter=iter([(x, y)]),
            device=x.device,
            task="image_cls",
            lr_factor=[-1, 0, 1],
        )
        optimizer.step()

    return step


def line_search(model: nn.Module, criterion: nn.Module) -> Step:
    """Backtracking until the batch's loss has fallen by Armijo's condition.

    Source: S. Vaswani et al., arXiv 1905.09997: c = 0.1, shrunk by 0.9; each step starts from the
    last one's length, slightly enlarged.
    """
    last = [1e-3]

    def step(x: Tensor, y: Tensor) -> None:
        model.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        with torch.no_grad():
            pairs = [(p, p.grad) for p in model.parameters() if p.grad is not None]
            before = [p.clone() for p, _ in pairs]
            slope = sum(float((g * g).sum()) for _, g in pairs)
            rate = 1.01 * last[0]
            for _ in range(20):
                for (p, g), start in zip(pairs, before, strict=True):
                    torch.add(start, g, alpha=-rate, out=p)
                if float(criterion(model(x), y)) <= float(loss.detach()) - 0.1 * rate * slope:
                    break
                rate *= 0.9
            last[0] = rate

    return step


PEERS: dict[str, Stepper] = {
    "curvlinops": curvlinops,
    "backpack": backpack,
    "Pearlmutter": pearlmutter,
    "gen-optim": gen_optim,
    "line search": line_search,
    "Schedule-Free AdamW": of_suite("schedulefree-adamw"),
    "Muon + AdamW": of_suite("muon-cosine-tuned"),
}
