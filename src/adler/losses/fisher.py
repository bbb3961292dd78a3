"""The baseline's stand-in for the loss Hessian."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adler.losses.base import LossHessian, class_axis
from adler.losses.generic import output_gradient
from adler.losses.registry import loss_hessian

__all__ = ["EmpiricalFisher", "outer_products"]


class EmpiricalFisher(LossHessian):
    r"""Outer products of the per-example output gradients, in place of the loss Hessian.

    $$
    c = \sum_i \omega_i (\nabla \ell_i^\top v_i)^2
    $$

    with the weights of the criterion's provider, $1/b$ for a plain mean. This is the
    Gauss-Newton baseline of the thesis (ch. 7); in the field's terms BHHH.

    Examples:
        >>> hessian = EmpiricalFisher(torch.nn.MSELoss())
        >>> F, y, v = torch.ones(1, 1), torch.zeros(1, 1), torch.full((1, 1), 3.0)
        >>> float(hessian.quadratic_form(F, y, v))
        36.0
    """

    curved = True

    def __init__(self, criterion: Callable[..., Tensor]) -> None:
        super().__init__(criterion)
        self._provider = loss_hessian(criterion)

    def quadratic_form(self, outputs: Tensor, targets: Any, tangents: Tensor) -> Tensor:
        """See the class."""
        with torch.enable_grad():
            F, gradient = output_gradient(self.criterion, outputs, targets)
        weights = self._provider.example_weights(outputs, targets).to(F)
        return outer_products(gradient, tangents, weights)

    def loss_per_nat(self, outputs: Tensor, targets: Any, value: Tensor) -> Tensor:
        """That of the criterion."""
        return self._provider.loss_per_nat(outputs, targets, value)


def outer_products(gradient: Tensor, tangents: Tensor, weights: Tensor) -> Tensor:
    r"""$\sum_i (\nabla L_i^\top v_i)^2 / \omega_i$, with $\nabla L_i = \omega_i \nabla \ell_i$.

    Args:
        gradient: Of the reduced loss with respect to the outputs.
        tangents: Of the outputs.
        weights: ``ω``, one for each example.
    """
    products = gradient * tangents.to(gradient)
    if weights.ndim == products.ndim - 1:
        slopes = products.sum(class_axis(products))
    else:
        slopes = products.reshape(weights.numel(), -1).sum(1)
    # The gradient of the reduced loss already holds ω_i once.
    return torch.where(weights == 0, 0, slopes.square() / weights).sum()
