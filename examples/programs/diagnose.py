"""Looks at a network while `Adler` trains it on digits: ``python -m examples.programs.diagnose``.

Writes the snapshots, their table and the picture of the documentation's page on diagnostics.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn

import adler
from adler import diagnostics

__all__ = ["table"]

OUT = Path(__file__).resolve().parents[2] / "docs/pages/assets/diagnostics"


def run(steps: int, every: int, seed: int) -> dict[str, Any]:
    """Trains, and takes a snapshot every so many minibatches."""
    torch.manual_seed(seed)
    pixels, digits = load_digits(return_X_y=True)
    x = torch.as_tensor(pixels / 16, dtype=torch.float32)
    y = torch.as_tensor(digits)
    model = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    criterion = nn.CrossEntropyLoss()
    optimizer = adler.Adler(model.parameters(), model, criterion)
    monitor = diagnostics.Monitor(model, criterion, every=every)
    for _ in range(steps):
        batch = torch.randint(len(x), (64,))
        monitor(x[batch], y[batch])
        optimizer.zero_grad()
        criterion(model(x[batch]), y[batch]).backward()
        optimizer.step()
    return {
        "steps": steps,
        "every": every,
        "seed": seed,
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "adler": adler.__version__},
        "snapshots": [
            {key: _rounded(value) for key, value in snapshot._asdict().items()}
            for snapshot in monitor.snapshots
        ],
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def found_in(results: dict[str, Any]) -> diagnostics.Report:
    """The report of stored results."""
    return diagnostics.Report(tuple(diagnostics.Snapshot(**s) for s in results["snapshots"]))


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    return found_in(results).table() + (
        f"\nOver {len(results['snapshots'])} minibatches of {results['steps']}, seed "
        f"{results['seed']}, torch {results['versions']['torch']}. Written by "
        "`python -m examples.programs.diagnose`.\n"
    )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = run(options.steps, options.every, options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(json.dumps(results))
    (options.out / "table.md").write_text(table(results))
    found_in(results).plot().savefig(options.out / "report.png", dpi=120)
    print(table(results))


if __name__ == "__main__":
    main()
