"""Metadata of the package that only the build knows: where the repository is.

``REPOSITORY_URL`` says so, which the release workflow sets. With it the package has links to its
repository, and the README's links and pictures work on the package index; without it they are left
out.
"""

from __future__ import annotations

import os
import runpy
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class RepositoryLinks(MetadataHookInterface):
    """Sets ``readme`` and ``urls``."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Called by hatchling with the ``[project]`` table."""
        root = Path(self.root)
        repository = os.environ.get("REPOSITORY_URL") or None
        version = metadata["version"]
        absolute = runpy.run_path(str(root / "docs/links.py"))["absolute"]
        text = absolute((root / "README.md").read_text("utf-8"), repository, f"v{version}")
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        metadata["urls"] = {"Paper": "https://arxiv.org/abs/2305.16396"}
        if repository is not None:
            where = repository.rstrip("/")
            metadata["urls"] |= {
                "Repository": where,
                "Documentation": f"{where}/blob/v{version}/docs/pages/index.md",
                "Changelog": f"{where}/blob/v{version}/CHANGELOG.md",
                "Issues": f"{where}/issues",
            }
