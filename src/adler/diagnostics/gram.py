r"""Gram matrices: how well conditioned they are, and how far a change can degrade that.

For features $f(x_i)$ of $b$ examples, flattened, $G_{ij} = \langle f(x_i), f(x_j) \rangle$.
`adler.diagnostics.features` takes them from a network.

Source: D. Balboni, *An Optimization Perspective on Deep Neural Networks*, PhD thesis, Scuola
Normale Superiore, 2025, section 4.4; row sums and entries as proxies: section 6.3.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from adler.losses.base import wide

__all__ = [
    "Conditioning",
    "conditioning",
    "correlation",
    "degradation_bound",
    "eigenvalue_perturbation",
    "gram",
]


class Conditioning(NamedTuple):
    r"""What the spectrum of a Gram matrix looks like, exactly and from its entries alone.

    Attributes:
        smallest: Smallest eigenvalue; rounding can make it slightly negative.
        largest: Largest eigenvalue.
        log_condition: Natural logarithm of ``largest / smallest``; ``inf`` where the matrix is
            singular to the precision of its dtype.
        max_row_sum: $\max_i \sum_{j \ne i} |G_{ij}|$.
        min_diagonal: $\min_i G_{ii}$.
        max_off_diagonal: $\max_{i \ne j} |G_{ij}|$.
        lower: Gershgorin's bound $\min_i (G_{ii} - \sum_{j \ne i} |G_{ij}|)$, at most ``smallest``.
        upper: Gershgorin's bound $\max_i (G_{ii} + \sum_{j \ne i} |G_{ij}|)$, at least ``largest``.
    """

    smallest: float
    largest: float
    log_condition: float
    max_row_sum: float
    min_diagonal: float
    max_off_diagonal: float
    lower: float
    upper: float


def gram(features: Tensor) -> Tensor:
    r"""The Gram matrix $G_{ij} = \langle f_i, f_j \rangle$ of flattened features.

    Args:
        features: Shape ``(b, ...)``, floating point.

    Returns:
        Shape ``(b, b)``, symmetric, float32 or wider; autocast does not apply.

    Raises:
        TypeError: If the features are not floating-point numbers.
        ValueError: If they have no dimension of examples.

    Examples:
        >>> gram(torch.tensor([[1.0, 2.0], [0.0, 3.0]]))
        tensor([[5., 6.],
                [6., 9.]])
    """
    if not features.is_floating_point():
        raise TypeError(f"features: dtype {features.dtype} is not floating point: convert them")
    if features.ndim == 0:
        raise ValueError("features: a 0-dim tensor has no examples; pass a tensor (b, ...)")
    with torch.autocast(features.device.type, enabled=False):
        rows = features.reshape(features.shape[0], math.prod(features.shape[1:]))
        rows = rows.to(wide(features.dtype))
        product = rows @ rows.T
        return (product + product.T) / 2


def correlation(gram: Tensor) -> Tensor:
    r"""Cosines of the angles between features, $G_{ij} / \sqrt{G_{ii} G_{jj}}$.

    Args:
        gram: Gram matrix, shape ``(b, b)``, with a positive diagonal.

    Returns:
        Same shape, dtype and device; the diagonal is exactly 1, all entries lie in [-1, 1].

    Raises:
        ValueError: If the matrix is not square, symmetric and finite, if an example has no
            features but zeros, or if an entry exceeds what Cauchy and Schwarz allow.

    Examples:
        >>> correlation(torch.tensor([[4.0, 1.0], [1.0, 1.0]]))
        tensor([[1.0000, 0.5000],
                [0.5000, 1.0000]])
    """
    _refuse_asymmetric("gram", gram)
    diagonal = gram.diagonal()
    if bool((diagonal <= 0).any()):
        i = int(diagonal.argmin())
        raise ValueError(
            f"gram: entry ({i}, {i}) is {float(diagonal[i])}, so example {i} has no angle to the "
            "others: leave out examples whose features are all zero"
        )
    scale = diagonal.sqrt()
    cosines = gram / scale[:, None] / scale
    excess = float(cosines.abs().max()) - 1
    if excess > torch.finfo(gram.dtype).eps ** 0.5:
        raise ValueError(
            f"gram: an entry exceeds sqrt(G_ii G_jj) by a factor of {1 + excess:.4g}: not a Gram "
            "matrix"
        )
    cosines = cosines.clamp(-1, 1)
    return cosines + torch.diag_embed(1 - cosines.diagonal())


def conditioning(gram: Tensor) -> Conditioning:
    r"""Extreme eigenvalues, condition number and the bounds that need no eigenvalue.

    Args:
        gram: Symmetric, shape ``(b, b)``; the computation is in float64.

    Returns:
        See `Conditioning`.

    Raises:
        ValueError: If the matrix is empty, not square, not symmetric or not finite.

    Source:
        S. Gershgorin, 1931, for ``lower`` and ``upper``: every eigenvalue lies within
        $\sum_{j \ne i} |G_{ij}|$ of some $G_{ii}$.

    Examples:
        >>> found = conditioning(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
        >>> found.lower, round(found.smallest, 6), round(found.largest, 6), found.upper
        (1.0, 1.0, 3.0, 3.0)
    """
    _refuse_asymmetric("gram", gram)
    matrix = _double(gram)
    matrix = (matrix + matrix.T) / 2
    eigenvalues = torch.linalg.eigvalsh(matrix)
    smallest, largest = float(eigenvalues[0]), float(eigenvalues[-1])
    # Below this an eigenvalue is rounding, of the dtype in which the entries were computed.
    resolved = smallest > len(matrix) * torch.finfo(gram.dtype).eps * largest
    diagonal = matrix.diagonal()
    off_diagonal = (matrix - torch.diag(diagonal)).abs()
    rows = off_diagonal.sum(dim=1)
    return Conditioning(
        smallest,
        largest,
        math.log(largest / smallest) if resolved else math.inf,
        float(rows.max()),
        float(diagonal.min()),
        float(off_diagonal.max()),
        float((diagonal - rows).min()),
        float((diagonal + rows).max()),
    )


def eigenvalue_perturbation(
    before: Tensor, after: Tensor, norm: Literal["operator", "frobenius"] = "operator"
) -> float:
    r"""How far each eigenvalue can have moved while a symmetric matrix changed.

    $$
    |\lambda_i(A) - \lambda_i(B)| \le \|A - B\|_{\text{op}} \le \|A - B\|_F .
    $$

    For the smallest: for every unit vector $u$, $u^\top B u \ge u^\top A u - \|A - B\| \ge
    \lambda_{\min}(A) - \|A - B\|$; minimise over $u$, then exchange $A$ and $B$. Applied to the
    features themselves, the same holds of singular values.

    Args:
        before: ``A``, symmetric, shape ``(b, b)``.
        after: ``B``, likewise.
        norm: ``"operator"``, or ``"frobenius"``, which is larger and needs no eigenvalue.

    Raises:
        ValueError: If a matrix is empty, not square, not symmetric or not finite, or if the shapes
            differ, or the norm is another.

    Source:
        H. Weyl, 1912; (4.11) of D. Balboni, PhD thesis, SNS 2025, section 4.4.

    Examples:
        >>> A, B = torch.eye(2), torch.diag(torch.tensor([4.0, 5.0]))
        >>> eigenvalue_perturbation(A, B), eigenvalue_perturbation(A, B, "frobenius")
        (4.0, 5.0)
    """
    _refuse_asymmetric("before", before)
    _refuse_asymmetric("after", after)
    if before.shape != after.shape:
        raise ValueError(
            f"after: shape {tuple(after.shape)} differs from that of before, {tuple(before.shape)}"
        )
    if norm not in ("operator", "frobenius"):
        raise ValueError(f"norm={norm!r}: expected 'operator' or 'frobenius'")
    change = _double(before) - _double(after).to(_double(before).device)
    if norm == "frobenius":
        return float(torch.linalg.matrix_norm(change))
    return float(torch.linalg.eigvalsh((change + change.T) / 2).abs().max())


def degradation_bound(
    before: Tensor, after: Tensor, norm: Literal["operator", "frobenius"] = "operator"
) -> tuple[float, float]:
    r"""Where the smallest eigenvalue can be after a symmetric matrix has changed.

    Args:
        before: See `eigenvalue_perturbation`.
        after: See `eigenvalue_perturbation`.
        norm: See `eigenvalue_perturbation`.

    Returns:
        ``(lower, upper)``, which bracket the smallest eigenvalue of ``after``, found from the
        smallest eigenvalue of ``before`` and the norm of the change. A ``lower`` of 0 or less says
        nothing about a Gram matrix.

    Raises:
        ValueError: As `eigenvalue_perturbation`.

    Examples:
        >>> degradation_bound(torch.eye(2), torch.diag(torch.tensor([1.25, 0.5])))
        (0.5, 1.5)
    """
    radius = eigenvalue_perturbation(before, after, norm)
    A = _double(before)
    smallest = float(torch.linalg.eigvalsh((A + A.T) / 2)[0])
    return smallest - radius, smallest + radius


# --- helpers --------------------------------------------------------------------------------------


def _refuse_asymmetric(name: str, matrix: Tensor) -> None:
    """Raises a ValueError for what cannot be a Gram matrix; rounding is forgiven."""
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.numel() == 0:
        raise ValueError(f"{name}: shape {tuple(matrix.shape)}; pass a square matrix (b, b)")
    if not matrix.is_floating_point():
        raise ValueError(f"{name}: dtype {matrix.dtype}; pass a floating-point matrix")
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(f"{name}: has entries that are not finite; look for them in the features")
    asymmetry, scale = float((matrix - matrix.T).abs().max()), float(matrix.abs().max())
    if asymmetry > torch.finfo(matrix.dtype).eps ** 0.5 * scale:
        raise ValueError(
            f"{name}: differs from its transpose by up to {asymmetry:.3g}; pass a symmetric matrix"
        )


def _double(matrix: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none."""
    matrix = matrix.detach()
    return (matrix.cpu() if matrix.device.type == "mps" else matrix).to(torch.float64)
