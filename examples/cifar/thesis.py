"""What the thesis reports, beside what the records say."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from examples.cifar import data as cifar
from examples.cifar import records
from examples.shared.records import Record

__all__ = ["REPORTED", "comparison"]

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
    """The thesis's table cell by cell, then what becomes of each network: a pure function.

    Args:
        found: Records of one preset, in any order.
    """
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
    return "\n".join([*lines, "", *_fates(found)]) + "\n"


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
        # As in the accuracy table: noise on a small test set stays below half more than chance.
        dead = sum(r["test_accuracy"] * cifar.ARCHIVES[r["dataset"]].classes < 1.5 for r in runs)
        rates = [r["curves"]["learning_rate"] for r in runs if not r["diverged"]]
        ends = [_median([curve[at] for curve in rates]) for at in (0, -1)]
        diverged = f"{sum(r['diverged'] for r in runs)} of {len(runs)}"
        lines.append(f"| {' | '.join([*key, diverged, f'{dead} of {len(runs)}', *ends])} |")
    return lines


def _median(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.2g}" if known else "–"
