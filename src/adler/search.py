r"""The search: from a measured slope and curvature to the length of the step.

This is the one room for guards: what enters the average, what bounds the step, what is skipped.
Everything is a 0-dim tensor on the device, chosen with ``torch.where``: the host never waits.

With $\eta_k = \texttt{slope} / (c + \epsilon\, d^\top d)$ the rules are

1. Gradient zero or not finite, loss or curvature not finite: the step is *skipped*, the average
   unchanged.
2. Guarded and $c \le 0$ (a linear or non-convex loss along ``d``): the quadratic model has no
   minimiser, so the average is unchanged and its present value is used (*clipped*), or the step is
   skipped while there is none.
3. Otherwise $\eta_k$ enters the average.
4. The step is no longer than (*clipped*)
    - ``trust_region`` times $\eta_k$: along ``d`` the model is back at its start at $2\eta_k$;
    - $\sqrt{2\, \mathtt{max\_kl} \cdot \mathrm{nat} / c}$: the batch's predictions move by at
      most ``max_kl`` nats an example. One batch is weak evidence for more;
    - ``max_relative_change`` times `adler.update.reach`: no weight tensor moves by more than that
      fraction of its norm. Further away the network is not linear, whatever the model says: on the
      plateau where a deep network starts, $c \approx 0$ and one step could kill every unit;
    - $10^{18} / \max(1, \sqrt{\texttt{slope}})$, so that no number of steps overflows float32: a
      flat batch has rates up to $1/\epsilon$, and the average hands them on.

``trust_region=None`` is Algorithm 1 to the letter: only rule 1 remains.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from adler.averaging import Average, DiscountedMean
from adler.curvature import learning_rate

__all__ = ["Guard", "Measurement", "StepLength", "remembered_step_length", "step_length"]

# Longer than any step that is meant; as many of them as there are cannot overflow float32.
_LONGEST = 1e18


class Measurement(NamedTuple):
    """What one minibatch says of the loss along a direction ``d``; 0-dim tensors.

    Attributes:
        slope: ``g·d``.
        curvature: ``c = vᵀ Q v``, with ``v = J d``.
        squared_norm: ``d·d``.
        nat: What one nat an example is worth in units of the loss.
        reach: Step length at which some weight tensor has moved by its own norm.
        finite: Whether the loss, where known, is finite.
    """

    slope: Tensor
    curvature: Tensor
    squared_norm: Tensor
    nat: Tensor
    reach: Tensor
    finite: Tensor


class Guard(NamedTuple):
    """How long a step may be.

    Attributes:
        trust_region: In minibatch rates; None: no guard at all.
        max_kl: In nats an example; None: any.
        max_relative_change: As a fraction of a weight tensor's norm; None: any.
    """

    trust_region: float | None
    max_kl: float | None
    max_relative_change: float | None


class StepLength(NamedTuple):
    """The outcome of a search; 0-dim tensors.

    Attributes:
        rate: Length of the step along ``-d``; 0 where skipped.
        minibatch_lr: The minimiser of this minibatch's model.
        bound: What the batch allows, for steps until the next measurement.
        clipped: Whether a guard, not the average, set the rate.
        skipped: Whether there is no step.
    """

    rate: Tensor
    minibatch_lr: Tensor
    bound: Tensor
    clipped: Tensor
    skipped: Tensor


def step_length(
    measured: Measurement,
    average: Average,
    mean: DiscountedMean,
    guard: Guard,
    *,
    beta: float,
    eps: float,
) -> tuple[StepLength, Average]:
    """Applies the rules above.

    Examples:
        >>> one = torch.ones((), dtype=torch.float64)
        >>> measured = Measurement(slope=4 * one, curvature=2 * one, squared_norm=4 * one,
        ...                        nat=one, reach=100 * one, finite=one.bool())
        >>> from adler.averaging import geometric
        >>> found, average = step_length(measured, Average.empty(), geometric,
        ...                              Guard(2.0, None, None), beta=0.99, eps=0.0)
        >>> float(found.rate), bool(found.clipped)
        (2.0, False)
    """
    slope, curvature, squared_norm, nat, reach, finite = measured
    minibatch_lr = learning_rate(slope, curvature, squared_norm, eps)
    usable = finite & torch.isfinite(slope) & (slope > 0) & torch.isfinite(curvature)
    admitted = usable & torch.isfinite(minibatch_lr) & (minibatch_lr > 0)
    bound = torch.full_like(minibatch_lr, math.inf)
    if guard.trust_region is not None:
        admitted = admitted & (curvature > 0)
        bound = torch.minimum(bound, guard.trust_region * minibatch_lr)
        if guard.max_kl is not None:
            # Losses subtracted from each other have no such scale: nat may be negative there.
            divergence_bound = (2 * guard.max_kl * nat / curvature).sqrt()
            bound = torch.where(nat > 0, torch.minimum(bound, divergence_bound), bound)
        bound = torch.where(admitted, bound, math.inf)

    pushed = mean.push(average, minibatch_lr, beta)
    average = Average(
        torch.where(admitted, pushed.total, average.total),
        torch.where(admitted, pushed.weight, average.weight),
    )
    found = _bounded(mean.read(average), bound, reach, slope, guard)
    skipped = ~usable | (average.weight == 0)
    return _outcome(
        found, minibatch_lr, bound, (usable & ~admitted) | found.clipped, skipped
    ), average


def remembered_step_length(
    slope: Tensor,
    reach: Tensor,
    minibatch_lr: Tensor,
    bound: Tensor,
    average: Average,
    mean: DiscountedMean,
    guard: Guard,
) -> StepLength:
    """The length of a step that measures no curvature: the average, under the last bound.

    Args:
        slope: ``g·d`` of this step.
        reach: Of this step.
        minibatch_lr: The last step's that measured.
        bound: The last step's that measured.
        average: Of all measured so far; unchanged by this.
        mean: How to read it.
        guard: As in `step_length`.
    """
    found = _bounded(mean.read(average), bound, reach, slope, guard)
    skipped = ~torch.isfinite(slope) | (slope <= 0) | (average.weight == 0)
    return _outcome(found, minibatch_lr, bound, found.clipped, skipped)


class _Bounded(NamedTuple):
    rate: Tensor
    clipped: Tensor


def _bounded(rate: Tensor, bound: Tensor, reach: Tensor, slope: Tensor, guard: Guard) -> _Bounded:
    if guard.trust_region is not None:
        bound = torch.minimum(bound, _LONGEST * slope.clamp(min=1).rsqrt())
        if guard.max_relative_change is not None:
            bound = torch.minimum(bound, guard.max_relative_change * reach)
    return _Bounded(torch.minimum(rate, bound), rate > bound)


def _outcome(
    found: _Bounded, minibatch_lr: Tensor, bound: Tensor, clipped: Tensor, skipped: Tensor
) -> StepLength:
    skipped = skipped | ~torch.isfinite(found.rate)  # whatever the reason, never a parameter
    rate = torch.where(skipped, torch.zeros_like(found.rate), found.rate)
    return StepLength(rate, minibatch_lr, bound, clipped & ~skipped, skipped)
