"""The thesis's figures: accuracy and loss over epochs (7.1), learning rates over epochs (7.2)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from examples.cifar import data as cifar
from examples.cifar import records
from examples.cifar.optimizers import OPTIMIZERS
from examples.shared.plots import MARKERS, colours_of, finish, panels, save, style
from examples.shared.records import Record

__all__ = ["draw", "learning_curves", "learning_rates"]

Values = npt.NDArray[np.float64]
Cells = dict[tuple[str, str], list[Record]]

_TITLES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
_COLOURS = colours_of(OPTIMIZERS)
# Published and default ADLER often lie on each other: one shows through the other's gaps.
_LINES = ("-", "-", "-", "--", "-", "-.", "--", ":")


def draw(found: Sequence[Record], directory: Path) -> list[Path]:
    """Draws both figures of each data set, as PNG and SVG; the same records, the same SVG."""
    written = []
    by_size = records.by_batch_size(found)
    for size, same in by_size.items():
        for dataset, cells in records.by_cell(same).items():
            figures = {"figure-7-1": learning_curves, "figure-7-2": learning_rates}
            for name, make in figures.items():
                file = f"{name}-{dataset}" + f"-b{size}" * (len(by_size) > 1)
                with style():
                    written += save(make(dataset, cells), directory, file)
    return written


def learning_curves(dataset: str, cells: Cells) -> Figure:
    """Figure 7.1: test accuracy, training loss and test loss, mean over runs and its 95 % band.

    The training loss stands on a logarithmic scale, for its "logarithmic slope" (section 7.8). The
    test loss is not in the thesis's figure but in its text. After a divergence the last accuracy
    stands for the epochs that were not run; the losses, which are not finite, are left out. A run
    whose loss explodes counts with twice that of guessing. The axes of the losses end a little
    above guessing: nothing is learned beyond it, and methods differ below.
    """
    guessing = np.log(cifar.ARCHIVES[dataset].classes)
    quantities = "Test accuracy (%)", "Training loss (nats)", "Test loss (nats)"
    figure, axes = _panels(cells, quantities)
    for (models, activation), cell in cells.items():
        for name, runs in records.competitors(cell).items():
            accuracy = 100 * _curves(runs, "test_accuracy", carried=True)
            _band(axes[models, activation, 0], name, *_mean(accuracy))
            for row, loss in ((1, "train_loss"), (2, "test_loss")):
                losses = np.minimum(_curves(runs, loss), 2 * guessing)
                _band(axes[models, activation, row], name, *_mean(losses))
        axes[models, activation, 1].set_yscale("log", nonpositive="clip")
    for (models, _, quantity), axis in axes.items():
        if quantity == 0:
            axis.set_ylim(bottom=max(axis.get_ylim()[0], 0))
            continue
        # A row shares its axis; the bands of a mean that explodes reach below every run.
        beside = [a for (m, _, q), a in axes.items() if (m, q) == (models, quantity)]
        least = min(float(np.nanmin(line.get_ydata())) for a in beside for line in a.lines)
        axis.set_ylim(0.97 * least, min(axis.get_ylim()[1], 1.1 * guessing))
    title = f"{_TITLES[dataset]}: mean over runs ± 1.96 standard errors (95 % band)"
    return finish(figure, title)


def learning_rates(dataset: str, cells: Cells) -> Figure:
    """Figure 7.2: the learning rates, geometric mean over runs and its 95 % band.

    A tuned optimizer's is, at each epoch, the constant rate whose run is then the most accurate.
    Epochs in which every step was skipped have no rate.
    """
    figure, axes = _panels(cells, ("Learning rate",))
    for (models, activation), cell in cells.items():
        for name in records.competitors(cell):
            runs = [r for r in cell if r["optimizer"] == name]
            rates = _best_rates(runs) if OPTIMIZERS[name].tuned else _curves(runs, "learning_rate")
            logarithms = np.log(np.where(rates > 0, rates, np.nan))
            low, middle, high = (np.exp(line) for line in _mean(logarithms))
            _band(axes[models, activation, 0], name, low, middle, high)
        axes[models, activation, 0].set_yscale("log")
    title = f"{_TITLES[dataset]}: geometric mean over runs, with its 95 % band"
    return finish(
        figure, f"{title}\nADLER, GN: mean rate of an epoch. SGD: the grid's best at each epoch"
    )


# --- numbers -------------------------------------------------------------------------------------


def _curves(runs: Sequence[Record], name: str, *, carried: bool = False) -> Values:
    """``[runs, epochs]``, NaN where there is none; or carried on from the last epoch there is."""
    found = np.full((len(runs), max(r["epochs"] for r in runs)), np.nan)
    for row, run in zip(found, runs, strict=True):
        curve = run["curves"][name]
        row[: len(curve)] = [np.nan if value is None else value for value in curve]
        if carried:
            row[len(curve) :] = row[len(curve) - 1]
    return found


def _best_rates(runs: Sequence[Record]) -> Values:
    """``[settings, epochs]``: of each setting's runs, the rate of the most accurate so far."""
    settings: dict[str, list[Record]] = {}
    for run in runs:
        settings.setdefault(records.setting(run), []).append(run)
    best = []
    for group in settings.values():
        accuracy = _curves(group, "test_accuracy", carried=True)
        best.append(np.array([r["lr"] for r in group])[accuracy.argmax(0)])
    return np.stack(best)


