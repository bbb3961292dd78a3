"""Time of a training step over that of SGD, for several networks and engines.

    python -m benchmarks.step_cost --out benchmarks/results

All methods take turns, step by step, on the same batch, so that noise in the machine's speed meets
all alike; the table shows medians of the ratio to SGD's step in the same round, with quartiles.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import adler

Factory = Callable[[nn.Module, nn.Module], torch.optim.Optimizer]

METHODS: dict[str, Factory] = {
    "SGD": lambda model, loss: torch.optim.SGD(model.parameters(), lr=1e-3),
    "forward": lambda model, loss: adler.Adler(model.parameters(), model, loss),
    "finite_difference": lambda model, loss: adler.Adler(
        model.parameters(), model, loss, jvp="finite_difference"
    ),
    "double_backward": lambda model, loss: adler.Adler(
        model.parameters(), model, loss, jvp="double_backward"
    ),
    "finite_difference, every 4": lambda model, loss: adler.Adler(
        model.parameters(), model, loss, jvp="finite_difference", curvature_every=4
    ),
}


@dataclass(frozen=True)
class Task:
    """A network and the shape of one example."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch_size: int = 64
    classes: int = 10


def mlp() -> nn.Module:
    """1.0 million parameters."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 768),
        nn.ReLU(),
        nn.Linear(768, 512),
        nn.ReLU(),
        nn.Linear(512, 10),
    )


def cnn_bn() -> nn.Module:
    """Three convolutions with BatchNorm, on images of 32 x 32."""
    layers: list[nn.Module] = []
    for inside, outside in ((3, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(inside, outside, 3, padding=1), nn.BatchNorm2d(outside), nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 10))


class Transformer(nn.Module):
    """Two encoder layers of width 128 on sequences of 64 tokens."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of shape ``(b, 10)``."""
        scores: Tensor = self.head(self.encoder(x).mean(1))
        return scores


TASKS: dict[str, Task] = {
    "MLP, 1.0 M": Task(mlp, (784,)),
    "CNN + BatchNorm, 0.07 M": Task(cnn_bn, (3, 32, 32)),
    "Transformer, 0.27 M": Task(Transformer, (64, 128), batch_size=32),
}


def measure(task: Task, rounds: int, warmup: int = 5) -> dict[str, list[float]]:
    """Seconds of each method's step in each round."""
    torch.manual_seed(0)
    x = torch.randn(task.batch_size, *task.shape)
    y = torch.randint(task.classes, (task.batch_size,))
    runs = {}
    for name, make in METHODS.items():
        torch.manual_seed(1)
        model, criterion = task.build(), nn.CrossEntropyLoss()
        runs[name] = (model, criterion, make(model, criterion))
    times: dict[str, list[float]] = {name: [] for name in METHODS}
    for number in range(warmup + rounds):
        for name, (model, criterion, optimizer) in runs.items():
            begun = time.perf_counter()
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
            if number >= warmup:
                times[name].append(time.perf_counter() - begun)
    return times


def blocks(values: list[float], size: int) -> np.ndarray[Any, Any]:
    """Sums over consecutive rounds, so that a step that measures every 4 is seen whole."""
    summed: np.ndarray[Any, Any] = np.asarray(values).reshape(-1, size).sum(1)
    return summed


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    methods = [name for name in METHODS if name != "SGD"]
    lines = [
        "| network | SGD, ms | " + " | ".join(f"`{name}`" for name in methods) + " |",
        "|---|---|" + "---|" * len(methods),
    ]
    for task, times in results["seconds"].items():
        base = blocks(times["SGD"], 4)
        cells = [f"{250 * np.median(base):.1f}"]
        for name in methods:
            low, middle, high = np.percentile(blocks(times[name], 4) / base, [25, 50, 75])
            cells.append(f"{middle:.2f} ({low:.2f}–{high:.2f})")
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Medians of {results['rounds']} interleaved steps (quartiles), "
        f"{results['threads']} CPU thread, torch {results['versions']['torch']}, "
        f"{results['machine']}. Written by `python -m benchmarks.step_cost`.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/step_cost"))
    parser.add_argument("--rounds", type=int, default=80, help="a multiple of 4")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    seconds = {name: measure(task, options.rounds) for name, task in tqdm(TASKS.items())}
    results = {
        "rounds": options.rounds,
        "threads": options.threads,
        "machine": platform.machine(),
        "versions": {"torch": torch.__version__, "adler": adler.__version__},
        "seconds": {
            task: {name: [round(t, 7) for t in times] for name, times in by_method.items()}
            for task, by_method in seconds.items()
        },
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "step_cost.json").write_text(json.dumps(results))
    (options.out / "step_cost.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
