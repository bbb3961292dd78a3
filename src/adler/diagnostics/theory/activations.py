r"""An activation at a standard normal input: moments, Hermite coefficients, normalisation.

$$
\varphi(u) = \sum_{k \ge 0} a_k h_k(u), \qquad a_k = \mathbb{E}\, \varphi(u) h_k(u), \qquad
u \sim \mathcal{N}(0, 1),
$$

with the normalised Hermite polynomials $h_k$. `adler.diagnostics.theory.duals` derives from the
coefficients what a layer of infinite width does to the angle between two examples.

Source: N. Agarwal, P. Awasthi, S. Kale, arXiv 2002.01523 (normalised activations).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

__all__ = [
    "Activation",
    "NormalisedActivation",
    "hermite_coefficients",
    "moments",
    "nonlinearity",
    "normalised_activation",
]

Activation = Callable[[Tensor], Tensor]


# --- Hermite coefficients -------------------------------------------------------------------------


def hermite_coefficients(activation: Activation, degree: int) -> Tensor:
    r"""Coefficients $a_k = \mathbb{E}\, \varphi(u) h_k(u)$ in the normalised Hermite polynomials.

    $h_k = \mathrm{He}_k / \sqrt{k!}$ are orthonormal under the standard normal distribution.

    Args:
        activation: See `dual_activation`.
        degree: The largest ``k``.

    Returns:
        ``(degree + 1,)``, float64, on the CPU.

    Raises:
        TypeError: See `dual_activation`.
        ValueError: See `dual_activation`.

    Examples:
        >>> [round(a, 6) for a in hermite_coefficients(lambda x: x**2 + x, 2).tolist()]
        [1.0, 1.0, 1.414214]
    """
    return torch.from_numpy(moments(activation, degree)[0])


def nonlinearity(activation: Activation) -> float:
    r"""The coefficient of nonlinearity $1 - a_1^2$ of the normalised activation.

    It is 0 for affine activations, at most 1, and rules how fast depth drives the examples of a
    normalised network apart.

    Args:
        activation: See `dual_activation`.

    Raises:
        TypeError: See `dual_activation`.
        ValueError: See `dual_activation`; or if the activation is constant.

    Source:
        N. Agarwal, P. Awasthi, S. Kale, arXiv 2002.01523.

    Examples:
        >>> [round(nonlinearity(each), 4) for each in (torch.nn.Identity(), torch.relu)]
        [0.0, 0.2665]
    """
    _, scale = _mean_and_scale(activation)
    offset, slope = hermite_coefficients(activation, 1).tolist()
    # E (φ - a₀ - a₁u)², a sum of squares: 1 - a₁² would leave a small one to rounding.
    x, w, root = _quadrature()
    rest = (_evaluate(activation, x) - offset - slope * x) * root
    return min(1.0, float(w @ rest**2) / scale**2)


# --- normalised activations -----------------------------------------------------------------------


class NormalisedActivation(nn.Module):
    r"""$(\varphi(x) - m) / s$, of zero mean and unit variance at a standard normal input.

    Args:
        activation: See `dual_activation`.

    Attributes:
        activation: ``φ``.
        mean: ``m = E φ(u)``.
        scale: ``s``, the standard deviation of ``φ(u)``.
    """

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.mean, self.scale = _mean_and_scale(activation)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """The normalised activation of each entry."""
        return (self.activation(x) - self.mean) / self.scale

    def extra_repr(self) -> str:
        """Mean and scale; the activation too where it is a function."""
        name = "" if isinstance(self.activation, nn.Module) else f"{_name(self.activation)}, "
        return f"{name}mean={self.mean:.6g}, scale={self.scale:.6g}"


def normalised_activation(activation: Activation) -> NormalisedActivation:
    r"""The activation shifted and scaled to zero mean and unit variance under $\mathcal{N}(0, 1)$.

    Args:
        activation: See `dual_activation`.

    Returns:
        A module without parameters of its own.

    Raises:
        TypeError: See `dual_activation`.
        ValueError: See `dual_activation`; or if the activation is constant.

    Examples:
        >>> normalised_activation(torch.nn.ReLU())
        NormalisedActivation(
          mean=0.398942, scale=0.583819
          (activation): ReLU()
        )
    """
    return NormalisedActivation(activation)


# --- integrals ------------------------------------------------------------------------------------

_REACH, _PANEL, _NODES = 20.0, 0.5, 32


def moments(activation: Activation, degree: int) -> tuple[np.ndarray, float, float]:
    """The integrals of an activation at a standard normal input ``u``.

    By Gauss-Legendre on panels between multiples of one half: exact to rounding where φ is smooth
    within each, which Gauss-Hermite is not at a kink. Beyond the reach the square root of the
    density, which is what multiplies φ and a bounded function, is below ``exp(-20² / 4) = 4e-44``.

    Args:
        activation: See `dual_activation`.
        degree: The largest ``k``.

    Returns:
        ``a_0..a_degree``, ``E φ(u)²`` and ``E φ(u) φ(-u)``, in float64.

    Raises:
        TypeError: See `dual_activation`.
        ValueError: See `dual_activation`.
    """
    if not isinstance(degree, int) or isinstance(degree, bool) or degree < 0:
        raise ValueError(f"degree={degree!r}: expected a whole number of at least 0")
    x, w, root = _quadrature()
    weighted = _evaluate(activation, x) * root
    second_moment = float(w @ weighted**2)
    edge = max(abs(weighted[0]), abs(weighted[-1]))
    if not edge <= 1e-10 * math.sqrt(second_moment):
        raise ValueError(
            f"activation={_name(activation)}: grows too fast for its square to have a mean at a "
            "normal input"
        )
    # Hermite functions h_k(x) sqrt(density): bounded, so that their recurrence cannot overflow.
    coefficients, before, now = np.empty(degree + 1), np.zeros_like(x), root
    for k in range(degree + 1):
        coefficients[k] = w @ (weighted * now)
        before, now = now, (x * now - math.sqrt(k) * before) / math.sqrt(k + 1)
    return coefficients, second_moment, float(w @ (weighted * weighted[::-1]))


def _quadrature() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nodes, their weights, and the square root of the normal density at the nodes."""
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    edges = np.arange(-_REACH, _REACH, _PANEL)
    x = (edges[:, None] + _PANEL * (nodes + 1) / 2).ravel()
    w = np.tile(_PANEL * weights / 2, len(edges))
    return x, w, np.exp(-(x**2) / 4) / (2 * math.pi) ** 0.25


