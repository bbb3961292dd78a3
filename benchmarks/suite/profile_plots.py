"""Two figures: performance profiles, and one that says it all at a glance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.suite import profiles, standings
from benchmarks.suite.methods import method
from benchmarks.suite.profiles import LARGEST, Unit
from benchmarks.suite.standings import DEFAULT, MODES, REFERENCE, TUNED
from examples.shared.plots import (
    COLOURS,
    GREY,
    METHODS,
    colours_of,
    finish,
    panels,
    save,
    style,
)
from examples.shared.records import Record

__all__ = ["as_good", "draw", "performance", "untuned"]

_AXES: dict[Unit, str] = {"seconds": "training time", "steps": "steps"}


def draw(found: Sequence[Record], directory: Path) -> list[Path]:
    """Draws what the records of one length allow, as PNG and SVG."""
    written = []
    for name, make in {"profiles": performance, "untuned": as_good}.items():
        with style():
            figure = make(found)
        if figure is not None:
            written += save(figure, directory, name)
    return written


def untuned(found: Sequence[Record]) -> list[str]:
    """What competes: untuned methods, run on every task that the default was.

    Variants and near copies do not compete.
    """
    tasks_of: dict[str, set[str]] = {}
    for record in found:
        tasks_of.setdefault(record["method"], set()).add(record["task"])
    needed = tasks_of.get(DEFAULT, set())
    return [
        name
        for name in standings.names(found)
        if standings.is_compared(name)
        and name not in (REFERENCE, *MODES)
        and needed <= tasks_of[name]
    ]


def performance(found: Sequence[Record]) -> Figure | None:
    """The share of tasks on which a method is at most so many times slower than the fastest.

    Of more methods than there are colours those with the best scores by time.
    """
    goals, names = profiles.targets(found), untuned(found)
    of_unit: dict[Unit, Mapping[str, Mapping[str, float]]] = {
        unit: profiles.ratios(profiles.times(found, names, goals, unit)) for unit in _AXES
    }
    if not of_unit["seconds"]:
        return None
    score = {name: profiles.benchmark_score(of_unit["seconds"][name]) for name in names}
    shown = sorted(names, key=lambda name: -score[name])[: len(COLOURS)]
    colours = colours_of(sorted(shown, key=lambda name: name not in METHODS))
    figure, (axes,) = panels(1, 2, (10, 4.6), sharey=True)
    for axis, (unit, ratios) in zip(axes, of_unit.items(), strict=True):
        for name in reversed(shown):
            _steps(axis, ratios[name], name, colours[name])
        axis.set_xlabel(f"τ: {_AXES[unit]} over the fastest method's")
        axis.set_xlim(1, LARGEST)
        axis.set_ylim(0, 1.02)
    axes[0].set_ylabel("Share of tasks brought to the target")
    tasks = len(next(iter(of_unit["seconds"].values())))
    return finish(figure, f"To the loss where tuned AdamW ends: untuned methods, {tasks} tasks")


def _steps(axis: Axes, ratios: Mapping[str, float], name: str, colour: str) -> None:
    corners = [1.0, *sorted(r for r in ratios.values() if 1 < r <= LARGEST), LARGEST]
    axis.step(
        corners,
        [profiles.profile(ratios, tau) for tau in corners],
        where="post",
        color=colour,
        linewidth=2.4 if name.startswith("adler") else 1.2,
        label=method(name).label,
    )


def as_good(found: Sequence[Record]) -> Figure | None:
    """Bars: on how many tasks an untuned method ends as well as AdamW with its best rate."""
    runs, names = standings.contests(found), untuned(found)
    counts: dict[str, tuple[int, int]] = {}
    for name in names:
        given = standings.verdicts(runs, name, TUNED).values()
        if given:
            counts[name] = sum(v in ("win", "tie") for v in given), len(given)
    if not counts:
        return None
    tasks = max(total for _, total in counts.values())
    whole = {name: good for name, (good, total) in counts.items() if total == tasks}
    order = sorted(whole, key=lambda name: (whole[name], name))
    figure, ((axis,),) = panels(1, 1, (7.5, 1.4 + 0.34 * len(order)))
    colours = [METHODS.get(n, COLOURS[0]) if n.startswith("adler") else GREY for n in order]
    axis.barh([method(n).label for n in order], [whole[n] for n in order], color=colours)
    for place, name in enumerate(order):
        axis.text(whole[name] + 0.01 * tasks, place, f"{whole[name]}", va="center")
    axis.set_xlim(0, tasks)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel(f"Tasks, of {tasks}")
    axis.grid(False, axis="y")
    rates = len(method(TUNED).grid or ())
    title = (
        f"One run, nothing set, and as good as\nAdamW with the best of {rates} rates and a cosine"
    )
    return finish(figure, title)
