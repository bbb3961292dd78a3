"""What a batch says of the loss along a direction: replay the forward pass, take the form, check.

Where the form of the losses is zero or negative, because a loss is linear or not convex in the
outputs (policy gradients, margins, differences of losses), a quadratic model has no minimiser. Its
place is taken by the empirical Fisher matrix of the outputs, the sum over examples of
$\\omega_i (\\nabla \\ell_i^\\top v_i)^2$, which is positive wherever the outputs' gradient is not
normal to what the step changes.
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from adler import _tensors as update
from adler._distributed import is_sharded
from adler._recording.recorder import Placed, RecordedLoss
from adler._recording.replay import Call, ExplainedError, NotRepeatedError, replaying
from adler._warning import warn
from adler.curvature import trust
from adler.curvature.difference import difference_step, loss_value_of, relative_step
from adler.curvature.jacobian import (
    ENGINES,
    ForwardModeUnsupportedError,
    finite_difference,
    sharded_difference,
    warn_of_fallback,
)
from adler.curvature.trust import Memory
from adler.losses import LossHessian
from adler.losses.fisher import outer_products
from adler.losses.generic import AutogradHessian, gradients_of, joint_form

__all__ = [
    "BatchCurvature",
    "batch_curvature",
    "checked",
    "has_batch_statistics",
    "loss_weights",
    "losses_by_call",
    "weighted",
    "where_computed",
]


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
    """

    value: Tensor
    loss_per_nat: Tensor
    finite: Tensor
    engine: str
    slope: Tensor | None = None
    trusted: Tensor | None = None
    checks: Mapping[str, Tensor] = {}
    within: float = 0.2


def batch_curvature(
    batch: list[RecordedLoss],
    params: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
    criterion: Callable[..., Tensor],
    hessian: LossHessian,
    *,
    jvp: str,
    squared_norm: Tensor,
    slope: Tensor | None = None,
    expected: Tensor | None = None,
    rate: Tensor | None = None,
    needs_kl_scale: bool = True,
    amp_scale: Tensor | None = None,
    substitute: bool = True,
    alone: bool = True,
    memory: Memory | None = None,
) -> BatchCurvature:
    """Sums ``vᵀ Q v`` over the losses that made the gradient.

    The GGN of a weighted sum of losses is the weighted sum of their GGNs. Losses of one call share
    its replay. Where a check fails, other engines are tried: one may be exact where another is not.

    Args:
        batch: The losses.
        params: Parameters with a gradient, by name.
        direction: Same names and shapes.
        criterion: The loss.
        hessian: Its quadratic form.
        jvp: Name of the engine.
        squared_norm: ``d·d``, 0-dim; gives the result its dtype and device.
        slope: ``g·d``, 0-dim; default: ``d·d``. With ``rate`` it scales the finite difference.
        expected: ``g·d`` by the gradient of this batch as ``backward`` left it; None: not known.
        rate: Learning rate of now; not positive: unknown.
        needs_kl_scale: Whether to compute ``loss_per_nat``, which is infinite otherwise.
        amp_scale: Scale of a `torch.amp.GradScaler` in the recorded weights; NaN: unknown, because
            the gradients are already unscaled.
        substitute: Whether the empirical Fisher matrix takes the place of a form that is not
            positive.
        alone: Whether this process decides; otherwise all would have to choose one engine.
        memory: What earlier measurements have taught.

    Raises:
        RuntimeError: If a replay makes another shape than the criterion received.
        ValueError: If explicit targets do not fit the outputs.
    """
    one = _Measurement(
        batch=batch,
        params=params,
        direction=direction,
        criterion=criterion,
        hessian=hessian,
        squared_norm=squared_norm,
        slope=squared_norm if slope is None else slope,
        expected=expected,
        rate=rate,
        needs_kl_scale=needs_kl_scale,
        amp_scale=amp_scale,
        substitute=substitute,
        memory=Memory() if memory is None else memory,
    )
    with replaying():
        if one.partial:
            found = _of_a_part(one, jvp, alone, checks=memory is not None)
        else:
            found = _best(one, jvp, alone)
    one.memory.measurements += 1
    return found


