"""What this library's hooks are in copies and pickles of a model: nothing."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["Inert"]


class Inert:
    """A hook that does nothing.

    A model that is copied or saved takes its hooks along. The copy is no part of the run: whoever
    trains it makes an optimizer, which hooks it anew. ``torch.load`` may make one of these without
    being told, so that a model that is saved as a whole is loaded as it would be without hooks.

    Examples:
        >>> Inert()(1, 2, three=3) is None
        True
    """

    def __call__(self, *_: Any, **__: Any) -> None:
        """Nothing."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Inert, ()


torch.serialization.add_safe_globals([Inert])
