"""The plain training loop, with validation and a checkpoint; started again, it goes on.

python -m examples.programs.loop --checkpoint run.pt
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import adler


def blobs(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points around five centres, and which centre."""
    centres = 2 * torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(5, (count,), generator=generator)
    return centres[y] + torch.randn(count, 20, generator=generator), y


def network() -> nn.Sequential:
    """A small classifier with normalisation and dropout."""
    return nn.Sequential(
        nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 5)
    )


def main(epochs: int, checkpoint: Path | None = None) -> float:
    """Trains; the accuracy on held-back points.

    Args:
        epochs: To train for, those before the checkpoint included.
        checkpoint: Read, if it is there, and written after every epoch.
    """
    torch.manual_seed(0)
    model, criterion = network(), nn.CrossEntropyLoss()
    x, y = blobs(512, seed=1)
    held_x, held_y = blobs(512, seed=2)

    # No learning rate, no schedule.
    optimizer = adler.AdlerScheduleFree(model.parameters(), model, criterion, weight_decay=0.01)
    first, accuracy = 0, 0.0
    if checkpoint is not None and checkpoint.exists():
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["random"])
        first, accuracy = saved["epochs"], saved["accuracy"]
    for epoch in range(first, epochs):
        model.train()
        for rows in torch.split(torch.randperm(len(x)), 64):
            optimizer.zero_grad()
            loss = criterion(model(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
        model.eval()  # the weights are the average of all iterates now
        with torch.no_grad():
            accuracy = float((model(held_x).argmax(1) == held_y).float().mean())
        rate = optimizer.scalars()["effective_lr"]
        print(f"epoch {epoch}: accuracy {accuracy:.3f}, rate {rate:.3g}")
        if checkpoint is not None:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "random": torch.get_rng_state(),
                "epochs": epoch + 1,
                "accuracy": accuracy,
            }
            torch.save(state, checkpoint)
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--checkpoint", type=Path)
    options = parser.parse_args()
    main(options.epochs, options.checkpoint)
