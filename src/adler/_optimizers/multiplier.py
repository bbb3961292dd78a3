"""Says when a learning rate of another optimizer is taken for the multiplier that it is here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from adler._warning import warn

__all__ = ["MultiplierCheck"]

# A multiplier that is meant shortens steps, but hardly to so little for good; and SGD's usual rate
# is 0.1.
_LEAST = 0.1
# No warm-up of the multiplier takes longer than this to come to `_LEAST` (50,000 steps to 1). A
# rate of 0.0006 that is reached in 100 steps would take 16,000 at that pace, in 2,000 ten times.
_LONGEST = 5_000
# Steps after which it is looked at for the first time.
_FIRST = 8
# What grows by more between two looks accelerates; a straight line does not, but for rounding.
_STRAIGHT = 1.0001


class MultiplierCheck:
    """Warns once where the largest ``lr`` of all groups is far below 1 from the first step on.

    It is looked at after 8, 16, 32, ... steps, until it is above 0.1. What does not rise is
    said, and so is what rises so slowly that it is no warm-up of a multiplier, unless it
    accelerates, as exponential and cosine warm-ups do, which start flat. A cosine that falls from 1
    is not looked at again. Neither is a constant said where a scheduler was made for a rate of 1
    (the groups' ``initial_lr``), which may make its steps by the epoch. Rates that live on an
    accelerator are not looked at, which would make the host wait.

    Examples:
        >>> import warnings
        >>> check = MultiplierCheck()
        >>> with warnings.catch_warnings(record=True) as said:
        ...     warnings.simplefilter("always")
        ...     for _ in range(10):
        ...         check.observe([{"lr": 6e-4}])
        >>> len(said), "0.0006" in str(said[0].message)
        (1, True)
    """

    def __init__(self) -> None:
        self._steps = 0
        self._seen: list[float] = []  # at the steps 1, 2, 4, 8, ...
        self._done = False

    def observe(self, groups: Iterable[Mapping[str, Any]], steps: int = 0) -> None:
        """Takes note of the groups of one step.

        Args:
            groups: The optimizer's.
            steps: Made before this one; a run that is resumed is in the middle of its schedule.
        """
        if self._done:
            return
        groups = list(groups)
        now = _largest(group["lr"] for group in groups)
        self._steps += 1
        if now > _LEAST or steps >= self._steps:
            self._done = True
        elif self._steps & (self._steps - 1) == 0:
            self._seen.append(now)
            if self._steps >= _FIRST:
                by_epochs = _largest(group.get("initial_lr", 0.0) for group in groups) > _LEAST
                self._done = self._is_foreign(by_epochs)
                if self._done and now > 0:
                    self._warn(now)

    def _is_foreign(self, by_epochs: bool) -> bool:
        """Whether what was seen is no beginning of a multiplier's schedule."""
        earlier, before, now = self._seen[-3:]
        pace, pace_before = 2 * (now - before) / self._steps, 4 * (before - earlier) / self._steps
        if pace <= 0:
            return pace < 0 or not by_epochs
        return pace <= _STRAIGHT * pace_before and _LEAST - now > _LONGEST * pace

    def _warn(self, now: float) -> None:
        warn(
            f"lr={now:g} multiplies the measured learning rate: steps are {1 / now:.0f} times "
            "shorter than measured. If this is a learning rate "
            "meant for another optimizer (lr=..., group['lr'] = ..., a scheduler's max_lr=), "
            "delete it: the multiplier's default is 1"
        )


def _largest(rates: Iterable[float | Tensor]) -> float:
    """Of several; infinite where one is unknown, or there is none."""
    rates = list(rates)
    if any(isinstance(lr, Tensor) and lr.device.type != "cpu" for lr in rates):
        return math.inf
    return max((float(lr) for lr in rates), default=math.inf)
