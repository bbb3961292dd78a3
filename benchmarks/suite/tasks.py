"""The tasks of the suite, as data: what is trained, on what, and how long.

Every task is small: plain SGD takes seconds on one CPU core. A third is *held back*: nobody looks
at it while a default is chosen, and it is run once, at the end. Those are whole architectures and
data sets (GroupNorm-VGG, mixer, recurrent network, autoencoder of pictures, tables of classes) and
the far ends of two variations (minibatches of 1024, a large initialisation of the ResNet).

Not all of them are unseen. While their cost was measured, one seed of the recurrent network and of
GroupNorm-VGG and mixer with relu on CIFAR-10 was run with one SGD rate and with ``adler-adam``, and
wine with GeN's two settings and in an early smoke run. No default was chosen from these. Results
must name them, or leave them out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks.suite import data
from benchmarks.suite.data import CONTEXT, Data, Loader
from benchmarks.suite.initialisations import INITIALISATIONS
from examples.shared import networks

__all__ = ["LONGER", "LONG_EPOCH_STEPS", "TASKS", "Network", "Task"]

Network = Callable[[Data], nn.Module]


@dataclass(frozen=True)
class Task:
    """A network, its data, its loss and how long it is trained.

    Attributes:
        name: Such as ``"cifar10/cnn-relu/b64"``.
        family: Tasks that share a table.
        load: Reads the data; see `data.Loader`.
        network: Builds the network, with PyTorch's initialisation, from the data's shapes.
        loss: The criterion's class, which takes ``reduction``.
        train_examples: Training examples.
        test_examples: Test examples.
        batch_size: Examples a step. The incomplete last minibatch of an epoch is dropped.
        epochs: Passes over the training examples.
        score: What methods are compared by at the end: test ``"accuracy"`` or test ``"loss"``.
        archive: The CIFAR archive that it reads, if any.
        initialisation: A name in `initialisations.INITIALISATIONS`.
        reduction: The criterion's.
        held_back: Whether it belongs to the half that is looked at once.
        long: Whether it is trained for thousands of steps; see `_long`.
        pool: Training examples that there are, of which an epoch draws ``train_examples`` at
            random; None: it sees them all.
        augment: Whether pictures are shifted and mirrored at random, anew in every epoch.
        has_chance: Whether being no better than guessing means that the network is dead.
    """

    name: str
    family: str
    load: Loader
    network: Network
    loss: type[nn.CrossEntropyLoss] | type[nn.MSELoss] | type[nn.BCEWithLogitsLoss]
    train_examples: int
    test_examples: int
    batch_size: int
    epochs: int
    score: Literal["accuracy", "loss"] = "accuracy"
    archive: str | None = None
    initialisation: str = "default"
    reduction: str = "mean"
    held_back: bool = False
    has_chance: bool = True
    long: bool = False
    pool: int | None = None
    augment: bool = False

    def build(self, seed: int, examples: Data) -> nn.Module:
        """The network of a seed. Sets PyTorch's global seed."""
        torch.manual_seed(seed)
        model = self.network(examples)
        INITIALISATIONS[self.initialisation](model)
        return model

    def criterion(self, reduction: str | None = None) -> nn.Module:
        """A new criterion, with the task's reduction or another."""
        return self.loss(reduction=reduction or self.reduction)

    def accuracy(self, outputs: Tensor, targets: Tensor) -> float | None:
        """Of classes, the fraction that is named right; else None."""
        if issubclass(self.loss, nn.CrossEntropyLoss):
            return (outputs.argmax(1) == targets).float().mean().item()
        if self.score == "accuracy":
            return ((outputs > 0) == (targets > 0.5)).float().mean().item()
        return None

    def chance(self, examples: Data) -> float | None:
        """The score of guessing; None where a network that trains may be worse."""
        if not self.has_chance:
            return None
        return examples.guessing(self.criterion("mean"), accuracy=self.score == "accuracy")


# --- pictures ------------------------------------------------------------------------------------

_TRAIN, _TEST = 3000, 1000
_DATASETS = ("cifar10", "cifar100")
_ACTIVATIONS = ("relu", "sigmoid", "tanh")
# Epochs by batch size: four at 64; of larger minibatches at least sixty steps; of small ones, whose
# steps are dear, two.
_EPOCHS = {16: 2, 64: 4, 256: 6, 1024: 30}

