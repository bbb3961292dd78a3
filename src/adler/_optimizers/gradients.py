"""The gradients of a step, as the loop has left them: scaled, clipped, or as they were made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adler import _distributed as distributed
from adler._optimizers.groups import has_gradient, moves

__all__ = ["Gradients", "Scaling", "gradients_in", "unscale_"]


class Scaling(NamedTuple):
    """What a `torch.amp.GradScaler` asks of a step; 0-dim.

    Attributes:
        scale: By which the loss was multiplied; NaN: unscaled by the user; None: no scaler.
        veto: Whether the step is to be skipped; None: no scaler.
    """

    scale: Tensor | None = None
    veto: Tensor | None = None


class Gradients(NamedTuple):
    """What a step begins with.

    Attributes:
        params: Those with a gradient.
        values: Theirs, unscaled.
        scaling: Of a GradScaler.
        unmodified: Whether they are known to be as the backward pass left them.
        multiplied: By what the loop has multiplied them; see `adler._optimizers.clipping`.
    """

    params: list[Tensor]
    values: list[Tensor]
    scaling: Scaling
    unmodified: bool
    multiplied: Tensor | None

    def clipped(self) -> Tensor | None:
        """By what the loop has clipped them, apart from a GradScaler's scale; 1: not known.

        None where they are as they were made.
        """
        found = self.multiplied
        if found is None:
            return None
        if self.scaling.scale is not None:
            found = found * self.scaling.scale.to(found)
        return torch.where(found > 0, found, torch.ones_like(found))


def gradients_in(groups: Sequence[Mapping[str, Any]]) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters with a gradient, of the groups that move if any does, and the gradients.

    Raises:
        RuntimeError: If there are none, or they are sparse.
    """
    moving = [group for group in groups if moves(group)] or groups
    params = [p for group in moving for p in group["params"] if has_gradient(p)]
    if not params:
        raise RuntimeError(
            "step(): no parameter has a gradient: call loss.backward() before step(), on a "
            "loss that depends on the parameters given to the optimizer"
        )
    gradients = [p.grad for p in params if p.grad is not None]
    if any(gradient.is_sparse for gradient in gradients):
        raise RuntimeError(
            "step(): sparse gradients are not supported: build the embedding with sparse=False"
        )
    return params, gradients


def unscale_(
    gradients: Sequence[Tensor],
    home: torch.device,
    *,
    veto: Tensor | None,
    scale: Tensor | None,
    unscaled: object,
) -> Scaling:
    """Takes over from a GradScaler: unscales in place, unless the user has.

    Args:
        gradients: Of the step.
        home: Device of the result.
        veto: Whether the scaler has found infinities; None: there is no scaler.
        scale: What is still in the gradients; None: the user has unscaled them.
        unscaled: By what the user has; no tensor: not known.
    """
    if veto is None:
        return Scaling()
    if scale is not None:
        for gradient in distributed.local(gradients):
            gradient.div_(scale.to(gradient.device))
    elif isinstance(unscaled, Tensor):
        scale = unscaled
    else:
        scale = torch.full((), math.nan, device=home)
    return Scaling(scale.to(home), veto.to(home).bool().squeeze())
