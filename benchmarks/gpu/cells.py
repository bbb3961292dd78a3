"""Part (e): Table 7.1 of the thesis at full size, run by run, several processes side by side.

The networks are small: one alone leaves most of a GPU idle. Records are those of `examples.cifar`,
whose command makes the table of them.
"""

from __future__ import annotations

import functools
import itertools
import time
from pathlib import Path

from benchmarks.gpu import data
from benchmarks.gpu.presets import Cells
from benchmarks.gpu.session import OutOfTimeError, Session
from examples.cifar.config import Run
from examples.cifar.data import ARCHIVES
from examples.cifar.presets import PRESETS
from examples.cifar.train import work as train
from examples.shared.jobs import record_all
from examples.shared.records import read, repair

__all__ = ["run"]


def run(session: Session, preset: Cells, root: Path) -> None:
    """As many runs as fit.

    Raises:
        FileNotFoundError: If there are no pictures.
        OutOfTimeError: If the next runs would not end in time.
        RuntimeError: If a run crashed.
    """
    there = [name for name in ARCHIVES if data.unpack_pictures(root, name) is not None]
    if not there:
        raise FileNotFoundError(f"{root}: neither a folder of CIFAR nor a mosaic")
    path = session.results / "e-runs.jsonl"
    repair(path)
    found = read([path], lambda record: Run.of(record).key())
    done = {Run.of(record).key() for record in found}
    wanted = (r for r in PRESETS[preset.preset].runs() if r.dataset in there)
    missing = [r for r in itertools.islice(wanted, preset.most) if r.key() not in done]
    work = functools.partial(train, root=root, device=session.device)
    # Rounds of as many as run at a time: what a round took says whether the next one fits.
    longest = max((record["seconds"] for record in found), default=preset.seconds)
    for first in range(0, len(missing), preset.jobs):
        if session.left <= longest:
            raise OutOfTimeError("the next runs")
        begun = time.monotonic()
        minutes = session.left / 60
        some = missing[first : first + preset.jobs]
        if crashes := record_all(some, len(done), work, path, jobs=preset.jobs, minutes=minutes):
            raise RuntimeError(f"{crashes} runs crashed; their reports are above")
        longest = max(longest, time.monotonic() - begun)
    session.attempt("all", lambda: {"runs": len(done) + len(missing)})
