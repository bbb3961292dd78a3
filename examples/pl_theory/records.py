"""What is read of an experiment's records."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from adler.diagnostics.gram import Conditioning
from examples.pl_theory.config import Experiment
from examples.shared import records
from examples.shared.records import Record, finite

__all__ = ["Record", "columns", "finite", "gram_rows", "of_kind", "read"]


def columns(found: Iterable[Conditioning]) -> dict[str, list[float]]:
    """A list for every attribute."""
    rows = list(found)
    return {name: [getattr(row, name) for row in rows] for name in Conditioning._fields}


def read(path: Path) -> list[Record]:
    """All records of a file, by key: `examples.shared.records.read`."""
    return records.read([path], lambda record: Experiment.of(record).key())


def of_kind(found: Iterable[Record], kind: str, **values: Any) -> list[Record]:
    """The records of one kind whose attributes have the given values, in order of their keys."""
    chosen = [r for r in found if r["kind"] == kind and all(r[n] == v for n, v in values.items())]
    return sorted(chosen, key=lambda r: Experiment.of(r).key())


def gram_rows(record: Record) -> list[list[dict[str, float]]]:
    """The resolved Gram matrices of a record, relative to their smallest diagonal entries.

    Of an ``initialisation`` a list over layers, without the inputs, for every number of examples;
    of a ``training`` a list over the measured steps for every layer.
    """
    results = record["results"]
    tables, first = (
        (results["layers"], 1) if record["kind"] == "initialisation" else (results["grams"], 0)
    )
    names = {
        "row_sum": "max_row_sum",
        "off_diagonal": "max_off_diagonal",
        "smallest": "smallest",
        "lower": "lower",
    }
    return [
        [
            {short: table[name][i] / table["min_diagonal"][i] for short, name in names.items()}
            | {"log_condition": table["log_condition"][i]}
            for i in range(first, len(table["smallest"]))
            if table["log_condition"][i] is not None
        ]
        for table in tables.values()
    ]
