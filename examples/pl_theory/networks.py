r"""Fully connected networks whose layers keep the scale of the features.

$f^0$ is the input and $f^{m+1} = \varphi(W^{m+1} f^m)$, without biases. The entries of $W^{m+1}$
are independent and normal with variance $1 / \mathbb{E}\|f^m\|^2$, so that every preactivation is
standard normal: $1/\|x\|^2$ in the first layer, and $1/(n\, \mathbb{E}\varphi(u)^2)$, with a
standard normal ``u``, behind a layer of width ``n``. That is $2/n$ for ReLU, and $1/n$ for a
renormalised activation.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from adler.diagnostics.theory.activations import normalised_activation
from adler.diagnostics.theory.duals import dual_activation

__all__ = ["ACTIVATIONS", "ODD", "activation_of", "features", "fully_connected", "mean_square"]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
}
# Their mean is 0 as it is; the scale, which the weights make up for, is all that would change.
ODD = ("tanh",)


def activation_of(name: str, renormalised: bool) -> nn.Module:
    """An activation, as it is or with zero mean and unit variance under a standard normal.

    Args:
        name: A key of `ACTIVATIONS`.
        renormalised: Whether to renormalise.
    """
    plain = ACTIVATIONS[name]()
    return normalised_activation(plain) if renormalised else plain


def mean_square(activation: nn.Module) -> float:
    r"""$\mathbb{E}\varphi(u)^2$ of a standard normal ``u``."""
    return dual_activation(activation)(1.0)


def features(
    inputs: Tensor, activation: nn.Module, width: int, depth: int, seed: int
) -> Iterator[Tensor]:
    r"""The features of a network at initialisation, layer by layer.

    One weight matrix exists at a time: thirty layers of width 5000 take no more memory than one.

    Args:
        inputs: ``(N, d)``, rows of unit norm.
        activation: Of every layer.
        width: Of every layer.
        depth: How many layers.
        seed: Of the weights, which are drawn on the CPU: they are the same on every device.

    Yields:
        $f^m / \sqrt{\mathbb{E}\|f^m\|^2}$ for $m = 1, \dots,$ ``depth``, shape ``(N, width)``.
    """
    generator = torch.Generator().manual_seed(seed)
    scale = 1 / math.sqrt(width * mean_square(activation))
    f = inputs
    for _ in range(depth):
        weight = torch.randn(width, f.shape[1], generator=generator, dtype=f.dtype).to(f.device)
        f = activation(f @ weight.T).mul_(scale)
        yield f


def fully_connected(
    activation: nn.Module,
    widths: tuple[int, ...],
    seed: int,
    squared_norm: float = 1.0,
) -> nn.Sequential:
    """A network at initialisation, float64.

    Args:
        activation: Of every hidden layer.
        widths: Dimension of the inputs, of the hidden layers, and of the outputs.
        seed: Of the weights.
        squared_norm: ``‖x‖²`` of the inputs that it will see.

    Returns:
        Linear layers without bias and activations, in turn; it ends with a linear layer.
    """
    generator = torch.Generator().manual_seed(seed)
    second_moment = mean_square(activation)
    layers: list[nn.Module] = []
    norm = squared_norm
    for fan_in, fan_out in itertools.pairwise(widths):
        linear = nn.Linear(fan_in, fan_out, bias=False, dtype=torch.float64)
        with torch.no_grad():
            linear.weight.normal_(0, 1 / math.sqrt(norm), generator=generator)
        layers += [linear, copy.deepcopy(activation)]
        norm = fan_out * second_moment
    return nn.Sequential(*layers[:-1])
