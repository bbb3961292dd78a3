r"""The search: from a measured slope and curvature to the length of the step.

The single place for guards: what enters the average, what bounds the step, what is skipped.
Everything is a 0-dim tensor on the device, chosen with ``torch.where``: the host never waits.

With $\eta_k = \texttt{slope} / (c + \epsilon\, d^\top d)$ the rules are

1. Gradient zero or not finite, loss or curvature not finite: the step is *skipped*, the average
   unchanged.
2. Guarded and $c \le 0$ (a linear or non-convex loss along ``d``), so that the quadratic model has
   no minimiser, or a measurement that contradicts the gradient: the average is unchanged and its
   present value is used (*clipped*), or the step is skipped while there is none.
3. Otherwise $\eta_k$ enters the average $\hat\eta$.
4. The step is as long as $\hat\eta$ says, but no longer than (*clipped*)
    - ``trust_region`` times $\eta_k$: along ``d`` the model is back at its start at $2\eta_k$;
    - $\sqrt{2\, \mathtt{max\_kl} \cdot \mathrm{loss\ per\ nat} / c}$: the batch's predictions move
      by at most ``max_kl`` nats an example. One batch is weak evidence for more;
    - $10^{18} / \max(1, \sqrt{\texttt{slope}})$, so that no number of steps overflows float32: a
      flat batch has rates up to $1/\epsilon$, and the average hands them on.

Of such a step, each tensor goes no further than ``max_relative_change`` of its initial norm
(`adler._optimizers.relative_change`). Further away the network is not linear, whatever the model
says: on the plateau where a deep network starts, $c \approx 0$ and one step could kill every unit.

``guard=None`` is Algorithm 1 to the letter: of the bounds, only rule 1 remains.

**Between measurements.** A step that measures no curvature, or one that contradicts the gradient,
takes it from the last ratio $c / d^\top d$ that was admitted: $c \approx \mathrm{ratio} \cdot
d^\top d$ with the present slope and direction, under the same bounds. So an average that lags is
held back between measurements too.

**Parts of a batch** say $c$ without bias, but not its inverse: of a part whose $c$ varies about the
whole batch's with relative variance $\rho$, the mean of $\log 1/c$ is too large by $\rho / 2$ (that
of $1/c$ by a factor $1 + \rho$), and rates that are too long train another network.
So what enters the average is divided by that excess; ``spread`` says $\rho$. The bounds take the
ratio from a discounted arithmetic mean over the measurements, with ``smoothing`` $\gamma$.

A measurement stands for the steps until the next one, and counts so many times in the average:
the first steps, which all measure, weigh no more than others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adler._averaging import Average, DiscountedMean, arithmetic
from adler._options import Guard
from adler._tensors import widest
from adler.curvature import learning_rate

__all__ = ["Measurement", "Rule", "SearchState", "StepLength", "step_length"]

# Longer than any step that is meant; as many of them as there are cannot overflow float32.
_LONGEST = 1e18


class Measurement(NamedTuple):
    """What one minibatch says of the loss along a direction ``d``; 0-dim tensors.

    Attributes:
        slope: ``g·d``.
        squared_norm: ``d·d``.
        curvature: ``c = vᵀ Q v``, with ``v = J d``; None: this step does not measure it.
        loss_per_nat: What one nat an example is worth in units of the loss; infinite: not asked.
        finite: Whether the loss, where known, is finite; None: not known.
        trusted: Whether the measurement fits the gradient; None: not known.
        spread: Its square is an estimate of the variance of ``curvature``, of a part of the batch,
            about that of the whole; None: of the whole.
    """

    slope: Tensor
    squared_norm: Tensor
    curvature: Tensor | None = None
    loss_per_nat: Tensor | None = None
    finite: Tensor | None = None
    trusted: Tensor | None = None
    spread: Tensor | None = None


class SearchState(NamedTuple):
    """All that one step hands to the next; tensors are 0-dim and replaced, never mutated.

    Attributes:
        rates: The average of the minibatch rates.
        ratios: Of ``c / d·d``; of the last measurement alone without smoothing.
        loss_per_nat: The last measurement's.
        minibatch_lr: The last step's.
        steps: How many there were.
    """

    rates: Average
    ratios: Average
    loss_per_nat: Tensor
    minibatch_lr: Tensor
    steps: int

    @classmethod
    def empty(cls, device: torch.device | str = "cpu") -> SearchState:
        """Before the first step."""
        return cls.of({}, device)

    def curvature(self, squared_norm: Tensor) -> Tensor:
        """By the remembered ratio, along a direction of that squared norm; NaN if there is none."""
        return arithmetic.read(self.ratios) * squared_norm

    def entries(self) -> dict[str, Any]:
        """By the names under which param groups, and so checkpoints, hold them."""
        values = (*self.rates, *self.ratios, self.loss_per_nat, self.minibatch_lr, self.steps)
        return dict(zip(ENTRIES, values, strict=True))

    @classmethod
    def of(cls, group: Mapping[str, Any], device: torch.device | str) -> SearchState:
        """From a param group; what it does not hold is as before the first step."""
        dtype = widest(torch.device(device))

        def held(key: str, otherwise: float) -> Tensor:
            # Straight to its dtype: a plain number would pass through float32.
            return torch.as_tensor(group.get(key, otherwise), dtype=dtype, device=device)

        return cls(
            Average(held("rate_total", 0.0), held("rate_weight", 0.0)),
            Average(held("curvature_total", 0.0), held("curvature_weight", 0.0)),
            held("loss_per_nat", math.inf),
            held("minibatch_lr", math.nan),
            int(group.get("steps", 0)),
        )


ENTRIES = (
    "rate_total",
    "rate_weight",
    "curvature_total",
    "curvature_weight",
    "loss_per_nat",
    "minibatch_lr",
    "steps",
)


class Rule(NamedTuple):
    """What does not change from step to step.

    Attributes:
        mean: How rates are averaged.
        beta: Discount of the average, of a step.
        eps: ``ε``, which bounds a minibatch's rate by its inverse.
        guard: How long a step may be; None: as long as the average says.
        smoothing: Discount of the mean of the ratios, in [0, 1); 0: the last one only.
        times: How many steps a measurement stands for.
    """

    mean: DiscountedMean
    beta: float = 0.99
    eps: float = 1e-10
    guard: Guard | None = None
    smoothing: float = 0.0
    times: int = 1


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
    seen: Measurement, state: SearchState, rule: Rule
) -> tuple[StepLength, SearchState]:
    """Applies the rules above.

    Args:
        seen: By this step.
        state: After the step before.
        rule: Averages and bounds.

    Returns:
        How far to go, and the state after this step.

    Examples:
        >>> one = torch.ones((), dtype=torch.float64)
        >>> seen = Measurement(slope=4 * one, squared_norm=4 * one, curvature=2 * one)
        >>> from adler._averaging import geometric
        >>> found, state = step_length(seen, SearchState.empty(), Rule(geometric, eps=0.0))
        >>> float(found.rate), bool(found.clipped), state.steps
        (2.0, False, 1)
    """
    if seen.curvature is None:
        usable = _positive(seen.slope)
        bound, minibatch_lr = _remembered_bound(seen, state, rule)
        unmeasured = torch.zeros_like(usable)
        state = state._replace(minibatch_lr=minibatch_lr, steps=state.steps + 1)
    else:
        usable, bound, unmeasured, state = _measured(seen, seen.curvature, state, rule)
    rate = rule.mean.read(state.rates)
    if rule.guard is not None:
        bound = torch.minimum(bound, _LONGEST * seen.slope.clamp(min=1).rsqrt())
    clipped = unmeasured | (rate > bound)
    rate = torch.minimum(rate, bound)
    # Whatever the reason, a rate that is no number reaches no parameter.
    moves = usable & (state.rates.weight > 0) & (rate.abs() < math.inf)
    rate = torch.where(moves, rate, 0.0)
    return StepLength(rate, state.minibatch_lr, clipped & moves, ~moves), state


def _measured(
    seen: Measurement, curvature: Tensor, state: SearchState, rule: Rule
) -> tuple[Tensor, Tensor, Tensor, SearchState]:
    """Whether there is a step, its bound by the model, whether rule 2 holds, and the new state."""
    slope, squared_norm = seen.slope, seen.squared_norm
    usable = _positive(slope) & (curvature.abs() < math.inf)
    if seen.finite is not None:
        usable = usable & seen.finite
    believed = usable if seen.trusted is None else usable & seen.trusted
    ratios = arithmetic.push(state.ratios, curvature / squared_norm, rule.smoothing)
    smooth = curvature
    if rule.smoothing > 0:
        ratios = ratios.where(believed, state.ratios)
        smooth = arithmetic.read(ratios) * squared_norm
        curvature = torch.where(curvature > 0, curvature, smooth)  # a part may be flat
    allowed = learning_rate(slope, smooth, squared_norm, rule.eps)
    minibatch_lr = learning_rate(slope, curvature, squared_norm, rule.eps)
    if seen.spread is not None:
        minibatch_lr = minibatch_lr / rule.mean.excess(_relative_variance(seen.spread, curvature))
    admitted = believed & _positive(minibatch_lr)
    if rule.guard is not None:
        admitted = admitted & (curvature > 0)
    per_nat = torch.full_like(slope, math.inf) if seen.loss_per_nat is None else seen.loss_per_nat
    bound = _bound(allowed, smooth, per_nat, rule.guard)
    bound = torch.where(admitted, bound, math.inf)
    if seen.trusted is not None:
        bound = torch.where(seen.trusted, bound, _remembered_bound(seen, state, rule)[0])
    if rule.smoothing == 0:
        ratios = ratios.where(admitted, state.ratios)
    after = SearchState(
        rule.mean.push(state.rates, minibatch_lr, rule.beta, rule.times).where(
            admitted, state.rates
        ),
        ratios,
        torch.where(admitted, per_nat, state.loss_per_nat),
        minibatch_lr,
        state.steps + 1,
    )
    return usable, bound, ~admitted, after


def _relative_variance(spread: Tensor, curvature: Tensor) -> Tensor:
    """At most one: two halves of which one is flat say no more."""
    variance = (spread / curvature).square()
    return torch.where(variance.isfinite(), variance, 0.0).clamp(max=1)


def _remembered_bound(seen: Measurement, state: SearchState, rule: Rule) -> tuple[Tensor, Tensor]:
    """What the last measurement allows along this direction, and its minimiser there."""
    curvature = state.curvature(seen.squared_norm)
    minibatch_lr = learning_rate(seen.slope, curvature, seen.squared_norm, rule.eps)
    return _bound(minibatch_lr, curvature, state.loss_per_nat, rule.guard), minibatch_lr


def _bound(
    minibatch_lr: Tensor, curvature: Tensor, loss_per_nat: Tensor, guard: Guard | None
) -> Tensor:
    """What the quadratic model allows; infinite where it has no minimiser."""
    bound = torch.full_like(minibatch_lr, math.inf)
    if guard is None:
        return bound
    if guard.trust_region is not None:
        bound = guard.trust_region * minibatch_lr
    if guard.max_kl is not None:
        # Losses subtracted from each other have no such scale: it may be negative there.
        by_kl = (2 * guard.max_kl * loss_per_nat / curvature).sqrt()
        bound = torch.where(loss_per_nat > 0, torch.minimum(bound, by_kl), bound)
    return torch.where(curvature > 0, bound, math.inf)


def _positive(number: Tensor) -> Tensor:
    """Whether it is positive and finite."""
    return (number > 0) & (number < math.inf)
