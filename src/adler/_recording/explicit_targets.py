"""Checks of ``step(inputs=..., targets=...)``: are these the batch that made the gradient?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from adler._recording.copies import Copier
from adler._recording.links import Place
from adler._recording.records import no_broadcast
from adler._recording.replay import Call, replaying

__all__ = ["check_targets", "same_inputs"]

# Gradients of one loss are parallel; other terms may be added to it, other targets are not.
_ALIKE = 0.5


def check_targets(
    targets: tuple[Any, ...],
    criterion: Callable[..., Tensor],
    output_fn: Callable[[Any], Tensor] | None,
    result: Any,
    arrived: Sequence[tuple[Place, Tensor]],
) -> str | None:
    """Compares what reached a call's outputs with the criterion's gradient there; waits.

    Args:
        targets: What the criterion is said to have received after the outputs.
        criterion: The loss.
        output_fn: Maps what the model returned to what the criterion receives.
        result: All that the model returned, where there is an ``output_fn``.
        arrived: Tensors of it, and the gradients that reached them.

    Returns:
        What is wrong, if these are other targets; an empty string if they are the right ones; None
        if that cannot be told.
    """
    if not arrived or not all(place.intact for place, _ in arrived):
        return None
    leaves = [place.output.detach().requires_grad_() for place, _ in arrived]
    by_pointer = {place.output.data_ptr(): x for (place, _), x in zip(arrived, leaves, strict=True)}
    try:
        with torch.enable_grad(), replaying(), no_broadcast():
            outputs: Any = leaves[0]
            if output_fn is not None:
                outputs = output_fn(Copier(lambda t: by_pointer.get(t.data_ptr(), t))(result))
            value = criterion(outputs, *targets)
            found = torch.autograd.grad(value, leaves, allow_unused=True)
    except Exception:  # that they do not fit is said where they are used
        return None
    pairs = [(a, b) for a, (_, b) in zip(found, arrived, strict=True) if a is not None]
    cosine = _cosine(pairs)
    if math.isnan(cosine):
        return None
    if cosine >= _ALIKE:
        return ""
    return (
        "these are not the targets that the loss was computed from: the gradient that reached the "
        "model's outputs is not that of criterion(outputs, targets) "
        f"(cosine {cosine:.2f}). Has the loop fetched the next batch in between? "
    )


def same_inputs(call: Call, given: Any) -> bool:
    """Whether a call receives the same storage in every argument as was given before."""
    left, right = pytree.tree_leaves((call.args, dict(call.kwargs))), pytree.tree_leaves(given)
    return len(left) == len(right) and all(
        (x is y)
        or (
            isinstance(x, Tensor)
            and isinstance(y, Tensor)
            and x.data_ptr() == y.data_ptr()
            and x.shape == y.shape
            and x.stride() == y.stride()
        )
        for x, y in zip(left, right, strict=True)
    )


def _cosine(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Of two lists of tensors as vectors; NaN where one is zero or not finite. Waits."""
    pairs = [(a.double(), b.double()) for a, b in pairs]
    product = sum(float((a * b).sum()) for a, b in pairs)
    squares = [sum(float(x.square().sum()) for x in side) for side in zip(*pairs, strict=True)]
    if not squares or not all(0 < square < math.inf for square in squares):
        return math.nan
    return product / math.sqrt(math.prod(squares))
