r"""The Hessian of a loss, split into what the GGN keeps and what it drops.

For $h(\theta) = L(F(\theta))$ the second derivative along a direction $d$, with $v = J d$, is

$$
d^\top \nabla^2 h\, d = \underbrace{v^\top \nabla^2 L\, v}_{\text{GGN}}
    + \underbrace{\langle \nabla L, D^2 F[d, d] \rangle}_{\text{residual}} .
$$

The first term is driven by the tangent kernel, the second by the curvature of the network itself.
The second vanishes where the loss's gradient does (a fitted batch), and where the network is linear
in its parameters, which wide networks approach: $\|\nabla^2 F_i\|$ falls like the inverse square
root of the width in the NTK parametrisation, and within a ball of radius ``R`` an output differs
from its linearisation by at most $\tfrac12 R^2 \sup \|\nabla^2 F_i\|$.

Source: D. Balboni, PhD thesis, SNS 2025, sections 7.4 and 7.5; C. Liu, L. Zhu, M. Belkin, *On the
linearity of large non-linear models: when and why the tangent kernel is constant*, NeurIPS 2020.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adler._recording.replay import Call, replaying
from adler.curvature.jacobian import Parameters
from adler.curvature.objective import Objective, hessian_products
from adler.curvature.parameters import flattened, named_direction, named_parameters
from adler.curvature.spectrum import lanczos
from adler.losses import AutogradHessian
from adler.losses.generic import output_gradient

__all__ = ["HessianSplit", "hessian_split", "output_hessian_norm"]


class HessianSplit(NamedTuple):
    r"""A loss's second derivative along one direction; 0-dim tensors.

    Attributes:
        gauss_newton: $v^\top Q v$, what `adler.curvature.quadratic_form` returns.
        residual: ``total - gauss_newton``. Where ``Q`` is the loss's Hessian, that is
            $\langle \nabla L, D^2 F[d, d] \rangle$; where it is something else (`NLLLoss`,
            `EmpiricalFisher`), also what the loss's Hessian has beyond ``Q``.
        total: $d^\top \nabla^2 h\, d$.
    """

    gauss_newton: Tensor
    residual: Tensor
    total: Tensor

    @property
    def trust(self) -> Tensor:
        r"""$|\text{GGN}| / (|\text{GGN}| + |\text{residual}|)$, between 0 and 1, 0-dim.

        At 1 the GGN is the Hessian along this direction; below ½ the residual is the larger term,
        and the GGN may not even have the sign of the total. 1 where both terms are zero.
        """
        kept, dropped = self.gauss_newton.abs(), self.residual.abs()
        return torch.where(dropped == 0, torch.ones_like(kept), kept / (kept + dropped))


def hessian_split(objective: Objective, direction: Parameters | Iterable[Tensor]) -> HessianSplit:
    r"""Second derivative of one batch's loss along a direction, split as in the module's formula.

    By double backward: $\langle u, D^2 F[d, d] \rangle = d^\top \nabla^2 \langle u, F \rangle\, d$
    with $u = \nabla L$ held fixed. PyTorch takes the second derivative of ReLU as 0 everywhere, so
    the residual of a ReLU network holds the products of weights of different layers, and nothing of
    its kinks.

    Args:
        objective: The loss of the batch.
        direction: By name, or a sequence as long as the objective's parameters.

    Returns:
        0-dim tensors, float32 or wider. Model, gradients and generators are as before.

    Raises:
        ValueError: If names, lengths or shapes do not fit.
        RuntimeError: If the outputs do not depend on the parameters.

    Examples:
        >>> class Product(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.a, self.b = (torch.nn.Parameter(torch.ones(())) for _ in range(2))
        ...     def forward(self, x):
        ...         return self.a * self.b * x
        >>> h = Objective(Product(), torch.ones(1), torch.zeros(1), torch.nn.MSELoss())
        >>> direction = [torch.tensor(1.0), torch.tensor(1.0)]  # (1 + t)⁴ along it
        >>> [float(part) for part in hessian_split(h, direction)]
        [8.0, 4.0, 12.0]
    """
    provider, along = objective.loss_hessian, named_direction(objective.params, direction)
    # Not by forward mode: see `hessian_products`.
    outputs, tangents = objective.jvp(along, "double_backward")
    with replaying(), torch.enable_grad():
        _, u = output_gradient(provider.criterion, outputs, objective.targets)
    bend = hessian_products(lambda p: (u * objective.outputs(p)).sum(), objective.params)(along)
    bent = torch.stack([(along[name] * bend[name]).sum().to(u) for name in along]).sum()
    with replaying():
        kept = provider.quadratic_form(outputs, objective.targets, tangents)
        own = AutogradHessian(provider.criterion)
        total = own.quadratic_form(outputs, objective.targets, tangents) + bent
    return HessianSplit(kept, total - kept, total)


def output_hessian_norm(
    model: nn.Module,
    inputs: Any,
    params: Parameters | Iterable[Tensor] | None = None,
    *,
    output: int = 0,
    output_fn: Callable[[Any], Tensor] | None = None,
    tolerance: float = 1e-6,
    seed: int = 0,
) -> float:
    r"""Spectral norm $\|\nabla^2 F_i(\theta)\|$ of the Hessian of one output of one example.

    By Lanczos on Hessian-vector products; the graph of the gradient is built once.

    Args:
        model: See `adler.curvature.Objective`.
        inputs: See there; one example is enough.
        params: See there.
        output: Which entry of the outputs, flattened row by row: ``i C + c`` is output ``c`` of
            example ``i``.
        output_fn: See there.
        tolerance: Relative accuracy.
        seed: Of the vector that Lanczos starts from.

    Raises:
        ValueError: If there is no such output.
        ImportError: Without SciPy, beyond 20 parameters.
        RuntimeError: If the outputs do not depend on the parameters, or Lanczos did not converge.

    Examples:
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(1, 1, bias=False) for _ in range(2)))
        >>> output_hessian_norm(model, torch.tensor([[3.0]]))  # of 3 w₁ w₂
        3.0
    """
    named = named_parameters(model, params)
    call = Call.of(model, inputs, output_fn)

    def entry(p: Parameters) -> Tensor:
        outputs = call(p).flatten()
        if not 0 <= output < outputs.numel():
            raise ValueError(f"output={output!r}: expected 0 to {outputs.numel() - 1}")
        return outputs[output]

    size, first = sum(p.numel() for p in named.values()), next(iter(named.values()))
    product = flattened(hessian_products(entry, named), named)
    probe = torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(first)
    if not product(probe).any():  # linear in its parameters: ARPACK refuses the zero matrix
        return 0.0
    extreme = lanczos(
        product,
        size,
        dtype=first.dtype,
        device=first.device,
        which="LM",
        tolerance=tolerance,
        seed=seed,
    )
    return math.fabs(float(extreme))
