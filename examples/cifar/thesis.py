"""What the thesis reports, beside what the records say.

``python -m examples.cifar.thesis`` renders ``results/cost.md``, the thesis's sentence on cost
beside the measured time of a step.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.cifar import data as cifar
from examples.cifar import records
from examples.shared.records import Record

__all__ = ["REPORTED", "comparison", "cost"]

RESULTS = Path(__file__).parent / "results"
# The measured time of a step: `benchmarks.step_cost`.
STEP_COST = Path(__file__).parents[2] / "benchmarks/results/step_cost.json"
_TITLES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}

# Table 7.1: final test accuracy on CIFAR-100, mean and standard deviation, of ADLER, GN, SGD grid.
REPORTED = {
    ("CNN+ResNet", "relu"): ((0.399, 0.026), (0.303, 0.034), (0.304, 0.056)),
    ("CNN+ResNet", "sigmoid"): ((0.312, 0.081), (0.357, 0.062), (0.360, 0.022)),
    ("CNN+ResNet", "tanh"): ((0.364, 0.040), (0.337, 0.031), (0.339, 0.019)),
    ("ViT", "relu"): ((0.268, 0.007), (0.219, 0.033), (0.240, 0.007)),
    ("ViT", "sigmoid"): ((0.270, 0.004), (0.212, 0.042), (0.231, 0.039)),
    ("ViT", "tanh"): ((0.245, 0.024), (0.213, 0.037), (0.238, 0.023)),
}
_COMPARED = ("adler-published", "gauss-newton-published", "sgd")


def comparison(found: Sequence[Record]) -> str:
    """The thesis's table cell by cell, its remarks, and what becomes of each network.

    A pure function of the records.

    Args:
        found: Records of one preset, in any order.
    """
    parts = []
    by_size = records.by_batch_size(found)
    for size, same in by_size.items():
        if len(by_size) > 1:
            parts.append([f"Minibatches of {size}:"])
        parts += [_table(same), _footnote_17(same), _test_losses(same), _fates(same)]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _table(found: Sequence[Record]) -> list[str]:
    """Table 7.1."""
    lines = [
        "| Models | Activation | ADLER: thesis | here | GN: thesis | here | grid: thesis | here "
        "| ADLER − grid: thesis | here |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    cells = records.by_cell(found).get("cifar100", {})
    for row, reported in REPORTED.items():
        best = records.competitors(cells.get(row, []))
        entries = [*row]
        means = []
        for name, (mean, spread) in zip(_COMPARED, reported, strict=True):
            here = [r["test_accuracy"] for r in best.get(name, [])]
            means.append(statistics.fmean(here) if here else math.nan)
            deviation = statistics.stdev(here) if len(here) > 1 else 0.0
            entries += [f"{mean:.3f} ± {spread:.3f}"]
            entries += [f"{means[-1]:.3f} ± {deviation:.3f}" if here else "–"]
        entries.append(f"{reported[0][0] - reported[2][0]:+.3f}")
        entries.append(f"{means[0] - means[2]:+.3f}")
        lines.append(f"| {' | '.join(entries)} |")
    return lines


def _footnote_17(found: Sequence[Record]) -> list[str]:
    """Whether ADLER and the grid are less than a standard deviation apart on CIFAR-10."""
    rows = []
    for row, cell in records.by_cell(found).get("cifar10", {}).items():
        best = records.competitors(cell)
        both = [[r["test_accuracy"] for r in best.get(n, [])] for n in ("adler-published", "sgd")]
        if min(map(len, both)) < 2:
            continue
        means, deviations = (
            [f(part) for part in both] for f in (statistics.fmean, statistics.stdev)
        )
        apart = means[0] - means[1]
        # Of the two, the smaller and the larger: the thesis does not say whose.
        in_deviations = [abs(apart) / d if d > 0 else math.inf for d in deviations]
        said = "yes" if max(in_deviations) < 1 else "of one" if min(in_deviations) < 1 else "no"
        columns = [f"{m:.3f} ± {d:.3f}" for m, d in zip(means, deviations, strict=True)]
        distances = [f"{d:.2f}" for d in in_deviations]
        rows.append(f"| {' | '.join([*row, *columns, f'{apart:+.3f}', *distances, said])} |")
    if not rows:
        return []
    return [
        "The thesis of CIFAR-10 (footnote 17): the accuracies of ADLER and of the grid are less "
        "than a standard deviation apart. Here, in ADLER's own standard deviations and in the "
        "grid's:",
        "",
        "| Models | Activation | ADLER | grid | ADLER − grid | in ADLER's | in the grid's | less |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
    ]


def _test_losses(found: Sequence[Record]) -> list[str]:
    """How ADLER's test loss moves after its least value, and its accuracy meanwhile."""
    rows = []
    for dataset, cells in records.by_cell(found).items():
        for row, cell in cells.items():
            turns = [
                _turn(r)
                for r in records.competitors(cell).get("adler-published", [])
                if not r["diverged"] and not _at_chance(r)
            ]
            if not turns:
                continue
            epoch, growth, gain = (statistics.median(column) for column in zip(*turns, strict=True))
            last = max(r["epochs"] for r in cell)
            entries = f"{epoch:g} of {last}", f"{growth:.2f}", f"{gain:+.3f}"
            rows.append(f"| {' | '.join([_TITLES[dataset], *row, *entries, str(len(turns))])} |")
    if not rows:
        return []
    return [
        "The thesis of ADLER's test loss (section 7.8): it starts to increase dramatically after "
        "the first ten epochs, while the accuracy stabilises. Here, medians over the runs that "
        "learned:",
        "",
        "| Data | Models | Activation | Epoch of the least test loss | Last / least test loss "
        "| Accuracy gained from there to the end | Runs |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]


def _turn(record: Record) -> tuple[float, float, float]:
    """Epoch of the least test loss, its growth from there, and the accuracy gained from there."""
    losses = record["curves"]["test_loss"]
    accuracies = record["curves"]["test_accuracy"]
    known = [math.inf if loss is None else loss for loss in losses]
    at = known.index(min(known))
    return at + 1.0, known[-1] / known[at], accuracies[-1] - accuracies[at]


def _at_chance(record: Record) -> bool:
    """As in the accuracy table: noise on a small test set stays below half more than chance."""
    return bool(record["test_accuracy"] * cifar.ARCHIVES[record["dataset"]].classes < 1.5)


def cost(measured: Mapping[str, Any]) -> str:
    """The thesis's sentence on cost beside the time of a step: a pure function of the results.

    Args:
        measured: What `benchmarks.step_cost` writes.
    """
    lines = [
        "| A step of ADLER over SGD's, medians | the thesis (section 7.6) | "
        + " | ".join(measured["runs"][0]["seconds"])
        + " |",
        "|---|---|" + "---|" * len(measured["runs"][0]["seconds"]),
    ]
    for run in measured["runs"]:
        name = f"{run['device']}, {'compiled' if run['compiled'] else 'eager'}"
        ratios = [
            statistics.median(a / b for a, b in zip(t["forward"], t["SGD"], strict=True))
            for t in run["seconds"].values()
        ]
        lines.append(f"| {name} | “just twice” | {' | '.join(f'{r:.2f}' for r in ratios)} |")
    return "\n".join(lines) + "\n"


def _fates(found: Sequence[Record]) -> list[str]:
    """By network and optimizer: how many runs learned nothing, and where the rate went."""
    lines = [
        "| Network | Activation | Optimizer | Diverged | At chance | Rate, first epoch "
        "| Rate, last epoch |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in found:
        if record["optimizer"] != "sgd":
            network = f"{record['model']}, {record['normalisation']}"
            key = network, record["activation"], record["optimizer"]
            groups.setdefault(key, []).append(record)
    for key in sorted(groups):
        runs = groups[key]
        dead = sum(map(_at_chance, runs))
        rates = [r["curves"]["learning_rate"] for r in runs if not r["diverged"]]
        ends = [_median([curve[at] for curve in rates]) for at in (0, -1)]
        diverged = f"{sum(r['diverged'] for r in runs)} of {len(runs)}"
        lines.append(f"| {' | '.join([*key, diverged, f'{dead} of {len(runs)}', *ends])} |")
    return lines


def _median(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.2g}" if known else "–"


if __name__ == "__main__":
    (RESULTS / "cost.md").write_text(cost(json.loads(STEP_COST.read_text())))
