"""Figures in files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def assert_same_figures(first: Sequence[Path], second: Sequence[Path]) -> None:
    """Drawn twice, they are the same: to the byte where a file holds no rendering."""
    assert [path.name for path in first] == [path.name for path in second]
    for one, other in zip(first, second):
        assert one.stat().st_size > 10_000
        if one.suffix == ".svg":
            assert one.read_bytes() == other.read_bytes()
