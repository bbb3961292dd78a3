"""Arithmetic in parameter space: one kernel for all tensors where PyTorch has one.

Of sharded tensors (DTensors), sums are those of the whole, and updates act on this rank's parts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from adler._distributed import Layout, all_whole, layout, local, whole

__all__ = [
    "at_least_float32",
    "decay_",
    "descend_",
    "descend_each_",
    "divide_into_",
    "dot",
    "is_on_host",
    "lengths",
    "lerp_",
    "local_alike",
    "scale_",
    "shifted",
    "squared_norm",
    "squared_norm_and_lengths",
    "stacked",
    "widest",
]

_FUSED_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_FUSED_DEVICES = ("cpu", "cuda")
_HOST_DEVICES = ("cpu",)
_SMALL = 1 << 14  # entries: copying them takes as long as the launch of a kernel or two


def is_on_host(device: torch.device) -> bool:
    """Whether per-tensor kernels are cheap, and reading a scalar needs no synchronisation."""
    return device.type in _HOST_DEVICES


def squared_norm(tensors: Sequence[Tensor], home: torch.device | None = None) -> Tensor:
    """Sum of squares of all entries; NaN or infinite if any entry is.

    Args:
        tensors: Any shapes, floating dtypes and devices, at least one.
        home: Device of the result; default: that of the first tensor.

    Returns:
        0-dim, float64 (float32 where the device has no float64).

    Examples:
        >>> float(squared_norm([torch.tensor([3.0]), torch.tensor([[4.0]])]))
        25.0
    """
    return squared_norm_and_lengths(tensors, home)[0]


def dot(a: Sequence[Tensor], b: Sequence[Tensor], home: torch.device | None = None) -> Tensor:
    """Sum of products of all entries.

    Args:
        a: Any shapes, floating dtypes and devices, at least one.
        b: As many, of the same shapes, dtypes and devices.
        home: Device of the result; default: that of the first tensor.

    Returns:
        0-dim, float64 (float32 where the device has no float64).

    Examples:
        >>> float(dot([torch.tensor([3.0, 1.0])], [torch.tensor([2.0, 4.0])]))
        10.0
    """
    home = a[0].device if home is None else home
    sums = []
    for (device, _, where), (left, right) in _alike(a, b).items():
        few = _dots if is_on_host(device) else _dots_by_few_kernels
        terms = few(local(left), local(right)).to(widest(device))
        sums.append(whole(terms.sum(), where))
    return _sum(sums, home)


def _dots(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Terms of the sum over all pairs, of one dtype, without large temporaries where it is wide.

    Small tensors are copied into one: a kernel and two views of each would take longer than all the
    copying.
    """
    wide = at_least_float32(left[0])
    small, pairs = [], []
    for a, b in zip(left, right, strict=True):
        if a.numel() > _SMALL:
            pairs.append((a.reshape(-1), b.reshape(-1)))
        else:
            small.append((a, b))
    if small:
        of_left, of_right = map(_flatten_dense_tensors, zip(*small, strict=True))
        pairs.append((of_left, of_right))
    return torch.stack([torch.dot(a.to(wide), b.to(wide)) for a, b in pairs])


