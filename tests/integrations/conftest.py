"""Which integrations ran, with which versions: rows for the table in the documentation.

A test marked ``@pytest.mark.row("DDP, 2 processes, gloo", versions=["torch"])`` counts for that
row. ``--matrix FILE`` merges the rows that ran into a JSON file; see ``docs/matrix.py``.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from support.launch import SCRIPTS

sys.path.append(str(SCRIPTS))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--matrix", type=Path, help="merge the rows that ran into this JSON file")
    parser.addoption("--soak-steps", type=int, default=3000, help="steps of each soak of habits")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Matrix(config.getoption("--matrix")), "matrix")


class Matrix:
    """Collects outcomes of marked tests."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: dict[str, dict[str, object]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Iterator[None]:
        report = yield
        marker = item.get_closest_marker("row")
        if marker is not None and (report.when == "call" or report.outcome != "passed"):
            packages = dict.fromkeys(["torch", *marker.kwargs.get("versions", [])])
            row = self.rows.setdefault(
                marker.args[0],
                {
                    "passed": 0,
                    "failed": 0,
                    "skipped": 0,
                    "versions": {p: metadata.version(p) for p in packages if _installed(p)},
                    "python": platform.python_version(),
                },
            )
            row[report.outcome] += 1
        return report

    def pytest_sessionfinish(self) -> None:
        if self.path is None:
            return
        known = json.loads(self.path.read_text()) if self.path.exists() else {}
        rows = dict(sorted({**known, **self.rows}.items()))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


def _installed(package: str) -> bool:
    return any(True for _ in metadata.distributions(name=package))
