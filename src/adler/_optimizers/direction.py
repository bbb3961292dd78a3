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
| `Momentum` | $g$ | $\hat m = m / (1 - \mu^t)$ |
| `Adam` | $g / (\sqrt{\hat v} + \epsilon_A)$ | $\hat m / (\sqrt{\hat v} + \epsilon_A)$ |
| `joint.Joint` | $g - \rho\, \delta$ | the same |
| `wrapped.Displacement` | the base's step from fresh gradients | the base's step |
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adler import _tensors as update
from adler._distributed import like, local
from adler.curvature.measurement import BatchCurvature

__all__ = ["Adam", "Direction", "Momentum", "State", "adam_denominators", "decay_", "moments"]

State = MutableMapping[Tensor, Any]


class Direction:
    """The gradient; the other directions are its subclasses.

    Args:
        along: What slope and curvature are measured along, one tensor for each parameter.
        curvature: What is already known of the batch along it.
    """

    def __init__(self, along: list[Tensor], curvature: BatchCurvature | None = None) -> None:
        self.along = along
        self.curvature = curvature

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
        update.descend_(params, _gradients(params), rate, skipped)

    def settle(self, skipped: Tensor) -> None:
        """Called once, after all groups have moved."""


class Momentum(Direction):
    """The bias-corrected exponential average of the gradients; measured along the gradient.

    Args:
        gradients: Of this minibatch.
        state: The optimizer's; holds ``exp_avg`` and ``step`` where a group has momentum.
        equal: Whether the counts of a group's parameters are equal, by its id.
    """

    def __init__(self, gradients: list[Tensor], state: State, equal: Mapping[int, bool]) -> None:
        super().__init__(gradients)
        self._state, self._equal = state, equal

    def descend(
        self, group: Mapping[str, Any], params: list[Tensor], rate: Tensor, skipped: Tensor
    ) -> None:
        """As `Direction.descend`; a step that is skipped leaves the average as it was."""
        if group["momentum"] == 0:
            super().descend(group, params, rate, skipped)
            return
        decay_(group, params, rate)
        states = [moments(self._state, p, "exp_avg") for p in params]
        update.momentum_(
            params,
            _gradients(params),
            [state["exp_avg"] for state in states],
            [state["step"] for state in states],
            rate,
            skipped,
            momentum=group["momentum"],
            equal=self._equal[id(group)],
        )


class Adam(Direction):
    """Adam's step with decoupled decay; measured along the preconditioned gradient.

    The second moment is taken as this gradient would leave it; the state stays until the step.

    Args:
        groups: With ``betas`` and ``adam_eps``.
        params: Those with a gradient.
        gradients: Of this minibatch.
        state: The optimizer's; holds ``exp_avg``, ``exp_avg_sq`` and ``step``.
        equal: Whether the counts of a group's parameters are equal, by its id.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        params: list[Tensor],
        gradients: list[Tensor],
        state: State,
        equal: Mapping[int, bool],
    ) -> None:
        self._state, self._equal = state, equal
        of = dict(zip(params, gradients, strict=True))
        found: dict[Tensor, Tensor] = {}
        for group in groups:
            mine = [p for p in group["params"] if p in of]
            if not mine:
                continue
            discount, g = group["betas"][1], local([of[p] for p in mine])
            states = [self._moments(p) for p in mine]
            seconds = local([state["exp_avg_sq"] for state in states])
            squares = list(torch._foreach_mul(seconds, discount))
            torch._foreach_addcmul_(squares, g, g, 1 - discount)
            steps = [state["step"] for state in states]
            if equal[id(group)]:
                steps = steps[:1]
            adam_denominators(squares, steps, discount, group["adam_eps"], ahead=1)
            size = update.squared_norm(squares)
            # In place: a new tensor costs the host more than a pass over an old one.
            torch._foreach_reciprocal_(squares)
            torch._foreach_mul_(squares, g)
            # A square that overflows would stay in the moment for ever: NaN, and so no step.
            squares[0].add_((size - size).to(squares[0]))
            found.update((p, like(part, p)) for p, part in zip(mine, squares, strict=True))
        super().__init__([found[p] for p in params])

    def descend(
        self, group: Mapping[str, Any], params: list[Tensor], rate: Tensor, skipped: Tensor
    ) -> None:
        """As `Direction.descend`; a step that is skipped leaves the moments as they were."""
        states = [self._moments(p) for p in params]
        update.adam_(
            params,
            _gradients(params),
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["step"] for state in states],
            rate,
            skipped,
            betas=group["betas"],
            eps=group["adam_eps"],
            weight_decay=group["weight_decay"],
        )

    def _moments(self, p: Tensor) -> dict[str, Tensor]:
        return moments(self._state, p, "exp_avg", "exp_avg_sq")


def adam_denominators(
    squares: list[Tensor],
    steps: Sequence[Tensor],
    discount: float,
    offset: float,
    ahead: int = 0,
) -> None:
    r"""In place, second moments $v$ become $\sqrt{v / (1 - \beta_2^t)} + \epsilon_A$.

    Args:
        squares: Second moments; overwritten.
        steps: ``t`` of each, or one of all; 0-dim, less ``ahead``.
        discount: ``β₂``.
        offset: ``ε_A``.
        ahead: Steps to come.
    """
    home = squares[0].device
    # In float64: 1 - 0.999 keeps four digits in float32.
    corrections = 1 - discount ** (torch.stack([step.to(home) for step in steps]).double() + ahead)
    if len(corrections) == 1:
        update.scale_(squares, corrections[0].reciprocal())
    else:
        own = [c.to(v.device) for c, v in zip(corrections, squares, strict=True)]
        torch._foreach_div_(squares, own)
    torch._foreach_sqrt_(squares)
    torch._foreach_add_(squares, offset)


def decay_(group: Mapping[str, Any], params: list[Tensor], rate: Tensor) -> None:
    """In place, the decoupled weight decay of a step of this rate."""
    if group["weight_decay"] != 0:
        update.decay_(params, rate * group["weight_decay"])


def _gradients(params: list[Tensor]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


def moments(state: State, p: Tensor, *names: str) -> dict[str, Tensor]:
    """A parameter's state, zero before its first step; ``momentum`` may be set in mid-training."""
    mine: dict[str, Tensor] = state[p]
    if "step" not in mine:
        mine["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        for name in names:
            mine[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
    if mine["step"].device != p.device:  # PyTorch loads it to where it was saved
        mine["step"] = mine["step"].to(p.device)
    return mine
