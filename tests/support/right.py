"""The right curvature of any training pass, from its own graph: an independent reference.

``c = dᵀ Jᵀ Q J d`` with ``J d`` by transposing the graph's vector-Jacobian product and ``Q`` by
differentiating the loss twice. It knows nothing of replays: whatever the forward pass did is in the
graph that it is given.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adler import Adler, Measure

__all__ = ["DOUBLE", "body", "check", "measured", "right", "untouched"]

DOUBLE = torch.float64


def right(
    outputs: Sequence[Tensor],
    loss: Callable[..., Tensor],
    params: Iterable[Tensor],
    direction: Sequence[Tensor] | None = None,
) -> float:
    """``c`` along a direction; default: along the gradient.

    Args:
        outputs: Of the network, on their graph.
        loss: From them.
        params: Leaves of the graph.
        direction: One tensor for each.
    """
    params, options = list(params), {"allow_unused": True, "materialize_grads": True}
    if direction is None:
        direction = torch.autograd.grad(loss(*outputs), params, retain_graph=True, **options)
    u = [torch.zeros_like(o, requires_grad=True) for o in outputs]
    pulled = torch.autograd.grad(outputs, params, u, create_graph=True, **options)
    total = sum((p * d.detach()).sum() for p, d in zip(pulled, direction))
    v = torch.autograd.grad(total, u, **options)
    leaves = [o.detach().clone().requires_grad_() for o in outputs]
    slopes = torch.autograd.grad(loss(*leaves), leaves, create_graph=True, **options)
    along = sum((s * t).sum() for s, t in zip(slopes, v))
    if not along.requires_grad:
        return 0.0
    second = torch.autograd.grad(along, leaves, **options)
    return float(sum((q * t).sum() for q, t in zip(second, v)))


def body(inputs: int = 6, outputs: int = 3) -> nn.Sequential:
    """A small network in float64."""
    layers = nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs))
    return layers.to(DOUBLE)


def measured(
    model: nn.Module,
    criterion: Any,
    loop: Callable[[nn.Module, Any], Tensor],
    *,
    params: Iterable[Tensor] | None = None,
    jvp: str = "forward",
    quiet: bool = True,
    **options: Any,
) -> Any:
    """An optimizer after one step of a loop, which says the loss from the model and criterion."""
    params = model.parameters() if params is None else params
    optimizer = Adler(params, model, criterion, measure=Measure.every_step(jvp), **options)
    loop(model, criterion).backward()
    with warnings.catch_warnings():
        if quiet:
            warnings.simplefilter("ignore", RuntimeWarning)
        optimizer.step()
    return optimizer


def check(optimizer: Any, expected: float, rel: float = 1e-6) -> None:
    """The last step measured that curvature, and believed it."""
    last = optimizer.last_step
    assert float(last.curvature) == pytest.approx(expected, rel=rel)
    assert bool(last.trusted)
    assert not bool(last.skipped)


def untouched(*modules: nn.Module) -> list[Any]:
    """What the modules hold, by value: two of these are equal if nothing has changed."""
    held = []
    for module in (m for root in modules for m in root.modules()):
        own = {k: v for k, v in vars(module).items() if "hook" not in k and k != "_modules"}
        held.append(_plain(copy.deepcopy(own)))
    return held


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.detach().double().flatten().tolist()
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)) or type(value).__name__ == "deque":
        return [_plain(v) for v in value]
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if hasattr(value, "getstate"):
        return value.getstate()
    if hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type)):
        return _plain(vars(value))
    return value if isinstance(value, (int, float, str, bool)) else repr(type(value))
