"""A model's call as a pure function of its parameters.

Measuring curvature means running the training forward once more, without side effects: the second
run sees the same arguments, attributes, buffers, dropout masks and autocast state, and leaves all
of them, and random number generators and gradients, as they were.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adler._process_setting import ProcessSetting
from adler._recording.compiled import Compiled
from adler._recording.copies import Copier, tensors_in
from adler._recording.randomness import RandomState
from adler._recording.rounding import NotesAutocast
from adler._recording.state import CallState
from adler._unwrap import unwrap

__all__ = [
    "Call",
    "ExplainedError",
    "NotRepeatedError",
    "RandomState",
    "is_capturing",
    "is_replaying",
    "replaying",
]

_replaying: ContextVar[bool] = ContextVar("adler_replaying", default=False)


@contextlib.contextmanager
def replaying() -> Iterator[None]:
    """Marks everything inside as a replay, which no recorder of this library records."""
    token = _replaying.set(True)
    try:
        yield
    finally:
        _replaying.reset(token)


def is_replaying() -> bool:
    """Whether the caller runs inside `replaying`."""
    return _replaying.get()


def is_capturing() -> bool:
    """Whether what the caller launches goes into a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@dataclass(frozen=True)
class AutocastState:
    """Whether autocast is on for a device type, and with which dtype."""

    device_type: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def now(cls, device_type: str) -> AutocastState:
        """The current state for ``device_type``."""
        return cls(
            device_type,
            torch.is_autocast_enabled(device_type),
            torch.get_autocast_dtype(device_type),
        )

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Re-enters this state. The weight cache stays off: it would hide perturbed weights."""
        if not self.enabled and not torch.is_autocast_enabled(self.device_type):
            return contextlib.nullcontext()
        return torch.autocast(
            self.device_type, dtype=self.dtype, enabled=self.enabled, cache_enabled=False
        )


@contextlib.contextmanager
def _no_fastpath() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


# Taken only without autograd, so the training forward did not take it.
_without_attention_fastpath = ProcessSetting(_no_fastpath)


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a model, repeatable as a pure function of its parameters.

    Attributes:
        model: The module that is called.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        output_fn: Maps what the model returns to the tensor that the loss sees; ``None``: identity.
        devices: Accelerators whose random state belongs to the call.
        random_state: State of the generators when the call began; ``None``: whatever it is at
            the replay. Either way the generators are put back afterwards.
        autocast: Autocast states of the call.
        compiled: Compiles replays, where the model is compiled.
        leaves: Which of the tensors in what the model returns the loss sees, where there is no
            ``output_fn``; ``None``: the result is one tensor.
        state: What modules held when the call began; ``None``: what they hold at the replay.
        draws: Whether the call draws random numbers.
        output_gradient: Gradient that arrived at the outputs in training; None: not known.
        with_graph: Whether replays build the graph of a training pass, which a forward pass may
            need that differentiates or has hooks.
        partial: Whether the arguments are a part of the batch.
        fed: Whether the arguments depend on the trained parameters, which a replay does not see.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
        >>> call = Call.of(model, torch.randn(5, 3))
        >>> outputs = call(dict(model.named_parameters()))
        >>> outputs.shape, int(model[1].num_batches_tracked)
        (torch.Size([5, 2]), 0)
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    output_fn: Callable[[Any], Tensor] | None = None
    devices: tuple[torch.device, ...] = ()
    random_state: RandomState | None = None
    autocast: tuple[AutocastState, ...] = ()
    compiled: Compiled | None = None
    leaves: tuple[int, ...] | None = None
    state: CallState | None = None
    draws: bool = True
    output_gradient: Tensor | None = None
    with_graph: bool = False
    partial: bool = False
    fed: bool = False

    @classmethod
    def of(
        cls,
        model: nn.Module,
        inputs: Any,
        output_fn: Callable[[Any], Tensor] | None = None,
    ) -> Call:
        """A call made by hand, under the autocast state of now.

        Args:
            model: The module to call.
            inputs: One argument, a tuple of positional arguments, or a mapping of keyword ones.
            output_fn: See the class.
        """
        args: tuple[Any, ...] = ()
        kwargs: Mapping[str, Any] = {}
        if isinstance(inputs, Mapping):
            kwargs = dict(inputs)
        else:
            args = inputs if isinstance(inputs, tuple) else (inputs,)
        devices = accelerators(model)
        return cls(
            unwrap(model), args, kwargs, output_fn, devices, autocast=autocast_states(devices)
        )

    @property
    def examples(self) -> int | None:
        """How many: the first dimension of the first tensor that has one; None: there is none."""
        given = pytree.tree_leaves((self.args, dict(self.kwargs)))
        return next((len(t) for t in given if isinstance(t, Tensor) and t.ndim), None)

    def __call__(self, params: Mapping[str, Tensor]) -> Tensor:
        """The outputs with ``params`` (by name) in place of the model's own.

        A `Lazy` mapping is asked for each parameter when the forward pass needs it.

        Raises:
            TypeError: If the result is not one tensor.
        """
        with self.surroundings() as state, state.installed(params):
            args, kwargs = self.arguments()
            with NotesAutocast(self.model, ("cpu", *(d.type for d in self.devices))):
                result = self.model(*args, **kwargs)
            return self.picked(result)

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments that the model may write to."""

        def fresh(tensor: Tensor) -> Tensor:
            made = tensor.detach().clone()
            return made.requires_grad_() if self.with_graph and tensor.requires_grad else made

        made: tuple[tuple[Any, ...], dict[str, Any]] = Copier(fresh)((self.args, dict(self.kwargs)))
        return made

    def picked(self, result: Any) -> Tensor:
        """What the loss sees of what the model returns: several tensors as one flat one.

        Raises:
            TypeError: If that is not one tensor.
        """
        if self.output_fn is not None:
            result = self.output_fn(result)
        elif self.leaves is not None and not (isinstance(result, Tensor) and self.leaves == (0,)):
            tensors = tensors_in(result)
            if max(self.leaves) >= len(tensors):
                raise NotRepeatedError(
                    f"the model returned {len(tensors)} tensors, not as many as in training"
                )
            chosen = [tensors[leaf] for leaf in self.leaves]
            if len(chosen) == 1:
                return chosen[0]
            dtype = functools.reduce(torch.promote_types, (t.dtype for t in chosen))
            return torch.cat([t.reshape(-1).to(dtype) for t in chosen])
        if not isinstance(result, Tensor):
            raise NotATensorError(not_a_tensor(result, self.output_fn is not None))
        return result

    @contextlib.contextmanager
    def surroundings(self) -> Iterator[CallState]:
        """Random state and autocast of the call; afterwards the generators are put back.

        Yields:
            The state of the modules, recorded with the call or of now.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(replaying())
            stack.enter_context(_without_attention_fastpath.wanted())
            if self.draws:
                stack.callback(put_back, RandomState.now(self.devices), self.devices)
                if self.random_state is not None:
                    self.random_state.set()
            for state in self.autocast:
                stack.enter_context(state.context())
            yield CallState((self.model,)) if self.state is None else self.state


class ExplainedError(Exception):
    """Of an error whose message says what to do; no other way of measuring is tried."""


class NotATensorError(ExplainedError, TypeError):
    """The model, or ``output_fn``, did not return one tensor."""


class NotRepeatedError(RuntimeError):
    """The replay made other calls than the training pass."""


def put_back(before: RandomState, devices: tuple[torch.device, ...]) -> None:
    """Undoes what was drawn since."""
    if not RandomState.now(devices).same(before):
        before.set()


def accelerators(model: nn.Module) -> tuple[torch.device, ...]:
    """Devices other than the CPU that hold parameters of ``model``."""
    found = {p.device for p in model.parameters()}
    return tuple(sorted((d for d in found if d.type not in ("cpu", "meta")), key=str))


def autocast_states(devices: tuple[torch.device, ...]) -> tuple[AutocastState, ...]:
    """Autocast states of now for the CPU and for ``devices``."""
    types = dict.fromkeys(["cpu", *(d.type for d in devices)])
    return tuple(AutocastState.now(t) for t in types)


def not_a_tensor(result: object, has_output_fn: bool) -> str:
    """What to tell a user whose model, or ``output_fn``, did not return one tensor."""
    kind = type(result).__name__
    if has_output_fn:
        return f"output_fn returned {kind}, not the one tensor that the criterion receives"
    return (
        f"the model returned {kind}, not a tensor: pass output_fn= to pick the tensor that the "
        "criterion receives, such as output_fn=lambda out: out['logits']"
    )
