"""Says when a learning rate of another optimizer is taken for the multiplier that it is here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from adler._warning import warn

__all__ = ["MultiplierCheck"]

# A multiplier that is meant shortens steps, but hardly to less than this for good.
_LEAST = 0.1
# Steps after which it is looked at; one that is still rising is looked at again.
_FIRST = 8


class MultiplierCheck:
    """Warns once where the largest ``lr`` of all groups stays far below 1 from the first step on.

    Quiet for what starts at 1 and falls (a cosine), and for what still rises (a warm-up): it is
    looked at after 8, 16, 32, ... steps until it no longer does. Rates that live on an accelerator
    are not looked at, which would make the host wait.

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
        self._steps, self._look_at, self._before = 0, _FIRST, 0.0
        self._done = False

    def observe(self, groups: Iterable[Mapping[str, Any]], steps: int = 0) -> None:
        """Takes note of the groups of one step.

        Args:
            groups: The optimizer's.
            steps: Made before this one; a run that is resumed is in the middle of its schedule.
        """
        if self._done:
            return
        rates = [group["lr"] for group in groups]
        unknown = any(isinstance(lr, Tensor) and lr.device.type != "cpu" for lr in rates)
        now = math.inf if unknown else max((float(lr) for lr in rates), default=math.inf)
        self._steps += 1
        if now >= _LEAST or steps >= self._steps:
            self._done = True
        elif self._steps == 1:
            self._before = now
        elif self._steps == self._look_at:
            self._done = now <= self._before
            if self._done and now > 0:
                self._warn(now)
            self._before, self._look_at = now, 2 * self._look_at

    def _warn(self, now: float) -> None:
        warn(
            f"lr={now:g} multiplies the measured learning rate: steps are {1 / now:.0f} times "
            "shorter than measured, and training nearly stands still. If this is a learning rate "
            "meant for another optimizer (lr=..., group['lr'] = ..., a scheduler's max_lr=), "
            "delete it: the multiplier's default is 1"
        )
