"""Any loss that is twice differentiable, by automatic differentiation in output space."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from adler.losses.base import LossHessian, widen

__all__ = ["AutogradHessian", "output_gradient"]


class AutogradHessian(LossHessian):
    """Of any criterion that is twice differentiable in its first argument.

    One Hessian-vector product of the loss alone: the network is not involved. Where the loss is not
    convex the result can be negative; the optimizer's rule for that is in `adler._step_length`.

    Examples:
        >>> hessian = AutogradHessian(lambda outputs, targets: (outputs - targets).pow(4).sum())
        >>> F, y, v = torch.ones(2), torch.zeros(2), torch.tensor([1.0, 2.0])
        >>> float(hessian.quadratic_form(F, y, v))
        60.0
    """

    def quadratic_form(self, outputs: Tensor, targets: Any, tangents: Tensor) -> Tensor:
        """See the class."""
        product = self.product(outputs, targets, tangents)
        return (tangents.to(product) * product).sum()

    def product(self, outputs: Tensor, targets: Any, tangents: Tensor) -> Tensor:
        """``∇²L(F) v`` by differentiating twice."""
        with torch.enable_grad():
            F, gradient = output_gradient(self.criterion, outputs, targets, create_graph=True)
            if not gradient.requires_grad:  # linear
                return torch.zeros_like(F, requires_grad=False)
            (product,) = torch.autograd.grad(gradient, F, tangents.to(F), materialize_grads=True)
        return product


def output_gradient(
    criterion: Callable[..., Tensor], outputs: Tensor, targets: Any, create_graph: bool = False
) -> tuple[Tensor, Tensor]:
    """Outputs as a leaf of at least float32, and the loss's gradient there."""
    several = targets if isinstance(targets, tuple) else (targets,)
    F, several = widen((outputs.detach(), several))
    F.requires_grad_()
    passed = F.clone()  # a criterion may work in place
    on_device = [F.device] if F.device.type == "cuda" else []
    with torch.random.fork_rng(on_device):  # a criterion may draw
        if isinstance(criterion, nn.Module) and F.dtype != outputs.dtype:
            own = dict(itertools.chain(criterion.named_parameters(), criterion.named_buffers()))
            value = functional_call(criterion, widen(own), (passed, *several))
        else:
            value = criterion(passed, *several)
        if value.ndim != 0:
            raise ValueError(
                f"criterion: it returned shape {tuple(value.shape)}, not a scalar: use "
                "reduction='mean' or 'sum'"
            )
        if not value.requires_grad:
            raise ValueError("criterion: the loss does not depend on the outputs")
        (gradient,) = torch.autograd.grad(value, F, create_graph=create_graph)
    return F, gradient
