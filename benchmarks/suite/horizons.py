"""Records of runs of several lengths: which stand for a horizon, and what they are called."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.suite.methods import method
from benchmarks.suite.run import exploded
from benchmarks.suite.tasks import LONG_EPOCH_STEPS, TASKS
from benchmarks.suite.trials import Preset
from examples.shared.records import Record

__all__ = ["at", "cut", "found_horizons", "horizon", "title"]


def horizon(record: Record, preset: Preset) -> int | None:
    """How many times the task's epochs a run is long; None for another preset's run."""
    task = TASKS[record["task"]]
    if not preset.wanted(task):
        return None
    sizes = preset.sizes(task)
    times, left = divmod(record["epochs"], sizes["epochs"])
    same = all(record[name] == sizes[name] for name in ("train_examples", "test_examples"))
    return times if same and not left else None


def found_horizons(found: Iterable[Record], preset: Preset) -> list[int]:
    """The horizons of a preset that some run has, from the shortest."""
    return sorted({h for r in found if (h := horizon(r, preset)) is not None})


def title(times: int, preset: Preset) -> str:
    """A horizon in the words of a table: steps where all tasks agree on them."""
    if all(task.long for task in preset.tasks()):
        return f"{times * LONG_EPOCH_STEPS:,} steps"
    return f"{times} × the epochs"


def at(found: Sequence[Record], preset: Preset, times: int) -> list[Record]:
    """One record for every run of a horizon.

    A method that need not know the number of steps makes the same steps whether it will be stopped
    or not: where it was not run at this horizon, the beginning of its shortest longer run is taken.
    """
    exact: dict[tuple[Any, ...], Record] = {}
    longer: dict[tuple[Any, ...], tuple[int, Record]] = {}
    for record in found:
        here = horizon(record, preset)
        key = record["task"], record["method"], record["lr"], record["seed"]
        if here == times:
            exact[key] = record
        elif here is None or here < times or method(record["method"]).needs_steps:
            continue
        elif key not in longer or here < longer[key][0]:
            longer[key] = here, record
    begun = {
        key: cut(record, times * preset.sizes(TASKS[record["task"]])["epochs"])
        for key, (_, record) in longer.items()
        if key not in exact
    }
    return [*exact.values(), *begun.values()]


def cut(record: Record, epochs: int) -> dict[str, Any]:
    """The record that the run would have had, had it ended after so many epochs.

    Its curves say all of it but how many steps had been skipped or clipped, which is left out. In
    records without the first minibatch's loss, only a loss that is not finite is a divergence.
    """
    curves = {name: values[:epochs] for name, values in record["curves"].items()}
    last = {name: curves[name][-1] for name in ("train_loss", "test_loss", "test_accuracy")}
    told = [value for value in curves["test_accuracy"] if value is not None]
    steps = epochs * (record["train_examples"] // TASKS[record["task"]].batch_size)
    ended = len(curves["train_loss"]) < epochs
    first = record.get("first_loss", math.inf)
    losses = (
        math.nan if last[name] is None else last[name] for name in ("train_loss", "test_loss")
    )
    return {
        **{name: value for name, value in record.items() if name not in ("skipped", "clipped")},
        **last,
        "epochs": epochs,
        "steps": min(steps, record["steps"]),
        "best_test_accuracy": max(told, default=None),
        "diverged": ended or exploded(math.nan if first is None else first, *losses),
        "seconds": sum(value or 0.0 for value in curves["seconds"]),
        "curves": curves,
    }
