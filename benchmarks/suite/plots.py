"""The suite's figures: accuracy against steps and time, and what every constant matters."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from benchmarks.suite import standings
from benchmarks.suite.methods import method
from benchmarks.suite.standings import REFERENCE
from benchmarks.suite.variants import VARIED, defaults, variant
from examples.shared.records import Record

__all__ = ["Sweep", "curves", "draw", "sensitivity", "sweeps"]

# Okabe and Ito's colours, told apart by colour-blind readers; markers tell them apart in grey.
_COLOURS = ("#0072B2", "#E69F00", "#000000", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442")
_LINES = ("-", "--", ":", "-.")
_MARKERS = "so^Dv*Px"
_LONGEST = 3.0  # SGD runs
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "adler",  # else the identifiers are random
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
}


def draw(found: Sequence[Record], directory: Path) -> list[Path]:
    """Draws what the records allow, as PNG and SVG; the same records, the same SVG."""
    written = []
    for name, make in {"accuracy": curves, "sensitivity": sensitivity}.items():
        with mpl.rc_context(_STYLE):
            figure = make(found)
            if figure is None:
                continue
            for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
                path = directory / f"{name}{suffix}"
                figure.savefig(path, dpi=150, metadata=metadata)
                written.append(path)
    return written


# --- accuracy against steps and against time -----------------------------------------------------


def curves(found: Sequence[Record]) -> Figure | None:
    """Mean over tasks of the accuracy above the best SGD rate's final one.

    Only tasks with classes. A run that is over keeps its last accuracy.
    """
    runs, seconds = standings.contests(found), standings.seconds_of(found)
    points = {"share": np.linspace(0, 1, 41), "seconds": np.linspace(0, _LONGEST, 61)}
    lines: dict[str, dict[str, dict[str, list[list[float]]]]] = {unit: {} for unit in points}
    for contest, by_method in runs.items():
        best = by_method.get(REFERENCE)
        if best is None or best["score"] != "accuracy" or contest not in seconds:
            continue
        for name, record in by_method.items():
            if not standings.is_compared(name):
                continue
            for unit, grid in points.items():
                scale = seconds[contest] if unit == "seconds" else 1.0
                known: Literal["seconds", "share"] = "seconds" if unit == "seconds" else "share"
                line = [
                    standings.value_at(record, scale * point, known) - best["test_accuracy"]
                    for point in grid.tolist()
                ]
                lines[unit].setdefault(name, {}).setdefault(contest[0], []).append(line)
    names = [name for name in standings.names(found) if name in lines["share"]]
    if not names:
        return None
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (unit, grid) in zip(axes, points.items(), strict=True):
        axis.axhline(0, color="0.6", linewidth=0.8)
        for index, name in enumerate(names):
            axis.plot(
                grid,
                100 * np.mean([np.mean(s, axis=0) for s in lines[unit][name].values()], axis=0),
                _LINES[index // len(_COLOURS) % len(_LINES)],
                color=_COLOURS[index % len(_COLOURS)],
                linewidth=2.4 if name.startswith("adler") else 1.0,
                marker=_MARKERS[index % len(_MARKERS)],
                markevery=(index % 5, 10),
                label=method(name).label,
            )
    axes[0].set_xlabel("Steps (share of the run)")
    axes[1].set_xlabel("Training time (SGD runs)")
    axes[0].set_ylabel("Test accuracy above the best SGD rate's last (points)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))
    figure.suptitle("Mean over the tasks with classes that a method has run on")
    return figure


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
    figure = Figure(figsize=(max(5.0, 3.2 * len(options)), 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(options), squeeze=False, sharey="row", sharex="col")
    looks: dict[str, int] = {}
    for column, option in enumerate(options):
        chosen = [sweep for sweep in swept if sweep.option == option]
        for sweep in chosen:
            index = looks.setdefault(_title(sweep), len(looks))
            style = {
                "color": _COLOURS[index % len(_COLOURS)],
                "marker": _MARKERS[index % len(_MARKERS)],
                "label": _title(sweep),
            }
            gained, ratios = [], []
            for name in sweep.methods.values():
                gains = list(standings.gains(runs, name, sweep.base).values())
                ratio = standings.loss_ratio(by_loss, name, sweep.base)
                gained.append(100 * statistics.fmean(gains) if gains else np.nan)
                ratios.append(np.nan if ratio is None else ratio)
            at = [_place(option, value) for value in sweep.methods]
            axes[0, column].plot(at, gained, **style)
            axes[1, column].plot(at, ratios, **style)
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
