"""The suite's tables, as pure functions of the records."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.suite import headlines, standings
from benchmarks.suite.methods import method
from benchmarks.suite.standings import DEFAULT, LOW_COST, MODES, REFERENCE, TUNED, Runs
from examples.shared.records import Record

__all__ = [
    "BESIDE",
    "BUDGETS",
    "beside",
    "cell",
    "document",
    "head",
    "markdown",
    "row",
]

# Of time, in SGD runs: one, and what the exact engine may cost.
BUDGETS = (1.0, 2.2)
_MARKS = {"win": "+", "tie": "=", "loss": "−", "dead": "†", "diverged": "‡"}


def markdown(found: Sequence[Record], preset: str) -> str:
    """All tables of a preset's records.

    Args:
        found: Records, in any order.
        preset: The preset's name, for the heading.
    """
    timed = [r for r in found if standings.is_compared(r["method"])]
    # What is ranked: without near copies, each of which would cost the others a place.
    main = [r for r in timed if r["method"] not in MODES]
    runs, everything = standings.contests(main), standings.contests(found)
    by_loss = standings.contests(found, "test_loss")
    sections = {
        "verdict": ("Verdict", headlines.short(main, runs, everything, by_loss)),
        "summary": ("In short", _summary(main, runs)),
        "readme": ("In shorter", _summary(main, runs, most=6)),
        "overall": ("Against the best of ten SGD rates", _overall(main, runs)),
        "untuned": ("Against the best of all untuned methods", _untuned(main, runs)),
        "losses": (f"Where {method(DEFAULT).label} is behind", _losses(main, runs)),
        "time": ("Against time", _time(timed, standings.contests(timed))),
        "matrix": ("Method against method", _matrix(main, runs)),
        "failures": ("Runs that failed", _failures(main, runs)),
        "tuned": ("Beside a tuned AdamW", _beside_tuned(found, everything, by_loss)),
        "modes": ("What other measurements do", _modes(found, everything, by_loss)),
        "variants": ("Variants", _variants(found, everything, by_loss)),
        "families": ("Task by task", _families(main, runs)),
    }
    return document(found, preset, sections)


def document(
    found: Sequence[Record], preset: str, sections: Mapping[str, tuple[str, list[str]]]
) -> str:
    """A heading, and the titled sections between the markers by which pages include them."""
    parts = [[f"# Suite, preset {preset}", "", *_heading(found, preset)]]
    for name, (title, lines) in sections.items():
        start, end = (f"<!-- --8<-- [{mark}:{name}] -->" for mark in ("start", "end"))
        while lines and not lines[-1]:
            lines.pop()
        parts.append([f"## {title}", "", start, "", *lines, "", end])
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def _heading(found: Sequence[Record], preset: str) -> list[str]:
    versions: dict[str, set[str]] = {}
    for record in found:
        for name, version in record["versions"].items():
            versions.setdefault(name, set()).add(version)
    told = ", ".join(f"{name} {'/'.join(sorted(v))}" for name, v in sorted(versions.items()))
    tasks, seeds = ({r[name] for r in found} for name in ("task", "seed"))
    held_back = {r["task"] for r in found if r["held_back"]}
    return [
        f"{len(found)} runs: {len(tasks)} tasks ({len(held_back)} held back), {len(seeds)} seeds; "
        f"{told}; {', '.join(sorted({r['device'] for r in found}))}.",
        "",
        f"    python -m benchmarks.suite --data DIR --preset {preset}",
    ]


# --- one row for each method ---------------------------------------------------------------------


def _summary(found: Sequence[Record], runs: Runs, most: int | None = None) -> list[str]:
    methods = _finished(found, runs)
    ranks, _ = standings.mean_ranks(runs, methods)
    untuned = [name for name in methods if method(name).grid is None]
    lines = head(
        "Untuned", "Mean rank", "Above / level with / below the best of ten SGD rates", "Dead",
        "Accuracy gained (points)",
    )  # fmt: skip
    for name in sorted(untuned, key=lambda name: ranks.get(name, 0))[:most]:
        count = Counter(standings.verdicts(runs, name).values())
        gained = list(standings.gains(runs, name).values())
        lost = count["loss"] + count["dead"] + count["diverged"]
        lines.append(
            row(
                method(name).label,
                f"{ranks[name]:.1f}" if ranks else "–",
                f"{count['win']} / {count['tie']} / {lost}",
                count["dead"] + count["diverged"],
                f"{100 * statistics.fmean(gained):+.1f}" if gained else "–",
            )
        )
    met = [task for (task, _), by_method in runs.items() if REFERENCE in by_method]
    ours = sum(DEFAULT in by_method for by_method in runs.values())
    fewer = f" ({method(DEFAULT).label}: {ours})" if 0 < ours < len(met) else ""
    return [
        *lines,
        "",
        f"{len(set(met))} tasks, {len(met)} with their seeds{fewer}, of 3,000 pictures or less. "
        "The best rate is chosen by the test set, anew for each task and seed.",
    ]


def _overall(found: Sequence[Record], runs: Runs) -> list[str]:
    by_loss = standings.contests(found, "test_loss")
    by_train = standings.contests(found, "train_loss")
    methods = _finished(found, runs)
    ranks, ranked = standings.mean_ranks(runs, methods)
    lines = head(
        "Method", "Tasks", "Wins", "Ties", "Losses", "Dead", "Diverged",
        "Accuracy gained (points)", "Mean rank", "Test loss, ratio", "Training loss, ratio",
    )  # fmt: skip
    for name in methods:
        count = Counter(standings.verdicts(runs, name).values())
        gained = list(standings.gains(runs, name).values())
        ratios = [
            standings.loss_ratio(by_loss, name),
            standings.loss_ratio(by_train, name, which="train_loss"),
        ]
        lines.append(
            row(
                method(name).label,
                str(count.total()),
                *(
                    "" if name == REFERENCE else str(count[v])
                    for v in ("win", "tie", "loss", "dead", "diverged")
                ),
                f"{100 * statistics.fmean(gained):+.1f}" if gained else "–",
                f"{ranks[name]:.1f}" if ranks else "–",
                *("–" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
            )
        )
    return [
        *lines,
        "",
        "Wins, ties and losses against the best of ten SGD rates, chosen anew for each task and "
        "seed by the test set itself; a tie is a mean difference within its standard error over "
        "seeds. By test accuracy where there are classes to name, by test loss elsewhere. Dead: in "
        "some seed no better than guessing where an SGD rate is. Diverged: in some seed not "
        "finite. Accuracy gained over that SGD run: mean over the tasks with classes. Mean rank: "
        f"among the {len(methods)} methods here, over the {ranked} tasks on which all of them ran, "
        "of a task the mean over its seeds. Losses: geometric mean of the ratio to the least of "
        f"the ten SGD rates', between {1 / standings.WORST_RATIO:g} and {standings.WORST_RATIO:g}, "
        "which is also what a diverged run counts; training loss: mean over the last epoch's "
        "minibatches.",
    ]


def _untuned(found: Sequence[Record], runs: Runs) -> list[str]:
    untuned = [name for name in standings.names(found) if method(name).grid is None]
    told, count = standings.behind(runs, untuned)
    ranks, _ = standings.mean_ranks(runs, untuned)
    if not told:
        return ["There is no task on which all of them have run."]
    lines = head("Method", "Mean rank", "Best on", "Within 5 % on", "Furthest behind", "where")
    for name in sorted(untuned, key=lambda name: ranks[name]):
        mine = told[name]
        lines.append(
            row(
                method(name).label,
                f"{ranks[name]:.1f}",
                mine.best,
                mine.near,
                f"{100 * mine.furthest:.0f} %",
                mine.task,
            )
        )
    return [
        *lines,
        "",
        f"On the {count} tasks on which all of these have run. Behind: the share of the best "
        "accuracy that is missing, or by how much the test loss is above the least, of means over "
        "the seeds.",
    ]


def _losses(found: Sequence[Record], runs: Runs) -> list[str]:
    """The tasks that the exact method loses to SGD, or on which it is not near the best."""
    untuned = [name for name in standings.names(found) if method(name).grid is None]
    if DEFAULT not in untuned:
        return ["It has not run."]
    given = standings.verdicts(runs, DEFAULT)
    lines = head("Task", method(DEFAULT).label, "Best of ten SGD rates", "Best untuned", "which")
    for task, verdict in given.items():
        here = {c: m for c, m in runs.items() if c[0] == task and DEFAULT in m}
        there = [name for name in untuned if all(name in m for m in here.values())]
        means = {
            name: statistics.fmean(standings.value(m[name]) for m in here.values())
            for name in there
        }
        best = max(means, key=lambda name: means[name])
        told, _ = standings.behind(here, there)
        if verdict in ("win", "tie") and told[DEFAULT].near:
            continue
        cells = [cell(runs, task, name, {}) for name in (DEFAULT, REFERENCE, best)]
        mark = {"win": "", "tie": ""}.get(verdict, " −")
        lines.append(row(task, cells[0] + mark, *cells[1:], method(best).label))
    return [
        *lines,
        "",
        "Test accuracy, or test loss where there are no classes. −: below the best SGD rate by "
        "more than the standard error; without it, more than 5 % behind the best untuned method.",
    ]


def _time(found: Sequence[Record], runs: Runs) -> list[str]:
    seconds = standings.seconds_of(found)
    lines = head(
        "Method",
        "Time / one SGD run",
        "Passes / SGD's",
        *(f"Accuracy at {budget:g} SGD runs (points)" for budget in BUDGETS),
    )
    for name in _finished(found, runs):
        cost = standings.cost_ratio(runs, name, seconds)
        entries = []
        for budget in BUDGETS:
            gained = standings.mean_by_task(
                (
                    contest,
                    standings.value_at(by_method[name], budget * seconds[contest], "seconds")
                    - by_method[REFERENCE]["test_accuracy"],
                )
                for contest, by_method in runs.items()
                if {name, REFERENCE} <= by_method.keys()
                and contest in seconds
                and by_method[name]["score"] == "accuracy"
                and not by_method[REFERENCE]["diverged"]
            )
            entries.append(f"{100 * statistics.fmean(gained.values()):+.1f}" if gained else "–")
        lines.append(
            row(
                method(name).label,
                "–" if cost is None else f"{cost:.2f}",
                f"{_passes(found, name) / _passes(found, REFERENCE):.2f}",
                *entries,
            )
        )
    return [
        *lines,
        "",
        "Time of training without evaluation, of one run (a grid is as many runs as it has rates): "
        "median over tasks. Passes: of ours after the first hundred steps, which all measure. "
        "Accuracy: each run is cut when one SGD run, or so many of "
        "them, would have ended, and compared with the best SGD rate's final accuracy; mean over "
        "the tasks with classes. Between epochs it is interpolated. Schedules that "
        "end with the run lose most by the cut.",
    ]


def _passes(found: Sequence[Record], name: str) -> float:
    """Of a step, as the records say; those that do not are of a measurement at every step."""
    told = {r["passes"] for r in found if r["method"] == name and "passes" in r}
    every_step = name.startswith("adler") and method(name).passes != method(LOW_COST).passes
    return max(told) if told else 3.0 if every_step else method(name).passes


def _matrix(found: Sequence[Record], runs: Runs) -> list[str]:
    methods = _finished(found, runs)
    lines = head("", *(f"{index}" for index in range(1, len(methods) + 1)))
    for index, name in enumerate(methods, start=1):
        entries = []
        for other in methods:
            count = Counter(standings.verdicts(runs, name, other).values())
            lost = count["loss"] + count["dead"] + count["diverged"]
            entries.append("" if name == other else f"{count['win']}/{count['tie']}/{lost}")
        lines.append(row(f"{index} {method(name).label}", *entries))
    return [
        *lines,
        "",
        "Tasks won, tied and lost by the row's method against the column's, by the same rules.",
    ]


def _failures(found: Sequence[Record], runs: Runs) -> list[str]:
    lines = []
    for name in _finished(found, runs):
        for task, given in standings.verdicts(runs, name).items():
            if given in ("dead", "diverged"):
                lines.append(row(method(name).label, task, given))
    return [*head("Method", "Task", "In some seed"), *lines] if lines else ["None."]


def beside(runs: Runs, by_loss: Runs, name: str, other: str) -> list[str] | None:
    """One method against another, on the tasks on which both have run; None if there are none."""
    count = Counter(standings.verdicts(runs, name, other).values())
    if not count:
        return None
    gained = list(standings.gains(runs, name, other).values())
    ratio = standings.loss_ratio(by_loss, name, other)
    return [
        str(count.total()),
        str(count["win"]),
        str(count["tie"]),
        str(count["loss"] + count["dead"] + count["diverged"]),
        f"{100 * statistics.fmean(gained):+.1f}" if gained else "–",
        "–" if ratio is None else f"{ratio:.2f}",
    ]


BESIDE = ("Tasks", "Wins", "Ties", "Losses", "Accuracy gained (points)", "Test loss, ratio")


def _beside_tuned(found: Sequence[Record], runs: Runs, by_loss: Runs) -> list[str]:
    lines = head("Method", *BESIDE)
    for name in standings.names(found):
        cells = None if "@" in name or name == TUNED else beside(runs, by_loss, name, TUNED)
        if cells is not None:
            lines.append(row(method(name).label, *cells))
    if len(lines) == 2:
        return ["It has not run."]
    rates = ", ".join(f"{rate:g}" for rate in method(TUNED).grid or ())
    told, tuned = ({task for task, _ in runs}, {t for (t, _), ran in runs.items() if TUNED in ran})
    ends, grids = standings.at_grid_end(runs, TUNED)
    return [
        *lines,
        "",
        f"Against AdamW with the best of the rates {rates}, chosen by the test set anew for each "
        f"task and seed, under 5 % of warm-up and a cosine to zero, on {len(tuned)} of the "
        f"{len(told)} tasks. The best rate is at an end of the grid in {ends} of {grids} runs.",
    ]


def _modes(found: Sequence[Record], runs: Runs, by_loss: Runs) -> list[str]:
    seconds = standings.seconds_of(found)
    lines = head("Method", *BESIDE, "Skipped steps", "Time / one SGD run")
    for name in (DEFAULT, *MODES):
        cells = ["", "", "", "", "+0.0", "1.00"] if name == DEFAULT else None
        cells = cells or beside(runs, by_loss, name, DEFAULT)
        mine = [by_method[name] for by_method in runs.values() if name in by_method]
        cost = standings.cost_ratio(runs, name, seconds)
        if cells is not None and cost is not None:
            skipped = sum(record["skipped"] for record in mine)
            lines.append(row(method(name).label, *cells, skipped, f"{cost:.2f}"))
    if len(lines) < 4:
        return ["They have not run."]
    return [
        *lines,
        "",
        f"Against {method(DEFAULT).label} at its defaults, on the tasks and seeds on which both "
        "have run. Time: median over them, of training without evaluation; what measures rarely "
        "does so after a hundred steps, about half of these short runs.",
    ]


def _variants(found: Sequence[Record], runs: Runs, by_loss: Runs) -> list[str]:
    lines = head("Variant", *BESIDE)
    for name in standings.names(found):
        base, _, changed = name.partition("@")
        cells = beside(runs, by_loss, name, base) if changed else None
        if cells is not None:
            lines.append(row(f"`{name}`", *cells))
    return [
        *lines,
        "",
        "Each against the same optimizer at its defaults, on the tasks on which both have run.",
    ]


# --- one table for each family of tasks ----------------------------------------------------------


def _families(found: Sequence[Record], runs: Runs) -> list[str]:
    families: dict[str, list[str]] = {}
    for record in sorted(found, key=lambda r: (r["family"], r["task"])):
        tasks = families.setdefault(record["family"], [])
        if record["task"] not in tasks:
            tasks.append(record["task"])
    score = {r["task"]: r["score"] for r in found}
    held_back = {r["task"] for r in found if r["held_back"]}
    lines: list[str] = []
    for family, tasks in families.items():
        heads = [f"{t}{' *' if t in held_back else ''}, {score[t]}" for t in tasks]
        lines += [f"### {family}", "", *head("Method", *heads)]
        for name in standings.names(found):
            given = standings.verdicts(runs, name) if name != REFERENCE else {}
            entries = [cell(runs, task, name, given) for task in tasks]
            if any(entries):
                lines.append(row(method(name).label, *entries))
        lines.append("")
    return [
        *lines,
        "Mean over seeds ± its standard error, at the end of the run; of a grid the best rate of "
        "each seed. Against the best SGD rate: + better, = within the standard error of the "
        "difference, − worse, † dead, ‡ diverged. * Held back.",
    ]


def cell(runs: Runs, task: str, name: str, given: Mapping[str, str]) -> str:
    """A method's scores on a task, mean ± standard error, and the verdict's mark if it is given."""
    here = [by_method for (t, _), by_method in runs.items() if t == task]
    mine = [by_method[name] for by_method in here if name in by_method]
    finite = [abs(standings.value(r)) for r in mine if not r["diverged"]]
    mark = f" {_MARKS[given[task]]}" if task in given else ""
    if not finite:
        return f"NaN{mark}" if mine else ""
    entry = f"{statistics.fmean(finite):.3f}"
    if len(finite) > 1:
        entry += f" ± {statistics.stdev(finite) / math.sqrt(len(finite)):.3f}"
    return entry + mark


# --- Markdown ------------------------------------------------------------------------------------


def _finished(found: Sequence[Record], runs: Runs) -> list[str]:
    """Methods that have met the reference somewhere."""
    met = {n for by_method in runs.values() if REFERENCE in by_method for n in by_method}
    return [name for name in standings.names(found) if name in met]


def row(*entries: Any) -> str:
    """One line of a table."""
    return f"| {' | '.join(map(str, entries))} |"


def head(*entries: str) -> list[str]:
    """The two lines that a table begins with."""
    return [row(*entries), row(*("---" for _ in entries))]
