"""The bound on each parameter's step: ``max_relative_change`` of `adler.Guard`."""

from __future__ import annotations

import math
from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adler import _tensors
from adler._distributed import like, local

__all__ = ["RelativeChange", "State", "keep_initial_sizes"]

# An optimizer's, of each parameter.
State = MutableMapping[Tensor, Any]


class RelativeChange:
    r"""How far each parameter may move in one step: a fraction of its norm at the start.

    $$
    \|\Delta\theta_W\| \le \kappa\, \max\bigl(\|\theta_{W, 0}\|, \sqrt{n_W / 3}\bigr)
    $$

    for a tensor $W$ of $n_W$ rows, which was $\theta_{W, 0}$ before its first step. The floor is
    the norm that PyTorch's default initialisation gives a matrix, so that what starts at zero can
    leave it. Not the present norm: noise lets norms grow, and bound and noise would drive each
    other up. A tensor that would go further is shortened alone, and holds no other back.

    Args:
        params: Those with a gradient.
        along: What is measured along, one tensor for each.
        lengths: Norms of these, 0-dim: a step along them need not take them again.
        fraction: ``κ``.
        state: The optimizer's; holds ``initial_size``, in the parameter's own dtype.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        along: Sequence[Tensor],
        lengths: Sequence[Tensor],
        fraction: float,
        state: State,
    ) -> None:
        keep_initial_sizes(state, params)
        self._known = {id(d): length for d, length in zip(along, lengths, strict=True)}
        self._fraction, self._state = fraction, state

    def factors(
        self, params: Sequence[Tensor], directions: Sequence[Tensor], rate: Tensor
    ) -> Tensor:
        """What to multiply the step of each parameter by, at most 1; 1-dim, on the rate's device.

        Args:
            params: Of one group.
            directions: What each would move along.
            rate: The group's, 0-dim.
        """
        known = [self._known.get(id(d)) for d in directions]
        if any(length is None for length in known):  # along an average of gradients
            known = list(_tensors.lengths(directions))
        lengths = _tensors.stacked([length for length in known if length is not None], rate)
        sizes = _tensors.stacked([self._state[p]["initial_size"] for p in params], rate)
        return (self._fraction * sizes / (rate * lengths)).clamp(max=1)

    def shorten(
        self, params: Sequence[Tensor], directions: Sequence[Tensor], rate: Tensor, in_place: bool
    ) -> list[Tensor]:
        """The directions of a group's parameters, those that would go too far shortened.

        Args:
            params: See `factors`.
            directions: See `factors`.
            rate: See `factors`.
            in_place: Whether the directions may be written to: a new tensor costs the host more
                than several passes over an old one.
        """
        factors, parts = self.factors(params, directions, rate), local(directions)
        if _tensors.is_on_host(rate.device):
            known = factors.numpy().tolist()
            shorter = [
                part if f >= 1 else torch.mul(part, f, out=part if in_place else None)
                for part, f in zip(parts, known, strict=True)
            ]
        else:
            own = [f.to(d.device) for f, d in zip(factors.unbind(), parts, strict=True)]
            if in_place:
                torch._foreach_mul_(parts, own)
                return list(directions)
            shorter = list(torch._foreach_mul(parts, own))
        return [like(part, d) for part, d in zip(shorter, directions, strict=True)]


def keep_initial_sizes(state: State, params: Sequence[Tensor]) -> None:
    """Keeps the norms, or the floors, of those at their first step; see `RelativeChange`."""
    new = [p for p in params if "initial_size" not in state[p]]
    if new:
        for p, norm in zip(new, _tensors.lengths(new), strict=True):
            floor = math.sqrt((p.shape[0] if p.ndim else 1) / 3)
            # In the parameter's dtype, as PyTorch would load it.
            state[p]["initial_size"] = norm.clamp(min=floor).to(p.dtype)
