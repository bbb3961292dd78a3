"""What all figures share: shades, curves over seeds; style and panels are `shared.plots`'s."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes

from examples.shared.plots import COLOURS, MARKERS, STYLE, finish, panels, save

__all__ = [
    "COLOURS",
    "MARKERS",
    "SHADES",
    "STYLE",
    "Values",
    "array",
    "band",
    "finish",
    "mean",
    "panels",
    "positive",
    "save",
]

Values = npt.NDArray[np.float64]

# For what has an order: from light to dark.
SHADES = ("#9ECAE1", "#6BAED6", "#4292C6", "#2171B5", "#084594", "#041F4A")


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


def band(axis: Axes, x: Values, rows: Sequence[Values], **look: Any) -> None:
    """The mean over runs, and the 95 % interval of it where there are several."""
    line = mean(rows)
    (drawn,) = axis.plot(x, line, **look)
    if len(rows) > 1:
        stacked = np.ma.masked_invalid(np.stack(rows))
        count = np.maximum(stacked.count(axis=0), 1)
        spread = 1.96 * np.ma.filled(stacked.std(axis=0, ddof=1), 0.0) / np.sqrt(count)
        axis.fill_between(
            x, line - spread, line + spread, color=drawn.get_color(), alpha=0.15, linewidth=0
        )
