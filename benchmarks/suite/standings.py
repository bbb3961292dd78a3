r"""Who is better than whom: numbers from records, without any drawing or writing.

Compared are runs of one task and one seed, which began at the same weights and saw the same
batches. The *score* is the test accuracy at the end where there are classes, else the test loss,
which counts downwards. Of a method with a grid the rate with the best score is taken, anew for each
task and seed: the most that tuning could give.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from benchmarks.suite.methods import METHODS, method
from examples.shared.records import Record

__all__ = [
    "DEFAULT",
    "LOW_COST",
    "MODES",
    "REFERENCE",
    "TUNED",
    "Behind",
    "Contest",
    "Criterion",
    "Runs",
    "Verdict",
    "at_chance",
    "at_grid_end",
    "behind",
    "contests",
    "cost_ratio",
    "gains",
    "is_compared",
    "log_ratios",
    "loss_ratio",
    "loss_ratios",
    "mean_by_task",
    "mean_ranks",
    "names",
    "seconds_of",
    "value",
    "value_at",
    "verdict",
    "verdicts",
]

REFERENCE = "sgd"
# AdamW with a tuned rate and a cosine over a known horizon: on short tasks beside the ranks, and
# what all is measured by on long ones.
TUNED = "adamw-cosine-tuned"
# What the library recommends, and the same measured otherwise: near copies, which are not ranked.
DEFAULT = "adler-schedulefree"
LOW_COST = "adler-schedulefree-low-cost"
MODES = ("adler-schedulefree-every-step", "adler-schedulefree-difference", LOW_COST)
Contest = tuple[str, int]  # task, seed
Runs = Mapping[Contest, Mapping[str, Record]]
# The last is the least test loss after any epoch.
Criterion = Literal["score", "test_loss", "train_loss", "lowest"]
Verdict = Literal["win", "tie", "loss", "dead", "diverged"]

# No better than guessing: within three standard errors of its accuracy, or of its loss to 2 %.
_ERRORS, _LOSS_MARGIN = 3.0, 0.98
# A run that diverged counts as this many times the reference's loss, and none as more, or less
# than one part of as many.
WORST_RATIO = 10.0
_LEAST_LOSS = 1e-6  # a loss may be zero to six digits
_NEAR = 0.05


def names(found: Iterable[Record]) -> list[str]:
    """The methods that are there: those of the registry in its order, then variants."""
    there = {r["method"] for r in found}
    return [n for n in METHODS if n in there] + sorted(there - METHODS.keys())


def is_compared(name: str) -> bool:
    """Whether a method stands in the ranks: a variant does not, nor a grid but the reference's."""
    return "@" not in name and (name == REFERENCE or method(name).grid is None)


def value(record: Record) -> float:
    """The score, so that more is better; minus infinity for a run that diverged."""
    if record["diverged"]:
        return -math.inf
    return float(record["test_accuracy"] if record["score"] == "accuracy" else -record["test_loss"])


def contests(found: Iterable[Record], by: Criterion = "score") -> Runs:
    """Records by task and seed, then by method; of a complete grid the best, else none.

    Args:
        found: Records, in any order.
        by: What the best of a grid has the best of.

    Raises:
        ValueError: If runs of one task and seed were not on the same examples.
    """
    grids: dict[tuple[Contest, str], list[Record]] = {}
    for record in found:
        contest = record["task"], record["seed"]
        grids.setdefault((contest, record["method"]), []).append(record)
    _check_examples(r for group in grids.values() for r in group)
    runs: dict[Contest, dict[str, Record]] = {}
    for (contest, name), group in sorted(grids.items()):
        rates = method(name).grid
        if rates is not None:
            group = [r for r in group if r["lr"] in rates]  # a grid may have been moved since
            if len({r["lr"] for r in group}) < len(rates):
                continue
        smallest_first = sorted(group, key=lambda r: r["lr"] or 0.0)
        runs.setdefault(contest, {})[name] = max(
            smallest_first, key=value if by == "score" else lambda record: -_loss(record, by)
        )
    return runs


