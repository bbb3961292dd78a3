"""Calls of the criterion: what it received, and how the loop made that of what a model returned.

Before the call, arguments, generators and the state of the criterion are recorded, by value where
they may change; after it, the loss.
"""

from __future__ import annotations

import inspect
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adler._recording.copies import Copier, copy_of, tensors_in
from adler._recording.links import Path, Place, Source, flattened, same, sources
from adler._recording.randomness import RandomState
from adler._recording.records import WHOLE, Placed, RecordedLoss
from adler._recording.replay import Call
from adler._recording.state import CallState, Watched

__all__ = ["CriterionCalls", "Refused"]


@dataclass
class _Received:
    """What is known when a call of the criterion begins."""

    arguments: tuple[Any, ...]
    options: dict[str, Any]
    state: CallState | None
    origins: list[Source]
    path: Path | None
    differentiable: tuple[int, ...]
    random_state: RandomState
    whole: Source | None  # the first argument, where output_fn makes it of the result
    refused: str | None = None


@dataclass(frozen=True)
class Refused:
    """A loss that cannot be replayed, and why."""

    reason: str


class CriterionCalls:
    """The calls of one criterion.

    Args:
        criterion: The loss.
        output_fn: Maps what the model returns to what the criterion receives.
        params: Those whose gradients the records explain.
        devices: Accelerators whose generators to record.
        key: Of the marks on what the model returned; see `adler._recording.links`.
        watched: Whether to look closely.
    """

    def __init__(
        self,
        criterion: Callable[..., Tensor],
        output_fn: Callable[[Any], Tensor] | None,
        params: Callable[[], Iterable[Tensor]],
        devices: tuple[torch.device, ...],
        key: object,
        watched: Watched,
    ) -> None:
        self._criterion, self._output_fn, self._params = criterion, output_fn, params
        self._devices, self._key, self._watched = devices, key, watched
        # Of the n-th loss of a step: whether output_fn makes what the criterion receives.
        self._whole: dict[int, bool] = {}
        self._wholes: weakref.WeakKeyDictionary[Call, dict[Any, Call]] = weakref.WeakKeyDictionary()
        # Calls that have begun, innermost last, of each thread: they may share a criterion.
        self._received: dict[int, list[_Received | None]] = defaultdict(list)

    def clear(self) -> None:
        """Forgets the calls that have begun."""
        self._received.clear()

    def skip(self) -> None:
        """A call begins that is not recorded."""
        self._received[get_ident()].append(None)

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any], nth: int) -> None:
        """A call begins.

        Args:
            args: What the criterion receives.
            kwargs: The same, by keyword.
            nth: How many losses there were in this step.
        """
        arguments, options = _bind(self._criterion, args, kwargs)
        values, shape = pytree.tree_flatten(arguments)
        tensors = [(i, t) for i, t in enumerate(values) if _differentiable(t)]
        origins, past = sources([t for _, t in tensors], self._key, {id(p) for p in self._params()})
        way, whole, refused = None, None, None
        if not tensors and (closed := self._closed(values)):
            refused, origins = _CLOSED.format(closed[0]), closed[1]
        elif named := self._depending(options):
            origins, refused = origins or named[1], _BY_KEYWORD.format(named[0])
        elif past:
            refused = _PAST if origins else _ELSEWHERE.format(_shapes(values))
        elif origins:
            try:
                way, whole = self._way(origins, tensors, arguments, nth)
            except (RuntimeError, NotImplementedError) as error:
                refused = _NOT_TWICE.format(error)
        module = self._criterion
        copied = Copier(copy_of)
        for i, t in tensors:
            if way is None:  # the graph keeps it, and its version says whether it was written to
                values[i] = t.detach()
        self._received[get_ident()].append(
            _Received(
                pytree.tree_unflatten(
                    [
                        v if way is None and _is_at(i, tensors) else copied(v)
                        for i, v in enumerate(values)
                    ],
                    shape,
                ),
                copied(options),
                CallState((module,)) if isinstance(module, nn.Module) else None,
                origins,
                way,
                tuple(i for i, _ in tensors),
                RandomState.now(self._devices),
                whole,
                refused,
            )
        )

    def _closed(self, values: list[Any]) -> tuple[str, list[Source]] | None:
        """The first object that holds what a model returned, and that PyTorch cannot look into."""
        for value in values:
            if isinstance(value, Tensor):
                continue
            held = [t for t in tensors_in(value) if _differentiable(t)]
            found, _ = sources(held, self._key, {id(p) for p in self._params()})
            if found:
                return type(value).__name__, found
        return None

    def _depending(self, options: dict[str, Any]) -> tuple[str, list[Source]] | None:
        """The first option that depends on the parameters, and where it comes from."""
        for name, value in options.items():
            tensors = [t for t in pytree.tree_leaves(value) if _differentiable(t)]
            found, past = sources(tensors, self._key, {id(p) for p in self._params()})
            if found or past:
                return name, found
        return None

    def _way(
        self,
        origins: list[Source],
        tensors: list[tuple[int, Tensor]],
        arguments: tuple[Any, ...],
        nth: int,
    ) -> tuple[Path | None, Source | None]:
        """How the loop made the criterion's arguments; the first, where ``output_fn`` makes it."""
        received = [t for _, t in tensors]
        direct = len(received) == 1 and len(origins) == 1 and received[0] is arguments[0]
        if direct and same(origins[0], received[0]):
            return None, None
        made_by: Callable[[Any], Tensor] | None = None
        if direct and self._output_fn is None:
            made_by = flattened(origins[0], received[0])
        elif direct and self._is_whole(origins[0], received[0], nth):
            made_by = self._output_fn
        if made_by is None:
            return Path(origins, received), None
        x, call = received[0], origins[0].place.call
        calls = self._wholes.setdefault(call, {})
        if made_by not in calls:
            calls[made_by] = replace(call, output_fn=made_by)
        place = Place(calls[made_by], WHOLE, x.detach(), x._version)
        return None, Source(place, x.grad_fn, x.output_nr)

    def _is_whole(self, origin: Source, received: Tensor, nth: int) -> bool:
        """Whether ``output_fn`` makes of the model's result what the criterion received."""
        assert self._output_fn is not None
        with torch.no_grad():
            try:
                made = self._output_fn(origin.place.result)
            except Exception:  # the loop does otherwise
                return False
        if not isinstance(made, Tensor) or made.shape != received.shape:
            return False
        known = self._whole.get(nth)
        if made.device.type == "cpu" or known is None or self._watched.closely:
            known = self._whole[nth] = _equal(made, received.detach())
        return known

    def leave(self, value: Any) -> tuple[RecordedLoss, Source | None] | Refused | None:
        """A call has returned.

        Args:
            value: What the criterion returned.

        Returns:
            The loss, and where in the graph it received what the model, or ``output_fn``, returned;
            None for that where the loop has made it of several tensors. Or why there is no loss
            that can be replayed. Or None: the loss is another network's, or not differentiated.
        """
        begun = self._received[get_ident()]
        received = begun.pop() if begun else None
        if received is None or not isinstance(value, Tensor) or not value.requires_grad:
            return None
        if received.refused is None and not received.origins:
            return None  # another network's
        if value.ndim != 0:
            return Refused(
                f"the criterion returned shape {tuple(value.shape)}, not a scalar: use "
                "reduction='mean' or 'sum'"
            )
        if received.refused is not None:
            return Refused(received.refused)
        outputs, *targets = received.arguments
        origins = received.origins if received.whole is None else [received.whole]
        places = [Placed(source.place.call, source.place) for source in origins]
        loss = RecordedLoss(
            places[0].call,
            tuple(targets),
            outputs,
            value.detach().clone(),  # a loop may scale the loss in place
            options=received.options,
            places=places,
            path=received.path,
            differentiable=received.differentiable,
            state=received.state,
            random_state=received.random_state,
            version=outputs._version if isinstance(outputs, Tensor) else None,
        )
        return loss, origins[0] if received.path is None else None


