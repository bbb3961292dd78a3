"""The averages in every ``state_dict()`` of a model and its parts, whatever the parameters hold.

Frameworks save where they like, most of them in the middle of training. A hook on each module that
owns a trained parameter, or running statistics, replaces what it has made of itself: new tensors,
so that no forward pass that waits for its backward is disturbed. ``keep_vars=True`` asks for the
parameters, and gets them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, MutableMapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from adler._optimizers import points
from adler._optimizers.running_statistics import RunningStatistics
from adler._recording.hooks import Hook
from adler._recording.replay import is_replaying
from adler._warning import warn

__all__ = ["SavedWeights"]


class Averaged(Protocol):
    """What is asked of an optimizer: `adler._optimizers.average.AveragedOptimizer`."""

    follow_mode: bool
    state: Any
    _names: dict[Tensor, str]
    _statistics: RunningStatistics

    def _reconcile(self) -> None: ...

    def _holds_y(self, p: Tensor) -> float | None: ...


class SavedWeights:
    """Makes a model save the averages that an optimizer keeps.

    Args:
        optimizer: Not kept alive.
    """

    def __init__(self, optimizer: Averaged) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._hooked: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        # The last average of each parameter, for as long as it is held elsewhere: tied weights stay
        # one tensor in a checkpoint.
        self._made: Any = WeakTensorKeyDictionary()
        self._said = False

    def hook(self, modules: Iterable[nn.Module]) -> list[torch.utils.hooks.RemovableHandle]:
        """Hooks those that are not yet."""
        new = [module for module in modules if module not in self._hooked]
        able = [module for module in new if not isinstance(module, torch.jit.ScriptModule)]
        if len(able) < len(new) and not self._said:
            self._said = True
            warn(
                "a scripted module cannot be made to save the average: call optimizer.eval() "
                "before its state_dict(), or it saves the weights of training"
            )
        self._hooked.update(new)
        return [module.register_state_dict_post_hook(_Save(self)) for module in able]  # type: ignore[no-untyped-call]

    def write(self, module: nn.Module, entries: MutableMapping[str, Any], prefix: str) -> None:
        """Puts the averages into what a module has just said of itself."""
        optimizer = self._optimizer()
        if optimizer is None or not optimizer.follow_mode or is_replaying():
            return
        optimizer._reconcile()
        for name, p in module._parameters.items():
            held = entries.get(prefix + name)
            if p is None or held is None or held is p:
                continue
            x = self._average(optimizer, p)
            if x is not None:
                entries[prefix + name] = x
        statistics = optimizer._statistics
        names = statistics.names_of(module)
        if statistics.set_aside is not None:  # the model holds those of the average, for now
            for key in (prefix + name for name in names):
                if isinstance(entries.get(key), Tensor):
                    entries[key] = entries[key].detach().clone()
        if not names or statistics.set_aside is not None:
            return
        # Where the averages are in place, so are statistics: found there, or loaded with them.
        averages = {
            optimizer._names[p]: x
            for p in optimizer._names
            if optimizer._holds_y(p) is not None and (x := self._average(optimizer, p)) is not None
        }
        found = statistics.at(averages) if averages else {}
        for name, known in names.items():
            if known in found and prefix + name in entries:
                entries[prefix + name] = found[known].clone()

    def _average(self, optimizer: Averaged, p: Tensor) -> Tensor | None:
        """A tensor of its own with the average of a parameter; None: the parameter has no other.

        Where the parameter is the average, too: training will put another point in its place, and
        an earlier ``state_dict()`` would then hold that.
        """
        interpolation, mine = optimizer._holds_y(p), optimizer.state.get(p, {})
        if interpolation is None and "y" not in mine:
            return None
        z = mine["z"]
        known, *versions = self._made.get(p, (None,))
        alive = None if known is None else known()
        if isinstance(alive, Tensor) and versions == [p._version, z._version]:
            return alive
        with torch.inference_mode(False), torch.no_grad():
            if interpolation is None:
                made = p.detach().clone()
            else:
                made = points.average(p, mine, interpolation)
        self._made[p] = weakref.ref(made), p._version, z._version
        return made


class _Save(Hook):
    """After a module's ``state_dict()``."""

    def __init__(self, saved: SavedWeights) -> None:
        self._saved = weakref.ref(saved)

    def __call__(self, module: nn.Module, entries: Any, prefix: str, _: Any) -> None:
        saved = self._saved()
        if saved is not None and module in saved._hooked:
            saved.write(module, entries, prefix)
