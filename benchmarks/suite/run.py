"""One trial, one record.

The initialisation depends on the task and the seed, the order of the minibatches on the seed and
the epoch: every method starts at the same point and sees the same batches.
"""

from __future__ import annotations

import functools
import importlib.metadata
import math
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import adler
from benchmarks.suite.data import Data
from benchmarks.suite.methods import method
from benchmarks.suite.steppers import Setting, Stepper
from benchmarks.suite.tasks import TASKS, Task
from benchmarks.suite.trials import Trial
from examples.cifar.train import Curves
from examples.shared.networks import parameter_count

__all__ = ["evaluate", "exploded", "minibatches", "run", "shifted_and_mirrored", "work"]

_EVALUATION_BATCH = 250
_EXPLODED = 100.0  # a loss so many times the first minibatch's is as good as infinite
_OWN_STREAM = 10**9  # epochs of a method's own minibatches, numbered apart from the loop's


def run(trial: Trial, examples: Data) -> dict[str, Any]:
    """Trains and returns the trial's record. Sets PyTorch's global seed.

    A run ends where its loss is no longer finite; it *diverged* if that happens or if a hundred
    times the first minibatch's loss is left at the end. The record's curves are those of
    `examples.cifar.train.Curves`; ``test_accuracy`` is None where there are no classes.

    Args:
        trial: What to train.
        examples: Loaded with the trial's numbers of examples; the trial runs where they are.

    Raises:
        ValueError: If the data has other numbers of examples.
        ImportError: If the method's package is not installed.
    """
    task, chosen = TASKS[trial.task], method(trial.method)
    there = task.pool or trial.train_examples
    if (len(examples.train_x), len(examples.test_x)) != (there, trial.test_examples):
        raise ValueError(
            f"examples: {len(examples.train_x)} for training and {len(examples.test_x)} for "
            f"testing, but the trial has train_examples={there}, "
            f"test_examples={trial.test_examples}"
        )
    device = examples.train_x.device
    model = task.build(trial.seed, examples).to(device)
    criterion = task.criterion()
    epoch_steps = trial.train_examples // task.batch_size
    stepper = chosen.make(
        Setting(
            model=model,
            criterion=criterion,
            rate=math.nan if trial.lr is None else trial.lr,
            steps=trial.epochs * epoch_steps,
            epoch_steps=epoch_steps,
            batches=functools.partial(_stream, trial, task, examples),
        )
    )
    curves, steps, first_loss = Curves(), 0, math.nan
    for epoch in range(trial.epochs):
        trained = _epoch(trial, epoch, task, examples, criterion, stepper)
        steps += int(trained.pop("steps"))
        initial = trained.pop("first_loss")
        first_loss = first_loss if epoch else initial
        tested = evaluate(task, stepper.evaluate(), examples)
        curves.append({**trained, **tested})
        if not math.isfinite(trained["train_loss"]):
            break
    told = curves.as_dict()
    accuracies = [value for value in told["test_accuracy"] if value is not None]
    return {
        **trial.as_dict(),
        "family": task.family,
        "held_back": task.held_back,
        "batch_size": task.batch_size,
        "score": task.score,
        "chance": task.chance(examples),
        "data": examples.fingerprint(),
        "parameters": parameter_count(model),
        "steps": steps,
        "test_accuracy": told["test_accuracy"][-1],
        "best_test_accuracy": max(accuracies, default=None),
        "test_loss": told["test_loss"][-1],
        "train_loss": told["train_loss"][-1],
        "first_loss": first_loss if math.isfinite(first_loss) else None,
        "diverged": exploded(first_loss, trained["train_loss"], tested["test_loss"]),
        "seconds": sum(curves.seconds),
        **stepper.counts(),
        "passes": chosen.passes,
        "versions": _versions(chosen.package),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "curves": told,
    }


def exploded(first_loss: float, *losses: float) -> bool:
    """Whether some loss is not finite, or a hundred times the first minibatch's."""
    return not all(loss < _EXPLODED * first_loss for loss in losses)