def _evaluate(activation: Activation, x: np.ndarray) -> np.ndarray:
    """The activation at ``x``, checked to act on each entry by itself."""
    if isinstance(activation, type) or not callable(activation):
        raise TypeError(
            f"activation={_name(activation)}: expected a module or a function of a tensor, such as "
            "torch.nn.Tanh() or torch.tanh"
        )
    if isinstance(activation, nn.Module):
        activation = copy.deepcopy(activation).to("cpu", torch.float64)
    grid = torch.from_numpy(x)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        values = activation(grid.clone())  # a clone: it may work in place
        part = activation(grid[::3].clone())
    if (
        not isinstance(values, Tensor)
        or values.shape != grid.shape
        or not torch.allclose(part, values[::3], rtol=1e-12, atol=1e-12, equal_nan=True)
    ):
        raise ValueError(
            f"activation={_name(activation)}: expected a deterministic function of each entry by "
            "itself; call .eval() on a module that is random in training"
        )
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"activation={_name(activation)}: is not finite on [-{_REACH}, {_REACH}]")
    return values.to(torch.float64).numpy()


def _mean_and_scale(activation: Activation) -> tuple[float, float]:
    """Mean and standard deviation under N(0, 1)."""
    (a0,), second_moment, _ = moments(activation, 0)
    eps = float(np.finfo(float).eps)
    mean = float(a0) if abs(a0) > 4 * eps * math.sqrt(second_moment) else 0.0  # of an odd φ
    variance = second_moment - mean**2
    if variance <= 64 * eps * second_moment:
        raise ValueError(f"activation={_name(activation)}: is constant, so it has no scale")
    return mean, math.sqrt(variance)


def _name(activation: object) -> str:
    return str(getattr(activation, "__name__", activation))
