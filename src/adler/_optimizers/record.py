"""Step records, and warnings about failures that last."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from adler._optimizers.watch import Watch
from adler._step_length import Measurement, StepLength
from adler.curvature.trust import CAUSES

__all__ = ["Log", "StepRecord"]

_SKIPPED = (
    "steps were skipped: gradient, loss or curvature were zero or not finite, and the parameters "
    "have not moved"
)
# Steps that a run may begin with, none of which could be measured.
_PATIENCE = 10


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
        trusted: Whether this step's measurement passed its checks; True where there was none. One
            that did not is not used: the rate is the average of earlier ones.
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
    trusted: Tensor


class Log:
    """Keeps the record of the last step."""

    def __init__(self) -> None:
        self.last: StepRecord | None = None
        self._skipped = Watch(_SKIPPED)
        self._failed = {name: Watch(_failure(cause), 1) for name, cause in CAUSES.items()}
        self._unmeasured = Watch("", _PATIENCE)
        self._moved = False
        self._true: Tensor | None = None

    def write(
        self,
        found: StepLength,
        seen: Measurement,
        consistency: Tensor,
        checks: Mapping[str, Tensor],
    ) -> None:
        """Takes note of one step.

        Args:
            found: What the search found.
            seen: What it went by.
            consistency: See `StepRecord`.
            checks: Whether each check of the measurement holds.

        Raises:
            RuntimeError: If none of the first steps moved, because none could be measured.
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
            self._sure(found.skipped) if seen.trusted is None else seen.trusted,
        )
        for name, check in checks.items():
            self._failed[name].observe(torch.logical_not(check))
        if seen.trusted is None:
            self._skipped.observe(found.skipped)
            return
        self._skipped.observe(found.skipped & seen.trusted)
        if not self._moved:
            lost = found.skipped & ~seen.trusted
            count = self._unmeasured.count(lost)
            self._moved = count == 0
            if count is not None and count >= _PATIENCE:
                raise RuntimeError(
                    f"step(): none of the first {count} steps could be measured, and the "
                    f"parameters have not moved: {self._cause(checks)}. What a measurement may "
                    "rely on is said in the documentation of training loops"
                )

    def _sure(self, like: Tensor) -> Tensor:
        """A 0-dim True, made once."""
        if self._true is None or self._true.device != like.device:
            self._true = torch.ones_like(like)
        return self._true

    def _cause(self, checks: Mapping[str, Tensor]) -> str:
        return "; ".join(CAUSES[name] for name, check in checks.items() if not bool(check))


def _failure(cause: str) -> str:
    return f"measurement contradicts the training pass and was not used: {cause}"
