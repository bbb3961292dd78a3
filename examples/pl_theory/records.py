"""What is read of an experiment's records."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from adler.diagnostics.gram import Conditioning
from examples.pl_theory.config import Experiment
from examples.shared import records
from examples.shared.records import Record, finite

__all__ = ["Record", "columns", "finite", "of_kind", "read"]


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
