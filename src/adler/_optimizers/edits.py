"""Which parameters were written to by others since the optimizer left them.

Weights that are loaded, clamped or averaged by the loop begin their own average anew. What is
written under ``torch.no_grad()`` counts up the tensor's version. What is written through ``.data``
does not, so there are two more looks. An average that was tested is compared with what it is made
of. And between steps, norms are compared: after the first steps and then now and then, which finds
a habit of the loop (clamped weights); once one was found, at every step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adler import _distributed as distributed
from adler._optimizers import points
from adler._recording.replay import is_capturing
from adler._warning import warn

__all__ = ["Edits", "equal", "loaded"]


class Edits:
    """What is known of how an optimizer left its parameters; nothing here is saved."""

    _CLOSELY = 3
    _EVERY = 64

    def __init__(self) -> None:
        # By identity, with the parameter, which lives on with its optimizer: to look a tensor up
        # by itself takes several calls of Python, and this is asked of each one at each step.
        self._left: dict[int, tuple[Tensor, int]] = {}
        self._found: set[int] = set()
        self._norms: list[tuple[list[Tensor], Tensor]] = []
        self._steps = 0
        self._always = False

    def note(self, p: Tensor) -> None:
        """Remembers a parameter as the optimizer leaves it."""
        self._left[id(p)] = p, p._version
        self._found.discard(id(p))

    def note_step(self, params: Sequence[Tensor], state: Mapping[Tensor, Any]) -> None:
        """The same after a step; now and then with norms of what has an average."""
        # A kernel that leaves every bit may count as a write.
        self._left.update((id(p), (p, p._version)) for p in params)
        self._found.difference_update(map(id, params))
        self._steps += 1
        due = self._always or self._steps <= self._CLOSELY or self._steps % self._EVERY == 0
        if due and not is_capturing():
            self._norms = _norms([p for p in params if "z" in state.get(p, ())])

    def look(self, params: Sequence[Tensor]) -> None:
        """Compares norms, where they were taken; waits for the device then."""
        before, self._norms = self._norms, []
        found = []
        for held, then in [] if is_capturing() else before:
            now = _norms(held)
            if len(now) > 1 or (then.dtype, then.device) != (now[0][1].dtype, now[0][1].device):
                continue  # model.half(), model.cuda()
            apart = ~((then == now[0][1]) | (then.isnan() & now[0][1].isnan()))
            found += [p for p, differs in zip(held, apart.tolist(), strict=True) if differs]
        found = [p for p in found if self._version(p) == p._version]
        self._found.update(map(id, found))
        if found and not self._always:
            self._always = True
            warn(
                f"{len(found)} of {len(params)} parameters were written to through .data, of which "
                "PyTorch keeps no trace. The average begins anew where they are, and from now on "
                "norms are compared at every step; write to them under torch.no_grad() instead"
            )

    def known(self, p: Tensor) -> bool:
        """Whether a parameter was noted, and not written to since."""
        return self._version(p) == p._version and id(p) not in self._found

    def among(self, params: Sequence[Tensor]) -> list[Tensor]:
        """The parameters that were noted, and written to since."""
        return [
            p
            for p in params
            if self._version(p) != p._version or id(p) in self._found
            if id(p) in self._left
        ]

    def _version(self, p: Tensor) -> int | None:
        """Of a parameter as it was noted."""
        return self._left.get(id(p), (p, None))[1]

    def of_average(self, p: Tensor, mine: Mapping[str, Tensor], interpolation: float) -> bool:
        """The same of one that holds its average, which is compared with what it is made of.

        Args:
            p: The parameter.
            mine: Its state, with ``"y"``.
            interpolation: ``β``.
        """
        if id(p) not in self._left:
            return False
        made = points.average(mine["y"], mine, interpolation)
        return not self.known(p) or not _is_still(p, made)


def _is_still(p: Tensor, made: Tensor) -> bool:
    """Whether a parameter holds what was put there, if the model was converted and back, too."""
    if (made.dtype, made.device) != (p.dtype, p.device):  # model.half(), model.cuda()
        return _close(p, made)
    return equal(p, made) or any(equal(p, made.to(half).to(p)) for half in points.HALF)


def equal(p: Tensor, other: Tensor) -> bool:
    """Bit for bit, NaN included, of what this process holds."""
    (a,), (b,) = distributed.local([p]), distributed.local([other])
    a, b = a.detach(), b.to(a.device)
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def loaded(p: Tensor, made: Tensor) -> bool:
    """Whether a parameter is the average of a checkpoint, as that may have come here.

    Another device has made it with other rounding, and it may have been saved in half precision.

    Args:
        p: The parameter.
        made: The average, made here.
    """
    (a,), (b,) = distributed.local([p]), distributed.local([made])
    a, b = a.detach(), b.to(a)
    if not a.numel() or equal(a, b):
        return True
    apart = (a - b).abs()
    if a.dtype not in points.HALF and float(apart.max()) <= 1e-5 * float(b.abs().max()):
        return True
    within = (torch.finfo(half).eps for half in points.HALF if equal(a, a.to(half).to(a)))
    return any(bool((apart <= 2 * eps * b.abs()).all()) for eps in within)


def _close(p: Tensor, other: Tensor) -> bool:
    """As near as another dtype may be."""
    (a,), (b,) = distributed.local([p]), distributed.local([other])
    return float((a.detach() - b.to(a)).norm()) <= 0.01 * float(b.norm())


def _norms(params: Sequence[Tensor]) -> list[tuple[list[Tensor], Tensor]]:
    """Of each device and dtype: tensors that this process holds as a whole, and their norms."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for p in params:
        if not distributed.is_sharded(p):
            groups.setdefault((p.device, p.dtype), []).append(p)
    return [
        (held, torch.stack(list(torch._foreach_norm([p.detach() for p in held]))))
        for held in groups.values()
    ]
