"""What one run is: everything that decides its result, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from examples.cifar.data import ARCHIVES
from examples.cifar.optimizers import OPTIMIZERS
from examples.shared.networks import ACTIVATIONS, NORMALISATIONS

__all__ = ["Run"]


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        dataset: ``"cifar10"`` or ``"cifar100"``.
        model: ``"cnn"``, ``"resnet"`` or ``"vit"``.
        activation: ``"relu"``, ``"sigmoid"`` or ``"tanh"``.
        normalisation: ``"batch"`` (convolutions), ``"layer"`` (transformer) or ``"none"``.
        width: Channels of the first convolution, or of a transformer's tokens.
        depth: Blocks.
        optimizer: A name in `optimizers.OPTIMIZERS`.
        lr: The learning rate; ``None`` for an optimizer that is not tuned.
        batch_size: Examples a step. The incomplete last minibatch of an epoch is dropped.
        epochs: Passes over the training examples.
        train_examples: Training examples used.
        test_examples: Test examples used.
        seed: Of the initialisation and of the order of the minibatches.

    Raises:
        ValueError: For a value that is not one of these, naming it.
    """

    dataset: str
    model: str
    activation: str
    normalisation: str
    width: int
    depth: int
    optimizer: str
    lr: float | None
    batch_size: int
    epochs: int
    train_examples: int
    test_examples: int
    seed: int

    def __post_init__(self) -> None:
        _one_of("dataset", self.dataset, ARCHIVES)
        _one_of("model", self.model, NORMALISATIONS)
        _one_of("activation", self.activation, ACTIVATIONS)
        _one_of("normalisation", self.normalisation, NORMALISATIONS[self.model])
        _one_of("optimizer", self.optimizer, OPTIMIZERS)
        for name in ("width", "depth", "batch_size", "epochs", "train_examples", "test_examples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be at least 1")
        if self.train_examples < self.batch_size:
            raise ValueError(
                f"batch_size={self.batch_size}: larger than train_examples={self.train_examples}"
            )
        tuned = OPTIMIZERS[self.optimizer].tuned
        if tuned and (self.lr is None or not self.lr > 0):
            raise ValueError(f"lr={self.lr!r}: {self.optimizer} needs a positive learning rate")
        if not tuned and self.lr is not None:
            raise ValueError(f"lr={self.lr!r}: {self.optimizer} measures its own; leave lr out")

    def key(self) -> str:
        """The run's identity, by which a finished run is recognised."""
        rate = "" if self.lr is None else f"@{self.lr:.6g}"
        return (
            f"{self.dataset}/{self.model}-{self.activation}-{self.normalisation}"
            f"-w{self.width}-d{self.depth}/{self.optimizer}{rate}"
            f"/b{self.batch_size}-e{self.epochs}-n{self.train_examples}-t{self.test_examples}"
            f"/s{self.seed}"
        )

    def as_dict(self) -> dict[str, Any]:
        """The attributes by name, as they stand in a record."""
        return asdict(self)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Run:
        """The run that made a record."""
        return cls(**{field.name: record[field.name] for field in fields(cls)})


def _one_of(name: str, value: str, allowed: Mapping[str, Any] | tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(allowed)}")
