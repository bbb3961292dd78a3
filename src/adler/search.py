r"""The search: from a measured slope and curvature to the length of the step.

This is the one room for guards: what enters the average, what bounds the step, what is skipped.
Everything is a 0-dim tensor on the device, chosen with ``torch.where``: the host never waits.

With $\eta_k = \texttt{slope} / (c + \epsilon\, d^\top d)$ the rules are

1. Gradient zero or not finite, loss or curvature not finite: the step is *skipped*, the average
   unchanged.
2. Guarded and $c \le 0$ (a linear or non-convex loss along ``d``): the quadratic model has no
   minimiser, so the average is unchanged and its present value is used (*clipped*), or the step is
   skipped while there is none.
3. Otherwise $\eta_k$ enters the average. Along ``d`` the model is back at its start at
   $2\eta_k$, so the step is at most ``trust_region`` times $\eta_k$ (*clipped*).

``trust_region=None`` is Algorithm 1 to the letter: only rule 1 remains.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from adler.averaging import Average, DiscountedMean
from adler.curvature import learning_rate

__all__ = ["Measurement", "StepLength", "remembered_step_length", "step_length"]


class Measurement(NamedTuple):
    """What one minibatch says of the loss along a direction ``d``; 0-dim tensors.

    Attributes:
        slope: ``g·d``.
        curvature: ``c = vᵀ Q v``, with ``v = J d``.
        squared_norm: ``d·d``.
        finite: Whether the loss, where known, is finite.
    """

    slope: Tensor
    curvature: Tensor
    squared_norm: Tensor
    finite: Tensor


class StepLength(NamedTuple):
    """The outcome of a search; 0-dim tensors.

    Attributes:
        rate: Length of the step along ``-d``; 0 where skipped.
        minibatch_lr: The minimiser of this minibatch's model.
        clipped: Whether a guard, not the average, set the rate.
        skipped: Whether there is no step.
    """

    rate: Tensor
    minibatch_lr: Tensor
    clipped: Tensor
    skipped: Tensor


def step_length(
    measured: Measurement,
    average: Average,
    mean: DiscountedMean,
    *,
    beta: float,
    eps: float,
    trust_region: float | None,
) -> tuple[StepLength, Average]:
    """Applies the rules above.

    Examples:
        >>> one = torch.ones((), dtype=torch.float64)
        >>> measured = Measurement(slope=4 * one, curvature=2 * one, squared_norm=4 * one,
        ...                        finite=one.bool())
        >>> from adler.averaging import geometric
        >>> found, average = step_length(measured, Average.empty(), geometric,
        ...                              beta=0.99, eps=0.0, trust_region=2.0)
        >>> float(found.rate), bool(found.clipped)
        (2.0, False)
    """
    slope, curvature, squared_norm, finite = measured
    minibatch_lr = learning_rate(slope, curvature, squared_norm, eps)
    usable = finite & torch.isfinite(slope) & (slope > 0) & torch.isfinite(curvature)
    admitted = usable & torch.isfinite(minibatch_lr) & (minibatch_lr > 0)
    if trust_region is not None:
        admitted = admitted & (curvature > 0)

    pushed = mean.push(average, minibatch_lr, beta)
    average = Average(
        torch.where(admitted, pushed.total, average.total),
        torch.where(admitted, pushed.weight, average.weight),
    )
    rate = mean.read(average)
    clipped = usable & ~admitted
    if trust_region is not None:
        bound = trust_region * minibatch_lr
        clipped = clipped | (admitted & (rate > bound))
        rate = torch.where(admitted, torch.minimum(rate, bound), rate)
    skipped = ~usable | (average.weight == 0)
    rate = torch.where(skipped, torch.zeros_like(rate), rate)
    return StepLength(rate, minibatch_lr, clipped & ~skipped, skipped), average


def remembered_step_length(
    squared_norm: Tensor,
    minibatch_lr: Tensor,
    average: Average,
    mean: DiscountedMean,
    *,
    trust_region: float | None,
) -> StepLength:
    """The length of a step that measures no curvature: the average, under the last bound.

    Args:
        squared_norm: ``d·d`` of this step.
        minibatch_lr: The last step's that measured; NaN or not positive: none.
        average: Of all measured so far; unchanged by this.
        mean: How to read it.
        trust_region: As in `step_length`.
    """
    rate = mean.read(average)
    clipped = torch.zeros_like(squared_norm, dtype=torch.bool)
    if trust_region is not None:
        bound = trust_region * minibatch_lr
        clipped = (bound > 0) & (rate > bound)
        rate = torch.where(clipped, bound, rate)
    skipped = ~torch.isfinite(squared_norm) | (squared_norm == 0) | (average.weight == 0)
    rate = torch.where(skipped, torch.zeros_like(rate), rate)
    return StepLength(rate, minibatch_lr, clipped & ~skipped, skipped)
