r"""How sure it is: intervals over seeds and tasks, and a test over tasks.

Tasks are drawn from what one might train, and seeds from what one might draw: an interval that
looks at one alone is too short. The bootstrap here draws tasks with replacement, and of each task
its seeds. The sign test asks only on how many tasks one method is better than another, whatever by
how much. Neither corrects for the number of methods that are compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.suite import standings
from benchmarks.suite.standings import TUNED, Runs

__all__ = ["Comparison", "bootstrap", "compare", "sign_test"]

_DRAWS, _COVERAGE = 10_000, 0.95


class Comparison(NamedTuple):
    """One method against another.

    Attributes:
        ratio: Of final test losses, geometric mean over tasks; below 1 is better.
        low: The ratio's 95 % interval begins here.
        high: And ends here.
        better: The number of tasks on which the mean over seeds is better.
        worse: The number of tasks on which it is worse.
        p: Of the sign test, two-sided.
        tasks: On which both ran.
        seeds: The fewest and the most of a task.
    """

    ratio: float
    low: float
    high: float
    better: int
    worse: int
    p: float
    tasks: int
    seeds: tuple[int, int]


def sign_test(better: int, worse: int) -> float:
    """The probability of a count as uneven as this, or more, if both were equally good.

    Two-sided and exact; ties are left out before.

    Examples:
        >>> sign_test(5, 0), sign_test(3, 3)
        (0.0625, 1.0)
    """
    n, most = better + worse, max(better, worse)
    tail = math.fsum(math.comb(n, k) / 2**n for k in range(most, n + 1))
    return min(1.0, 2 * tail)


def bootstrap(
    by_task: Mapping[str, Sequence[float]], draws: int = _DRAWS, coverage: float = _COVERAGE
) -> tuple[float, float]:
    """The interval of the mean over tasks of the mean over seeds; always the same.

    Args:
        by_task: A number for each seed.
        draws: Of the bootstrap.
        coverage: Of the interval.
    """
    draw = np.random.default_rng(0)
    values = [np.asarray(v) for v in by_task.values()]
    # Of each task as many means over drawn seeds as it may be drawn.
    means = np.stack(
        [v[draw.integers(len(v), size=(draws, len(values), len(v)))].mean(2) for v in values]
    )
    chosen = draw.integers(len(values), size=(draws, len(values)))
    found = means[chosen, np.arange(draws)[:, None], np.arange(len(values))].mean(1)
    low, high = np.quantile(found, [(1 - coverage) / 2, (1 + coverage) / 2])
    return float(low), float(high)


def compare(by_loss: Runs, name: str, other: str = TUNED) -> Comparison | None:
    """One method's final test losses against another's; None where they never met.

    Args:
        by_loss: `standings.contests` by the test loss.
        name: The method.
        other: The other; where it diverged the seed is left out, as in `standings.loss_ratios`.
    """
    by_task = standings.log_ratios(by_loss, name, other)
    if not by_task:
        return None
    means = {task: float(np.mean(values)) for task, values in by_task.items()}
    low, high = bootstrap(by_task)
    better, worse = sum(m < 0 for m in means.values()), sum(m > 0 for m in means.values())
    counts = [len(values) for values in by_task.values()]
    return Comparison(
        ratio=math.exp(float(np.mean(list(means.values())))),
        low=math.exp(low),
        high=math.exp(high),
        better=better,
        worse=worse,
        p=sign_test(better, worse),
        tasks=len(by_task),
        seeds=(min(counts), max(counts)),
    )
