"""Part (a): the tests that need a GPU, and of each that fails what it said."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from benchmarks.gpu.session import OutOfTimeError, Session

__all__ = ["report", "run"]

_ROOT = Path(__file__).parents[2]
_FILE = "tests/optimizers/test_cuda.py"
_PROCESSES = 4


def run(session: Session) -> None:
    """Runs them, unless that was done.

    Raises:
        OutOfTimeError: If they do not end in time.
    """
    on_gpu = session.device == "cuda"
    session.attempt(_FILE, lambda: _run(session.left, _PROCESSES if on_gpu else 0))


def _run(seconds: float, processes: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", _FILE]
    if processes and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(processes)]
    with tempfile.TemporaryDirectory() as made:
        written = Path(made) / "report.xml"
        command.append(f"--junitxml={written}")
        try:
            done = subprocess.run(
                command, cwd=_ROOT, capture_output=True, text=True, timeout=max(1.0, seconds)
            )
        except subprocess.TimeoutExpired as error:
            raise OutOfTimeError(_FILE) from error
        if not written.exists():
            raise RuntimeError(f"pytest ended with {done.returncode}: {done.stdout[-3000:]}")
        return report(written.read_text())


def report(xml: str) -> dict[str, Any]:
    """Counts, and what failed: a pure function of pytest's JUnit report."""
    cases = list(ET.fromstring(xml).iter("testcase"))
    failed = {
        f"{case.get('classname')}::{case.get('name')}": "".join(found.itertext())[-3000:]
        for case in cases
        for found in (*case.findall("failure"), *case.findall("error"))
    }
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "passed": len(cases) - skipped - len(failed),
        "skipped": skipped,
        "failures": failed,
    }
