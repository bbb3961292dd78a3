"""Records of finished runs: JSON lines on disk."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["Record", "append", "finite", "read", "repair", "rounded"]

Record = Mapping[str, Any]


def append(path: Path, record: Record) -> None:
    """Adds a record, to six digits, and waits until it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(rounded(record), separators=(",", ":"), allow_nan=False)
    with path.open("a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(paths: Iterable[Path], key: Callable[[Record], str]) -> list[Record]:
    """All whole records of the files, by key; of several with one key the first.

    Args:
        paths: Files, or directories, of which all ``*.jsonl`` count; what is not there is empty.
        key: A record's identity; raises ValueError, KeyError or TypeError for what is none.

    Raises:
        ValueError: If a line is not a record. The message names file and line.
    """
    found: dict[str, Record] = {}
    files = (sorted(path.glob("*.jsonl")) if path.is_dir() else [path] for path in paths)
    for file in itertools.chain.from_iterable(files):
        # What follows the last newline is being written by another process, or was cut off.
        lines = file.read_text().split("\n")[:-1] if file.exists() else []
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                name = key(record)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{file}, line {number}: not a record ({error}): delete the line, and its run "
                    "is repeated"
                ) from error
            found.setdefault(name, record)
    return [found[name] for name in sorted(found)]


def repair(path: Path) -> None:
    """Cuts a last line that a kill left incomplete; its run is repeated."""
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with path.open("r+b") as file:
                file.truncate(whole)


def rounded(value: Any) -> Any:
    """Floats to six significant digits, wherever they are.

    Examples:
        >>> rounded({"a": [1 / 3, 2], "b": ("c", 1e6 / 7)})
        {'a': [0.333333, 2], 'b': ['c', 142857.0]}
    """
    return _mapped(value, lambda number: float(f"{number:.6g}"))


def finite(value: Any) -> Any:
    """What JSON can hold: None in place of an infinity or NaN.

    Examples:
        >>> finite([1.0, float("inf"), {"a": float("nan")}])
        [1.0, None, {'a': None}]
    """
    return _mapped(value, lambda number: number if math.isfinite(number) else None)


def _mapped(value: Any, change: Callable[[float], Any]) -> Any:
    if isinstance(value, float):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(entry, change) for key, entry in value.items()}
    return [_mapped(entry, change) for entry in value] if isinstance(value, list | tuple) else value
