"""What a network is initialised with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["INITIALISATIONS"]


def _default(model: nn.Module) -> None:
    """PyTorch's own."""


def _orthogonal(model: nn.Module) -> None:
    """Weights of linear and convolutional layers have orthonormal rows or columns."""
    for weight in _weights(model):
        nn.init.orthogonal_(weight)


def _large(model: nn.Module) -> None:
    """The same weights at three times PyTorch's scale."""
    with torch.no_grad():
        for weight in _weights(model):
            weight.mul_(3)


def _weights(model: nn.Module) -> list[Tensor]:
    return [m.weight for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]


INITIALISATIONS: dict[str, Callable[[nn.Module], None]] = {
    "default": _default,
    "orthogonal": _orthogonal,
    "large": _large,
}
