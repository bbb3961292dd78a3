"""What one trial is, and which trials a preset holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.suite.methods import METHODS, method
from benchmarks.suite.tasks import LONGER, TASKS, Task
from examples.shared import records
from examples.shared.records import Record

__all__ = ["PRESETS", "Preset", "Trial", "read"]


@dataclass(frozen=True)
class Trial:
    """One training run of the suite.

    Attributes:
        task: A name in `tasks.TASKS`.
        method: A name in `methods.METHODS`, or a variant.
        lr: The learning rate of a tuned method; else None.
        seed: Of the initialisation and of the order of the minibatches.
        epochs: Passes over the training examples.
        train_examples: Training examples used.
        test_examples: Test examples used.

    Raises:
        ValueError: For a value that is not one of these, naming it.
    """

    task: str
    method: str
    lr: float | None
    seed: int
    epochs: int
    train_examples: int
    test_examples: int

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task={self.task!r}: expected one of {', '.join(TASKS)}")
        tuned = method(self.method).grid is not None
        if tuned and (self.lr is None or not self.lr > 0):
            raise ValueError(f"lr={self.lr!r}: {self.method} needs a positive learning rate")
        if not tuned and self.lr is not None:
            raise ValueError(f"lr={self.lr!r}: {self.method} is not tuned; leave lr out")
        for name in ("epochs", "train_examples", "test_examples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be at least 1")
        if self.train_examples < TASKS[self.task].batch_size:
            raise ValueError(
                f"train_examples={self.train_examples}: fewer than a minibatch of {self.task}"
            )

    def key(self) -> str:
        """The trial's identity, by which a finished one is recognised."""
        rate = "" if self.lr is None else f"@{self.lr:.6g}"
        sizes = f"e{self.epochs}-n{self.train_examples}-t{self.test_examples}"
        return f"{self.task}/{sizes}/{self.method}{rate}/s{self.seed}"

    def as_dict(self) -> dict[str, Any]:
        """The attributes by name, as they stand in a record."""
        return asdict(self)

    @classmethod
    def of(cls, record: Record) -> Trial:
        """The trial that made a record."""
        return cls(**{field.name: record[field.name] for field in fields(cls)})


@dataclass(frozen=True)
class Preset:
    """A part of the suite, at full size or shrunk.

    Attributes:
        wanted: Whether a task belongs to it.
        seeds: Of every task.
        limits: Upper bounds of a task's ``epochs``, ``train_examples`` and ``test_examples``.
        parts: Presets that it consists of, whose records serve it too.
        methods: Run unless others are named.
        synthetic: Whether pictures are made, where the archive is not there.
        horizons: Multiples of a task's epochs, each a run of its own, in the order in which they
            are run. A method that need not know the number of steps runs at the longest alone.
        short: Presets with the suite's short tasks, whose records stand beside these horizons.
    """

    wanted: Callable[[Task], bool]
    seeds: tuple[int, ...] = (0, 1, 2)
    limits: Mapping[str, int] | None = None
    parts: tuple[str, ...] = ()
    methods: tuple[str, ...] = tuple(METHODS)
    synthetic: bool = False
    horizons: tuple[int, ...] = (1,)
    short: tuple[str, ...] = ()

    def tasks(self) -> list[Task]:
        """Its tasks."""
        return [task for task in TASKS.values() if self.wanted(task)]

    def sizes(self, task: Task) -> dict[str, int]:
        """A task's ``epochs``, ``train_examples`` and ``test_examples`` at horizon one."""
        limits = self.limits or {}
        return {
            name: min(getattr(task, name), limits.get(name, getattr(task, name)))
            for name in ("epochs", "train_examples", "test_examples")
        }

    def trials(self, methods: Iterable[str] | None = None) -> Iterator[Trial]:
        """Seed by seed, and all methods of a task together.

        What was stopped early therefore holds comparisons that are complete, and a change in the
        machine's speed meets all methods alike.
        """
        chosen = tuple(self.methods if methods is None else methods)
        for seed in self.seeds:
            for task in self.tasks():
                sizes = self.sizes(task)
                for horizon in self.horizons:
                    longer = {**sizes, "epochs": horizon * sizes["epochs"]}
                    for name in chosen:
                        if horizon < max(self.horizons) and not method(name).needs_steps:
                            continue
                        for lr in method(name).grid or (None,):
                            yield Trial(task.name, name, lr, seed, **longer)


_SMOKE = ("cifar10/mlp-relu/b64", "diabetes/mlp-relu/b32", "digits/autoencoder-tanh/b64")
# What runs for thousands of steps: tuned references, this library, and one peer of each kind.
_LONG_METHODS = (
    "adamw-cosine-tuned",
    "sgd-momentum-cosine-tuned",
    "muon-cosine-tuned",
    "normuon-cosine-tuned",
    "soap-cosine-tuned",
    "adler",
    "adler-adam",
    "adler-schedulefree",
    "adler-muon",
    "adamw",
    "nadamw-cosine",
    "ademamix-cosine",
    "prodigy",
    "schedulefree-adamw",
    "schedulefree-plus",
    "momo-adam",
    "mechanic-adamw",
)


def _long(wanted: Callable[[Task], bool], **options: Any) -> Preset:
    """Tasks of thousands of steps; the middle horizon comes first."""
    return Preset(wanted, seeds=(0,), methods=_LONG_METHODS, horizons=(4, 1, 16), **options)


PRESETS = {
    # Without any download, in seconds: does everything run?
    "smoke": Preset(
        wanted=lambda task: task.name in _SMOKE,
        seeds=(0, 1),
        limits={"epochs": 2, "train_examples": 128, "test_examples": 60},
        methods=("sgd", "adler", "adler-adam", "adamw"),
        synthetic=True,
    ),
    # What a default is chosen on, and what it is judged on, once.
    "development": Preset(wanted=lambda task: not task.held_back and not task.long),
    "held-back": Preset(wanted=lambda task: task.held_back and not task.long),
    "full": Preset(wanted=lambda task: not task.long, parts=("development", "held-back")),
    # The same for 800, 3,200 and 12,800 steps.
    "horizons": _long(lambda task: task.long and not task.held_back, short=("development",)),
    "long-held-back": _long(lambda task: task.long and task.held_back, short=("held-back",)),
    "long": _long(
        lambda task: task.long,
        parts=("horizons", "long-held-back"),
        short=("development", "held-back"),
    ),
    # A third of the short tasks as they are, and eight times as long.
    "longer": Preset(
        wanted=lambda task: task.name in LONGER,
        seeds=(0,),
        methods=_LONG_METHODS,
        parts=("development", "held-back"),
        horizons=(1, 8),
    ),
}


def read(directories: Sequence[Path]) -> list[Record]:
    """All records in the directories' ``*.jsonl``, by key: `examples.shared.records.read`."""
    return records.read(directories, lambda record: Trial.of(record).key())
