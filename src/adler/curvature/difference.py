"""How far a finite difference moves the parameters.

Truncation grows with the step and rounding shrinks, and a fraction of a length over which the loss
changes balances them. Two such lengths are known for free: the effective rate, and the height of
the loss over its slope (the step at which a line would be at zero). The first lags behind a
landscape that sharpens, the second is far too long for a loss with a constant in it: the shorter
one is taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from adler import _tensors
from adler._recording.records import RecordedLoss
from adler._recording.replay import Call
from adler._recording.rounding import autocast_inside

__all__ = ["coarsest_dtype", "difference_step", "loss_value_of", "relative_step"]

# Of the shorter length.
_FRACTION = {torch.float64: 1e-6, torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
# A loss that can fall only a little has a minimiser far nearer than where a line is at zero.
_CAUTION = 4


def loss_value_of(
    batch: Sequence[RecordedLoss], weights: Mapping[RecordedLoss, Tensor], like: Tensor
) -> Tensor:
    """What was backpropagated: the weighted sum of the whole losses; NaN if one is not known."""
    total = torch.zeros_like(like)
    for loss in batch:
        if loss.value is None:
            return torch.full_like(like, math.nan)
        total = total + weights[loss] / loss.factor * loss.value.to(total)
    return total


def difference_step(
    call: Call,
    dtype: torch.dtype,
    *,
    rate: Tensor | None,
    loss_value: Tensor,
    slope: Tensor,
    squared_norm: Tensor,
) -> Tensor:
    r"""$\alpha$ of $(F(\theta) - F(\theta - \alpha d)) / \alpha$.

    Args:
        call: Whose replay is the forward pass; its autocast sets the rounding, whatever the dtype
            to which the outputs are cast.
        dtype: Of the outputs.
        rate: The effective rate; None, NaN or not positive: not known.
        loss_value: The loss; NaN or not positive: not known.
        slope: ``g·d``.
        squared_norm: ``d·d``; with neither length known the parameters move by 1e-3.

    Examples:
        >>> one = torch.ones(())
        >>> options = {"loss_value": 3 * one, "slope": 2 * one, "squared_norm": one}
        >>> call = Call.of(torch.nn.Identity(), one)
        >>> difference_step(call, torch.float64, rate=None, **options)
        tensor(3.7500e-07)
    """
    coarsest = coarsest_dtype(call, dtype)
    length = loss_value / slope
    length = torch.where(_known(length), length, math.inf)
    if rate is None:
        length = length / _CAUTION
    else:
        length = torch.where(_known(rate), torch.minimum(length, rate), length / _CAUTION)
    return torch.where(_known(length), _FRACTION[coarsest] * length, 1e-3 * squared_norm.rsqrt())


def relative_step(params: Sequence[Tensor], squared_norm: Tensor, dtype: torch.dtype) -> Tensor:
    """Where no length is known: moves the parameters by the root of the precision of their norm.

    Args:
        params: What is moved.
        squared_norm: ``d·d``, 0-dim; the step is one where it is zero.
        dtype: Whose precision is meant.
    """
    norm = _tensors.squared_norm(params, squared_norm.device).sqrt()
    step = torch.finfo(dtype).eps ** 0.5 * norm.clamp(min=1.0) * squared_norm.rsqrt()
    return torch.where(squared_norm > 0, step, torch.ones_like(step))


def coarsest_dtype(call: Call, dtype: torch.dtype) -> torch.dtype:
    """Which dtype rounds the outputs of a call, whatever they are cast to.

    Args:
        call: Its autocast and its devices say how it computes.
        dtype: Of the outputs.
    """
    seen = [dtype, *(state.dtype for state in call.autocast if state.enabled)]
    seen += autocast_inside(call.model)
    if dtype == torch.float32 and _rounds_to_tensorfloat32(call):
        seen.append(torch.float16)  # of as many digits
    return max(seen, key=lambda candidate: torch.finfo(candidate).eps)


def _known(length: Tensor) -> Tensor:
    return (length > 0) & (length < math.inf)


def _rounds_to_tensorfloat32(call: Call) -> bool:
    """Whether the GPU rounds the factors of products, in convolutions by PyTorch's default."""
    if all(device.type != "cuda" for device in call.devices):
        return False
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    if _is_rounded(products, products):
        return True
    return _is_rounded(getattr(convolutions, "conv", None), convolutions) and any(
        isinstance(module, _ConvNd) for module in call.model.modules()
    )


def _is_rounded(operator: Any, backend: Any) -> bool:
    """By the setting of an operator; PyTorch before 2.9 has one of the backend only."""
    if hasattr(operator, "fp32_precision"):
        return bool(operator.fp32_precision == "tf32")
    return bool(backend.allow_tf32)
