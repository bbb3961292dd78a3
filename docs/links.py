"""The README as the package index shows it: there a link to a file of the repository leads nowhere.

`hatch_build.py` runs this when a package is built, and takes the repository's address from the
environment: the same files build from any copy of the repository.
"""

from __future__ import annotations

import re

# ![text](target) and [text](target), but for addresses and anchors of the page itself.
LINK = re.compile(
    r"(?P<image>!?)\[(?P<text>[^\[\]]*)\]\((?P<target>(?!https?:|#|mailto:)[^)\s]+)\)"
)
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def absolute(text: str, repository: str | None, ref: str) -> str:
    """The text with every link to a file of the repository made absolute.

    Without an address links become their text, and images are left out: better none than broken.

    Args:
        text: Markdown; code blocks stay as they are.
        repository: Such as ``"https://example.org/owner/name"``; None: not known.
        ref: Tag or commit whose files are meant.

    Examples:
        >>> where = "https://example.org/a/b"
        >>> absolute("[Cost](docs/cost.md#time)", where, "v1")
        '[Cost](https://example.org/a/b/blob/v1/docs/cost.md#time)'
        >>> absolute("![Loss](loss.png)", where, "v1")
        '![Loss](https://example.org/a/b/raw/v1/loss.png)'
        >>> absolute("![Loss](loss.png)[Cost](cost.md)", None, "v1")
        'Cost'
    """

    def replaced(match: re.Match[str]) -> str:
        image, shown, target = match["image"], match["text"], match["target"]
        if repository is None:
            return "" if image else shown
        kind = "raw" if image else "blob"
        return f"{image}[{shown}]({repository.rstrip('/')}/{kind}/{ref}/{target})"

    parts = FENCE.split(text)  # code stands at the odd places
    return "".join(p if i % 2 else LINK.sub(replaced, p) for i, p in enumerate(parts))
