"""The networks on which the cost of a step is measured, and a batch for each."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.shared.networks import Block, Residual, ViT, mlp

__all__ = ["QUICK", "TASKS", "Decoder", "Task", "resnet"]

Device = torch.device | str


@dataclass(frozen=True)
class Task:
    """A network and the batch that it trains on.

    Attributes:
        build: Makes the network.
        shape: Of one example; without a channel of floats: tokens.
        batch_size: Number of examples.
        classes: Number of outputs; of a language model, its vocabulary.
        tokens: Whether examples are token sequences, each predicting the next.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch_size: int
    classes: int = 10
    tokens: bool = False

    def batch(self, device: Device = "cpu", seed: int = 0) -> tuple[Tensor, Tensor]:
        """Inputs and targets, the same at every call with the same seed."""
        generator = torch.Generator().manual_seed(seed)
        if self.tokens:
            size = (self.batch_size, self.shape[0] + 1)
            text = torch.randint(self.classes, size, generator=generator)
            x, y = text[:, :-1], text[:, 1:].flatten()
        else:
            x = torch.randn(self.batch_size, *self.shape, generator=generator)
            y = torch.randint(self.classes, (self.batch_size,), generator=generator)
        return x.to(device), y.to(device)

    def network(self, device: Device = "cpu") -> nn.Module:
        """The network, with the same weights at every call."""
        torch.manual_seed(1)
        return self.build().to(device)


def cnn_bn() -> nn.Module:
    """Three convolutions with BatchNorm."""
    layers: list[nn.Module] = []
    for inside, outside in ((3, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(inside, outside, 3, padding=1), nn.BatchNorm2d(outside), nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 10))


def resnet(*widths: int, repeats: int) -> nn.Module:
    """For images of 32 x 32: stages of residual blocks, each at half the last one's resolution."""
    blocks = [
        Residual(
            inside if i == 0 else outside,
            outside,
            stride=2 if i == 0 and inside != outside else 1,
            activation="relu",
            normalisation="batch",
        )
        for inside, outside in itertools.pairwise((widths[0], *widths))
        for i in range(repeats)
    ]
    stem = [nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10)]
    return nn.Sequential(*stem, *blocks, *head)


def vit(width: int, depth: int, heads: int) -> nn.Module:
    """On the 64 patches of 4 x 4 pixels of an image of 32 x 32, with GELU."""
    return ViT(
        10, width=width, depth=depth, activation="gelu", head_width=width // heads, expansion=4
    )


class Decoder(nn.Module):
    """GPT-style: causal blocks, learned positions, pre-norm.

    Args:
        width: Of a token.
        depth: Blocks.
        heads: Of attention; ``width`` is a multiple of them.
        length: Tokens that it sees at once.
        vocabulary: Tokens that there are.
        tied: Whether the embedding's weights are those of the last layer.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        length: int,
        vocabulary: int,
        *,
        tied: bool = True,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*[Block(width, width // heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.head = None if tied else nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of the next token, ``(b T, vocabulary)``."""
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        last = self.embed.weight if self.head is None else self.head.weight
        return F.linear(self.norm(self.blocks(x)), last).flatten(0, 1)


def _image(build: Callable[[], nn.Module], batch_size: int) -> Task:
    return Task(build, (3, 32, 32), batch_size)


def _decoder(width: int, depth: int, length: int, vocabulary: int, batch_size: int) -> Task:
    heads = width // 64 if width > 128 else 4
    return Task(
        lambda: Decoder(width, depth, heads, length, vocabulary),
        (length,),
        batch_size,
        classes=vocabulary,
        tokens=True,
    )


# By type of device: as large as it is made for.
TASKS: dict[str, dict[str, Task]] = {
    "cpu": {
        "MLP, 1.0 M": Task(lambda: mlp(784, (768, 512), 10, "relu"), (784,), 64),
        "CNN + BatchNorm, 0.07 M": _image(cnn_bn, 64),
        "ResNet-14, 0.18 M": _image(lambda: resnet(16, 32, 64, repeats=2), 64),
        "ViT, 0.8 M": _image(lambda: vit(128, depth=4, heads=4), 32),
        "GPT-style decoder, 0.8 M": _decoder(128, 4, 64, 256, batch_size=32),
    },
    "cuda": {
        "MLP, 1.0 M": Task(lambda: mlp(784, (768, 512), 10, "relu"), (784,), 1024),
        "CNN + BatchNorm, 0.07 M": _image(cnn_bn, 1024),
        "ResNet-18, 11 M": _image(lambda: resnet(64, 128, 256, 512, repeats=2), 256),
        "ViT, 21 M": _image(lambda: vit(384, depth=12, heads=6), 128),
        "GPT-style decoder, 30 M": _decoder(512, 8, 1024, 8192, batch_size=8),
        "GPT-style decoder, 124 M": _decoder(768, 12, 1024, 50257, batch_size=2),
    },
}

# For a look at whether everything runs.
QUICK: dict[str, Task] = {
    "MLP, small": Task(lambda: mlp(16, (24,), 10, "relu"), (16,), 16),
    "ResNet-14, 0.18 M": Task(lambda: resnet(16, 32, 64, repeats=2), (3, 8, 8), 4),
    "GPT-style decoder, 0.8 M": _decoder(128, 4, 8, 256, batch_size=4),
}
