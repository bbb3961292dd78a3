"""The plain training loop, with validation, a schedule and a checkpoint.

python -m examples.programs.loop
"""

from __future__ import annotations

import argparse

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


def main(epochs: int) -> float:
    """Trains; the accuracy on held-back points."""
    torch.manual_seed(0)
    model, criterion = network(), nn.CrossEntropyLoss()
    x, y = blobs(512, seed=1)
    held_x, held_y = blobs(512, seed=2)

    optimizer = adler.Adler(model.parameters(), model, criterion)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    accuracy = 0.0
    for epoch in range(epochs):
        model.train()
        for rows in torch.split(torch.randperm(len(x)), 64):
            optimizer.zero_grad()
            loss = criterion(model(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
        scheduler.step()
        model.eval()
        with torch.no_grad():
            accuracy = float((model(held_x).argmax(1) == held_y).float().mean())
        rate = float(optimizer.param_groups[0]["effective_lr"])
        print(f"epoch {epoch}: accuracy {accuracy:.3f}, rate {rate:.3g}")
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    main(parser.parse_args().epochs)
