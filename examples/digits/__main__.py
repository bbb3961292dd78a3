"""Untuned optimizers of this library against ten SGD learning rates, on handwritten digits.

A small convolutional network learns scikit-learn's digits (1,797 images of 8 x 8 pixels, part of
the package). Every optimizer sees the same initial weights and the same batches; nothing is tuned
but SGD, by grid search over ten learning rates. Run it with ``make demo``, or

    python -m examples.digits --out runs/digits

It writes ``results.json``, ``table.md`` and ``digits.png``.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import adler
from examples.digits.plots import draw
from examples.shared.records import rounded

SGD_RATES = [float(rate) for rate in np.logspace(np.log10(1e-5), np.log10(3e-1), 10)]

Factory = Callable[[nn.Module, nn.Module], torch.optim.Optimizer]


def sgd(rate: float) -> Factory:
    """SGD at a constant learning rate, without momentum."""
    return lambda model, criterion: torch.optim.SGD(model.parameters(), lr=rate)


MEASURED = ("AdlerScheduleFree", "AdlerAdam", "Adler")


def measured(name: str) -> Factory:
    """An optimizer of this library, as it is."""
    return lambda model, criterion: getattr(adler, name)(model.parameters(), model, criterion)


OPTIMIZERS: dict[str, Factory] = {
    **{name: measured(name) for name in MEASURED},
    "AdamW, default": lambda model, criterion: torch.optim.AdamW(model.parameters()),
    **{f"SGD {rate:.1e}": sgd(rate) for rate in SGD_RATES},
}


@dataclass(frozen=True)
class Config:
    """What all runs share."""

    epochs: int = 15
    batch_size: int = 64
    train_examples: int = 1297
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True)
class Digits:
    """Images in [0, 1] and labels, split at random but always the same way."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @classmethod
    def load(cls, train_examples: int) -> Digits:
        """Reads the data that scikit-learn ships."""
        bunch: Any = load_digits()
        order = np.random.default_rng(0).permutation(len(bunch.target))
        images = torch.tensor(bunch.images[order] / 16, dtype=torch.float32).unsqueeze(1)
        labels = torch.tensor(bunch.target[order])
        n = train_examples
        return cls(images[:n], labels[:n], images[n:], labels[n:])

    def batches(self, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch, in an order that the seed decides."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.train_labels), generator=generator)
        for chosen in torch.split(order, size):
            yield self.train_images[chosen], self.train_labels[chosen]


def network() -> nn.Module:
    """Two convolutions and a linear layer: 24,010 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """The rate of the last step."""
    group = optimizer.param_groups[0]
    return float(group.get("effective_lr", group["lr"]))


def train(
    name: str, seed: int, data: Digits, config: Config, on_step: Callable[[], Any]
) -> dict[str, Any]:
    """One run; a record of its curves, one value an epoch, the rates one a step."""
    torch.manual_seed(seed)
    model, criterion = network(), nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS[name](model, criterion)
    losses, accuracies, rates, seconds = [], [], [], 0.0
    for epoch in range(config.epochs):
        total = 0.0
        begun = time.perf_counter()
        for x, y in data.batches(config.batch_size, seed=1000 * seed + epoch):
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(y)
            rates.append(learning_rate(optimizer))
            on_step()
        seconds += time.perf_counter() - begun
        losses.append(total / len(data.train_labels))
        model.eval()
        with torch.no_grad():
            predicted = model(data.test_images).argmax(1)
        model.train()
        accuracies.append(float((predicted == data.test_labels).float().mean()))
    return {
        "optimizer": name,
        "seed": seed,
        "test_accuracy": accuracies,
        "train_loss": losses,
        "learning_rate": rates,
        "seconds": seconds,
    }


def experiment(config: Config) -> dict[str, Any]:
    """All runs, interleaved so that noise in the machine's speed meets all alike."""
    torch.set_num_threads(1)
    data = Digits.load(config.train_examples)
    steps = config.epochs * -(-config.train_examples // config.batch_size)
    runs = []
    total = steps * len(OPTIMIZERS) * len(config.seeds)
    with tqdm(total=total, unit="step", mininterval=0.5, dynamic_ncols=True) as bar:
        for seed in config.seeds:
            for name in OPTIMIZERS:
                bar.set_description(f"{name}, seed {seed}")
                runs.append(train(name, seed, data, config, bar.update))
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "adler": adler.__version__,
    }
    return {"config": asdict(config), "versions": versions, "runs": runs}


# --- the table -----------------------------------------------------------------------------------


def mean_of(runs: Sequence[dict[str, Any]], key: str) -> float:
    """Mean over runs of the last value of a curve."""
    return statistics.fmean(run[key][-1] for run in runs)


def best_sgd(runs: Sequence[dict[str, Any]]) -> str:
    """The rate of the grid with the best mean accuracy: what a grid search finds."""
    names = [name for name in OPTIMIZERS if name.startswith("SGD")]
    return max(names, key=lambda name: mean_of(of(runs, name), "test_accuracy"))


def of(runs: Sequence[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The runs of one optimizer."""
    return [run for run in runs if run["optimizer"] == name]


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    runs = results["runs"]
    best = best_sgd(runs)
    grid = [run for run in runs if run["optimizer"].startswith("SGD")]
    seeds = len(results["config"]["seeds"])
    rows = [
        *((f"**{name}**, untuned", of(runs, name), 1, of(runs, name)) for name in MEASURED),
        ("AdamW, its default 1e-3", of(runs, "AdamW, default"), 1, of(runs, "AdamW, default")),
        (f"SGD, best of ten rates ({best[4:]})", of(runs, best), len(SGD_RATES), grid),
    ]
    lines = [
        "| | test accuracy | training loss | runs needed | time, s |",
        "|---|---|---|---|---|",
    ]
    for label, chosen, needed, paid in rows:
        accuracies = [run["test_accuracy"][-1] for run in chosen]
        spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
        seconds = sum(run["seconds"] for run in paid) / seeds
        lines.append(
            f"| {label} | {statistics.fmean(accuracies):.3f} ± {spread:.3f} "
            f"| {mean_of(chosen, 'train_loss'):.4f} | {needed} | {seconds:.1f} |"
        )
    config, versions = results["config"], results["versions"]
    lines += [
        "",
        f"Means over {seeds} seeds (± their standard deviation) after {config['epochs']} epochs "
        f"of {config['train_examples']} digits, batches of {config['batch_size']}; time on one "
        f"CPU thread, torch {versions['torch']}. Written by `python -m examples.digits`.",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/digits"), help="where to write")
    parser.add_argument("--epochs", type=int, default=Config.epochs)
    parser.add_argument("--seeds", type=int, default=len(Config.seeds), help="how many")
    parser.add_argument("--redraw", action="store_true", help="from results.json, without training")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "results.json"
    if not options.redraw:
        config = Config(epochs=options.epochs, seeds=tuple(range(options.seeds)))
        file.write_text(json.dumps(rounded(experiment(config))))
    results = json.loads(file.read_text())
    (options.out / "table.md").write_text(table(results))
    draw(results["runs"], best_sgd(results["runs"]), options.out / "digits.png")
    print(table(results))
    print(f"The picture is {options.out / 'digits.png'}")


if __name__ == "__main__":
    main()
