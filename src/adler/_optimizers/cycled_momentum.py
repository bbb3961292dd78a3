"""Keeps schedulers that cycle a momentum from doing so behind an optimizer's back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adler._warning import warn

__all__ = ["OwnMomenta"]

_OPTIONS = ("momentum", "betas")
# What `OneCycleLR` and `CyclicLR` leave in a group whose momentum they cycle.
_TRACES = ("max_momentum", "base_momentum")


class OwnMomenta:
    """The momenta of an optimizer's groups, as its user has set them.

    `OneCycleLR` and `CyclicLR` write to ``momentum``, or to the first of ``betas``, unless they are
    told not to. An optimizer without momentum would get one, and where the first of ``betas`` says
    how near to the average gradients are taken, the average would be another at each step.

    Args:
        groups: The optimizer's.

    Examples:
        >>> import warnings
        >>> group = {"lr": 1.0, "momentum": 0.0}
        >>> own = OwnMomenta([group])
        >>> group.update(momentum=0.95, max_momentum=0.95)
        >>> with warnings.catch_warnings(record=True) as said:
        ...     warnings.simplefilter("always")
        ...     own.put_back([group])
        >>> group["momentum"], len(said)
        (0.0, 1)
    """

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        self._own: list[dict[str, Any]] = []
        self._said = False
        self.note(groups)

    def note(self, groups: Sequence[dict[str, Any]]) -> None:
        """Takes what the groups hold for what their user wants."""
        self._own = [{key: group[key] for key in _OPTIONS if key in group} for group in groups]

    def put_back(self, groups: Sequence[dict[str, Any]]) -> None:
        """Undoes what a scheduler has written; what the user has written stays."""
        for number, group in enumerate(groups):
            cycled = any(trace in group for trace in _TRACES)
            if number == len(self._own) or not cycled:
                own = {key: group[key] for key in _OPTIONS if key in group}
                self._own[number : number + 1] = [own]
                continue
            if not self._said:
                self._said = True
                kept = ", ".join(f"{key}={value}" for key, value in self._own[number].items())
                warn(
                    "a scheduler (OneCycleLR, CyclicLR) cycles the momentum, which is ignored: "
                    f"{kept} stays. Only lr, the multiplier of the measured rate, follows the "
                    "schedule; say so with cycle_momentum=False"
                )
            group.update(self._own[number])