def _check_examples(found: Iterable[Record]) -> None:
    """Refuses to compare runs on different examples."""
    first: dict[tuple[Contest, str], Record] = {}
    for record in found:
        for key in ("data", "chance"):  # older records have a chance only
            mine = record.get(key)
            if mine is None or mine != mine:
                continue
            other = first.setdefault(((record["task"], record["seed"]), key), record)
            theirs = other[key]
            # A chance may be a loss, which another machine sums up in another order.
            same = math.isclose(mine, theirs, rel_tol=1e-5) if key == "chance" else mine == theirs
            if not same:
                raise ValueError(
                    f"{record['task']}, seed {record['seed']}: {record['method']} and "
                    f"{other['method']} have not seen the same examples ({key} {mine} and "
                    f"{theirs}); remove one of them from the records and run it again"
                )


def _pairs(runs: Runs, name: str, other: str) -> dict[str, list[tuple[Record, Record]]]:
    """By task, the seeds on which both ran."""
    found: dict[str, list[tuple[Record, Record]]] = {}
    for (task, _), by_method in sorted(runs.items()):
        if name in by_method and other in by_method:
            found.setdefault(task, []).append((by_method[name], by_method[other]))
    return found


# --- verdicts ------------------------------------------------------------------------------------


def at_chance(record: Record) -> bool:
    """Whether a run that did not diverge learned nothing."""
    chance = record["chance"]
    if record["diverged"] or chance is None:
        return False
    if record["score"] == "loss":
        return bool(record["test_loss"] >= _LOSS_MARGIN * chance)
    error = math.sqrt(chance * (1 - chance) / record["test_examples"])
    return bool(record["test_accuracy"] <= chance + _ERRORS * error)


def verdict(pairs: Sequence[tuple[Record, Record]]) -> Verdict:
    """One method against another on a task.

    Args:
        pairs: The method's record and the other's, seed by seed.

    Returns:
        ``"diverged"`` or ``"dead"`` if any run of the method is, where the other's is not; else
        ``"tie"`` if the mean difference of scores over the seeds is within its standard error
        (with one seed, if they are equal), else ``"win"`` or ``"loss"``.
    """
    if any(mine["diverged"] and not other["diverged"] for mine, other in pairs):
        return "diverged"
    if any(
        at_chance(mine) and value(other) > value(mine) and not at_chance(other)
        for mine, other in pairs
    ):
        return "dead"
    # Where both diverged, neither is better.
    differences = [
        0.0 if mine["diverged"] and other["diverged"] else value(mine) - value(other)
        for mine, other in pairs
    ]
    mean = statistics.fmean(differences)
    error = 0.0
    if len(differences) > 1 and math.isfinite(mean):
        error = statistics.stdev(differences) / math.sqrt(len(differences))
    # Of two seeds, one of them even, mean and error are equal: not for rounding to decide, which
    # differs between versions of Python.
    if abs(mean) <= error * (1 + 1e-12):
        return "tie"
    return "win" if mean > 0 else "loss"


def verdicts(runs: Runs, name: str, other: str = REFERENCE) -> dict[str, Verdict]:
    """By task, a method against another."""
    return {task: verdict(pairs) for task, pairs in _pairs(runs, name, other).items()}


# --- averages over the suite ---------------------------------------------------------------------


def gains(runs: Runs, name: str, other: str = REFERENCE) -> dict[str, float]:
    """By task that has classes, the accuracy above the other's, mean over seeds.

    A run that diverged has the accuracy of guessing.
    """
    return {
        task: statistics.fmean(_accuracy(mine) - _accuracy(theirs) for mine, theirs in pairs)
        for task, pairs in _pairs(runs, name, other).items()
        if pairs[0][0]["score"] == "accuracy"
    }


def _accuracy(record: Record) -> float:
    return float(record["chance"] if record["diverged"] else record["test_accuracy"])