def _of_a_part(one: _Measurement, jvp: str, alone: bool, checks: bool) -> BatchCurvature:
    """A part's; what it cannot tell of the training pass, the whole batch can, now and then."""
    memory, batch = one.memory, [loss if loss.whole is None else loss.whole for loss in one.batch]
    whole, part = replace(one, batch=batch), replace(one, expected=None)
    sure: BatchCurvature | None = None
    memory.full -= checks
    if memory.full < 0:
        sure = _best(whole, jvp, alone)
        jvp = sure.engine
        memory.full = 0 if alone and memory.distrusts(sure.trusted) else _PARTS
    try:
        found = part.run(jvp) if sure is not None else _best(part, jvp, alone)
    except ExplainedError:
        raise
    except _CriterionError as caught:
        raise (caught.__cause__ or caught) from None
    except Exception:  # a hidden state or another attribute is of the whole batch's size
        memory.full = 0
        return _best(whole, jvp, alone) if sure is None else sure
    if alone and memory.distrusts(found.trusted):
        # Its examples depend on the others, or it is not repeated.
        return _best(whole, jvp, alone) if sure is None else sure
    # What arrived at a part of the outputs is no slope of the batch.
    found = found._replace(slope=None if sure is None else sure.slope)
    if sure is not None:
        memory.whole = sure.trusted, sure.checks
    if memory.whole is None or memory.whole[0] is None:
        return found
    known, whole_checks = memory.whole
    assert known is not None
    trusted = known if found.trusted is None else known & found.trusted
    return found._replace(trusted=trusted, checks={**found.checks, **whole_checks})


# Measurements of a part for one of the whole batch.
_PARTS = 32


def _best(one: _Measurement, jvp: str, alone: bool) -> BatchCurvature:
    """What the engine measures, or another one that the checks agree with where it fails them."""
    memory, error = one.memory, None
    found: BatchCurvature | None = None
    try:
        try:
            found = one.run(jvp)
        except ForwardModeUnsupportedError as unsupported:
            warn_of_fallback(unsupported.op)
            jvp = "finite_difference"
            found = one.run(jvp)
    except ExplainedError:
        raise
    except _CriterionError as caught:
        raise (caught.__cause__ or caught) from None
    except Exception as caught:  # whatever a forward pass may raise where it is run another way
        error = caught
    if found is not None:
        if not alone or one.sharded or not memory.distrusts(found.trusted):
            return found
        if not memory.tries_others(found.checks):
            return found
    for name, graph in _others(jvp, memory.with_graph):
        try:
            other = one.run(name, graph=graph, known=False)
        except Exception as caught:
            error = error or caught
            continue
        if other.trusted is None or trust.on_host(other.trusted, wait=True):
            memory.with_graph = graph
            _announce(jvp, name, error)
            memory.failed = 0
            return other
        # What failed here says more: a difference of known outputs does not see them.
        found = other if found is None else found._replace(checks={**other.checks, **found.checks})
    if found is None:
        raise RuntimeError(
            "step(): the forward pass cannot be run once more, which a measurement needs: "
            f"{type(error).__name__}: {error}"
        ) from error
    memory.give_up()
    return found


class _CriterionError(Exception):
    """What the criterion raised is not the forward pass's fault."""


class TargetsError(ExplainedError, ValueError):
    """Explicit targets do not fit the outputs."""


def _others(jvp: str, graph: bool) -> list[tuple[str, bool]]:
    """Ways to measure where one has failed, with the graph of a training pass or without."""
    ways = [(jvp, True), ("forward", graph), ("forward", True), ("double_backward", True)]
    ways += [("finite_difference", graph), ("finite_difference", True)]
    tried = set() if jvp == "finite_difference" else {(jvp, graph or jvp == "double_backward")}
    return [way for way in dict.fromkeys(ways) if way not in tried]


def _announce(jvp: str, name: str, error: Exception | None) -> None:
    if name == jvp:
        return
    if error is not None:
        why = f"raises an error on this model ({type(error).__name__}: {str(error)[:200]})"
    else:
        why = (
            "contradicts the gradient (an operation whose forward derivative is missing or zero, "
            "or a hook or custom autograd.Function that changes gradients on their way)"
        )
    warn(f"jvp={jvp!r} {why}; jvp={name!r} agrees with it and is used from now on")


