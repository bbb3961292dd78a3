"""Handwritten digits with PyTorch Lightning: ``python -m examples.programs.lightning_module``.

The constructor is the only line that differs from any other optimizer's.
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning.pytorch as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import adler

__all__ = ["Digits", "digits"]


class Digits(L.LightningModule):
    """A small network; the criterion is a module, so that the optimizer sees its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.criterion = nn.CrossEntropyLoss()

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the ten digits, ``[B, 10]``."""
        scores: Tensor = self.net(x)
        return scores

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The loss of a minibatch."""
        x, y = batch
        loss: Tensor = self.criterion(self(x), y)
        return loss

    def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        """Logs what the optimizer did: rate, slope, curvature, guard events."""
        self.log_dict(self.optimizers().scalars("adler/"))

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Logs the accuracy."""
        x, y = batch
        self.log("accuracy", (self(x).argmax(1) == y).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> adler.AdlerScheduleFree:
        """No learning rate to choose."""
        return adler.AdlerScheduleFree(self.parameters(), self, self.criterion)


def digits(batch_size: int = 64) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Loaders of scikit-learn's digits, for training and for validation."""
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.as_tensor(pixels / 16, dtype=torch.float32), torch.as_tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, held = order[:1400], order[1400:]
    shuffle = torch.Generator().manual_seed(1)
    return (
        DataLoader(TensorDataset(x[train], y[train]), batch_size, shuffle=True, generator=shuffle),
        DataLoader(TensorDataset(x[held], y[held]), 512),
    )


def main() -> None:
    """Trains, and prints the accuracy on held-out digits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    L.seed_everything(0)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=options.epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        log_every_n_steps=1,
    )
    trainer.fit(Digits(), *digits())
    for name, value in sorted(trainer.callback_metrics.items()):
        print(f"{name} {float(value):.4g}")


if __name__ == "__main__":
    main()
