r"""The search: from a measured slope and curvature to the length of the step.

This is the one room for guards: what enters the average, what bounds the step, what is skipped.
Everything is a 0-dim tensor on the device, chosen with ``torch.where``: the host never waits.

With $\eta_k = \texttt{slope} / (c + \epsilon\, d^\top d)$ the rules are

1. Gradient zero or not finite, loss or curvature not finite: the step is *skipped*, the average
   unchanged.
2. Guarded and $c \le 0$ (a linear or non-convex loss along ``d``), so that the quadratic model has
   no minimiser, or a measurement that contradicts the gradient: the average is unchanged and its
   present value is used (*clipped*), or the step is skipped while there is none.
3. Otherwise $\eta_k$ enters the average.
4. The step is no longer than (*clipped*)
    - ``trust_region`` times $\eta_k$: along ``d`` the model is back at its start at $2\eta_k$;
    - $\sqrt{2\, \mathtt{max\_kl} \cdot \mathrm{nat} / c}$: the batch's predictions move by at
      most ``max_kl`` nats an example. One batch is weak evidence for more;
    - ``max_relative_change`` times `adler._tensors.reach`: no weight tensor moves by more than that
      fraction of its norm. Further away the network is not linear, whatever the model says: on the
      plateau where a deep network starts, $c \approx 0$ and one step could kill every unit;
    - $10^{18} / \max(1, \sqrt{\texttt{slope}})$, so that no number of steps overflows float32: a
      flat batch has rates up to $1/\epsilon$, and the average hands them on.

``trust_region=None`` is Algorithm 1 to the letter: only rule 1 remains.

A step that measures no curvature, or one that contradicts the gradient, takes it from the last
ratio $\rho = c / d^\top d$ that was admitted: $c \approx \rho\, d^\top d$ with the
present slope and direction, under the same bounds. So an average that lags is held back between
measurements too.

Parts of a batch are averaged before they are inverted: $1/c$ of a part is biased, $c$ is not. With
``smoothing`` $\gamma$, $\rho$ is a discounted arithmetic mean over the measurements, and
$\rho\, d^\top d$ takes the place of $c$.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from adler._averaging import Average, DiscountedMean, arithmetic
from adler.curvature import learning_rate

__all__ = [
    "Guard",
    "Measurement",
    "Remembered",
    "StepLength",
    "remembered_step_length",
    "step_length",
]

# Longer than any step that is meant; as many of them as there are cannot overflow float32.
_LONGEST = 1e18


class Measurement(NamedTuple):
    """What one minibatch says of the loss along a direction ``d``; 0-dim tensors.

    Attributes:
        slope: ``g·d``.
        curvature: ``c = vᵀ Q v``, with ``v = J d``.
        squared_norm: ``d·d``.
        nat: What one nat an example is worth in units of the loss.
        reach: Step length at which some weight tensor has moved by its own norm; None: not asked.
        finite: Whether the loss, where known, is finite.
        trusted: Whether the measurement fits the gradient; None: not known.
    """

    slope: Tensor
    curvature: Tensor
    squared_norm: Tensor
    nat: Tensor
    reach: Tensor | None
    finite: Tensor
    trusted: Tensor | None = None


class Remembered(NamedTuple):
    """What measurements leave for later steps; 0-dim tensors.

    Attributes:
        ratio: ``c / d·d``, a discounted mean; of the last measurement alone without smoothing.
        nat: The last measurement's.
    """

    ratio: Average
    nat: Tensor

    @classmethod
    def nothing(cls, device: torch.device | str = "cpu") -> Remembered:
        """Before the first measurement."""
        empty = Average.empty(device)
        return cls(empty, torch.full_like(empty.total, math.inf))

    def curvature(self, squared_norm: Tensor) -> Tensor:
        """Along a direction of that squared norm; NaN before the first measurement."""
        return arithmetic.read(self.ratio) * squared_norm


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
        remembered: For steps until the next measurement.
        clipped: Whether a guard, not the average, set the rate.
        skipped: Whether there is no step.
    """

    rate: Tensor
    minibatch_lr: Tensor
    remembered: Remembered
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
    remembered: Remembered,
    smoothing: float = 0.0,
) -> tuple[StepLength, Average]:
    """Applies the rules above.

    Args:
        measured: By this step.
        average: Of the rates so far.
        mean: How to push and read it.
        guard: How long the step may be.
        beta: Discount of the average.
        eps: Of the minibatch rate.
        remembered: From earlier steps.
        smoothing: Discount of the mean of the curvature, in [0, 1); 0: none.

    Examples:
        >>> one = torch.ones((), dtype=torch.float64)
        >>> measured = Measurement(slope=4 * one, curvature=2 * one, squared_norm=4 * one,
        ...                        nat=one, reach=100 * one, finite=one.bool())
        >>> from adler._averaging import geometric
        >>> found, average = step_length(measured, Average.empty(), geometric,
        ...                              Guard(2.0, None, None), beta=0.99, eps=0.0,
        ...                              remembered=Remembered.nothing())
        >>> float(found.rate), bool(found.clipped)
        (2.0, False)
    """
    slope, curvature, squared_norm, nat, reach, finite, trusted = measured
    usable = finite & _positive(slope) & (curvature.abs() < math.inf)
    believed = usable if trusted is None else usable & trusted
    ratio = arithmetic.push(remembered.ratio, curvature / squared_norm, smoothing)
    if smoothing > 0:
        ratio = _where(believed, ratio, remembered.ratio)
        curvature = arithmetic.read(ratio) * squared_norm
    minibatch_lr = learning_rate(slope, curvature, squared_norm, eps)
    admitted = believed & _positive(minibatch_lr)
    if guard.trust_region is not None:
        admitted = admitted & (curvature > 0)
    bound = torch.where(admitted, _bound(minibatch_lr, curvature, nat, guard), math.inf)
    if trusted is not None:
        past = remembered.curvature(squared_norm)
        lasting = _bound(learning_rate(slope, past, squared_norm, eps), past, remembered.nat, guard)
        bound = torch.where(trusted, bound, lasting)

    average = _where(admitted, mean.push(average, minibatch_lr, beta), average)
    if smoothing == 0:
        ratio = _where(admitted, ratio, remembered.ratio)
    found = _bounded(mean.read(average), bound, reach, slope, guard)
    after = Remembered(ratio, torch.where(admitted, nat, remembered.nat))
    clipped = ~admitted | found.clipped
    return _outcome(found.rate, minibatch_lr, after, clipped, usable, average), average


