"""What a step hands to the next one: numbers that live in the param groups, and so in checkpoints.

Tensors are replaced, never mutated, so that groups and snapshots may share them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adler._averaging import Average
from adler._step_length import Remembered

__all__ = ["CARRIED", "Carried", "completed"]

CARRIED = (
    "rate_total",
    "rate_weight",
    "minibatch_lr",
    "curvature_total",
    "curvature_weight",
    "nat",
    "steps",
)


class Carried(NamedTuple):
    """The state of the search.

    Attributes:
        average: Of the rates.
        minibatch_lr: Of the last step.
        remembered: Of the measurements.
        steps: How many there were.
    """

    average: Average
    minibatch_lr: Tensor
    remembered: Remembered
    steps: int

    @classmethod
    def fresh(cls, device: torch.device) -> Carried:
        """Before the first step."""
        average = Average.empty(device)
        unknown = torch.full_like(average.total, math.nan)
        return cls(average, unknown, Remembered.nothing(device), 0)

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> Carried:
        """What a param group carries."""
        return cls(
            Average(group["rate_total"], group["rate_weight"]),
            group["minibatch_lr"],
            Remembered(Average(group["curvature_total"], group["curvature_weight"]), group["nat"]),
            group["steps"],
        )

    def entries(self) -> dict[str, Any]:
        """As a param group holds it."""
        ratio, nat = self.remembered
        values = (*self.average, self.minibatch_lr, *ratio, nat, self.steps)
        return dict(zip(CARRIED, values, strict=True))


def completed(group: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    r"""The entries of a group, also of one that was saved before the curvature was carried.

    Its last minibatch rate tells the ratio then: along a gradient, $c / d^\top d = 1 / \eta_k$.
    """
    fresh = Carried.fresh(device).entries()
    entries = {key: group.get(key, default) for key, default in fresh.items()}
    if "curvature_total" not in group and "minibatch_lr" in group:
        rate = torch.as_tensor(group["minibatch_lr"]).to(fresh["minibatch_lr"])
        known = torch.isfinite(rate) & (rate > 0)
        entries["curvature_total"] = torch.where(known, 1 / rate, 0.0)
        entries["curvature_weight"] = known.to(rate)
    return {
        key: torch.as_tensor(value).to(fresh[key]) if isinstance(fresh[key], Tensor) else value
        for key, value in entries.items()
    }
