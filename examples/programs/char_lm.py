"""A character language model in a plain loop: ``python -m examples.programs.char_lm``.

A causal transformer learns Python's own documentation, which ships with Python
(`pydoc_data.topics`), with `AdlerAdam` and no learning rate.
"""

from __future__ import annotations

import argparse
import math
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn

import adler

__all__ = ["CharTransformer", "corpus"]

LENGTH = 64


def corpus() -> tuple[Tensor, str]:
    """The text as numbers, and its alphabet; characters outside ASCII are left out."""
    text = "".join(c for key in sorted(topics) for c in topics[key] if c.isascii())
    alphabet = "".join(sorted(set(text)))
    number = {c: i for i, c in enumerate(alphabet)}
    return torch.tensor([number[c] for c in text]), alphabet


class CharTransformer(nn.Module):
    """Scores of the next character at every position.

    Args:
        characters: How many there are.
        width: Of the residual stream.
        layers: How many blocks.
        heads: In each block.
    """

    def __init__(self, characters: int, width: int = 64, layers: int = 2, heads: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(characters, width)
        self.position = nn.Parameter(0.02 * torch.randn(LENGTH, width))
        block = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[B, T]`` to ``[B, C, T]``, the shape that the criterion wants."""
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device)
        x = self.embed(tokens) + self.position[:length]
        scores: Tensor = self.head(self.norm(self.blocks(x, mask=mask, is_causal=True)))
        return scores.mT


@torch.no_grad()
def write(model: nn.Module, alphabet: str, start: str, length: int) -> str:
    """Continues a text, a character at a time."""
    generator = torch.Generator().manual_seed(0)
    tokens = [alphabet.index(c) for c in start]
    for _ in range(length):
        scores = model(torch.tensor([tokens[-LENGTH:]]))[0, :, -1]
        tokens.append(int(torch.multinomial(scores.softmax(0), 1, generator=generator)))
    return "".join(alphabet[t] for t in tokens)


def main() -> None:
    """Trains, prints bits per character, and lets the model write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--every", type=int, default=50, help="steps between two lines")
    options = parser.parse_args()
    torch.manual_seed(0)
    tokens, alphabet = corpus()
    split = len(tokens) * 9 // 10
    held = tokens[split:][: 64 * (LENGTH + 1)].view(64, LENGTH + 1)

    model, criterion = CharTransformer(len(alphabet)), nn.CrossEntropyLoss()
    optimizer = adler.AdlerAdam(model.parameters(), model, criterion)
    for step in range(1, options.steps + 1):
        starts = torch.randint(split - LENGTH - 1, (options.batch,))
        batch = tokens[starts[:, None] + torch.arange(LENGTH + 1)]
        optimizer.zero_grad()
        loss = criterion(model(batch[:, :-1]), batch[:, 1:])
        loss.backward()
        optimizer.step()
        if step % options.every == 0 or step == options.steps:
            with torch.no_grad():
                bits = float(criterion(model(held[:, :-1]), held[:, 1:])) / math.log(2)
            done = optimizer.scalars()
            print(
                f"step {step:5d}  held-out bits per character {bits:.3f}  "
                f"rate {done['effective_lr']:.2e}  clipped {done['clipped_total']:.0f}  "
                f"skipped {done['skipped_total']:.0f}"
            )
    print(write(model, alphabet, "The ", 200))


if __name__ == "__main__":
    main()
