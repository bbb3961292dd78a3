"""What the claims are computed with: fits, rank correlation, verdicts, tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from examples.pl_theory.drawing import Values

__all__ = [
    "Fit",
    "Section",
    "median",
    "number",
    "power_law",
    "table",
    "verdict",
]


# Of a bar in a table, which would else end the cell.
_ESCAPED = "\\|"


class Section(NamedTuple):
    """What is said of some figures.

    Attributes:
        figures: Names in `presets.FIGURES`.
        claim: What is expected.
        measured: What was found, Markdown.
        verdict: Computed from it.
    """

    figures: tuple[str, ...]
    claim: str
    measured: str
    verdict: str


class Fit(NamedTuple):
    """``y ≈ c x^exponent`` by least squares of logarithms, and ``y ≈ constant_at_one · x``.

    Attributes:
        exponent: Of the first.
        r_squared: Of the first, of logarithms.
        constant_at_one: Of the second: the geometric mean of ``y / x``.
        spread_at_one: Root mean square of ``log(y / (constant_at_one · x))``.
    """

    exponent: float
    r_squared: float
    constant_at_one: float
    spread_at_one: float


def power_law(x: Values, y: Values) -> Fit:
    """Fits both.

    Args:
        x: Positive.
        y: Those that are not positive are left out.
    """
    there = y > 0
    u, v = np.log(x[there]), np.log(y[there])
    exponent, offset = np.polyfit(u, v, 1)
    residual = v - exponent * u - offset
    total = float(((v - v.mean()) ** 2).sum())
    r_squared = 1 - float((residual**2).sum()) / total if total > 0 else 1.0
    ratio = v - u
    return Fit(float(exponent), r_squared, float(np.exp(ratio.mean())), float(ratio.std()))


def median(values: Values) -> float:
    """Of the finite ones; NaN if there are none."""
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else np.nan


def verdict(cases: Sequence[bool]) -> str:
    """In how many cases something holds, in words."""
    count, total = sum(map(bool, cases)), len(cases)
    if not total:
        return "not measured"
    word = "holds" if count == total else "holds in part" if 2 * count >= total else "does not hold"
    return f"{word} ({count} of {total})"


def number(value: float) -> str:
    """Three digits."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞"
    return f"{value:.3g}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table's lines; a bar in a cell is escaped."""
    lines = (head, ["---"] * len(head), *rows)
    return [f"| {' | '.join(cell.replace('|', _ESCAPED) for cell in row)} |" for row in lines]
