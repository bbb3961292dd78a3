"""One training run: ``python -m examples.cifar.train --data DIR --dataset cifar100 ...``.

The order of the minibatches depends on the seed and the epoch alone, so every optimizer sees the
same ones, and a run that was killed continues from its last epoch as if nothing had happened.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import math
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from tqdm import tqdm

import adler
from examples.cifar import data as cifar
from examples.cifar.config import Run
from examples.cifar.models import build
from examples.cifar.optimizers import OPTIMIZERS
from examples.shared.networks import ACTIVATIONS, parameter_count
from examples.shared.records import finite

__all__ = ["Curves", "train", "work"]

_EVALUATION_BATCH = 200
_CHECK_EVERY = 25  # steps between looks at the loss, each of which waits for the device


@dataclass
class Curves:
    """One number an epoch.

    Attributes:
        train_loss: Mean over the epoch's minibatches, each before its step.
        test_loss: After the epoch.
        test_accuracy: After the epoch.
        learning_rate: Mean over the epoch's steps.
        seconds: Of training, without evaluation.
    """

    train_loss: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def append(self, epoch: dict[str, float]) -> None:
        """Adds an epoch."""
        for name, value in epoch.items():
            getattr(self, name).append(value)

    def as_dict(self) -> dict[str, list[float | None]]:
        """For JSON, which has no word for a number that is not finite: None."""
        return {f.name: finite(getattr(self, f.name)) for f in fields(self)}


def train(
    run: Run,
    data: cifar.Data,
    *,
    log: Path | None = None,
    checkpoint: Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Trains and returns the run's record. Sets PyTorch's global seed.

    Args:
        run: What to train.
        data: Loaded with the run's numbers of examples; the run goes where the data is.
        log: Receives one JSON line an epoch. Started anew unless the run is resumed.
        checkpoint: Written after each epoch; a run that finds one of its own continues from it.
        progress: Whether to show progress bars.

    Raises:
        ValueError: If the data has other numbers of examples, or the checkpoint is another run's.
    """
    if (len(data.train_x), len(data.test_x)) != (run.train_examples, run.test_examples):
        raise ValueError(
            f"data: {len(data.train_x)} training and {len(data.test_x)} test examples, but the run "
            f"has train_examples={run.train_examples}, test_examples={run.test_examples}"
        )
    device = data.train_x.device
    _reset_peak_memory(device)
    torch.manual_seed(run.seed)
    model = build(run, data.classes).to(device)
    criterion = nn.CrossEntropyLoss()
    rate = math.nan if run.lr is None else run.lr
    optimizer = OPTIMIZERS[run.optimizer].make(model.parameters(), model, criterion, rate)
    curves, counts = _resume(checkpoint, run, model, optimizer)
    if log is not None:
        _restart(log, len(curves.seconds))
    diverged = False
    for epoch in range(len(curves.seconds), run.epochs):
        trained = _epoch(run, epoch, data, model, criterion, optimizer, progress)
        tested = evaluate(model, data.test_x, data.test_y)
        curves.append({**trained, **tested})
        diverged = not math.isfinite(trained["train_loss"])
        if log is not None:
            line = {"epoch": epoch + 1, **{k: v[-1] for k, v in curves.as_dict().items()}}
            with log.open("a") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
        if diverged:
            break
        if checkpoint is not None:
            _save(checkpoint, run, model, optimizer, curves, _add(counts, optimizer))
    return {
        **run.as_dict(),
        "parameters": parameter_count(model),
        "test_accuracy": curves.test_accuracy[-1],
        "best_test_accuracy": max(curves.test_accuracy),
        "train_loss": finite(curves.train_loss[-1]),
        "diverged": diverged,
        "seconds": sum(curves.seconds),
        "peak_memory_mb": _peak_memory(device),
        **_add(counts, optimizer),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "adler": adler.__version__,
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "curves": curves.as_dict(),
    }


def work(run: Run, root: Path, device: str, checkpoints: Path | None = None) -> dict[str, Any]:
    """Trains one run; the data stays in memory for the next.

    Args:
        run: What to train.
        root: Directory of the archives.
        device: Where to train.
        checkpoints: Directory in which an unfinished run has a checkpoint of its last epoch.
    """
    data = _data(run.dataset, root, device, run.train_examples, run.test_examples)
    if checkpoints is None:
        return train(run, data)
    checkpoint = checkpoints / f"{hashlib.sha256(run.key().encode()).hexdigest()[:16]}.pt"
    record = train(run, data, checkpoint=checkpoint)
    checkpoint.unlink(missing_ok=True)
    return record


_data = functools.lru_cache(maxsize=2)(cifar.load)


def _epoch(
    run: Run,
    epoch: int,
    data: cifar.Data,
    model: nn.Module,
    criterion: nn.Module,
    optimizer: Optimizer,
    progress: bool,
) -> dict[str, float]:
    """One pass over the training examples; stops where the loss is no longer finite."""
    model.train()
    device = data.train_x.device
    total_loss = torch.zeros((), device=device)
    total_rate = torch.zeros((), device=device)
    start = _now(device)
    done = 0
    for batch in tqdm(
        minibatches(run, epoch),
        desc=f"{run.optimizer}, epoch {epoch + 1}/{run.epochs}",
        unit="step",
        disable=not progress,
        leave=False,
    ):
        batch = batch.to(device)
        optimizer.zero_grad()
        loss = criterion(model(data.train_x[batch]), data.train_y[batch])
        loss.backward()
        optimizer.step()
        total_loss += loss.detach()
        group = optimizer.param_groups[0]
        total_rate += group.get("effective_lr", group["lr"])
        done += 1
        if done % _CHECK_EVERY == 0 and not math.isfinite(total_loss.item()):
            break
    return {
        "train_loss": total_loss.item() / done,
        "learning_rate": total_rate.item() / done,
        "seconds": _now(device) - start,
    }


