"""Parameter groups: whose they are, which of them move, and those of another optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from adler._unwrap import unwrap

__all__ = ["as_list", "has_gradient", "moves", "names_of", "taken_from"]


def names_of(model: nn.Module) -> dict[Tensor, str]:
    """The parameters of a model, and their names in its ``state_dict()``."""
    return {p: name for name, p in unwrap(model).named_parameters()}


def moves(group: Mapping[str, Any]) -> bool:
    """Whether the group's multiplier is not zero, as far as the host knows."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        return lr.device.type != "cpu" or bool(lr.detach().numpy().any())
    return bool(lr != 0)


def has_gradient(p: Tensor) -> bool:
    """One that was frozen may hold an old one."""
    return p.grad is not None and p.requires_grad


def taken_from(other: Optimizer, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Groups as another optimizer has them, with its weight decay and nothing else of it.

    Args:
        other: The optimizer.
        options: Of the groups, and what they are by default.

    Raises:
        ValueError: If there are two weight decays, or it has one and this optimizer cannot.
    """
    if options.get("weight_decay", 0) != 0:
        raise ValueError(
            f"weight_decay={options['weight_decay']}: the groups of the {type(other).__name__} "
            "given as params have theirs; pass its parameters, or no weight_decay"
        )
    groups = []
    for group in other.param_groups:
        decay = group.get("weight_decay", 0)
        if decay and "weight_decay" not in options:
            raise ValueError(
                f"params: {type(other).__name__} has weight_decay={decay}, which this optimizer "
                "does not have: pass its parameters"
            )
        params = group["params"]
        if "param_names" in group:
            params = list(zip(group["param_names"], params, strict=True))
        own = {"weight_decay": float(decay)} if "weight_decay" in options else {}
        groups.append({"params": params, **own})
    return groups


def as_list(params: Any) -> Any:
    """A list, so that looking at the parameters does not use an iterator up."""
    if isinstance(params, Tensor):
        return [params]
    return params if isinstance(params, (set, list, tuple)) else list(params)
