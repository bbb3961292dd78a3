"""Which experiments a preset holds, and which of them a figure needs: data.

The thesis's figures give depth 30, widths from 1000 to 5000 and 100 to 1000 examples of CIFAR at
initialisation. Everything in training, and the sizes of random features, are our choices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from examples.pl_theory.config import Experiment
from examples.pl_theory.networks import ODD

__all__ = ["FIGURES", "PRESETS", "VARIANTS", "Preset"]

# Activation and whether it is renormalised: the networks in training, in the order of the figures.
VARIANTS = (("relu", False), ("tanh", False), ("sigmoid", False), ("relu", True))


@dataclass(frozen=True)
class Preset:
    """The sizes of all experiments.

    Attributes:
        dataset: The pictures.
        activations: At initialisation, plain and, where that makes a difference, renormalised.
        widths: At initialisation.
        depth: At initialisation.
        examples: At initialisation.
        feature_widths: Of random features.
        feature_examples: Of random features; those below a width are used with it.
        kernel_examples: Of the three-layer networks.
        kernel_width: Of their second layer; at most the number of examples, so that the last
            layer's part of the kernel, which would not grow with them, is singular. Chosen after a
            trial with 512, where that part hid the growth; see `claims_scaling.three_layers`.
        train_width: In training.
        train_depths: In training.
        train_examples: In training.
        test_examples: In training.
        steps: In training.
        measurements: In training.
        seeds: Of the experiments with curves.
        scaling_seeds: Of those whose constants and exponents are fitted.
    """

    dataset: str
    activations: tuple[str, ...]
    widths: tuple[int, ...]
    depth: int
    examples: tuple[int, ...]
    feature_widths: tuple[int, ...]
    feature_examples: tuple[int, ...]
    kernel_examples: tuple[int, ...]
    kernel_width: int
    train_width: int
    train_depths: tuple[int, ...]
    train_examples: int
    test_examples: int
    steps: int
    measurements: int
    seeds: int = 1
    scaling_seeds: int = 3

    def experiments(self) -> Iterator[Experiment]:
        """All of them, seed by seed; long ones first, so that processes end together."""
        for seed in range(self.seeds):
            yield from self._initialisations(seed)
            yield from self._trainings(seed)
        for seed in range(self.scaling_seeds):
            yield from self._scalings(seed)

    def _initialisations(self, seed: int) -> Iterator[Experiment]:
        for width in (*sorted(self.widths, reverse=True), 0):
            for activation in self.activations:
                for renormalised in (False,) if activation in ODD else (False, True):
                    if width > 0 or seed == 0:
                        yield Experiment(
                            "initialisation" if width > 0 else "infinite-width",
                            self.dataset,
                            activation,
                            renormalised,
                            width,
                            self.depth,
                            self.examples,
                            seed=seed,
                        )

    def _trainings(self, seed: int) -> Iterator[Experiment]:
        for depth in sorted(self.train_depths, reverse=True):
            for loss in ("mse", "cross-entropy"):
                for activation, renormalised in VARIANTS:
                    yield Experiment(
                        "training",
                        self.dataset,
                        activation,
                        renormalised,
                        self.train_width,
                        depth,
                        (self.train_examples,),
                        loss,
                        self.steps,
                        self.measurements,
                        self.test_examples,
                        seed,
                    )

    def _scalings(self, seed: int) -> Iterator[Experiment]:
        for dataset in ("sphere", self.dataset):
            for n in sorted(self.kernel_examples, reverse=True):
                yield Experiment(
                    "tangent-kernel",
                    dataset,
                    width=self.kernel_width,
                    depth=2,
                    examples=(n,),
                    seed=seed,
                )
            for width in sorted(self.feature_widths, reverse=True):
                sizes = tuple(n for n in self.feature_examples if 2 * n <= width)
                for renormalised in (False, True):
                    yield Experiment(
                        "random-features",
                        dataset,
                        renormalised=renormalised,
                        width=width,
                        examples=sizes,
                        seed=seed,
                    )


PRESETS = {
    # Ten seconds, without any download.
    "smoke": Preset(
        dataset="digits",
        activations=("relu", "tanh"),
        widths=(100, 200, 400),
        depth=6,
        examples=(20, 50),
        feature_widths=(100, 200, 400),
        feature_examples=(10, 20, 40),
        kernel_examples=(16, 32, 64),
        kernel_width=16,
        train_width=24,
        train_depths=(2,),
        train_examples=16,
        test_examples=100,
        steps=8,
        measurements=3,
        scaling_seeds=2,
    ),
    # The thesis's scale at initialisation; in training, networks that two cores can follow.
    "laptop": Preset(
        dataset="cifar10",
        activations=("relu", "tanh", "sigmoid"),
        widths=(1000, 2000, 3000, 4000, 5000),
        depth=30,
        examples=(100, 200, 500, 1000),
        feature_widths=(500, 1000, 2000, 4000),
        feature_examples=(25, 50, 100, 200, 400, 800),
        kernel_examples=(100, 200, 400, 800),
        kernel_width=100,
        train_width=256,
        train_depths=(2, 5),
        train_examples=100,
        test_examples=400,
        steps=200,
        measurements=12,
        scaling_seeds=5,
    ),
    # Seeds for spreads, wider and deeper networks in training, and more steps.
    "full": Preset(
        dataset="cifar10",
        activations=("relu", "tanh", "sigmoid", "gelu"),
        widths=(1000, 2000, 3000, 4000, 5000),
        depth=30,
        examples=(100, 200, 500, 1000),
        feature_widths=(500, 1000, 2000, 4000, 8000),
        feature_examples=(25, 50, 100, 200, 400, 800, 1600),
        kernel_examples=(100, 200, 400, 800, 1600),
        kernel_width=100,
        train_width=1000,
        train_depths=(2, 5, 10),
        train_examples=200,
        test_examples=2000,
        steps=2000,
        measurements=30,
        seeds=3,
        scaling_seeds=10,
    ),
}


def _is(*kinds: str, loss: str | None = None) -> Callable[[Experiment], bool]:
    return lambda e: e.kind in kinds and loss in (None, e.loss)


_INITIAL = _is("initialisation", "infinite-width")
_MSE, _CROSS_ENTROPY = _is("training", loss="mse"), _is("training", loss="cross-entropy")
# What each figure is drawn from. The last is that of Nguyen, Mondelli and Montúfar.
FIGURES: dict[str, Callable[[Experiment], bool]] = {
    **dict.fromkeys(("6.1", "6.2", "6.3", "6.4"), _INITIAL),
    **dict.fromkeys(("6.5", "6.6", "6.7", "6.8"), _MSE),
    **dict.fromkeys(("6.9", "6.10"), _is("initialisation", "training")),
    "6.11": _MSE,
    "6.12": _CROSS_ENTROPY,
    "6.13": _is("random-features"),
    **dict.fromkeys(("6.14", "6.15"), _CROSS_ENTROPY),
    **dict.fromkeys(("6.16", "6.17", "6.18", "6.19"), _MSE),
    **dict.fromkeys(("6.20", "6.21", "6.22", "6.23"), _CROSS_ENTROPY),
    "nmm": _is("tangent-kernel"),
}
