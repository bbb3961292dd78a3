r"""Several processes: which ranks share a model, and what they tell each other.

`DistributedDataParallel` and FSDP2 (`fully_shard`) average gradients over the ranks, whatever the
sizes of their batches. The loss that is minimised is therefore $h = \frac1R \sum_r h_r$, and

$$
g = \tfrac1R \sum_r \nabla h_r, \qquad c(d) = \tfrac1R \sum_r c_r(d), \qquad
c_r(d) = \|J_r d\|^2_{\nabla^2 L_r} .
$$

Each rank measures $c_r$ along the joint direction; one all-reduce of one small vector makes the
mean, so that all ranks take bit for bit the same decision. Parameters that are sharded (DTensors)
keep their shards: sums over whole tensors are all-reduced, updates act on the shards alone.

A model's ranks are those of the `DistributedDataParallel` that it is, or runs inside, or those of
the device mesh of its parameters. Nothing else is guessed.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = [
    "Layout",
    "active",
    "all_whole",
    "check_supported",
    "find_ddp",
    "gathered",
    "holding",
    "is_sharded",
    "layout",
    "least",
    "like",
    "local",
    "mean",
    "moved",
    "process_groups",
    "reshard",
    "scattered",
    "when_exchanged",
    "whole",
]


# --- which ranks ----------------------------------------------------------------------------------


def _loaded(module: str, name: str) -> type | None:
    """A class of PyTorch, or None if its module is not imported: nothing is an instance then."""
    found = getattr(sys.modules.get(module), name, None)
    return found if isinstance(found, type) else None


def _is(value: object, module: str, name: str) -> bool:
    kind = _loaded(module, name)
    return kind is not None and isinstance(value, kind)


def find_ddp(model: nn.Module) -> nn.Module | None:
    """The `DistributedDataParallel` that ``model`` is, compiled or not."""
    inner = getattr(model, "_orig_mod", model)
    if _is(inner, "torch.nn.parallel.distributed", "DistributedDataParallel"):
        assert isinstance(inner, nn.Module)
        return inner
    return None


def active() -> nn.Module | None:
    """The `DistributedDataParallel` inside whose forward the caller runs."""
    kind = _loaded("torch.nn.parallel.distributed", "DistributedDataParallel")
    return getattr(kind, "_active_ddp_module", None)


def check_supported(model: nn.Module) -> None:
    """Refuses wrappers whose parameters or outputs the measurement could not follow.

    Raises:
        TypeError: For `nn.DataParallel` and FSDP1; says what to use.
    """
    if isinstance(model, nn.DataParallel):
        raise TypeError(
            "model: nn.DataParallel computes on copies of the parameters, which the curvature "
            "cannot follow: train the module beneath it (model.module), or use "
            "torch.nn.parallel.DistributedDataParallel, one process a device"
        )
    kind = ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel")
    if any(_is(module, *kind) for module in model.modules()):
        raise TypeError(
            "model: FullyShardedDataParallel flattens the parameters, which the curvature cannot "
            "follow: use torch.distributed.fsdp.fully_shard (FSDP2)"
        )


def process_groups(ddp: nn.Module | None, params: Sequence[Tensor]) -> list[Any]:
    """The process groups over which gradients were averaged; empty for one process.

    Args:
        ddp: The model's `DistributedDataParallel`, if it has one.
        params: The model's parameters.

    Raises:
        RuntimeError: Inside ``Join``, or if the parameters are on several device meshes.
    """
    if ddp is not None:
        if getattr(getattr(ddp, "_join_config", None), "enable", False):
            raise RuntimeError(
                "step(): torch.distributed.algorithms.Join is not supported: a rank that has no "
                "more batches takes no steps. Give all ranks as many batches "
                "(DistributedSampler does), of any size"
            )
        return [ddp.process_group]
    meshes = list(dict.fromkeys(p.device_mesh for p in params if is_sharded(p)))  # type: ignore[attr-defined]
    if not meshes:
        return []
    if len(meshes) > 1:
        raise RuntimeError(
            f"step(): the parameters are on {len(meshes)} device meshes; one is supported: give "
            "fully_shard the same mesh= everywhere"
        )
    return [meshes[0].get_group(dim) for dim in range(meshes[0].ndim)]


def mean(values: Sequence[Tensor], groups: Sequence[Any]) -> list[Tensor]:
    """Means over the ranks of 0-dim tensors of one dtype: one all-reduce a group.

    Not finite on one rank, not finite on all.
    """
    if not groups:
        return list(values)
    vector = torch.stack(list(values))
    for group in groups:
        torch.distributed.all_reduce(vector, group=group)
        vector = vector / group.size()
    return list(vector)


def least(number: int, params: Sequence[Tensor]) -> int:
    """The least that any rank says, where parameters are sharded; elsewhere what this one says."""
    groups = process_groups(None, params)
    if not groups:
        return number
    least = torch.tensor(number, device=local([p for p in params if is_sharded(p)])[0].device)
    for group in groups:
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN, group)
    return int(least)


def when_exchanged(note: Callable[[], None]) -> None:
    """Calls a function at the end of the backward pass that is running.

    Gradients are then as `DistributedDataParallel` and FSDP2 leave them: the same on all ranks.

    Args:
        note: Called once; never, if the pass fails.
    """
    queue = torch.autograd.Variable._execution_engine.queue_callback
    # Callbacks run in the order in which they were queued, and may queue more. The means of
    # `DistributedDataParallel` are written by one that its last gradient queues, after this call.
    queue(lambda: queue(note))


def moved(ddp: nn.Module | None, inputs: Any) -> Any:
    """Inputs where `DistributedDataParallel` moves them before it calls its module."""
    devices = getattr(ddp, "device_ids", None)
    if not devices:
        return inputs
    home = torch.device(ddp.device_type, devices[0])  # type: ignore[union-attr,arg-type]
    return torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to(home), inputs)


# --- sharded tensors ------------------------------------------------------------------------------

_WHOLE = frozenset((Tensor, nn.Parameter))


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is a DTensor, of which this rank holds a part."""
    return type(tensor) not in _WHOLE and _is(tensor, "torch.distributed.tensor", "DTensor")


