"""The records of finished runs, and what is chosen from them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from examples.cifar.config import Run
from examples.cifar.optimizers import OPTIMIZERS
from examples.shared import records
from examples.shared.records import Record

__all__ = ["ROWS", "by_batch_size", "by_cell", "competitors", "read", "setting", "variations"]

# A row of the thesis's table pools models.
ROWS = {"cnn": "CNN+ResNet", "resnet": "CNN+ResNet", "vit": "ViT"}


def read(directory: Path) -> list[Record]:
    """All records in a directory's ``*.jsonl``, by key: `examples.shared.records.read`."""
    return records.read([directory], lambda record: Run.of(record).key())


def setting(record: Record) -> str:
    """All that a record shares with the runs it is compared with: the key but the optimizer."""
    return replace(Run.of(record), optimizer="adler", lr=None).key()


def competitors(found: Iterable[Record]) -> dict[str, list[Record]]:
    """The runs that are compared, by optimizer, in the order of the table's columns.

    Of a tuned optimizer only the best of the grid enters, by final test accuracy, chosen anew for
    each setting (network, data, seed); of equal ones the one with the smallest learning rate.
    """
    chosen: dict[tuple[str, str], Record] = {}
    for record in sorted(found, key=lambda r: (setting(r), r["lr"] or 0.0)):
        slot = record["optimizer"], setting(record)
        if slot not in chosen or record["test_accuracy"] > chosen[slot]["test_accuracy"]:
            chosen[slot] = record
    runs: dict[str, list[Record]] = {name: [] for name in OPTIMIZERS}
    for (name, _), record in chosen.items():
        runs[name].append(record)
    return {name: mine for name, mine in runs.items() if mine}


def by_batch_size(found: Iterable[Record]) -> dict[int, list[Record]]:
    """Records by size of the minibatches, ascending."""
    groups: dict[int, list[Record]] = {}
    for record in found:
        groups.setdefault(record["batch_size"], []).append(record)
    return dict(sorted(groups.items()))


def variations(found: Iterable[Record]) -> int:
    """How many networks on data: all that differs but the optimizer and the minibatches."""
    return len({setting({**r, "batch_size": 1}) for r in found})


def by_cell(found: Iterable[Record]) -> dict[str, dict[tuple[str, str], list[Record]]]:
    """Records by data set, then by the table's row: models and activation."""
    cells: dict[str, dict[tuple[str, str], list[Record]]] = {}
    for record in found:
        row = ROWS[record["model"]], record["activation"]
        cells.setdefault(record["dataset"], {}).setdefault(row, []).append(record)
    return {
        dataset: {row: cells[dataset][row] for row in sorted(cells[dataset])}
        for dataset in sorted(cells, reverse=True)  # CIFAR-100, the thesis's table, comes first
    }
