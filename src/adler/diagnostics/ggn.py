r"""The generalized Gauss-Newton matrix (GGN) $J^\top Q J$ as an operator on the parameters."""

from __future__ import annotations

import torch

from adler.curvature.objective import Objective
from adler.curvature.parameters import flattened
from adler.curvature.spectrum import has_scipy, lanczos, power_iteration

__all__ = ["ggn_largest_eigenvalue"]

# ARPACK keeps about this many vectors.
_BASIS = 22


def ggn_largest_eigenvalue(
    objective: Objective, *, tolerance: float = 1e-4, max_bytes: int = 2**30
) -> float:
    r"""``λ_max(JᵀQJ)``: the smoothness ``L`` of the loss, as far as the GGN is its Hessian.

    By Lanczos, or, where its basis would not fit or SciPy is missing, by power iteration.

    Args:
        objective: The loss of the batch.
        tolerance: Relative accuracy.
        max_bytes: Of the basis.

    Examples:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> x, y = torch.full((4, 1), 3.0), torch.zeros(4, 1)
        >>> round(ggn_largest_eigenvalue(Objective(model, x, y, torch.nn.MSELoss())), 3)
        18.0
    """
    size = sum(p.numel() for p in objective.params.values())
    like = next(iter(objective.params.values()))
    product = flattened(objective.ggn_products(), objective.params)
    if size * _BASIS * 8 <= max_bytes and has_scipy():
        top = lanczos(product, size, dtype=like.dtype, device=like.device, tolerance=tolerance)
        return float(top[0])
    start = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(like)
    return float(power_iteration(product, start, iterations=1000, tolerance=tolerance).value)
