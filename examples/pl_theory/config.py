"""What one experiment is: everything that decides its result, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from examples.pl_theory.inputs import DATASETS
from examples.pl_theory.networks import ACTIVATIONS

__all__ = ["KINDS", "Experiment"]

KINDS = ("initialisation", "infinite-width", "random-features", "tangent-kernel", "training")
_LOSSES = ("mse", "cross-entropy")


@dataclass(frozen=True)
class Experiment:
    """One experiment.

    Attributes:
        kind: A name in `KINDS`.
        dataset: A name in `inputs.DATASETS`.
        activation: A name in `networks.ACTIVATIONS`.
        renormalised: Whether it has zero mean and unit variance under a standard normal.
        width: Of the hidden layers; 0 for infinite width. Of a ``tangent-kernel``: of the second.
        depth: Hidden layers.
        examples: How many, ascending; each set is the first part of the next.
        loss: Of a ``training``: ``"mse"`` (one-hot targets) or ``"cross-entropy"``.
        steps: Of a ``training``.
        measurements: Of a ``training``: at how many steps matrices are formed.
        test_examples: Of a ``training``.
        seed: Of the weights, and of points on the sphere.

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
    loss: str = ""
    steps: int = 0
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
        if self.kind != "training":
            return
        _one_of("loss", self.loss, _LOSSES)
        if len(self.examples) != 1:
            raise ValueError(f"examples={self.examples!r}: a training has one training set")
        for name in ("steps", "measurements", "test_examples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be at least 1")

    def key(self) -> str:
        """The experiment's identity, by which a finished one is recognised."""
        name = self.activation + ("-renormalised" if self.renormalised else "")
        sizes = "-".join(map(str, self.examples))
        key = f"{self.kind}/{self.dataset}/{name}/w{self.width}-d{self.depth}-n{sizes}"
        if self.kind == "training":
            key += f"/{self.loss}-t{self.steps}-m{self.measurements}-e{self.test_examples}"
        return f"{key}/s{self.seed}"

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Experiment:
        """The experiment that made a record."""
        values = {field.name: record[field.name] for field in fields(cls)}
        return cls(**{**values, "examples": tuple(values["examples"])})


def _one_of(name: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(allowed)}")
