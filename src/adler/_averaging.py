r"""Means: of a sequence of learning rates, and of the iterates.

`polynomial_decay` averages iterates. Of learning rates, both methods keep two numbers, a discounted
total and its weight:

$$
s \leftarrow \beta s + T(\eta_k), \qquad n \leftarrow \beta n + 1, \qquad
\hat\eta_k = T^{-1}(s / n).
$$

``T = log`` gives the geometric mean (ADLER, Algorithm 1), ``T = identity`` the arithmetic mean (the
Gauss-Newton baseline). The weight makes the mean unbiased from the first value on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Average", "DiscountedMean", "arithmetic", "geometric", "polynomial_decay"]


class Average(NamedTuple):
    """Discounted total ``s`` and weight ``n``, 0-dim tensors. Replaced, never mutated."""

    total: Tensor
    weight: Tensor

    @classmethod
    def empty(cls, device: torch.device | str = "cpu") -> Average:
        """Of no values yet; float64 where the device has it."""
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        # Two tensors: checkpoints are loaded in place.
        return cls(*(torch.zeros((), dtype=dtype, device=device) for _ in range(2)))


class DiscountedMean(NamedTuple):
    """A quasi-arithmetic mean with exponential discount.

    Attributes:
        transform: ``T``, applied to each value.
        inverse: Its inverse.

    Examples:
        >>> average = Average.empty()
        >>> for rate in (1.0, 100.0):
        ...     average = geometric.push(average, torch.tensor(rate), beta=1.0)
        >>> round(float(geometric.read(average)), 6)
        10.0
    """

    transform: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]

    def push(self, average: Average, value: Tensor, beta: float) -> Average:
        """The average after one more value."""
        total, weight = average
        return Average(beta * total + self.transform(value.to(total)), beta * weight + 1)

    def read(self, average: Average) -> Tensor:
        """The mean; NaN while there are no values."""
        return self.inverse(average.total / average.weight)


geometric = DiscountedMean(torch.log, torch.exp)
arithmetic = DiscountedMean(torch.clone, torch.clone)


def polynomial_decay(
    gamma: float = 8.0,
) -> Callable[[list[Tensor] | tuple[Tensor, ...], list[Tensor] | tuple[Tensor, ...], Tensor], None]:
    r"""Averages iterates with weights that grow as a power of their number.

    $$
    w_1 = \theta_1, \qquad w_t = w_{t-1} + \frac{\gamma + 1}{\gamma + t} (\theta_t - w_{t-1})
    $$

    The weight of iterate $j$ is that of $j^\gamma$ to leading order, so the average spans a fixed
    fraction of the run, about $1/(\gamma + 1)$ of it, whatever its length. ``gamma=0`` is the plain
    mean.

    Args:
        gamma: ``γ``, finite and at least 0.

    Returns:
        For `torch.optim.swa_utils.AveragedModel`, as its ``multi_avg_fn``. Integer buffers, such as
        BatchNorm's number of batches, are taken from the last iterate.

    Raises:
        ValueError: If ``gamma`` is out of its range.

    Source: O. Shamir, T. Zhang, *Stochastic Gradient Descent for Non-smooth Optimization:
    Convergence Results and Optimal Averaging Schemes*, ICML 2013. ``γ = 8`` is the choice of
    M. Ivgi, O. Hinder, Y. Carmon, *DoG is SGD's Best Friend*, arXiv 2302.12022.

    Examples:
        >>> from torch.optim.swa_utils import AveragedModel
        >>> model = torch.nn.Linear(4, 3)
        >>> averaged = AveragedModel(model, multi_avg_fn=polynomial_decay(), use_buffers=True)
        >>> averaged.update_parameters(model)  # after every step
    """
    if isinstance(gamma, bool) or not isinstance(gamma, (int, float)) or not 0 <= gamma < math.inf:
        raise ValueError(f"gamma={gamma!r}: expected a finite number of at least 0")

    @torch.no_grad()
    def update(
        averages: list[Tensor] | tuple[Tensor, ...],
        iterates: list[Tensor] | tuple[Tensor, ...],
        averaged: Tensor,
    ) -> None:
        if averages[0].is_floating_point() or averages[0].is_complex():
            weight = (gamma + 1) / (gamma + 1 + int(averaged))
            torch._foreach_lerp_(averages, iterates, weight)
        else:
            torch._foreach_copy_(averages, iterates)

    return update
