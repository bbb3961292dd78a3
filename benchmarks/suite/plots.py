"""The suite's figures: accuracy against steps and time, and what every constant matters."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from benchmarks.suite import standings
from benchmarks.suite.methods import method
from benchmarks.suite.standings import MODES, REFERENCE
from benchmarks.suite.variants import VARIED, defaults, variant
from examples.shared.plots import COLOURS, MARKERS, METHODS, colours_of, finish, panels, save, style
from examples.shared.records import Record

__all__ = ["Sweep", "curves", "draw", "sensitivity", "sweeps"]

Values = np.ndarray[Any, Any]

_LINES = ("-", "--", ":", "-.")
_LONGEST = 3.0  # SGD runs
# Always drawn, where they have run; and of the others as many as there are colours left.
_FIRST = (REFERENCE, "adler", "adler-adam", "adler-schedulefree", "adler-muon", "adamw")


def draw(found: Sequence[Record], directory: Path) -> list[Path]:
    """Draws what the records allow, as PNG and SVG; the same records, the same SVG."""
    written = []
    for name, make in {"accuracy": curves, "sensitivity": sensitivity}.items():
        with style():
            figure = make(found)
        if figure is not None:
            written += save(figure, directory, name)
    return written


# --- accuracy against steps and against time -----------------------------------------------------


def curves(found: Sequence[Record]) -> Figure | None:
    """Mean over tasks of the accuracy above the best SGD rate's final one.

    Only tasks with classes. A run that is over keeps its last accuracy. There is a colour for
    eight methods: this library's, AdamW at its default, the best SGD rate, and of the others those
    with the best mean rank.
    """
    runs, seconds = standings.contests(found), standings.seconds_of(found)
    points = {"share": np.linspace(0, 1, 41), "seconds": np.linspace(0, _LONGEST, 61)}
    lines: dict[str, dict[str, dict[str, list[list[float]]]]] = {unit: {} for unit in points}
    for contest, by_method in runs.items():
        best = by_method.get(REFERENCE)
        if best is None or best["score"] != "accuracy" or contest not in seconds:
            continue
        for name, record in by_method.items():
            if not standings.is_compared(name) or name in MODES:
                continue
            for unit, grid in points.items():
                scale = seconds[contest] if unit == "seconds" else 1.0
                known: Literal["seconds", "share"] = "seconds" if unit == "seconds" else "share"
                line = [
                    standings.value_at(record, scale * point, known) - best["test_accuracy"]
                    for point in grid.tolist()
                ]
                lines[unit].setdefault(name, {}).setdefault(contest[0], []).append(line)
    names = _drawn([name for name in standings.names(found) if name in lines["share"]], runs)
    if not names:
        return None
    colours = colours_of(names)
    figure, (axes,) = panels(1, 2, (10, 5.4), sharey=True)
    for axis, (unit, grid) in zip(axes, points.items(), strict=True):
        axis.axhline(0, color="0.6", linewidth=0.8)
        for index, (name, mean) in enumerate(zip(names, _means(lines[unit], names), strict=True)):
            axis.plot(
                grid,
                mean,
                color=colours[name],
                linewidth=2.4 if name.startswith("adler") else 1.0,
                marker=MARKERS[index],
                markevery=(index % 5, 10),
                label=method(name).label,
            )
    axes[0].set_ylim(*_range([line for by in lines.values() for line in _means(by, names)]))
    axes[0].set_xlabel("Steps (share of the run)")
    axes[1].set_xlabel("Training time (SGD runs)")
    axes[0].set_ylabel("Test accuracy above the best SGD rate's last (points)")
    title = "Mean over the tasks with classes that a method has run on"
    others = [name for name in names if name not in _FIRST]
    if others:
        title += f"; of the other methods the {len(others)} of best mean rank"
    return finish(figure, title)


def _means(
    lines: Mapping[str, Mapping[str, list[list[float]]]], names: Sequence[str]
) -> list[Values]:
    """Each method's line in points: the mean over tasks, of a task over its seeds."""
    return [
        100 * np.mean([np.mean(seeds, axis=0) for seeds in lines[name].values()], axis=0)
        for name in names
    ]


