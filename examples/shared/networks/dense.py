"""Fully connected networks, and what all networks share."""

from __future__ import annotations

from torch import nn

__all__ = ["ACTIVATIONS", "autoencoder", "mlp", "parameter_count"]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
}


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


def parameter_count(model: nn.Module) -> int:
    """Trainable numbers."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