def minibatches(run: Run, epoch: int) -> Sequence[Tensor]:
    """The epoch's minibatches as indices: the same for every optimizer."""
    generator = torch.Generator().manual_seed(1_000_003 * run.seed + epoch)
    order = torch.randperm(run.train_examples, generator=generator)
    return [
        order[start : start + run.batch_size]
        for start in range(0, run.train_examples - run.batch_size + 1, run.batch_size)
    ]


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """Mean cross-entropy and accuracy, in eval mode."""
    model.eval()
    sections = math.ceil(len(x) / _EVALUATION_BATCH)
    logits = torch.cat([model(part) for part in torch.tensor_split(x, sections)])
    return {
        "test_loss": F.cross_entropy(logits, y).item(),
        "test_accuracy": (logits.argmax(1) == y).float().mean().item(),
    }


# --- killed and resumed --------------------------------------------------------------------------


def _save(
    checkpoint: Path,
    run: Run,
    model: nn.Module,
    optimizer: Optimizer,
    curves: Curves,
    counts: dict[str, int],
) -> None:
    """Writes beside the checkpoint and renames, so that a kill leaves the old or the new one."""
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    beside = checkpoint.with_name(checkpoint.name + ".tmp")
    torch.save(
        {
            "run": run.key(),
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "curves": vars(curves),
            "counts": counts,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all(),
        },
        beside,
    )
    os.replace(beside, checkpoint)


def _resume(
    checkpoint: Path | None, run: Run, model: nn.Module, optimizer: Optimizer
) -> tuple[Curves, dict[str, int]]:
    """Restores a checkpoint if there is one; the curves and the guard's counts so far."""
    if checkpoint is None or not checkpoint.exists():
        return Curves(), {}
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    if saved["run"] != run.key():
        raise ValueError(
            f"{checkpoint}: of another run ({saved['run']}, not {run.key()}): delete it, or choose "
            "another file"
        )
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["rng"])
    if len(saved["cuda_rng"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(saved["cuda_rng"])
    return Curves(**saved["curves"]), saved["counts"]


def _add(counts: dict[str, int], optimizer: Optimizer) -> dict[str, int]:
    """Steps skipped and clipped, for an optimizer that counts them since it was made."""
    last = getattr(optimizer, "last_step", None)
    if last is None:
        return counts
    return {
        "skipped": counts.get("skipped", 0) + int(last.skipped_total),
        "clipped": counts.get("clipped", 0) + int(last.clipped_total),
    }


def _restart(log: Path, epochs: int) -> None:
    """Keeps the lines of the epochs that the checkpoint holds: a kill may fall between the two."""
    log.parent.mkdir(parents=True, exist_ok=True)
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    log.write_text("".join(lines[:epochs]))


# --- what is measured ----------------------------------------------------------------------------


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # A process that trains several runs would report the largest. Linux can forget it.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def _peak_memory(device: torch.device) -> float:
    """In MB: of the tensors on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


# --- the command line ----------------------------------------------------------------------------


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.cifar.train", description="Trains one network on CIFAR."
    )
    option: Callable[..., Any] = parser.add_argument
    option("--data", type=Path, required=True, help="directory of the archives")
    option("--dataset", choices=tuple(cifar.ARCHIVES), default="cifar100")
    option("--model", choices=("cnn", "resnet", "vit"), default="cnn")
    option("--activation", choices=tuple(ACTIVATIONS), default="relu")
    option("--normalisation", help="batch, layer or none (default: batch, or layer for vit)")
    option("--width", type=int, default=32, help="channels of the first layer (default: 32)")
    option("--depth", type=int, default=4, help="blocks (default: 4)")
    option("--optimizer", choices=tuple(OPTIMIZERS), default="adler")
    option("--lr", type=float, help="learning rate, for optimizers that are tuned")
    option("--batch-size", type=int, default=64)
    option("--epochs", type=int, default=10)
    option("--train-examples", type=int, default=50000)
    option("--test-examples", type=int, default=10000)
    option("--seed", type=int, default=0)
    option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    option("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    option("--log", type=Path, help="JSON lines, one an epoch; the checkpoint lies beside it")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains one run and prints its record."""
    options = _arguments(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.normalisation is None:
        options.normalisation = "layer" if options.model == "vit" else "batch"
    try:
        run = Run(**{f.name: getattr(options, f.name) for f in fields(Run)})
        data = cifar.load(
            run.dataset, options.data, options.device, run.train_examples, run.test_examples
        )
        checkpoint = options.log and options.log.with_suffix(".pt")
        record = train(run, data, log=options.log, checkpoint=checkpoint, progress=True)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    print(json.dumps(record))


if __name__ == "__main__":
    main()
