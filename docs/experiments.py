"""What experiments write beside their records, as part of the site.

A hook of mkdocs. The files stay where the experiment puts them, and pages link to them there, so
that the links work in the repository as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
# Folder of the site, folder of the repository, and which of its files.
SHOWN = (
    ("theory", "examples/pl_theory/results/thesis", ("*.md", "*.png")),
    ("assets/cifar", "examples/cifar/results", ("**/*.png",)),
)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links of pages at the top to those files, as the site has them."""
    for where, folder, _patterns in SHOWN:
        markdown = markdown.replace(f"](../../{folder}/", f"]({where}/")
    return markdown


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Adds them, by their paths below the folder."""
    for where, folder, patterns in SHOWN:
        for pattern in patterns:
            for path in sorted((ROOT / folder).glob(pattern)):
                name = f"{where}/{path.relative_to(ROOT / folder).as_posix()}"
                files.append(File.generated(config, name, abs_src_path=str(path)))
    return files
