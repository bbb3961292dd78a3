"""Parameters and directions by name, and directions as vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from adler._unwrap import unwrap
from adler.curvature.jacobian import Parameters

__all__ = ["flattened", "named_direction", "named_parameters", "unflatten"]


def named_parameters(
    model: nn.Module, params: Parameters | Iterable[Tensor] | None = None
) -> dict[str, Tensor]:
    """Parameters by name.

    Args:
        model: The network.
        params: By name already, or a sequence of parameters of the model. Default: all that require
            a gradient.

    Raises:
        ValueError: If one of the sequence is not the model's.
    """
    if isinstance(params, Mapping):
        return dict(params)
    names: dict[Tensor, str] = {p: name for name, p in unwrap(model).named_parameters()}
    if params is None:
        return {name: p for p, name in names.items() if p.requires_grad}
    params = list(params)
    missing = [i for i, p in enumerate(params) if p not in names]
    if missing:
        raise ValueError(f"params: entries {missing} are not parameters of the model")
    return {names[p]: p for p in params}


def named_direction(
    params: Parameters, direction: Parameters | Iterable[Tensor]
) -> dict[str, Tensor]:
    """A direction by name, in the order of the parameters.

    Args:
        params: By name, as `named_parameters` returns them.
        direction: By name too, or a sequence of the same length.

    Raises:
        ValueError: If names, lengths or shapes differ from those of the parameters.
    """
    if isinstance(direction, Mapping):
        along = {name: direction[name] for name in params if name in direction}
        if direction.keys() != params.keys():
            difference = sorted(direction.keys() ^ params.keys())
            raise ValueError(f"direction: its names differ from those of params: {difference}")
    else:
        direction = list(direction)
        if len(direction) != len(params):
            raise ValueError(
                f"direction: {len(direction)} tensors for {len(params)} parameters; pass one each"
            )
        along = dict(zip(params, direction, strict=True))
    for name, d in along.items():
        if d.shape != params[name].shape:
            raise ValueError(
                f"direction: {name!r} has shape {tuple(d.shape)}, its parameter "
                f"{tuple(params[name].shape)}"
            )
    return along


def unflatten(vector: Tensor, params: Parameters) -> dict[str, Tensor]:
    """A direction from a vector of all its entries, one parameter after the other.

    Args:
        vector: Shape ``(P,)``, ``P`` the number of entries of all parameters.
        params: By name; they lend names, shapes, dtypes and devices.

    Examples:
        >>> unflatten(torch.arange(3.0), {"w": torch.zeros(1, 2), "b": torch.zeros(())})
        {'w': tensor([[0., 1.]]), 'b': tensor(2.)}
    """
    pieces = vector.split_with_sizes([p.numel() for p in params.values()])
    return {n: v.view_as(p).to(p) for (n, p), v in zip(params.items(), pieces, strict=True)}


def flattened(
    product: Callable[[Parameters], Parameters], params: Parameters
) -> Callable[[Tensor], Tensor]:
    """An operator on directions as one on vectors, for Lanczos and power iteration.

    Args:
        product: Maps a direction by name to another.
        params: See `unflatten`.

    Examples:
        >>> double = flattened(lambda d: {"w": 2 * d["w"]}, {"w": torch.zeros(1, 2)})
        >>> double(torch.tensor([1.0, 3.0]))
        tensor([2., 6.])
    """

    def on_vectors(vector: Tensor) -> Tensor:
        image = product(unflatten(vector, params))
        return torch.cat([image[name].flatten().to(vector) for name in params])

    return on_vectors
