"""What all figures share: style, panels, curves over seeds, files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from examples.shared.records import Record

__all__ = [
    "COLOURS",
    "MARKERS",
    "SHADES",
    "Values",
    "array",
    "finish",
    "mean",
    "network",
    "panels",
    "positive",
    "save",
]

Values = npt.NDArray[np.float64]

# Okabe and Ito's colours, told apart by colour-blind readers; markers tell them apart in grey.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
MARKERS = "so^Dv*P"
# For what has an order: from light to dark.
SHADES = ("#9ECAE1", "#6BAED6", "#4292C6", "#2171B5", "#084594", "#041F4A")
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "adler",  # else the identifiers are random
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
}


def array(values: Iterable[float | None]) -> Values:
    """Numbers, NaN in place of None."""
    return np.array([math.nan if v is None else v for v in values], dtype=np.float64)


def positive(values: Values) -> Values:
    """What a logarithmic axis can show; NaN elsewhere."""
    return np.where(values > 0, values, np.nan)


def mean(rows: Sequence[Values]) -> Values:
    """Over seeds, of those that have a value; NaN where none has."""
    length = max(map(len, rows))
    padded = [np.pad(row, (0, length - len(row)), constant_values=np.nan) for row in rows]
    masked = np.ma.masked_invalid(np.stack(padded))
    return np.asarray(masked.mean(axis=0).filled(np.nan), dtype=np.float64)


def network(record: Record) -> str:
    """The activation, in words."""
    return str(record["activation"]) + (", renormalised" if record["renormalised"] else "")


def panels(rows: int, columns: int, **shared: Any) -> tuple[Figure, npt.NDArray[Any]]:
    """An empty figure and its axes ``[rows, columns]``."""
    figure = Figure(figsize=(max(7.0, 3.1 * columns), 1.1 + 2.5 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid: npt.NDArray[Any] = figure.subplots(rows, columns, squeeze=False, **shared)
    return figure, grid


def finish(figure: Figure, title: str) -> Figure:
    """The title, and one legend for all panels."""
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


def save(figure: Figure, directory: Path, name: str) -> list[Path]:
    """Writes PNG and SVG; the same figure, the same SVG."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    with mpl.rc_context(STYLE):
        for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
            path = directory / f"{name}{suffix}"
            figure.savefig(path, dpi=130, metadata=metadata)
            written.append(path)
    return written
