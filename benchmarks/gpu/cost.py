"""Part (b): time and memory of a step of every optimizer's default, beside what one uses instead.

`benchmarks.step_cost` and `benchmarks.memory` measure; here it is for both precisions, and for
compiled networks.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

import adler
from benchmarks import memory, step_cost
from benchmarks.gpu.presets import Cost
from benchmarks.gpu.session import Session
from benchmarks.networks import QUICK, TASKS, Task
from benchmarks.steppers import (
    DEFAULT,
    LOW_COST,
    OptimizedStepper,
    Stepper,
    measured,
    of_suite,
    optimized,
)

__all__ = ["METHODS", "VARIANTS", "run"]

# One line adds an optimizer.
METHODS: dict[str, OptimizedStepper] = {
    "SGD": optimized(lambda model, _: torch.optim.SGD(model.parameters(), lr=1e-3)),
    "AdamW": of_suite("adamw"),
    "AdlerScheduleFree": measured(adler.AdlerScheduleFree, DEFAULT),
    "Schedule-Free AdamW": of_suite("schedulefree-adamw"),
    "Muon + AdamW": of_suite("muon-cosine-tuned"),
    "Adler": measured(adler.Adler, DEFAULT),
    "AdlerMuon": measured(adler.AdlerMuon, DEFAULT),
    "AdlerAdam": measured(adler.AdlerAdam, DEFAULT),
    "AdlerScheduleFree, low_cost": measured(adler.AdlerScheduleFree, LOW_COST),
    "GaussNewton": measured(adler.GaussNewton, DEFAULT),
    "SpectralSGD": measured(adler.SpectralSGD, DEFAULT),
}
# Compiled, as few as answer the question: each is compiled for a minute.
COMPILED = ("SGD", "AdamW", "AdlerScheduleFree", "Schedule-Free AdamW")
# By name: whether under autocast to bfloat16, whether compiled.
VARIANTS = {
    "bfloat16, eager": (True, False),
    "float32, eager": (False, False),
    "bfloat16, compiled": (True, True),
}


def run(session: Session, preset: Cost) -> None:
    """Every network in every variant; memory of the eager ones.

    Raises:
        OutOfTimeError: If not all of it fits.
    """
    known = QUICK if preset.quick else TASKS[session.device]
    chosen = {n: t for n, t in known.items() if n.startswith(preset.networks)}
    for variant in preset.variants:
        low, compiled = VARIANTS[variant]
        for network, task in chosen.items():
            key = f"{variant}: {network}"
            session.attempt(
                key,
                functools.partial(_measure, session, preset, task, low, compiled),
                session.expected(variant),
            )


def _measure(
    session: Session, preset: Cost, task: Task, low: bool, compiled: bool
) -> dict[str, Any]:
    steppers: dict[str, Stepper] = {
        name: functools.partial(METHODS[name], autocast=low)
        for name in (COMPILED if compiled else METHODS)
    }
    times, failures = step_cost.measure(
        task, steppers, preset.rounds, device=session.device, compiled=compiled, strict=False
    )
    peaks: dict[str, int] = {}
    for name in () if compiled else times:
        steps = 1 if preset.quick else step_cost.BLOCK
        peaks[name] = memory.measure(task, steppers[name], steps, session.device)
    return {"seconds": times, "bytes": peaks, "failures": failures}