@dataclass(frozen=True)
class _Measurement:
    """One batch along one direction; see `batch_curvature`."""

    batch: list[RecordedLoss]
    params: Mapping[str, Tensor]
    direction: Mapping[str, Tensor]
    criterion: Callable[..., Tensor]
    hessian: LossHessian
    squared_norm: Tensor
    slope: Tensor
    expected: Tensor | None
    rate: Tensor | None
    needs_kl_scale: bool
    amp_scale: Tensor | None
    substitute: bool
    memory: Memory

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
            raise _CriterionError from error

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
        if call.partial and (call.draws or has_batch_statistics(call.model)):
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
        total = _Total(zero, zero, zero, zero, zero, torch.ones_like(zero, dtype=torch.bool))
        # Of a part, nothing says what its slope should be.
        wanted = not self.partial and (self.memory.thorough or arrived is None)
        ascends = self._ascends(weights)
        complete = True
        loss_per_nat = torch.full_like(zero, 0.0 if self.needs_kl_scale else math.inf)
        for loss in self.batch:
            seen = self._one(loss, replays, wanted, ascends)
            complete = complete and seen.slope is not None
            total = total.plus(weights[loss], seen)
            if self.needs_kl_scale:
                loss_per_nat = loss_per_nat + weighted(weights[loss], seen.loss_per_nat)
        value = total.form
        if value.ndim == 0 and self.substitute and total.fisher is not zero:
            value = torch.where(value > 0, value, total.fisher)
        described = total.slope if wanted and complete else None
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
            value, loss_per_nat, total.finite, jvp, slope, trusted, checks, within
        )

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
            found = found + update.dot([gradient], [tangents], found.device)
            sizes = torch.linalg.vector_norm(gradient) * torch.linalg.vector_norm(tangents)
            scale = scale + sizes.to(scale)
        if self.amp_scale is not None:
            found = found / self.amp_scale  # NaN where the user has unscaled
            scale = scale / self.amp_scale
        return found, scale

    def _one(
        self,
        loss: RecordedLoss,
        replays: Mapping[Call, tuple[Tensor, Tensor]],
        wanted: bool,
        ascends: bool,
    ) -> _Seen:
        """One loss, as the criterion says it.

        Args:
            loss: The loss.
            replays: Outputs and tangents of its calls.
            wanted: Whether its slope is compared with others.
            ascends: Whether some loss is maximised.
        """
        placed = loss.places or [Placed(loss.call)]
        outputs, tangents = ([p.cut(replays[p.call][i]) for p in placed] for i in (0, 1))
        one = loss.differentiable == (0,)
        curved = one and self.hessian.curved and not loss.options
        # Closed forms do not call the criterion. Others do, each time as it was in training.
        around = contextlib.nullcontext if curved else loss.surroundings
        with loss.surroundings() if loss.outputs is None else contextlib.nullcontext():
            loss_value = checked(loss, self.criterion, outputs[0])
        if loss.path is not None:
            tangents = loss.path.push(tangents)
        at, targets = where_computed(loss, outputs[0])
        loss_per_nat = torch.full_like(loss_value, math.inf)
        with around():
            form = self._form(loss, at, targets, tangents)
            if one and self.needs_kl_scale:
                loss_per_nat = self._hessian_of(loss).loss_per_nat(at, targets, loss_value)
        # That of a part may be a mean over no targets.
        finite = torch.isfinite(loss_value if loss.value is None else loss.value)
        replaced = self.substitute and not form.ndim and (ascends or not curved)
        if not wanted and not replaced:
            return _Seen(form, loss_per_nat, finite)
        with loss.surroundings():
            _, gradients = gradients_of(
                self.criterion,
                (at, *loss.targets),
                loss.differentiable,
                options=loss.options,
                strict=False,
            )
        slope, scale = _slope(gradients, tangents)
        fisher = None
        if replaced:
            fisher = _fisher(self.hessian if one else None, at, targets, gradients, tangents)
        return _Seen(form, loss_per_nat, finite, fisher, slope, scale)

    def _ascends(self, weights: Mapping[RecordedLoss, Tensor]) -> bool:
        """Whether a loss has a negative weight; looked at where the host need not wait."""
        memory = self.memory
        for weight in weights.values():
            negative = trust.on_host(weight < 0, wait=memory.measurements < memory.CLOSELY)
            memory.ascends = memory.ascends or bool(negative)
        return memory.ascends

    def _form(
        self, loss: RecordedLoss, at: Any, targets: Any, tangents: Sequence[Tensor]
    ) -> Tensor:
        """The quadratic form; zero where PyTorch cannot differentiate the loss twice."""
        try:
            if loss.differentiable == (0,):
                return self._hessian_of(loss).quadratic_form(at, targets, tangents[0])
            return joint_form(
                self.criterion, (at, *loss.targets), loss.differentiable, tangents, loss.options
            )
        except (RuntimeError, NotImplementedError) as error:
            if not self.substitute or "not implemented" not in str(error):
                raise
            return torch.zeros_like(self.squared_norm)

    def _hessian_of(self, loss: RecordedLoss) -> LossHessian:
        """The form of a loss; one that received options by keyword only is another loss."""
        if not loss.options:
            return self.hessian
        return AutogradHessian(functools.partial(self.criterion, **loss.options))


class _Seen(NamedTuple):
    """What one loss says along its tangents; 0-dim."""

    form: Tensor
    loss_per_nat: Tensor
    finite: Tensor
    fisher: Tensor | None = None
    slope: Tensor | None = None
    scale: Tensor | None = None


