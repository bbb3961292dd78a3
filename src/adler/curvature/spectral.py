"""The spectral norm of a batch's Gauss-Newton matrix, by power iteration or by columns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from adler import _tensors
from adler._recording.records import loss_weights, losses_by_call, weighted
from adler._recording.replay import Call, replaying
from adler.curvature.batch_along import BatchAlong, BatchCurvature, repeats
from adler.curvature.jacobian import directional_derivative, transpose
from adler.curvature.trust import outputs_agree, tolerance

__all__ = ["batch_gershgorin_curvature", "batch_spectral_curvature"]


def batch_spectral_curvature(
    one: BatchAlong, *, iterations: int, jvp: str, mean: bool = False
) -> tuple[BatchCurvature, list[Tensor]]:
    r"""``λ_max(A)`` of $A = \sum \|Q\|\, J^\top J$ over the losses, by power iteration.

    No curvature of the batch's GGN exceeds it: $d^\top J^\top Q J d \le \lambda\, d^\top d$.
    Of one loss it is $\lambda^*(K)\,\|\nabla^2 L\|$ with the tangent kernel $K = J J^\top$. The
    iteration approaches it from below. With ``mean`` the mean of the eigenvalues of $Q$ stands for
    $\|Q\|$, and the bound holds on average over tangents of random direction alone.

    Args:
        one: The losses; the iteration starts at its direction, which is not zero.
        iterations: How many, each of one Jacobian-vector and one vector-Jacobian product.
        jvp: Name of the engine.
        mean: Whether the mean of the loss Hessian's eigenvalues takes the norm's place.

    Returns:
        The curvature, whose ``value`` is ``λ``, and the vector of unit norm to start from next.
    """
    zero = torch.zeros_like(one.squared_norm)
    with replaying():
        terms, loss_per_nat, finite, same = _terms(one, zero, mean)
        names, vector, value = list(one.direction), list(one.direction.values()), zero
        for _ in range(iterations):
            vector = _normalised(vector, zero)
            direction, value = dict(zip(names, vector, strict=True)), zero
            image = [torch.zeros_like(part) for part in vector]
            for call, _, pull, norm in terms:
                _, tangents, jvp = directional_derivative(call, one.params, direction, jvp)
                value = value + norm * _tensors.squared_norm([tangents], zero.device)
                pulled = pull(tangents * norm.to(tangents))
                torch._foreach_add_(image, [pulled[name] for name in names])
            vector = image
    checks = {"outputs": same}
    found = BatchCurvature(value, loss_per_nat, finite, jvp, trusted=same, checks=checks)
    return found, _normalised(vector, zero)


def batch_gershgorin_curvature(
    one: BatchAlong, *, columns: int, seed: int, jvp: str, mean: bool = False
) -> BatchCurvature:
    r"""Gershgorin's $\sum \|Q\|\, \max_j \sum_i |K_{ij}|$ over some columns of the tangent kernel.

    Over all columns it is no less than what `batch_spectral_curvature` approaches; over a sample it
    is an estimate.

    Args:
        one: The losses; its direction does not matter.
        columns: How many, each of one vector-Jacobian and one Jacobian-vector product.
        seed: Of the sample.
        jvp: Name of the engine.
        mean: Whether the mean of the loss Hessian's eigenvalues takes the norm's place.
    """
    zero = value = torch.zeros_like(one.squared_norm)
    generator = torch.Generator().manual_seed(seed)
    with replaying():
        terms, loss_per_nat, finite, same = _terms(one, zero, mean)
        for call, outputs, pull, norm in terms:
            largest = zero
            for j in torch.randperm(outputs.numel(), generator=generator)[:columns].tolist():
                unit = torch.zeros_like(outputs)
                unit.view(-1)[j] = 1
                _, column, jvp = directional_derivative(call, one.params, pull(unit), jvp)
                largest = torch.maximum(largest, column.abs().sum().to(zero))
            value = value + norm * largest
    checks = {"outputs": same}
    return BatchCurvature(value, loss_per_nat, finite, jvp, trusted=same, checks=checks)


class _Term(NamedTuple):
    """One call of the model, and ``Σ ‖Q‖``, or of means, of the losses of its outputs."""

    call: Call
    outputs: Tensor
    pull: Callable[[Tensor], Mapping[str, Tensor]]
    norm: Tensor


def _terms(one: BatchAlong, zero: Tensor, mean: bool) -> tuple[list[_Term], Tensor, Tensor, Tensor]:
    """Terms, what one nat is worth, whether the losses are finite and the replays the passes."""
    hessian, needs_kl_scale = one.forms.hessian, one.forms.needs_kl_scale
    loss_per_nat = torch.full_like(zero, 0.0 if needs_kl_scale else math.inf)
    finite = torch.ones_like(zero, dtype=torch.bool)
    weights = loss_weights(one.batch, zero, one.amp_scale)
    terms, same = [], torch.ones_like(zero, dtype=torch.bool)
    for call, losses in losses_by_call(one.batch).items():
        outputs, pull = transpose(call, one.params)
        norm = zero
        for loss in losses:
            if loss.path is not None or any(placed.part for placed in loss.places):
                raise RuntimeError(
                    "step(): SpectralSGD needs one tensor that the criterion receives of each call "
                    "of the model: do in output_fn= what the loop does in between, or use Adler"
                )
            for place in (p.place for p in loss.places if p.place is not None and p.place.intact):
                if repeats(call) and place.output.shape == outputs.shape:
                    within = tolerance(call, outputs.dtype)
                    same = same & outputs_agree(outputs, place.output, within).to(same.device)
            loss_value = loss.value_at(outputs, one.forms.criterion)
            known = torch.isfinite(loss_value if loss.value is None else loss.value)
            finite = finite & known.to(finite.device)
            at, targets = loss.arguments(outputs)
            size = hessian.mean_eigenvalue if mean else hessian.spectral_norm
            norm = norm + weighted(weights[loss].abs(), size(at, targets))
            if needs_kl_scale:
                loss_per_nat = loss_per_nat + weighted(
                    weights[loss], hessian.loss_per_nat(at, targets, loss_value)
                )
        terms.append(_Term(call, outputs, pull, norm))
    return terms, loss_per_nat, finite, same


def _normalised(vector: list[Tensor], like: Tensor) -> list[Tensor]:
    length = _tensors.squared_norm(vector, like.device).sqrt()
    return list(torch._foreach_div(vector, [length.to(part) for part in vector]))
