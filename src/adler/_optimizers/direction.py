r"""The directions: what a step goes along, and what its length is measured along.

A direction lives for one step. Slope and curvature are measured along `Direction.along`; the step
that `Direction.descend` then takes may go along something else. Wherever the step goes along an
average of gradients, the measurement is along *this minibatch's* gradient, at the size that the
average would have if all gradients were alike: averaging cancels the sharp, oscillating part of the
gradient, and so nearly all curvature, but not the slope. Measured along the average itself the
rates come out many times too large.

| direction | measured along | step along |
|---|---|---|
| `Direction` | $g$ | $g$ |
| `sgd.Momentum` | $g$ | $\hat m = m / (1 - \mu^t)$ |
| `adam.Adam` | $g / (\sqrt{\hat v} + \epsilon_A)$ | $\hat m / (\sqrt{\hat v} + \epsilon_A)$ |
| `wrapped.Displacement` | the base's step from fresh gradients | the base's step |

Any of them moves the parameters themselves, or the fast iterate of an average
(`average.Interpolation`): a subclass says what its step goes along (`Direction.advance`), and where
PyTorch has one kernel for a step of the parameters, how to take it (`Direction.descend`).
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adler import _tensors

__all__ = ["Direction", "State", "count_", "decay_", "gradients_of", "moments", "shares"]

State = MutableMapping[Tensor, Any]


class Direction:
    """The gradient; the other directions are its subclasses.

    Args:
        along: What slope and curvature are measured along, one tensor for each parameter.
    """

    def __init__(self, along: list[Tensor]) -> None:
        self.along = along

    def descend(
        self, group: Mapping[str, Any], params: list[Tensor], rate: Tensor, skipped: Tensor
    ) -> None:
        """Moves the parameters of a group, all of which have a gradient, or leaves every bit.

        Args:
            group: With ``weight_decay``, which is decoupled.
            params: Tensors to update.
            rate: 0-dim; 0 where skipped.
            skipped: 0-dim bool.
        """
        decay_(group, params, rate)
        _tensors.descend_(params, self.advance(group, params, skipped), rate, skipped)

    def advance(
        self, group: Mapping[str, Any], params: list[Tensor], skipped: Tensor
    ) -> list[Tensor]:
        """What the step goes along; moments take this gradient in, unless the step is skipped.

        Args:
            group: Of the parameters.
            params: All of the group that have a gradient; their steps have been counted.
            skipped: 0-dim bool.

        Returns:
            One tensor for each parameter, not to be written to.
        """
        return gradients_of(params)

    def finish(self, skipped: Tensor) -> None:
        """Called once, after all groups have moved."""

    def undo(self) -> None:
        """Called instead of `descend` where measuring has failed: nothing may have changed."""


def decay_(group: Mapping[str, Any], params: list[Tensor], rate: Tensor) -> None:
    """In place, the decoupled weight decay of a step of this rate."""
    if group["weight_decay"] != 0:
        _tensors.decay_(params, rate * group["weight_decay"])


def gradients_of(params: Sequence[Tensor]) -> list[Tensor]:
    """The gradients that there are."""
    return [p.grad for p in params if p.grad is not None]


def moments(state: State, p: Tensor, *names: str) -> dict[str, Tensor]:
    """A parameter's state, made at its first step: the count, and zeros under each name."""
    mine: dict[str, Tensor] = state[p]
    if "step" not in mine:
        mine["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
    for name in names:
        if name not in mine:  # a momentum may be set in the middle of training
            mine[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
    if mine["step"].device != p.device:  # PyTorch loads it to where it was saved
        mine["step"] = mine["step"].to(p.device)
    return mine


def count_(steps: Sequence[Tensor], skipped: Tensor) -> None:
    """In place, one step more for each, unless it is skipped."""
    for device in {step.device for step in steps}:
        here = [step for step in steps if step.device == device]
        torch._foreach_add_(here, [(~skipped.to(device)).to(torch.float32)] * len(here))


def shares(steps: Sequence[Tensor], equal: bool, home: torch.device) -> Tensor:
    """``1/t`` of each parameter, or where all are known to be equal one of all; float64."""
    counts = [step.to(home) for step in (steps[:1] if equal else steps)]
    return torch.stack(counts).to(_tensors.widest(home)).clamp(min=1).reciprocal()
