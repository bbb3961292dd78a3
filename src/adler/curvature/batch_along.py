"""One batch along one direction, measured with one engine: replay, check, sum over the losses."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from adler import _tensors
from adler._distributed import is_sharded
from adler._recording.records import Placed, RecordedLoss, loss_weights, weighted
from adler._recording.replay import Call, ExplainedError, NotRepeatedError
from adler._recording.subbatch import first_half
from adler.curvature import trust
from adler.curvature.difference import difference_step, loss_value_of, relative_step
from adler.curvature.jacobian import (
    ENGINES,
    finite_difference,
    sharded_difference,
    warn_of_fallback,
)
from adler.curvature.loss_forms import LossForms, SumAlong
from adler.curvature.trust import Memory

__all__ = ["BatchAlong", "BatchCurvature", "CriterionError", "repeats"]


class CriterionError(Exception):
    """What the criterion raised is not the forward pass's fault."""


class BatchCurvature(NamedTuple):
    """Curvature of the backpropagated loss along a direction.

    Attributes:
        value: ``c``, 0-dim.
        loss_per_nat: What one nat an example is worth in units of the loss, 0-dim; see
            `LossHessian.loss_per_nat`.
        finite: Whether the recorded losses are finite, 0-dim bool.
        engine: Name of the engine that computed the tangents, after any fallback.
        slope: ``g·d`` as the tangents and the gradient that arrived at the outputs have it, 0-dim;
            None where the loop did not show it.
        trusted: Whether all checks hold, 0-dim bool; see `adler.curvature.trust`.
        checks: Each of them, by name, 0-dim bool.
        within: How far ``slope`` may be from ``g·d``, relative to it.
        spread: Of a part of the batch, how far its curvature may be from the whole batch's, by what
            its halves say: the square is an estimate of the variance. None: not of a part.
    """

    value: Tensor
    loss_per_nat: Tensor
    finite: Tensor
    engine: str
    slope: Tensor | None = None
    trusted: Tensor | None = None
    checks: Mapping[str, Tensor] = {}
    within: float = 0.2
    spread: Tensor | None = None


