r"""The generalized Gauss-Newton matrix (GGN) $J^\top Q J$ as an operator on the parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from adler._recording.replay import Call, replaying
from adler.curvature import named_parameters
from adler.curvature.jacobian import Parameters, directional_derivative, transpose
from adler.diagnostics.spectrum import has_scipy, lanczos, power_iteration
from adler.losses import LossHessian, loss_hessian

__all__ = ["ggn_largest_eigenvalue"]

# ARPACK keeps about this many vectors.
_BASIS = 22


def ggn_largest_eigenvalue(
    model: nn.Module,
    inputs: Any,
    targets: Any,
    criterion: Callable[..., Tensor] | LossHessian,
    params: Parameters | Iterable[Tensor] | None = None,
    *,
    output_fn: Callable[[Any], Tensor] | None = None,
    tolerance: float = 1e-4,
    max_bytes: int = 2**30,
) -> float:
    r"""``λ_max(JᵀQJ)``: the smoothness ``L`` of the loss, as far as the GGN is its Hessian.

    By Lanczos, or, where its basis would not fit or SciPy is missing, by power iteration.

    Args:
        model: The network.
        inputs: One argument, a tuple of positional arguments, or a mapping of keyword arguments.
        targets: What the criterion receives after the outputs.
        criterion: The loss, reduced to a scalar, or a `LossHessian`.
        params: By name or as a sequence of parameters. Default: all that require a gradient.
        output_fn: Picks the tensor of interest from what the model returns.
        tolerance: Relative accuracy.
        max_bytes: Of the basis.

    Examples:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> x, y = torch.full((4, 1), 3.0), torch.zeros(4, 1)
        >>> round(ggn_largest_eigenvalue(model, x, y, torch.nn.MSELoss()), 3)
        18.0
    """
    if params is None:
        params = [p for p in model.parameters() if p.requires_grad]
    named, hessian = named_parameters(model, params), loss_hessian(criterion)
    call = Call.of(model, inputs, output_fn)
    outputs, pull = transpose(call, named)
    shapes = {name: p.shape for name, p in named.items()}
    size = sum(math.prod(shape) for shape in shapes.values())
    like = next(iter(named.values()))

    def product(flat: Tensor) -> Tensor:
        pieces = torch.split(flat.to(like), [math.prod(shape) for shape in shapes.values()])
        direction = {
            name: piece.view(shape)
            for (name, shape), piece in zip(shapes.items(), pieces, strict=True)
        }
        _, tangents, _ = directional_derivative(call, named, direction)
        with replaying():
            curved = hessian.product(outputs, targets, tangents)
        return torch.cat([part.flatten() for part in pull(curved.to(outputs)).values()])

    if size * _BASIS * 8 <= max_bytes and has_scipy():
        top = lanczos(product, size, dtype=like.dtype, device=like.device, tolerance=tolerance)
        return float(top[0])
    start = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(like)
    return float(power_iteration(product, start, iterations=1000, tolerance=tolerance).value)
