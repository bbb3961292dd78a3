"""A model's call as a pure function of its parameters.

Measuring curvature means running the training forward once more. Nobody else may notice: the second
run sees the same dropout masks and the same autocast state, and leaves buffers, random number
generators and gradients as they were.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adler import _distributed as distributed
from adler._recording.compiled import Compiled, outputs
from adler._recording.lazy_parameters import Lazy, on_access

__all__ = ["Call", "RandomState", "is_capturing", "is_replaying", "replaying", "unwrap"]

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


def unwrap(model: nn.Module) -> nn.Module:
    """The module beneath ``torch.compile`` and `DistributedDataParallel`, in any order.

    Compiled code has no forward-mode derivative, and the wrapper's forward talks to other ranks.
    """
    while True:
        inner = getattr(model, "_orig_mod", model)
        if distributed.find(model) is not None:
            inner = inner.module
        if inner is model or not isinstance(inner, nn.Module):
            return model
        model = inner


@dataclass(frozen=True)
class RandomState:
    """States of the CPU generator and of the default generators of some accelerators."""

    cpu: Tensor
    accelerators: tuple[tuple[torch.device, Tensor], ...] = ()

    @classmethod
    def now(cls, devices: tuple[torch.device, ...] = ()) -> RandomState:
        """The current states; ``devices`` lists the accelerators to include."""
        states = tuple((d, torch.get_device_module(d).get_rng_state(d)) for d in devices)
        return cls(torch.get_rng_state(), states)

    def set(self) -> None:
        """Puts the generators into these states."""
        torch.set_rng_state(self.cpu)
        for device, state in self.accelerators:
            torch.get_device_module(device).set_rng_state(state, device)


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
def _without_attention_fastpath() -> Iterator[None]:
    # Taken only without autograd, so the training forward did not take it.
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


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

    def __call__(self, params: Mapping[str, Tensor]) -> Tensor:
        """The outputs with ``params`` (by name) in place of the model's own.

        A `Lazy` mapping is asked for each parameter when the forward pass needs it.

        Raises:
            TypeError: If the result is not one tensor.
        """
        with self.surroundings() as stack:
            lazy = isinstance(params, Lazy)
            if isinstance(params, Lazy):
                stack.enter_context(on_access(self.model, params))
            found = outputs(
                self.model,
                {} if lazy else params,
                dict(self.model.named_buffers()),
                self.args,
                dict(self.kwargs),
                self.output_fn,
                # Looking for tied tensors would ask for all parameters at once.
                tie_weights=not lazy,
            )
        if not isinstance(found, Tensor):
            raise TypeError(not_a_tensor(found, self.output_fn is not None))
        return found

    @contextlib.contextmanager
    def surroundings(self) -> Iterator[contextlib.ExitStack]:
        """Random state and autocast of the call; afterwards the generators are put back."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(replaying())
            stack.enter_context(_without_attention_fastpath())
            stack.callback(RandomState.now(self.devices).set)
            if self.random_state is not None:
                self.random_state.set()
            for state in self.autocast:
                stack.enter_context(state.context())
            yield stack


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
