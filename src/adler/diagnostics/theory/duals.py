r"""Dual activations: what a layer of infinite width does to the angle between two examples.

Let the inputs of a layer have unit norm and pairwise correlation $\rho$. With Gaussian weights and
infinite width, the correlation after an activation $\varphi$ is given by its *dual*,

$$
\hat\varphi(\rho) = \mathbb{E}\, \varphi(u) \varphi(v), \qquad (u, v) \sim
\mathcal{N}\left(0, \begin{pmatrix} 1 & \rho \\ \rho & 1 \end{pmatrix}\right), \qquad
\hat\varphi(\rho) = \sum_{k \ge 0} a_k^2 \rho^k,
$$

where $a_k = \mathbb{E}\, \varphi(u) h_k(u)$ are the coefficients of $\varphi$ in the normalised
Hermite polynomials, which `adler.diagnostics.theory.activations` computes.

Source: A. Daniely, R. Frostig, Y. Singer, *Toward deeper understanding of neural networks*, 2016.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from adler.diagnostics.theory.activations import Activation, NormalisedActivation, moments

__all__ = ["DualActivation", "dual_activation"]

_Number = TypeVar("_Number", float, Tensor)


@dataclass(frozen=True, eq=False)
class DualActivation:
    r"""The dual $\hat\varphi$ of an activation, a function on [-1, 1].

    Call it with a correlation, a float or a tensor; the result is of the same kind.

    Attributes:
        coefficients: $a_0^2, \dots, a_K^2$, float64. ``K`` is as large as double precision needs,
            or the ``degree`` of `dual_activation`.
        tail: $\sum_{k > K} a_k^2$ over even and over odd ``k``. The series puts it at the lowest
            such ``k``, which is exact at ±1, where it matters most, and an upper bound on [0, 1].
        closed_form: What is evaluated in place of the series, if known.
    """

    coefficients: Tensor
    tail: tuple[float, float]
    closed_form: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)

    def __call__(self, rho: _Number) -> _Number:
        """Evaluates the dual.

        Args:
            rho: Correlations in [-1, 1]; rounding beyond is forgiven.

        Raises:
            ValueError: If a correlation is outside of [-1, 1], or NaN.
            TypeError: If a tensor is not of floating point.
        """
        if not isinstance(rho, Tensor):
            return float(self(torch.tensor(float(rho), dtype=torch.float64)))
        if not rho.is_floating_point():
            raise TypeError(f"rho: dtype {rho.dtype} is not floating point: convert it")
        if not bool((rho.abs() <= 1 + 64 * torch.finfo(rho.dtype).eps).all()):
            worst = float(rho.flatten()[rho.abs().argmax()])
            raise ValueError(f"rho={worst}: expected correlations, in [-1, 1]")
        rho = rho.clamp(-1, 1)
        return self._series(rho) if self.closed_form is None else self.closed_form(rho)

    def shares(self) -> tuple[Tensor, float]:
        r"""$c_k = a_k^2 / \hat\varphi(1)$ for $k \le K$, and their sum beyond.

        Raises:
            ValueError: If the activation is zero.
        """
        total = float(self.coefficients.sum()) + sum(self.tail)
        if total == 0:
            raise ValueError("activation: is zero almost everywhere, so it keeps no correlation")
        return self.coefficients / total, sum(self.tail) / total

    def _series(self, rho: Tensor) -> Tensor:
        even, odd = self.tail
        # The first degree beyond the last coefficient is even if their number is.
        beyond = [even, odd] if len(self.coefficients) % 2 == 0 else [odd, even]
        series = [*self.coefficients.tolist(), *beyond]
        value = torch.full_like(rho, series.pop())
        for coefficient in reversed(series):
            value = value * rho + coefficient
        return value


def dual_activation(activation: Activation | DualActivation, degree: int = 512) -> DualActivation:
    r"""The dual $\hat\varphi(\rho) = \mathbb{E}\, \varphi(u) \varphi(v)$ of an activation.

    Closed forms for the identity, ReLU, leaky ReLU, absolute value, erf, sine, cosine and sign, and
    for their `normalised_activation`. Every other dual is its Hermite series, whose coefficients
    are one-dimensional integrals: at a Gram matrix of ``n`` examples it costs ``K n²``, where
    quadrature of each pair with ``m`` nodes a side would cost ``m² n²``.

    Accuracy of the series: rounding, if the activation is smooth (``K`` is about 150 for tanh, 40
    for the sigmoid). A kink leaves a tail $\tau$ beyond ``degree``, of order ``degree^(-3/2)``, a
    jump one of order ``degree^(-1/2)``; the error is at most $\tau |\rho|^{\text{degree} + 1}$.

    Args:
        activation: A module or function that acts on each entry of a tensor. Evaluated in float64
            on the CPU. Kinks are best at multiples of one half, where the integrals are exact.
        degree: Largest ``K`` of the series.

    Raises:
        TypeError: If ``activation`` is not callable, or is a class rather than a module.
        ValueError: If it does not act entrywise and deterministically, is not finite, or grows too
            fast for its Gaussian moments to exist; or if ``degree`` is negative.

    Source:
        Y. Cho, L. Saul, 2009 (ReLU). C. Williams, 1997 (erf).

    Examples:
        >>> dual = dual_activation(torch.nn.ReLU())
        >>> round(dual(1.0), 6), round(dual(0.0) * 2 * math.pi, 6)
        (0.5, 1.0)
        >>> dual_activation(torch.tanh)(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([-0.3943,  0.0000,  0.3943])
    """
    if isinstance(activation, DualActivation):
        return activation
    coefficients, second_moment, reflected = moments(activation, degree)
    squares = np.square(coefficients)
    squares[squares <= (4 * np.finfo(float).eps) ** 2 * second_moment] = 0  # an odd φ stays odd
    # E φ(u)² and E φ(u) φ(-u) are the sum of the squares and their alternating sum.
    even = (second_moment + reflected) / 2 - float(squares[0::2].sum())
    odd = (second_moment - reflected) / 2 - float(squares[1::2].sum())
    negligible = float(np.finfo(float).eps) * second_moment
    # As differences of sums, the tails carry their rounding.
    even, odd = (t if t > 4 * len(squares) * negligible else 0.0 for t in (even, odd))
    if even == odd == 0:
        beyond = np.cumsum(squares[::-1])[::-1]  # sums from k on
        squares = squares[: max(1, int((beyond > negligible).sum()))]
    return DualActivation(torch.from_numpy(squares.copy()), (even, odd), _closed_form(activation))


# --- closed forms ---------------------------------------------------------------------------------


def _closed_form(activation: Activation) -> Callable[[Tensor], Tensor] | None:
    if isinstance(activation, NormalisedActivation):
        inner, mean, scale = _closed_form(activation.activation), activation.mean, activation.scale
        return None if inner is None else lambda rho: (inner(rho) - mean**2) / scale**2
    if isinstance(activation, nn.LeakyReLU):
        return _leaky(float(activation.negative_slope))
    for known, form in _CLOSED_FORMS:
        # By type for modules: a subclass may do something else.
        if activation is known or type(activation) is known:
            return form
    return None


def _leaky(slope: float) -> Callable[[Tensor], Tensor]:
    """``φ(x) = slope · x + (1 - slope) max(x, 0)``, and ``E u max(v, 0) = ρ / 2``."""

    def form(rho: Tensor) -> Tensor:
        angle = rho.acos()
        relu = (((1 - rho) * (1 + rho)).sqrt() + rho * (math.pi - angle)) / (2 * math.pi)
        return slope * rho + (1 - slope) ** 2 * relu

    return form


_CLOSED_FORMS: tuple[tuple[object, Callable[[Tensor], Tensor]], ...] = (
    (nn.Identity, torch.clone),
    (nn.ReLU, _leaky(0.0)),
    (torch.relu, _leaky(0.0)),
    (nn.functional.relu, _leaky(0.0)),
    (nn.functional.leaky_relu, _leaky(0.01)),
    (torch.abs, _leaky(-1.0)),
    (torch.erf, lambda rho: 2 / math.pi * (2 * rho / 3).asin()),
    (torch.special.erf, lambda rho: 2 / math.pi * (2 * rho / 3).asin()),
    (torch.sin, lambda rho: rho.sinh() / math.e),
    (torch.cos, lambda rho: rho.cosh() / math.e),
    (torch.sign, lambda rho: 2 / math.pi * rho.asin()),
)
