"""Notices a run of bad steps without making the host wait for the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from adler._warning import warn

__all__ = ["Watch"]


class Watch:
    """Counts consecutive bad steps on the device and warns once when there are many.

    On the CPU the count is read at once. Elsewhere it is copied to the host while the device goes
    on, and read when a later step finds that the copy has arrived.

    Args:
        message: What is said, after the number of steps.
        patience: How many are too many.
    """

    def __init__(self, message: str, patience: int = 10) -> None:
        self._message, self._patience = message, patience
        self._run = 0
        self._count: Tensor | None = None
        self._copy: tuple[Tensor, torch.cuda.Event] | None = None
        self._warned = False

    def observe(self, bad: Tensor, why: Callable[[], str] = str) -> None:
        """Takes note of one step.

        Args:
            bad: 0-dim bool.
            why: Called where the warning is given, and added to it; it may wait for the device.
        """
        if self._warned:
            return
        seen = self.count(bad)
        if seen is not None and seen >= self._patience:
            self._warned = True
            many = f"the last {seen} {self._message}" if self._patience > 1 else self._message
            warn(f"{many}{why()}. optimizer.last_step holds the numbers; this is said once")

    def count(self, bad: Tensor) -> int | None:
        """How many steps in a row were bad, with this one; None: not known to the host yet."""
        if bad.device.type == "cpu":
            self._run = self._run + 1 if bad.numpy() else 0
            seen: int | None = self._run
        else:
            before = bad.new_zeros((), dtype=torch.long) if self._count is None else self._count
            self._count = torch.where(bad, before + 1, 0)
            seen = self._arrived()
        return seen

    def _arrived(self) -> int | None:
        """The count, if the host can have it without waiting."""
        assert self._count is not None
        if self._count.device.type != "cuda":
            return None
        seen = None
        if self._copy is not None:
            host, event = self._copy
            if not event.query():  # type: ignore[no-untyped-call]
                return None
            seen = int(host.numpy())
        host = torch.empty_like(self._count, device="cpu", pin_memory=True)
        host.copy_(self._count, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._copy = host, event
        return seen
