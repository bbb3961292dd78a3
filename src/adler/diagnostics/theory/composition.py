r"""How Lipschitz and smoothness constants compose, layer by layer.

A map $\theta \mapsto a(\theta)$ is described by three bounds over a convex set of parameters, of

$$
\|a(\theta)\|, \qquad \|D a(\theta)\| = \sup_{\|d\| = 1} \|D a[d]\|, \qquad
\|D^2 a(\theta)\| = \sup_{\|d\| = 1} \|D^2 a[d, d]\| ,
$$

with the Euclidean norm of all parameters together and of all entries of ``a``, the examples of a
batch included. Each layer turns the bounds of what enters it into bounds of what leaves it; the
loss is one more layer. `adler.diagnostics.theory.smoothness` walks through a network with
these rules.

In the parameters what Lemmas 16–21 of D. Balboni, *An Optimization Perspective on Deep Neural
Networks*, PhD thesis, SNS 2025, appendix B.1.1, are in the inputs, which
`adler.diagnostics.theory.input_smoothness` has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adler.diagnostics.theory.activations import NormalisedActivation

__all__ = [
    "ENTRYWISE",
    "ActivationConstants",
    "Bounds",
    "activation_constants",
    "compose",
    "constant",
    "entrywise",
    "linear",
]


class Bounds(NamedTuple):
    r"""Upper bounds of a map of the parameters and of its first two derivatives.

    Attributes:
        value: Of $\|a\|$.
        lipschitz: Of $\|D a\|$.
        smoothness: Of $\|D^2 a\|$; infinite across a kink.
    """

    value: float
    lipschitz: float
    smoothness: float


class ActivationConstants(NamedTuple):
    r"""What an elementwise function needs to be composed.

    Attributes:
        slope: $\sup |\varphi'|$.
        bend: $\sup |\varphi''|$; infinite at a kink.
        at_zero: $|\varphi(0)|$, or more.
        largest: $\sup |\varphi|$, or more.
    """

    slope: float
    bend: float
    at_zero: float = 0.0
    largest: float = math.inf


# --- rules ---------------------------------------------------------------------------------------


def constant(value: float) -> Bounds:
    """Of what does not depend on the parameters: the inputs.

    Args:
        value: Its norm.

    Examples:
        >>> constant(3.0)
        Bounds(value=3.0, lipschitz=0.0, smoothness=0.0)
    """
    return Bounds(value, 0.0, 0.0)


def linear(
    inner: Bounds,
    weight_norm: float,
    bias_norm: float | None = None,
    examples: int = 1,
    features_norm: float | None = None,
) -> Bounds:
    r"""Of $Z = A(\theta') W^\top + 1 b^\top$, a linear layer with parameters of its own.

    With $\|W\| \le R$, and $\hat A$ the features with a column of ones if there is a bias,

    $$
    \|Z\| \le R \|A\| + \sqrt{n}\, \|b\|, \quad
    \|DZ\| \le \sqrt{\|\hat A\|_2^2 + R^2 \|DA\|^2}, \quad
    \|D^2 Z\| \le \tfrac12 \left(R \|D^2\! A\| + \sqrt{R^2 \|D^2\! A\|^2 + 4 \|DA\|^2}\right).
    $$

    For a direction whose part in ``W`` has norm ``w``, and in $\theta'$ norm ``t``, the second
    derivative $2\, DA\, dW^\top + D^2\! A\, W^\top$ is at most
    $2 w t \|DA\| + t^2 R \|D^2\! A\|$; the bound is the larger eigenvalue of this quadratic form.
    All are attained by chains of scalars.

    Args:
        inner: Of the features ``A``, ``(n, in)``; their Frobenius norm.
        weight_norm: ``R``, of the spectral norm of ``W``.
        bias_norm: Of ``b``; ``None``: the layer has none.
        examples: ``n``, rows that the layer maps.
        features_norm: Of the spectral norm of $\hat A$, if known. Default: from the Frobenius norm,
            $\sqrt{\|A\|_F^2 + n}$ with a bias.

    Examples:
        >>> linear(constant(4.0), weight_norm=2.0)
        Bounds(value=8.0, lipschitz=4.0, smoothness=0.0)
        >>> linear(Bounds(8.0, 4.0, 0.0), weight_norm=0.5)  # w₂ w₁ x: smooth with constant |x|
        Bounds(value=4.0, lipschitz=8.246211251235321, smoothness=4.0)
    """
    a0, a1, a2 = inner
    ones = 0 if bias_norm is None else examples
    if features_norm is None:
        features_norm = math.sqrt(a0**2 + ones)
    bend = _times(weight_norm, a2)
    return Bounds(
        _times(weight_norm, a0) + math.sqrt(ones) * (bias_norm or 0.0),
        math.hypot(features_norm, _times(weight_norm, a1)),
        (bend + math.hypot(bend, 2 * a1)) / 2,
    )


def entrywise(inner: Bounds, activation: ActivationConstants, entries: int) -> Bounds:
    r"""Of $\varphi(Z(\theta))$, entry by entry.

    $$
    \|\varphi(Z)\| \le \min\left(s \|Z\| + |\varphi(0)| \sqrt{N},\ \sup|\varphi| \sqrt{N}\right),
    \quad \|D\varphi(Z)\| \le s \|DZ\|, \quad
    \|D^2 \varphi(Z)\| \le s \|D^2 Z\| + s_2 \|DZ\|^2 ,
    $$

    with $s = \sup|\varphi'|$, $s_2 = \sup|\varphi''|$. The last term comes from
    $\varphi''(Z) (DZ[d])^2$, whose norm is at most $s_2 \|DZ[d]\|_4^2 \le s_2 \|DZ[d]\|_2^2$.

    Args:
        inner: Of ``Z``.
        activation: The constants of ``φ``.
        entries: ``N``, of the batch together.

    Examples:
        >>> tanh = activation_constants(torch.nn.Tanh())
        >>> value, lipschitz, smoothness = entrywise(Bounds(8.0, 4.0, 0.0), tanh, entries=9)
        >>> value, lipschitz, round(smoothness, 4)
        (3.0, 4.0, 12.3168)
    """
    root = math.sqrt(entries)
    value = min(
        _times(activation.slope, inner.value) + activation.at_zero * root,
        activation.largest * root,
    )
    return compose(Bounds(value, activation.slope, activation.bend), inner)


def compose(outer: Bounds, inner: Bounds) -> Bounds:
    r"""Of $g \circ f$, by the chain rule.

    $$
    D(g \circ f) = Dg\, Df, \quad
    D^2 (g \circ f)[d, d] = D^2 g[Df\, d, Df\, d] + Dg\, D^2\! f[d, d],
    $$

    so $\|D\| \le \ell_g \ell_f$ and $\|D^2\| \le \beta_g \ell_f^2 + \ell_g \beta_f$. A loss of the
    network's outputs is composed like this, with bounds of $\|\nabla L\|$ and $\|\nabla^2 L\|$.

    Args:
        outer: Of ``g``, as a map of its input, where the values of ``f`` lie.
        inner: Of ``f``.

    Examples:
        >>> compose(Bounds(1.0, 3.0, 2.0), Bounds(1.0, 5.0, 7.0))
        Bounds(value=1.0, lipschitz=15.0, smoothness=71.0)
    """
    return Bounds(
        outer.value,
        _times(outer.lipschitz, inner.lipschitz),
        _times(outer.smoothness, inner.lipschitz**2) + _times(outer.lipschitz, inner.smoothness),
    )


# --- activations ---------------------------------------------------------------------------------

_KINK = math.inf
# x σ(x) and x (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2: largest slopes, rounded up.
_SILU_SLOPE, _TANH_GELU_SLOPE = 1.0998394, 1.1289931

_TANH = ActivationConstants(1.0, 4 / (3 * math.sqrt(3)), 0.0, 1.0)
_SIGMOID = ActivationConstants(1 / 4, 1 / (6 * math.sqrt(3)), 1 / 2, 1.0)
_ERF = ActivationConstants(2 / math.sqrt(math.pi), 2 * math.sqrt(2 / (math.pi * math.e)), 0.0, 1.0)
_RELU = ActivationConstants(1.0, _KINK)


def _gelu(module: nn.GELU) -> ActivationConstants:
    exact = (1 + math.erf(1)) / 2 + 1 / (math.e * math.sqrt(math.pi))  # at √2
    slope = exact if module.approximate == "none" else _TANH_GELU_SLOPE
    return ActivationConstants(slope, math.sqrt(2 / math.pi))


def _softplus(module: nn.Softplus) -> ActivationConstants:
    # Beyond the threshold PyTorch returns the input; at the default, 20, the jump is 2e-9.
    bend = module.beta / 4 if module.threshold >= 20 else _KINK
    return ActivationConstants(1.0, bend, math.log(2) / module.beta)


def _normalised(module: NormalisedActivation) -> ActivationConstants:
    slope, bend, at_zero, largest = activation_constants(module.activation)
    mean, scale = abs(module.mean), module.scale
    return ActivationConstants(
        slope / scale, bend / scale, (at_zero + mean) / scale, (largest + mean) / scale
    )


# By class, as functions of the module.
ENTRYWISE: Mapping[type[nn.Module], Callable[[Any], ActivationConstants]] = {
    nn.ELU: lambda m: ActivationConstants(max(1.0, abs(m.alpha)), 1.0 if m.alpha == 1 else _KINK),
    nn.GELU: _gelu,
    nn.Identity: lambda m: ActivationConstants(1.0, 0.0),
    nn.LeakyReLU: lambda m: ActivationConstants(max(1.0, abs(m.negative_slope)), _KINK),
    nn.ReLU: lambda m: _RELU,
    nn.SiLU: lambda m: ActivationConstants(_SILU_SLOPE, 1 / 2),
    nn.Sigmoid: lambda m: _SIGMOID,
    nn.Softplus: _softplus,
    nn.Tanh: lambda m: _TANH,
    NormalisedActivation: _normalised,
}

_FUNCTIONS: dict[Callable[..., Tensor], ActivationConstants] = {
    torch.erf: _ERF,
    torch.relu: _RELU,
    torch.sigmoid: _SIGMOID,
    torch.sin: ActivationConstants(1.0, 1.0, 0.0, 1.0),
    torch.tanh: _TANH,
}


def activation_constants(activation: nn.Module | Callable[..., Tensor]) -> ActivationConstants:
    """The constants of an activation.

    Args:
        activation: ``ELU``, ``GELU``, ``Identity``, ``LeakyReLU``, ``ReLU``, ``SiLU``, ``Sigmoid``,
            ``Softplus`` or ``Tanh``; `torch.erf`, ``relu``, ``sigmoid``, ``sin`` or ``tanh``; or
            one of them from `adler.diagnostics.theory.activations.normalised_activation`.

    Raises:
        ValueError: If it is none of these.

    Examples:
        >>> activation_constants(torch.nn.ReLU())
        ActivationConstants(slope=1.0, bend=inf, at_zero=0.0, largest=inf)
    """
    # A subclass may compute something else.
    if isinstance(activation, nn.Module) and type(activation) in ENTRYWISE:
        return ENTRYWISE[type(activation)](activation)
    if not isinstance(activation, nn.Module) and activation in _FUNCTIONS:
        return _FUNCTIONS[activation]
    known = ", ".join(sorted(t.__name__ for t in ENTRYWISE))
    raise ValueError(
        f"activation={activation!r}: its constants are not known (known: {known}); state them as "
        "ActivationConstants(slope, bend, at_zero, largest)"
    )


# --- helpers -------------------------------------------------------------------------------------


def _times(a: float, b: float) -> float:
    """A bound of a product: what is zero stays so, whatever it multiplies."""
    return 0.0 if a == 0 or b == 0 else a * b
