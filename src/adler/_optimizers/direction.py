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
(`interpolation.Interpolation`): a subclass says what its step goes along (`Direction.advance`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adler import _tensors
from adler._optimizers.relative_change import RelativeChange, State

__all__ = [
    "Direction",
    "State",
    "count_",
    "decay_",
    "gradients_of",
    "load_moments",
    "moments",
    "shares",
]

# Squares of gradients fall below what float16 has, and in bfloat16 they would never decay: 0.999 of
# a number rounds to the number itself.
_PRECISE = ("exp_avg_sq",)


class Direction:
    """The gradient; the other directions are its subclasses.

    Args:
        along: What slope and curvature are measured along, one tensor for each parameter.

    Attributes:
        bound: How far each parameter may move; None: as far as the step goes.
        scale_free: Whether ``along`` stays what it is where all gradients, present and past, are
            multiplied by one number.
        made: Whether what `advance` returns was made for this step and may be written to.
    """

    bound: RelativeChange | None = None
    scale_free: bool = False
    made: bool = False

    def __init__(self, along: list[Tensor]) -> None:
        self.along = along

    def look(
        self, gradients: list[Tensor], home: torch.device, measured: bool
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """``g·d``, ``d·d``, both 0-dim, and the norm of each tensor of ``d``; before any step.

        Args:
            gradients: Of this minibatch, those that the direction was made of.
            home: Device of the sums.
            measured: Whether curvature will be measured along ``d``. If not, these numbers only
                bound the step, and an expensive direction may do without `along`.
        """
        squared_norm, lengths = _tensors.squared_norm_and_lengths(self.along, home)
        plain = self.along is gradients
        slope = squared_norm if plain else _tensors.dot(gradients, self.along, home)
        return slope, squared_norm, lengths

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
        directions = self.advance(group, params, skipped)
        _tensors.descend_(params, self.bounded(params, directions, rate), rate, skipped)

    def advance(
        self, group: Mapping[str, Any], params: list[Tensor], skipped: Tensor
    ) -> list[Tensor]:
        """What the step goes along; moments take this gradient in, unless the step is skipped.

        Args:
            group: Of the parameters.
            params: All of the group that have a gradient; their steps have been counted.
            skipped: 0-dim bool.

        Returns:
            One tensor for each parameter, not to be written to unless `made`.
        """
        return gradients_of(params)

    def bounded(self, params: list[Tensor], directions: list[Tensor], rate: Tensor) -> list[Tensor]:
        """The directions, none of which moves its parameter too far at this rate."""
        if self.bound is None:
            return directions
        return self.bound.shorten(params, directions, rate, in_place=self.made)

    def memory(self, group: Mapping[str, Any]) -> float:
        """``μ``, if each gradient acts ``1 / (1 − μ)`` times as long as one step; 0: once."""
        return 0.0

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
    """A parameter's state, made at its first step: the count, and zeros under each name.

    Of parameters in half precision, second moments are in float32.
    """
    mine: dict[str, Tensor] = state[p]
    if "step" not in mine:
        mine["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
    for name in names:
        if name not in mine:  # a momentum may be set in the middle of training
            dtype = _tensors.at_least_float32(p) if name in _PRECISE else p.dtype
            mine[name] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
    if mine["step"].device != p.device:  # PyTorch loads it to where it was saved
        mine["step"] = mine["step"].to(p.device)
    return mine


def load_moments(state: State, params: Sequence[Tensor], saved: Sequence[Any]) -> None:
    """Puts saved second moments into a state, rounded by PyTorch to the parameters' dtypes.

    Args:
        state: The optimizer's; changed.
        params: Its parameters.
        saved: What was saved of each; None: nothing.
    """
    for p, kept in zip(params, saved, strict=True):
        dtype = _tensors.at_least_float32(p)
        for name in _PRECISE:
            if dtype != p.dtype and kept is not None and name in kept and name in state[p]:
                state[p][name] = kept[name].to(state[p][name].device, dtype, copy=True)


def count_(steps: Sequence[Tensor], skipped: Tensor) -> None:
    """In place, one step more for each, unless it is skipped."""
    devices = {step.device for step in steps}
    for device in devices:
        here = [step for step in steps if len(devices) == 1 or step.device == device]
        if _tensors.is_on_host(device) and _tensors.is_on_host(skipped.device):
            if not skipped.numpy():
                torch._foreach_add_(here, 1.0)
        else:
            torch._foreach_add_(here, [(~skipped.to(device)).to(torch.float32)] * len(here))


def shares(steps: Sequence[Tensor], equal: bool, home: torch.device) -> Tensor:
    """``1/t`` of each parameter, or where all are known to be equal one of all; float64."""
    counts = [step.to(home) for step in (steps[:1] if equal else steps)]
    return torch.stack(counts).to(_tensors.widest(home)).clamp(min=1).reciprocal()
