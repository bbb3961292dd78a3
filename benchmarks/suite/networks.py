"""The networks that are not `examples.cifar.models`', and what they are initialised with.

All are small: a run of plain SGD takes seconds on one CPU core.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.suite.data import CONTEXT
from examples.cifar.models import ACTIVATIONS

__all__ = [
    "INITIALISATIONS",
    "GRUModel",
    "Mixer",
    "Transformer",
    "autoencoder",
    "mlp",
    "vgg",
]


def mlp(inputs: int, widths: tuple[int, ...], outputs: int, activation: str) -> nn.Sequential:
    """Linear layers with activations between them; pictures are flattened."""
    layers: list[nn.Module] = [nn.Flatten()]
    for width in widths:
        layers += [nn.Linear(inputs, width), ACTIVATIONS[activation]()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


def autoencoder(inputs: int, widths: tuple[int, ...], activation: str) -> nn.Sequential:
    """Narrower layer by layer to ``widths[-1]``, and back: the code has no activation."""
    encoder = mlp(inputs, widths[:-1], widths[-1], activation)
    decoder = mlp(widths[-1], widths[-2::-1], inputs, activation)
    return nn.Sequential(encoder, decoder)


def vgg(classes: int, width: int, activation: str) -> nn.Sequential:
    """Convolutions two by two with max pooling, under GroupNorm of four groups."""
    layers: list[nn.Module] = []
    channels = 3
    for wider in (width, 2 * width, 4 * width):
        for _ in range(2):
            layers += [
                nn.Conv2d(channels, wider, 3, padding=1, bias=False),
                nn.GroupNorm(4, wider),
                ACTIVATIONS[activation](),
            ]
            channels = wider
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * channels, classes))


class Mixer(nn.Module):
    """An MLP-mixer: patches of 4x4, MLPs over patches and over channels in turn.

    Args:
        classes: Outputs.
        width: Channels of a patch.
        depth: Blocks.
        activation: See `examples.cifar.models.ACTIVATIONS`.
    """

    def __init__(self, classes: int, width: int, depth: int, activation: str) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.Sequential(*(_Mix(64, width, activation) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps pictures ``[B, 3, 32, 32]`` to logits ``[B, classes]``."""
        tokens = self.blocks(self.patches(x).flatten(2).transpose(1, 2))
        logits: Tensor = self.head(self.norm(tokens).mean(1))
        return logits


class _Mix(nn.Module):
    def __init__(self, tokens: int, width: int, activation: str) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.over_tokens = nn.Sequential(
            nn.Linear(tokens, tokens), ACTIVATIONS[activation](), nn.Linear(tokens, tokens)
        )
        self.over_channels = nn.Sequential(
            nn.Linear(width, 2 * width), ACTIVATIONS[activation](), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.over_tokens(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        added: Tensor = x + self.over_channels(self.norms[1](x))
        return added


class Transformer(nn.Module):
    """A decoder over characters: learned positions, causal attention, pre-norm.

    Args:
        vocabulary: Characters.
        width: Of a token; a multiple of 16, the width of an attention head.
        depth: Blocks.
    """

    def __init__(self, vocabulary: int, width: int, depth: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        self.blocks = nn.Sequential(*(_Decoder(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        """Maps characters ``[B, T]`` to the logits of the next ones, ``[B, vocabulary, T]``."""
        tokens = self.blocks(self.characters(x) + self.positions[: x.shape[1]])
        logits: Tensor = self.head(self.norm(tokens)).transpose(1, 2)
        return logits


class _Decoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, -1, 16))  # [B, T, 3, H, E]
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mix(attended.transpose(1, 2).flatten(2))
        added: Tensor = x + self.mlp(self.norm2(x))
        return added


class GRUModel(nn.Module):
    """A recurrent language model over characters.

    Args:
        vocabulary: Characters.
        width: Of the embedding and of the state.
    """

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocabulary, width)
        self.recurrent = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        """Maps characters ``[B, T]`` to the logits of the next ones, ``[B, vocabulary, T]``."""
        logits: Tensor = self.head(self.recurrent(self.characters(x))[0]).transpose(1, 2)
        return logits


# --- initialisations -----------------------------------------------------------------------------


def _default(model: nn.Module) -> None:
    """PyTorch's own."""


def _orthogonal(model: nn.Module) -> None:
    """Weights of linear and convolutional layers have orthonormal rows or columns."""
    for weight in _weights(model):
        nn.init.orthogonal_(weight)


def _large(model: nn.Module) -> None:
    """The same weights at three times PyTorch's scale."""
    with torch.no_grad():
        for weight in _weights(model):
            weight.mul_(3)


def _weights(model: nn.Module) -> list[Tensor]:
    return [m.weight for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]


INITIALISATIONS: dict[str, Callable[[nn.Module], None]] = {
    "default": _default,
    "orthogonal": _orthogonal,
    "large": _large,
}
