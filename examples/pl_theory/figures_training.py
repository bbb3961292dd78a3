"""The figures of gradient descent: prediction, eigenvalues and their bounds, generalisation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from matplotlib.figure import Figure

from examples.pl_theory.drawing import COLOURS, MARKERS, SHADES, Values, array, band, finish, panels
from examples.pl_theory.records import Record, of_kind

__all__ = [
    "FIGURES",
    "decrease_ratio",
    "learned",
    "loss_ratio",
    "mean_log_condition",
    "own_rate_ratio",
    "step_curvature",
]

_TITLES = {
    "mse": "MSE on logits",
    "mse-softmax": "MSE on softmax outputs",
    "cross-entropy": "cross-entropy",
}
_BLUE, _ORANGE = COLOURS[0], COLOURS[1]
Draw = Callable[[Sequence[Record]], Figure | None]


def learned(
    found: Iterable[Record], loss: str, activation: str, kind: str = "training"
) -> list[Record]:
    """The runs of a figure: those that end above 12 % accuracy, as in the thesis.

    It does not say on which examples; here the training examples, since what is asked is whether
    the network "actually learns".
    """
    runs = of_kind(found, kind, loss=loss, activation=activation)
    return [
        r
        for r in runs
        if not r["results"]["diverged"] and r["results"]["measured"]["accuracy"][-1] > 0.12
    ]


def loss_ratio(record: Record, weak: bool) -> Values:
    r"""Log of the loss over what was predicted of it, at the measured epochs.

    $f_{k+1} / [(1 - \mu_k/L_k) f_k]$, above 1 where the prediction was too good; with ``weak`` the
    factor is Lemma 22's, with the thesis's estimate of the distance, $1 - G^2 / 8 L f$.
    """
    m, losses = record["results"]["measured"], array(record["results"]["loss"])
    epochs = np.array(m["epoch"], dtype=int)
    gain = array(m["pl"]) / array(m["smoothness"])
    factor = 1 - (gain / 4 if weak else gain)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = losses[epochs + 1] / (np.where(factor > 0, factor, np.nan) * losses[epochs])
        return np.asarray(np.log(ratio), dtype=np.float64)


def own_rate_ratio(record: Record) -> Values:
    r"""As `loss_ratio`, with the factor of the rate that was taken in place of that of $1/L$.

    $1 - 2 \mu \eta (1 - L \eta / 2)$; below 0 the prediction was conservative.
    """
    m, losses = record["results"]["measured"], array(record["results"]["loss"])
    epochs, eta = np.array(m["epoch"], dtype=int), float(record["rate"])
    factor = 1 - 2 * array(m["pl"]) * eta * (1 - array(m["smoothness"]) * eta / 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = losses[epochs + 1] / (np.where(factor > 0, factor, np.nan) * losses[epochs])
        return np.asarray(np.log(ratio), dtype=np.float64)


def step_curvature(record: Record) -> Values:
    r"""Curvature of the loss along the steps that were taken, over the GGN's largest eigenvalue.

    $2\,(1 - (f_k - f_{k+1}) / \eta \|g\|^2) / (\eta L)$, the mean over the step of the second
    derivative along the gradient. If the GGN were the Hessian it would not exceed 1.
    """
    m, losses = record["results"]["measured"], array(record["results"]["loss"])
    epochs, eta = np.array(m["epoch"], dtype=int), float(record["rate"])
    drop = losses[epochs] - losses[epochs + 1]
    slope = eta * array(m["squared_norm"])
    with np.errstate(invalid="ignore", divide="ignore"):
        bend = 2 * (1 - drop / np.where(slope > 0, slope, np.nan))
        return np.asarray(bend / (eta * array(m["smoothness"])), dtype=np.float64)


def decrease_ratio(record: Record, own: bool = False) -> Values:
    r"""Log of the predicted over the measured decrease, where the loss fell.

    Predicted is $f \mu / L$, of a step of $1/L$; with ``own`` $2 f \mu \eta (1 - L \eta / 2)$, of
    the rate that was taken.
    """
    m, losses = record["results"]["measured"], array(record["results"]["loss"])
    epochs, eta = np.array(m["epoch"], dtype=int), float(record["rate"])
    smoothness = array(m["smoothness"])
    factor = 2 * eta * (1 - smoothness * eta / 2) if own else 1 / smoothness
    predicted = losses[epochs] * array(m["pl"]) * np.where(factor > 0, factor, np.nan)
    drop = losses[epochs] - losses[epochs + 1]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.log(predicted / np.where(drop > 0, drop, np.nan)), dtype=np.float64)


def mean_log_condition(record: Record) -> Values:
    """Of the Gram matrices of all hidden layers, by epoch."""
    tables = record["results"]["layers"].values()
    return np.asarray(
        np.mean([array(t["log_condition"]) for t in tables], axis=0), dtype=np.float64
    )


def _epochs(record: Record) -> Values:
    return array(record["results"]["measured"]["epoch"])


def _by_rate(
    loss: str,
    activation: str,
    value: Callable[[Record], Values],
    label: str,
    title: str,
    shallow: bool = False,
    kind: str = "training",
) -> Draw:
    """A quantity by epoch, a line a rate: mean over examples, seeds and, unless shallow, depths."""

    def figure_of(found: Sequence[Record]) -> Figure | None:
        runs = learned(found, loss, activation, kind)
        if not runs:
            return None
        least = min(r["depth"] for r in runs)
        runs = [r for r in runs if r["depth"] == least or not shallow]
        figure, grid = panels(1, 1)
        axis = grid[0, 0]
        for index, rate in enumerate(sorted({r["rate"] for r in runs})):
            same = [r for r in runs if r["rate"] == rate]
            rows = [value(r) for r in same]
            look = {"color": COLOURS[index], "marker": MARKERS[index]}
            band(axis, _epochs(same[0]), rows, label=f"rate {rate:g} ({len(rows)} runs)", **look)
        if "ratio" in label:
            axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xlabel("Epoch")
        axis.set_ylabel(label)
        return finish(figure, f"{title}: {activation}, {_TITLES[loss]}")

    return figure_of


def _ratio(loss: str, activation: str, weak: bool = False, shallow: bool = False) -> Draw:
    title = "Loss over its prediction by Lemma " + ("22" if weak else "1")
    return _by_rate(
        loss, activation, lambda r: loss_ratio(r, weak), "log loss ratio", title, shallow
    )


def _conditioning(loss: str, activation: str, kind: str = "training") -> Draw:
    label = r"$\log\,\kappa(G^m)$, mean over layers"
    title = "Conditioning in training"
    return _by_rate(loss, activation, mean_log_condition, label, title, kind=kind)


def _by_layer(loss: str, activation: str) -> Draw:
    """Log condition number of every hidden layer by epoch, a panel a rate."""

    def figure_of(found: Sequence[Record]) -> Figure | None:
        runs = learned(found, loss, activation)
        if not runs:
            return None
        rates = sorted({r["rate"] for r in runs})
        figure, grid = panels(1, len(rates), sharey=True)
        for axis, rate in zip(grid[0], rates, strict=True):
            same = [r for r in runs if r["rate"] == rate]
            deepest = max(len(r["results"]["layers"]) for r in same)
            shades = np.linspace(0, len(SHADES) - 1, deepest).round().astype(int)
            for layer in range(1, deepest + 1):
                rows = [
                    array(r["results"]["layers"][str(layer)]["log_condition"])
                    for r in same
                    if str(layer) in r["results"]["layers"]
                ]
                look = {"color": SHADES[shades[layer - 1]], "label": f"layer {layer}"}
                band(axis, _epochs(same[0]), rows, **look)
            axis.set_title(f"rate {rate:g} ({len(same)} runs)", fontsize="medium")
            axis.set_xlabel("Epoch")
        grid[0, 0].set_ylabel(r"$\log\,\kappa(G^m)$")
        return finish(figure, f"Conditioning in training: {activation}, {_TITLES[loss]}")

    return figure_of


def _bound(loss: str, activation: str) -> Draw:
    """Smallest eigenvalues in blue, bounds of (4.11) in orange, over their first value."""

    def figure_of(found: Sequence[Record]) -> Figure | None:
        runs = learned(found, loss, activation)
        if not runs:
            return None
        sizes = sorted({r["examples"][0] for r in runs})
        figure, grid = panels(1, len(sizes), sharey=True)
        for axis, n in zip(grid[0], sizes, strict=True):
            for r in (r for r in runs if r["examples"][0] == n):
                for i, table in enumerate(r["results"]["layers"].values()):
                    first = table["smallest"][0]
                    label = (r"$\lambda_{\min}(G^m)$", "(4.11), operator norm")
                    for name, colour, text in (
                        ("smallest", _BLUE, label[0]),
                        ("bound_operator", _ORANGE, label[1]),
                    ):
                        line = array(table[name]) / first
                        look = {"color": colour, "alpha": 0.35, "linewidth": 0.8}
                        axis.plot(_epochs(r), line, label=None if i else text, **look)
            axis.axhline(0, color="black", linewidth=0.8)
            axis.set_yscale("symlog", linthresh=1)
            axis.set_title(f"{n} examples", fontsize="medium")
            axis.set_xlabel("Epoch")
        grid[0, 0].set_ylabel("over the first value; below 0: vacuous")
        title = f"Smallest eigenvalues and their bound: {activation}, {_TITLES[loss]}"
        return finish(figure, f"{title}; a line a run and layer")

    return figure_of


def _generalisation(loss: str, activation: str) -> Draw:
    """The bound of (4.13) over the largest loss, by epoch, a line a number of examples."""

    def figure_of(found: Sequence[Record]) -> Figure | None:
        runs = learned(found, loss, activation)
        if not runs:
            return None
        figure, grid = panels(1, 1)
        axis = grid[0, 0]
        for index, n in enumerate(sorted({r["examples"][0] for r in runs})):
            same = [r["results"]["measured"] for r in runs if r["examples"][0] == n]
            rows = [array(m["gap_bound"]) / array(m["largest_loss"]) for m in same]
            look = {"color": COLOURS[index], "marker": MARKERS[index]}
            text = f"{n} examples ({len(rows)} runs)"
            band(axis, array(same[0]["epoch"]), rows, label=text, **look)
        axis.axhline(1, color="black", linewidth=0.8, label="vacuous above")
        axis.set_yscale("log")
        axis.set_xlabel("Epoch")
        axis.set_ylabel("bound of (4.13) / largest loss")
        return finish(figure, f"Generalisation bound: {activation}, {_TITLES[loss]}")

    return figure_of


# The thesis's 6.5 is of six-layer networks; the others do not say.
FIGURES: dict[str, Draw] = {
    "6.5": _ratio("mse", "relu", shallow=True),
    "6.6": _bound("mse", "relu"),
    "6.7": _conditioning("cross-entropy", "relu"),
    "6.8": _conditioning("cross-entropy", "tanh"),
    "edge": _conditioning("cross-entropy", "relu", "edge"),
    "6.11": _generalisation("mse", "relu"),
    "6.12": _generalisation("mse-softmax", "relu"),
    "6.14": _ratio("cross-entropy", "relu", weak=True),
    "6.15": _ratio("cross-entropy", "tanh", weak=True),
    "6.16": _by_layer("mse", "relu"),
    "6.17": _by_layer("mse", "tanh"),
    "6.18": _by_layer("cross-entropy", "relu"),
    "6.19": _by_layer("cross-entropy", "tanh"),
    "6.20": _bound("cross-entropy", "relu"),
    "6.21": _bound("cross-entropy", "tanh"),
    "6.22": _bound("mse", "relu"),
    "6.23": _bound("mse", "tanh"),
    "paper-6d": _ratio("mse", "tanh"),
    "paper-7b": _generalisation("mse", "tanh"),
    "paper-7d": _generalisation("mse-softmax", "tanh"),
    "poster-1": _by_rate(
        "cross-entropy", "relu", decrease_ratio, "log decrease ratio", "Predicted / measured"
    ),
}
