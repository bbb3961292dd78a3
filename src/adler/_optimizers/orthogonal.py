r"""The nearest matrix with equal singular values, nearly: Newton-Schulz iterations, batched.

For $G = U \Sigma V^\top$, each iteration applies the odd polynomial
$\varphi(\sigma) = a\sigma + b\sigma^3 + c\sigma^5$ to the singular values of $G / \|G\|_F$. With
the coefficients below, five of them bring every singular value that is not tiny to between 0.7 and
1.2: $U S V^\top$ with $S \approx 1$. Only products of matrices are needed.

Source of the iteration and its coefficients: K. Jordan et al., *Muon: An optimizer for hidden
layers in neural networks*, kellerjordan.github.io/posts/muon (2024).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["COEFFICIENTS", "orthogonalized"]

# The slope at zero is steep, at the price of singular values that stay apart from 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalized(tensors: Sequence[Tensor]) -> list[Tensor]:
    r"""Of each, the matrix with its singular vectors and singular values near 1.

    Matrices of one shape are worked on together, whatever their number. A convolution's kernel is
    the matrix of its output channels. On a GPU the products are taken in bfloat16, which the
    iteration tolerates; elsewhere, and for float64, in the tensors' own precision.

    Args:
        tensors: Of two or more dimensions, floating; a tensor of zeros stays zero, one that holds
            a number that is not finite becomes NaN.

    Returns:
        New tensors of the same shapes, dtypes and devices.

    Examples:
        >>> matrix = torch.diag(torch.tensor([3.0, 2.0]))
        >>> (found,) = orthogonalized([matrix])
        >>> bool((torch.linalg.svdvals(found) - 1).abs().max() < 0.35)
        True
    """
    shapes: dict[tuple[torch.device, torch.dtype, int, int], list[int]] = defaultdict(list)
    matrices = [tensor.flatten(1) for tensor in tensors]
    for i, matrix in enumerate(matrices):
        short, long = sorted(matrix.shape)
        shapes[matrix.device, matrix.dtype, short, long].append(i)
    found: dict[int, Tensor] = {}
    for (device, dtype, *_), members in shapes.items():
        wide = [_is_tall(matrices[i]) for i in members]
        stack = torch.stack(
            [matrices[i].mT if tall else matrices[i] for i, tall in zip(members, wide, strict=True)]
        )
        done = _newton_schulz(stack.to(_precision(device, dtype))).to(dtype)
        for i, tall, matrix in zip(members, wide, done.unbind(), strict=True):
            found[i] = (matrix.mT if tall else matrix).reshape(tensors[i].shape)
    return [found[i] for i in range(len(tensors))]


def _is_tall(matrix: Tensor) -> bool:
    return matrix.shape[0] > matrix.shape[1]


def _precision(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    if dtype == torch.float64:
        return dtype
    if device.type == "cuda":
        return torch.bfloat16
    return torch.float32


def _newton_schulz(stack: Tensor) -> Tensor:
    """Of a stack of wide matrices."""
    a, b, c = COEFFICIENTS
    # Twice, so that no square overflows or is rounded to zero; zeros stay zeros.
    tiny = torch.finfo(stack.dtype).tiny
    x = stack / stack.abs().amax(dim=(-2, -1), keepdim=True).clamp(min=tiny)
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=tiny)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x
