"""Losses that are means or sums over entries: diagonal Hessians."""

from __future__ import annotations

import abc
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from adler.losses.base import LossHessian, wide, widen

__all__ = [
    "BCEWithLogitsHessian",
    "GaussianNLLHessian",
    "HuberHessian",
    "MSEHessian",
    "PoissonNLLHessian",
    "SmoothL1Hessian",
]


class _EntrywiseHessian(LossHessian):
    """Of a loss that is the mean or sum over entries: a diagonal Hessian."""

    _criterion: ClassVar[type[nn.Module]]

    def __init__(self, criterion: nn.Module | None = None) -> None:
        super().__init__(self._criterion() if criterion is None else criterion)

    @abc.abstractmethod
    def second_derivative(self, outputs: Tensor, *targets: Tensor) -> Tensor | float:
        """Of each entry's loss with respect to the output; broadcasts to the outputs."""

    def quadratic_form(self, outputs: Tensor, targets: Any, tangents: Tensor) -> Tensor:
        """See the class; targets broadcast to the outputs."""
        several = targets if isinstance(targets, tuple) else (targets,)
        F, v, y = widen((outputs, tangents, several))
        terms = self.second_derivative(F, *y) * v.square()
        # The loss counts the entries of outputs and targets broadcast together.
        terms = terms if terms.shape == y[0].shape else terms + torch.zeros_like(y[0])
        total: Tensor = terms.sum() if self._summed else terms.mean()
        return total

    def spectral_norm(self, outputs: Tensor, targets: Any) -> Tensor:
        """The largest modulus on the diagonal."""
        ones = torch.ones_like(outputs, dtype=wide(outputs.dtype))
        return self.product(outputs, targets, ones).abs().max()

    def mean_eigenvalue(self, outputs: Tensor, targets: Any) -> Tensor:
        """The mean of the diagonal."""
        ones = torch.ones_like(outputs, dtype=wide(outputs.dtype))
        return self.quadratic_form(outputs, targets, ones) / max(outputs.numel(), 1)

    def loss_per_nat(self, outputs: Tensor, targets: Any, value: Tensor) -> Tensor:
        """Every entry is an example: their number for a sum, else 1."""
        return torch.full_like(value, float(outputs.numel() if self._summed else 1))

    @property
    def _summed(self) -> bool:
        return getattr(self.criterion, "reduction", "mean") == "sum"


class _RegressionHessian(_EntrywiseHessian):
    """Of a loss that is quadratic around the target, on a scale of its own."""

    def loss_per_nat(self, outputs: Tensor, targets: Any, value: Tensor) -> Tensor:
        """``2 L``: of a Gaussian whose variance is the present mean squared residual."""
        return 2 * value


class MSEHessian(_RegressionHessian):
    r"""Of `torch.nn.MSELoss`: $c = \frac{2}{bC} \|v\|^2$, or $2 \|v\|^2$ for the sum.

    Examples:
        >>> F, y, v = torch.zeros(2, 2), torch.ones(2, 2), torch.full((2, 2), 3.0)
        >>> float(MSEHessian(torch.nn.MSELoss()).quadratic_form(F, y, v))
        18.0
    """

    curved = True
    _criterion = nn.MSELoss

    def second_derivative(self, outputs: Tensor, *targets: Tensor) -> Tensor | float:
        """2."""
        return 2.0


class BCEWithLogitsHessian(_EntrywiseHessian):
    r"""Of `torch.nn.BCEWithLogitsLoss`: $w\,(r y + 1 - y)\,\sigma(F)\,\sigma(-F)\,v^2$.

    ``w`` is the criterion's ``weight``, ``r`` its ``pos_weight``. Targets beyond [0, 1] can make it
    negative.

    Examples:
        >>> F, y, v = torch.zeros(4), torch.ones(4), torch.full((4,), 2.0)
        >>> float(BCEWithLogitsHessian(torch.nn.BCEWithLogitsLoss()).quadratic_form(F, y, v))
        1.0
    """

    _criterion = nn.BCEWithLogitsLoss

    def second_derivative(self, outputs: Tensor, *targets: Tensor) -> Tensor | float:
        """See the class."""
        criterion: Any = self.criterion
        (y,) = targets
        s = outputs.sigmoid() * (-outputs).sigmoid()
        if criterion.pos_weight is not None:
            s = s * (criterion.pos_weight.to(outputs) * y + (1 - y))
        return s if criterion.weight is None else s * criterion.weight.to(outputs)


