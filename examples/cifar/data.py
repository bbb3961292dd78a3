"""CIFAR-10 and CIFAR-100 from the official archives, normalised and in memory.

The archives hold pickles, which can run any code when read. These are read by an unpickler that
knows NumPy's ``uint8`` arrays and nothing else, straight from the archive: nothing is extracted.
"""

from __future__ import annotations

import io
import pickle
import tarfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["ARCHIVES", "Archive", "Data", "load", "locate", "read", "synthetic", "write"]

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Archive:
    """An official archive ("python version")."""

    name: str
    md5: str
    folder: str
    classes: int
    train: tuple[str, ...]
    test: tuple[str, ...]
    label: bytes

    @property
    def url(self) -> str:
        """Where it is published."""
        return f"https://www.cs.toronto.edu/~kriz/{self.name}"


ARCHIVES = {
    "cifar10": Archive(
        name="cifar-10-python.tar.gz",
        md5="c58f30108f718f92721af3b95e74349a",
        folder="cifar-10-batches-py",
        classes=10,
        train=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test=("test_batch",),
        label=b"labels",
    ),
    "cifar100": Archive(
        name="cifar-100-python.tar.gz",
        md5="eb9058c3a382ffc7106e4002c42a8d85",
        folder="cifar-100-python",
        classes=100,
        train=("train",),
        test=("test",),
        label=b"fine_labels",
    ),
}


class Data(NamedTuple):
    """Pictures ``[N, 3, 32, 32]``, float, normalised by channel, and their labels ``[N]``."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int


def load(
    dataset: str,
    root: Path,
    device: torch.device | str = "cpu",
    train_examples: int | None = None,
    test_examples: int | None = None,
) -> Data:
    """Reads a data set onto the device.

    A subset is the first n of one fixed permutation: the same for every optimizer and every seed,
    and a smaller one is part of a larger one. The channels are normalised by the mean and standard
    deviation of the training pictures used.

    Args:
        dataset: A name in `ARCHIVES`.
        root: Holds the extracted folder or the archive; otherwise the archive is downloaded there.
        device: Where the tensors go.
        train_examples: Training pictures; all of them if None.
        test_examples: Test pictures; all of them if None.

    Raises:
        ValueError: For an unknown data set, more examples than there are, or a file that is not
            what it should be. The message names the file and says what to do.
        FileNotFoundError: If the extracted folder lacks a file.
    """
    if dataset not in ARCHIVES:
        raise ValueError(f"dataset={dataset!r}: expected one of {', '.join(ARCHIVES)}")
    archive = ARCHIVES[dataset]
    source = locate(archive, root)
    train_pixels, train_labels, test_pixels, test_labels = read(archive, source)
    train = _subset(len(train_labels), train_examples, "train_examples")
    test = _subset(len(test_labels), test_examples, "test_examples")
    x = _pictures(train_pixels[train], device)
    mean = x.mean((0, 2, 3), keepdim=True)
    std = x.std((0, 2, 3), keepdim=True, correction=0)
    return Data(
        (x - mean) / std,
        torch.from_numpy(train_labels[train]).to(device),
        (_pictures(test_pixels[test], device) - mean) / std,
        torch.from_numpy(test_labels[test]).to(device),
        archive.classes,
    )


def _subset(available: int, wanted: int | None, name: str) -> Labels:
    if wanted is None:
        return np.arange(available)
    if not 1 <= wanted <= available:
        raise ValueError(f"{name}={wanted}: the data set has {available}")
    return np.random.default_rng(0).permutation(available)[:wanted]


def _pictures(pixels: Pixels, device: torch.device | str) -> Tensor:
    return torch.from_numpy(pixels).to(device).view(-1, 3, 32, 32).float().div_(255)


def prepare(datasets: Iterable[str], root: Path, synthetic_too: bool = False) -> None:
    """Downloads or makes what is missing, before several processes look for it.

    Args:
        datasets: Names in `ARCHIVES`.
        root: See `load`.
        synthetic_too: Whether a data set is made where its folder is not there.

    Raises:
        ValueError, FileNotFoundError: See `locate`.
    """
    for dataset in datasets:
        archive = ARCHIVES[dataset]
        if synthetic_too and not (root / archive.folder).is_dir():
            synthetic(root, dataset)
        locate(archive, root)


def locate(archive: Archive, root: Path) -> Path:
    """The extracted folder or else the archive in `root`, downloaded if neither is there.

    Raises:
        ValueError: If the archive's checksum is wrong.
    """
    folder, packed = root / archive.folder, root / archive.name
    if folder.is_dir():
        return folder
    import pooch  # for archives alone: a machine that is given folders need not have it

    if not packed.is_file():
        # Pooch downloads to a temporary name and moves the file after the checksum.
        try:
            pooch.retrieve(archive.url, f"md5:{archive.md5}", archive.name, root, progressbar=True)
        except OSError as error:
            raise FileNotFoundError(
                f"{packed}: missing, and {archive.url} could not be downloaded ({error}): download "
                f"it by hand into {root}"
            ) from error
    digest = pooch.file_hash(str(packed), alg="md5")
    if digest != archive.md5:
        raise ValueError(
            f"{packed}: its MD5 is {digest}, not {archive.md5}: truncated or altered; delete it, "
            f"so that it is downloaded again from {archive.url}"
        )
    return packed


def read(archive: Archive, source: Path) -> tuple[Pixels, Labels, Pixels, Labels]:
    """Training pixels ``[N, 3072]`` and labels ``[N]``, then those of the test set."""
    remedy = f"delete {source} and download {archive.url} again"
    if source.is_dir():
        train, test = (
            _part(archive, names, lambda name: (source / name).open("rb"), source, remedy)
            for names in (archive.train, archive.test)
        )
        return *train, *test
    try:
        with tarfile.open(source, "r:gz") as tar:
            members = {
                name: tar.extractfile(f"{archive.folder}/{name}")
                for name in archive.train + archive.test
            }
            opened: Callable[[str], Any] = members.__getitem__
            train, test = (
                _part(archive, names, opened, source, remedy)
                for names in (archive.train, archive.test)
            )
            return *train, *test
    except (tarfile.TarError, EOFError, zlib.error, OSError, KeyError) as error:
        raise ValueError(f"{source}: not a complete archive ({error}): {remedy}") from error


def _part(
    archive: Archive,
    names: tuple[str, ...],
    opened: Callable[[str], IO[bytes]],
    source: Path,
    remedy: str,
) -> tuple[Pixels, Labels]:
    """The training or the test set, which may lie in several files."""
    pixels, labels = [], []
    for name in names:
        try:
            with opened(name) as file:
                x, y = _batch(archive, file.read())
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{source / name}: missing: {remedy}") from error
        except (_MalformedError, OSError, TypeError) as error:  # a folder is no file
            raise ValueError(f"{source / name}: {error}: {remedy}") from error
        pixels.append(x)
        labels.append(y)
    return np.concatenate(pixels), np.concatenate(labels)


class _MalformedError(Exception):
    """A file that is not a batch of CIFAR."""


def _batch(archive: Archive, content: bytes) -> tuple[Pixels, Labels]:
    try:
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except _MalformedError:
        raise
    except Exception as error:  # a broken pickle fails in any way it likes
        raise _MalformedError(f"not a complete pickle ({type(error).__name__}: {error})") from error
    if not isinstance(batch, dict) or not {b"data", archive.label} <= batch.keys():
        raise _MalformedError(f"not a dictionary with b'data' and {archive.label!r}")
    pixels, labels = batch[b"data"], batch[archive.label]
    if not (
        isinstance(pixels, np.ndarray)
        and pixels.dtype == np.uint8
        and pixels.ndim == 2
        and pixels.shape[1] == 3072
    ):
        raise _MalformedError("b'data' is not an array of bytes with 3072 columns")
    if (
        not isinstance(labels, list)
        or len(labels) != len(pixels)
        or not all(type(label) is int and 0 <= label < archive.classes for label in labels)
    ):
        raise _MalformedError(
            f"{archive.label!r} is not a list of {len(pixels)} integers below {archive.classes}"
        )
    return pixels, np.array(labels, dtype=np.int64)


# NumPy 1 calls the module numpy.core, NumPy 2 numpy._core; the archives were written by the former.
_RECONSTRUCT = np.empty(0).__reduce__()[0]


def _dtype(code: Any, *_: Any) -> np.dtype[np.uint8]:
    """``np.dtype(code, align, copy)``; recent NumPy warns of the archives' integer flags."""
    if code not in ("u1", b"u1"):
        raise _MalformedError(f"holds an array of {code!r}, not of bytes")
    return np.dtype(np.uint8)