# network(activation)(data); the sizes of the CIFAR grid's smallest preset.
_NETWORKS: dict[str, Callable[[str], Network]] = {
    "mlp": lambda phi: lambda d: networks.mlp(3072, (128, 128), d.outputs, phi),
    "cnn": lambda phi: lambda d: networks.CNN(d.outputs, width=12, depth=3, activation=phi),
    "cnn-bn": lambda phi: (
        lambda d: networks.CNN(d.outputs, width=12, depth=3, activation=phi, normalisation="batch")
    ),
    "resnet": lambda phi: (
        lambda d: networks.CNN(
            d.outputs, width=8, depth=2, activation=phi, normalisation="batch", residual=True
        )
    ),
    "vit": lambda phi: lambda d: networks.ViT(d.outputs, width=32, depth=2, activation=phi),
    "vgg-gn": lambda phi: lambda d: networks.vgg(d.outputs, 8, phi),
    "mixer": lambda phi: lambda d: networks.Mixer(d.outputs, 48, 2, phi),
}


def _pictures(
    dataset: str,
    network: str,
    activation: str,
    family: str,
    *,
    batch_size: int = 64,
    initialisation: str = "default",
    reduction: str = "mean",
    held_back: bool = False,
) -> Task:
    parts = [dataset, f"{network}-{activation}", f"b{batch_size}"]
    parts += [initialisation] * (initialisation != "default") + [reduction] * (reduction != "mean")
    return Task(
        name="/".join(parts),
        family=family,
        load=functools.partial(data.pictures, dataset),
        network=_NETWORKS[network](activation),
        loss=nn.CrossEntropyLoss,
        train_examples=_TRAIN,
        test_examples=_TEST,
        batch_size=batch_size,
        epochs=_EPOCHS[batch_size],
        archive=dataset,
        initialisation=initialisation,
        reduction=reduction,
        held_back=held_back,
    )


def _base() -> Iterator[Task]:
    """Data × network × activation."""
    for dataset in _DATASETS:
        for network in ("mlp", "cnn", "cnn-bn", "resnet", "vit"):
            for activation in _ACTIVATIONS:
                yield _pictures(dataset, network, activation, f"{dataset}, {network}")


def _variations() -> Iterator[Task]:
    """One choice changed at a time, on CIFAR-10 with ReLU."""
    vary = functools.partial(_pictures, "cifar10", activation="relu")
    for batch_size in (16, 256, 1024):
        for network in ("cnn-bn", "vit", "mlp"):
            yield vary(
                network=network,
                family="batch size",
                batch_size=batch_size,
                held_back=batch_size == 1024,
            )
    for initialisation in ("orthogonal", "large"):
        for network in ("mlp", "cnn", "resnet"):
            yield vary(
                network=network,
                family="initialisation",
                initialisation=initialisation,
                held_back=(initialisation, network) == ("large", "resnet"),
            )
    for network in ("mlp", "cnn-bn"):
        yield vary(network=network, family="sum of losses", reduction="sum")


def _other_networks() -> Iterator[Task]:
    """Architectures that no default was chosen on."""
    for dataset in _DATASETS:
        for network in ("vgg-gn", "mixer"):
            for activation in _ACTIVATIONS:
                family = f"{dataset}, {network}"
                yield _pictures(dataset, network, activation, family, held_back=True)


# --- anything else -------------------------------------------------------------------------------

_OTHERS = (
    Task(
        name="diabetes/mlp-relu/b32",
        family="tables",
        load=data.diabetes,
        network=lambda d: networks.mlp(10, (64, 64), 1, "relu"),
        loss=nn.MSELoss,
        train_examples=342,
        test_examples=100,
        batch_size=32,
        epochs=20,
        score="loss",
        has_chance=False,  # whoever trains too well is worse than the mean
    ),
    Task(
        name="breast-cancer/mlp-relu/b32",
        family="tables",
        load=data.breast_cancer,
        network=lambda d: networks.mlp(30, (64, 64), 1, "relu"),
        loss=nn.BCEWithLogitsLoss,
        train_examples=400,
        test_examples=169,
        batch_size=32,
        epochs=16,
        held_back=True,
    ),
    Task(
        name="wine/mlp-tanh/b16",
        family="tables",
        load=data.wine,
        network=lambda d: networks.mlp(13, (64, 64), 3, "tanh"),
        loss=nn.CrossEntropyLoss,
        train_examples=112,
        test_examples=66,
        batch_size=16,
        epochs=30,
        held_back=True,
    ),
    Task(
        name="characters/transformer/b32",
        family="characters",
        load=data.characters,
        network=lambda d: networks.Transformer(d.outputs, 64, 2, CONTEXT),
        loss=nn.CrossEntropyLoss,
        train_examples=1664,
        test_examples=256,
        batch_size=32,
        epochs=4,
        score="loss",
    ),
    Task(
        name="characters/gru/b32",
        family="characters",
        load=data.characters,
        network=lambda d: networks.GRUModel(d.outputs, 96),
        loss=nn.CrossEntropyLoss,
        train_examples=2048,
        test_examples=256,
        batch_size=32,
        epochs=4,
        score="loss",
        held_back=True,
    ),
    Task(
        name="digits/autoencoder-tanh/b64",
        family="autoencoders",
        load=data.digits,
        network=lambda d: networks.autoencoder(64, (128, 64, 8), "tanh"),
        loss=nn.MSELoss,
        train_examples=1408,
        test_examples=389,
        batch_size=64,
        epochs=12,
        score="loss",
    ),
    Task(
        name="cifar10/autoencoder-relu/b64",
        family="autoencoders",
        load=functools.partial(data.pixels, "cifar10"),
        network=lambda d: networks.autoencoder(3072, (128, 32), "relu"),
        loss=nn.BCEWithLogitsLoss,
        train_examples=_TRAIN,
        test_examples=_TEST,
        batch_size=64,
        epochs=4,
        score="loss",
        archive="cifar10",
        held_back=True,
    ),
)

