r"""The loss of a batch as a function of a network's parameters, $h(\theta) = L(F(\theta))$.

Model, inputs, targets, criterion and parameters are said once, in this order; what can be asked of
the function are its value, its gradient, and products with the matrices of its curvature:

| | matrix | method |
|---|---|---|
| GGN | $J^\top \nabla^2 L\, J$ | `Objective.ggn` |
| Hessian | $\nabla^2 h$ | `Objective.hessian` |
| tangent kernel | $J J^\top$ | `Objective.tangent_kernel` |

with the Jacobian $J = \partial F / \partial \theta$. The functions of `adler.curvature` and the
diagnostics are built on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from adler._recording.replay import Call, replaying
from adler.curvature.jacobian import Function, Parameters, directional_derivative, transpose
from adler.curvature.kernel import TangentKernel
from adler.curvature.parameters import named_direction, named_parameters
from adler.losses import LossHessian, loss_hessian

__all__ = ["Objective", "hessian_products"]

Direction = Parameters | Iterable[Tensor]
Products = Callable[[Parameters], dict[str, Tensor]]


class Objective:
    r"""The loss of one batch as a function of a network's parameters.

    Every question is answered at the values that the parameters have when it is asked; nothing is
    kept between two questions. Model, gradients, buffers and random number generators are as before
    afterwards, and dropout draws the mask that it would draw next.

    Args:
        model: The network, in the mode (train or eval) it is in.
        inputs: One argument, a tuple of positional arguments, or a mapping of keyword arguments.
        targets: What the criterion receives after the outputs; a tuple where it receives several.
        criterion: The loss, reduced to a scalar, or a `LossHessian`.
        params: By name, as ``dict(model.named_parameters())``, or a sequence of parameters of the
            model. Those left out are constants. Default: all that require a gradient.
        output_fn: Picks the tensor that the criterion receives from what the model returns.

    Attributes:
        params: By name.
        loss_hessian: The quadratic form of the criterion's Hessian; it holds the criterion.
        call: The model's call as a function of ``params``.

    Raises:
        ValueError: If a parameter is not the model's, or the criterion does not reduce.

    Examples:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> x, y = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1)
        >>> h = Objective(model, x, y, torch.nn.MSELoss())
        >>> h.loss().item(), h.gradient()
        (9.0, {'weight': tensor([[ 6., 12.]])})
        >>> h.ggn([torch.tensor([[10.0, 1.0]])])
        {'weight': tensor([[24., 48.]])}
        >>> h.tangent_kernel().to_dense()
        tensor([[5.]])
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        targets: Any,
        criterion: Callable[..., Tensor] | LossHessian,
        params: Parameters | Iterable[Tensor] | None = None,
        *,
        output_fn: Callable[[Any], Tensor] | None = None,
    ) -> None:
        self.model, self.inputs, self.targets, self.output_fn = model, inputs, targets, output_fn
        self.loss_hessian = loss_hessian(criterion)
        self.params = named_parameters(model, params)
        self.call = Call.of(model, inputs, output_fn)

    # --- values ----------------------------------------------------------------------------------

    def outputs(self, params: Parameters | None = None) -> Tensor:
        """``F(θ)``; differentiable where autograd is on.

        Args:
            params: Other values of the parameters, by name. Default: the present ones.
        """
        return self.call(self.params if params is None else params)

    def loss(self, params: Parameters | None = None) -> Tensor:
        """``h(θ)``, 0-dim; differentiable where autograd is on.

        Args:
            params: See `outputs`.
        """
        return self.loss_of(self.outputs(params))

    def loss_of(self, outputs: Tensor) -> Tensor:
        """``L(F)``, 0-dim.

        Args:
            outputs: ``F``.

        Raises:
            ValueError: If the criterion does not return a scalar.
        """
        several = self.targets if isinstance(self.targets, tuple) else (self.targets,)
        with replaying():
            loss = self.loss_hessian.criterion(outputs, *several)
        if loss.ndim != 0:
            raise ValueError(
                f"criterion: it returned shape {tuple(loss.shape)}, not a scalar: use "
                "reduction='mean' or 'sum'"
            )
        return loss

    def gradient(self) -> dict[str, Tensor]:
        """``∇h(θ)``, with the names and shapes of ``params``; zero where the loss sees none."""
        return self.loss_and_gradient()[1]

    def loss_and_gradient(self) -> tuple[Tensor, dict[str, Tensor]]:
        """``h(θ)``, detached, and ``∇h(θ)``, from one forward and one backward pass.

        Raises:
            RuntimeError: If the loss does not depend on the parameters.
        """
        loss, pull = transpose(self.loss, self.params)
        return loss, dict(pull(torch.ones_like(loss)))

    # --- curvature -------------------------------------------------------------------------------

    def jvp(self, direction: Direction, jvp: str = "forward") -> tuple[Tensor, Tensor]:
        """``F`` and ``v = J d``, detached; see `adler.curvature.jvp`.

        Args:
            direction: By name, or a sequence as long as ``params``.
            jvp: ``"forward"``, ``"finite_difference"`` or ``"double_backward"``.

        Raises:
            ValueError: If names, lengths or shapes do not fit, or the engine is unknown.
        """
        along = named_direction(self.params, direction)
        outputs, tangents, _ = directional_derivative(self.call, self.params, along, jvp)
        return outputs, tangents

    def quadratic_form(self, direction: Direction, jvp: str = "forward") -> Tensor:
        r"""``c = vᵀ ∇²L(F) v``, 0-dim; see `adler.curvature.quadratic_form`.

        Args:
            direction: See `jvp`.
            jvp: See `jvp`.

        Raises:
            ValueError: As `jvp`; or if the targets do not fit the outputs.
        """
        outputs, tangents = self.jvp(direction, jvp)
        with replaying():
            return self.loss_hessian.quadratic_form(outputs, self.targets, tangents)

    def ggn(self, direction: Direction, jvp: str = "forward") -> dict[str, Tensor]:
        r"""``Jᵀ ∇²L(F) J d``, with the names and shapes of ``params``.

        Args:
            direction: See `jvp`.
            jvp: See `jvp`.

        Raises:
            ValueError: As `quadratic_form`.
        """
        return self.ggn_products(jvp)(named_direction(self.params, direction))

    def hessian(self, direction: Direction) -> dict[str, Tensor]:
        r"""``∇²h(θ) d``, with the names and shapes of ``params``, by double backward.

        Args:
            direction: See `jvp`.

        Raises:
            ValueError: If names, lengths or shapes do not fit.
            RuntimeError: If the loss does not depend on the parameters.

        Examples:
            >>> model = torch.nn.Linear(2, 1, bias=False)
            >>> h = Objective(model, torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1), nn.MSELoss())
            >>> h.hessian([torch.tensor([[10.0, 1.0]])])
            {'weight': tensor([[24., 48.]])}
        """
        return self.hessian_products()(named_direction(self.params, direction))

    def tangent_kernel(self, max_bytes: int = 2**30) -> TangentKernel:
        r"""``K = J Jᵀ``, an operator on the outputs.

        Args:
            max_bytes: The largest temporary, and the largest dense kernel, that may be made.

        Raises:
            ValueError: If there is no parameter or no output, or one is not finite.
        """
        return TangentKernel(
            self.model, self.inputs, self.params, output_fn=self.output_fn, max_bytes=max_bytes
        )

    # --- the same matrix times several directions ------------------------------------------------

    def ggn_products(self, jvp: str = "forward") -> Products:
        """Products with the GGN at the present parameters, which share one backward graph.

        Args:
            jvp: See `jvp`.

        Returns:
            Maps a direction by name to the product; it must not outlive the parameters' values.
        """
        outputs, pull = transpose(self.call, self.params)

        def product(direction: Parameters) -> dict[str, Tensor]:
            _, tangents = self.jvp(direction, jvp)
            with replaying():
                curved = self.loss_hessian.product(outputs, self.targets, tangents)
            return dict(pull(curved.to(outputs)))

        return product

    def hessian_products(self) -> Products:
        """Products with the Hessian at the present parameters, which share one backward graph.

        Returns:
            As `ggn_products`.

        Raises:
            RuntimeError: If the loss does not depend on the parameters.
        """
        return hessian_products(self.loss, self.params)


def hessian_products(f: Function, params: Parameters) -> Products:
    """Products with the Hessian of a scalar function, from one graph of its gradient.

    By double backward. Not by forward over reverse mode, which is silently wrong through batch and
    layer normalisation: PyTorch's forward derivatives read saved statistics that carry no tangent
    of their own.

    Args:
        f: Maps parameters by name to a 0-dim tensor.
        params: Where to differentiate.

    Returns:
        Maps a direction by name to the product.

    Raises:
        RuntimeError: If the value does not depend on the parameters.
    """

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
