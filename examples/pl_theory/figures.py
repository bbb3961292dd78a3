"""The figures of the thesis's chapter 6, under their own numbers, drawn from the records alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.pl_theory import figures_training as trained
from examples.pl_theory.drawing import (
    COLOURS,
    MARKERS,
    SHADES,
    STYLE,
    Values,
    array,
    band,
    finish,
    mean,
    panels,
    positive,
    save,
)
from examples.pl_theory.records import Record, of_kind

__all__ = ["SCALINGS", "draw", "middle_size", "relative", "scaling_law"]

# The kinds of networks of which dropout stability and connectivity are measured.
SCALINGS = {
    "connectivity": "three layers, usual scaling",
    "mean-field": "two layers, mean-field scaling",
}
_NAMES = {False: "not renormalised", True: "renormalised"}


def draw(
    found: Sequence[Record], directory: Path, chosen: Iterable[str] | None = None
) -> list[Path]:
    """Draws the chosen figures for which there are records, as PNG and SVG.

    Args:
        found: Records, in any order.
        directory: Where the files go.
        chosen: Names in `presets.FIGURES`; all if None.
    """
    written = []
    for name in _FIGURES if chosen is None else chosen:
        with mpl.rc_context(STYLE):
            figure = _FIGURES[name](found)
            if figure is not None:
                written += save(figure, directory, f"figure-{name.replace('.', '-')}")
    return written


# --- at initialisation ----------------------------------------------------------------------------


def middle_size(found: Iterable[Record]) -> int:
    """Of the numbers of examples, the largest that leaves every width room: at most half of it."""
    initial = of_kind(found, "initialisation")
    sizes = sorted({n for r in initial for n in r["examples"]})
    narrowest = min(r["width"] for r in initial)
    return int(max((n for n in sizes if 2 * n <= narrowest), default=sizes[0]))


def series(record: Record, examples: int, quantity: str) -> Values:
    """A quantity over layers; eigenvalues below rounding are left out."""
    layers = record["results"]["layers"][str(examples)]
    known = np.isfinite(array(layers["log_condition"]))
    values = array(layers[quantity])
    return np.where(known, values, np.nan) if quantity in ("smallest", "log_condition") else values


def _two_panels(
    found: Iterable[Record], title: str, label: str, panel: Callable[[Axes, list[Record]], None]
) -> Figure | None:
    """Networks without and with renormalisation, side by side."""
    initial = of_kind(found, "initialisation", activation="relu")
    if not initial:
        return None
    figure, grid = panels(1, 2, sharex=True, sharey=True)
    for axis, renormalised in zip(grid[0], (False, True), strict=True):
        panel(axis, of_kind(initial, "initialisation", renormalised=renormalised))
        axis.set_title(f"ReLU, {_NAMES[renormalised]}", fontsize="medium")
        axis.set_xlabel("Layer (0: inputs)")
    grid[0, 0].set_ylabel(label)
    return finish(figure, title)


def by_ratio(found: Iterable[Record]) -> Figure | None:
    """6.1: log condition number over layers, for every ratio of examples to width."""

    def panel(axis: Axes, runs: list[Record]) -> None:
        pairs = {(n / r["width"], n, r["width"]) for r in runs for n in r["examples"]}
        ratios = sorted(p for p in pairs if p[0] < 1)
        colours = mpl.colormaps["viridis"](np.linspace(0, 0.9, max(1, len(ratios))))
        for colour, (ratio, n, width) in zip(colours, ratios, strict=True):
            same = of_kind(runs, "initialisation", width=width)
            lines = [series(r, n, "log_condition") for r in same]
            axis.plot(mean(lines), color=colour, label=f"{n}/{width} = {ratio:.3g}")

    title = "Log condition number of the features' Gram matrices, by examples over width"
    return _two_panels(found, title, r"$\log\,\kappa(G^m)$", panel)


def by_width(found: Iterable[Record], quantity: str, label: str, title: str) -> Figure | None:
    """6.2 and 6.9: a quantity over layers, for every width, with 95 % intervals."""
    found = list(found)
    if not of_kind(found, "initialisation"):
        return None
    n = middle_size(found)

    def panel(axis: Axes, runs: list[Record]) -> None:
        for width, colour in zip(sorted({r["width"] for r in runs}), COLOURS, strict=False):
            lines = [series(r, n, quantity) for r in of_kind(runs, "initialisation", width=width)]
            x = np.arange(len(lines[0]), dtype=float)
            band(axis, x, lines, color=colour, label=f"width {width}")
        if quantity == "max_row_sum":
            axis.set_yscale("log")

    return _two_panels(found, f"{title}, {n} examples", label, panel)


def extreme(found: Iterable[Record], quantity: str) -> Figure | None:
    """6.3 and 6.4: rescaled extreme singular values of renormalised ReLU features, over layers."""
    found = list(found)
    runs = of_kind(found, "initialisation", activation="relu", renormalised=True)
    if not runs:
        return None
    n, root = middle_size(found), np.sqrt
    figure, grid = panels(1, 1)
    axis = grid[0, 0]
    for width, colour in zip(sorted({r["width"] for r in runs}), COLOURS, strict=False):
        same = of_kind(runs, "initialisation", width=width)
        lines = [root(positive(series(r, n, quantity))) for r in same]
        axis.plot(mean(lines), color=colour, label=f"width {width}")
    for r in of_kind(found, "infinite-width", activation="relu"):
        layers = r["results"]["layers"][str(n)]
        axis.plot(root(positive(array(layers[quantity]))), "k--", label="infinite width")
        if quantity == "smallest":
            for name, style, label in (
                ("lemma_24", ":", "infinite width, Lemma 24"),
                ("combined", "-.", "infinite width, combined bound"),
            ):
                axis.plot(root(positive(array(layers[name]))), style, color="0.4", label=label)
    axis.set_yscale("log")
    axis.set_xlabel("Layer (0: inputs)")
    which = {"smallest": "smallest", "largest": "largest"}[quantity]
    axis.set_ylabel(rf"{which} singular value of $F^m$ / $\sqrt{{\mathrm{{width}}}}$")
    return finish(figure, f"Renormalised ReLU networks, {n} examples: {which} singular value")


def entries(found: Iterable[Record]) -> Figure | None:
    """6.10: least diagonal and largest off-diagonal entry, without renormalisation."""
    found = list(found)
    runs = of_kind(found, "initialisation", activation="relu", renormalised=False)
    if not runs:
        return None
    n, widths = middle_size(found), sorted({r["width"] for r in runs})
    figure, grid = panels(1, len(widths), sharey=True)
    for axis, width in zip(grid[0], widths, strict=True):
        same = of_kind(runs, "initialisation", width=width)
        for quantity, colour, label in (
            ("min_diagonal", COLOURS[0], "least diagonal entry"),
            ("max_off_diagonal", COLOURS[1], "largest entry off the diagonal"),
        ):
            lines = [series(r, n, quantity) for r in same]
            band(axis, np.arange(len(lines[0]), dtype=float), lines, color=colour, label=label)
        axis.set_yscale("log")
        axis.set_title(f"width {width}", fontsize="medium")
        axis.set_xlabel("Layer (0: inputs)")
    grid[0, 0].set_ylabel(r"entry of $G^m$ / width")
    return finish(figure, f"ReLU networks without renormalisation, {n} examples")


def scaling_law(examples: int, width: int) -> float:
    """``√(examples · width) / (√width − √examples)``; infinite where there is no more width."""
    excess = math.sqrt(width) - math.sqrt(examples)
    return math.sqrt(examples * width) / excess if excess > 0 else math.inf


def scaling(found: Iterable[Record]) -> Figure | None:
    """6.13: condition numbers of tanh features against the factor of (6.8), a colour a layer."""
    runs = of_kind(found, "initialisation", activation="tanh", renormalised=False)
    if not runs:
        return None
    depth = runs[0]["depth"]
    figure, grid = panels(1, 1)
    axis = grid[0, 0]
    factors: list[float] = []
    for layer in range(1, depth + 1):
        points = [
            (scaling_law(n, r["width"]), series(r, n, "log_condition")[layer])
            for r in runs
            for n in r["examples"]
            if n < r["width"]
        ]
        factors += [x for x, _ in points]
        colour = mpl.colormaps["viridis"](layer / depth)
        label = f"layer {layer}" if layer in (1, depth // 2, depth) else None
        axis.plot(*zip(*points, strict=True), "o", color=colour, alpha=0.6, label=label)
    ends = np.array([min(factors), max(factors)])
    for exponent, style in ((1, "k:"), (2, "k--")):
        axis.plot(ends, exponent * np.log(ends / ends[0]), style, label=f"slope {exponent}")
    axis.set_xscale("log")
    axis.set_xlabel("√(examples · width) / (√width − √examples)")
    axis.set_ylabel(r"$\log\,\kappa(G^m)$")
    return finish(figure, "Tanh networks without renormalisation: the factor of (6.8)")


def three_layers(found: Iterable[Record]) -> Figure | None:
    """Smallest eigenvalue of the tangent kernel over the number of examples, first width 8 N."""
    runs = of_kind(found, "tangent-kernel")
    if not runs:
        return None
    figure, grid = panels(1, 1)
    axis = grid[0, 0]
    for index, (d, width) in enumerate(sorted({(r["dimension"], r["width"]) for r in runs})):
        same = of_kind(runs, "tangent-kernel", dimension=d, width=width)
        sizes = sorted({r["examples"][0] for r in same})
        every = [[r["results"]["smallest"] for r in same if r["examples"][0] == n] for n in sizes]
        line = np.array([np.mean(values) for values in every])
        look: dict[str, Any] = {"color": COLOURS[index], "marker": MARKERS[index]}
        axis.loglog(sizes, positive(line), label=f"d = {d}, $n_2$ = {width}", **look)
        guide = line[-1] * np.array(sizes) / sizes[-1]
        axis.loglog(sizes, guide, ":", color=SHADES[0])
    axis.set_xlabel("Examples N")
    axis.set_ylabel(r"$\lambda_{\min}(K)$")
    return finish(figure, "Three-layer ReLU networks, first width 8 N; dotted: proportional to N")


def surroundings(found: Iterable[Record], quantity: str, label: str) -> Figure | None:
    """Dropout stability or the barrier on a line, over the width: mean and range over seeds."""
    found = list(found)
    kinds = [kind for kind in SCALINGS if of_kind(found, kind)]
    if not kinds:
        return None
    figure, grid = panels(1, len(kinds), sharey=True)
    for axis, kind in zip(grid[0], kinds, strict=True):
        runs = of_kind(found, kind)
        pairs = sorted({(r["activation"], r["loss"]) for r in runs})
        for index, (activation, loss) in enumerate(pairs):
            same = of_kind(runs, kind, activation=activation, loss=loss)
            widths = sorted({r["width"] for r in same})
            every = [[relative(r, quantity) for r in of_kind(same, kind, width=w)] for w in widths]
            line = np.array([np.mean(values) for values in every])
            look: dict[str, Any] = {"color": COLOURS[index], "marker": MARKERS[index]}
            axis.plot(widths, positive(line), label=f"{activation}, {loss}", **look)
            low, high = (np.array([f(values) for values in every]) for f in (np.min, np.max))
            axis.fill_between(widths, low, high, color=COLOURS[index], alpha=0.15, linewidth=0)
        axis.set_xscale("log")
        axis.set_yscale("log" if quantity == "change" else "linear")
        axis.set_title(SCALINGS[kind], fontsize="medium")
        axis.set_xlabel("Width")
    grid[0, 0].set_ylabel(label)
    return finish(figure, "Networks trained on handwritten digits: mean and range over seeds")


def relative(record: Record, quantity: str) -> float:
    """A change of the loss, over what the loss is where nothing is known."""
    unit = math.log(10) if record["loss"] == "cross-entropy" else 0.1
    return float(record["results"][quantity]) / unit


def ball(found: Iterable[Record]) -> Figure | None:
    """How far training goes, over the radius where the kernel is sure to be conditioned."""
    runs = of_kind(found, "ball")
    if not runs:
        return None
    figure, grid = panels(1, 2)
    widths = sorted({r["width"] for r in runs})
    quantities = (
        ("distance", "radius", "distance trained / radius of the ball"),
        ("smallest_after", "smallest", r"$\lambda_{\min}(K)$, after / before"),
    )
    for axis, (above, below, label) in zip(grid[0], quantities, strict=True):
        of_width = [[r["results"] for r in of_kind(runs, "ball", width=w)] for w in widths]
        every = [[r[above] / r[below] for r in same] for same in of_width]
        line, low, high = (np.array([f(v) for v in every]) for f in (np.mean, np.min, np.max))
        if below == "radius":
            guide = line[0] * np.sqrt(widths[0] / np.array(widths, dtype=float))
            axis.loglog(widths, guide, "--", color=SHADES[0], label="width to the power −1/2")
        axis.plot(widths, line, color=COLOURS[0], marker="s", label="mean and range over seeds")
        axis.fill_between(widths, low, high, color=COLOURS[0], alpha=0.15, linewidth=0)
        axis.axhline(1, color=SHADES[-1], linestyle=":", linewidth=1)
        axis.set_xscale("log")
        axis.set_xlabel("Width")
        axis.set_ylabel(label)
    return finish(figure, "Gradient descent and the ball of Liu, Zhu and Belkin")


def second_term(found: Iterable[Record]) -> Figure | None:
    """7.5: the first term's share in training, and the second's mean over last layers."""
    runs = of_kind(found, "perturbation")
    if not runs:
        return None
    figure, grid = panels(1, 2)
    pairs = sorted({(r["activation"], r["loss"]) for r in runs})
    for index, (activation, loss) in enumerate(pairs):
        same = of_kind(runs, "perturbation", activation=activation, loss=loss)
        look: dict[str, Any] = {"color": COLOURS[index], "marker": MARKERS[index]}
        widest = max(r["width"] for r in same)
        wide = [r["results"]["measured"] for r in same if r["width"] == widest]
        label = f"{activation}, {loss}"
        lines = [array(m["gradient_share"]) for m in wide]
        band(grid[0, 0], array(wide[0]["epoch"]), lines, label=label, **look)
        widths = sorted({r["width"] for r in same})
        for along, line in (("gradient", "-"), ("random", ":")):
            shares = [
                np.mean(
                    [
                        abs(r["results"]["draws"][along]["residual"])
                        / r["results"]["draws"][along]["gauss_newton"]
                        for r in of_kind(same, "perturbation", width=w)
                    ]
                )
                for w in widths
            ]
            grid[0, 1].loglog(widths, shares, line, **look)
    grid[0, 0].set_xlabel("Epoch (largest width)")
    grid[0, 0].set_ylabel("GGN's share along the gradient")
    grid[0, 1].set_xlabel("Width")
    grid[0, 1].set_ylabel("|mean second term| / mean GGN")
    grid[0, 1].set_title("along the gradient; dotted: at random", fontsize="medium")
    return finish(figure, "The Hessian's second term, in training and over last-layer draws")


_FIGURES: dict[str, Callable[[Sequence[Record]], Figure | None]] = {
    "6.1": by_ratio,
    "6.2": lambda found: by_width(
        found, "log_condition", r"$\log\,\kappa(G^m)$", "Log condition number, by width"
    ),
    "6.3": lambda found: extreme(found, "smallest"),
    "6.4": lambda found: extreme(found, "largest"),
    "6.9": lambda found: by_width(
        found, "max_row_sum", r"row sum of $G^m$ / width", "Largest off-diagonal row sum"
    ),
    "6.10": entries,
    "6.13": scaling,
    "nmm": three_layers,
    "dropout": lambda found: surroundings(found, "change", "|L_N − L_M| / initial loss"),
    "connectivity": lambda found: surroundings(found, "barrier", "barrier / initial loss"),
    "ball": ball,
    "7.5": second_term,
    **trained.FIGURES,
}
