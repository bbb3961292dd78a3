"""What AlgoPerf's runner measured, as records and as tables."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.shared.records import Record

__all__ = ["evaluations", "reached", "table"]

_COLUMNS = {
    "step": "global_step",
    "seconds": "accumulated_submission_time",
    "train_loss": "train/loss",
    "validation_loss": "validation/loss",
    "validation_accuracy": "validation/accuracy",
    "test_accuracy": "test/accuracy",
}


def evaluations(file: Path) -> list[dict[str, float]]:
    """AlgoPerf's ``eval_measurements.csv``, of which what is compared here.

    Raises:
        ValueError: If it holds no evaluation.
    """
    with file.open() as lines:
        rows = [
            {name: float(row[column]) for name, column in _COLUMNS.items()}
            for row in csv.DictReader(lines)
            if row.get("validation/accuracy")
        ]
    if not rows:
        raise ValueError(f"{file}: no evaluation: the run ended before its first")
    return rows


def reached(record: Record, target: float, unit: str) -> float:
    """Seconds or steps when validation accuracy is first at least the target; else infinity."""
    for row in record["evaluations"]:
        if row["validation_accuracy"] >= target:
            return float(row[unit])
    return math.inf


def table(
    found: Sequence[Record], labels: Mapping[str, str], targets: Mapping[str, Sequence[float]]
) -> str:
    """A table of each workload: medians over seeds, as AlgoPerf's of studies; ranges beside them.

    Args:
        found: Records.
        labels: Of the submissions, in the order of the rows.
        targets: Validation accuracies, by the name of the data.
    """
    parts = []
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in found:
        key = record["workload"], record["data"], record["budget"]
        groups.setdefault(key, []).append(record)
    for (workload, data, budget), mine in groups.items():
        heads = ["Submission", "seeds", "steps / s", "best validation accuracy"]
        heads += [f"to {target:g}: s" for target in targets[data]]
        heads += [f"to {target:g}: steps" for target in targets[data]]
        lines = [f"### {workload}: {data}; {budget}", "", f"| {' | '.join(heads)} |"]
        lines.append(f"|{'---|' * len(heads)}")
        for name, label in labels.items():
            runs = [r for r in mine if r["submission"] == name]
            if not runs:
                continue
            last = [r["evaluations"][-1] for r in runs]
            best = [max(e["validation_accuracy"] for e in r["evaluations"]) for r in runs]
            cells = [label, str(len(runs))]
            cells.append(_middle([e["step"] / e["seconds"] for e in last], "{:.0f}".format))
            cells.append(_middle(best, "{:.4f}".format))
            for unit in ("seconds", "step"):
                cells += [
                    _middle([reached(r, t, unit) for r in runs], "{:.0f}".format)
                    for t in targets[data]
                ]
            lines.append(f"| {' | '.join(cells)} |")
        versions = sorted({", ".join(f"{k} {v}" for k, v in r["versions"].items()) for r in mine})
        lines += ["", f"{'; '.join(versions)}; {mine[0]['machine']}.", ""]
        parts.append("\n".join(lines))
    parts.append(
        "Median over seeds (least to largest). Times are AlgoPerf's accumulated submission time: "
        "training and `prepare_for_eval`, without evaluation, in steps of its evaluation period. "
        "∞: not reached within the budget.\n"
    )
    return "\n".join(parts)


def _middle(values: Sequence[float], show: Callable[[float], str]) -> str:
    def shown(value: float) -> str:
        return show(value) if math.isfinite(value) else "∞"

    middle = shown(statistics.median_low(values) if len(values) % 2 else _even(values))
    return middle if len(values) == 1 else f"{middle} ({shown(min(values))}–{shown(max(values))})"


def _even(values: Sequence[float]) -> Any:
    low, high = statistics.median_low(values), statistics.median_high(values)
    return high if math.isinf(high) else (low + high) / 2
