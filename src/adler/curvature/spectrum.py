r"""Extreme eigenvalues of a symmetric operator that is known by its products.

| function | what it needs | what it gives |
|---|---|---|
| `lanczos` | SciPy, products | extreme eigenvalues to working precision |
| `power_iteration` | products, a vector to start from | the largest modulus, with its residual |
| `gershgorin` | the matrix, or some columns | bounds of the whole spectrum |
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Interval",
    "PowerIteration",
    "gershgorin",
    "has_scipy",
    "lanczos",
    "power_iteration",
]

Product = Callable[[Tensor], Tensor]


class Interval(NamedTuple):
    """An interval that holds a spectrum.

    Attributes:
        lower: No eigenvalue is smaller.
        upper: No eigenvalue is larger.
    """

    lower: float
    upper: float


class PowerIteration(NamedTuple):
    r"""An eigenvalue of largest modulus, as far as the iteration went.

    Attributes:
        value: Rayleigh quotient $u^\top A u$, 0-dim.
        vector: ``u``, of unit norm; starts the next iteration on a matrix that is nearly the same.
        residual: $\|A u - \lambda u\|$, 0-dim: some eigenvalue is within it of ``value``.
        iterations: Products taken.
    """

    value: Tensor
    vector: Tensor
    residual: Tensor
    iterations: int


def power_iteration(
    product: Product, start: Tensor, *, iterations: int = 100, tolerance: float = 1e-6
) -> PowerIteration:
    r"""Iterates $u \leftarrow A u / \|A u\|$ until the residual is small.

    Args:
        product: ``u ↦ A u`` of a symmetric ``A``.
        start: Not zero; any shape that ``product`` maps to itself.
        iterations: Products at most, at least one.
        tolerance: Stop when the residual is below this fraction of the value.

    Raises:
        ValueError: If the start is zero or not finite, or ``iterations`` is below one.

    Examples:
        >>> A = torch.diag(torch.tensor([1.0, 3.0]))
        >>> round(float(power_iteration(lambda u: A @ u, torch.ones(2)).value), 4)
        3.0
    """
    if iterations < 1:
        raise ValueError(f"iterations={iterations!r}: expected at least 1")
    length = torch.linalg.vector_norm(start)
    if not torch.isfinite(length) or length == 0:
        raise ValueError(f"start: its norm is {float(length)}; expected a finite, non-zero vector")
    u = start / length
    for done in range(1, iterations + 1):
        image = product(u)
        value = (u * image).sum()
        residual = torch.linalg.vector_norm(image - value * u)
        length = torch.linalg.vector_norm(image)
        found = PowerIteration(value, u, residual, done)
        if not residual > tolerance * value.abs() or length == 0:
            break
        u = image / length
    return found


def lanczos(
    product: Product,
    size: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    which: Literal["LA", "SA", "LM", "BE"] = "LA",
    k: int = 1,
    tolerance: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """Extreme eigenvalues by SciPy's ``eigsh``, which restarts Lanczos implicitly (ARPACK).

    Args:
        product: ``v ↦ A v`` of a symmetric ``A``, on tensors of shape ``(size,)``.
        size: Of the matrix.
        dtype: Of the tensors that ``product`` receives.
        device: Of the tensors that ``product`` receives.
        which: ``"LA"`` largest, ``"SA"`` smallest, ``"LM"`` of largest modulus, ``"BE"`` both ends.
        k: How many.
        tolerance: Relative accuracy; 0: working precision. The smallest eigenvalues of a badly
            conditioned matrix converge slowly.
        seed: Of the vector to start from.

    Returns:
        Shape ``(k,)``, float64, ascending.

    Raises:
        ImportError: Without SciPy.
        ValueError: If ``k`` is not in ``1 … size``.
        RuntimeError: If it did not converge; the message says what to do.

    Examples:
        >>> A = torch.diag(torch.arange(50.0, dtype=torch.float64))
        >>> lanczos(lambda v: A @ v, 50, dtype=torch.float64, k=2).round(decimals=6)
        tensor([48., 49.], dtype=torch.float64)
    """
    if not 1 <= k <= size:
        raise ValueError(f"k={k!r}: expected 1 to {size}, the size of the matrix")
    if size <= max(2 * k, 20):  # ARPACK needs more vectors than that
        identity = torch.eye(size, dtype=dtype, device=device)
        dense = torch.stack([product(column) for column in identity]).double()
        values: Tensor = torch.linalg.eigvalsh((dense + dense.T) / 2).cpu()
        if which == "LM":
            return _largest(values, k)
        low = {"SA": k, "LA": 0, "BE": k // 2}[which]
        return torch.cat([values[:low], values[size - (k - low) :]])
    if which == "LM":
        # ARPACK's own choice can miss one of two with nearly the same modulus and other signs.
        ends = functools.partial(lanczos, product, size, dtype=dtype, device=device, which="BE")
        return _largest(ends(k=2 * k, tolerance=tolerance, seed=seed), k)
    linalg = _scipy()

    def matvec(vector: Any) -> Any:
        v = torch.as_tensor(vector.ravel(), dtype=dtype, device=device)
        return product(v).detach().double().cpu().numpy()

    operator = linalg.LinearOperator((size, size), matvec=matvec, dtype="float64")
    start = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    try:
        values = linalg.eigsh(
            operator, k, which=which, v0=start.numpy(), tol=tolerance, return_eigenvectors=False
        )
    except linalg.ArpackNoConvergence as error:
        raise RuntimeError(
            f"Lanczos: {len(error.eigenvalues)} of {k} eigenvalues ({which}) converged; raise "
            "tolerance=, or make the matrix dense where memory allows"
        ) from error
    ascending: Tensor = torch.as_tensor(values).sort().values
    return ascending


def _largest(values: Tensor, k: int) -> Tensor:
    """The ``k`` of largest modulus, ascending."""
    return values[values.abs().argsort(descending=True)[:k]].sort().values


def gershgorin(matrix: Tensor, columns: Tensor | None = None) -> Interval:
    r"""Gershgorin's interval: $A_{ii} \pm \sum_{j \ne i} |A_{ij}|$, over the discs.

    Args:
        matrix: Symmetric, ``(n, n)``; or some of its columns, ``(n, m)``.
        columns: Which ones they are, ``(m,)``. The interval is then that of their discs: an
            estimate, inside the exact one.

    Raises:
        ValueError: If the shapes do not fit.

    Examples:
        >>> gershgorin(torch.tensor([[2.0, -1.0], [-1.0, 3.0]]))
        Interval(lower=1.0, upper=4.0)
    """
    if matrix.ndim != 2 or (columns is None and matrix.shape[0] != matrix.shape[1]):
        raise ValueError(
            f"matrix: shape {tuple(matrix.shape)}; expected (n, n), or (n, m) with columns="
        )
    if columns is None:
        columns = torch.arange(matrix.shape[1], device=matrix.device)
    if columns.shape != matrix.shape[1:]:
        raise ValueError(
            f"columns: shape {tuple(columns.shape)} for a matrix of shape {tuple(matrix.shape)}"
        )
    matrix = matrix.double()
    diagonal = matrix[columns, torch.arange(len(columns), device=matrix.device)]
    radii = matrix.abs().sum(0) - diagonal.abs()
    return Interval(float((diagonal - radii).min()), float((diagonal + radii).max()))


def has_scipy() -> bool:
    """Whether `lanczos` can work on large matrices."""
    try:
        _scipy()
    except ImportError:
        return False
    return True


def _scipy() -> Any:
    try:
        from scipy.sparse import linalg
    except ImportError as error:
        raise ImportError("Lanczos needs SciPy: pip install 'torch-adler[diagnostics]'") from error
    return linalg
