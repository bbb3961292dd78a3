"""What the parts train on, as files that travel: ``python -m benchmarks.gpu prepare``.

The text is compressed without loss. Pictures are one mosaic, a JPEG of high quality: lossless, the
60,000 of CIFAR take 97 MB. Where the official folder lies beside it, that is read instead.
"""

from __future__ import annotations

import bz2
import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.suite.data import NOVELS, novels_path
from examples.cifar import data as cifar

__all__ = ["LARGEST", "PACKAGES", "prepare", "text", "unpack_pictures"]

LARGEST = 60 * 2**20  # bytes of a file
PACKAGES = "packages"  # what the comparison imports, beside the data
_PEERS = ("schedulefree",)
_COLUMNS = 250  # pictures side by side
_VALIDATION = 0.05


def prepare(root: Path, target: Path, datasets: list[str], quality: int = 95) -> list[Path]:
    """Writes what travels.

    Args:
        root: Holds ``novels.txt`` and the CIFAR folders or archives.
        target: Where the files go.
        datasets: Names in `examples.cifar.data.ARCHIVES`.
        quality: Of the JPEG, at most 100.

    Returns:
        The files.

    Raises:
        ValueError: If a file is larger than travels.
        FileNotFoundError: If something is missing in the root.
    """
    target.mkdir(parents=True, exist_ok=True)
    written = [target / f"{NOVELS}.bz2"]
    written[0].write_bytes(bz2.compress(novels_path(root).read_bytes()))
    for dataset in datasets:
        written += _write_mosaic(root, target, dataset, quality)
    for name in _PEERS:
        found = importlib.util.find_spec(name)
        if found is not None and found.origin is not None:
            shutil.copytree(
                Path(found.origin).parent,
                target / PACKAGES / name,
                dirs_exist_ok=True,
                ignore=shutil.ignore_patterns("__pycache__"),
            )
    for path in written:
        if path.stat().st_size > LARGEST:
            raise ValueError(
                f"{path}: {path.stat().st_size / 2**20:.0f} MiB, of which {LARGEST / 2**20:.0f} "
                "travel: lower --quality"
            )
    return written


def _write_mosaic(root: Path, target: Path, dataset: str, quality: int) -> list[Path]:
    from PIL import Image

    archive = cifar.ARCHIVES[dataset]
    train_x, train_y, test_x, test_y = cifar.read(archive, cifar.locate(archive, root))
    pixels = np.concatenate([train_x, test_x])
    missing = -len(pixels) % _COLUMNS
    padded = np.concatenate([pixels, np.zeros((missing, 3072), np.uint8)])
    tiles = padded.reshape(-1, _COLUMNS, 3, 32, 32).transpose(0, 3, 1, 4, 2)
    mosaic = tiles.reshape(-1, 32 * _COLUMNS, 3)
    picture, labels = target / f"{dataset}.jpg", target / f"{dataset}-labels.npz"
    Image.fromarray(mosaic).save(picture, quality=quality, subsampling=0)
    np.savez_compressed(labels, train=train_y, test=test_y)
    return [picture, labels]


def unpack_pictures(root: Path, dataset: str) -> str | None:
    """Makes the official folder from the mosaic, where only that is there.

    Returns:
        What the pictures are, in words; None if neither is there.
    """
    archive = cifar.ARCHIVES[dataset]
    picture, note = root / f"{dataset}.jpg", root / archive.folder / "made-from-jpeg"
    if (root / archive.folder).is_dir():
        return f"{dataset}, as JPEG" if note.exists() else dataset
    if not picture.is_file():
        return None
    from PIL import Image

    labels = np.load(root / f"{dataset}-labels.npz")
    with Image.open(picture) as opened:
        mosaic: npt.NDArray[Any] = np.asarray(opened.convert("RGB"))
    tiles = mosaic.reshape(-1, 32, _COLUMNS, 32, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3072)
    count = len(labels["train"])
    test = tiles[count : count + len(labels["test"])]
    # Moved there whole: what is cut short is not taken for the official folder.
    with tempfile.TemporaryDirectory(dir=root) as made:
        cifar.write(Path(made), dataset, (tiles[:count], labels["train"]), (test, labels["test"]))
        (Path(made) / archive.folder / note.name).touch()
        (Path(made) / archive.folder).rename(root / archive.folder)
    return f"{dataset}, as JPEG"


def text(root: Path | None, device: str) -> tuple[Tensor, Tensor]:
    """Bytes of the novels for training, and the last twentieth for testing; on the device.

    Args:
        root: Holds ``novels.txt`` or ``novels.txt.bz2``; None: random words stand in.
        device: Where.

    Raises:
        FileNotFoundError: If neither is there.
    """
    if root is None:
        draw = np.random.default_rng(0)
        words = [bytes(draw.integers(97, 123, size=n, dtype=np.uint8)) for n in (3, 5, 7, 4)]
        content = b" ".join(words[i] for i in draw.integers(4, size=4000))
    elif (root / f"{NOVELS}.bz2").is_file() and not (root / NOVELS).is_file():
        content = bz2.decompress((root / f"{NOVELS}.bz2").read_bytes())
    else:
        content = novels_path(root).read_bytes()
    ids = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(device)
    border = int((1 - _VALIDATION) * len(ids))
    return ids[:border], ids[border:]
