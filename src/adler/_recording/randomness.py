"""The generators of random numbers that a forward pass may draw from, saved and put back."""

from __future__ import annotations

import copy
import random
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["RandomState", "copied_generator", "restore", "state_of"]


@dataclass(frozen=True)
class RandomState:
    """States of PyTorch's generators, and of those of Python and NumPy.

    Attributes:
        cpu: Of PyTorch's default generator on the CPU.
        accelerators: Of its default generators on some devices.
        python: Of the module `random`; None: not recorded.
        numpy: Of the legacy functions of `numpy.random`; None: not recorded, or NumPy is not
            loaded.
    """

    cpu: Tensor
    accelerators: tuple[tuple[torch.device, Tensor], ...] = ()
    python: tuple[Any, ...] | None = None
    numpy: dict[str, Any] | None = None

    @classmethod
    def now(cls, devices: tuple[torch.device, ...] = ()) -> RandomState:
        """The current states; ``devices`` lists the accelerators to include."""
        states = tuple((d, torch.get_device_module(d).get_rng_state(d)) for d in devices)
        numpy = sys.modules.get("numpy.random")
        legacy = None if numpy is None else numpy.get_state(legacy=False)
        return cls(torch.get_rng_state(), states, random.getstate(), legacy)

    def set(self) -> None:
        """Puts the generators into these states."""
        torch.set_rng_state(self.cpu)
        for device, state in self.accelerators:
            torch.get_device_module(device).set_rng_state(state, device)
        if self.python is not None:
            random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy.random"].set_state(self.numpy)

    def same(self, other: RandomState) -> bool:
        """Whether nothing was drawn between the two; states are on the host."""
        return (
            _equal(self.cpu, other.cpu)
            and all(
                _equal(a, b)
                for (_, a), (_, b) in zip(self.accelerators, other.accelerators, strict=True)
            )
            and self.python == other.python
            and _key(self.numpy) == _key(other.numpy)
        )


def _equal(a: Tensor, b: Tensor) -> bool:
    try:
        return bool(a.numpy().tobytes() == b.numpy().tobytes())
    except RuntimeError:  # inside a function transform, whose tensors have no memory of their own
        return False


def _key(state: dict[str, Any] | None) -> Any:
    """A NumPy state as something that can be compared."""
    if state is None:
        return None
    inner = state["state"]
    key = inner["key"].tobytes() if "key" in inner else repr(inner)
    return key, inner.get("pos"), state.get("has_gauss"), state.get("gauss")


def state_of(value: object) -> Any:
    """State of a generator object; None if it is none."""
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, random.Random) and type(value).getstate is random.Random.getstate:
        return value.getstate()
    numpy: Any = sys.modules.get("numpy.random")
    if numpy is not None:
        if isinstance(value, numpy.Generator):
            return value.bit_generator.state
        if isinstance(value, numpy.RandomState):
            return value.get_state(legacy=False)
    return None


def copied_generator(value: Any) -> Any:
    """Another generator object, in the state of this one."""
    return value.clone_state() if isinstance(value, torch.Generator) else copy.deepcopy(value)


def restore(value: Any, state: Any) -> None:
    """Puts a generator object into a state that `state_of` returned."""
    if isinstance(value, torch.Generator):
        value.set_state(state)
    elif isinstance(value, random.Random):
        value.setstate(state)
    elif hasattr(value, "bit_generator"):
        value.bit_generator.state = state
    else:
        value.set_state(state)
