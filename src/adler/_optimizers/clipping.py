r"""By what factor the loop has multiplied the gradients since backpropagation left them.

Clipping by norm makes $\kappa g$ of a gradient $g$. A direction that is linear in the gradient goes
$\kappa$ times less far, which is what clipping is for. A direction that does not depend on the
gradient's scale, as Adam's, is the same as without clipping: its second moment has shrunk with the
gradient. So must its rate be, and the slope along it is $g \cdot d$, not $\kappa g \cdot d$. The
factor is read off a few small gradients, which a hook copies when they are made.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from adler import _distributed as distributed
from adler._recording.hooks import remove_all
from adler._tensors import widest

__all__ = ["GradientScale"]

# How many gradients are copied: the smallest.
_COUNT = 4


class _Made(NamedTuple):
    """A gradient as backpropagation left it."""

    version: tuple[int, int]
    copy: Tensor


class GradientScale:
    """Watches the smallest of some parameters.

    Args:
        params: Sharded ones, whose gradients others exchange, are not looked at.

    Examples:
        >>> p = torch.ones(3, requires_grad=True)
        >>> scale = GradientScale([p])
        >>> (2 * p).sum().backward()
        >>> print(scale.factor())
        None
        >>> _ = torch.nn.utils.clip_grad_norm_([p], 1.0)
        >>> round(float(scale.factor()), 4)
        0.2887
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        able = [
            p for p in params if p.requires_grad and p.is_leaf and not distributed.is_sharded(p)
        ]
        self._watched = [weakref.ref(p) for p in sorted(able, key=Tensor.numel)[:_COUNT]]
        self._made: dict[int, _Made] = {}
        me = weakref.ref(self)

        def note(p: Tensor) -> None:
            alive, gradient = me(), p.grad
            if alive is not None and gradient is not None and not gradient.is_sparse:
                copy = gradient.detach().clone()
                alive._made[id(p)] = _Made(_version_of(gradient), copy)

        params = [p for p in (known() for known in self._watched) if p is not None]
        handles = [p.register_post_accumulate_grad_hook(note) for p in params]  # type: ignore[no-untyped-call]
        self.remove = weakref.finalize(self, remove_all, handles)

    def factor(self) -> Tensor | None:
        """What the gradients are of those that were made, 0-dim, on their device.

        Returns:
            NaN where they are no multiple of them; None where they are as they were made, or it is
            not known.
        """
        now, then, unmodified = [], [], True
        for known in self._watched:
            p = known()
            made = None if p is None else self._made.get(id(p))
            gradient = None if p is None else p.grad
            if made is None or gradient is None or gradient.shape != made.copy.shape:
                continue
            unmodified = unmodified and made.version == _version_of(gradient)
            now.append(gradient.detach())
            then.append(made.copy)
        if unmodified:
            return None
        home = now[0].device
        a, b = (
            torch.cat([t.reshape(-1).to(home, widest(home)) for t in tensors])
            for tensors in (then, now)
        )
        factor = a.dot(b) / a.dot(a)
        rest = (b - factor * a).norm()
        within = 8 * max(torch.finfo(t.dtype).eps for t in now)
        multiple = (rest <= max(within, 1e-3) * b.norm()) & (factor > 0) & (factor < math.inf)
        return torch.where(multiple, factor, math.nan)


def _version_of(gradient: Tensor) -> tuple[int, int]:
    """Which tensor it is, and how often it was written."""
    return id(gradient), gradient._version
