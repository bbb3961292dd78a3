"""The development workloads' data, written as AlgoPerf reads it.

AlgoPerf takes MNIST from TensorFlow Datasets and CIFAR-10 from torchvision, both of which download.
Where they are on the disk already, these write them as the two libraries would have.
"""

from __future__ import annotations

import gzip
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from examples.cifar import data as cifar

__all__ = ["idx", "write_cifar", "write_mnist"]

_FILES = {"train": "train", "test": "t10k"}


def idx(path: Path) -> npt.NDArray[np.uint8]:
    """The bytes of a file in MNIST's format, in their shape.

    Raises:
        ValueError: If it is not one.
    """
    with gzip.open(path) as file:
        content = file.read()
    if content[:3] != b"\0\0\x08":
        raise ValueError(f"{path}: not a file of bytes in the IDX format")
    dimensions = np.frombuffer(content, ">u4", content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(dimensions)


def write_mnist(source: Path, target: Path) -> None:
    """MNIST, or what comes in its files, as TensorFlow Datasets' ``mnist/3.0.1``."""
    import tensorflow_datasets as tfds  # of AlgoPerf's environment

    def examples(split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        images = idx(source / f"{_FILES[split]}-images-idx3-ubyte.gz")
        labels = idx(source / f"{_FILES[split]}-labels-idx1-ubyte.gz")
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield f"{split}_{number}", {"image": image[..., None], "label": int(label)}

    class Mnist(tfds.core.GeneratorBasedBuilder):  # type: ignore[misc]
        name = "mnist"
        VERSION = tfds.core.Version("3.0.1")

        def _info(self) -> Any:
            features = tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(28, 28, 1)),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            )
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, _: Any) -> dict[str, Any]:
            return {split: self._generate_examples(split) for split in _FILES}

        def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
            yield from examples(split)

    Mnist(data_dir=target).download_and_prepare()


def write_cifar(root: Path, target: Path) -> None:
    """CIFAR-10 from `examples.cifar.data`'s root as torchvision unpickles it."""
    archive = cifar.ARCHIVES["cifar10"]
    train_x, train_y, test_x, test_y = cifar.read(archive, cifar.locate(archive, root))
    folder = target / archive.folder
    folder.mkdir(parents=True, exist_ok=True)
    parts = zip(archive.train, np.split(train_x, 5), np.split(train_y, 5), strict=True)
    for name, x, y in (*parts, (archive.test[0], test_x, test_y)):
        content = {"data": x, "labels": y.tolist(), "filenames": []}
        (folder / name).write_bytes(pickle.dumps(content))
    names = [str(number) for number in range(archive.classes)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
