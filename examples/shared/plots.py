"""One look for all figures: colours, style, panels, legend, files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy.typing as npt
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

__all__ = [
    "COLOURS",
    "GREY",
    "MARKERS",
    "METHODS",
    "STYLE",
    "colours_of",
    "finish",
    "panels",
    "save",
    "style",
]

_BLUE, _ORANGE, _GREEN, _PINK = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
_VERMILLION, _SKY, _BLACK, _YELLOW = "#D55E00", "#56B4E9", "#000000", "#F0E442"
# Okabe and Ito's colours, told apart by colour-blind readers; markers tell them apart in grey.
COLOURS = (_BLUE, _ORANGE, _GREEN, _PINK, _VERMILLION, _SKY, _BLACK, _YELLOW)
MARKERS = "so^Dv*Px"
GREY = "#BBBBBB"
# What stands in many figures has the same colour in all.
METHODS = {
    "adler": _ORANGE,
    "adler-adam": _GREEN,
    "adler-schedulefree": _VERMILLION,
    "adler-muon": _PINK,
    "adamw": _BLUE,
    "sgd": _BLACK,
}
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "adler",  # else the identifiers are random
    "font.size": 9,
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
}


def style() -> AbstractContextManager[None]:
    """Whatever is drawn within has the look of `STYLE`."""
    return mpl.rc_context(STYLE)


def colours_of(names: Iterable[str]) -> dict[str, str]:
    """A colour for each method of a figure, no two the same.

    Those in `METHODS` have their own; the others take what is left, in their order.

    Raises:
        ValueError: For more methods than there are colours.

    Examples:
        >>> colours_of(["prodigy", "adler", "dog"])
        {'prodigy': '#0072B2', 'adler': '#E69F00', 'dog': '#009E73'}
    """
    wanted = list(dict.fromkeys(names))
    if len(wanted) > len(COLOURS):
        raise ValueError(f"{len(wanted)} methods: a figure has colours for {len(COLOURS)}")
    taken = {METHODS[name] for name in wanted if name in METHODS}
    left = (colour for colour in COLOURS if colour not in taken)
    return {name: METHODS[name] if name in METHODS else next(left) for name in wanted}


def panels(
    rows: int, columns: int, size: tuple[float, float] | None = None, **shared: Any
) -> tuple[Figure, npt.NDArray[Any]]:
    """An empty figure and its axes ``[rows, columns]``, to be made and drawn under `style`.

    Args:
        rows: Of panels.
        columns: Of panels.
        size: Inches; by default what so many panels need.
        **shared: ``sharex``, ``sharey``.
    """
    size = size or (max(7.0, 3.1 * columns), 1.1 + 2.5 * rows)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    grid: npt.NDArray[Any] = figure.subplots(rows, columns, squeeze=False, **shared)
    return figure, grid


def finish(figure: Figure, title: str | None = None) -> Figure:
    """The title, readable ticks, and one legend for all panels below them."""
    if title is not None:
        figure.suptitle(title, fontsize="large")
    handles: dict[str, Any] = {}
    axes: list[Axes] = figure.axes
    for axis in axes:
        _readable_ticks(axis.xaxis)
        _readable_ticks(axis.yaxis)
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    columns = max(1, min(len(handles), int(figure.get_figwidth() / 1.9)))
    if handles:
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns)
    return figure


def _readable_ticks(axis: Any) -> None:
    """On a logarithmic axis of little range, 1, 2 and 5 of a decade in plain numbers."""
    if axis.get_scale() != "log":
        return
    low, high = axis.get_view_interval()
    axis.set_minor_formatter(NullFormatter())
    if high < 100 * low:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def save(
    figure: Figure, directory: Path, name: str, suffixes: Sequence[str] = (".png", ".svg")
) -> list[Path]:
    """Writes PNG and SVG; the same figure, the same SVG."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    with style():
        for suffix in suffixes:
            path = directory / f"{name}{suffix}"
            metadata = {"Date": None} if suffix == ".svg" else {"Software": None}
            figure.savefig(path, dpi=150, metadata=metadata)
            written.append(path)
    return written