def _mean(curves: Values) -> tuple[Values, Values, Values]:
    """The mean over runs less 1.96 standard errors, itself, and plus; NaN where no run is left."""
    there = np.isfinite(curves)
    count = there.sum(0)
    mean = np.where(there, curves, 0).sum(0) / np.where(count > 0, count, np.nan)
    squares = np.where(there, (curves - mean) ** 2, 0).sum(0)
    error = 1.96 * np.sqrt(squares / np.maximum(count - 1, 1) / np.maximum(count, 1))
    return mean - error, mean, mean + error


# --- drawing -------------------------------------------------------------------------------------


def _panels(
    cells: Cells, quantities: Sequence[str]
) -> tuple[Figure, dict[tuple[str, str, int], Axes]]:
    """A panel for each cell and quantity: activations are columns, models and quantities rows."""
    models = list(dict.fromkeys(m for m, _ in cells))
    activations = list(dict.fromkeys(a for _, a in cells))
    rows = len(models) * len(quantities)
    size = max(7.0, 1.2 + 2.9 * len(activations)), 1.2 + 2.2 * rows
    shared = "row" if len(quantities) > 1 else "all"
    figure, grid = panels(rows, len(activations), size, sharex=True, sharey=shared)
    axes = {}
    for i, model in enumerate(models):
        for j, activation in enumerate(activations):
            for k, quantity in enumerate(quantities):
                axis = grid[i * len(quantities) + k, j]
                axis.set_title(f"{model}, {activation}", fontsize="medium")
                axis.xaxis.set_major_locator(MaxNLocator(integer=True))
                if j == 0:
                    axis.set_ylabel(quantity)
                if i == len(models) - 1 and k == len(quantities) - 1:
                    axis.set_xlabel("Epoch")
                axes[model, activation, k] = axis
    return figure, axes


def _band(axis: Axes, name: str, low: Values, middle: Values, high: Values) -> None:
    """A line and its band, in the optimizer's colour and with its marker."""
    index = list(OPTIMIZERS).index(name)
    colour, marker, line = _COLOURS[name], MARKERS[index], _LINES[index]
    epochs = np.arange(1, len(middle) + 1)
    label = OPTIMIZERS[name].label
    every = max(1, len(middle) // 10)
    axis.plot(epochs, middle, line, color=colour, marker=marker, markevery=every, label=label)
    axis.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)
