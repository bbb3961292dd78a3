"""Training runs of parts (c) and (d): any method of `benchmarks.suite.methods`.

Seconds are of training: everything that a method does between two batches, and the waiting for the
device, but no evaluation. On a GPU they are the clock's; on a CPU, which other processes may share,
the process's own.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.gpu.session import OutOfTimeError, Session
from benchmarks.suite.methods import METHODS, method
from benchmarks.suite.steppers import Setting
from examples.shared.networks import parameter_count
from examples.shared.records import Record

__all__ = ["TUNED", "UNTUNED", "Workload", "choices", "last", "run_key", "train"]

# In the order in which they are run. One name adds a method.
UNTUNED = ("adler-schedulefree", "adler-muon", "schedulefree-adamw", "schedulefree-plus")
TUNED = {"adamw-cosine-tuned": "rates", "muon-cosine-tuned": "muon_rates"}
# Steps after which the end is foreseen (our methods' first hundred take longer), and divergence is
# looked for.
_LOOK_AT, _CHECK_EVERY = 125, 50

Batches = Iterator[tuple[Tensor, Tensor]]


class Workload(NamedTuple):
    """What is trained.

    Attributes:
        network: Makes it from a seed; on the device.
        batches: An endless stream of a seed's minibatches: the same for every method.
        steps: Of a run.
        epoch_steps: Of an epoch.
        test: Loss and further numbers of a network in eval mode.
        evaluations: At so many evenly spaced moments, the end among them.
        bfloat16: Whether the network runs under autocast.
    """

    network: Callable[[int], nn.Module]
    batches: Callable[[int], Batches]
    steps: int
    epoch_steps: int
    test: Callable[[nn.Module], dict[str, float]]
    evaluations: int
    bfloat16: bool


def choices(preset: Any) -> list[tuple[str, float | None]]:
    """Methods and rates, first what matters most: ours, then the middle rate of the tuned ones."""
    tuned = [
        (name, rate)
        for place in (1, 0, 2)
        for name, rates in TUNED.items()
        for rate in getattr(preset, rates)[place : place + 1]
    ]
    first, *others = [(name, None) for name in UNTUNED if name in METHODS]
    return [first, tuned[0], *others, *tuned[1:]]


def run_key(name: str, rate: float | None, seed: int) -> str:
    """Of a run."""
    return f"{name}{'' if rate is None else f'@{rate:g}'}/s{seed}"


def train(
    session: Session, workload: Workload, name: str, rate: float | None, seed: int
) -> dict[str, Any]:
    """Trains; the record's curves hold a number for each evaluation.

    Raises:
        OutOfTimeError: As soon as it is clear that the session's time does not suffice.
    """
    torch.manual_seed(seed)
    precision = functools.partial(
        torch.autocast, session.device, torch.bfloat16, enabled=workload.bfloat16
    )
    model = workload.network(seed)
    criterion = nn.CrossEntropyLoss()
    stepper = method(name).make(
        Setting(
            model=model,
            criterion=criterion,
            rate=math.nan if rate is None else rate,
            steps=workload.steps,
            epoch_steps=workload.epoch_steps,
            batches=lambda: workload.batches(seed + 1000),
        )
    )
    moments = {
        workload.steps * i // workload.evaluations for i in range(1, 1 + workload.evaluations)
    }
    curves: dict[str, list[float]] = {"step": [], "seconds": [], "train_loss": [], "lr": []}
    batches, seconds, diverged = workload.batches(seed), 0.0, False
    total, counted = torch.zeros((), device=session.device), 0
    stepper.train()
    started, begun = time.monotonic(), _now(session.device)
    for step in range(1, workload.steps + 1):
        x, y = next(batches)
        stepper.optimizer.zero_grad()
        with precision():
            loss = criterion(model(x), y)
        loss.backward()
        stepper.after_backward(loss)
        total += loss.detach()
        counted += 1
        if step % _CHECK_EVERY == 0:
            diverged = not math.isfinite(float(total))
        if step == _LOOK_AT:
            _foresee(session, time.monotonic() - started, step, workload.steps)
        if step in moments or diverged:
            seconds += _now(session.device) - begun
            curves["step"].append(step)
            curves["seconds"].append(seconds)
            curves["train_loss"].append(float(total) / counted)
            curves["lr"].append(stepper.rate())
            with torch.no_grad(), precision():
                for number, value in workload.test(stepper.evaluate()).items():
                    curves.setdefault(number, []).append(value)
            if diverged or not math.isfinite(float(total)):
                diverged = True
                break
            total.zero_()
            counted = 0
            stepper.train()
            begun = _now(session.device)
    return {
        "method": name,
        "lr": rate,
        "seed": seed,
        "steps": step,
        "parameters": parameter_count(model),
        "on_gpu": session.device == "cuda",
        "bfloat16": workload.bfloat16,
        "seconds": seconds,
        "diverged": diverged,
        **stepper.counts(),
        "curves": curves,
    }


def _foresee(session: Session, elapsed: float, step: int, steps: int) -> None:
    if elapsed / step * (steps - step) > session.left:
        raise OutOfTimeError(f"{steps} steps would take {elapsed / step * steps:.0f} s")


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def last(record: Record, number: str) -> float:
    """A curve's last value; infinity where the run diverged."""
    value = record["curves"][number][-1]
    return math.inf if record["diverged"] or value is None else float(value)