def _encode(text: Any, encoding: Any) -> bytes:
    """How Python 3 writes bytes in a Python 2 pickle."""
    if not isinstance(text, str) or encoding != "latin1":
        raise _MalformedError(f"holds text in encoding {encoding!r}")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    """Knows what an array of bytes is made of, and no other global."""

    def find_class(self, module: str, name: str) -> Any:
        """What a pickle may call."""
        if (module, name) not in _ALLOWED:
            raise _MalformedError(
                f"a pickle that asks for {module}.{name}, which CIFAR does not need"
            )
        return _ALLOWED[module, name]


def synthetic(
    root: Path, dataset: str = "cifar10", train_examples: int = 500, test_examples: int = 200
) -> Path:
    """Writes a small data set in the official layout; returns its folder.

    Every class is a smooth pattern of its own; an example is the pattern at random contrast under
    noise, so that networks learn it in a few steps without being perfect.
    """
    classes = ARCHIVES[dataset].classes
    rng = np.random.default_rng(0)
    coarse = rng.normal(size=(classes, 3, 4, 4))
    patterns = coarse.repeat(8, axis=2).repeat(8, axis=3).reshape(classes, 3072)

    def drawn(examples: int) -> tuple[Pixels, Labels]:
        labels = rng.permutation(np.arange(examples) % classes)
        contrast = rng.uniform(10, 40, size=(examples, 1))
        noisy = 128 + contrast * patterns[labels] + rng.normal(0, 40, size=(examples, 3072))
        return noisy.clip(0, 255).astype(np.uint8), labels

    return write(root, dataset, drawn(train_examples), drawn(test_examples))


def write(
    root: Path, dataset: str, train: tuple[Pixels, Labels], test: tuple[Pixels, Labels]
) -> Path:
    """Writes pixels ``[N, 3072]`` and labels ``[N]`` in the official layout; returns its folder."""
    archive = ARCHIVES[dataset]
    folder = root / archive.folder
    folder.mkdir(parents=True, exist_ok=True)
    for names, (pixels, labels) in ((archive.train, train), (archive.test, test)):
        for name, x, y in zip(
            names,
            np.array_split(pixels, len(names)),
            np.array_split(labels, len(names)),
            strict=True,
        ):
            with (folder / name).open("wb") as file:
                pickle.dump({b"data": x, archive.label: y.tolist()}, file, protocol=2)
    return folder
