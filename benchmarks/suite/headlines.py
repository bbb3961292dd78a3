"""What the records come to, in a sentence or two: the first lines of the pages on results."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence

from benchmarks.suite import standings
from benchmarks.suite.methods import method
from benchmarks.suite.standings import DEFAULT, REFERENCE, TUNED, Runs
from examples.shared.records import Record

__all__ = ["fullest", "long", "short"]


def short(found: Sequence[Record], runs: Runs, tuned: Runs, losses: Runs) -> list[str]:
    """The recommended optimizer against tuned ones, and among the untuned methods.

    Args:
        found: Records of what is ranked, in any order.
        runs: The same, by contest: `standings.contests`.
        tuned: The same and AdamW's grid.
        losses: As ``tuned``, the best of a grid by test loss.
    """
    count = Counter(standings.verdicts(runs, DEFAULT).values())
    if not count:
        return [f"{method(DEFAULT).label} has not run."]
    name, rates = method(DEFAULT).label, len(method(REFERENCE).grid or ())
    below = count["loss"] + count["dead"] + count["diverged"]
    told = (
        f"**Untuned, {name} ends above the best of {rates} SGD learning rates on {count['win']} of "
        f"{count.total()} short tasks, level with it on {count['tie']}, below on {below}.**"
    )
    failed = count["dead"] + count["diverged"]
    told += f" It failed to train on {failed}." if failed else " It failed to train on none."
    gained = list(standings.gains(runs, DEFAULT).values())
    if gained:
        told += f" Accuracy gained, in the mean: {100 * statistics.fmean(gained):+.1f} points."
    met = {n for by_method in runs.values() if REFERENCE in by_method for n in by_method}
    methods = [n for n in standings.names(found) if n in met]
    ranks, ranked = standings.mean_ranks(runs, methods)
    if ranks:
        place = 1 + sum(rank < ranks[DEFAULT] for rank in ranks.values())
        told += (
            f" Mean rank among {len(methods)} methods, that SGD among them: {ranks[DEFAULT]:.1f}, "
            f"place {place}, over {_tasks(ranked)}."
        )
        if place > 1:
            first = min(ranks, key=lambda n: ranks[n])
            told += f" The first is {method(first).label}, {ranks[first]:.1f}."
    if beside := Counter(standings.verdicts(tuned, DEFAULT, TUNED).values()):
        ratio = standings.loss_ratio(losses, DEFAULT, TUNED)
        told += (
            f" AdamW with a cosine to zero and the best of {len(method(TUNED).grid or ())} rates "
            f"ends below it on {beside['win']} of {beside.total()} tasks, level on {beside['tie']}"
        )
        # (There is none where the grid diverged on every task.)
        told += "." if ratio is None else f"; test loss {ratio:.2f} times AdamW's."
    return [told]


def long(by_horizon: Mapping[str, Sequence[Record]]) -> list[str]:
    """The recommended optimizer beside AdamW with a tuned rate and a schedule, by horizon.

    Args:
        by_horizon: Records by the horizon's title, from the shortest.
    """
    told, missing = [], []
    for title, found in by_horizon.items():
        by_loss = standings.contests(found, "test_loss")
        ratios = standings.loss_ratios(by_loss, DEFAULT, TUNED)
        mean = standings.loss_ratio(by_loss, DEFAULT, TUNED)
        if mean is None:
            missing.append(title)
            continue
        worst = max(ratios, key=lambda task: ratios[task])
        entry = f"after {title} {mean:.3f} times AdamW's on {_tasks(len(ratios))}"
        told.append(entry + (f" (at most {ratios[worst]:.2f})" if len(ratios) > 1 else ""))
    name = method(DEFAULT).label
    lines = []
    if told:
        lines.append(
            f"**{name}'s test loss beside AdamW with a cosine to zero and the best of "
            f"{len(method(TUNED).grid or ())} rates: {'; '.join(told)}.**"
        )
    if missing:
        lines.append(f"Not yet run beside a tuned AdamW: {', '.join(missing)}.")
    return [" ".join(lines)] if lines else [f"{name} has not run."]


def fullest(by_horizon: Mapping[str, Sequence[Record]]) -> str | None:
    """The longest of the horizons where most tasks have been run beside tuned AdamW.

    Args:
        by_horizon: Records by the horizon's title, from the shortest.

    Returns:
        Its title; None where there is no such task.
    """
    counts = {
        title: len(standings.loss_ratios(standings.contests(found, "test_loss"), DEFAULT, TUNED))
        for title, found in by_horizon.items()
    }
    title = max(reversed(counts), key=lambda t: counts[t], default=None)
    return title if title is not None and counts[title] else None


def _tasks(count: int) -> str:
    return f"{count} task{'s' * (count != 1)}"
