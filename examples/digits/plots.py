"""The demo's picture: test error, training loss and learning rate over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter

from examples.shared.plots import GREY, METHODS, panels, save, style

_LEAST_ERROR = 1e-3  # no error at all has no place on a logarithmic axis
# What stands out from the grid, and its name in other figures.
UNTUNED = {
    "Adler": "adler",
    "AdamW, default": "adamw",
    "AdlerAdam": "adler-adam",
    "AdlerScheduleFree": "adler-schedulefree",
}


def draw(runs: Sequence[dict[str, Any]], best: str, file: Path) -> None:
    """Draws means over seeds; the ten SGD rates in grey, the best of them in black.

    Args:
        runs: Records of `examples.digits.__main__.train`.
        best: Name of the SGD rate to highlight.
        file: Where to write.
    """
    with style():
        figure, ((left, middle, right),) = panels(1, 3, (13, 4))
        names = list(dict.fromkeys(run["optimizer"] for run in runs))
        for name in sorted(names, key=lambda n: (n in UNTUNED, n == best)):  # the grid beneath
            mine = [run for run in runs if run["optimizer"] == name]
            look = _look(name, best)
            accuracy = np.mean([run["test_accuracy"] for run in mine], axis=0)
            loss = np.mean([run["train_loss"] for run in mine], axis=0)
            epochs = np.arange(1, len(accuracy) + 1)
            left.plot(epochs, np.maximum(1 - accuracy, _LEAST_ERROR), **look)
            middle.plot(epochs, loss, **look)
            if name in UNTUNED and name != "Adler":
                continue  # its rate multiplies another direction
            rates = np.exp(np.mean(np.log([run["learning_rate"] for run in mine]), axis=0))
            right.plot(np.linspace(0, len(accuracy), len(rates)), rates, **look)
        left.set(xlabel="epoch", ylabel="test error", title="Error on unseen digits")
        left.set_yscale("log")  # the runs that learn differ in their last few per cent
        left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        left.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        left.yaxis.set_minor_formatter(NullFormatter())
        middle.set(xlabel="epoch", ylabel="cross-entropy, nats", title="Training loss")
        middle.set_yscale("log")
        right.xaxis.get_major_locator().set_params(integer=True)
        right.set(xlabel="epoch", ylabel="learning rate", title="Learning rate along the gradient")
        right.set_yscale("log")
        drawn = dict(zip(*reversed(left.get_legend_handles_labels()), strict=True))
        labels = [look["label"] for look in (_look(n, best) for n in names) if look["label"]]
        figure.legend(
            [drawn[label] for label in labels],
            labels,
            loc="outside lower center",
            ncols=4,
            frameon=False,
        )
    save(figure, file.parent, file.stem, [file.suffix])


def _look(name: str, best: str) -> dict[str, Any]:
    if name in UNTUNED:
        untuned = ", untuned" if name != "AdamW, default" else ""
        return {"color": METHODS[UNTUNED[name]], "linewidth": 2.2, "label": name + untuned}
    if name == best:
        return {
            "color": METHODS["sgd"],
            "linewidth": 2.2,
            "linestyle": "--",
            "label": f"best of ten: {name}",
        }
    first = name == "SGD 1.0e-05"
    return {"color": GREY, "linewidth": 1.0, "label": "the other nine SGD rates" if first else None}
