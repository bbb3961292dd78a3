"""What the tasks are trained on: real data that ships with packages, and CIFAR from its archives.

Everything fits in memory. A smaller subset is part of a larger one (but of `novels`, whose windows
are spread, and of `teacher`), and the same for every method and every seed. Inputs are standardised
by the training examples used.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from examples.cifar import data as cifar

__all__ = [
    "CONTEXT",
    "Data",
    "Loader",
    "breast_cancer",
    "characters",
    "diabetes",
    "digits",
    "novels",
    "novels_path",
    "pictures",
    "pixels",
    "teacher",
    "wine",
]

CONTEXT = 64  # characters that a language model sees at once
_FEW = 64
# load(root, train_examples, test_examples); only CIFAR looks into the root.
Loader = Callable[[Path | None, int, int], "Data"]


class Data(NamedTuple):
    """Examples, first axis first, and what the network is to say of them.

    Attributes:
        train_x: Training inputs.
        train_y: Training targets, as the criterion takes them.
        test_x: Test inputs.
        test_y: Test targets.
        outputs: Numbers that the network gives for an example, or for a position of it.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    outputs: int

    def to(self, device: torch.device | str) -> Data:
        """The same on a device."""
        train_x, train_y, test_x, test_y = (
            part.to(device) for part in (self.train_x, self.train_y, self.test_x, self.test_y)
        )
        return Data(train_x, train_y, test_x, test_y, self.outputs)

    def fingerprint(self) -> str:
        """Tells other examples, and another order of them, apart; the same on every machine.

        Of labels and tokens all are looked at, of other numbers a few rows and not their scale.

        Examples:
            >>> x, y = torch.arange(4.0).reshape(2, 2) - 1, torch.tensor([0, 1])
            >>> data = Data(x, y, x, y, 2)
            >>> data.fingerprint() == data._replace(train_y=y.flip(0)).fingerprint()
            False
        """
        found = 0
        for part in self[:4]:
            few = part[:: max(1, len(part) // _FEW)]
            # Of numbers that another machine may round otherwise, on which side of the mean.
            exact = few > few.mean() if part.is_floating_point() else part
            found = zlib.crc32(str(tuple(part.shape)).encode(), found)
            found = zlib.crc32(exact.cpu().contiguous().numpy().tobytes(), found)
        return f"{found:08x}"

    def guessing(self, criterion: nn.Module, *, accuracy: bool) -> float:
        """What knows nothing of the inputs reaches on the test set.

        Args:
            criterion: The task's loss, averaged over examples.
            accuracy: Whether to return the accuracy of always naming the commonest class;
                otherwise the loss of the best constant output.
        """
        if accuracy:
            return float(self.test_y.long().flatten().bincount().max() / self.test_y.numel())
        if isinstance(criterion, nn.CrossEntropyLoss):
            frequency = self.train_y.flatten().bincount(minlength=self.outputs) + 1
            everywhere = frequency.log().expand(self.test_y.numel(), -1)
            return float(criterion(everywhere, self.test_y.flatten()))
        constant = self.train_y.mean(0, keepdim=True)
        if isinstance(criterion, nn.BCEWithLogitsLoss):
            constant = constant.clamp(1e-3, 1 - 1e-3).logit()
        return float(criterion(constant.expand_as(self.test_y), self.test_y))


def _check(name: str, train: int, test: int, available: tuple[int, int]) -> None:
    for argument, wanted, there in (
        ("train_examples", train, available[0]),
        ("test_examples", test, available[1]),
    ):
        if not 1 <= wanted <= there:
            raise ValueError(f"{argument}={wanted}: {name} has {there}")


@functools.lru_cache(maxsize=4)
def pictures(dataset: str, root: Path | None, train: int, test: int) -> Data:
    """CIFAR's pictures ``[N, 3, 32, 32]``, normalised by channel, and their classes."""
    found = cifar.load(dataset, _given(root, dataset), train_examples=train, test_examples=test)
    return Data(found.train_x, found.train_y, found.test_x, found.test_y, found.classes)


@functools.lru_cache(maxsize=4)
def pixels(dataset: str, root: Path | None, train: int, test: int) -> Data:
    """CIFAR's pixels ``[N, 3072]`` in [0, 1], of the same pictures, to be given back."""
    archive = cifar.ARCHIVES[dataset]
    train_pixels, _, test_pixels, _ = cifar.read(
        archive, cifar.locate(archive, _given(root, dataset))
    )
    _check(dataset, train, test, (len(train_pixels), len(test_pixels)))
    train_x, test_x = (
        torch.from_numpy(all_[np.random.default_rng(0).permutation(len(all_))[:n]]).float() / 255
        for all_, n in ((train_pixels, train), (test_pixels, test))
    )
    return Data(train_x, train_x, test_x, test_x, train_x.shape[1])


def _given(root: Path | None, dataset: str) -> Path:
    if root is None:
        raise ValueError(f"{dataset}: pass --data, where its archive is")
    return root


def digits(root: Path | None, train: int, test: int) -> Data:
    """scikit-learn's handwritten digits ``[N, 64]`` in [0, 1], to be given back."""
    from sklearn.datasets import load_digits

    x, _ = load_digits(return_X_y=True)
    train_x, test_x = _split("digits", torch.from_numpy(_shuffled(x) / 16).float(), train, test)
    return Data(train_x, train_x, test_x, test_x, train_x.shape[1])


def diabetes(root: Path | None, train: int, test: int) -> Data:
    """Ten measurements of a patient; the disease's progression, standardised."""
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    return _table("diabetes", x, y[:, None], train, test, outputs=1, scale_targets=True)


def breast_cancer(root: Path | None, train: int, test: int) -> Data:
    """Thirty measurements of a tumour; whether it is benign, as a column of zeros and ones."""
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    return _table("breast cancer", x, y[:, None].astype(np.float64), train, test, outputs=1)


def wine(root: Path | None, train: int, test: int) -> Data:
    """Thirteen measurements of a wine; which of three growers made it."""
    from sklearn.datasets import load_wine

    x, y = load_wine(return_X_y=True)
    return _table("wine", x, y, train, test, outputs=3)


def _table(
    name: str,
    x: npt.NDArray[Any],
    y: npt.NDArray[Any],
    train: int,
    test: int,
    *,
    outputs: int,
    scale_targets: bool = False,
) -> Data:
    """Shuffled, split, columns standardised by the training rows."""
    inputs, targets = torch.from_numpy(_shuffled(x)), torch.from_numpy(_shuffled(y))
    train_x, test_x = _standardised(*_split(name, inputs, train, test))
    train_y, test_y = _split(name, targets, train, test)
    if scale_targets:
        train_y, test_y = _standardised(train_y, test_y)
    if targets.is_floating_point():
        train_y, test_y = train_y.float(), test_y.float()
    return Data(train_x.float(), train_y, test_x.float(), test_y, outputs)


def _shuffled(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Sets that ship sorted by class, in one fixed order."""
    return values[np.random.default_rng(0).permutation(len(values))]


def _split(name: str, values: Tensor, train: int, test: int) -> tuple[Tensor, Tensor]:
    """The first so many, and the last so many: the test rows don't depend on ``train``."""
    _check(name, train, test, (len(values) - test, len(values) - 1))
    return values[:train], values[len(values) - test :]


def _standardised(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    mean, scale = train.mean(0), train.std(0, correction=0).clamp_min(1e-12)
    return (train - mean) / scale, (test - mean) / scale


def characters(root: Path | None, train: int, test: int) -> Data:
    """Python's own help texts, `CONTEXT` characters an example; targets are the next ones.

    The test examples come from the last tenth of the text. It differs between versions of Python,
    whose number is in the records.
    """
    ids, vocabulary = _text()
    border = 9 * len(ids) // 10
    sections = (ids[:border], train), (ids[border:], test)
    _check("characters", train, test, _windows_in(ids[:border], ids[border:]))
    train_x, train_y, test_x, test_y = (
        part[shift : shift + wanted * CONTEXT].view(wanted, CONTEXT)
        for part, wanted in sections
        for shift in (0, 1)
    )
    return Data(train_x, train_y, test_x, test_y, vocabulary)


def _windows_in(train: Tensor, test: Tensor) -> tuple[int, int]:
    """How many examples with targets two texts hold, end to end."""
    return (len(train) - 1) // CONTEXT, (len(test) - 1) // CONTEXT


@functools.lru_cache(maxsize=1)
def _text() -> tuple[Tensor, int]:
    """The whole text as numbers of characters, and how many there are."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    number = {character: index for index, character in enumerate(sorted(set(text)))}
    return torch.tensor([number[character] for character in text]), len(number)


NOVELS = "novels.txt"


@functools.lru_cache(maxsize=1)
def novels(root: Path | None, train: int, test: int) -> Data:
    """English prose from ``novels.txt``, `CONTEXT` characters an example.

    Any UTF-8 text of that name serves; the project's is the corpus "100 English Novels" 1.4, 77 MB.
    Characters are bytes, those outside printable ASCII are one. Training windows are spread over
    the first 95 % of the text, test windows over the rest.

    Raises:
        FileNotFoundError: If there is no such file in the root.
        ValueError: If it is too short.
    """
    path = novels_path(root)
    table = np.zeros(256, dtype=np.uint8)
    shown = [10, *range(32, 127)]
    table[shown] = np.arange(1, len(shown) + 1)
    ids = torch.from_numpy(table[np.frombuffer(path.read_bytes(), dtype=np.uint8)])
    border = 95 * len(ids) // 100
    _check(str(path), train, test, _windows_in(ids[:border], ids[border:]))
    parts = []
    for part, wanted in ((ids[:border], train), (ids[border:], test)):
        starts = torch.arange(wanted) * ((len(part) - 1 - CONTEXT) // wanted)
        window = starts[:, None] + torch.arange(CONTEXT)
        parts += [part[window + shift] for shift in (0, 1)]
    train_x, train_y, test_x, test_y = parts
    return Data(train_x, train_y, test_x.long(), test_y.long(), len(shown) + 1)


def novels_path(root: Path | None) -> Path:
    """Where the text of `novels` is.

    Raises:
        ValueError: Without a root.
        FileNotFoundError: If there is no such file in the root.
    """
    path = _given(root, NOVELS) / NOVELS
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing: put a long English text there, in UTF-8")
    return path


@functools.lru_cache(maxsize=1)
def teacher(root: Path | None, train: int, test: int) -> Data:
    """Rows ``[N, 32]`` and what a random network of two layers says of them, with noise.

    Targets have variance one, of which the noise is 0.1: the least test loss that there is. Other
    numbers of examples are other rows of another network.
    """
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(train + test, 32, generator=draw)
    first = torch.randn(32, 64, generator=draw) / 32**0.5 * 1.5
    second = torch.randn(64, 32, generator=draw) / 64**0.5 * 2
    last = torch.randn(32, 1, generator=draw)
    signal = ((x @ first).tanh() @ second).tanh() @ last
    signal = (signal - signal.mean()) / signal.std()
    y = 0.9**0.5 * signal + 0.1**0.5 * torch.randn(train + test, 1, generator=draw)
    return Data(x[:train], y[:train], x[train:], y[train:], 1)
