"""The networks: convolutional with and without residual connections, and vision transformers.

All take 32x32 pictures with three channels. They are small, so that a grid of them trains on a CPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from examples.cifar.config import Run

__all__ = ["ACTIVATIONS", "CNN", "NORMALISATIONS", "ViT", "build", "parameter_count"]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
}
NORMALISATIONS: dict[str, tuple[str, ...]] = {
    "cnn": ("batch", "none"),
    "resnet": ("batch", "none"),
    "vit": ("layer", "none"),
}
_PATCH = 4
_TOKENS = (32 // _PATCH) ** 2
_HEAD_WIDTH = 16


class CNN(nn.Module):
    """Convolutions of 3x3, average pooling over the picture, and one linear layer.

    After a first convolution with ``width`` channels come ``depth`` blocks. Every other block,
    beginning with the first, halves the picture and doubles the channels.

    Args:
        classes: Outputs.
        width: Channels of the first convolution.
        depth: Blocks, at most 8. A block is one convolution, or two around a shortcut.
        activation: See `ACTIVATIONS`.
        normalisation: ``"batch"`` or ``"none"``.
        residual: Whether the blocks have shortcuts.
    """

    def __init__(
        self,
        classes: int,
        *,
        width: int,
        depth: int,
        activation: str = "relu",
        normalisation: str = "none",
        residual: bool = False,
    ) -> None:
        super().__init__()
        _check(activation, normalisation, "cnn")
        if depth > 8:
            raise ValueError(f"depth={depth}: at most 8, the picture is one pixel by then")
        block = _Residual if residual else _convolution
        layers: list[nn.Module] = [_convolution(3, width, 1, activation, normalisation)]
        for index in range(depth):
            halves = index % 2 == 0
            wider = 2 * width if halves else width
            layers.append(block(width, wider, 2 if halves else 1, activation, normalisation))
            width = wider
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps pictures ``[B, 3, 32, 32]`` to logits ``[B, classes]``."""
        features: Tensor = self.features(x)
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


def _convolution(
    channels: int, wider: int, stride: int, activation: str | None, normalisation: str
) -> nn.Sequential:
    """A 3x3 convolution, normalisation, activation. BatchNorm's shift replaces the bias."""
    normalised = normalisation == "batch"
    layers: list[nn.Module] = [
        nn.Conv2d(channels, wider, 3, stride, padding=1, bias=not normalised)
    ]
    if normalised:
        layers.append(nn.BatchNorm2d(wider))
    if activation is not None:
        layers.append(ACTIVATIONS[activation]())
    return nn.Sequential(*layers)


class _Residual(nn.Module):
    """``φ(shortcut(x) + conv(φ(conv(x))))``; the shortcut is 1x1 where the shape changes."""

    def __init__(
        self, channels: int, wider: int, stride: int, activation: str, normalisation: str
    ) -> None:
        super().__init__()
        self.first = _convolution(channels, wider, stride, activation, normalisation)
        self.second = _convolution(wider, wider, 1, None, normalisation)
        self.shortcut = (
            nn.Identity()
            if stride == 1 and channels == wider
            else nn.Conv2d(channels, wider, 1, stride, bias=False)
        )
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        activated: Tensor = self.activation(self.shortcut(x) + self.second(self.first(x)))
        return activated


class ViT(nn.Module):
    """A vision transformer: patches of 4x4, learned positions, pre-norm, mean over tokens.

    Args:
        classes: Outputs.
        width: Of a token; a multiple of 16, the width of an attention head.
        depth: Blocks.
        activation: Of the blocks' MLPs; see `ACTIVATIONS`.
        normalisation: ``"layer"`` or ``"none"``.
    """

    def __init__(
        self,
        classes: int,
        *,
        width: int,
        depth: int,
        activation: str = "relu",
        normalisation: str = "layer",
    ) -> None:
        super().__init__()
        _check(activation, normalisation, "vit")
        if width % _HEAD_WIDTH:
            raise ValueError(f"width={width}: must be a multiple of {_HEAD_WIDTH}")
        self.patches = nn.Conv2d(3, width, _PATCH, _PATCH)
        self.positions = nn.Parameter(0.02 * torch.randn(_TOKENS, width))
        self.blocks = nn.Sequential(
            *(_Block(width, activation, normalisation) for _ in range(depth))
        )
        self.norm = _layer_norm(width, normalisation)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps pictures ``[B, 3, 32, 32]`` to logits ``[B, classes]``."""
        tokens: Tensor = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return logits


class _Block(nn.Module):
    """Attention and an MLP twice as wide, each added to what it was given."""

    def __init__(self, width: int, activation: str, normalisation: str) -> None:
        super().__init__()
        self.norm1 = _layer_norm(width, normalisation)
        self.qkv = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.norm2 = _layer_norm(width, normalisation)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), ACTIVATIONS[activation](), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, -1, _HEAD_WIDTH))  # [B, T, 3, H, E]
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.mix(attended)
        added: Tensor = x + self.mlp(self.norm2(x))
        return added


def _layer_norm(width: int, normalisation: str) -> nn.Module:
    return nn.LayerNorm(width) if normalisation == "layer" else nn.Identity()


def _check(activation: str, normalisation: str, model: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r}: expected one of {', '.join(ACTIVATIONS)}")
    allowed = NORMALISATIONS[model]
    if normalisation not in allowed:
        raise ValueError(f"normalisation={normalisation!r}: expected one of {', '.join(allowed)}")


def build(config: Run, classes: int) -> nn.Module:
    """The network of a run, with PyTorch's default initialisation."""
    if config.model == "vit":
        return ViT(
            classes,
            width=config.width,
            depth=config.depth,
            activation=config.activation,
            normalisation=config.normalisation,
        )
    return CNN(
        classes,
        width=config.width,
        depth=config.depth,
        activation=config.activation,
        normalisation=config.normalisation,
        residual=config.model == "resnet",
    )


def parameter_count(model: nn.Module) -> int:
    """Trainable numbers."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
