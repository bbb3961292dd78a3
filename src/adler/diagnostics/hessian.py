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

Source: D. Balboni, PhD thesis, SNS 2025, section 7.3; C. Liu, L. Zhu, M. Belkin, *On the linearity
of large non-linear models: when and why the tangent kernel is constant*, NeurIPS 2020.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adler._recording.replay import Call, replaying
from adler.curvature import named_direction, named_parameters
from adler.curvature.jacobian import Function, Parameters, double_backward, transpose
from adler.diagnostics.spectrum import lanczos
from adler.losses import AutogradHessian, LossHessian, loss_hessian
from adler.losses.generic import output_gradient

__all__ = ["HessianSplit", "hessian_split", "hessian_vector_product", "output_hessian_norm"]


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


def hessian_split(
    model: nn.Module,
    params: Parameters | Iterable[Tensor],
    inputs: Any,
    targets: Any,
    criterion: Callable[..., Tensor] | LossHessian,
    direction: Parameters | Iterable[Tensor],
    *,
    output_fn: Callable[[Any], Tensor] | None = None,
) -> HessianSplit:
    r"""Second derivative of one batch's loss along a direction, split as in the module's formula.

    By double backward: $\langle u, D^2 F[d, d] \rangle = d^\top \nabla^2 \langle u, F \rangle\, d$
    with $u = \nabla L$ held fixed. PyTorch takes the second derivative of ReLU as 0 everywhere, so
    the residual of a ReLU network holds the products of weights of different layers, and nothing of
    its kinks.

    Args:
        model: The network.
        params: By name, or a sequence of parameters of the model. Those left out are constants.
        inputs: One argument, a tuple of positional arguments, or a mapping of keyword arguments.
        targets: What the criterion receives after the outputs; a tuple where it receives several.
        criterion: The loss, reduced to a scalar, or a `LossHessian`.
        direction: As ``params``: a mapping with the same names, or a sequence of the same length.
        output_fn: Picks the tensor of interest from what the model returns.

    Returns:
        0-dim tensors, float32 or wider. Model, gradients and generators are as before.

    Raises:
        ValueError: If names, lengths or shapes do not fit, or the criterion does not reduce.
        RuntimeError: If the outputs do not depend on the parameters.

    Examples:
        >>> class Product(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.a, self.b = (torch.nn.Parameter(torch.ones(())) for _ in range(2))
        ...     def forward(self, x):
        ...         return self.a * self.b * x
        >>> model, x, y = Product(), torch.ones(1), torch.zeros(1)
        >>> direction = [torch.tensor(1.0), torch.tensor(1.0)]  # (1 + t)⁴ along it
        >>> split = hessian_split(model, model.parameters(), x, y, torch.nn.MSELoss(), direction)
        >>> [float(part) for part in split]
        [8.0, 4.0, 12.0]
    """
    provider = loss_hessian(criterion)
    named = named_parameters(model, params)
    along = named_direction(named, direction)
    call = Call.of(model, inputs, output_fn)
    # Not by nested forward mode, which is silently wrong through batch and layer normalisation:
    # PyTorch's forward derivatives read saved statistics that carry no tangent of their own.
    outputs, tangents = double_backward(call, named, along)
    with replaying(), torch.enable_grad():
        _, u = output_gradient(provider.criterion, outputs, targets)
    product = _hessian(lambda p: (u * call(p)).sum(), named)(along)
    bent = torch.stack([(along[name] * product[name]).sum().to(u) for name in along]).sum()
    with replaying():
        kept = provider.quadratic_form(outputs, targets, tangents)
        own = AutogradHessian(provider.criterion).quadratic_form(outputs, targets, tangents)
    total = own + bent
    return HessianSplit(kept, total - kept, total)


