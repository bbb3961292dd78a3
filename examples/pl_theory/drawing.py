"""What all figures share: shades, curves over seeds; style and panels are `shared.plots`'s."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from examples.shared.plots import COLOURS, MARKERS, STYLE, finish, panels, save
from examples.shared.records import Record

__all__ = [
    "COLOURS",
    "MARKERS",
    "SHADES",
    "STYLE",
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


def network(record: Record) -> str:
    """The activation, in words."""
    return str(record["activation"]) + (", renormalised" if record["renormalised"] else "")
