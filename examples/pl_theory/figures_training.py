"""The figures of gradient descent: decrease, bounds, conditioning, generalisation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.pl_theory.drawing import (
    COLOURS,
    MARKERS,
    SHADES,
    array,
    finish,
    mean,
    network,
    panels,
    positive,
)
from examples.pl_theory.records import Record, of_kind

__all__ = ["accumulated", "conditioning", "decrease", "generalisation", "kernel"]

_TITLES = {"mse": "mean squared error", "cross-entropy": "cross-entropy"}
_KERNEL = {
    "smallest": "Smallest eigenvalue",
    "largest": "Largest eigenvalue",
    "log_condition": "Log condition number",
}


def _groups(found: Iterable[Record], loss: str) -> dict[int, dict[str, list[Record]]]:
    """Runs by depth, then by activation; the runs of a group differ in the seed alone."""
    groups: dict[int, dict[str, list[Record]]] = {}
    for r in sorted(of_kind(found, "training", loss=loss), key=lambda r: int(r["depth"])):
        groups.setdefault(r["depth"], {}).setdefault(network(r), []).append(r)
    return groups


def _series(runs: list[Record], room: str, name: str) -> Any:
    return mean([array(r["results"][room][name]) for r in runs])


def _look(index: int, every: int = 1) -> dict[str, Any]:
    return {"color": COLOURS[index], "marker": MARKERS[index], "markevery": max(1, every)}


def decrease(found: Iterable[Record], loss: str, bounds: bool) -> Figure | None:
    """Predicted over measured decrease, by step; with ``bounds`` the accumulated bound beneath.

    Top: from the local PL coefficient. Below: from the kernel's smallest eigenvalue.
    """
    groups = _groups(found, loss)
    if not groups:
        return None
    figure, grid = panels(2 + bounds, len(groups), sharex=True, sharey="row")
    for column, (depth, networks) in enumerate(groups.items()):
        for index, (name, runs) in enumerate(networks.items()):
            for row, ratio in enumerate(("local_ratio", "kernel_ratio")):
                line = _series(runs, "steps", ratio)
                look = _look(index, len(line) // 8)
                grid[row, column].plot(positive(line), label=name, **look)
            if bounds:
                _bounds(grid[2, column], runs, name, index)
        for axis in grid[:2, column]:
            axis.axhline(1, color="black", linewidth=0.8)
            axis.set_yscale("log")
        grid[0, column].set_title(f"{depth} hidden layers", fontsize="medium")
        grid[-1, column].set_xlabel("Step")
    grid[0, 0].set_ylabel("Predicted / measured,\nlocal μ")
    grid[1, 0].set_ylabel("Predicted / measured,\nμ from the kernel")
    if bounds:
        grid[2, 0].set_ylabel("Loss and bound (dashed)")
    title = f"Decrease of the {_TITLES[loss]} in a step of rate 1/L: at most 1 where L bounds"
    return finish(figure, title)


def accumulated(found: Iterable[Record], loss: str) -> Figure | None:
    """The loss and its accumulated bounds, by step."""
    groups = _groups(found, loss)
    if not groups:
        return None
    figure, grid = panels(1, len(groups), sharey=True)
    for column, (depth, networks) in enumerate(groups.items()):
        for index, (name, runs) in enumerate(networks.items()):
            _bounds(grid[0, column], runs, name, index, kernel=True)
        grid[0, column].set_title(f"{depth} hidden layers", fontsize="medium")
        grid[0, column].set_xlabel("Step")
    grid[0, 0].set_ylabel("Loss (nats)" if loss == "cross-entropy" else "Loss")
    title = "Loss (solid), bound from the local μ (dashed) and from the kernel (dotted)"
    return finish(figure, f"{_TITLES[loss].capitalize()}. {title}")


def _bounds(axis: Axes, runs: list[Record], name: str, index: int, kernel: bool = False) -> None:
    losses = _series(runs, "steps", "loss")
    axis.plot(positive(losses), label=name, **_look(index, len(losses) // 8))
    axis.plot(positive(_series(runs, "steps", "local_bound")), "--", color=COLOURS[index])
    if kernel:
        axis.plot(positive(_series(runs, "steps", "kernel_bound")), ":", color=COLOURS[index])
    axis.set_yscale("log")


def kernel(found: Iterable[Record], loss: str, quantity: str) -> Figure | None:
    """A quantity of the tangent kernel, by step."""
    groups = _groups(found, loss)
    if not groups:
        return None
    figure, grid = panels(1, len(groups), sharey=True)
    for column, (depth, networks) in enumerate(groups.items()):
        axis = grid[0, column]
        for index, (name, runs) in enumerate(networks.items()):
            steps = _series(runs, "measured", "step")
            line = _series(runs, "measured", f"kernel_{quantity}")
            if quantity != "log_condition":
                line = positive(line)
                axis.set_yscale("log")
            axis.plot(steps, line, label=name, **_look(index))
            if quantity == "smallest":
                lower = positive(_series(runs, "measured", "kernel_lower"))
                axis.plot(steps, lower, ":", color=COLOURS[index])
        axis.set_title(f"{depth} hidden layers", fontsize="medium")
        axis.set_xlabel("Step")
    grid[0, 0].set_ylabel(_KERNEL[quantity])
    note = "; dotted: Weyl's lower bound, where positive" if quantity == "smallest" else ""
    return finish(figure, f"Tangent kernel in training, {_TITLES[loss]}{note}")


def conditioning(
    found: Iterable[Record], loss: str, activation: str, renormalised: bool
) -> Figure | None:
    """One network in training: the tangent kernel, then every layer's Gram matrix with bounds."""
    runs = of_kind(found, "training", loss=loss, activation=activation, renormalised=renormalised)
    if not runs:
        return None
    depths = sorted({r["depth"] for r in runs})
    figure, grid = panels(3, len(depths), sharex=True)
    for column, depth in enumerate(depths):
        same = [r for r in runs if r["depth"] == depth]
        steps = _series(same, "measured", "step")
        top, middle, bottom = grid[:, column]
        for index, name in enumerate(("kernel_smallest", "kernel_largest")):
            label = f"tangent kernel: {name.removeprefix('kernel_')}"
            values = positive(_series(same, "measured", name))
            top.plot(steps, values, label=label, **_look(index))
        upper = positive(_series(same, "measured", "kernel_upper"))
        top.plot(steps, upper, ":", color=COLOURS[0], label="Weyl's bounds")
        lower = positive(_series(same, "measured", "kernel_lower"))
        top.plot(steps, lower, ":", color=COLOURS[0])
        shades = np.linspace(0, len(SHADES) - 1, depth).round().astype(int)
        for layer in range(1, depth + 1):
            shade = SHADES[shades[layer - 1]]
            columns = [r["results"]["grams"][str(layer)] for r in same]
            lines = {
                q: mean([array(c[q]) for c in columns])
                for q in ("smallest", "weyl_lower", "log_condition")
            }
            middle.plot(steps, positive(lines["smallest"]), color=shade, label=f"layer {layer}")
            middle.plot(steps, positive(lines["weyl_lower"]), ":", color=shade)
            bottom.plot(steps, lines["log_condition"], color=shade)
        top.set_yscale("log")
        middle.set_yscale("log")
        top.set_title(f"{depth} hidden layers", fontsize="medium")
        bottom.set_xlabel("Step")
    for axis, label in zip(
        grid[:, 0],
        ("Eigenvalue", "Features: smallest\neigenvalue", "Features: log\ncondition number"),
        strict=True,
    ):
        axis.set_ylabel(label)
    name = activation + (", renormalised" if renormalised else "")
    return finish(figure, f"{name}, {_TITLES[loss]}: eigenvalues and conditioning in training")


