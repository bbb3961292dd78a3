"""What is written of an experiment, and read again."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from adler.diagnostics.gram import Conditioning
from examples.pl_theory.config import Experiment

__all__ = ["Record", "columns", "finite", "of_kind", "read"]

Record = Mapping[str, Any]


def finite(value: Any) -> Any:
    """What JSON can hold: None in place of an infinity or NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    return [finite(entry) for entry in value] if isinstance(value, list) else value


def columns(found: Iterable[Conditioning]) -> dict[str, list[float]]:
    """A list for every attribute."""
    rows = list(found)
    return {name: [getattr(row, name) for row in rows] for name in Conditioning._fields}


def read(path: Path) -> list[Record]:
    """All whole records of a file, by key; of several with one key the first.

    Raises:
        ValueError: If a line is not a record. The message names file and line.
    """
    found: dict[str, Record] = {}
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            key = Experiment.of(record).key()
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: not a record ({error}): delete the line, and its "
                "experiment is repeated"
            ) from error
        found.setdefault(key, record)
    return [found[key] for key in sorted(found)]


def of_kind(found: Iterable[Record], kind: str, **values: Any) -> list[Record]:
    """The records of one kind whose attributes have the given values, in order of their keys."""
    chosen = [r for r in found if r["kind"] == kind and all(r[n] == v for n, v in values.items())]
    return sorted(chosen, key=lambda r: Experiment.of(r).key())