def _dots_by_few_kernels(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Terms of the sum over all pairs, by as many kernels whatever their number.

    PyTorch sums a list of tensors by their absolute values only, so negative products are counted
    first with the wrong sign, and taken off twice.
    """
    wide = at_least_float32(left[0])
    if wide != left[0].dtype:
        left, right = ([t.to(wide) for t in tensors] for tensors in (left, right))
    products = torch._foreach_mul(list(left), list(right))
    absolute = torch.stack(torch._foreach_norm(products, 1))
    torch._foreach_clamp_max_(products, 0)
    return absolute - 2 * torch.stack(torch._foreach_norm(products, 1))


def shifted(params: Sequence[Tensor], directions: Sequence[Tensor], by: Tensor) -> list[Tensor]:
    r"""$\theta + b\, d$, in new tensors: one set of them, and two kernels a dtype.

    Args:
        params: Any shapes, floating dtypes and devices.
        directions: As many, of the same shapes, dtypes and devices.
        by: 0-dim.

    Examples:
        >>> shifted([torch.ones(2)], [torch.tensor([1.0, 2.0])], torch.tensor(0.5))
        [tensor([1.5000, 2.0000])]
    """
    found: dict[int, Tensor] = {}
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for i, param in enumerate(params):
        groups[param.device, param.dtype].append(i)
    for (device, dtype), members in groups.items():
        moved = torch._foreach_mul([directions[i] for i in members], by.to(device, dtype))
        torch._foreach_add_(moved, [params[i] for i in members])
        found.update(zip(members, moved, strict=True))
    return [found[i] for i in range(len(params))]


def squared_norm_and_lengths(
    tensors: Sequence[Tensor], home: torch.device | None = None
) -> tuple[Tensor, list[Tensor]]:
    """`squared_norm`, and the norm of each tensor, from one look at each.

    Args:
        tensors: Any shapes, floating dtypes and devices, at least one.
        home: Device of the sum; default: that of the first tensor.

    Returns:
        0-dim, float64 (float32 where the device has no float64), and 0-dim tensors on the devices
        of their own.

    Examples:
        >>> squared, lengths = squared_norm_and_lengths([torch.tensor([3.0]), torch.tensor([4.0])])
        >>> float(squared), [float(length) for length in lengths]
        (25.0, [3.0, 4.0])
    """
    home = tensors[0].device if home is None else home
    sums = []
    found: dict[int, Tensor] = {}
    for (device, _, where), (members,) in _alike(tensors).items():
        norms = _norms(members, where)
        sums.append(torch.stack(norms).to(widest(device)).square().sum())
        found.update(zip(map(id, members), norms, strict=True))
    return _sum(sums, home), [found[id(tensor)] for tensor in tensors]


def _sum(parts: Sequence[Tensor], home: torch.device) -> Tensor:
    """Of 0-dim tensors of the widest dtype of each device; nearly always there is one."""
    first, *others = (part.to(home, widest(home)) for part in parts)
    for part in others:
        first = first + part
    return first


def lengths(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The norm of each tensor; 0-dim, on its device."""
    return squared_norm_and_lengths(tensors)[1]


def stacked(scalars: Sequence[Tensor], like: Tensor) -> Tensor:
    """0-dim tensors as one of one dimension; one copy where all are on one device.

    Args:
        scalars: Of any floating dtypes and devices, at least one.
        like: Gives the result its dtype and device.

    Examples:
        >>> stacked([torch.tensor(1.0), torch.tensor(2.0)], torch.zeros((), dtype=torch.float64))
        tensor([1., 2.], dtype=torch.float64)
    """
    if len({(scalar.device, scalar.dtype) for scalar in scalars}) == 1:
        return torch.stack(list(scalars)).to(like)
    return torch.stack([scalar.to(like) for scalar in scalars])


def descend_(
    params: Sequence[Tensor], directions: Sequence[Tensor], rate: Tensor, skip: Tensor
) -> None:
    r"""In place, $\theta \leftarrow \theta - \eta\, d$, or nothing at all.

    Args:
        params: Tensors to update.
        directions: As many, of the same shapes, dtypes and devices; unchanged, may be non-finite.
        rate: 0-dim.
        skip: 0-dim bool on the same device as ``rate``: leave every bit of ``params`` alone.
    """
    for (device, dtype, _), (p, d) in local_alike(params, directions).items():
        if is_on_host(device) and is_on_host(rate.device):
            # The faster kernel of the two.
            if not skip.numpy():
                torch._foreach_add_(p, d, alpha=-float(rate.detach().numpy()))
        elif _is_fused(device, dtype):
            _fused_descend_(p, d, rate, skip)
        else:
            step, veto = rate.to(device), skip.to(device)
            for param, direction in zip(p, d, strict=True):
                param.copy_(torch.where(veto, param, param - step * direction))


def _is_fused(device: torch.device, dtype: torch.dtype) -> bool:
    return dtype in _FUSED_DTYPES and device.type in _FUSED_DEVICES


def _fused_descend_(
    params: list[Tensor], directions: list[Tensor], rate: Tensor, skip: Tensor
) -> None:
    """Takes the rate and the veto from the device, so that the host need not wait."""
    device = params[0].device
    torch._fused_sgd_(
        params,
        directions,
        [],
        weight_decay=0.0,
        momentum=0.0,
        lr=rate.to(device, torch.float64 if device.type == "cpu" else torch.float32),
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
        grad_scale=None,
        found_inf=skip.to(device, torch.float32),
    )


def lerp_(
    averages: Sequence[Tensor], values: Sequence[Tensor], weight: float, skip: Tensor
) -> None:
    r"""In place, $m \leftarrow m + w\,(x - m)$, or nothing at all.

    Args:
        averages: ``m``; updated.
        values: ``x``, as many, of the same shapes, dtypes and devices; may be non-finite when
            skipped.
        weight: ``w``.
        skip: 0-dim bool: leave every bit alone.
    """
    for (device, _, _), (m, x) in local_alike(averages, values).items():
        if is_on_host(device) and is_on_host(skip.device):
            if not skip.numpy():
                torch._foreach_lerp_(m, x, weight)
            continue
        apart = torch._foreach_sub(m, x)
        descend_(m, apart, torch.full((), weight, dtype=widest(device), device=device), skip)


def descend_each_(
    params: Sequence[Tensor],
    directions: Sequence[Tensor],
    rates: Tensor,
    skip: Tensor,
    equal: bool,
) -> None:
    """As `descend_`, with a rate for each; they differ where a parameter has had fewer steps.

    Args:
        params: Tensors to update, of one device and dtype.
        directions: As many, of the same shapes; unchanged.
        rates: One for each, or a single one where all are equal, 1-dim.
        skip: See `descend_`.
        equal: Whether the first rate is that of all.
    """
    if equal:
        descend_(params, directions, rates[0], skip)
        return
    steps = list(torch._foreach_mul(list(directions), list(rates.unbind())))
    descend_(params, steps, torch.ones_like(rates[0]), skip)


def decay_(params: Sequence[Tensor], amount: Tensor) -> None:
    r"""In place, $\theta \leftarrow (1 - \min(a, 1))\,\theta$: decay never flips a sign."""
    scale_(params, 1 - amount.clamp(max=1))


def divide_into_(numerators: Sequence[Tensor], denominators: list[Tensor]) -> list[Tensor]:
    """In place of each denominator, the quotient; tensors of one device.

    Args:
        numerators: Unchanged.
        denominators: As many, of the same shapes and dtypes; overwritten.

    Returns:
        ``denominators``.
    """
    if is_on_host(denominators[0].device):
        for a, b in zip(numerators, denominators, strict=True):
            torch.div(a, b, out=b)
    else:
        torch._foreach_reciprocal_(denominators)
        torch._foreach_mul_(denominators, list(numerators))
    return denominators


def scale_(params: Sequence[Tensor], factor: Tensor) -> None:
    r"""In place, $\theta \leftarrow s\,\theta$; the factor is 0-dim, of any dtype and device."""
    for (device, _, _), (members,) in local_alike(params).items():
        torch._foreach_mul_(members, factor.to(device, at_least_float32(members[0])))


def at_least_float32(tensor: Tensor) -> torch.dtype:
    """The tensor's dtype, or float32 where that is of half precision."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _norms(tensors: list[Tensor], where: Layout | None) -> list[Tensor]:
    """Of each; tensors of one dtype and layout. Halves are accumulated in float32."""
    half = tensors[0].dtype in (torch.float16, torch.bfloat16)
    norms = list(torch._foreach_norm(local(tensors), 2, torch.float32 if half else None))
    if where is None:
        return norms
    squares = torch.stack(norms).to(widest(norms[0].device)).square()
    return list(whole(squares, where).sqrt())


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 where the device has no other."""
    return torch.float32 if device.type == "mps" else torch.float64


_KIND = attrgetter("device", "dtype")
_Key = tuple[torch.device, torch.dtype, Layout | None]
_Groups = dict[_Key, tuple[list[Tensor], ...]]


def _alike(*lists: Sequence[Tensor]) -> _Groups:
    """Rows of tensors by device, dtype and layout of the first."""
    if lists and all_whole(lists[0]):  # nearly always, and at every step
        kinds = set(map(_KIND, lists[0]))
        if len(kinds) == 1:
            return {(*kinds.pop(), None): tuple(map(list, lists))}
    groups: _Groups = defaultdict(lambda: tuple([] for _ in lists))
    for row in zip(*lists, strict=True):
        group = groups[row[0].device, row[0].dtype, layout(row[0])]
        for members, tensor in zip(group, row, strict=True):
            members.append(tensor)
    return groups


def local_alike(*lists: Sequence[Tensor]) -> _Groups:
    """This rank's parts of rows of tensors; what is done to each entry alone needs no other."""
    return _alike(*(local(tensors) for tensors in lists))
