"""Step records, and warnings about failures that last."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from adler._optimizers.watch import Watch
from adler._step_length import Measurement, StepLength

__all__ = ["Log", "StepRecord"]

_SKIPPED = (
    "steps were skipped: gradient, loss or curvature were zero or not finite, and the parameters "
    "have not moved"
)
_DISTRUSTED = (
    "measurements contradict the gradient: along its direction the outputs do not change as they "
    "should (last_step.consistency is not near 1), so they were not used. Either the forward pass "
    "does not repeat itself, or the gradient is not that of the recorded loss alone (a penalty on "
    "the weights, a second loss); jvp='forward' measures in spite of it"
)


class StepRecord(NamedTuple):
    """What the last step did; 0-dim tensors on the device, read with ``float()``.

    Attributes:
        minibatch_lr: ``η_k``, the minimiser of this minibatch's quadratic model; between
            measurements, with the last measured ratio of ``c`` to ``d·d``.
        effective_lr: The rate applied, before a group's ``lr``; 0 where the step was skipped.
        slope: ``g·d``.
        curvature: ``c = vᵀ Q v``; NaN where this step did not measure.
        clipped: Whether a guard shortened the step.
        skipped: Whether there was no step.
        clipped_total: Steps clipped since the optimizer was made.
        skipped_total: Steps skipped since the optimizer was made.
        consistency: ``⟨∂h/∂F, v⟩ / g·d``, which is 1 if the replay is the forward pass that made
            the gradient and the gradient is what backpropagation left; NaN where it is not known.
    """

    minibatch_lr: Tensor
    effective_lr: Tensor
    slope: Tensor
    curvature: Tensor
    clipped: Tensor
    skipped: Tensor
    clipped_total: Tensor
    skipped_total: Tensor
    consistency: Tensor


class Log:
    """Keeps the record of the last step."""

    def __init__(self) -> None:
        self.last: StepRecord | None = None
        self._skipped, self._distrusted = Watch(_SKIPPED), Watch(_DISTRUSTED)

    def write(self, found: StepLength, seen: Measurement, consistency: Tensor) -> None:
        """Takes note of one step.

        Args:
            found: What the search found.
            seen: What it went by.
            consistency: See `StepRecord`.
        """
        last, curvature = self.last, seen.curvature
        self.last = StepRecord(
            found.minibatch_lr,
            found.rate,
            seen.slope,
            torch.full_like(seen.slope, math.nan) if curvature is None else curvature,
            found.clipped,
            found.skipped,
            found.clipped.long() if last is None else last.clipped_total + found.clipped,
            found.skipped.long() if last is None else last.skipped_total + found.skipped,
            consistency,
        )
        self._skipped.observe(found.skipped)
        if seen.trusted is not None:
            self._distrusted.observe(torch.logical_not(seen.trusted))
