r"""The step of an average of iterates, for any direction.

Three points take the place of one. Gradient, slope and curvature are taken at $y$, between the fast
iterate $z$, which makes the steps, and the average $x$ of all $z$ so far:

$$
z \leftarrow z - \frac{\eta}{s_t}\, u, \qquad x \leftarrow x + \tfrac1t (z - x), \qquad
y = (1 - \beta)\, z + \beta x, \qquad s_t = 1 - \beta\,(1 - \tfrac1t).
$$

Of a step of $z$ only the share $s_t$ arrives at once at $y$, where its length was measured. Divided
by it, the step moves $y$ by $\eta\, u$: the measured length is that of the move where it was
measured. The share falls from 1 to $1 - \beta$, which is a warm-up of $z$ for nothing. A direction
with a momentum $\mu$ of its own has each gradient act $1 / (1 - \mu)$ times already, and is
multiplied by $\max(1, (1 - \mu) / s_t)$ instead.

The parameters are $y$; of the others only $z$ is stored (`adler._optimizers.points`).

Source of the points: A. Defazio et al., *The Road Less Scheduled*, arXiv 2405.15682.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adler import _distributed as distributed
from adler import _tensors
from adler._optimizers import points
from adler._optimizers.direction import Direction, State, count_, moments, shares

__all__ = ["Interpolation", "fast_state", "interpolate_"]


class Interpolation(Direction):
    """Another direction's step of the fast iterate, and with it of the average and of ``y``.

    Args:
        inner: What the fast iterate moves along.
        state: The optimizer's; holds ``z`` and ``step``.
        equal: Whether the counts of a group's parameters are equal, by its id.
        interpolation: From a group to ``β``.
    """

    def __init__(
        self,
        inner: Direction,
        state: State,
        equal: Mapping[int, bool],
        interpolation: Callable[[Mapping[str, Any]], float | None],
    ) -> None:
        super().__init__(inner.along)
        self._inner, self._state, self._equal = inner, state, equal
        self.scale_free, self.made = inner.scale_free, inner.made
        self._interpolation = interpolation

    def look(
        self, gradients: list[Tensor], home: torch.device, measured: bool
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The inner direction's."""
        found = self._inner.look(gradients, home, measured)
        self.along = self._inner.along
        return found

    def descend(
        self, group: Mapping[str, Any], params: list[Tensor], rate: Tensor, skipped: Tensor
    ) -> None:
        """As `Direction.descend`; a step that is skipped leaves the state as it was."""
        states = [fast_state(self._state, p) for p in params]
        steps, fast = [mine["step"] for mine in states], [mine["z"] for mine in states]
        count_(steps, skipped)
        directions = self._inner.advance(group, params, skipped)
        directions = self.bounded(params, directions, rate)
        at, directions = points.of_steps(params, states, directions)
        if group["weight_decay"] != 0:
            directions = _with_decay(directions, at, group["weight_decay"], rate)
        interpolation = self._interpolation(group)
        assert interpolation is not None
        interpolate_(
            at,
            directions,
            fast,
            steps,
            rate,
            skipped,
            interpolation=interpolation,
            momentum=self._inner.memory(group),
            equal=self._equal[id(group)],
        )
        points.round_(params, at, skipped)

    def finish(self, skipped: Tensor) -> None:
        """The inner direction's."""
        self._inner.finish(skipped)

    def undo(self) -> None:
        """The inner direction's."""
        self._inner.undo()


def _with_decay(
    directions: Sequence[Tensor], params: Sequence[Tensor], decay: float, rate: Tensor
) -> list[Tensor]:
    """The directions, and the decoupled decay at ``y``, which never flips a sign there."""
    along, at = distributed.local(directions), distributed.local(params)
    amount = rate.reciprocal().clamp(max=decay)  # a rate of 0 allows any
    if _tensors.is_on_host(rate.device):
        return list(torch._foreach_add(along, at, alpha=float(amount.detach().numpy())))
    found = torch._foreach_mul(at, [amount.to(p.device) for p in at])
    torch._foreach_add_(found, along)
    return list(found)


def fast_state(state: State, p: Tensor) -> dict[str, Tensor]:
    """A parameter's state, with an average that begins where it is."""
    mine = moments(state, p)
    if "z" not in mine:
        mine.update(points.begin(p))
    return mine


def interpolate_(
    params: Sequence[Tensor],
    directions: Sequence[Tensor],
    fast: Sequence[Tensor],
    steps: Sequence[Tensor],
    rate: Tensor,
    skip: Tensor,
    *,
    interpolation: float,
    momentum: float = 0.0,
    equal: bool = False,
) -> None:
    r"""In place, a step of $y$ and $z$, or nothing at all; the average $x$ is not stored.

    $$
    y \leftarrow y + \tfrac1t (z - y) - \zeta s_t\, u, \qquad z \leftarrow z - \zeta\, u, \qquad
    \zeta = \eta \max\Bigl(1, \frac{1 - \mu}{s_t}\Bigr)
    $$

    Args:
        params: ``y``; updated.
        directions: ``u``, as many, of the same shapes, dtypes and devices; may be non-finite when
            skipped.
        fast: ``z``; updated.
        steps: ``t`` of each, with this step; 0-dim float32.
        rate: ``η``, 0-dim: how far ``y`` moves where there is no momentum.
        skip: 0-dim bool on the same device as ``rate``: leave every bit of everything alone.
        interpolation: ``β``.
        momentum: ``μ`` of the direction: it has each gradient act ``1 / (1 − μ)`` times, so that
            the step of ``z`` need not be made longer for ``y`` to move as far.
        equal: Whether all steps are known to be equal, which takes fewer kernels.
    """
    for (device, _, _), (y, u, z, counts) in _tensors.local_alike(
        params, directions, fast, steps
    ).items():
        if equal and _tensors.is_on_host(device) and _tensors.is_on_host(rate.device):
            # The same without temporaries, each of which costs as much there as a step of SGD.
            if not skip.numpy():
                new = 1 / max(float(counts[0].numpy()), 1.0)
                share = 1 - interpolation * (1 - new)
                longer = float(rate.detach().numpy()) * max((1 - momentum) / share, 1.0)
                torch._foreach_lerp_(y, z, new)
                torch._foreach_add_(y, u, alpha=-longer * share)
                torch._foreach_add_(z, u, alpha=-longer)
            continue
        veto, mine = skip.to(device), rate.to(device)
        part = shares(counts, equal, device)
        share_of_y = 1 - interpolation * (1 - part)
        of_z = mine * ((1 - momentum) / share_of_y).clamp(min=1)
        apart = torch._foreach_sub(y, z)
        _tensors.descend_each_(y, list(apart), part, veto, equal)
        _tensors.descend_each_(y, u, of_z * share_of_y, veto, equal)
        _tensors.descend_each_(z, u, of_z, veto, equal)