class _Total(NamedTuple):
    """Weighted sums over the losses."""

    zero: Tensor
    form: Tensor
    fisher: Tensor
    slope: Tensor
    scale: Tensor
    finite: Tensor

    def plus(self, weight: Tensor, seen: _Seen) -> _Total:
        """With one more."""
        fisher, slope, scale = self.fisher, self.slope, self.scale
        if seen.fisher is not None:
            fisher = fisher + weighted(weight.abs(), seen.fisher)
        if seen.slope is not None and seen.scale is not None:
            slope = slope + weighted(weight, seen.slope)
            scale = scale + weighted(weight.abs(), seen.scale)
        finite = self.finite & seen.finite.to(self.finite.device)
        form = self.form + weighted(weight, seen.form)
        return _Total(self.zero, form, fisher, slope, scale, finite)


def _slope(gradients: Sequence[Tensor], tangents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """``⟨∂L/∂F, v⟩``, and the product of the two norms."""
    pairs = [(g, v.to(g)) for g, v in zip(gradients, tangents, strict=True)]
    slope = functools.reduce(torch.add, ((g * v).sum() for g, v in pairs))
    norms = (torch.linalg.vector_norm(g) * torch.linalg.vector_norm(v) for g, v in pairs)
    return slope, functools.reduce(torch.add, norms)


def _fisher(
    hessian: LossHessian | None,
    outputs: Any,
    targets: Any,
    gradients: Sequence[Tensor],
    tangents: Sequence[Tensor],
) -> Tensor:
    """The empirical Fisher matrix's form; of several tensors, rows of all are one example."""
    if hessian is not None and hasattr(hessian, "criterion"):
        weights = hessian.example_weights(outputs, targets).to(gradients[0])
        if weights.numel() == 1 or weights.shape[:1] == gradients[0].shape[:1]:
            return outer_products(gradients[0], tangents[0], weights)
    rows = {len(g) if g.ndim else 1 for g in gradients}
    count = rows.pop() if len(rows) == 1 else 1
    products = [(g * v.to(g)).reshape(count, -1).sum(1) for g, v in zip(gradients, tangents)]  # noqa: B905
    return count * functools.reduce(torch.add, products).square().sum()


def weighted(weight: Tensor, term: Tensor) -> Tensor:
    """Nothing where the weight is zero, whatever the term: a mean over no targets is NaN."""
    return torch.where(weight == 0, torch.zeros_like(weight), weight * term.to(weight))


def losses_by_call(batch: list[RecordedLoss]) -> dict[Call, list[RecordedLoss]]:
    """Losses of one call share its replay."""
    calls: dict[Call, list[RecordedLoss]] = {}
    for loss in batch:
        calls.setdefault(loss.call, []).append(loss)
    return calls


def where_computed(loss: RecordedLoss, outputs: Tensor) -> tuple[Any, Any]:
    """Outputs and targets at which the loss was computed."""
    seen = loss.outputs is not None and not loss.outputs_overwritten
    at = loss.outputs if seen else outputs
    return at, loss.targets[0] if len(loss.targets) == 1 else loss.targets


def has_batch_statistics(model: torch.nn.Module) -> bool:
    """Whether examples of a batch depend on each other by a norm's statistics of the batch."""
    return any(isinstance(m, _BatchNorm) and m.training for m in model.modules())


def checked(loss: RecordedLoss, criterion: Callable[..., Tensor], outputs: Tensor) -> Tensor:
    """The loss, once the replay is of the record's shape and explicit targets fit."""
    if loss.outputs is None:
        try:
            with warnings.catch_warnings():
                # PyTorch only warns of a broadcast between outputs and targets.
                warnings.filterwarnings("error", message="Using a target size")
                return criterion(outputs, *loss.targets, **loss.options)
        except Exception as error:
            shapes = [tuple(t.shape) for t in loss.targets if isinstance(t, Tensor)]
            raise TargetsError(
                f"step(targets=...): the criterion refuses outputs of shape "
                f"{tuple(outputs.shape)} with targets of shape {shapes}: {error}"
            ) from error
    assert loss.value is not None
    return loss.value


def loss_weights(
    batch: list[RecordedLoss], like: Tensor, amp_scale: Tensor | None
) -> dict[RecordedLoss, Tensor]:
    """Factor with which each loss entered the gradients as they now are."""
    one = torch.ones_like(like)
    weights = {loss: loss.weight.to(one) for loss in batch if loss.weight is not None}
    if amp_scale is not None and weights:
        # Gradients that the user has unscaled: the weights are taken to sum to one.
        total = torch.stack(list(weights.values())).sum()
        divisor = torch.where(torch.isnan(amp_scale), total, amp_scale.to(total))
        weights = {loss: weight / divisor for loss, weight in weights.items()}
    # (1.0 leaves every bit.)
    return {loss: weights.get(loss, one) * loss.factor for loss in batch}
