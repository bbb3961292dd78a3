"""Renders measured tables into the README, between a comment that names the file and an end."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- (?P<file>\S+\.md) -->\n).*?(<!-- end -->)", re.DOTALL)


def render(text: str) -> str:
    """The text with every block replaced by its file."""

    def block(match: re.Match[str]) -> str:
        return match[1] + "\n" + (ROOT / match["file"]).read_text() + "\n" + match[3]

    return BLOCK.sub(block, text)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(render(readme.read_text()))
