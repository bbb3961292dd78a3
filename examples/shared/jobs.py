"""Runs many training runs, several processes at a time, and records them."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from tqdm import tqdm

from examples.shared.records import append

__all__ = ["Keyed", "record_all", "run_all", "shard"]


class Keyed(Protocol):
    """What is run: has an identity."""

    def key(self) -> str:
        """By which a finished run is recognised."""


Run = TypeVar("Run", bound=Keyed)


def record_all(
    missing: Sequence[Run],
    finished: int,
    work: Callable[[Run], dict[str, Any]],
    path: Path,
    *,
    jobs: int,
    minutes: float | None = None,
    unit: str = "run",
) -> int:
    """Runs what is missing and appends the records to a file, under a progress bar.

    Args:
        missing: The runs, started in this order.
        finished: How many were done before, for the bar.
        work: See `run_all`.
        path: Where the records go.
        jobs: Processes.
        minutes: After which no run is started.
        unit: What a run is called.

    Returns:
        How many runs crashed; their reports are printed.
    """
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    crashes = 0
    with tqdm(total=len(missing), desc=f"{unit}s ({finished} done before)", unit=unit) as bar:
        for run, outcome in run_all(missing, work, jobs, deadline):
            if isinstance(outcome, str):
                crashes += 1
                tqdm.write(f"crashed: {run.key()}: {outcome}", file=sys.stderr)
            else:
                append(path, outcome)
            bar.update()
    return crashes


def shard(text: str) -> tuple[int, int]:
    """``i/n`` of a command line: the i-th of n parts, counted from 1.

    Raises:
        argparse.ArgumentTypeError: For anything else.
    """
    try:
        index, count = map(int, text.split("/"))
    except ValueError:
        index, count = 0, 0
    if not 1 <= index <= count:
        raise argparse.ArgumentTypeError(f"{text!r}: expected i/n with 1 <= i <= n, such as 2/8")
    return index, count


def run_all(
    runs: Sequence[Run],
    work: Callable[[Run], dict[str, Any]],
    jobs: int,
    deadline: float | None = None,
) -> Iterator[tuple[Run, dict[str, Any] | str]]:
    """Yields every run with its record or with the report of its crash, as they finish.

    Args:
        runs: Started in this order.
        work: Makes the record; in another process, so a module's function or a partial of one.
        jobs: Processes.
        deadline: Of `time.monotonic`, after which no run is started.
    """
    waiting = list(reversed(runs))
    while waiting and _early(deadline):
        with ProcessPoolExecutor(
            jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_start
        ) as pool:
            running: dict[Future[dict[str, Any]], Run] = {}
            broken = False
            while not broken and (running or (waiting and _early(deadline))):
                # No more than can run, so that a process that dies takes only these with it.
                while waiting and len(running) < jobs and _early(deadline):
                    run = waiting.pop()
                    running[pool.submit(work, run)] = run
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    run = running.pop(future)
                    error = future.exception()
                    broken = broken or isinstance(error, BrokenProcessPool)
                    yield run, future.result() if error is None else _report(error)
            for future, run in running.items():  # of a broken pool
                error = future.exception()
                yield run, future.result() if error is None else _report(error)


def _early(deadline: float | None) -> bool:
    return deadline is None or time.monotonic() < deadline


def _report(error: BaseException) -> str:
    if isinstance(error, BrokenProcessPool):
        return "its process, or one beside it, died: out of memory?"
    return "".join(traceback.format_exception(error)).rstrip()


def _start() -> None:
    """What every process does first."""
    torch.set_num_threads(1)
    # Skipped steps are counted in the records.
    warnings.filterwarnings("ignore", message=".*steps were skipped", category=RuntimeWarning)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent closes nothing, and its processes would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
