"""The small networks that examples and benchmarks train.

The order in which a network makes its modules decides what a seed gives and how sums over its
parameters are rounded: changing it changes recorded results.
"""

from examples.shared.networks.attention import Block, attend
from examples.shared.networks.dense import ACTIVATIONS, autoencoder, mlp, parameter_count
from examples.shared.networks.pictures import CNN, NORMALISATIONS, Mixer, Residual, ViT, vgg
from examples.shared.networks.sequences import GRUModel, Transformer

__all__ = [
    "ACTIVATIONS",
    "CNN",
    "NORMALISATIONS",
    "Block",
    "GRUModel",
    "Mixer",
    "Residual",
    "Transformer",
    "ViT",
    "attend",
    "autoencoder",
    "mlp",
    "parameter_count",
    "vgg",
]
