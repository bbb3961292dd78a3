"""The figures, drawn from the records alone."""

from __future__ import annotations

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
    finish,
    mean,
    network,
    panels,
    positive,
    save,
)
from examples.pl_theory.networks import ODD
from examples.pl_theory.presets import VARIANTS
from examples.pl_theory.records import Record, gram_rows, of_kind

__all__ = [
    "by_examples",
    "by_width",
    "draw",
    "proxy",
    "scaling",
    "three_layers",
]

_LABELS = {
    "smallest": "Smallest eigenvalue",
    "largest": "Largest eigenvalue",
    "log_condition": "Log condition number",
    "row_sum": "Largest off-diagonal row sum\n/ smallest diagonal entry",
    "off_diagonal": "Largest off-diagonal entry\n/ smallest diagonal entry",
}
_WHEN = {"initialisation": "at initialisation", "training": "in training"}


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
    names = _FIGURES if chosen is None else chosen
    for name in names:
        with mpl.rc_context(STYLE):
            figure = _FIGURES[name](found)
            if figure is not None:
                written += save(figure, directory, f"figure-{name.replace('.', '-')}")
    return written


# --- at initialisation ----------------------------------------------------------------------------


def by_width(found: Iterable[Record], quantity: str) -> Figure | None:
    """A quantity over layers, for every width, and its line at infinite width.

    Of the numbers of examples, the largest that leaves every width room: at most half of it.
    Eigenvalues below rounding are left out.
    """
    found = list(found)
    initial = of_kind(found, "initialisation")
    if not initial:
        return None
    widths = sorted({r["width"] for r in initial})
    sizes = sorted({n for r in initial for n in r["examples"]})
    size = str(max((n for n in sizes if 2 * n <= widths[0]), default=sizes[0]))

    def panel(axis: Axes, **network: Any) -> None:
        for width, shade in zip(widths, SHADES, strict=False):
            if runs := of_kind(initial, "initialisation", width=width, **network):
                line = mean([_resolved(r, size, quantity) for r in runs])
                axis.plot(line, color=shade, label=f"width {width}")
        for r in of_kind(found, "infinite-width", **network):
            line = _resolved(r, size, quantity)
            axis.plot(line, "--", color=COLOURS[4], label="infinite width")
            if quantity == "smallest":
                bound = positive(array(r["results"]["layers"][size]["lower_bound"]))
                axis.plot(bound, ":", color="black", label="lower bound, infinite width")
        if quantity != "log_condition":
            axis.set_yscale("log")

    title = f"{_LABELS[quantity]} of the features' Gram matrix, {size} examples"
    return finish(_over_layers(initial, _LABELS[quantity], panel), title)


