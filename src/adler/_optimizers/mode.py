"""Told at once when a model is put into evaluation mode.

A hook before the forward pass sees calls of the model itself. It does not see other methods
(``model.sample(z)``), nor the modules within it, nor those around it whose forward goes past it.
All of them are put into evaluation mode by ``eval()``, which calls `torch.nn.Module.train` of the
module and then of those within it, and PyTorch has no hook there. So the module becomes an instance
of a subclass of its class, as `torch.distributed.fsdp.fully_shard` does it, whose ``train`` tells
its followers. Its ``__class__`` is still the class itself, and so are copies and pickles.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

__all__ = ["Follower", "follow", "holders", "holds"]


class Follower:
    """Tells an object of each new mode of a module, for as long as both are there.

    Args:
        owner: Not kept alive.
        module: Not kept alive.
        method: Of the owner; receives the module and the mode.
    """

    def __init__(self, owner: Any, module: nn.Module, method: str) -> None:
        self._owner, self._module, self._method = weakref.ref(owner), weakref.ref(module), method

    def __call__(self, module: nn.Module, mode: bool) -> None:
        owner = self._owner()
        if owner is not None and module is self._module():
            getattr(owner, self._method)(module, mode)

    def remove(self) -> None:
        """Nobody is told any more; the last one leaves the module as it was."""
        module = self._module()
        listening = None if module is None else vars(type(module)).get("_adler_listening")
        if module is None or listening is None:
            return
        listening.followers = [other for other in listening.followers if other is not self]
        if not listening.followers:
            _set_class(module, listening.kind)


class _Listening:
    """What the subclass of one module's class knows.

    Args:
        kind: The class.
    """

    def __init__(self, kind: type[nn.Module]) -> None:
        self.kind = kind
        self.followers: list[Follower] = []


def _listen(module: nn.Module) -> _Listening | None:
    """Makes a module tell of its modes; None: its class has no subclasses."""
    kind = type(module)
    known: _Listening | None = vars(kind).get("_adler_listening")
    if known is not None:
        return known
    listening = _Listening(kind)

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def train(self: nn.Module, mode: bool = True) -> Any:
        result = kind.train(self, mode)
        for follower in list(listening.followers):
            follower(self, mode)
        return result

    def reduced(self: nn.Module, protocol: Any) -> Any:
        made = kind.__reduce_ex__(self, protocol)
        if not isinstance(made, tuple):
            return made
        return (made[0], tuple(kind if part is type(self) else part for part in made[1]), *made[2:])

    held = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "__slots__": (),
        "__class__": property(lambda self: kind),  # for pickles, slices, and isinstance
        "__reduce_ex__": reduced,
        "train": train,
        "_adler_listening": listening,
    }
    try:
        _set_class(module, types.new_class(kind.__name__, (kind,), {}, lambda n: n.update(held)))
    except TypeError:
        return None
    return listening


def _set_class(module: nn.Module, kind: type) -> None:
    """What an assignment does, past the property that hides the subclass."""
    object.__dict__["__class__"].__set__(module, kind)


def follow(owner: Any, modules: Collection[nn.Module], method: str) -> list[Follower]:
    """Has an object told whenever the mode of one of some modules is set.

    Args:
        owner: Whom to tell.
        modules: Whose mode.
        method: Of the owner; receives the module, and whether it trains.

    Returns:
        Handles that end it.

    Examples:
        >>> class Listener:
        ...     def hear(self, module, mode):
        ...         print("train" if mode else "eval")
        >>> listener, inner = Listener(), nn.Linear(2, 2)
        >>> (handle,) = follow(listener, [inner], "hear")
        >>> _ = nn.Sequential(inner).eval()
        eval
        >>> handle.remove()
        >>> _ = inner.train()
    """
    made = []
    for module in modules:
        listening = None if isinstance(module, torch.jit.ScriptModule) else _listen(module)
        if listening is not None:
            made.append(Follower(owner, module, method))
            listening.followers.append(made[-1])
    return made


def holders(model: nn.Module, params: Collection[int]) -> list[nn.Module]:
    """The model, and those of the modules within it that hold all of some parameters, by `id`."""
    found = [model]
    while True:
        inner = (child for child in found[-1].children() if holds(child, params))
        nearer = next(inner, None)
        if nearer is None:
            return found
        found.append(nearer)


def holds(module: nn.Module, params: Collection[int]) -> bool:
    """Whether all of some parameters, by `id`, are a module's."""
    return set(params) <= {id(p) for p in module.parameters()}
