"""Language models over characters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from examples.shared.networks.attention import Block

__all__ = ["GRUModel", "Transformer"]


class Transformer(nn.Module):
    """A decoder over characters: learned positions, causal attention, pre-norm.

    Args:
        vocabulary: Characters.
        width: Of a token; a multiple of 16, the width of an attention head.
        depth: Blocks.
        length: Characters that it sees at once.
    """

    def __init__(self, vocabulary: int, width: int, depth: int, length: int = 64) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        """Maps characters ``[B, T]`` to the logits of the next ones, ``[B, vocabulary, T]``."""
        tokens = self.blocks(self.characters(x) + self.positions[: x.shape[1]])
        logits: Tensor = self.head(self.norm(tokens)).transpose(1, 2)
        return logits


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
