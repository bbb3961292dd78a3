r"""The points that an average keeps of a parameter: the fast iterate, and what rounding took off.

The average $x = y + (1 - 1/\beta)(z - y)$ is not stored, and the $t$-th step moves $y$ by
$\tfrac1t (z - y)$ toward $z$. In bfloat16 and float16 that is soon less than half a unit of the
last place: $y$ stays where it is, and $x$ is no longer the mean of the $z$. So where a parameter is
of half precision, $z$ is kept in float32, and $y$ too: the parameter is its rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["HALF", "NAMES", "average", "begin", "load", "of_steps", "restart", "round_"]

# What is kept of each parameter from step to step; ``y`` is kept while the average is in its place.
NAMES = ("z", "precise_y")
# Of these dtypes, points are kept in float32.
HALF = (torch.bfloat16, torch.float16)


def begin(p: Tensor) -> dict[str, Tensor]:
    """The points of an average that begins where a parameter is.

    Examples:
        >>> {name: point.dtype for name, point in begin(torch.ones(2, dtype=torch.half)).items()}
        {'z': torch.float32, 'precise_y': torch.float32}
        >>> list(begin(torch.ones(2)))
        ['z']
    """
    names = NAMES if p.dtype in HALF else ("z",)
    return {name: _precise(p.detach()).clone() for name in names}


def restart(mine: MutableMapping[str, Any], p: Tensor) -> None:
    """Begins the average of a parameter anew, in its state."""
    for name in NAMES:  # of another dtype, it may have had others
        mine.pop(name, None)
    mine.update(begin(p))


def average(p: Tensor, points: Mapping[str, Tensor], interpolation: float) -> Tensor:
    """``x``, a new tensor of the parameter's dtype, of a parameter that holds ``y``."""
    y = points.get("precise_y", p.detach()).to(points["z"])  # the model may have been converted
    return torch.lerp(y, points["z"], 1 - 1 / interpolation).to(p.dtype)


def of_steps(
    params: Sequence[Tensor], states: Sequence[Mapping[str, Tensor]], directions: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """``y`` of each parameter and its direction, as steps are made of them: not of half precision.

    Args:
        params: Tensors to be updated.
        states: Theirs.
        directions: Of their dtypes.
    """
    at = [mine.get("precise_y", p) for p, mine in zip(params, states, strict=True)]
    return at, [_precise(direction) for direction in directions]


def round_(params: Sequence[Tensor], at: Sequence[Tensor], skip: Tensor) -> None:
    """Parameters become the roundings of their ``y``, unless the step is skipped."""
    for p, y in zip(params, at, strict=True):
        if y is not p:
            p.copy_(torch.where(skip.to(p.device), p, y.to(p.dtype)))


def load(state: Mapping[Tensor, Any], params: Sequence[Tensor], saved: Sequence[Any]) -> None:
    """Puts saved points into a state, which PyTorch has rounded to the dtypes of the parameters.

    Args:
        state: The optimizer's; changed.
        params: Its parameters.
        saved: What was saved of each; None: nothing.
    """
    for p, kept in zip(params, saved, strict=True):
        if p.dtype in HALF and kept is not None and "z" in kept:
            mine = state[p]
            for name in NAMES:
                # (Of a checkpoint without it, ``y`` is the parameter.)
                point = kept.get(name, mine.get("y", p.detach()))
                mine[name] = point.to(mine["z"].device, torch.float32, copy=True)


def _precise(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in HALF else tensor
