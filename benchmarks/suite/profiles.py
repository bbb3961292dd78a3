r"""Performance profiles of time-to-target and steps-to-target, as AlgoPerf scores submissions.

Of a method $s$ and a task $w$, $t_{s,w}$ is the median over seeds of the time to the first
evaluation at which the target is reached, infinite where it is not. With the fastest method's,

$$
r_{s,w} = \frac{t_{s,w}}{\min_{s'} t_{s',w}}, \qquad
\rho_s(\tau) = \frac1n \bigl|\{w : r_{s,w} \le \tau\}\bigr|, \qquad
B_s = \frac{1}{r_{\max} - 1} \int_1^{r_{\max}} \rho_s(\tau)\, d\tau, \quad r_{\max} = 4 .
$$

A task on which no method reaches the target counts, for every method, as not reached. Of a grid of
rates each seed has the fastest, as each study of AlgoPerf's external ruleset has; the time of its
other rates is not counted.

Where AlgoPerf has fixed targets, here a task's target is what AdamW with a cosine and its best rate
reaches *at its end*, the median over seeds: it is the last that could be asked of the others, and
AdamW itself gets there in its last epoch by construction. Time includes everything that a method
does in training, and no evaluation.

Source: AlgoPerf v0.6, github.com/mlcommons/algorithmic-efficiency, docs/DOCUMENTATION.md,
"Scoring"; E. Dolan, J. Moré, arXiv cs/0102001.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from benchmarks.suite import standings
from benchmarks.suite.methods import method
from benchmarks.suite.standings import TUNED
from examples.shared.records import Record

__all__ = [
    "LARGEST",
    "Targets",
    "Unit",
    "benchmark_score",
    "profile",
    "ratios",
    "reached",
    "targets",
    "times",
]

LARGEST = 4.0  # r_max
Unit = Literal["seconds", "steps"]
Targets = Mapping[str, float]  # by task, in the direction of `standings.value`: more is better
Times = Mapping[str, Mapping[str, float]]  # by task, then by method


def targets(
    found: Iterable[Record], by: Literal["loss", "score"] = "loss", reference: str = TUNED
) -> dict[str, float]:
    """What the reference reaches at its end, by task; tasks where it diverged have no target.

    Args:
        found: Records of runs of one length.
        by: The test loss, or the score: the test accuracy where there are classes.
        reference: A method; of its grid each seed has the best rate, by the same measure.
    """
    contests = standings.contests(found, "score" if by == "score" else "test_loss")
    ends: dict[str, list[float]] = {}
    for (task, _), by_method in contests.items():
        record = by_method.get(reference)
        if record is not None and not record["diverged"]:
            ends.setdefault(task, []).append(_curve(record, by)[-1])
    return {task: statistics.median(values) for task, values in ends.items()}


def _curve(record: Record, by: str) -> list[float]:
    """Of an evaluation each, more is better; minus infinity where a value is not finite."""
    accuracy = by == "score" and record["score"] == "accuracy"
    name, sign = ("test_accuracy", 1) if accuracy else ("test_loss", -1)
    curve = record["curves"][name]
    return [-math.inf if value is None else sign * float(value) for value in curve]


def reached(record: Record, target: float, unit: Unit, by: Literal["loss", "score"]) -> float:
    """When a run's evaluation first is at least the target; else infinity.

    Steps are those made until the end of that epoch.
    """
    values = _curve(record, by)
    for epoch, value in enumerate(values, start=1):
        if value >= target:
            if unit == "seconds":
                return math.fsum(s or 0.0 for s in record["curves"]["seconds"][:epoch])
            return float(record["steps"] / len(values) * epoch)
    return math.inf


def times(
    found: Sequence[Record],
    among: Sequence[str],
    goals: Targets,
    unit: Unit,
    by: Literal["loss", "score"] = "loss",
) -> dict[str, dict[str, float]]:
    """``t``, by task and method: of the tasks with a target on which all the methods have run.

    Args:
        found: Records of runs of one length.
        among: The methods; those with a grid count where all its rates have run.
        goals: See `targets`.
        unit: Of the times.
        by: Which measure the targets are of.
    """
    runs: dict[tuple[str, str, int], list[Record]] = {}
    for record in found:
        if record["method"] in among and record["task"] in goals:
            runs.setdefault((record["task"], record["method"], record["seed"]), []).append(record)
    by_task: dict[str, dict[str, list[float]]] = {}
    for (task, name, _), group in runs.items():
        if {r["lr"] for r in group} < set(method(name).grid or ()):
            continue
        fastest = min(reached(r, goals[task], unit, by) for r in group)
        by_task.setdefault(task, {}).setdefault(name, []).append(fastest)
    return {
        task: {name: _median(by_method[name]) for name in among}
        for task, by_method in sorted(by_task.items())
        if all(name in by_method for name in among)
    }


def _median(values: Sequence[float]) -> float:
    """Of an even number the mean of the middle two, which is infinite if one of them is."""
    return statistics.median(values)


def ratios(found: Times) -> dict[str, dict[str, float]]:
    """``r``, by method and task; infinite where the method, or everybody, does not get there."""
    ratios: dict[str, dict[str, float]] = {}
    for task, by_method in found.items():
        fastest = min(by_method.values())
        for name, time in by_method.items():
            ratio = time / fastest if math.isfinite(time) else math.inf
            ratios.setdefault(name, {})[task] = ratio
    return ratios


def profile(of_method: Mapping[str, float], tau: float) -> float:
    """``ρ(τ)`` of a method's ratios."""
    return sum(ratio <= tau for ratio in of_method.values()) / len(of_method)


def benchmark_score(of_method: Mapping[str, float], largest: float = LARGEST) -> float:
    """``B``, exactly: a profile is a step function.

    Examples:
        >>> benchmark_score({"a": 1.0, "b": 2.5, "c": 7.0, "d": float("inf")})
        0.375
    """
    corners = [1.0, *sorted(r for r in of_method.values() if 1 < r < largest), largest]
    area = math.fsum(
        profile(of_method, left) * (right - left) for left, right in itertools.pairwise(corners)
    )
    return area / (largest - 1)
