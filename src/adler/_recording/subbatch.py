"""A part of a recorded batch, on which curvature is estimated at a fraction of the cost.

The first examples are replayed as a batch of their own: BatchNorm normalises with *their*
statistics, in train mode as before, and dropout draws masks for *their* shape from the recorded
random state. Neither is what these examples met in the training forward, so nothing of its outputs
can be reused: a finite difference runs the part twice, both times with the same masks and from its
own statistics. What is measured is the curvature of the same function on fewer examples, along the
whole batch's direction: for a loss that is a mean, an unbiased estimate of the whole batch's where
the order of the examples is random.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from adler._recording.links import Place, may_begin_with_time
from adler._recording.records import Placed, RecordedLoss
from adler._recording.replay import Call

__all__ = ["Half", "IndivisibleError", "Reduction", "first_half", "take_first"]


class IndivisibleError(ValueError):
    """Of this batch no part can be taken."""


def take_first(
    batch: list[RecordedLoss], fraction: float, reduction: Reduction
) -> list[RecordedLoss]:
    r"""The losses on the first $\lceil \mathtt{fraction} \cdot b \rceil$ examples of each call.

    At least two, which BatchNorm needs. A sum over examples (``reduction="sum"``) is weighted by
    $b$ over their number, so that it estimates the whole batch's. Outputs with more rows than the
    batch has examples (a language model's tokens, flattened) must hold each example's rows
    together.

    Args:
        batch: The losses, with whatever the model and the criterion received.
        fraction: In (0, 1]; 1: the batch itself.
        reduction: The criterion's.

    Raises:
        IndivisibleError: If a tensor that the model or the criterion received does not have the
            batch as its first dimension, or the criterion is neither a mean nor a sum.

    Examples:
        >>> import torch
        >>> model, criterion = torch.nn.Linear(3, 2), torch.nn.CrossEntropyLoss()
        >>> loss = RecordedLoss(Call.of(model, torch.randn(10, 3)), (torch.zeros(10).long(),))
        >>> (small,) = take_first([loss], 0.25, Reduction(criterion))
        >>> small.call.args[0].shape, small.targets[0].shape
        (torch.Size([3, 3]), torch.Size([3]))
    """
    if fraction == 1:
        return batch
    calls: dict[Call, tuple[Call, int, int]] = {}
    found = []
    for loss in batch:
        if loss.path is not None or any(placed.part for placed in loss.places):
            # What the loop does with the outputs is known for the whole batch only.
            found.append(loss)
            continue
        if loss.call not in calls:
            calls[loss.call] = _part_of_call(loss.call, fraction)
        call, count, size = calls[loss.call]
        if size == 0:
            found.append(loss)
            continue
        rows = _rows(loss, size)
        if (rows != size or _dimensions(loss) > 2) and may_begin_with_time(loss.call.model):
            # As in the loop's own reshaping, a part could be one of the times.
            found.append(loss)
            continue
        targets = _first(loss.targets, rows, count * rows // size, "criterion")
        factor = size / count if reduction.sums(loss) else 1.0
        options = _first(loss.options, rows, count * rows // size, "criterion")
        found.append(
            replace(
                loss,
                call=call,
                targets=targets,
                outputs=None,
                factor=factor,
                options=options,
                places=[Placed(call, _place_of(loss, call, count * rows // size))],
                whole=loss,
            )
        )
    return found


class Reduction:
    """How a criterion makes one loss of those of its examples.

    One that does not name its ``reduction`` is asked, once, on the halves of what it has received.
    Where their losses add up to the batch's, it is a sum; where the batch's lies about midway, a
    mean, be it weighted, as by how many of a half's targets count. Another function (of pairs of
    examples, or the root of a sum) is not, on fewer examples, an estimate of what it is on all.

    Args:
        criterion: The loss.
        alone: Whether this process decides. Of several, each may find something else: a criterion
            is a mean unless it is a sum, and the first batch's answer stays, for a criterion that
            waits for the other processes has to be asked by all of them.
    """

    # How far the losses of the halves may be off, relative to them: bfloat16 rounds them.
    _WITHIN = 0.02

    def __init__(self, criterion: Callable[..., Tensor], alone: bool = True) -> None:
        self._criterion, self._alone = criterion, alone
        self._known: str | None = None

    def sums(self, loss: RecordedLoss) -> bool:
        """Whether it is a sum; waits for the device once.

        Args:
            loss: On a batch.

        Raises:
            IndivisibleError: If it is neither a sum nor a mean.
        """
        named = getattr(self._criterion, "reduction", None)
        if named in ("mean", "sum"):
            return bool(named == "sum")
        if self._known is None:
            self._known = self._found(loss) or (None if self._alone else "mean")
        if self._known == "neither" and self._alone:
            raise IndivisibleError(
                "the criterion does not name its reduction and was found to be neither a mean nor "
                "a sum over examples (its loss on the batch is neither about midway between those "
                "on the two halves nor their sum), so a part of the batch does not say what the "
                'whole one does: give it reduction = "mean" if it is one, or use '
                "measure=Measure(fraction=1.0)"
            )
        return self._known == "sum"

    def _found(self, loss: RecordedLoss) -> str | None:
        """What a batch says; None: nothing."""
        outputs, value = loss.outputs, loss.value
        if outputs is None or value is None or not loss.of_one_tensor:
            return None
        rows = len(outputs) if outputs.ndim else 1
        if rows < 2 or loss.version not in (None, outputs._version):
            return None

        def on(half: slice) -> float:
            targets, options = pytree.tree_map_only(
                Tensor,
                lambda t: t[half] if t.ndim and len(t) == rows else t,
                (loss.targets, loss.options),
            )
            with loss.surroundings(), torch.no_grad():
                return float(self._criterion(outputs[half], *targets, **options))

        try:
            first, second = on(slice(rows // 2)), on(slice(rows // 2, rows))
        except Exception:  # whatever a criterion may raise on fewer examples
            return "mean"
        whole = float(value)
        size = max(abs(first), abs(second))
        if not math.isfinite(first + second + whole):
            return None
        within = self._WITHIN * size
        if min(abs(first), abs(second), abs(first + second)) <= 3 * within:
            return None  # A sum of these may be mistaken for a mean.
        if abs(first + second - whole) <= within:
            return "sum"
        # Between them, and not all the way to one: a maximum is that of one half.
        near_middle = abs(whole - (first + second) / 2) <= abs(first - second) / 4 + within
        return "mean" if near_middle else "neither"


class Half(NamedTuple):
    """The first half of a part of a batch.

    Attributes:
        loss: On it alone.
        rows: How many of the part's outputs it has.
        times: Its curvature, so many times, estimates the part's.
        scale: Times the difference of the two, squared, it estimates the variance of the part's
            curvature about the whole batch's.
    """

    loss: RecordedLoss
    rows: int
    times: float
    scale: float


def first_half(part: RecordedLoss) -> Half | None:
    r"""The first half of the examples of a loss that `take_first` has made; None: it has none.

    Of $n$ examples the part has $m$, and its first half $a$. The curvatures of $a$ and of the other
    $m - a$ are independent, so that $(c_a - c_m)^2\, a / (m - a)$ estimates the variance of $c_m$,
    of which the share $1 - m/n$ is about the whole batch's.
    """
    if part.whole is None:
        return None
    count, size = part.call.examples, part.whole.call.examples
    assert count is not None
    assert size is not None
    rows = _rows(part.whole, size) * count // size
    half = count // 2
    if half == 0 or count == size:
        return None
    try:
        targets = _first(part.targets, rows, rows * half // count, "criterion")
        options = _first(part.options, rows, rows * half // count, "criterion")
    except IndivisibleError:  # (what the criterion received has fewer rows than it should)
        return None
    return Half(
        replace(part, targets=targets, options=options),
        rows * half // count,
        count / half if part.factor != 1 else 1.0,
        math.sqrt(half / (count - half) * (1 - count / size)),
    )


def _place_of(loss: RecordedLoss, call: Call, count: int) -> Place | None:
    """The first rows of what the model returned."""
    place = loss.places[0].place if loss.places else None
    if place is None or not place.output.ndim:
        return None
    return replace(place, call=call, output=place.output[:count])


def _part_of_call(call: Call, fraction: float) -> tuple[Call, int, int]:
    """The call on some examples, their number, and that of all."""
    size = call.examples
    if size is None:
        raise IndivisibleError(
            "the model received no tensor with a batch dimension, so there is no part of the "
            "batch to take: use measure=Measure(fraction=1.0)"
        )
    count = min(size, max(2, math.ceil(fraction * size)))
    args, kwargs = _first((call.args, dict(call.kwargs)), size, count, "model")
    smaller = replace(call, args=args, kwargs=kwargs, output_gradient=None, partial=True)
    return smaller, count, size


def _rows(loss: RecordedLoss, size: int) -> int:
    """First dimension of what the criterion received: the batch, or a multiple of it."""
    if loss.outputs is not None:
        rows = len(loss.outputs) if loss.outputs.ndim else 1
    else:
        tensors = [t for t in pytree.tree_leaves(loss.targets) if isinstance(t, Tensor) and t.ndim]
        rows = len(tensors[0]) if tensors else size
    if rows % size:
        raise IndivisibleError(
            f"the criterion received {rows} rows for a batch of {size} "
            "examples, so it is not known which belong to a part of it: use "
            "measure=Measure(fraction=1.0)"
        )
    return rows


def _dimensions(loss: RecordedLoss) -> int:
    """Of what the criterion received as outputs, or what they have beside such targets."""
    if loss.outputs is not None:
        return int(loss.outputs.ndim)
    return 1 + max(
        (t.ndim for t in pytree.tree_leaves(loss.targets) if isinstance(t, Tensor)), default=0
    )


def _first(tree: Any, size: int, count: int, where: str) -> Any:
    """The first of ``size`` rows of every tensor; 0-dim tensors and other values stay."""

    def rows(tensor: Tensor) -> Tensor:
        if tensor.ndim == 0:
            return tensor
        if len(tensor) != size:
            raise IndivisibleError(
                f"the {where} received a tensor of shape "
                f"{tuple(tensor.shape)} beside {size} rows; a part of the batch needs the batch as "
                "the first dimension of every tensor: use measure=Measure(fraction=1.0)"
            )
        return tensor[:count]

    return pytree.tree_map_only(Tensor, rows, tree)
