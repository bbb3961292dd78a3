"""An optimizer's state, copied so that a step can be taken back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer
from torch.utils import _pytree as pytree

__all__ = ["SavedState"]


class SavedState:
    """A copy of an optimizer's state, and of what it keeps in its groups but ``lr``.

    Args:
        optimizer: Any, whose state is nested dicts, lists and tuples.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._known = dict.fromkeys(optimizer.state)
        leaves, self._form = pytree.tree_flatten(self._now())
        self._leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def _now(self) -> list[Any]:
        groups = [
            {key: value for key, value in group.items() if key not in ("params", "lr")}
            for group in self._optimizer.param_groups
        ]
        return [[dict(each) for each in self._optimizer.state.values()], groups]

    def knows(self, p: Tensor) -> bool:
        """Whether there was state of this parameter."""
        return bool(p in self._known and self._optimizer.state[p])

    def restore(self) -> None:
        """Puts it back; tensors that are still there keep their identity."""
        leaves, form = pytree.tree_flatten(self._now())
        kept = leaves if form == self._form else [None] * len(self._leaves)
        back = [_put_back(now, then) for now, then in zip(kept, self._leaves, strict=True)]
        states, groups = pytree.tree_unflatten(back, self._form)
        for key in [key for key in self._optimizer.state if key not in self._known]:
            del self._optimizer.state[key]
        self._optimizer.state.update(zip(self._known, states, strict=True))
        for group, options in zip(self._optimizer.param_groups, groups, strict=True):
            for key in group.keys() - options.keys() - {"params", "lr"}:
                del group[key]
            group.update(options)

    def restore_where(self, skipped: Tensor) -> None:
        """Puts it back in a step that is skipped.

        The host waits for ``skipped`` only where more than the values of tensors has changed.
        """
        leaves, form = pytree.tree_flatten(self._now())
        pairs = list(zip(leaves, self._leaves, strict=False))
        if form != self._form or not all(_alike(now, then) for now, then in pairs):
            if bool(skipped):
                self.restore()
            return
        for now, then in pairs:
            if isinstance(now, Tensor):
                now.copy_(torch.where(skipped.to(now.device), then, now))


def _alike(now: object, then: object) -> bool:
    """Whether two leaves differ in no more than the values of a tensor."""
    if isinstance(now, Tensor) and isinstance(then, Tensor):
        return now.shape == then.shape and now.dtype == then.dtype and now.device == then.device
    return now is then or (type(now) is type(then) and bool(now == then))


def _put_back(now: object, then: object) -> object:
    if isinstance(now, Tensor) and isinstance(then, Tensor) and _alike(now, then):
        return now.copy_(then)
    return then.clone() if isinstance(then, Tensor) else then