def remembered_step_length(
    slope: Tensor,
    squared_norm: Tensor,
    reach: Tensor | None,
    remembered: Remembered,
    average: Average,
    mean: DiscountedMean,
    guard: Guard,
    *,
    eps: float,
) -> StepLength:
    """The length of a step that measures no curvature: the average, under the last ratio's bounds.

    Args:
        slope: ``g·d`` of this step.
        squared_norm: ``d·d`` of this step.
        reach: Of this step.
        remembered: From the steps that measured.
        average: Of all measured so far; unchanged by this.
        mean: How to read it.
        guard: As in `step_length`.
        eps: As in `step_length`.
    """
    curvature = remembered.curvature(squared_norm)
    minibatch_lr = learning_rate(slope, curvature, squared_norm, eps)
    bound = _bound(minibatch_lr, curvature, remembered.nat, guard)
    found = _bounded(mean.read(average), bound, reach, slope, guard)
    usable = _positive(slope)
    return _outcome(found.rate, minibatch_lr, remembered, found.clipped, usable, average)


def _bound(minibatch_lr: Tensor, curvature: Tensor, nat: Tensor, guard: Guard) -> Tensor:
    """What the quadratic model allows; infinite where it has no minimiser."""
    if guard.trust_region is None:
        return torch.full_like(minibatch_lr, math.inf)
    bound = guard.trust_region * minibatch_lr
    if guard.max_kl is not None:
        # Losses subtracted from each other have no such scale: nat may be negative there.
        divergence_bound = (2 * guard.max_kl * nat / curvature).sqrt()
        bound = torch.where(nat > 0, torch.minimum(bound, divergence_bound), bound)
    return torch.where(curvature > 0, bound, math.inf)


def _positive(number: Tensor) -> Tensor:
    """Whether it is positive and finite."""
    return (number > 0) & (number < math.inf)


def _where(condition: Tensor, a: Average, b: Average) -> Average:
    return Average(
        torch.where(condition, a.total, b.total), torch.where(condition, a.weight, b.weight)
    )


class _Bounded(NamedTuple):
    rate: Tensor
    clipped: Tensor


def _bounded(
    rate: Tensor, bound: Tensor, reach: Tensor | None, slope: Tensor, guard: Guard
) -> _Bounded:
    if guard.trust_region is not None:
        bound = torch.minimum(bound, _LONGEST * slope.clamp(min=1).rsqrt())
        if guard.max_relative_change is not None and reach is not None:
            bound = torch.minimum(bound, guard.max_relative_change * reach)
    return _Bounded(torch.minimum(rate, bound), rate > bound)


def _outcome(
    rate: Tensor,
    minibatch_lr: Tensor,
    remembered: Remembered,
    clipped: Tensor,
    usable: Tensor,
    average: Average,
) -> StepLength:
    # Whatever the reason, a rate that is no number reaches no parameter.
    moves = usable & (average.weight > 0) & (rate.abs() < math.inf)
    rate = torch.where(moves, rate, 0.0)
    return StepLength(rate, minibatch_lr, remembered, clipped & moves, ~moves)
