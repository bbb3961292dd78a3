r"""Running statistics of normalisation layers at the average of the iterates.

BatchNorm's running statistics are collected by the forward passes of training, at $y$. The average
$x$ that is tested has others, and with those of $y$ it may test no better than chance. So inputs
that training has seen since the last test are kept, evenly over all its calls, and where the
average is tested or saved the forward pass is run on them at $x$, without gradients, in training
mode, as `torch.optim.swa_utils.update_bn` does: means and variances are cumulative averages over
the batches, and nothing else of the passes is left.

Of the $n$ batches that are wanted, those since the last test come first; where they are fewer,
batches from before it take the places that are left. What was found then does not: it belonged to
other weights, which soon after the start are far away. No checkpoint holds batches: a run that is
resumed trains on bit for bit, and its statistics are those of the run that was not interrupted as
soon as it has seen as many as are wanted.

Of several processes each looks at its own batches and waits for no other one, since a checkpoint
may be of one alone: statistics differ between ranks, unless `DistributedDataParallel` makes those
of rank 0 everybody's, as in training. Under FSDP forward passes are joint, and so is the search.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils import _pytree as pytree

from adler import _distributed as distributed
from adler._recording.copies import Copier
from adler._recording.randomness import RandomState
from adler._recording.replay import (
    AutocastState,
    accelerators,
    autocast_states,
    put_back,
    replaying,
)
from adler._recording.state import CallState
from adler._unwrap import unwrap
from adler._warning import warn

__all__ = ["RunningStatistics"]

# The kept inputs take no more memory than this, or one batch.
_BUDGET = 1 << 28
_NAMES = ("running_mean", "running_var")


@dataclass(frozen=True)
class _Batch:
    """A call of training: arguments, modules in evaluation mode, autocast states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    evaluating: frozenset[nn.Module]
    autocast: tuple[AutocastState, ...]


