"""Another optimizer that trains the same parameters takes over: the run of the first has ended.

PyTorch goes through the hooks on all optimizers' steps while they are called, and an optimizer may
be made or end in another thread then. So there is one hook for the process, which stays.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from adler._optimizers.base import MeasuredOptimizer

if TYPE_CHECKING:
    from adler._optimizers.average import AveragedOptimizer

__all__ = ["StepsOfOthers"]


class StepsOfOthers:
    """Tells one optimizer of the steps of those that share parameters with it.

    Args:
        optimizer: Not kept alive.
    """

    _listening: ClassVar[set[StepsOfOthers]] = set()
    _lock: ClassVar[threading.Lock] = threading.Lock()
    _hooked: ClassVar[bool] = False

    def __init__(self, optimizer: AveragedOptimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._shares: Any = weakref.WeakKeyDictionary()

    def listen(self) -> None:
        """Is told from now on."""
        with self._lock:
            self._listening.add(self)
            if not self._hooked:
                StepsOfOthers._hooked = True
                register_optimizer_step_pre_hook(_tell)

    def remove(self) -> None:
        """Is told no more."""
        self._listening.discard(self)

    def see(self, stepping: torch.optim.Optimizer) -> None:
        """An optimizer begins a step."""
        mine = self._optimizer()
        if mine is None or stepping is mine or not mine.follow_mode:
            return
        if stepping not in self._shares:
            own = {id(p) for group in mine.param_groups for p in group["params"]}
            theirs = (p for group in stepping.param_groups for p in group["params"])
            self._shares[stepping] = any(id(p) in own for p in theirs)
        if self._shares[stepping]:
            # One that measures would measure where the gradient was not taken.
            mine._retire(move=not isinstance(stepping, MeasuredOptimizer))


def _tell(stepping: torch.optim.Optimizer, *_: Any) -> None:
    for one in tuple(StepsOfOthers._listening):
        one.see(stepping)
