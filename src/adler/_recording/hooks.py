"""What this library's hooks have in common: they keep nothing alive, and copies do nothing.

A model that is copied or saved takes its hooks along. The copy is no part of the run: an
optimizer that trains it hooks it anew.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from adler._recording.replay import is_capturing, is_replaying

__all__ = ["ForwardHook", "Hook", "Inert", "in_training_loop", "on_backward", "remove_all"]


class Inert:
    """A hook that does nothing: what the others are in copies and pickles of a model.

    ``torch.load`` may make one of these without being told, so that a model that is saved as a
    whole is loaded as it would be without hooks.

    Examples:
        >>> Inert()(1, 2, three=3) is None
        True
    """

    def __call__(self, *_: Any, **__: Any) -> None:
        """Nothing."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Inert, ()


torch.serialization.add_safe_globals([Inert])


class Hook:
    """A hook whose copies and pickles do nothing."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Inert, ()


class ForwardHook(Hook):
    """A forward hook that tells an object of the calls of the training loop.

    Args:
        owner: Not kept alive.
        module: The hooked one, not kept alive; calls of another (a copy) are not told.
        method: Of the owner; receives what the hook receives after the module.
    """

    def __init__(self, owner: Any, module: nn.Module, method: str) -> None:
        self._owner, self._module, self._method = weakref.ref(owner), weakref.ref(module), method

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def __call__(self, module: nn.Module, *call: Any) -> None:
        owner = self._owner()
        if owner is not None and self._module() is module and in_training_loop():
            getattr(owner, self._method)(*call)


def in_training_loop() -> bool:
    """Whether a hook sees a call of the training loop, which may be differentiated.

    What a CUDA graph does with these tensors later, no hook sees; nor may it ask for the random
    state. The loop then says what the batch is. Inside a function transform there are no tensors to
    keep.
    """
    return (
        torch.is_grad_enabled()
        and not is_replaying()
        and not is_capturing()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def on_backward(owner: Any, method: str, what: Any) -> Callable[[Any], None]:
    """A hook for the gradient of a tensor; the graph holds it, and through it ``what``.

    Args:
        owner: Not kept alive.
        method: Of the owner; receives ``what`` and the gradient.
        what: Kept for as long as the graph is.
    """
    known = weakref.ref(owner)

    def hook(gradient: Any) -> None:
        alive = known()
        if alive is not None:
            getattr(alive, method)(what, gradient)

    return hook


def remove_all(handles: Iterable[Any]) -> None:
    """Takes hooks off, by their handles."""
    for handle in handles:
        handle.remove()
