"""Renders measured tables into the README, between a comment that names the file and an end.

``<!-- table.md -->`` takes a whole file, ``<!-- table.md:part -->`` what stands in it between the
markers of that part.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(
    r"(<!-- (?P<file>\S+\.md)(:(?P<part>\w+))? -->\n).*?(?P<end><!-- end -->)", re.DOTALL
)


def render(text: str) -> str:
    """The text with every block replaced by its file."""

    def block(match: re.Match[str]) -> str:
        found = (ROOT / match["file"]).read_text()
        if match["part"] is not None:
            start, end = (
                f"<!-- --8<-- [{mark}:{match['part']}] -->\n" for mark in ("start", "end")
            )
            found = found.split(start)[1].split(end)[0].strip() + "\n"
        return match[1] + "\n" + found + "\n" + match["end"]

    return BLOCK.sub(block, text)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(render(readme.read_text()))
