"""Arithmetic in parameter space: one kernel for all tensors where PyTorch has one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["decay_", "descend_", "squared_norm"]

_FUSED_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_FUSED_DEVICES = ("cpu", "cuda")


def squared_norm(tensors: Sequence[Tensor], home: torch.device | None = None) -> Tensor:
    """Sum of squares of all entries; NaN or infinite if any entry is.

    Args:
        tensors: Any shapes, floating dtypes and devices, at least one.
        home: Device of the result; default: that of the first tensor.

    Returns:
        0-dim, float64 (float32 where the device has no float64).

    Examples:
        >>> float(squared_norm([torch.tensor([3.0]), torch.tensor([[4.0]])]))
        25.0
    """
    home = tensors[0].device if home is None else home
    wide = torch.float32 if home.type == "mps" else torch.float64
    total = torch.zeros((), dtype=wide, device=home)
    for (device, dtype), group in _by_device_and_dtype(tensors).items():
        (members,) = group
        accumulate = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
        norms = torch._foreach_norm(members, 2, accumulate if accumulate != dtype else None)
        local = torch.float32 if device.type == "mps" else torch.float64
        total = total + torch.stack(norms).to(local).square().sum().to(total)
    return total


def descend_(
    params: Sequence[Tensor], directions: Sequence[Tensor], rate: Tensor, skip: Tensor
) -> None:
    r"""In place, $\theta \leftarrow \theta - \eta\, d$, or nothing at all.

    Args:
        params: Tensors to update.
        directions: As many, of the same shapes, dtypes and devices; unchanged, may be non-finite.
        rate: 0-dim.
        skip: 0-dim bool on the same device as ``rate``: leave every bit of ``params`` alone.
    """
    skip = skip.to(torch.float32)
    for (device, dtype), (p, d) in _by_device_and_dtype(params, directions).items():
        if dtype in _FUSED_DTYPES and device.type in _FUSED_DEVICES:
            # Takes the rate and the veto from the device, so that the host need not wait.
            torch._fused_sgd_(
                p,
                d,
                [],
                weight_decay=0.0,
                momentum=0.0,
                lr=rate.to(device, torch.float64 if device.type == "cpu" else torch.float32),
                dampening=0.0,
                nesterov=False,
                maximize=False,
                is_first_step=False,
                grad_scale=None,
                found_inf=skip.to(device),
            )
        else:
            step, veto = rate.to(device), skip.to(device).bool()
            for param, direction in zip(p, d, strict=True):
                param.copy_(torch.where(veto, param, param - step * direction))


def decay_(params: Sequence[Tensor], amount: Tensor) -> None:
    r"""In place, $\theta \leftarrow (1 - \min(a, 1))\,\theta$: decay never flips a sign."""
    keep = 1 - amount.clamp(max=1)
    for (device, dtype), (members,) in _by_device_and_dtype(params).items():
        torch._foreach_mul_(members, keep.to(device, dtype))


def _by_device_and_dtype(
    *lists: Sequence[Tensor],
) -> dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], ...]]:
    groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], ...]] = defaultdict(
        lambda: tuple([] for _ in lists)
    )
    for row in zip(*lists, strict=True):
        group = groups[row[0].device, row[0].dtype]
        for members, tensor in zip(group, row, strict=True):
            members.append(tensor)
    return groups
