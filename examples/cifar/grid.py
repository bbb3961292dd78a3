"""Runs many training runs, several processes at a time."""

from __future__ import annotations

import functools
import multiprocessing
import os
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from examples.cifar import data as cifar
from examples.cifar.config import Run
from examples.cifar.train import train

__all__ = ["Outcome", "run_all", "work"]

# A run and its record, or why there is none.
Outcome = tuple[Run, dict[str, Any] | str]


def run_all(
    runs: Sequence[Run],
    work: Callable[[Run], dict[str, Any]],
    jobs: int,
    deadline: float | None = None,
) -> Iterator[Outcome]:
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


def work(run: Run, root: Path, device: str) -> dict[str, Any]:
    """Trains one run; the data stays in memory for the next."""
    return train(run, _data(run.dataset, root, device, run.train_examples, run.test_examples))


_data = functools.lru_cache(maxsize=2)(cifar.load)
