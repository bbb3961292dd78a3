r"""Lipschitz and smoothness constants of a network as a function of its inputs.

For a map $f$, $G_f$ and $L_f$ bound $\|f(x) - f(x')\| \le G_f \|x - x'\|$ and $\|\nabla f(x) -
\nabla f(x')\|_{\text{op}} \le L_f \|x - x'\|$. Those in the parameters, which gradient descent
needs, are in `adler.diagnostics.theory.smoothness`.

Source: D. Balboni, PhD thesis, SNS 2025, appendix B.1.1, Lemmas 16 and 21.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from adler.diagnostics.theory.composition import (
    ActivationConstants,
    Bounds,
    activation_constants,
    compose,
)

__all__ = ["InputBounds", "input_bounds", "layer_input_bounds"]


class InputBounds(NamedTuple):
    """Constants of a map of its inputs.

    Attributes:
        lipschitz: ``G``.
        smoothness: ``L``; infinite across a kink.
    """

    lipschitz: float
    smoothness: float


def layer_input_bounds(
    weight: Tensor, activation: nn.Module | Callable[..., Tensor] | ActivationConstants
) -> InputBounds:
    r"""Of a layer $f(x) = M \varphi(x)$.

    $$
    G_f = \sigma_{\max}(M) \sup|\varphi'|, \qquad L_f = \sigma_{\max}(M) \sup|\varphi''| ,
    $$

    because $\nabla f(x) - \nabla f(x') = M\, \mathrm{diag}(\varphi'(x) - \varphi'(x'))$. It is
    Lemma 21 of the thesis but for $L_f$, which is printed there with $\max_{ij} |M_{ij}|$ in place
    of $\sigma_{\max}(M)$: that bounds the Hessian of each output by itself, not of all together.
    For ``M = torch.ones(25, 1)`` and tanh the gradient's Lipschitz constant is 3.849, and printed
    is 0.770.

    Args:
        weight: ``M``, ``(out, in)``.
        activation: An activation whose constants are known, or its constants, such as those on the
            interval where its inputs are.

    Raises:
        ValueError: If the activation's constants are not known, or the matrix is not finite.

    Examples:
        >>> bounds = layer_input_bounds(torch.ones(25, 1), torch.tanh)
        >>> [round(value, 3) for value in bounds]
        [5.0, 3.849]
    """
    if not isinstance(activation, ActivationConstants):
        activation = activation_constants(activation)
    norm = _spectral_norm(weight)
    return InputBounds(_times(norm, activation.slope), _times(norm, activation.bend))


def input_bounds(model: nn.Sequential) -> InputBounds:
    r"""Of a network of linear layers and activations, layer by layer.

    By Lemma 16 of the thesis, $G_{g \circ f} \le G_g G_f$ and
    $L_{g \circ f} \le G_f^2 L_g + G_g L_f$.

    Args:
        model: A ``Sequential`` of ``Linear``, ``Flatten`` and activations whose constants are
            known.

    Raises:
        ValueError: If a module is of another kind, or a weight is not finite.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 25), torch.nn.Tanh())
        >>> _ = torch.nn.init.ones_(model[0].weight)
        >>> [round(value, 3) for value in input_bounds(model)]
        [5.0, 19.245]
    """
    bounds = Bounds(0.0, 1.0, 0.0)
    for name, module in model.named_children():
        if type(module) is nn.Linear:
            layer = Bounds(0.0, _spectral_norm(module.weight), 0.0)
        elif type(module) is nn.Flatten:
            continue
        else:
            try:
                constants = activation_constants(module)
            except ValueError as error:
                raise ValueError(
                    f"model: module {name!r} is {type(module).__name__}; known are Linear, Flatten "
                    "and activations"
                ) from error
            layer = Bounds(0.0, constants.slope, constants.bend)
        bounds = compose(layer, bounds)
    return InputBounds(bounds.lipschitz, bounds.smoothness)


def _spectral_norm(matrix: Tensor) -> float:
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError("weight: not finite, so nothing bounds the layer")
    wide = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32))
    return float(torch.linalg.matrix_norm(wide, ord=2))


def _times(a: float, b: float) -> float:
    """What is zero stays so, whatever it multiplies."""
    return 0.0 if a == 0 or b == 0 else a * b
