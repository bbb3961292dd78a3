"""Which parameters have had equally many steps.

Their counts are tensors, because the host does not know which steps were skipped. But parameters
that had gradients at the same steps have the same count, whatever it is, and one factor then serves
all of them: as many kernels, whatever their number.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor

from adler._optimizers.groups import has_gradient

__all__ = ["StepCounts"]


class StepCounts:
    """Knows of each group whether all that step now have stepped together until now.

    Only the first step after state was loaded looks at the counts, and waits for the device.

    Examples:
        >>> import torch
        >>> a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
        >>> group, counts = {"params": [a, b]}, StepCounts()
        >>> a.grad = torch.ones(2)
        >>> counts.all_equal([group], {})[id(group)]
        True
        >>> b.grad = torch.ones(2)  # it was not there before
        >>> counts.all_equal([group], {})[id(group)]
        False
    """

    def __init__(self) -> None:
        self._last: dict[int, tuple[frozenset[int], bool]] = {}

    def all_equal(
        self, groups: Sequence[Mapping[str, Any]], state: MutableMapping[Tensor, Any]
    ) -> dict[int, bool]:
        """Whether the counts of a group's parameters are known to be equal, by ``id(group)``.

        Args:
            groups: All of the optimizer's, before the step; those with a gradient will be at it.
            state: The optimizer's; holds ``step``.
        """
        found = {}
        for number, group in enumerate(groups):
            params = [p for p in group["params"] if has_gradient(p)]
            here = frozenset(map(id, params))
            before, equal = self._last.get(number, (None, True))
            equal = _agree(params, state) if before is None else equal and here <= before
            self._last[number] = here, equal
            found[id(group)] = equal
        return found


def _agree(params: Sequence[Tensor], state: MutableMapping[Tensor, Any]) -> bool:
    counts = [state[p].get("step") if p in state else None for p in params]
    return len({None if count is None else float(count) for count in counts}) <= 1