def hessian_vector_product(
    model: nn.Module,
    params: Parameters | Iterable[Tensor],
    inputs: Any,
    targets: Any,
    criterion: Callable[..., Tensor] | LossHessian,
    direction: Parameters | Iterable[Tensor],
    *,
    output_fn: Callable[[Any], Tensor] | None = None,
) -> dict[str, Tensor]:
    r"""The loss's whole Hessian times a direction, $\nabla^2 h(\theta)\, d$, by double backward.

    `adler.curvature.ggn_product` is its GGN part.

    Args:
        model: See `hessian_split`.
        params: See `hessian_split`.
        inputs: See `hessian_split`.
        targets: See `hessian_split`.
        criterion: See `hessian_split`.
        direction: See `hessian_split`.
        output_fn: See `hessian_split`.

    Returns:
        Names and shapes of ``params``.

    Raises:
        ValueError: As `hessian_split`.
        RuntimeError: If the loss does not depend on the parameters.

    Examples:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x, y, d = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1), [torch.tensor([[10.0, 1.0]])]
        >>> hessian_vector_product(model, model.parameters(), x, y, torch.nn.MSELoss(), d)
        {'weight': tensor([[24., 48.]])}
    """
    loss = loss_hessian(criterion).criterion
    named = named_parameters(model, params)
    along = named_direction(named, direction)
    call = Call.of(model, inputs, output_fn)
    several = targets if isinstance(targets, tuple) else (targets,)

    def value(p: Parameters) -> Tensor:
        outputs = call(p)
        with replaying():
            return loss(outputs, *several)

    return _hessian(value, named)(along)


def output_hessian_norm(
    model: nn.Module,
    params: Parameters | Iterable[Tensor],
    inputs: Any,
    output: int = 0,
    *,
    output_fn: Callable[[Any], Tensor] | None = None,
    tolerance: float = 1e-6,
    seed: int = 0,
) -> float:
    r"""Spectral norm $\|\nabla^2 F_i(\theta)\|$ of the Hessian of one output of one example.

    By Lanczos on Hessian-vector products; the graph of the gradient is built once.

    Args:
        model: See `hessian_split`.
        params: See `hessian_split`.
        inputs: See `hessian_split`; one example is enough.
        output: Which entry of the outputs, flattened row by row: ``i C + c`` is output ``c`` of
            example ``i``.
        output_fn: See `hessian_split`.
        tolerance: Relative accuracy.
        seed: Of the vector that Lanczos starts from.

    Raises:
        ValueError: If there is no such output.
        ImportError: Without SciPy, beyond 20 parameters.
        RuntimeError: If the outputs do not depend on the parameters, or Lanczos did not converge.

    Examples:
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(1, 1, bias=False) for _ in range(2)))
        >>> output_hessian_norm(model, model.parameters(), torch.tensor([[3.0]]))  # of 3 w₁ w₂
        3.0
    """
    named = named_parameters(model, params)
    call = Call.of(model, inputs, output_fn)

    def entry(p: Parameters) -> Tensor:
        outputs = call(p).flatten()
        if not 0 <= output < outputs.numel():
            raise ValueError(f"output={output!r}: expected 0 to {outputs.numel() - 1}")
        return outputs[output]

    product = _hessian(entry, named)
    sizes = [p.numel() for p in named.values()]
    first = next(iter(named.values()))

    def flat_product(v: Tensor) -> Tensor:
        parts = v.split_with_sizes(sizes)
        d = {
            name: part.view_as(p).to(p)
            for (name, p), part in zip(named.items(), parts, strict=True)
        }
        return torch.cat([t.flatten().to(v) for t in product(d).values()])

    generator = torch.Generator().manual_seed(seed)
    probe = torch.randn(sum(sizes), generator=generator).to(first)
    if not flat_product(probe).any():  # linear in its parameters: ARPACK refuses the zero matrix
        return 0.0
    extreme = lanczos(
        flat_product,
        sum(sizes),
        dtype=first.dtype,
        device=first.device,
        which="LM",
        tolerance=tolerance,
        seed=seed,
    )
    return math.fabs(float(extreme))


# --- helpers -------------------------------------------------------------------------------------


def _hessian(f: Function, params: Parameters) -> Callable[[Parameters], dict[str, Tensor]]:
    """Products with the Hessian of a scalar function, from one graph of its gradient."""

    def gradient(p: Parameters) -> Tensor:
        value = f(p)
        if not value.requires_grad:
            raise RuntimeError("nothing to differentiate: the value does not depend on params")
        parts = torch.autograd.grad(
            value, list(p.values()), create_graph=True, materialize_grads=True
        )
        # The zero keeps a graph where f is linear.
        return torch.cat([part.flatten().to(value.device) for part in parts]) + 0 * value

    at, pull = transpose(gradient, params)

    def product(direction: Parameters) -> dict[str, Tensor]:
        # Symmetric, so the transposed product is the product.
        return dict(pull(torch.cat([d.flatten().to(at) for d in direction.values()])))

    return product
