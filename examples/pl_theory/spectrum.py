"""The largest eigenvalue of a slowly moving operator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["largest_eigenpair"]


def largest_eigenpair(
    product: Callable[[Tensor], Tensor], start: Tensor, dimension: int
) -> tuple[float, Tensor]:
    """The largest Ritz value, and its vector, in the Krylov space of a symmetric operator.

    Power iteration from the last step's vector would not see in time that another eigenvalue has
    overtaken.

    Args:
        product: ``v ↦ A v``.
        start: A vector, not zero.
        dimension: Products at most.
    """
    V, images = start.new_empty(dimension, len(start)), start.new_empty(dimension, len(start))
    V[0] = start / torch.linalg.vector_norm(start)
    size = 0
    for size in range(1, dimension + 1):
        image = product(V[size - 1])
        images[size - 1] = image
        if size == dimension:
            break
        known = V[:size]
        rest = image - known.T @ (known @ image)
        rest = rest - known.T @ (known @ rest)  # once more: rounding
        norm = torch.linalg.vector_norm(rest)
        if norm <= 1e-6 * torch.linalg.vector_norm(image):
            break
        V[size] = rest / norm
    T = V[:size] @ images[:size].T
    values, vectors = torch.linalg.eigh((T + T.T) / 2)
    return float(values[-1]), V[:size].T @ vectors[:, -1]
