r"""By what factor the loop has multiplied the gradients since backpropagation left them.

Clipping by norm makes $\kappa g$ of a gradient $g$. A direction that is linear in the gradient goes
$\kappa$ times less far, which is what clipping is for. A direction that does not depend on the
gradient's scale, as Adam's, is the same as without clipping: its second moment has shrunk with the
gradient. So must its rate be, and the slope along it is $g \cdot d$, not $\kappa g \cdot d$. The
factor is read off a few small gradients, which are copied at the end of the backward pass. With
several processes that is after these have exchanged them, so that all find one factor.
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
from adler._tensors import dot, widest

__all__ = ["GradientScale"]

# How many gradients are copied: the smallest.
_COUNT = 4


class _Made(NamedTuple):
    """A gradient as the backward pass left it."""

    version: tuple[int, int]
    copy: Tensor


class GradientScale:
    """Watches the smallest of some parameters.

    Args:
        params: Leaves, maybe sharded; others are not looked at.

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
        able = [p for p in params if p.requires_grad and p.is_leaf]
        self._watched = [weakref.ref(p) for p in sorted(able, key=Tensor.numel)[:_COUNT]]
        self._made: dict[int, _Made] = {}
        me = weakref.ref(self)

        def note(p: Tensor) -> None:
            alive, gradient = me(), p.grad
            if alive is not None and gradient is not None and not gradient.is_sparse:
                copy = gradient.detach().clone()
                alive._made[id(p)] = _Made(_version_of(gradient), copy)

        def made(p: Tensor) -> None:
            distributed.when_exchanged(lambda: note(p))

        params = [p for p in (known() for known in self._watched) if p is not None]
        handles = [p.register_post_accumulate_grad_hook(made) for p in params]  # type: ignore[no-untyped-call]
        self.remove = weakref.finalize(self, remove_all, handles)

    def factor(self) -> Tensor | None:
        """What the gradients are of those that were made, 0-dim, on their device.

        Returns:
            NaN where they are no multiple of them; None where they are as they were made, or it is
            not known. Where parameters are sharded never None: all ranks ask each other, or none.
        """
        now, then, unmodified, sharded = [], [], True, False
        for known in self._watched:
            p = known()
            if p is None:
                continue
            sharded = sharded or distributed.is_sharded(p)
            made, gradient = self._made.get(id(p)), p.grad
            if made is None or gradient is None or gradient.shape != made.copy.shape:
                continue
            unmodified = unmodified and made.version == _version_of(gradient)
            now.append(gradient.detach())
            then.append(made.copy)
        if not now or (unmodified and not sharded):
            return None
        eps = max(torch.finfo(gradient.dtype).eps for gradient in now)
        then, now = ([t.to(widest(t.device)) for t in tensors] for tensors in (then, now))
        # In one sum each, so that ranks that have different parts of the gradients agree.
        then_then, then_now, now_now = (dot(then, then), dot(then, now), dot(now, now))
        factor = then_now / then_then
        # ‖b − κa‖², where κ makes it least; a difference of sums, with their rounding.
        apart = now_now - factor * then_now
        within = max((8 * eps) ** 2, 1e-6, 64 * torch.finfo(apart.dtype).eps)
        multiple = (apart <= within * now_now) & (factor > 0) & (factor < math.inf)
        return torch.where(multiple, factor, math.nan)


def _version_of(gradient: Tensor) -> tuple[int, int]:
    """Which tensor it is, and how often it was written."""
    return id(gradient), gradient._version
