"""What a batch says of the loss: replay the forward, take the form or the spectral norm."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adler import _tensors as update
from adler._distributed import is_sharded, sharded_difference
from adler._recording.recorder import RecordedLoss
from adler._recording.replay import Call, replaying
from adler.curvature.difference import difference_step, height
from adler.curvature.jacobian import directional_derivative, transpose, warn_of_fallback
from adler.losses import LossHessian

__all__ = [
    "BatchCurvature",
    "batch_curvature",
    "batch_gershgorin_curvature",
    "batch_spectral_curvature",
]


class BatchCurvature(NamedTuple):
    """Curvature of the backpropagated loss along a direction.

    Attributes:
        value: ``c``, 0-dim.
        nat: What one nat an example is worth in units of the loss, 0-dim; see `LossHessian.nat`.
        finite: Whether the recorded losses are finite, 0-dim bool.
        engine: Name of the engine that computed the tangents, after any fallback.
        slope: ``⟨∂h/∂F, v⟩ = g·d`` by the gradient that arrived at the outputs, 0-dim; None where
            the loop did not show it. A replay that is not the training forward gives another value.
    """

    value: Tensor
    nat: Tensor
    finite: Tensor
    engine: str
    slope: Tensor | None = None


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
    rate: Tensor | None = None,
    wants_nat: bool = True,
    amp_scale: Tensor | None = None,
) -> BatchCurvature:
    """Sums ``vᵀ Q v`` over the losses that made the gradient.

    The GGN of a weighted sum of losses is the weighted sum of their GGNs. Losses of one call share
    its replay.

    Args:
        batch: The losses.
        params: Parameters with a gradient, by name.
        direction: Same names and shapes.
        criterion: The loss, for batches that the loop did not show.
        hessian: Its quadratic form.
        jvp: Name of the engine.
        squared_norm: ``d·d``, 0-dim; gives the result its dtype and device.
        slope: ``g·d``, 0-dim; default: ``d·d``. With ``rate`` it scales the finite difference.
        rate: Learning rate of now; not positive: unknown.
        wants_nat: Whether to compute ``nat``, which is infinite otherwise.
        amp_scale: Scale of a `torch.amp.GradScaler` in the recorded weights; NaN: unknown, because
            the gradients are already unscaled.

    Raises:
        RuntimeError: If a replay makes another shape than the criterion received.
        ValueError: If explicit targets do not fit the outputs.
    """
    value = torch.zeros_like(squared_norm)
    nat = torch.full_like(value, 0.0 if wants_nat else math.inf)
    weights = _weights(batch, value, amp_scale)
    found: Tensor | None = torch.zeros_like(squared_norm)
    finite = torch.ones_like(squared_norm, dtype=torch.bool)

    def step(call: Call, dtype: torch.dtype, tall: Tensor | None = None) -> Tensor:
        return difference_step(
            call,
            dtype,
            rate=rate,
            height=height(batch, weights, squared_norm) if tall is None else tall,
            slope=squared_norm if slope is None else slope,
            squared_norm=squared_norm,
        )

    with replaying():
        for call, losses in _by_call(batch).items():
            known = losses[0].outputs
            dtype = next(iter(direction.values())).dtype if known is None else known.dtype
            sharded = any(is_sharded(p) for p in params.values())
            if sharded:
                if jvp != "finite_difference":
                    warn_of_fallback("sharded parameters (DTensor)", jvp)
                jvp = "finite_difference"
                length = _first_step(params, squared_norm, dtype)
                if rate is not None:
                    # All ranks move the shards by one step, and each knows only its own loss.
                    shared = step(call, dtype, torch.full_like(squared_norm, math.nan))
                    length = torch.where(rate > 0, shared, length)
                outputs, tangents = sharded_difference(
                    call, call.model, params, direction, length, known
                )
            else:
                outputs, tangents, jvp = directional_derivative(
                    call,
                    params,
                    direction,
                    jvp,
                    step=functools.partial(step, call, dtype),
                    outputs=known,
                )
            arrived = losses[0].output_gradient
            if found is None or arrived is None or arrived.shape != tangents.shape:
                found = None
            else:
                found = found + update.dot([arrived.to(tangents)], [tangents], found.device)
            for loss in losses:
                at_height = _checked(loss, criterion, outputs)
                finite = finite & _is_finite(loss, at_height).to(finite.device)
                at, targets = _where(loss, outputs)
                form = hessian.quadratic_form(at, targets, tangents)
                value = value + _weighted(weights[loss], form)
                if wants_nat:
                    nat = nat + _weighted(weights[loss], hessian.nat(at, targets, at_height))
    if found is not None and amp_scale is not None:
        found = found / amp_scale  # NaN where the user has unscaled
    return BatchCurvature(value, nat, finite, jvp, found)


def batch_spectral_curvature(
    batch: list[RecordedLoss],
    params: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    criterion: Callable[..., Tensor],
    hessian: LossHessian,
    *,
    iterations: int,
    jvp: str,
    squared_norm: Tensor,
    wants_nat: bool = True,
    amp_scale: Tensor | None = None,
) -> tuple[BatchCurvature, dict[str, Tensor]]:
    r"""``λ_max(A)`` of $A = \sum \|Q\|\, J^\top J$ over the losses, by power iteration.

    No curvature of the batch's GGN exceeds it: $d^\top J^\top Q J d \le \lambda\, d^\top d$.
    Of one loss it is $\lambda^*(K)\,\|\nabla^2 L\|$ with the tangent kernel $K = J J^\top$. The
    iteration approaches it from below.

    Args:
        batch: As for `batch_curvature`.
        params: As for `batch_curvature`.
        start: Where the iteration starts; not zero.
        criterion: As for `batch_curvature`.
        hessian: Its spectral norm.
        iterations: How many, each of one Jacobian-vector and one vector-Jacobian product.
        jvp: As for `batch_curvature`.
        squared_norm: Gives the result its dtype and device.
        wants_nat: As for `batch_curvature`.
        amp_scale: As for `batch_curvature`.

    Returns:
        The curvature, whose ``value`` is ``λ``, and the vector of unit norm to start from next.
    """
    zero = torch.zeros_like(squared_norm)
    with replaying():
        terms, nat, finite = _terms(batch, params, criterion, hessian, zero, wants_nat, amp_scale)
        names, vector, value = list(params), [start[name] for name in params], zero
        for _ in range(iterations):
            vector = _normalised(vector, zero)
            direction, value = dict(zip(names, vector, strict=True)), zero
            image = [torch.zeros_like(part) for part in vector]
            for call, _, pull, norm in terms:
                _, tangents, jvp = directional_derivative(call, params, direction, jvp)
                value = value + norm * update.squared_norm([tangents], zero.device)
                pulled = pull(tangents * norm.to(tangents))
                torch._foreach_add_(image, [pulled[name] for name in names])
            vector = image
    after = dict(zip(names, _normalised(vector, zero), strict=True))
    return BatchCurvature(value, nat, finite, jvp), after


def batch_gershgorin_curvature(
    batch: list[RecordedLoss],
    params: Mapping[str, Tensor],
    criterion: Callable[..., Tensor],
    hessian: LossHessian,
    *,
    columns: int,
    seed: int,
    jvp: str,
    squared_norm: Tensor,
    wants_nat: bool = True,
    amp_scale: Tensor | None = None,
) -> BatchCurvature:
    r"""Gershgorin's $\sum \|Q\|\, \max_j \sum_i |K_{ij}|$ over some columns of the tangent kernel.

    Over all columns it is no less than what `batch_spectral_curvature` approaches; over a sample it
    is an estimate.

    Args:
        batch: As for `batch_curvature`.
        params: As for `batch_curvature`.
        criterion: As for `batch_curvature`.
        hessian: Its spectral norm.
        columns: How many, each of one vector-Jacobian and one Jacobian-vector product.
        seed: Of the sample.
        jvp: As for `batch_curvature`.
        squared_norm: Gives the result its dtype and device.
        wants_nat: As for `batch_curvature`.
        amp_scale: As for `batch_curvature`.
    """
    zero = value = torch.zeros_like(squared_norm)
    generator = torch.Generator().manual_seed(seed)
    with replaying():
        terms, nat, finite = _terms(batch, params, criterion, hessian, zero, wants_nat, amp_scale)
        for call, outputs, pull, norm in terms:
            largest = zero
            for j in torch.randperm(outputs.numel(), generator=generator)[:columns].tolist():
                one = torch.zeros_like(outputs)
                one.view(-1)[j] = 1
                _, column, jvp = directional_derivative(call, params, pull(one), jvp)
                largest = torch.maximum(largest, column.abs().sum().to(zero))
            value = value + norm * largest
    return BatchCurvature(value, nat, finite, jvp)


class _Term(NamedTuple):
    """One call of the model, and ``Σ ‖Q‖`` of the losses of its outputs."""

    call: Call
    outputs: Tensor
    pull: Callable[[Tensor], Mapping[str, Tensor]]
    norm: Tensor


def _terms(
    batch: list[RecordedLoss],
    params: Mapping[str, Tensor],
    criterion: Callable[..., Tensor],
    hessian: LossHessian,
    zero: Tensor,
    wants_nat: bool,
    amp_scale: Tensor | None,
) -> tuple[list[_Term], Tensor, Tensor]:
    """Terms, what one nat is worth, and whether the losses are finite."""
    nat = torch.full_like(zero, 0.0 if wants_nat else math.inf)
    finite = torch.ones_like(zero, dtype=torch.bool)
    weights = _weights(batch, zero, amp_scale)
    terms = []
    for call, losses in _by_call(batch).items():
        outputs, pull = transpose(call, params)
        norm = zero
        for loss in losses:
            height = _checked(loss, criterion, outputs)
            finite = finite & _is_finite(loss, height).to(finite.device)
            at, targets = _where(loss, outputs)
            norm = norm + _weighted(weights[loss].abs(), hessian.spectral_norm(at, targets))
            if wants_nat:
                nat = nat + _weighted(weights[loss], hessian.nat(at, targets, height))
        terms.append(_Term(call, outputs, pull, norm))
    return terms, nat, finite


def _weighted(weight: Tensor, term: Tensor) -> Tensor:
    """Nothing where the weight is zero, whatever the term: a mean over no targets is NaN."""
    return torch.where(weight == 0, torch.zeros_like(weight), weight * term.to(weight))


def _normalised(vector: list[Tensor], like: Tensor) -> list[Tensor]:
    length = update.squared_norm(vector, like.device).sqrt()
    return list(torch._foreach_div(vector, [length.to(part) for part in vector]))


def _by_call(batch: list[RecordedLoss]) -> dict[Call, list[RecordedLoss]]:
    """Losses of one call share its replay."""
    calls: dict[Call, list[RecordedLoss]] = {}
    for loss in batch:
        calls.setdefault(loss.call, []).append(loss)
    return calls


def _where(loss: RecordedLoss, outputs: Tensor) -> tuple[Tensor, Any]:
    """Outputs and targets at which the loss was computed."""
    at = outputs if loss.outputs is None else loss.outputs
    return at, loss.targets[0] if len(loss.targets) == 1 else loss.targets


def _first_step(params: Mapping[str, Tensor], squared_norm: Tensor, dtype: torch.dtype) -> Tensor:
    """Moves the parameters by the square root of the precision, relative to their norm."""
    norm = update.squared_norm(list(params.values()), squared_norm.device).sqrt()
    step = torch.finfo(dtype).eps ** 0.5 * norm.clamp(min=1.0) * squared_norm.rsqrt()
    return torch.where(squared_norm > 0, step, torch.ones_like(step))


def _checked(loss: RecordedLoss, criterion: Callable[..., Tensor], outputs: Tensor) -> Tensor:
    """The loss, once the replay is of the record's shape and explicit targets fit."""
    if loss.outputs is None:
        try:
            with warnings.catch_warnings():
                # PyTorch only warns of a broadcast between outputs and targets.
                warnings.filterwarnings("error", message="Using a target size")
                return criterion(outputs, *loss.targets)
        except Exception as error:
            shapes = [tuple(t.shape) for t in loss.targets if isinstance(t, Tensor)]
            raise ValueError(
                f"step(targets=...): the criterion refuses outputs of shape "
                f"{tuple(outputs.shape)} with targets of shape {shapes}: {error}"
            ) from error
    assert loss.value is not None
    if loss.outputs.shape != outputs.shape:
        raise RuntimeError(
            f"step(): the criterion received shape {tuple(loss.outputs.shape)}, but output_fn "
            f"makes {tuple(outputs.shape)} of what the model returns: do in output_fn what the "
            "loop does between model and criterion"
        )
    return loss.value


def _is_finite(loss: RecordedLoss, height: Tensor) -> Tensor:
    """Whether the recorded loss is; that of a part may be a mean over no targets."""
    return torch.isfinite(height if loss.value is None else loss.value)


def _weights(
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