def by_examples(found: Iterable[Record]) -> Figure | None:
    """Log condition number over layers, for every number of examples, at the largest width."""
    initial = of_kind(found, "initialisation")
    if not initial:
        return None
    width = max(r["width"] for r in initial)
    sizes = sorted({n for r in initial for n in r["examples"]})
    shades = SHADES[:: max(1, len(SHADES) // len(sizes))]

    def panel(axis: Axes, **network: Any) -> None:
        if runs := of_kind(initial, "initialisation", width=width, **network):
            for size, shade in zip(sizes, shades, strict=False):
                line = mean([_resolved(r, str(size), "log_condition") for r in runs])
                axis.plot(line, color=shade, label=f"{size} examples")

    title = f"Log condition number of the features' Gram matrix, width {width}"
    return finish(_over_layers(initial, _LABELS["log_condition"], panel), title)


def _over_layers(initial: Sequence[Record], label: str, panel: Callable[..., None]) -> Figure:
    """A panel for each activation: plain ones above, renormalised ones below."""
    activations = list(dict.fromkeys(r["activation"] for r in initial))
    figure, grid = panels(2, len(activations), sharex=True, sharey="row")
    for row, renormalised in enumerate((False, True)):
        for axis, activation in zip(grid[row], activations, strict=True):
            panel(axis, activation=activation, renormalised=renormalised)
            name = activation + (", renormalised" if renormalised else "")
            if renormalised and activation in ODD:
                name += ": as above"
                axis.set_axis_off()
            axis.set_title(name, fontsize="medium")
        grid[row, 0].set_ylabel(label)
    for axis in grid[-1]:
        axis.set_xlabel("Layer (0: inputs)")
    return figure


def _resolved(record: Record, size: str, quantity: str) -> Values:
    layers = record["results"]["layers"][size]
    values, known = array(layers[quantity]), np.isfinite(array(layers["log_condition"]))
    return values if quantity == "largest" else np.where(known, values, np.nan)


def scaling(found: Iterable[Record]) -> Figure | None:
    """Measured condition numbers against the scaling law, with the constant that fits best."""
    runs = of_kind(found, "random-features")
    if not runs:
        return None
    datasets = sorted({r["dataset"] for r in runs}, reverse=True)
    figure, grid = panels(2, len(datasets), sharex=True)
    for column, dataset in enumerate(datasets):
        groups: dict[str, list[Record]] = {}
        for r in runs:
            if r["dataset"] == dataset:
                groups.setdefault(network(r), []).append(r)
        for index, (name, group) in enumerate(groups.items()):
            sizes = [entry for r in group for entry in r["results"]["sizes"].values()]
            law = array(entry["law"] for entry in sizes)
            condition = array(entry["condition"] for entry in sizes)
            constant = np.exp(np.log(condition / law).mean())
            look = {"color": COLOURS[index], "label": name}
            grid[0, column].loglog(law, condition, MARKERS[index], alpha=0.6, **look)
            ends = np.array([law.min(), law.max()])
            grid[0, column].loglog(ends, constant * ends, color=COLOURS[index])
            residual = condition / (constant * law)
            grid[1, column].loglog(law, residual, MARKERS[index], alpha=0.6, **look)
        grid[0, column].set_title(dataset, fontsize="medium")
        grid[1, column].axhline(1, color="black", linewidth=0.8)
        grid[1, column].set_xlabel("√(examples · width) / (√width − √examples)")
    grid[0, 0].set_ylabel("Condition number of the features")
    grid[1, 0].set_ylabel("Measured / fitted")
    return finish(figure, "Condition number of random features and the scaling law")


def three_layers(found: Iterable[Record]) -> Figure | None:
    """Smallest eigenvalue of the tangent kernel over the number of examples, first width 8 N."""
    runs = of_kind(found, "tangent-kernel")
    if not runs:
        return None
    figure, grid = panels(1, 2, sharex=True)
    for index, dataset in enumerate(sorted({r["dataset"] for r in runs}, reverse=True)):
        sizes = sorted({r["examples"][0] for r in runs if r["dataset"] == dataset})
        of_size = [of_kind(runs, "tangent-kernel", dataset=dataset, examples=[n]) for n in sizes]
        for axis, value in zip(grid[0], (_whole, _wide), strict=True):
            every = [array(map(value, group)) for group in of_size]
            look = {"color": COLOURS[index], "marker": MARKERS[index]}
            middle = array(row.mean() for row in every)
            axis.loglog(sizes, positive(middle), label=dataset, **look)
            low, high = (array(f(row) for row in every) for f in (np.min, np.max))
            axis.fill_between(sizes, low, high, color=COLOURS[index], alpha=0.15, linewidth=0)
            line = middle[-1] * np.array(sizes) / sizes[-1]
            axis.loglog(sizes, line, ":", color="black", label="proportional to the examples")
            axis.set_xlabel("Examples N")
    grid[0, 0].set_ylabel("Smallest eigenvalue")
    grid[0, 0].set_title("Tangent kernel", fontsize="medium")
    grid[0, 1].set_title("Part of the second layer", fontsize="medium")
    return finish(figure, "Three-layer ReLU networks of first width 8 N: mean and range over seeds")


def _whole(record: Record) -> float:
    return float(record["results"]["smallest"])


def _wide(record: Record) -> float:
    return float(record["results"]["parts"]["2"])


# --- proxies --------------------------------------------------------------------------------------


def proxy(found: Iterable[Record], cheap: str, true: str) -> Figure | None:
    """A quantity that needs no eigenvalue against one that does; a dot a Gram matrix.

    Args:
        found: Records.
        cheap: ``"row_sum"`` or ``"off_diagonal"``, relative to the smallest diagonal entry.
        true: ``"smallest"``, relative to it too, or ``"log_condition"``.
    """
    found = of_kind(found, "initialisation") + of_kind(found, "training")
    if not found:
        return None
    names = list(dict.fromkeys(map(network, found)))
    figure, grid = panels(1, 2, sharey=True)
    for axis, kind in zip(grid[0], ("initialisation", "training"), strict=True):
        for index, name in enumerate(names):
            runs = [r for r in of_kind(found, kind) if network(r) == name]
            rows = [row for r in runs for group in gram_rows(r) for row in group]
            x, y = (array(row[quantity] for row in rows) for quantity in (cheap, true))
            look = {"color": COLOURS[index % 7], "marker": MARKERS[index % 7], "alpha": 0.35}
            if rows:
                axis.plot(positive(x), positive(y), ls="", label=name, rasterized=True, **look)
        axis.set_xscale("log")
        if true == "smallest":
            axis.set_yscale("log")
        axis.set_title(_WHEN[kind], fontsize="medium")
        axis.set_xlabel(_LABELS[cheap])
    relative = "\n/ smallest diagonal entry" if true == "smallest" else ""
    grid[0, 0].set_ylabel(_LABELS[true] + relative)
    return finish(figure, "Gram matrices of features: proxies that need no eigenvalue")


_FIGURES: dict[str, Callable[[Sequence[Record]], Figure | None]] = {
    "6.1": lambda found: by_width(found, "smallest"),
    "6.2": lambda found: by_width(found, "largest"),
    "6.3": lambda found: by_width(found, "log_condition"),
    "6.4": by_examples,
    "6.5": lambda found: trained.decrease(found, "mse", bounds=True),
    "6.6": lambda found: trained.kernel(found, "mse", "smallest"),
    "6.7": lambda found: trained.kernel(found, "mse", "largest"),
    "6.8": lambda found: trained.kernel(found, "mse", "log_condition"),
    "6.9": lambda found: proxy(found, "row_sum", "smallest"),
    "6.10": lambda found: proxy(found, "off_diagonal", "log_condition"),
    "6.11": lambda found: trained.generalisation(found, "mse"),
    "6.12": lambda found: trained.generalisation(found, "cross-entropy"),
    "6.13": scaling,
    "6.14": lambda found: trained.decrease(found, "cross-entropy", bounds=False),
    "6.15": lambda found: trained.accumulated(found, "cross-entropy"),
    "nmm": three_layers,
}


def _conditioning_of(loss: str, variant: int) -> Callable[[Sequence[Record]], Figure | None]:
    return lambda found: trained.conditioning(found, loss, *VARIANTS[variant])


for _i in range(len(VARIANTS)):
    _FIGURES[f"6.{16 + _i}"] = _conditioning_of("mse", _i)
    _FIGURES[f"6.{20 + _i}"] = _conditioning_of("cross-entropy", _i)