class HuberHessian(_RegressionHessian):
    r"""Of `torch.nn.HuberLoss`: $v^2$ where the residual is below ``delta``.

    Examples:
        >>> F, y, v = torch.tensor([0.5, 9.0]), torch.zeros(2), torch.ones(2)
        >>> float(HuberHessian(torch.nn.HuberLoss()).quadratic_form(F, y, v))
        0.5
    """

    _criterion = nn.HuberLoss

    def second_derivative(self, outputs: Tensor, *targets: Tensor) -> Tensor | float:
        """See the class."""
        delta: float = self.criterion.delta  # type: ignore[attr-defined]
        return ((outputs - targets[0]).abs() < delta).to(outputs)


class SmoothL1Hessian(_RegressionHessian):
    r"""Of `torch.nn.SmoothL1Loss`: $v^2 / \beta$ where the residual is below ``beta``.

    Examples:
        >>> F, y, v = torch.tensor([0.5, 9.0]), torch.zeros(2), torch.ones(2)
        >>> float(SmoothL1Hessian(torch.nn.SmoothL1Loss(beta=2.0)).quadratic_form(F, y, v))
        0.25
    """

    _criterion = nn.SmoothL1Loss

    def second_derivative(self, outputs: Tensor, *targets: Tensor) -> Tensor | float:
        """See the class."""
        beta: float = self.criterion.beta  # type: ignore[attr-defined]
        if beta == 0:
            return 0.0  # the L1 loss
        return ((outputs - targets[0]).abs() < beta).to(outputs) / beta


class PoissonNLLHessian(_EntrywiseHessian):
    r"""Of `torch.nn.PoissonNLLLoss`: $e^F v^2$; on rates, $y (F + \epsilon)^{-2} v^2$.

    Examples:
        >>> F, y, v = torch.zeros(3), torch.ones(3), torch.full((3,), 2.0)
        >>> float(PoissonNLLHessian(torch.nn.PoissonNLLLoss()).quadratic_form(F, y, v))
        4.0
    """

    _criterion = nn.PoissonNLLLoss

    def second_derivative(self, outputs: Tensor, *targets: Tensor) -> Tensor | float:
        """See the class."""
        criterion: Any = self.criterion
        if criterion.log_input:
            return outputs.exp()
        curvature: Tensor = targets[0] / (outputs + criterion.eps).square()
        return curvature


class GaussianNLLHessian(_EntrywiseHessian):
    r"""Of `torch.nn.GaussianNLLLoss` in the mean: $v^2 / \max(\sigma^2, \epsilon)$.

    The targets are ``(target, var)``; the variance is a constant, as what a model predicts reaches
    the criterion through one tensor.

    Examples:
        >>> F, y, v = torch.zeros(3), torch.ones(3), torch.full((3,), 2.0)
        >>> hessian = GaussianNLLHessian(torch.nn.GaussianNLLLoss())
        >>> float(hessian.quadratic_form(F, (y, torch.full((3,), 4.0)), v))
        1.0
    """

    curved = True
    _criterion = nn.GaussianNLLLoss

    def second_derivative(self, outputs: Tensor, *targets: Tensor) -> Tensor | float:
        """See the class."""
        criterion: Any = self.criterion
        var = torch.as_tensor(targets[1], dtype=outputs.dtype, device=outputs.device)
        if var.ndim and var.shape == outputs.shape[:-1]:
            var = var.unsqueeze(-1)  # one variance a row
        return var.clamp(min=criterion.eps).reciprocal()
