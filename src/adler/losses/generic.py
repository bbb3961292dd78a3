"""Any loss that is twice differentiable, by automatic differentiation in output space."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from adler.losses.base import LossHessian, widen

__all__ = ["AutogradHessian", "gradients_of", "joint_form", "output_gradient"]


class AutogradHessian(LossHessian):
    """Of any criterion that is twice differentiable in its first argument.

    One Hessian-vector product of the loss alone: the network is not involved. Where the loss is not
    convex the result can be zero or negative; what the optimizers take instead is in
    `adler.curvature.loss_forms`.

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
    (F,), (gradient,) = gradients_of(criterion, (outputs, *several), (0,), create_graph)
    return F, gradient


def gradients_of(
    criterion: Callable[..., Tensor],
    arguments: tuple[Any, ...],
    differentiable: Sequence[int] = (0,),
    create_graph: bool = False,
    options: Mapping[str, Any] | None = None,
    strict: bool = True,
) -> tuple[list[Tensor], list[Tensor]]:
    """Some of a criterion's arguments as leaves of at least float32, and the gradients there.

    Args:
        criterion: The loss, reduced to a scalar.
        arguments: All of them.
        differentiable: Which values in them, in the order of their leaves.
        create_graph: Whether the gradients shall be differentiable.
        options: Keyword arguments.
        strict: Whether a loss that does not depend on them is an error.
    """
    values, shape = pytree.tree_flatten(arguments)
    dtype = values[differentiable[0]].dtype
    values = [widen(v.detach()) if isinstance(v, Tensor) else v for v in values]
    leaves = [values[i].requires_grad_() for i in differentiable]
    on_device = [leaves[0].device] if leaves[0].device.type == "cuda" else []
    with torch.enable_grad(), torch.random.fork_rng(on_device):  # a criterion may draw
        for i in differentiable:
            values[i] = values[i].clone()  # a criterion may work in place
        passed = pytree.tree_unflatten(values, shape)
        if isinstance(criterion, nn.Module) and leaves[0].dtype != dtype:
            own = dict(itertools.chain(criterion.named_parameters(), criterion.named_buffers()))
            value = functional_call(criterion, widen(own), passed, dict(options or {}))
        else:
            value = criterion(*passed, **(options or {}))
        if value.ndim != 0:
            raise ValueError(
                f"criterion: it returned shape {tuple(value.shape)}, not a scalar: use "
                "reduction='mean' or 'sum'"
            )
        if not value.requires_grad and not strict:
            return leaves, [torch.zeros_like(leaf) for leaf in leaves]
        if not value.requires_grad:
            raise ValueError("criterion: the loss does not depend on the outputs")
        found = torch.autograd.grad(
            value, leaves, create_graph=create_graph, materialize_grads=True
        )
    return leaves, list(found)


def joint_form(
    criterion: Callable[..., Tensor],
    arguments: tuple[Any, ...],
    differentiable: Sequence[int],
    tangents: Sequence[Tensor],
    options: Mapping[str, Any] | None = None,
) -> Tensor:
    """``vᵀ ∇²L v`` of a loss of several tensors, all of which move.

    Args:
        criterion: The loss.
        arguments: See `gradients_of`.
        differentiable: See `gradients_of`.
        tangents: One for each of them.
        options: See `gradients_of`.
    """
    leaves, found = gradients_of(criterion, arguments, differentiable, True, options)
    with torch.enable_grad():
        slope = sum(((g * v.to(g)).sum() for g, v in zip(found, tangents, strict=True)), start=0.0)
        if not isinstance(slope, Tensor) or not slope.requires_grad:  # linear
            return torch.zeros((), dtype=leaves[0].dtype, device=leaves[0].device)
        second = torch.autograd.grad(slope, leaves, materialize_grads=True)
    total = torch.zeros_like(slope)
    for q, v in zip(second, tangents, strict=True):
        total = total + (q * v.to(q)).sum()
    return total.detach()
