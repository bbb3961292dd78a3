"""Losses, rates and coefficients as tensors: given as numbers or tensors, checked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adler.losses.base import wide

__all__ = ["Numbers", "excess", "numbers", "scalar"]

Numbers = float | Tensor | Sequence[float | Tensor]


def numbers(value: Numbers, like: Tensor | None = None) -> Tensor:
    """A detached tensor, float32 or wider, on the device of ``like``."""
    if isinstance(value, Sequence):
        several = [numbers(v, like) for v in value]
        value = torch.stack(several) if several else torch.zeros(0)
    if not isinstance(value, Tensor):  # Python's numbers keep their double precision
        value = torch.tensor(value, dtype=torch.float64)
    device = value.device if like is None else like.device
    dtype = torch.float32 if device.type == "mps" else wide(value.dtype)  # has no float64
    return value.detach().to(device, dtype)


def scalar(name: str, value: float | Tensor, like: Tensor | None = None) -> Tensor:
    """One finite number, as a tensor; the name is for the message."""
    tensor = numbers(value, like)
    if tensor.ndim != 0 or not torch.isfinite(tensor):
        raise ValueError(f"{name}={tensor.tolist()!r}: expected one finite number")
    return tensor


def excess(name: str, loss: float | Tensor, optimum: float | Tensor, like: Tensor) -> Tensor:
    """``h - h*``, checked."""
    h, least = scalar(name, loss, like), scalar("optimum", optimum, like)
    if h < least:
        raise ValueError(
            f"{name}={float(h)!r} is below optimum={float(least)!r}: pass a lower bound of the "
            "loss as the optimum"
        )
    return h - least