@dataclass(frozen=True)
class BatchAlong:
    """The losses that made a gradient, and a direction.

    Attributes:
        batch: The losses.
        params: Parameters with a gradient, by name.
        direction: Same names and shapes.
        forms: What a loss says along tangents.
        squared_norm: ``d·d``, 0-dim; gives the results their dtype and device.
        slope: ``g·d``, 0-dim. With ``rate`` it scales the finite difference.
        memory: What earlier measurements have taught.
        expected: ``g·d`` by the gradient of this batch as ``backward`` left it; None: not known.
        rate: Current learning rate; None or not positive: not known.
        amp_scale: Scale of a `torch.amp.GradScaler` in the recorded weights; NaN: unknown, because
            the gradients are already unscaled.
    """

    batch: list[RecordedLoss]
    params: Mapping[str, Tensor]
    direction: Mapping[str, Tensor]
    forms: LossForms
    squared_norm: Tensor
    slope: Tensor
    memory: Memory
    expected: Tensor | None = None
    rate: Tensor | None = None
    amp_scale: Tensor | None = None

    @property
    def sharded(self) -> bool:
        """Whether this process holds a part of the parameters only."""
        return any(is_sharded(p) for p in self.params.values())

    @property
    def partial(self) -> bool:
        """Whether the losses are on a part of the batch."""
        return any(loss.whole is not None for loss in self.batch)

    def run(self, jvp: str, graph: bool | None = None, known: bool = True) -> BatchCurvature:
        """Measures with one engine.

        Args:
            jvp: Its name.
            graph: Whether replays build the graph of a training pass.
            known: Whether a finite difference may use the outputs of the training pass.
        """
        graph = self.memory.with_graph if graph is None else graph
        calls = dict.fromkeys(
            placed.call for loss in self.batch for placed in loss.places
        ) or dict.fromkeys(loss.call for loss in self.batch)
        replays: dict[Call, tuple[Tensor, Tensor]] = {}
        checks: dict[str, Tensor] = {}
        for call in calls:
            run = replace(call, with_graph=graph or jvp == "double_backward")
            recorded = self._recorded(call)
            use = recorded if jvp == "finite_difference" and known and not call.partial else None
            replays[call] = self._replay(run, jvp, use)
            if use is None:
                self._compare(call, replays[call][0], checks)
        if self.sharded:
            jvp = "finite_difference"
        try:
            return self._sum(replays, checks, jvp)
        except ExplainedError:
            raise
        except Exception as error:
            raise CriterionError from error

    def _replay(self, call: Call, jvp: str, known: Tensor | None) -> tuple[Tensor, Tensor]:
        dtype = next(iter(self.direction.values())).dtype if known is None else known.dtype
        if self.sharded:
            if jvp != "finite_difference":
                warn_of_fallback("sharded parameters (DTensor)", jvp)
            length = relative_step(list(self.params.values()), self.squared_norm, dtype)
            if self.rate is not None:
                # All ranks move the shards by one step, and each knows only its own loss.
                unknown = torch.full_like(self.squared_norm, math.nan)
                length = torch.where(self.rate > 0, self._step(call, dtype, unknown), length)
            return sharded_difference(call, call.model, self.params, self.direction, length, known)
        if jvp != "finite_difference":
            return ENGINES[jvp](call, self.params, self.direction)
        step = self._step(call, dtype, None)
        return finite_difference(call, self.params, self.direction, step=step, outputs=known)

    def _step(self, call: Call, dtype: torch.dtype, loss_value: Tensor | None) -> Tensor:
        if loss_value is None:
            weights = loss_weights(self.batch, self.squared_norm, self.amp_scale)
            loss_value = loss_value_of(self.batch, weights, self.squared_norm)
        return difference_step(
            call,
            dtype,
            rate=self.rate,
            loss_value=loss_value,
            slope=self.slope,
            squared_norm=self.squared_norm,
        )

    def _recorded(self, call: Call) -> Tensor | None:
        """The outputs of the training pass, where they are one tensor that is as it was."""
        for placed in self._placed(call):
            if placed.place is not None and placed.part is None and placed.place.intact:
                return placed.place.output
        return None

    def _placed(self, call: Call) -> Iterator[Placed]:
        return (p for loss in self.batch for p in loss.places if p.call is call)

    def _compare(self, call: Call, outputs: Tensor, checks: dict[str, Tensor]) -> None:
        """Outputs of a replay with those of the training pass."""
        if not repeats(call):
            return
        for placed in self._placed(call):
            if placed.place is None or not placed.place.intact:
                continue
            found, recorded = placed.cut(outputs), placed.place.output
            if found.shape != recorded.shape:
                raise NotRepeatedError(
                    f"the replay made shape {tuple(found.shape)} where the criterion received "
                    f"{tuple(recorded.shape)}"
                )
            if found is not recorded:
                within = trust.tolerance(call, self._coarser(recorded.dtype))
                same = trust.outputs_agree(found, recorded, within).to(self.squared_norm.device)
                checks["outputs"] = checks["outputs"] & same if "outputs" in checks else same

    def _coarser(self, dtype: torch.dtype) -> torch.dtype:
        """Of the outputs' dtype and the parameters'."""
        dtypes = [dtype, *{d.dtype for d in self.direction.values()}]
        return max(dtypes, key=lambda d: torch.finfo(d).eps)

    def _sum(
        self,
        replays: Mapping[Call, tuple[Tensor, Tensor]],
        checks: dict[str, Tensor],
        jvp: str,
    ) -> BatchCurvature:
        zero = torch.zeros_like(self.squared_norm)
        arrived, sizes = self._arrived(replays)
        weights = loss_weights(self.batch, zero, self.amp_scale)
        total = SumAlong.empty(zero, self.forms.needs_kl_scale)
        # Of a part, nothing says what its slope should be.
        wanted = not self.partial and (self.memory.thorough or arrived is None)
        ascends = self._ascends(weights)
        spread = zero if self.partial else None
        for loss in self.batch:
            placed = loss.places or [Placed(loss.call)]
            outputs, tangents = ([p.cut(replays[p.call][i]) for p in placed] for i in (0, 1))
            seen = self.forms.along(loss, outputs[0], tangents, wants_slope=wanted, ascends=ascends)
            total = total.plus(weights[loss], seen)
            if spread is not None:
                spread = spread + self._spread(loss, weights[loss], outputs[0], tangents, seen.form)
        value = total.form
        if value.ndim == 0 and self.forms.substitute and total.fisher is not None:
            value = torch.where(value > 0, value, total.fisher)
        described = total.slope if wanted else None
        device = zero.device
        call = next(iter(replays))
        within = trust.tolerance(call, self._coarser(replays[call][0].dtype), jvp)
        slope = described if arrived is None else arrived
        scale = total.scale if arrived is None else sizes
        if self.expected is not None and slope is not None:
            checks["slope"] = trust.agree(slope, self.expected.to(slope), within, scale)
        if described is not None and arrived is not None:
            self.memory.loss = trust.agree(described, arrived, within, sizes).detach()
        if self.memory.loss is not None and (arrived is not None or described is None):
            checks["loss"] = self.memory.loss  # now, or when it was last looked at
        if any(call.fed for call in replays):  # the other checks fail for this reason
            checks = {"inputs": torch.zeros_like(total.finite)}
        trusted = None
        if checks:
            trusted = functools.reduce(torch.logical_and, (c.to(device) for c in checks.values()))
        return BatchCurvature(
            value, total.loss_per_nat, total.finite, jvp, slope, trusted, checks, within, spread
        )

    def _spread(
        self,
        loss: RecordedLoss,
        weight: Tensor,
        outputs: Tensor,
        tangents: list[Tensor],
        form: Tensor,
    ) -> Tensor:
        """By how much a loss on a part may be off; none where the part has no halves."""
        half = first_half(loss)
        if half is None:
            return torch.zeros_like(weight)
        rows = slice(half.rows)
        of_half = self.forms.form(half.loss, outputs[rows], [v[rows] for v in tangents])
        return weighted(weight, half.scale * (half.times * of_half - form))

    def _arrived(
        self, replays: Mapping[Call, tuple[Tensor, Tensor]]
    ) -> tuple[Tensor | None, Tensor]:
        """``⟨∂h/∂F, v⟩`` by the gradient that arrived at the outputs, and its scale."""
        found = scale = torch.zeros_like(self.squared_norm)
        for call, (_, tangents) in replays.items():
            gradient = call.output_gradient
            if gradient is None or gradient.shape != tangents.shape:
                return None, found
            gradient = gradient.to(tangents)
            found = found + _tensors.dot([gradient], [tangents], found.device)
            sizes = torch.linalg.vector_norm(gradient) * torch.linalg.vector_norm(tangents)
            scale = scale + sizes.to(scale)
        if self.amp_scale is not None:
            found = found / self.amp_scale  # NaN where the user has unscaled
            scale = scale / self.amp_scale
        return found, scale

    def _ascends(self, weights: Mapping[RecordedLoss, Tensor]) -> bool:
        """Whether a loss has a negative weight; looked at where the host need not wait."""
        memory = self.memory
        for weight in weights.values():
            negative = trust.on_host(weight < 0, wait=memory.measurements < memory.CLOSELY)
            memory.ascends = memory.ascends or bool(negative)
        return memory.ascends


def repeats(call: Call) -> bool:
    """Whether a replay makes the outputs of the training pass: a part meets other statistics.

    Its dropout masks are others, too, and its examples may depend on the rest of the batch.
    """
    if not call.partial:
        return True
    return not call.draws and not any(
        isinstance(m, _BatchNorm) and m.training for m in call.model.modules()
    )
