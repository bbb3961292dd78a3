"""Which experiments a preset holds, in which order, and which of them a figure needs: data.

``thesis`` is the set-up of the thesis's section 6.3, whole. Its experiments are ordered so that any
first part of them is a smaller version of the whole: seed by seed, and cheap ones before dear ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from examples.pl_theory.config import Experiment

__all__ = ["FIGURES", "PRESETS", "Preset"]


@dataclass(frozen=True)
class Preset:
    """The sizes of all experiments.

    Attributes:
        dataset: The pictures.
        widths: At initialisation.
        depth: At initialisation.
        examples: At initialisation.
        train_width: In training.
        train_depths: In training: linear layers, the last one included.
        train_examples: In training.
        rates: In training.
        edge_examples: Of ReLU networks of the least depth, trained at rates near the largest.
        edge_rates: Theirs.
        epochs: In training.
        measurements: In training.
        test_examples: In training.
        kernel_settings: Of the three-layer networks: dimension of the inputs and second width.
        kernel_examples: Of the three-layer networks.
        landscape_widths: Of the networks whose surroundings are looked at.
        landscape_examples: Theirs, of the handwritten digits.
        landscape_epochs: Theirs.
        landscape_seeds: Theirs.
        ball_widths: Of the networks with one output whose conditioned ball is measured.
        ball_examples: Theirs, of the handwritten digits.
        seeds: Of all others.
    """

    dataset: str
    widths: tuple[int, ...]
    depth: int
    examples: tuple[int, ...]
    train_width: int
    train_depths: tuple[int, ...]
    train_examples: tuple[int, ...]
    rates: tuple[float, ...]
    edge_examples: tuple[int, ...]
    edge_rates: tuple[float, ...]
    epochs: int
    measurements: int
    test_examples: int
    kernel_settings: tuple[tuple[int, int], ...]
    kernel_examples: tuple[int, ...]
    landscape_widths: tuple[int, ...]
    landscape_examples: int
    landscape_epochs: int
    ball_widths: tuple[int, ...]
    ball_examples: int
    landscape_seeds: int = 3
    seeds: int = 3

    def experiments(self) -> Iterator[Experiment]:
        """All of them, seed by seed."""
        for activation in ("relu", "tanh"):
            yield Experiment(
                "infinite-width",
                self.dataset,
                activation,
                depth=self.depth,
                examples=self.examples,
            )
        for seed in range(self.seeds):
            yield from self._kernels(seed)
            yield from self._balls(seed)
            if seed < self.landscape_seeds:
                yield from self._landscapes(seed)
            yield from self._edges(seed)
            yield from self._initialisations(seed)
            yield from self._trainings(seed)

    def _initialisations(self, seed: int) -> Iterator[Experiment]:
        for width in self.widths:
            for activation, renormalised in itertools.product(("relu", "tanh"), (False, True)):
                yield Experiment(
                    "initialisation",
                    self.dataset,
                    activation,
                    renormalised,
                    width,
                    self.depth,
                    self.examples,
                    seed=seed,
                )

    def _trainings(self, seed: int) -> Iterator[Experiment]:
        sizes = sorted(itertools.product(self.train_depths, self.train_examples), key=_cost)
        for depth, n in sizes:
            for rate, loss, activation in itertools.product(
                self.rates[::-1], ("mse", "cross-entropy", "mse-softmax"), ("relu", "tanh")
            ):
                yield self._descent("training", depth, n, rate, loss, activation, seed)

    def _edges(self, seed: int) -> Iterator[Experiment]:
        depth = min(self.train_depths)
        for n, rate in itertools.product(self.edge_examples, self.edge_rates):
            yield self._descent("edge", depth, n, rate, "cross-entropy", "relu", seed)

    def _descent(
        self, kind: str, depth: int, n: int, rate: float, loss: str, activation: str, seed: int
    ) -> Experiment:
        return Experiment(
            kind,
            self.dataset,
            activation,
            width=self.train_width,
            depth=depth,
            examples=(n,),
            loss=loss,
            rate=rate,
            epochs=self.epochs,
            measurements=self.measurements,
            test_examples=self.test_examples,
            seed=seed,
        )

    def _landscapes(self, seed: int) -> Iterator[Experiment]:
        for width, kind, activation, loss in itertools.product(
            self.landscape_widths,
            ("perturbation", "connectivity"),
            ("relu", "tanh"),
            ("mse", "cross-entropy"),
        ):
            yield Experiment(
                kind,
                "digits",
                activation,
                width=width,
                depth=3,
                examples=(self.landscape_examples,),
                loss=loss,
                rate=0.05,
                epochs=self.landscape_epochs,
                measurements=6 if kind == "perturbation" else 0,
                seed=seed,
            )
        for width, activation, loss in itertools.product(
            self.landscape_widths, ("relu", "tanh"), ("mse", "cross-entropy")
        ):
            yield Experiment(
                "mean-field",
                "digits",
                activation,
                width=width,
                depth=2,
                examples=(self.landscape_examples,),
                loss=loss,
                rate=2.0 if loss == "mse" else 0.5,
                epochs=self.landscape_epochs,
                seed=seed,
            )

    def _balls(self, seed: int) -> Iterator[Experiment]:
        for width in self.ball_widths:
            yield Experiment(
                "ball",
                "digits",
                "tanh",
                width=width,
                depth=3,
                examples=(self.ball_examples,),
                seed=seed,
            )

    def _kernels(self, seed: int) -> Iterator[Experiment]:
        for (dimension, width), n in itertools.product(self.kernel_settings, self.kernel_examples):
            yield Experiment(
                "tangent-kernel",
                "sphere",
                width=width,
                depth=3,
                examples=(n,),
                dimension=dimension,
                seed=seed,
            )


def _cost(size: tuple[int, int]) -> int:
    depth, n = size
    return depth * n


PRESETS = {
    # Half a minute, without any download.
    "smoke": Preset(
        dataset="digits",
        widths=(60, 120),
        depth=8,
        examples=(20, 50),
        train_width=40,
        train_depths=(3,),
        train_examples=(20,),
        rates=(0.01, 0.1),
        edge_examples=(20,),
        edge_rates=(0.3,),
        epochs=10,
        measurements=4,
        test_examples=100,
        kernel_settings=((20, 10), (40, 10)),
        kernel_examples=(16, 32),
        landscape_widths=(8, 16),
        landscape_examples=20,
        landscape_epochs=10,
        ball_widths=(8, 16),
        ball_examples=4,
        landscape_seeds=1,
        seeds=2,
    ),
    "thesis": Preset(
        dataset="cifar10",
        widths=(1000, 2000, 5000),
        depth=30,
        examples=(100, 200, 500, 1000),
        train_width=500,
        train_depths=(6, 9),
        train_examples=(50, 100, 250, 500),
        rates=(0.0005, 0.001, 0.005, 0.01),
        edge_examples=(50, 100, 250),
        edge_rates=(0.03, 0.04),
        epochs=80,
        measurements=16,
        test_examples=500,
        kernel_settings=((100, 50), (100, 400), (500, 100), (1000, 100)),
        kernel_examples=(50, 100, 200, 400),
        landscape_widths=(16, 64, 256),
        landscape_examples=100,
        landscape_epochs=300,
        ball_widths=(16, 64, 256, 1024),
        ball_examples=10,
    ),
}


def _initial(activation: str) -> Callable[[Experiment], bool]:
    kinds = ("initialisation", "infinite-width")
    return lambda e: e.kind in kinds and e.activation == activation


def _training(activation: str, loss: str) -> Callable[[Experiment], bool]:
    return lambda e: e.kind == "training" and (e.activation, e.loss) == (activation, loss)


# What each figure is drawn from. The names of the paper's and the poster's begin with theirs; the
# edge is 6.7 at rates that the thesis did not take; the next three are of what Mondelli's slides
# show, the ball is Liu's, Zhu's and Belkin's; the last is of the thesis's section 7.5.
FIGURES: dict[str, Callable[[Experiment], bool]] = {
    **dict.fromkeys(("6.1", "6.2", "6.3", "6.4", "6.9", "6.10"), _initial("relu")),
    "6.13": _initial("tanh"),
    **dict.fromkeys(("6.5", "6.6", "6.11", "6.16", "6.22"), _training("relu", "mse")),
    **dict.fromkeys(("6.17", "6.23", "paper-6d", "paper-7b"), _training("tanh", "mse")),
    **dict.fromkeys(
        ("6.7", "6.14", "6.18", "6.20", "poster-1"), _training("relu", "cross-entropy")
    ),
    **dict.fromkeys(("6.8", "6.15", "6.19", "6.21"), _training("tanh", "cross-entropy")),
    "6.12": _training("relu", "mse-softmax"),
    "paper-7d": _training("tanh", "mse-softmax"),
    "edge": lambda e: e.kind == "edge",
    "nmm": lambda e: e.kind == "tangent-kernel",
    **dict.fromkeys(
        ("dropout", "connectivity"), lambda e: e.kind in ("connectivity", "mean-field")
    ),
    "ball": lambda e: e.kind == "ball",
    "7.5": lambda e: e.kind == "perturbation",
}
