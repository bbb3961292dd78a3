"""How the learning rate moves within an epoch: ``python -m examples.cifar.rates --data DIR``.

Trains two networks, with and without normalisation, and records every step's minibatch rate and the
rate applied, for the published rules and for the guards. Writes ``rates.json`` and ``rates.png``.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from examples.cifar import data as cifar
from examples.cifar.config import Run
from examples.cifar.models import build
from examples.cifar.optimizers import OPTIMIZERS
from examples.cifar.train import minibatches
from examples.shared.plots import GREY, colours_of, finish, panels, save, style

NETWORKS = {
    "CNN without normalisation": ("cnn", "none", 12, 3),
    "ResNet with BatchNorm": ("resnet", "batch", 8, 2),
}
SHOWN = ("adler-published", "gauss-newton-published", "adler-cap", "adler")


def record(run: Run, data: cifar.Data) -> dict[str, list[float]]:
    """Every step's loss, minibatch rate and applied rate."""
    torch.manual_seed(run.seed)
    model, criterion = build(run, data.classes), nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS[run.optimizer].make(model.parameters(), model, criterion, 0.0)
    found: dict[str, list[float]] = {"loss": [], "minibatch_lr": [], "effective_lr": []}
    for epoch in range(run.epochs):
        for chosen in minibatches(run, epoch):
            optimizer.zero_grad()
            loss = criterion(model(data.train_x[chosen]), data.train_y[chosen])
            loss.backward()
            optimizer.step()
            last = optimizer.last_step  # type: ignore[attr-defined]
            found["loss"].append(float(loss.detach()))
            found["minibatch_lr"].append(float(last.minibatch_lr))
            found["effective_lr"].append(float(last.effective_lr))
    return found


def draw(results: dict[str, Any], file: Path) -> None:
    """One panel a network and optimizer: minibatch rates as dots, the rate applied as a line."""
    colours = colours_of(OPTIMIZERS)
    with style():
        figure, axes = panels(len(NETWORKS), len(SHOWN), (13, 5.5), sharex=True)
        for row, network in zip(axes, NETWORKS, strict=True):
            for axis, name in zip(row, SHOWN, strict=True):
                curves = results[network][name]
                steps = np.arange(1, len(curves["loss"]) + 1)
                axis.semilogy(steps, _positive(curves["minibatch_lr"]), ".", ms=2, color=GREY)
                axis.semilogy(steps, _positive(curves["effective_lr"]), color=colours[name])
                axis.set_title(f"{OPTIMIZERS[name].label}\n{network}", fontsize=9)
            row[0].set_ylabel("learning rate")
        for axis in axes[-1]:
            axis.set_xlabel("step")
        finish(figure, "Minibatch rates (grey) and the rate applied")
    save(figure, file.parent, file.stem, [file.suffix])


def _positive(values: Sequence[float | None]) -> list[float]:
    return [v if v is not None and 0 < v < math.inf else math.nan for v in values]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m examples.cifar.rates", description=__doc__)
    parser.add_argument("--data", type=Path, help="directory of the archives")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "rates")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--train-examples", type=int, default=2500)
    parser.add_argument("--redraw", action="store_true", help="from rates.json, without training")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "rates.json"
    if not options.redraw:
        torch.set_num_threads(1)
        data = cifar.load(
            "cifar10", options.data, train_examples=options.train_examples, test_examples=100
        )
        results: dict[str, Any] = {}
        pairs = [(network, name) for network in NETWORKS for name in SHOWN]
        for network, name in tqdm(pairs, unit="run"):
            model, normalisation, width, depth = NETWORKS[network]
            run = Run(
                dataset="cifar10",
                model=model,
                activation="relu",
                normalisation=normalisation,
                width=width,
                depth=depth,
                optimizer=name,
                lr=None,
                batch_size=64,
                epochs=options.epochs,
                train_examples=options.train_examples,
                test_examples=100,
                seed=0,
            )
            curves = record(run, data)
            results.setdefault(network, {})[name] = {
                key: [float(f"{v:.4g}") if math.isfinite(v) else None for v in values]
                for key, values in curves.items()
            }
        file.write_text(json.dumps(results, separators=(",", ":")) + "\n")
    draw(json.loads(file.read_text()), options.out / "rates.png")
    print(f"The picture is {options.out / 'rates.png'}")


if __name__ == "__main__":
    main()