def generalisation(found: Iterable[Record], loss: str) -> Figure | None:
    """The bound of the expected loss, the largest loss, the test loss and the gap, by step."""
    groups = _groups(found, loss)
    if not groups:
        return None
    figure, grid = panels(2, len(groups), sharex=True, sharey="row")
    for column, (depth, networks) in enumerate(groups.items()):
        for index, (name, runs) in enumerate(networks.items()):
            steps = _series(runs, "measured", "step")
            test = _series(runs, "measured", "test_loss")
            losses = _series(runs, "steps", "loss")
            bound = _series(runs, "measured", "generalisation_bound")
            most = _series(runs, "measured", "largest_loss")
            grid[0, column].plot(steps, bound / most, label=name, **_look(index))
            train = losses[np.minimum(steps.astype(int), len(losses) - 1)]
            grid[1, column].plot(steps, test - train, **_look(index))
        grid[0, column].axhline(1, color="black", linewidth=0.8, label="vacuous above")
        grid[0, column].set_yscale("log")
        grid[0, column].set_title(f"{depth} hidden layers", fontsize="medium")
        grid[1, column].set_xlabel("Step")
    grid[0, 0].set_ylabel("Bound / largest loss")
    grid[1, 0].set_ylabel("Test − training loss")
    return finish(figure, f"Bound of the expected loss from stability, {_TITLES[loss]}")
