"""The records of finished runs: JSON lines on disk, and what is chosen from them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from examples.cifar.config import Run
from examples.cifar.optimizers import OPTIMIZERS

__all__ = ["ROWS", "Record", "append", "by_cell", "competitors", "read", "repair", "setting"]

Record = Mapping[str, Any]

# A row of the thesis's table pools models.
ROWS = {"cnn": "CNN+ResNet", "resnet": "CNN+ResNet", "vit": "ViT"}


def append(path: Path, record: Record) -> None:
    """Adds a record, to six digits, and waits until it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(_rounded(record), separators=(",", ":"), allow_nan=False)
    with path.open("a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, list) else value


def repair(path: Path) -> None:
    """Cuts a last line that a kill left incomplete; its run is repeated."""
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with path.open("r+b") as file:
                file.truncate(whole)


def read(directory: Path) -> list[Record]:
    """All records in a directory's ``*.jsonl``, by key; of several with one key the first.

    Raises:
        ValueError: If a line is not a record. The message names file and line.
    """
    found: dict[str, Record] = {}
    for path in sorted(directory.glob("*.jsonl")):
        # What follows the last newline is being written by another shard, or was cut off.
        for number, line in enumerate(path.read_text().split("\n")[:-1], start=1):
            try:
                record = json.loads(line)
                key = Run.of(record).key()
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number}: not a record ({error}): delete the line, and its run "
                    "is repeated"
                ) from error
            found.setdefault(key, record)
    return [found[key] for key in sorted(found)]


def setting(record: Record) -> str:
    """All that a record shares with the runs it is compared with: the key but the optimizer."""
    return replace(Run.of(record), optimizer="adler", lr=None).key()


def competitors(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The runs that are compared, by optimizer, in the order of the table's columns.

    Of a tuned optimizer only the best of the grid enters, by final test accuracy, chosen anew for
    each setting (network, data, seed); of equal ones the one with the smallest learning rate.
    """
    chosen: dict[tuple[str, str], Record] = {}
    for record in sorted(records, key=lambda r: (setting(r), r["lr"] or 0.0)):
        slot = record["optimizer"], setting(record)
        if slot not in chosen or record["test_accuracy"] > chosen[slot]["test_accuracy"]:
            chosen[slot] = record
    found: dict[str, list[Record]] = {name: [] for name in OPTIMIZERS}
    for (name, _), record in chosen.items():
        found[name].append(record)
    return {name: runs for name, runs in found.items() if runs}


def by_cell(records: Iterable[Record]) -> dict[str, dict[tuple[str, str], list[Record]]]:
    """Records by data set, then by the table's row: models and activation."""
    found: dict[str, dict[tuple[str, str], list[Record]]] = {}
    for record in records:
        row = ROWS[record["model"]], record["activation"]
        found.setdefault(record["dataset"], {}).setdefault(row, []).append(record)
    return {
        dataset: {row: found[dataset][row] for row in sorted(found[dataset])}
        for dataset in sorted(found, reverse=True)  # CIFAR-100, the thesis's table, comes first
    }
