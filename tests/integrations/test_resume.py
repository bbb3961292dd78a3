"""A training process killed at random moments ends where an undisturbed one does, bit for bit."""

from __future__ import annotations

import importlib.util
import itertools
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
KILLS, STEPS = 20, 150


def lines(folder):
    path = folder / "steps.txt"
    # The last line may have been cut by the kill.
    return path.read_text().splitlines(keepends=True) if path.exists() else []


def whole(folder):
    return [tuple(line.split()) for line in lines(folder) if line.endswith("\n")]


def run(context, worker, folder):
    process = context.Process(target=worker, args=(folder, STEPS))
    process.start()
    return process


@pytest.fixture(scope="module")
def start():
    """Starts a worker in a fresh process, in which the imports are already made."""
    sys.path.insert(0, str(HERE))
    context = multiprocessing.get_context("forkserver")
    # The last two are imported by the first step of a process.
    first_step = ["torch._decomp.decompositions_for_jvp", "torch._dynamo"]
    preload = ["pytest", "torch", "adler", *first_step]
    if importlib.util.find_spec("lightning"):
        preload.append("lightning.pytorch")
    context.set_forkserver_preload(preload)
    yield context
    sys.path.remove(str(HERE))


def stopped(process, timeout=120):
    process.join(timeout)
    assert process.exitcode is not None
    code = process.exitcode
    process.close()
    return code


@pytest.mark.row("Kill and resume")
@pytest.mark.parametrize("loop", ["plain", "lightning"])
def test_twenty_kills_leave_no_trace(loop, start, tmp_path):
    if loop == "lightning":
        pytest.importorskip("lightning.pytorch")
    worker = getattr(importlib.import_module("resume_worker"), loop)
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    calm.mkdir()
    rough.mkdir()
    assert stopped(run(start, worker, calm)) == 0
    reference = dict(whole(calm))
    assert len(reference) == STEPS

    chance, kills = random.Random(0), 0
    while kills < KILLS:
        goal = len(lines(rough)) + chance.randrange(8)
        process = run(start, worker, rough)
        deadline = time.monotonic() + 120
        while len(lines(rough)) < goal and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(chance.random() * 0.01)
        os.kill(process.pid, signal.SIGKILL)
        code = stopped(process)
        assert code == -signal.SIGKILL, "the worker ended by itself before its time"
        kills += 1
        with (rough / "steps.txt").open("a") as file:
            file.write("\n")  # ends a line that the kill cut
    assert stopped(run(start, worker, rough)) == 0

    steps = [entry for entry in whole(rough) if len(entry) == 2]
    resumed_from = [int(b[0]) for a, b in itertools.pairwise(steps) if int(b[0]) <= int(a[0])]
    assert len(resumed_from) >= 5, "most kills came before the first step"
    # A cut digest is shorter.
    assert all(reference[step] == digest for step, digest in steps if len(digest) == 64)
    assert steps[-1] == (str(STEPS), reference[str(STEPS)])
