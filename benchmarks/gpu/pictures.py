"""Part (d): a residual network on CIFAR-10, all pictures, shifted and mirrored.

As in the public speed runs the question is who reaches a good accuracy within a few epochs. Rates
are chosen by the first seed's final test accuracy; the other seeds have the best.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.gpu import data
from benchmarks.gpu.presets import Pictures
from benchmarks.gpu.session import Session
from benchmarks.gpu.training import TUNED, Batches, Workload, choices, last, run_key, train
from benchmarks.networks import resnet
from benchmarks.suite.run import shifted_and_mirrored
from examples.cifar import data as cifar

__all__ = ["run", "workload"]

_TEST_BATCH = 1000


def run(session: Session, preset: Pictures, root: Path) -> None:
    """Every method on the first seed, then the untuned and the best rates on the others.

    Raises:
        OutOfTimeError: If not all runs fit.
        FileNotFoundError: If there are no pictures.
    """
    what = data.unpack_pictures(root, "cifar10")
    if what is None:
        raise FileNotFoundError(f"{root}: neither CIFAR-10's folder nor its mosaic")
    made = workload(preset, cifar.load("cifar10", root, session.device), session.device)
    for seed in preset.seeds:
        for name, rate in choices(preset):
            if seed != preset.seeds[0] and name in TUNED and rate != _best(session, preset, name):
                continue
            work = functools.partial(_train, session, preset, made, what, name, rate, seed)
            session.attempt(run_key(name, rate, seed), work, session.expected(name))


def _train(
    session: Session,
    preset: Pictures,
    made: Workload,
    what: str,
    name: str,
    rate: float | None,
    seed: int,
) -> dict[str, Any]:
    trained = train(session, made, name, rate, seed)
    return {**trained, "data": what, "target": preset.target}


def _best(session: Session, preset: Pictures, name: str) -> float | None:
    """The rate with the best final accuracy on the first seed; None before any has run."""
    mine = [r for r in session.records() if r["method"] == name and r["seed"] == preset.seeds[0]]
    best = max(mine, key=lambda r: -last(r, "test_error"), default=None)
    return None if best is None else float(best["lr"])


def workload(preset: Pictures, examples: cifar.Data, device: str) -> Workload:
    """The network and the pictures; an epoch drops its incomplete last minibatch."""
    layout = torch.channels_last
    steps = len(examples.train_x) // preset.batch

    def network(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = resnet(*preset.widths, repeats=1).to(device)
        for parameter in model.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=layout)
        return model

    def batches(seed: int) -> Batches:
        draw = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(examples.train_x), generator=draw).to(device)
            for chosen in torch.split(order[: steps * preset.batch], preset.batch):
                x = shifted_and_mirrored(examples.train_x[chosen], draw)
                yield x.contiguous(memory_format=layout), examples.train_y[chosen]

    def test(model: nn.Module) -> dict[str, float]:
        parts = torch.split(examples.test_x, _TEST_BATCH)
        outputs = torch.cat([model(x.contiguous(memory_format=layout)) for x in parts])
        wrong = (outputs.argmax(1) != examples.test_y).float().mean()
        loss = nn.CrossEntropyLoss()(outputs, examples.test_y)
        return {"test_loss": float(loss), "test_error": float(wrong)}

    return Workload(
        network,
        batches,
        preset.epochs * steps,
        steps,
        test,
        preset.epochs,
        bfloat16=preset.bfloat16,
    )