class RunningStatistics:
    """Keeps inputs of training, and finds the running statistics that belong to other weights.

    Args:
        model: Whose normalisation layers have running statistics; maybe none has.
        most: How many batches are kept; 0: none, and nothing is ever found.

    Attributes:
        set_aside: Those of training, by name, while the model holds others; None: it does not.

    Examples:
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        >>> statistics = RunningStatistics(model, 4)
        >>> statistics.see((torch.randn(5, 3),), {})
        >>> sorted(statistics.at({}))
        ['1.running_mean', '1.running_var']
    """

    def __init__(self, model: nn.Module, most: int) -> None:
        self._model, self._most = model, most
        self._devices = accelerators(model)
        self.set_aside: dict[str, Tensor] | None = None
        self._found: dict[str, Tensor] = {}
        self._forget()
        self._look_for_layers()

    def _look_for_layers(self) -> None:
        self._modules = list(unwrap(self._model).modules())
        self._layers = {
            name: module
            for name, module in unwrap(self._model).named_modules()
            if isinstance(module, _NormBase) and module.running_mean is not None
        }

    def _forget(self) -> None:
        self._batches: list[_Batch] = []
        self._earlier: list[_Batch] = []  # from before the last test
        self._calls, self._every, self._capacity = 0, 1, max(1, self._most)

    # --- in training -----------------------------------------------------------------------------

    def see(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Notes that a call of training begins; keeps a copy of the arguments of some."""
        if self._most == 0 or not self._model.training:
            return
        if not any(layer.training for layer in self._layers.values()):
            return
        due = self._calls % self._every == 0
        if due and len(self._batches) >= self._capacity:
            self._every *= 2
            self._batches = self._batches[::2][: self._capacity - 1]
            due = self._calls % self._every == 0 or self._capacity == 1
        self._calls += 1
        if not due:
            return
        args, kwargs = distributed.moved(distributed.find_ddp(self._model), (args, kwargs))
        size = sum(
            t.numel() * t.element_size()
            for t in pytree.tree_leaves((args, dict(kwargs)))
            if isinstance(t, Tensor)
        )
        self._capacity = max(1, min(self._most, _BUDGET // max(1, size)))
        with torch.no_grad():
            args, kwargs = Copier(lambda t: t.detach().clone())((args, dict(kwargs)))
        evaluating = frozenset(module for module in self._modules if not module.training)
        self._batches = self._batches[-self._capacity + 1 :] if self._capacity > 1 else []
        self._batches.append(_Batch(args, kwargs, evaluating, autocast_states(self._devices)))
        left = self._capacity - self._calls
        self._earlier = self._earlier[-left:] if left > 0 else []

    # --- where the average is wanted -------------------------------------------------------------

    def at(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The statistics at other weights, by name; the model stays as it is.

        Asked again before the next call of training, it says the same.

        Args:
            params: The weights, by name; those that are not there are the model's own.

        Returns:
            One tensor for each; empty where there are none, or no batch has been seen.
        """
        if not self._batches:
            if not self._found and self._most > 0 and self._layers:
                self._warn("no batch of training has been seen since the optimizer was made")
            return self._found
        batches = self._earlier + self._batches
        try:
            self._found = self._collected(params, batches)
        except Exception as error:  # whatever a forward pass may raise where it is run once more
            self._forget()
            self._warn(
                "the forward pass cannot be run once more on what training has seen "
                f"({type(error).__name__}: {str(error)[:200]})"
            )
            return {}
        self._forget()
        self._earlier = batches
        self._look_for_layers()  # the model may have grown
        return self._found

    def _collected(self, params: Mapping[str, Tensor], batches: list[_Batch]) -> dict[str, Tensor]:
        model = unwrap(self._model)
        moving = {
            name: layer
            for name, layer in self._layers.items()
            if any(layer not in batch.evaluating for batch in batches)
        }
        modes = [(module, module.training) for module in self._modules]
        own, state = dict(model.named_parameters()), CallState((model,))
        # Where a forward pass gathers parameters, all ranks run as many.
        batches = batches[len(batches) - distributed.least(len(batches), list(own.values())) :]
        sharded: dict[Tensor, Tensor] = {
            own[n]: x for n, x in params.items() if distributed.is_sharded(x)
        }
        others = {n: x for n, x in params.items() if not distributed.is_sharded(x)}
        with contextlib.ExitStack() as stack:
            stack.enter_context(replaying())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            stack.callback(put_back, RandomState.now(self._devices), self._devices)
            stack.callback(_set_modes, modes)
            stack.enter_context(distributed.holding(model, sharded))
            stack.enter_context(state.installed(others))  # whose buffers are copies
            for layer in moving.values():
                layer.reset_running_stats()
                if isinstance(layer, nn.SyncBatchNorm):  # maybe only this process tests
                    layer.forward = types.MethodType(_BatchNorm.forward, layer)  # type: ignore[method-assign]
            for number, batch in enumerate(batches, 1):
                _set_modes([(module, module not in batch.evaluating) for module in self._modules])
                for layer in moving.values():
                    # None: cumulative, however often the layer is called; an InstanceNorm cannot.
                    layer.momentum = None if isinstance(layer, _BatchNorm) else 1 / number
                with contextlib.ExitStack() as casts:
                    for cast in batch.autocast:
                        casts.enter_context(cast.context())
                    model(*batch.args, **batch.kwargs)
            return {
                f"{path}.{name}" if path else name: getattr(layer, name).clone()
                for path, layer in moving.items()
                for name in _NAMES
            }

    def bring(self) -> None:
        """Puts the statistics at the present weights into the model, those of training aside."""
        found = self.at({})
        if not found:
            return
        buffers = self._buffers()
        self.set_aside = {name: buffers[name].clone() for name in found if name in buffers}
        for name in self.set_aside:
            buffers[name].copy_(found[name])

    def leave(self, back: bool) -> None:
        """The model no longer holds the average, whose statistics it held.

        Args:
            back: Whether to put back those of training; not where other weights were loaded, whose
                statistics came with them.
        """
        if self.set_aside is not None and back:
            buffers = self._buffers()
            kept = {name: value for name, value in self.set_aside.items() if name in buffers}
            self._found = {name: buffers[name].clone() for name in kept}
            for name, value in kept.items():
                buffers[name].copy_(value)
        self.set_aside = None

    def of_training(self) -> dict[str, Tensor]:
        """Copies of those of training, for a checkpoint."""
        buffers = self._buffers() if self.set_aside is None else self.set_aside
        return {name: value.clone() for name, value in buffers.items()}

    def _buffers(self) -> dict[str, Tensor]:
        return {
            f"{path}.{name}" if path else name: getattr(layer, name)
            for path, layer in self._layers.items()
            for name in _NAMES
        }

    def names_of(self, module: nn.Module) -> dict[str, str]:
        """From the names of a module's own statistics to those by which they are known here."""
        path = next((path for path, layer in self._layers.items() if layer is module), None)
        if path is None:
            return {}
        return {name: f"{path}.{name}" if path else name for name in _NAMES}

    def _warn(self, why: str) -> None:
        warn(
            f"the running statistics of {len(self._layers)} normalisation layers are those of "
            f"training, not of the average of the weights that is tested: {why}. Call "
            "optimizer.eval() and torch.optim.swa_utils.update_bn(loader, model) before a test"
        )


def _set_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training  # not `train()`, which a module may override
