"""Which dtypes a model's own autocast rounds to, whatever the dtype of what it returns.

Accelerate and others turn autocast on inside ``forward`` and return float32, so neither the call
nor its outputs tell how coarse they are. What a replay sees is remembered for the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

__all__ = ["NotesAutocast", "autocast_inside"]

_found: WeakKeyDictionary[nn.Module, set[torch.dtype]] = WeakKeyDictionary()


def autocast_inside(model: nn.Module) -> frozenset[torch.dtype]:
    """The dtypes of the autocasts that replays of a model have seen; empty before the first."""
    return frozenset(_found.get(model, ()))


class NotesAutocast(TorchFunctionMode):
    """Notes the autocast of every function that is called inside.

    Args:
        model: Whose forward pass is run.
        device_types: Where it computes.

    Examples:
        >>> model = nn.Linear(2, 2)
        >>> with NotesAutocast(model, ["cpu"]), torch.autocast("cpu", torch.bfloat16):
        ...     _ = model(torch.ones(1, 2))
        >>> autocast_inside(model)
        frozenset({torch.bfloat16})
    """

    def __init__(self, model: nn.Module, device_types: Iterable[str]) -> None:
        super().__init__()
        self._model, self._types = model, tuple(device_types)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for kind in self._types:
            if torch.is_autocast_enabled(kind):
                _found.setdefault(self._model, set()).add(torch.get_autocast_dtype(kind))
        return func(*args, **(kwargs or {}))
