"""Steps of another optimizer, taken to see what they subtract."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import Optimizer
from torch.utils import _pytree as pytree

__all__ = ["displacement", "drop_decay", "restarted"]


@torch.no_grad()
def displacement(
    base: Optimizer, params: Sequence[Tensor], gradients: Sequence[Tensor]
) -> list[Tensor]:
    """What a step of the base at rate one subtracts; its state advances, the parameters stay.

    Args:
        base: Steps without a closure.
        params: Of the base. Its others have no gradient in this step.
        gradients: As many.
    """
    # All of them: a base may move a parameter that has no gradient.
    everything = [p for group in base.param_groups for p in group["params"] if not is_lazy(p)]
    before = {p: p.detach().clone() for p in everything}
    given = dict(zip(params, gradients, strict=True))
    kept = [p.grad for p in everything]
    rates = [group["lr"] for group in base.param_groups]
    try:
        for p in everything:
            p.grad = given[p].clone() if p in given else None  # the base may write into it
        for group, lr in zip(base.param_groups, rates, strict=True):
            group["lr"] = torch.ones_like(lr) if isinstance(lr, Tensor) else 1.0
        base.step()
        return list(torch._foreach_sub([before[p] for p in params], list(params)))
    finally:
        torch._foreach_copy_(everything, list(before.values()))
        for p, grad in zip(everything, kept, strict=True):
            p.grad = grad
        for group, lr in zip(base.param_groups, rates, strict=True):
            group["lr"] = lr


def drop_decay(base: Optimizer) -> None:
    """No weight decay from now on."""
    for group in base.param_groups:
        if "weight_decay" in group:
            group["weight_decay"] = 0.0


@contextlib.contextmanager
def restarted(base: Optimizer) -> Iterator[None]:
    """The base as before its first step, and without weight decay; afterwards as it was.

    Its options are the present ones. A count of steps in its groups (``step``) starts anew.
    """
    state, groups = dict(base.state), [dict(group) for group in base.param_groups]
    base.state.clear()  # in place: some bases have it from another optimizer
    try:
        for group in base.param_groups:
            group.update(_copied(group))
            if "step" in group:
                del group["step"]
            if "step" in base.defaults:
                group["step"] = base.defaults["step"]
        drop_decay(base)
        yield
    finally:
        base.state.clear()
        base.state.update(state)
        for group, kept in zip(base.param_groups, groups, strict=True):
            group.clear()
            group.update(kept)


def _copied(group: Mapping[str, Any]) -> dict[str, Any]:
    """Its options, tensors among which a step may write into."""
    options = {key: value for key, value in group.items() if key != "params"}
    copied: dict[str, Any] = pytree.tree_map_only(Tensor, torch.clone, options)
    return copied