# --- thousands of steps --------------------------------------------------------------------------

_PICTURES, _ROWS = 50_000, 51_200
LONG_EPOCH_STEPS = 800  # to the nearest hundred, of every long task


def _long() -> Iterator[Task]:
    """About 800 steps an epoch, on all pictures of CIFAR, tens of MB of prose, or many rows.

    An epoch is the unit of the horizon: presets run 1, 4 and 16 of them.
    """
    long = functools.partial(Task, long=True, epochs=1, batch_size=64, test_examples=5000)
    networks_of = {
        "mlp": lambda d: networks.mlp(3072, (256, 256), d.outputs, "relu"),
        "cnn": _NETWORKS["cnn"]("relu"),
        "resnet": _NETWORKS["resnet"]("relu"),
        "vit": _NETWORKS["vit"]("relu"),
    }
    for dataset, name, held_back in (
        ("cifar10", "mlp", False),
        ("cifar10", "resnet", False),
        ("cifar10", "vit", False),
        ("cifar10", "cnn", True),
        ("cifar100", "resnet", True),
        ("cifar100", "vit", True),
    ):
        yield long(
            name=f"long/{dataset}/{name}",
            family="long, pictures",
            load=functools.partial(data.pictures, dataset),
            network=networks_of[name],
            loss=nn.CrossEntropyLoss,
            train_examples=_PICTURES,
            archive=dataset,
            augment=True,
            held_back=held_back,
        )
    text = functools.partial(
        long,
        family="long, text",
        load=data.novels,
        loss=nn.CrossEntropyLoss,
        score="loss",
        batch_size=32,
        train_examples=25_600,
        test_examples=2_000,
        pool=409_600,
    )
    yield text(
        name="long/novels/transformer",
        network=lambda d: networks.Transformer(d.outputs, 64, 2, CONTEXT),
    )
    yield text(
        name="long/novels/gru",
        network=lambda d: networks.GRUModel(d.outputs, 96),
        held_back=True,
    )
    yield long(
        name="long/cifar10/autoencoder",
        family="long, others",
        load=functools.partial(data.pixels, "cifar10"),
        network=lambda d: networks.autoencoder(3072, (256, 64), "relu"),
        loss=nn.BCEWithLogitsLoss,
        train_examples=_PICTURES,
        score="loss",
        archive="cifar10",
        held_back=True,
    )
    yield long(
        name="long/teacher/mlp",
        family="long, others",
        load=data.teacher,
        network=lambda d: networks.mlp(32, (128, 128), 1, "relu"),
        loss=nn.MSELoss,
        train_examples=_ROWS,
        score="loss",
        held_back=True,
    )


TASKS: dict[str, Task] = {
    task.name: task for task in (*_base(), *_variations(), *_other_networks(), *_OTHERS, *_long())
}

# A third of the short tasks, which the preset "longer" also runs at eight times their epochs: every
# network with either data set or both, each activation, and one or two of every family but four;
# half of them held back. Chosen before any had been run for so long.
LONGER = (
    "cifar10/mlp-tanh/b64",
    "cifar10/cnn-relu/b64",
    "cifar10/resnet-sigmoid/b64",
    "cifar10/vit-relu/b64",
    "cifar100/mlp-sigmoid/b64",
    "cifar100/cnn-bn-relu/b64",
    "cifar100/vit-tanh/b64",
    "cifar10/vit-relu/b256",
    "cifar10/cnn-relu/b64/large",
    "characters/transformer/b32",
    "digits/autoencoder-tanh/b64",
    # Held back.
    "cifar10/vgg-gn-relu/b64",
    "cifar10/mixer-tanh/b64",
    "cifar10/mixer-relu/b64",
    "cifar100/vgg-gn-tanh/b64",
    "cifar100/vgg-gn-sigmoid/b64",
    "cifar100/mixer-sigmoid/b64",
    "cifar10/cnn-bn-relu/b1024",
    "cifar10/resnet-relu/b64/large",
    "breast-cancer/mlp-relu/b32",
    "characters/gru/b32",
    "cifar10/autoencoder-relu/b64",
)
