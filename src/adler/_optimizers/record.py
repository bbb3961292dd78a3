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

_SKIPPED = "steps were skipped, and the parameters have not moved: "
# Steps that a run may begin with, none of which could be measured.
_PATIENCE = 10
# Steps that a run may begin with, none of which moved anything. A GradScaler that looks for its
# scale vetoes fewer.
_LONG = 100


class StepRecord(NamedTuple):
    """What the last step did; 0-dim tensors on the device, read with ``float()``.

    Attributes:
        minibatch_lr: ``η_k``, the minimiser of this minibatch's quadratic model; between
            measurements, with the last measured ratio of ``c`` to ``d·d``.
        effective_lr: The rate applied, before a group's ``lr``; 0 where the step was skipped.
        slope: ``g·d``.
        curvature: ``c = vᵀ Q v``; NaN where this step did not measure.
        clipped: Whether the quadratic model bounded the step (``trust_region``, ``max_kl``); single
            tensors that ``max_relative_change`` shortens do not count.
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
        self._unmeasured, self._unmoved = Watch(""), Watch("")
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
            RuntimeError: If none of the first 10 steps could be measured, or none of the first 100
                moved for whatever reason; says which.
        """
        last, curvature = self.last, seen.curvature
        sure = self._sure(found.skipped) if seen.trusted is None else seen.trusted
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
            sure,
        )
        for name, check in checks.items():
            self._failed[name].observe(torch.logical_not(check))

        def why() -> str:
            return _why_skipped(seen)

        # (Between measurements nothing is doubted, and a kernel is saved.)
        doubtless = found.skipped if seen.trusted is None else found.skipped & sure
        self._skipped.observe(doubtless, why)
        if self._moved:
            return
        lost = self._unmeasured.count(found.skipped & ~sure)
        still = self._unmoved.count(found.skipped)
        self._moved = still == 0
        if lost is not None and lost >= _PATIENCE:
            raise RuntimeError(
                f"step(): none of the first {lost} steps could be measured, and the "
                f"parameters have not moved: {self._cause(checks)}. What a measurement may "
                "rely on is said in the documentation of training loops"
            )
        if still is not None and still >= _LONG:
            raise RuntimeError(f"step(): none of the first {still} steps moved: {why()}")

    def _sure(self, like: Tensor) -> Tensor:
        """A 0-dim True, made once."""
        if self._true is None or self._true.device != like.device:
            self._true = torch.ones_like(like)
        return self._true

    def _cause(self, checks: Mapping[str, Tensor]) -> str:
        return "; ".join(CAUSES[name] for name, check in checks.items() if not bool(check))


def _why_skipped(seen: Measurement) -> str:
    """What of a step that was skipped is zero or not finite, and what to do; waits."""
    slope = float(seen.slope)
    if not math.isfinite(slope):
        return (
            "the loss, its gradient or the direction made of it is not finite. Look for NaN in the "
            "data, for logarithms, roots and divisions of zero, and, where anything is float16, "
            "keep the parameters in float32 and compute under torch.autocast with a "
            "torch.amp.GradScaler, or in bfloat16"
        )
    if slope == 0:
        return (
            "the gradient is zero. Either the loss does not depend on the parameters (all frozen, "
            "detached, units that are all off), or it is float16's least number that the gradient "
            "is below: multiply the loss by a torch.amp.GradScaler, or compute in bfloat16"
        )
    if slope < 0:
        return (
            "the step that the base optimizer proposes leads uphill. Its averages may be of "
            "another loss, or its options of another sign (maximize=True)"
        )
    if seen.finite is not None and not bool(seen.finite):
        return "the loss is not finite, though its gradient is. Look at what is added to it"
    if seen.curvature is not None and not math.isfinite(float(seen.curvature)):
        return (
            "the curvature is not finite, though the gradient is. Look for the root of zero in the "
            "loss, and for outputs or losses too large for their dtype: scale them down, or reduce "
            "the loss by its mean"
        )
    return (
        "the loss does not curve along the gradient, so no length can be measured: it is linear in "
        "outputs that are linear in the parameters, or the outputs hardly depend on these"
    )


def _failure(cause: str) -> str:
    return f"measurement contradicts the training pass and was not used: {cause}"