def _range(lines: Sequence[Values]) -> tuple[float, float]:
    """Where the methods differ: from what the last of them has after a third of the axis.

    The climb from guessing, where all are alike, would take most of the height.
    """
    low = min(float(line[len(line) // 3 :].min()) for line in lines)
    high = max(float(line.max()) for line in lines)
    margin = 0.05 * (high - low)
    return low - margin, high + margin


def _drawn(names: Sequence[str], runs: standings.Runs) -> list[str]:
    """At most as many methods as there are colours, in the order of the registry."""
    first = [name for name in names if name in _FIRST]
    others = [name for name in names if name not in _FIRST]
    ranks, _ = standings.mean_ranks(runs, list(names))
    others.sort(key=lambda name: ranks.get(name, 0.0))
    chosen = {*first, *others[: len(COLOURS) - len(first)]}
    return [name for name in names if name in chosen]


# --- what every constant matters -----------------------------------------------------------------


class Sweep(NamedTuple):
    """One option of an optimizer at several values, all others the same.

    Attributes:
        base: A name in `variants.VARIED`.
        option: The option's name.
        others: The other options that are not at their default.
        methods: The methods' names by value, from the smallest; the default may be among them.
    """

    base: str
    option: str
    others: Mapping[str, Any]
    methods: dict[float, str]


def sweeps(names: Sequence[str]) -> list[Sweep]:
    """What the variants among the methods vary, one option at a time.

    Options without a number (``max_kl=None``) are no points of a sweep.

    Examples:
        >>> [sweep] = sweeps(["adler", "adler@lr=0.5", "adler@lr=2.0", "sgd"])
        >>> sweep.option, sweep.methods
        ('lr', {0.5: 'adler@lr=0.5', 1.0: 'adler', 2.0: 'adler@lr=2.0'})
    """
    points: dict[tuple[str, str, str], tuple[dict[str, Any], dict[float, str]]] = {}
    for name in names:
        if name in VARIED:
            base = name
            changed: dict[str, Any] = {}
        elif "@" in name:
            base, changed = variant(name)
        else:
            continue
        usual = defaults(base)
        options = {**usual, **changed}
        for option, value in options.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            others = {n: v for n, v in options.items() if n != option and v != usual[n]}
            key = base, option, repr(sorted(others.items(), key=lambda item: item[0]))
            points.setdefault(key, (others, {}))[1][float(value)] = name
    return [
        Sweep(base, option, others, dict(sorted(by_value.items())))
        for (base, option, _), (others, by_value) in points.items()
        if len(by_value) > 1
    ]


def sensitivity(found: Sequence[Record]) -> Figure | None:
    """Accuracy and test loss against each constant, beside the same optimizer at its defaults."""
    runs, by_loss = standings.contests(found), standings.contests(found, "test_loss")
    swept = sweeps(standings.names(found))
    options = list(dict.fromkeys(sweep.option for sweep in swept))
    if not options:
        return None
    size = max(5.0, 3.2 * len(options)), 5.4
    figure, axes = panels(2, len(options), size, sharey="row", sharex="col")
    # The optimizer has its colour; the marker and the line say what else is not at its default.
    looks: dict[str, list[str]] = {}
    for column, option in enumerate(options):
        chosen = [sweep for sweep in swept if sweep.option == option]
        for sweep in chosen:
            mine = looks.setdefault(sweep.base, [])
            if _title(sweep) not in mine:
                mine.append(_title(sweep))
            index = mine.index(_title(sweep))
            look = {
                "color": METHODS[sweep.base],
                "marker": MARKERS[index % len(MARKERS)],
                "linestyle": _LINES[index % len(_LINES)],
                "label": _title(sweep),
            }
            gained, ratios = [], []
            for name in sweep.methods.values():
                gains = list(standings.gains(runs, name, sweep.base).values())
                ratio = standings.loss_ratio(by_loss, name, sweep.base)
                gained.append(100 * statistics.fmean(gains) if gains else np.nan)
                ratios.append(np.nan if ratio is None else ratio)
            at = [_place(option, value) for value in sweep.methods]
            axes[0, column].plot(at, gained, **look)
            axes[1, column].plot(at, ratios, **look)
        _finish(list(axes[:, column]), option, [v for sweep in chosen for v in sweep.methods])
    axes[0, 0].set_ylabel("Accuracy above\nthe default's (points)")
    axes[1, 0].set_ylabel("Test loss over the\ndefault's (geometric mean)")
    return figure


def _title(sweep: Sweep) -> str:
    others = ", ".join(f"{name}={value!r}" for name, value in sorted(sweep.others.items()))
    return f"{sweep.base} ({others})" if others else sweep.base


def _place(option: str, value: float) -> float:
    """Where a value stands on the axis: a discount by the number of steps that it remembers."""
    return 1 / (1 - value) if option == "beta" else value


def _finish(axes: Sequence[Axes], option: str, values: Sequence[float]) -> None:
    for axis in axes:
        axis.axhline(0 if axis is axes[0] else 1, color="0.6", linewidth=0.8)
        if min(values) > 0:
            axis.set_xscale("log")
        ticks = sorted(set(values))
        axis.set_xticks([_place(option, t) for t in ticks], [f"{t:g}" for t in ticks])
        axis.xaxis.set_minor_locator(NullLocator())
    axes[0].legend(fontsize="small")
    axes[-1].set_xlabel(option)
