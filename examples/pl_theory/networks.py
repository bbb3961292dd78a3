r"""Fully connected networks with normalised activations, as those of the thesis's section 6.3.

$f^0$ is the input, of norm $\sqrt d$, and $f^{m+1} = \varphi(W^{m+1} f^m)$, without biases. The
entries of $W^{m+1}$ are independent and normal with variance one over the width of what enters the
layer, and $\varphi$ has zero mean and unit variance at a standard normal input, so that every
preactivation is standard normal up to what a finite width adds. *Renormalised* networks (footnote 3
there) take that away: after each layer every example is rescaled to the norm that it would have,

$$
f \leftarrow \sqrt{\text{width}}\; f / \|f\| .
$$
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from adler.diagnostics.theory.activations import NormalisedActivation, normalised_activation

__all__ = ["ACTIVATIONS", "Renormalise", "activation_of", "features", "fully_connected"]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}


class Renormalise(nn.Module):
    """Rescales each example to norm ``√width``; one of norm 0 stays as it is."""

    def forward(self, features: Tensor) -> Tensor:
        """Features ``(N, width)``, rescaled row by row."""
        norms = torch.linalg.vector_norm(features, dim=1, keepdim=True)
        rescaled: Tensor = features * (math.sqrt(features.shape[1]) / norms.clamp(min=1e-30))
        return rescaled


def activation_of(name: str) -> NormalisedActivation:
    """An activation of zero mean and unit variance at a standard normal input.

    Args:
        name: A key of `ACTIVATIONS`.
    """
    return normalised_activation(ACTIVATIONS[name]())


def features(
    inputs: Tensor, activation: nn.Module, renormalised: bool, width: int, depth: int, seed: int
) -> Iterator[Tensor]:
    """The features of a network at initialisation, layer by layer.

    One weight matrix exists at a time: thirty layers of width 5000 take no more memory than one.

    Args:
        inputs: ``(N, d)``, rows of norm ``√d``.
        activation: Of every layer.
        renormalised: Whether each example is rescaled after every layer.
        width: Of every layer.
        depth: How many layers.
        seed: Of the weights, which are drawn on the CPU: they are the same on every device.

    Yields:
        ``f^m`` for ``m = 1 … depth``, shape ``(N, width)``.
    """
    generator = torch.Generator().manual_seed(seed)
    rescale = Renormalise() if renormalised else nn.Identity()
    f = inputs
    for _ in range(depth):
        weight = torch.randn(width, f.shape[1], generator=generator, dtype=f.dtype).to(f.device)
        f = rescale(activation((f @ weight.T) / math.sqrt(f.shape[1])))
        yield f


def fully_connected(
    activation: nn.Module,
    widths: tuple[int, ...],
    seed: int,
    *,
    squared_norm: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> nn.Sequential:
    """A network at initialisation.

    Args:
        activation: Of every hidden layer.
        widths: Dimension of the inputs, of the hidden layers, and of the outputs.
        seed: Of the weights.
        squared_norm: ``‖x‖²`` of the inputs that it will see. Default: their dimension.
        dtype: Of the weights.

    Returns:
        Linear layers without bias and activations, in turn; it ends with a linear layer.
    """
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    norm = float(widths[0]) if squared_norm is None else squared_norm
    for fan_in, fan_out in itertools.pairwise(widths):
        linear = nn.Linear(fan_in, fan_out, bias=False, dtype=dtype)
        with torch.no_grad():
            linear.weight.normal_(0, 1 / math.sqrt(norm), generator=generator)
        layers += [linear, copy.deepcopy(activation)]
        norm = float(fan_out)
    return nn.Sequential(*layers[:-1])