def mean_ranks(runs: Runs, among: Sequence[str]) -> tuple[dict[str, float], int]:
    """The mean rank of each method, 1 the best, and over how many tasks.

    Only where all have run; equal scores share the mean of their ranks. Of a task the mean over its
    seeds counts, so that those with more seeds weigh no more.
    """
    by_task: dict[str, list[list[float]]] = {}
    for (task, _), by_method in sorted(runs.items()):
        if all(name in by_method for name in among):
            by_task.setdefault(task, []).append([value(by_method[name]) for name in among])
    if not by_task:
        return {}, 0
    ranks = np.mean([_ranks(np.array(scores)).mean(0) for scores in by_task.values()], axis=0)
    return dict(zip(among, ranks.tolist(), strict=True)), len(by_task)


def _ranks(scores: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Of each row's entries, 1 the largest."""
    better = (scores[:, None, :] > scores[:, :, None]).sum(2)
    equal = (scores[:, None, :] == scores[:, :, None]).sum(2)
    ranks: np.ndarray[Any, Any] = better + (equal + 1) / 2
    return ranks


class Behind(NamedTuple):
    """How far a method is behind the best of several, on the tasks on which all have run.

    Attributes:
        best: The number of tasks on which it is the best, alone or among others.
        near: The number of tasks on which it is at most 5 % behind.
        furthest: The largest distance, as a fraction.
        task: Where that is.
    """

    best: int
    near: int
    furthest: float
    task: str


def behind(runs: Runs, among: Sequence[str]) -> tuple[dict[str, Behind], int]:
    """Each method's distance from the best of them, and over how many tasks.

    The distance is the share of the best accuracy that is missing, or by how much the test loss is
    above the least; of means over the seeds. A run that diverged has the accuracy of guessing, or
    ten times the least loss.
    """
    tasks: dict[str, list[Mapping[str, Record]]] = {}
    for (task, _), by_method in sorted(runs.items()):
        if all(name in by_method for name in among):
            tasks.setdefault(task, []).append(by_method)
    distances: dict[str, dict[str, float]] = {name: {} for name in among}
    for task, seeds in tasks.items():
        if seeds[0][among[0]]["score"] == "accuracy":
            means = {n: statistics.fmean(_accuracy(s[n]) for s in seeds) for n in among}
            most = max(means.values())
            found = {n: 1 - mean / most for n, mean in means.items()}
        else:
            losses = {n: statistics.fmean(_loss(s[n], "test_loss") for s in seeds) for n in among}
            least = min(losses.values())
            found = {n: min(WORST_RATIO, loss / least) - 1 for n, loss in losses.items()}
        for name, distance in found.items():
            distances[name][task] = distance
    if not tasks:
        return {}, 0
    told = {}
    for name, by_task in distances.items():
        furthest = max(by_task, key=lambda task: by_task[task])
        told[name] = Behind(
            best=sum(d == 0 for d in by_task.values()),
            near=sum(d <= _NEAR for d in by_task.values()),
            furthest=by_task[furthest],
            task=furthest,
        )
    return told, len(tasks)


def _loss(record: Record, which: str) -> float:
    if record["diverged"]:
        return math.inf
    if which == "lowest":
        loss = min(float(x) for x in record["curves"]["test_loss"] if x is not None)
    else:
        loss = float(record[which])
    return max(loss, _LEAST_LOSS)


def loss_ratio(
    by_loss: Runs, name: str, other: str = REFERENCE, which: Criterion = "test_loss"
) -> float | None:
    """The geometric mean over tasks of `loss_ratios`; below 1 is better. None without a task."""
    logarithms = [math.log(r) for r in loss_ratios(by_loss, name, other, which).values()]
    return math.exp(statistics.fmean(logarithms)) if logarithms else None


def loss_ratios(
    by_loss: Runs, name: str, other: str = REFERENCE, which: Criterion = "test_loss"
) -> dict[str, float]:
    """By task, a loss over the other's, geometric mean over its seeds.

    Args:
        by_loss: `contests` by that loss.
        name: The method.
        other: Usually the best of ten SGD rates, here the one with the least loss.
        which: At the end the test loss, or the training loss (the mean over the last epoch's
            minibatches); or the lowest test loss of the run.
    """
    logarithms = log_ratios(by_loss, name, other, which)
    return {task: math.exp(statistics.fmean(known)) for task, known in logarithms.items()}


def at_grid_end(by_loss: Runs, name: str) -> tuple[int, int]:
    """In how many contests the best rate was the least or the largest that was tried, and of all.

    Args:
        by_loss: `contests` by the loss that decides.
        name: A method with a grid.
    """
    ends = {(method(name).grid or ())[i] for i in (0, -1)}
    best = [runs[name]["lr"] for runs in by_loss.values() if name in runs]
    return sum(lr in ends for lr in best), len(best)


def log_ratios(
    by_loss: Runs, name: str, other: str = REFERENCE, which: Criterion = "test_loss"
) -> dict[str, list[float]]:
    """The logarithms of `loss_ratios`, seed by seed; but those where the other diverged."""
    logarithms = {
        task: [math.log(_ratio(*pair, which)) for pair in pairs if not pair[1]["diverged"]]
        for task, pairs in _pairs(by_loss, name, other).items()
    }
    return {task: known for task, known in logarithms.items() if known}


def _ratio(mine: Record, theirs: Record, which: str) -> float:
    if mine["diverged"]:
        return WORST_RATIO
    return min(WORST_RATIO, max(1 / WORST_RATIO, _loss(mine, which) / _loss(theirs, which)))


# --- time ----------------------------------------------------------------------------------------


def seconds_of(found: Iterable[Record], name: str = REFERENCE) -> dict[Contest, float]:
    """How long one run takes: of a grid the median over the rates that did not diverge."""
    seconds: dict[Contest, list[float]] = {}
    for record in found:
        if record["method"] == name and not record["diverged"]:
            seconds.setdefault((record["task"], record["seed"]), []).append(record["seconds"])
    return {contest: statistics.median(values) for contest, values in seconds.items()}


def mean_by_task(values: Iterable[tuple[Contest, float]]) -> dict[str, float]:
    """Of a task the mean over its seeds, so that those with more seeds weigh no more."""
    by_task: dict[str, list[float]] = {}
    for (task, _), found in values:
        by_task.setdefault(task, []).append(found)
    return {task: statistics.fmean(found) for task, found in by_task.items()}


def cost_ratio(runs: Runs, name: str, seconds: Mapping[Contest, float]) -> float | None:
    """A run's time over that of another's: the median over tasks, of a task the mean over seeds.

    Args:
        runs: See `contests`.
        name: The method.
        seconds: Of the other, by task and seed: `seconds_of`.
    """
    ratios = mean_by_task(
        (contest, by_method[name]["seconds"] / seconds[contest])
        for contest, by_method in runs.items()
        if name in by_method and contest in seconds and not by_method[name]["diverged"]
    )
    return statistics.median(ratios.values()) if ratios else None


def value_at(record: Record, where: float, unit: Literal["seconds", "share"]) -> float:
    """The accuracy at a moment of the run, between two epochs on the line through them.

    Before the first epoch the line begins at guessing. After the end, and after a divergence, the
    last accuracy stands; the latter's is that of guessing.

    Args:
        record: Of a task with classes.
        where: Seconds of training, or the share of the run's steps.
        unit: Which of the two.
    """
    curves = record["curves"]
    accuracy = [record["chance"] if a is None else a for a in curves["test_accuracy"]]
    if record["diverged"]:
        accuracy[-1] = record["chance"]
    if unit == "seconds":
        moments = np.cumsum(curves["seconds"])
    else:
        moments = np.arange(1, len(accuracy) + 1) / record["epochs"]
    return float(np.interp(where, [0.0, *moments], [record["chance"], *accuracy]))
