"""Renders which integrations were tested, with which versions, into the page on training loops.

The rows are what `pytest tests/integrations --matrix docs/data/matrix.json` ran.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "docs/data/matrix.json"
PAGE = ROOT / "docs/pages/training-loops.md"
BEGIN, END = "<!-- matrix -->\n", "<!-- end -->"


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table of rows by name.

    Examples:
        >>> row = {"passed": 3, "failed": 0, "skipped": 1, "python": "3.11",
        ...        "versions": {"torch": "2.13.0"}}
        >>> print(table({"DDP": row}))
        | what | tests | outcome | with |
        |---|---|---|---|
        | DDP | 3 | passed, 1 skipped | torch 2.13.0, Python 3.11 |
    """
    lines = ["| what | tests | outcome | with |", "|---|---|---|---|"]
    for name, row in sorted(rows.items()):
        versions = [f"{package} {version}" for package, version in row["versions"].items()]
        used = ", ".join([*versions, f"Python {row['python']}"])
        tests = row["passed"] + row["failed"]
        lines.append(f"| {name} | {tests} | {_outcome(row)} | {used} |")
    return "\n".join(lines)


def _outcome(row: Mapping[str, Any]) -> str:
    said = [f"{row['failed']} failed"] if row["failed"] else ["passed"] if row["passed"] else []
    return ", ".join([*said, *([f"{row['skipped']} skipped"] if row["skipped"] else [])])


def render(page: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The page with the table between its two comments."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END, 1)
    return f"{before}{BEGIN}\n{table(rows)}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(), json.loads(DATA.read_text())))
