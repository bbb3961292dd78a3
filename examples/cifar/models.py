"""The networks of the comparison, by the names of a run."""

from __future__ import annotations

from torch import nn

from examples.cifar.config import Run
from examples.shared.networks import CNN, ViT

__all__ = ["build"]


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
