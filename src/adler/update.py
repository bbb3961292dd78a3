"""Arithmetic in parameter space: one kernel for all tensors where PyTorch has one."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["adam_", "decay_", "descend_", "dot", "on_host", "reach", "shifted", "squared_norm"]

_FUSED_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_FUSED_DEVICES = ("cpu", "cuda")
_HOST_DEVICES = ("cpu",)


def on_host(device: torch.device) -> bool:
    """Whether a kernel a tensor costs little, and nobody waits for who looks at a number."""
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
    home = tensors[0].device if home is None else home
    total = torch.zeros((), dtype=_widest(home), device=home)
    for (device, _), (members,) in _by_device_and_dtype(tensors).items():
        norms = torch.stack(_norms(members)).to(_widest(device))
        total = total + norms.square().sum().to(total)
    return total


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
    total = torch.zeros((), dtype=_widest(home), device=home)
    for (device, _), (left, right) in _by_device_and_dtype(a, b).items():
        sums = _dots(left, right) if on_host(device) else _dots_by_few_kernels(left, right)
        total = total + sums.to(_widest(device)).sum().to(total)
    return total


def _dots(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Of each pair, without temporaries where the dtype is wide."""
    flat = [(a.reshape(-1), b.reshape(-1)) for a, b in zip(left, right, strict=True)]
    return torch.stack([torch.dot(a.to(_wide(a)), b.to(_wide(b))) for a, b in flat])


def _dots_by_few_kernels(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Terms of the sum over all pairs, by as many kernels whatever their number.

    PyTorch sums a list of tensors by their absolute values only, so negative products are counted
    first with the wrong sign, and taken off twice.
    """
    wide = _wide(left[0])
    products = torch._foreach_mul([a.to(wide) for a in left], [b.to(wide) for b in right])
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


def reach(
    params: Sequence[Tensor], directions: Sequence[Tensor], home: torch.device | None = None
) -> Tensor:
    r"""Step length at which some weight tensor has moved by its own norm.

    $$
    \min_W \; \max(\|W\|, \sqrt{n_W / 3}) \,/\, \|d_W\|
    $$

    over tensors of at least two dimensions, of $n_W$ rows. The floor is the norm that PyTorch's
    default initialisation gives, so that weights that start at zero can leave it.

    Args:
        params: Any shapes, floating dtypes and devices, at least one.
        directions: As many, of the same shapes, dtypes and devices.
        home: Device of the result; default: that of the first parameter.

    Returns:
        0-dim, float64 (float32 where the device has no float64); infinite without such tensors.

    Examples:
        >>> float(reach([torch.full((3, 1), 2.0)], [torch.tensor([[0.0], [3.0], [4.0]])]))
        0.6928203105926514
    """
    home = params[0].device if home is None else home
    least = torch.full((), math.inf, dtype=_widest(home), device=home)
    matrices = [pair for pair in zip(params, directions, strict=True) if pair[0].ndim > 1]
    for p, d in _by_device_and_dtype(*zip(*matrices, strict=True)).values():
        sizes = torch._foreach_clamp_min(_norms(p), [math.sqrt(len(weight) / 3) for weight in p])
        ratios = torch.stack(torch._foreach_div(sizes, _norms(d)))
        least = torch.minimum(least, ratios.min().to(least))
    return least


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
    for (device, dtype), (p, d) in _by_device_and_dtype(params, directions).items():
        if on_host(device) and on_host(rate.device):
            # The faster kernel of the two.
            if not skip.numpy():
                torch._foreach_add_(p, d, alpha=-float(rate.detach().numpy()))
        elif dtype in _FUSED_DTYPES and device.type in _FUSED_DEVICES:
            # Takes the rate and the veto from the device, so that the host need not wait.
            torch._fused_sgd_(
                p,
                d,
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
        else:
            step, veto = rate.to(device), skip.to(device).bool()
            for param, direction in zip(p, d, strict=True):
                param.copy_(torch.where(veto, param, param - step * direction))


def adam_(
    params: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    rate: Tensor,
    skip: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """In place, a step of Adam with decoupled weight decay, or nothing at all.

    Args:
        params: Tensors to update.
        gradients: As many, of the same shapes, dtypes and devices; may be non-finite when skipped.
        exp_avgs: First moments; updated.
        exp_avg_sqs: Second moments; updated.
        steps: Steps so far, 0-dim float32; updated.
        rate: 0-dim.
        skip: 0-dim bool on the same device as ``rate``: leave every bit of everything alone.
        betas: Discounts of the moments.
        eps: Added to the root of the second moment.
        weight_decay: ``θ ← θ − rate · weight_decay · θ``.
    """
    rows = _by_device_and_dtype(params, gradients, exp_avgs, exp_avg_sqs, steps)
    for (device, _), (p, g, first, second, counts) in rows.items():
        veto = skip.to(device, torch.float32)
        torch._foreach_add_(counts, 1)
        torch._fused_adamw_(
            p,
            g,
            first,
            second,
            [],
            counts,
            amsgrad=False,
            lr=rate.to(device, torch.float64 if device.type == "cpu" else torch.float32),
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=weight_decay,
            eps=eps,
            maximize=False,
            grad_scale=None,
            found_inf=veto,
        )
        torch._foreach_sub_(counts, [veto] * len(counts))


def decay_(params: Sequence[Tensor], amount: Tensor) -> None:
    r"""In place, $\theta \leftarrow (1 - \min(a, 1))\,\theta$: decay never flips a sign."""
    keep = 1 - amount.clamp(max=1)
    for (device, dtype), (members,) in _by_device_and_dtype(params).items():
        torch._foreach_mul_(members, keep.to(device, dtype))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _norms(tensors: list[Tensor]) -> list[Tensor]:
    """Of each; tensors of one dtype. Halves are accumulated in float32."""
    half = tensors[0].dtype in (torch.float16, torch.bfloat16)
    return list(torch._foreach_norm(tensors, 2, torch.float32 if half else None))


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _by_device_and_dtype(
    *lists: Sequence[Tensor],
) -> dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], ...]]:
    keys = [(t.device, t.dtype) for t in lists[0]] if lists else []
    if keys and keys.count(keys[0]) == len(keys):  # nearly always, and at every step
        return {keys[0]: tuple(map(list, lists))}
    groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], ...]] = defaultdict(
        lambda: tuple([] for _ in lists)
    )
    for row in zip(*lists, strict=True):
        group = groups[row[0].device, row[0].dtype]
        for members, tensor in zip(group, row, strict=True):
            members.append(tensor)
    return groups
