"""Networks for 32x32 pictures with three channels: convolutional, transformers, a mixer.

They are small, so that a grid of them trains on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from examples.shared.networks.attention import attend
from examples.shared.networks.dense import ACTIVATIONS

__all__ = ["CNN", "NORMALISATIONS", "Mixer", "Residual", "ViT", "vgg"]

NORMALISATIONS: dict[str, tuple[str, ...]] = {
    "cnn": ("batch", "none"),
    "resnet": ("batch", "none"),
    "vit": ("layer", "none"),
}
_PATCH = 4
_TOKENS = (32 // _PATCH) ** 2


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
        block = Residual if residual else _convolution
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


class Residual(nn.Module):
    """``φ(shortcut(x) + conv(φ(conv(x))))``; the shortcut is 1x1 where the shape changes.

    Source: K. He et al., arXiv 1512.03385.
    """

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
        """Maps ``[B, channels, H, W]`` to ``[B, wider, H / stride, W / stride]``."""
        activated: Tensor = self.activation(self.shortcut(x) + self.second(self.first(x)))
        return activated


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


class ViT(nn.Module):
    """A vision transformer: patches of 4x4, learned positions, pre-norm, mean over tokens.

    Args:
        classes: Outputs.
        width: Of a token; a multiple of the head's.
        depth: Blocks.
        activation: Of the blocks' MLPs; see `ACTIVATIONS`.
        normalisation: ``"layer"`` or ``"none"``.
        head_width: Of an attention head.
        expansion: How many times as wide as a token the blocks' MLPs are.
    """

    def __init__(
        self,
        classes: int,
        *,
        width: int,
        depth: int,
        activation: str = "relu",
        normalisation: str = "layer",
        head_width: int = 16,
        expansion: int = 2,
    ) -> None:
        super().__init__()
        _check(activation, normalisation, "vit")
        if width % head_width:
            raise ValueError(f"width={width}: must be a multiple of {head_width}")
        self.patches = nn.Conv2d(3, width, _PATCH, _PATCH)
        self.positions = nn.Parameter(0.02 * torch.randn(_TOKENS, width))
        self.blocks = nn.Sequential(
            *(_Block(width, activation, normalisation, head_width, expansion) for _ in range(depth))
        )
        self.norm = _layer_norm(width, normalisation)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps pictures ``[B, 3, 32, 32]`` to logits ``[B, classes]``."""
        tokens: Tensor = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return logits


class _Block(nn.Module):
    """`attention.Block` with a choice of activation and norm, and its modules in another order.

    That order is part of recorded results: sums over all parameters are rounded in it.
    """

    def __init__(
        self, width: int, activation: str, normalisation: str, head_width: int, expansion: int
    ) -> None:
        super().__init__()
        self.head_width = head_width
        self.norm1 = _layer_norm(width, normalisation)
        self.qkv = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.norm2 = _layer_norm(width, normalisation)
        self.mlp = nn.Sequential(
            nn.Linear(width, expansion * width),
            ACTIVATIONS[activation](),
            nn.Linear(expansion * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(attend(self.qkv(self.norm1(x)), self.head_width))
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


class Mixer(nn.Module):
    """An MLP-mixer: patches of 4x4, MLPs over patches and over channels in turn.

    Args:
        classes: Outputs.
        width: Channels of a patch.
        depth: Blocks.
        activation: See `ACTIVATIONS`.
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
