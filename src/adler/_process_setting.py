"""Settings of PyTorch that hold for the whole process, changed for a while by several threads."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

__all__ = ["ProcessSetting"]


class ProcessSetting:
    """One setting. The first thread that wants it sets it, the last to go puts it back.

    Each on its own would put back what another had set, and the process be left with that.

    Args:
        change: Makes a context manager that sets it, and puts back what was.

    Examples:
        >>> said = []
        >>> @contextlib.contextmanager
        ... def loud():
        ...     said.append("on")
        ...     yield
        ...     said.append("off")
        >>> setting = ProcessSetting(loud)
        >>> with setting.wanted(), setting.wanted():
        ...     said.append("inside")
        >>> said
        ['on', 'inside', 'off']
    """

    def __init__(self, change: Callable[[], contextlib.AbstractContextManager[object]]) -> None:
        self._change = change
        self._lock = threading.Lock()
        self._wanted = 0
        self._before = contextlib.ExitStack()

    @contextlib.contextmanager
    def wanted(self) -> Iterator[None]:
        """Inside, it is set."""
        with self._lock:
            if self._wanted == 0:
                self._before.enter_context(self._change())
            self._wanted += 1
        try:
            yield
        finally:
            with self._lock:
                self._wanted -= 1
                if self._wanted == 0:
                    self._before.close()
