"""One call of the command: how much time is left, what is done, and what becomes of failures.

The unit of work is a *run*: it has a key, lasts seconds to a minute, and makes one record. What
earlier calls have recorded is not run again; what failed is recorded with its error, and tried
again by the next call. A run that could not end in time is not begun.
"""

from __future__ import annotations

import json
import math
import platform
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import adler
from examples.shared.records import Record, append, finite, read, repair

__all__ = ["OutOfTimeError", "Session"]

# What a run may last beyond its time before it is interrupted.
_GRACE = 10.0


class OutOfTimeError(Exception):
    """The call's time is over, or would be before the run's end."""


class _InterruptedError(BaseException):
    """Of a run that lasts longer than its call; nothing inside may take it for a failure."""


class Session:
    """A call.

    Args:
        results: Directory of the records: a file a part.
        device: ``"cuda"`` or ``"cpu"``.
        minutes: After which nothing goes on.
        clock: Seconds, for the tests.
    """

    def __init__(
        self,
        results: Path,
        device: str,
        minutes: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.results, self.device, self._clock = results, device, clock
        self._end = self._part_end = clock() + 60 * minutes
        self._path = results
        self._failed = 0

    @property
    def left(self) -> float:
        """Seconds that the present part has."""
        return min(self._end, self._part_end) - self._clock()

    @contextmanager
    def part(self, name: str, share: float) -> Iterator[None]:
        """Inside, records go to the part's file, and it has a share of the call's time.

        An error outside of any run ends the part, is recorded, and is not raised.

        Args:
            name: Of the file.
            share: Of what is left of the call, from 0 to 1.
        """
        left = self._end - self._clock()
        self._part_end = self._clock() + share * left
        self._path = self.results / f"{name}.jsonl"
        repair(self._path)
        try:
            yield
        except OutOfTimeError:
            pass
        except Exception as error:
            self._record_failure(name, error)
        finally:
            self._part_end = self._end
            self._summarise(name)

    def records(self) -> list[Record]:
        """Those of the part that did not fail."""
        return [r for r in self._all() if "failed" not in r]

    def _all(self) -> list[Record]:
        return read([self._path], lambda r: f"{r['key']}{'/failed' if 'failed' in r else ''}")

    def find(self, key: str) -> Record | None:
        """The record of a finished run."""
        return next((r for r in self.records() if r["key"] == key), None)

    def attempt(self, key: str, work: Callable[[], dict[str, Any]], seconds: float = 0.0) -> bool:
        """Runs what is not recorded yet, if there is time, and records it or its failure.

        Args:
            key: Of the run.
            work: Makes the record; may raise `OutOfTimeError`, and then leaves nothing behind.
            seconds: How long it is likely to last.

        Returns:
            Whether the run is recorded.

        Raises:
            OutOfTimeError: If there is not enough time.
        """
        if self.find(key) is not None:
            return True
        if self.left <= max(seconds, 0.0):
            raise OutOfTimeError(key)
        begun = self._clock()
        try:
            with self._interrupted():
                found = work()
        except OutOfTimeError:
            raise
        except _InterruptedError:
            raise OutOfTimeError(key) from None
        except Exception as error:
            self._record_failure(key, error)
            return False
        found = {"key": key, **found, "wall_seconds": self._clock() - begun, **self.provenance()}
        append(self._path, finite(found))
        return True

    def expected(self, prefix: str) -> float:
        """The longest that a finished run whose key begins so has lasted; else 0."""
        return max(
            (r["wall_seconds"] for r in self.records() if r["key"].startswith(prefix)), default=0.0
        )

    def provenance(self) -> dict[str, Any]:
        """What every record carries."""
        on_gpu = self.device == "cuda"
        return {
            "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "adler": adler.__version__,
            },
        }

    def _record_failure(self, key: str, error: BaseException) -> None:
        self._failed += 1
        told = "".join(traceback.format_exception(error)).rstrip()
        record = {"key": key, "failed": told[-4000:], **self.provenance()}
        if all(r["key"] != key or "failed" not in r for r in self._all()):
            append(self._path, record)

    @contextmanager
    def _interrupted(self) -> Iterator[None]:
        """Raises `_InterruptedError` inside where a run lasts longer than the call may.

        Compilers and other packages do not look at our clock. Only the main thread can be
        interrupted so.
        """
        if threading.current_thread() is not threading.main_thread() or math.isinf(self.left):
            yield
            return

        def over(*_: Any) -> None:
            raise _InterruptedError

        before = signal.signal(signal.SIGALRM, over)
        signal.setitimer(signal.ITIMER_REAL, max(1.0, self._end - self._clock() + _GRACE))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, before)

    def _summarise(self, name: str) -> None:
        """One JSON file of the part's records: what one looks at, and what tables are made of."""
        found = self._all()
        if found:
            done = {r["key"] for r in found if "failed" not in r}
            kept = [r for r in found if "failed" not in r or r["key"] not in done]
            content = json.dumps(kept, indent=1, ensure_ascii=False)
            (self.results / f"{name}.json").write_text(content + "\n")