def _epoch(
    trial: Trial,
    epoch: int,
    task: Task,
    examples: Data,
    criterion: nn.Module,
    stepper: Stepper,
) -> dict[str, float]:
    """One pass over the training examples; stops where the loss is no longer finite."""
    stepper.train()
    model = stepper.setting.model
    # The loss of an example, whatever the reduction, so that curves compare.
    scale = task.batch_size if task.reduction == "sum" else 1
    total_loss, total_rate, first_loss, done = 0.0, 0.0, math.nan, 0
    start = _now(examples)
    for x, y in minibatches(trial, task, examples, epoch):
        stepper.optimizer.zero_grad()
        loss: Tensor = criterion(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        done += 1
        total_loss += loss.item() / scale
        first_loss = first_loss if done > 1 else total_loss
        if math.isfinite(total_loss):
            try:
                stepper.after_backward(loss)
            except FloatingPointError:
                total_loss = math.nan
        if not math.isfinite(total_loss):
            break
        total_rate += stepper.rate()
    return {
        "train_loss": total_loss / done,
        "learning_rate": total_rate / done,
        "seconds": _now(examples) - start,
        "first_loss": first_loss,
        "steps": done,
    }


def minibatches(
    trial: Trial, task: Task, examples: Data, epoch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The epoch's minibatches: the same for every method."""
    generator = torch.Generator().manual_seed(1_000_003 * trial.seed + epoch)
    order = torch.randperm(len(examples.train_x), generator=generator)[: trial.train_examples]
    for start in range(0, len(order) - task.batch_size + 1, task.batch_size):
        batch = order[start : start + task.batch_size].to(examples.train_x.device)
        x, y = examples.train_x[batch], examples.train_y[batch]
        if task.augment:
            x = shifted_and_mirrored(x, generator)
        yield _indices(x), _indices(y)


def _indices(values: Tensor) -> Tensor:
    """Small integers are kept as bytes, and used as what PyTorch indexes with."""
    return values.long() if values.dtype == torch.uint8 else values


def shifted_and_mirrored(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture moved by at most four pixels, zeros coming in, and mirrored every other time.

    Args:
        pictures: ``[B, C, H, W]``.
        generator: Of the CPU, whatever the pictures are on.
    """
    count, _, height, width = pictures.shape
    padded = F.pad(pictures, (4, 4, 4, 4))
    down, right = torch.randint(9, (2, count, 1), generator=generator).to(pictures.device)
    mirrored = torch.randint(2, (count, 1), generator=generator).bool().to(pictures.device)
    rows = down + torch.arange(height, device=pictures.device)
    columns = torch.arange(width, device=pictures.device).expand(count, -1)
    columns = right + torch.where(mirrored, columns.flip(1), columns)
    each = torch.arange(count, device=pictures.device)[:, None, None]
    return padded[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def _stream(trial: Trial, task: Task, examples: Data) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless minibatches in an order of their own, for methods that look at others."""
    epoch = _OWN_STREAM
    while True:
        yield from minibatches(trial, task, examples, epoch)
        epoch += 1


@torch.no_grad()
def evaluate(task: Task, model: nn.Module, examples: Data) -> dict[str, float]:
    """Mean loss and accuracy on the test set; the latter is NaN where there are no classes."""
    sections = math.ceil(len(examples.test_x) / _EVALUATION_BATCH)
    outputs = torch.cat([model(part) for part in examples.test_x.tensor_split(sections)])
    accuracy = task.accuracy(outputs, examples.test_y)
    return {
        "test_loss": task.criterion("mean")(outputs, examples.test_y).item(),
        "test_accuracy": math.nan if accuracy is None else accuracy,
    }


def _now(examples: Data) -> float:
    if examples.train_x.device.type == "cuda":
        torch.cuda.synchronize(examples.train_x.device)
    return time.perf_counter()


def _versions(package: str | None) -> dict[str, str]:
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "adler": adler.__version__,
    }
    for distribution in _distributions().get(package or "", []):
        found[distribution] = importlib.metadata.version(distribution)
    return found


_distributions = functools.lru_cache(maxsize=1)(importlib.metadata.packages_distributions)


def work(trial: Trial, root: Path | None, device: str) -> dict[str, Any]:
    """Reads the data, which stays in memory for the next trial, and runs."""
    task = TASKS[trial.task]
    examples = task.load(root, task.pool or trial.train_examples, trial.test_examples)
    return run(trial, examples.to(device))