_ELSEWHERE = (
    "the criterion received tensors of shapes {} that depend on the parameters, but were not made "
    "of what a recorded call of the model returned, or that was changed in place as a view of "
    "another tensor. Call the model itself (model(inputs), not a method of it or a submodule), "
    "write x = x / 2 for x /= 2, or pass step(inputs=..., targets=...)"
)
_PAST = (
    "what the criterion received depends on the parameters not only through what the model "
    "returned (a penalty on the weights, or an output that was changed in place as a view of "
    "another tensor): compute it inside the model, or from what the model returns"
)
_BY_KEYWORD = (
    "the criterion received {}= by keyword only, and it depends on the parameters, which would be "
    "missing from the curvature: give it a positional parameter of its own in the criterion's "
    "forward(self, outputs, targets, ...)"
)
_CLOSED = (
    "the criterion received {0}, an object that PyTorch does not know how to take apart: give it "
    "the tensors (criterion(out.logits, ...)), a dict, a tuple or a NamedTuple, or call "
    "torch.export.register_dataclass({0}) once, if it is a dataclass"
)
_NOT_TWICE = (
    "an operation between the model and the criterion cannot be differentiated twice ({}): do it "
    "inside the model, or give output_fn="
)


def _bind(
    criterion: Callable[..., Tensor], args: Any, kwargs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The criterion's arguments in the order of its signature, and those by keyword only."""
    if not kwargs:
        return tuple(args), {}
    forward = criterion.forward if isinstance(criterion, nn.Module) else criterion
    bound = inspect.signature(forward).bind(*args, **kwargs)
    return bound.args, bound.kwargs


def _differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _is_at(index: int, tensors: list[tuple[int, Tensor]]) -> bool:
    return any(i == index for i, _ in tensors)


def _shapes(values: list[Any]) -> str:
    shapes = [str(tuple(v.shape)) for v in values if _differentiable(v)]
    return ", ".join(shapes)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaN included; waits for the device unless they are one tensor."""
    if a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
        return True
    return a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())
