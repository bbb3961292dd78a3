r"""The examples, with rows of norm $\sqrt d$: handwritten digits, CIFAR, or points on a sphere.

The thesis's inputs have $\|x_i\| = \sqrt m$, with ``m`` "the width of the first layer". Here ``m``
is what enters that layer, ``d``, so that a weight of variance ``1/d`` makes preactivations standard
normal, which the normalised activations are made for.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from examples.cifar import data as cifar

__all__ = ["DATASETS", "Inputs", "load"]

DATASETS = ("digits", "sphere", *cifar.ARCHIVES)
# Of the archives, the first so many of a fixed permutation; a seed's subset is drawn from them.
_POOL = 10_000


class Inputs(NamedTuple):
    """Examples ``(N, d)`` of norm ``√d``, float64, and their labels ``(N,)``.

    Attributes:
        train_x: Training examples.
        train_y: Their labels.
        test_x: Test examples.
        test_y: Their labels.
        classes: Number of classes.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int


def load(
    dataset: str,
    root: Path | None,
    train_examples: int,
    test_examples: int = 0,
    seed: int = 0,
    dimension: int = 0,
) -> Inputs:
    """Draws a random subset of a data set; fewer examples are the first of more.

    Pictures are centred and scaled before their rows are normalised: CIFAR by channel, the digits
    by pixel and by the standard deviation of all pixels.

    Args:
        dataset: A name in `DATASETS`.
        root: Directory of the archives.
        train_examples: How many.
        test_examples: How many.
        seed: Of the subset, and of the points on the sphere.
        dimension: Of the points on the sphere.

    Raises:
        ValueError: For an unknown data set, an archive without ``root``, or too many examples.
    """
    if dataset not in DATASETS:
        raise ValueError(f"dataset={dataset!r}: expected one of {', '.join(DATASETS)}")
    if dataset == "sphere":
        return _sphere(train_examples, test_examples, seed, dimension)
    if dataset != "digits" and root is None:
        raise ValueError(f"dataset={dataset!r}: pass --data, the directory of its archive")
    whole = _digits() if dataset == "digits" else _pictures(dataset, root)
    for name, wanted, there in (
        ("train_examples", train_examples, len(whole.train_y)),
        ("test_examples", test_examples, len(whole.test_y)),
    ):
        if wanted > there:
            raise ValueError(f"{name}={wanted}: {dataset} has {there} here")
    draw = np.random.default_rng(seed)
    train = torch.from_numpy(draw.permutation(len(whole.train_y))[:train_examples])
    test = torch.from_numpy(draw.permutation(len(whole.test_y))[:test_examples])
    return Inputs(
        _scaled(whole.train_x[train]),
        whole.train_y[train],
        _scaled(whole.test_x[test]),
        whole.test_y[test],
        whole.classes,
    )


def _scaled(x: Tensor) -> Tensor:
    """Rows of norm √d, float64."""
    return normalize(x.double()) * math.sqrt(x.shape[1])


@functools.lru_cache(maxsize=1)
def _digits() -> Inputs:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x, y = torch.from_numpy(pixels[order]), torch.from_numpy(labels[order]).long()
    train = 1200
    x = (x - x[:train].mean(0)) / x[:train].std()
    return Inputs(x[:train], y[:train], x[train:], y[train:], 10)


@functools.lru_cache(maxsize=2)
def _pictures(dataset: str, root: Path | None) -> Inputs:
    assert root is not None
    found = cifar.load(dataset, root, train_examples=_POOL, test_examples=_POOL)
    train_x, test_x = found.train_x.flatten(1), found.test_x.flatten(1)
    return Inputs(train_x, found.train_y, test_x, found.test_y, found.classes)


def _sphere(train_examples: int, test_examples: int, seed: int, dimension: int) -> Inputs:
    generator = torch.Generator().manual_seed(1000 + seed)  # apart from the weights'
    x = torch.randn(
        train_examples + test_examples, dimension, generator=generator, dtype=torch.float64
    )
    x, y = _scaled(x), torch.zeros(len(x), dtype=torch.long)
    return Inputs(x[:train_examples], y[:train_examples], x[train_examples:], y[train_examples:], 2)
