"""The interface of a loss Hessian, and what all of them share."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["LossHessian", "class_axis", "refuse_unreduced", "wide", "widen"]


class LossHessian(abc.ABC):
    """The quadratic form of a criterion's Hessian with respect to the network outputs.

    Subclass it for a loss of your own, and `register` the subclass.

    Args:
        criterion: The loss, reduced to a scalar.

    Raises:
        ValueError: If the criterion does not reduce.

    Examples:
        >>> from adler.losses import loss_hessian, register
        >>> class Cosh(torch.nn.Module):
        ...     def forward(self, outputs, targets):
        ...         return (outputs - targets).cosh().sum()
        >>> class CoshHessian(LossHessian):
        ...     def quadratic_form(self, outputs, targets, tangents):
        ...         return ((outputs - targets).cosh() * tangents.square()).sum()
        >>> register(Cosh, CoshHessian)
        >>> type(loss_hessian(Cosh())).__name__
        'CoshHessian'
    """

    # Whether the form is positive wherever the tangents are not zero, in exact arithmetic.
    curved: ClassVar[bool] = False

    def __init__(self, criterion: Callable[..., Tensor]) -> None:
        refuse_unreduced(criterion)
        self.criterion = criterion

    @abc.abstractmethod
    def quadratic_form(self, outputs: Tensor, targets: Any, tangents: Tensor) -> Tensor:
        """``c = vᵀ ∇²L(F) v``.

        Args:
            outputs: ``F``, what the criterion receives first, ``(b, C)`` or ``(b, C, *D)``.
            targets: What it receives after them; a tuple where it receives several.
            tangents: ``v``, of the shape of ``F``.

        Returns:
            0-dim, float32 or wider.
        """

    def product(self, outputs: Tensor, targets: Any, tangents: Tensor) -> Tensor:
        r"""``∇²L(F) v``, as half the gradient of the quadratic form in ``v``.

        Args:
            outputs: As for `quadratic_form`.
            targets: As for `quadratic_form`.
            tangents: As for `quadratic_form`.

        Returns:
            Shape of the tangents, float32 or wider.

        Examples:
            >>> from adler.losses import MSEHessian
            >>> F, y, v = torch.zeros(2), torch.ones(2), torch.tensor([1.0, 3.0])
            >>> MSEHessian(torch.nn.MSELoss()).product(F, y, v)
            tensor([1., 3.])
        """
        with torch.enable_grad():
            v = tangents.detach().to(wide(tangents.dtype)).requires_grad_()
            form = self.quadratic_form(outputs.detach(), targets, v)
            if not form.requires_grad:  # it does not depend on the tangents: linear
                return torch.zeros_like(v)
            (gradient,) = torch.autograd.grad(form, v)
        return gradient / 2

    def spectral_norm(self, outputs: Tensor, targets: Any) -> Tensor:
        r"""``‖∇²L(F)‖``, the largest modulus of an eigenvalue, or a bound from above.

        Here by twenty power iterations from a vector of equal entries' moduli, which approach it
        from below; the closed forms are exact or bounds.

        Args:
            outputs: As for `quadratic_form`.
            targets: As for `quadratic_form`.

        Returns:
            0-dim, float32 or wider.
        """
        v = torch.ones_like(outputs, dtype=wide(outputs.dtype))
        v.view(-1)[::2] = -1.0  # not constant: a shift of all logits has no curvature
        norm = torch.zeros((), dtype=v.dtype, device=v.device)
        for _ in range(20):
            v = v / torch.linalg.vector_norm(v).clamp(min=torch.finfo(v.dtype).tiny)
            v = self.product(outputs, targets, v)
            norm = torch.linalg.vector_norm(v)
        return norm

    def mean_eigenvalue(self, outputs: Tensor, targets: Any) -> Tensor:
        r"""``tr ∇²L(F) / (b C)``: the mean of all eigenvalues, one for each entry of the outputs.

        Here by Hutchinson's estimate $z^\top \nabla^2 L\, z$ of the trace over twenty vectors of
        random signs, always the same: exact where the Hessian is diagonal, otherwise without bias.
        The closed forms are exact.

        Args:
            outputs: As for `quadratic_form`.
            targets: As for `quadratic_form`.

        Returns:
            0-dim, float32 or wider.
        """
        like = torch.empty_like(outputs, dtype=wide(outputs.dtype))
        generator = torch.Generator(like.device).manual_seed(0)
        forms = [
            self.quadratic_form(outputs, targets, like.bernoulli_(generator=generator) * 2 - 1)
            for _ in range(20)
        ]
        return torch.stack(forms).mean() / max(outputs.numel(), 1)

    def loss_per_nat(self, outputs: Tensor, targets: Any, value: Tensor) -> Tensor:
        """What one nat an example is worth, in units of the reduced loss.

        Predictions that move by ``v`` diverge, in the sense of Kullback and Leibler and to second
        order, by ``½ vᵀQv / loss_per_nat``, in nats an example. Infinite where the loss is not
        known as a likelihood.

        Args:
            outputs: As for `quadratic_form`.
            targets: As for `quadratic_form`.
            value: The loss there, 0-dim.

        Returns:
            0-dim.
        """
        return torch.full_like(value, math.inf)

    def example_weights(self, outputs: Tensor, targets: Any) -> Tensor:
        """Factor with which each example's loss enters the reduced one.

        Returns:
            Shape ``(b,)``: an example is an entry of the first dimension. Classification losses
            return ``(b, *D)``: every position is an example.
        """
        b = outputs.shape[0] if outputs.ndim else 1
        factor = 1.0 if getattr(self.criterion, "reduction", "mean") == "sum" else 1.0 / max(b, 1)
        return torch.full((b,), factor, dtype=wide(outputs.dtype), device=outputs.device)


def refuse_unreduced(criterion: object) -> None:
    """Raises a ValueError for a criterion that says that it does not reduce."""
    if getattr(criterion, "reduction", None) == "none":
        raise ValueError(
            "criterion: reduction='none' gives one loss per example, not one to minimise: use "
            "reduction='mean' or 'sum'"
        )


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums are accumulated."""
    return torch.promote_types(dtype, torch.float32)


def widen(tree: Any) -> Any:
    """Half-precision tensors in a tree as float32."""
    return pytree.tree_map_only(
        Tensor, lambda t: t.to(wide(t.dtype)) if t.is_floating_point() else t, tree
    )


def class_axis(outputs: Tensor) -> int:
    """Classes are the second dimension, or the only one."""
    return min(1, outputs.ndim - 1)
