"""What one experiment is: everything that decides its result, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from examples.pl_theory.inputs import DATASETS
from examples.pl_theory.networks import ACTIVATIONS

__all__ = ["KINDS", "LOSSES", "Experiment"]

KINDS = (
    "initialisation",
    "infinite-width",
    "tangent-kernel",
    "training",
    "edge",
    "perturbation",
    "connectivity",
    "mean-field",
    "ball",
)
# Gradient descent on a network whose layers are looked at; an ``edge`` is one at rates near the
# largest that it bears, which are not the thesis's.
_DESCENTS = ("training", "edge")
_TRAINED = (*_DESCENTS, "perturbation", "connectivity", "mean-field")
LOSSES = ("mse", "mse-softmax", "cross-entropy")


@dataclass(frozen=True)
class Experiment:
    """One experiment.

    Attributes:
        kind: A name in `KINDS`.
        dataset: A name in `inputs.DATASETS`.
        activation: A name in `networks.ACTIVATIONS`; it is normalised in every network.
        renormalised: Whether each example is rescaled after every layer.
        width: Of the hidden layers; 0 for infinite width. Of a ``tangent-kernel``: of the second.
        depth: Layers. In what is trained the last one is linear and gives the outputs.
        examples: How many, ascending; each set is the first part of the next.
        dimension: Of the points on a sphere of a ``tangent-kernel``.
        loss: Of what is trained: a name in `LOSSES`.
        rate: Of what is trained: the learning rate.
        epochs: Of what is trained: steps of full-batch gradient descent.
        measurements: At how many epochs it is measured.
        test_examples: Of a ``training`` and an ``edge``.
        seed: Of the weights and of the subset of the pictures.

    Raises:
        ValueError: For a value that is not one of these, naming it.
    """

    kind: str
    dataset: str
    activation: str = "relu"
    renormalised: bool = False
    width: int = 0
    depth: int = 1
    examples: tuple[int, ...] = (100,)
    dimension: int = 0
    loss: str = ""
    rate: float = 0.0
    epochs: int = 0
    measurements: int = 0
    test_examples: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("kind", self.kind, KINDS)
        _one_of("dataset", self.dataset, DATASETS)
        _one_of("activation", self.activation, ACTIVATIONS)
        if (
            not self.examples
            or min(self.examples) < 2
            or list(self.examples) != sorted(set(self.examples))
        ):
            raise ValueError(f"examples={self.examples!r}: expected ascending numbers from 2")
        if (self.width < 1) != (self.kind == "infinite-width"):
            raise ValueError(f"width={self.width!r}: 0 for infinite-width, else at least 1")
        if self.depth < 1:
            raise ValueError(f"depth={self.depth!r}: must be at least 1")
        if (self.dimension < 1) == (self.dataset == "sphere"):
            raise ValueError(f"dimension={self.dimension!r}: positive for the sphere, else 0")
        if self.kind in _TRAINED:
            self._check_training()

    def _check_training(self) -> None:
        _one_of("loss", self.loss, LOSSES)
        if len(self.examples) != 1:
            raise ValueError(f"examples={self.examples!r}: a training has one training set")
        measured = (*_DESCENTS, "perturbation")
        names = ["rate", "epochs"] + ["measurements"] * (self.kind in measured)
        for name in names + ["test_examples"] * (self.kind in _DESCENTS):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be positive")

    def key(self) -> str:
        """The experiment's identity, by which a finished one is recognised."""
        name = self.activation + ("-renormalised" if self.renormalised else "")
        data = self.dataset + (f"{self.dimension}" if self.dimension else "")
        sizes = "-".join(map(str, self.examples))
        key = f"{self.kind}/{data}/{name}/w{self.width}-d{self.depth}-n{sizes}"
        if self.kind in _TRAINED:
            key += f"/{self.loss}-r{self.rate:g}-t{self.epochs}"
            key += f"-m{self.measurements}-e{self.test_examples}"
        return f"{key}/s{self.seed}"

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Experiment:
        """The experiment that made a record."""
        values = {field.name: record[field.name] for field in fields(cls)}
        return cls(**{**values, "examples": tuple(values["examples"])})


def _one_of(name: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(allowed)}")
