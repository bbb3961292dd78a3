"""The grids of runs, as data.

The thesis names the networks, the activations, the optimizers and the ten learning rates. It does
not give batch size, epochs, widths, normalisation or augmentation. These are our choices:

- no augmentation, no momentum, no weight decay, no schedule;
- plain CNNs go without normalisation and ResNets with BatchNorm, so that the row CNN+ResNet holds
  both: networks with BatchNorm train where plain ones need not, and the records say which is which;
- transformers have LayerNorm, without which they hardly train;
- each seed has its own width and depth, so that the spread over seeds is also one over shapes; or,
  in ``variations`` and ``full``, every seed has every width with every depth, so that the two can
  be told apart: 108 variations a data set, the thesis's "more than one hundred".
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from examples.cifar.config import Run
from examples.cifar.optimizers import OPTIMIZERS

__all__ = ["GRID", "PRESETS", "Preset"]

# The thesis's constant learning rates: ten, log-spaced from 1e-5 to 3e-1.
GRID = tuple(
    float(f"{rate:.6g}") for rate in np.logspace(np.log10(1e-5), np.log10(3e-1), 10).tolist()
)
# The thesis's optimizers, this library's default and one with fewer guards, as they are run.
COMPARED = ("adler-cap", "adler-published", "adler", "gauss-newton-published", "sgd")
_USUAL = {"cnn": "none", "resnet": "batch", "vit": "layer"}


@dataclass(frozen=True)
class Preset:
    """A grid of runs.

    Attributes:
        shapes: ``(width, depth)``, by model: one for each seed, or all for every seed.
        train_examples: Of every run.
        test_examples: Of every run.
        epochs: Of every run.
        batch_sizes: Of every network.
        datasets: Which data sets.
        activations: Which activations.
        normalisations: Of every model.
        synthetic: Whether the data is made, where the archive is not there.
        seeds: How many, each with every shape; ``None``: each shape has a seed of its own.
        optimizers: Which are compared: names in `optimizers.OPTIMIZERS`.
    """

    shapes: dict[str, tuple[tuple[int, int], ...]]
    train_examples: int
    test_examples: int
    epochs: int
    batch_sizes: tuple[int, ...]
    datasets: tuple[str, ...] = ("cifar100", "cifar10")
    activations: tuple[str, ...] = ("relu", "sigmoid", "tanh")
    normalisations: Mapping[str, str] = field(default_factory=_USUAL.copy)
    synthetic: bool = False
    seeds: int | None = None
    optimizers: tuple[str, ...] = COMPARED

    def runs(self) -> Iterator[Run]:
        """Seed by seed and shape by shape, and all optimizers of a network together.

        A grid that was stopped early therefore holds comparisons that are complete, of all cells.
        """
        for seed, shape in self._rounds():
            for dataset, activation, (model, shapes), batch_size in itertools.product(
                self.datasets, self.activations, self.shapes.items(), self.batch_sizes
            ):
                width, depth = shapes[shape]
                for optimizer in self.optimizers:
                    for lr in GRID if OPTIMIZERS[optimizer].tuned else (None,):
                        yield Run(
                            dataset=dataset,
                            model=model,
                            activation=activation,
                            normalisation=self.normalisations[model],
                            width=width,
                            depth=depth,
                            optimizer=optimizer,
                            lr=lr,
                            batch_size=batch_size,
                            epochs=self.epochs,
                            train_examples=self.train_examples,
                            test_examples=self.test_examples,
                            seed=seed,
                        )

    def _rounds(self) -> list[tuple[int, int]]:
        """Seeds, and which of the shapes."""
        count = max(map(len, self.shapes.values()))
        if self.seeds is None:
            return [(seed, seed) for seed in range(count)]
        return list(itertools.product(range(self.seeds), range(count)))


def _crossed(widths: tuple[int, ...], depths: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(itertools.product(widths, depths))


_SMALL: dict[str, tuple[tuple[int, int], ...]] = {
    "cnn": ((12, 3), (8, 4), (16, 2)),
    "resnet": ((8, 2), (6, 3), (10, 1)),
    "vit": ((32, 2), (32, 3), (48, 1)),
}
_ONE = Preset(
    shapes={"cnn": ((12, 3),), "resnet": ((8, 2),)},
    train_examples=2500,
    test_examples=2000,
    epochs=4,
    batch_sizes=(64,),
    datasets=("cifar10",),
    activations=("relu",),
)

PRESETS = {
    # A minute on two cores, without any download.
    "smoke": Preset(
        shapes={"cnn": ((4, 2), (8, 1)), "resnet": ((4, 1), (4, 2)), "vit": ((16, 1), (16, 1))},
        train_examples=160,
        test_examples=100,
        epochs=2,
        batch_sizes=(32,),
        datasets=("cifar10",),
        synthetic=True,
    ),
    # 756 runs in forty minutes on two cores: 3 to 5 seconds an SGD run on one thread, 2 to 3 times
    # that with Jacobian-vector products. Enough to see who dies and who learns; twenty-five
    # pictures of a class in CIFAR-100 are not enough to rank those that learn.
    "quick": Preset(
        shapes=_SMALL, train_examples=2500, test_examples=2000, epochs=4, batch_sizes=(64,)
    ),
    # The same networks for three times as many steps: two hours on two cores. Accuracies stay
    # below the thesis's, which `full` is for; the optimizers meet on equal terms.
    "laptop": Preset(
        shapes=_SMALL, train_examples=5000, test_examples=2000, epochs=6, batch_sizes=(64,)
    ),
    # One network on ten thousand pictures: twenty minutes on two cores.
    "ten-thousand": Preset(
        shapes={"cnn": ((16, 3),)},
        train_examples=10000,
        test_examples=10000,
        epochs=10,
        batch_sizes=(64,),
        datasets=("cifar100",),
        activations=("relu",),
        normalisations={"cnn": "batch"},
    ),
    # One choice of `quick` changed at a time, on two of its networks and one seed.
    "batch-16": replace(_ONE, batch_sizes=(16,)),
    "batch-256": replace(_ONE, batch_sizes=(256,)),
    "normalised": replace(_ONE, normalisations={"cnn": "batch", "resnet": "none"}),
    "longer": replace(_ONE, epochs=12),
    # Every width with every depth and every seed: 216 variations of `quick`'s size, four hours on
    # two cores.
    "variations": Preset(
        shapes={
            "cnn": _crossed((8, 16), (2, 4)),
            "resnet": _crossed((6, 10), (1, 3)),
            "vit": _crossed((32, 48), (1, 3)),
        },
        seeds=3,
        train_examples=2500,
        test_examples=2000,
        epochs=4,
        batch_sizes=(64,),
    ),
    # All pictures of CIFAR-100 and the thesis's three optimizers, on small networks of both of its
    # rows, at two sizes of minibatch, for as long as its test losses take to turn: some fifteen
    # hours on two cores. What is killed goes on from its last epoch.
    "half": Preset(
        shapes={"resnet": ((8, 2),), "vit": ((32, 2),)},
        seeds=2,
        train_examples=50000,
        test_examples=10000,
        epochs=15,
        batch_sizes=(128, 256),
        datasets=("cifar100",),
        optimizers=("adler-published", "gauss-newton-published", "sgd"),
    ),
    # All pictures, and the epochs within which the thesis's test losses have long turned.
    "full": Preset(
        shapes={
            "cnn": _crossed((64, 96), (4, 6)),
            "resnet": _crossed((64, 96), (4, 6)),
            "vit": _crossed((192, 256), (6, 9)),
        },
        seeds=3,
        train_examples=50000,
        test_examples=10000,
        epochs=50,
        batch_sizes=(128,),
    ),
}