def all_whole(tensors: Iterable[Tensor]) -> bool:
    """Whether none is sharded, by their types alone: asked many times a step."""
    return _WHOLE.issuperset(map(type, tensors))


class Layout(NamedTuple):
    """Where the parts of a tensor are."""

    mesh: Any
    placements: tuple[Any, ...]


def layout(tensor: Tensor) -> Layout | None:
    """Where the parts of a tensor are; None: all of it is here."""
    if not is_sharded(tensor):
        return None
    return Layout(tensor.device_mesh, tuple(tensor.placements))  # type: ignore[attr-defined]


def local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """This rank's parts, sharing their storage; other tensors as they are."""
    if all_whole(tensors):
        return list(tensors)
    with torch.no_grad():
        return [t.to_local() if is_sharded(t) else t for t in tensors]  # type: ignore[attr-defined]


def like(part: Tensor, whole: Tensor) -> Tensor:
    """``part`` as this rank's part of a tensor laid out as ``whole``."""
    if not is_sharded(whole):
        return part
    made: Tensor = type(whole.detach()).from_local(  # type: ignore[attr-defined]
        part,
        whole.device_mesh,  # type: ignore[attr-defined]
        whole.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )
    return made


def gathered(tensors: Sequence[Tensor]) -> list[Tensor]:
    """All of each, on every rank: for what the parts of a tensor do not tell."""
    if all_whole(tensors):
        return list(tensors)
    with torch.no_grad():
        return [t.full_tensor() if is_sharded(t) else t for t in tensors]  # type: ignore[attr-defined]


def scattered(tensors: Sequence[Tensor], layouts: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `gathered`, without communication.

    Args:
        tensors: Whole, the same on every rank.
        layouts: As many, of the same shapes; each is laid out as its own.
    """
    return [
        _scattered(t, like) if is_sharded(like) else t
        for t, like in zip(tensors, layouts, strict=True)
    ]


def _scattered(tensor: Tensor, like: Tensor) -> Tensor:
    kind, mesh = type(like.detach()), like.device_mesh  # type: ignore[attr-defined]
    copies = [torch.distributed.tensor.Replicate()] * mesh.ndim
    everywhere = kind.from_local(tensor, mesh, copies, run_check=False)  # type: ignore[attr-defined]
    found: Tensor = everywhere.redistribute(placements=like.placements)  # type: ignore[attr-defined]
    return found


def whole(sums: Tensor, where: Layout | None) -> Tensor:
    """Sums over whole tensors, from sums over this rank's parts of them.

    Args:
        sums: One for each of some tensors of the same layout.
        where: Their layout; None: the sums are whole already.

    Raises:
        RuntimeError: If a part is a summand yet to be added (a placement ``Partial``).
    """
    if where is None:
        return sums
    for dim, placement in enumerate(where.placements):
        if placement.is_partial():
            raise RuntimeError(
                "step(): a gradient is not reduced over its device mesh (a placement Partial): "
                "redistribute it before step()"
            )
        if placement.is_replicate():
            continue  # every rank has the same
        torch.distributed.all_reduce(sums, group=where.mesh.get_group(dim))
    return sums


def reshard(model: nn.Module) -> None:
    """Frees parameters that FSDP's last forward has left gathered, so that the next looks anew."""
    for module in model.modules():
        if _is(module, "torch.distributed.fsdp", "FSDPModule"):
            module.reshard()  # type: ignore[operator]


@contextlib.contextmanager
def holding(model: nn.Module, values: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Inside, sharded parameters of a model hold other values; afterwards their own, bit for bit.

    FSDP gathers from its own shards, whatever tensors a module has: so these are written to.

    Args:
        model: Whose forward passes see the values.
        values: From parameters to tensors laid out as they are.
    """
    if not values:
        yield
        return
    parts, others = local(list(values)), local(list(values.values()))
    before = [part.detach().clone() for part in parts]
    reshard(model)
    try:
        with torch.no_grad():
            torch._foreach_copy_(parts, others)
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(parts, before)
        reshard(model)
