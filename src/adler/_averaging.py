r"""Means of a sequence of numbers, with exponential discount: a total and its weight.

$$
s \leftarrow \beta s + m\, T(\eta_k), \qquad n \leftarrow \beta n + m, \qquad
\hat\eta_k = T^{-1}(s / n).
$$

``T = log`` gives the geometric mean of learning rates (ADLER, Algorithm 1), ``T = identity`` the
arithmetic mean (the Gauss-Newton baseline). The weight makes the mean unbiased from the first value
on. ``β = 1`` forgets nothing. A value counts $m$ times: as the steps that it stands for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Average", "DiscountedMean", "arithmetic", "geometric"]


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

    def where(self, condition: Tensor, otherwise: Average) -> Average:
        """This average where a 0-dim condition holds, else the other; the host does not wait."""
        return Average(
            torch.where(condition, self.total, otherwise.total),
            torch.where(condition, self.weight, otherwise.weight),
        )


class DiscountedMean(NamedTuple):
    """A quasi-arithmetic mean with exponential discount.

    Attributes:
        transform: ``T``, applied to each value.
        inverse: Its inverse.
        excess: By what factor the mean of ``1 / x`` exceeds ``1 / mean(x)``, for an ``x`` of small
            relative variance, of which it is a function.

    Examples:
        >>> average = Average.empty()
        >>> for rate in (1.0, 100.0):
        ...     average = geometric.push(average, torch.tensor(rate), beta=1.0)
        >>> round(float(geometric.read(average)), 6)
        10.0
    """

    transform: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    excess: Callable[[Tensor], Tensor]

    def push(self, average: Average, value: Tensor, beta: float, times: float = 1.0) -> Average:
        """The average after one more value, which counts so many times."""
        total, weight = average
        transformed = times * self.transform(value.to(total))
        return Average(beta * total + transformed, beta * weight + times)

    def read(self, average: Average) -> Tensor:
        """The mean; NaN while there are no values."""
        return self.inverse(average.total / average.weight)


geometric = DiscountedMean(torch.log, torch.exp, lambda variance: (variance / 2).exp())
arithmetic = DiscountedMean(torch.clone, torch.clone, lambda variance: 1 + variance)
