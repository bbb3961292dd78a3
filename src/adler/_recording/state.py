"""What a call reads and may write beside its arguments: recorded when it begins, for replays.

A replay sees parameters and buffers, attributes of modules and of what these hold (lists, caches,
counters, hidden states, queues, generators), and the modes of modules as they were when the call of
the training loop began. It works on copies: whatever it writes goes with them, and afterwards every
attribute is again the object that it was, with the contents that it had.

Tensors that could be written are copied when the call begins, up to a budget; parameters and what
is beyond the budget are watched by their version counters instead, and are copied from then on if
a forward pass writes to them.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adler._distributed import is_sharded
from adler._recording.copies import Copier, attributes, put_back
from adler._recording.lazy_parameters import Lazy, OnAccess
from adler._recording.randomness import restore, state_of

__all__ = ["CallState", "Watched"]

# Copies of one call's tensors take no more than this.
_BUDGET = 1 << 28
_STATISTICS = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
)  # fmt: skip


class Watched:
    """What the calls of one model have been seen to write to.

    The first calls are watched closely, and then one now and then: a loop may begin late to move
    what it moves past the versions (an encoder that follows another after a warm-up).

    Attributes:
        calls: How many there were.
        moving: Parameters that are written to between a call and its replay, by `id`.
    """

    _CLOSELY = 3
    _EVERY = 64

    def __init__(self) -> None:
        self.calls = 0
        self.moving: set[int] = set()
        self._until = self._CLOSELY

    def again(self) -> None:
        """Watches the next calls closely too: a replay has not repeated the training pass."""
        self._until = self.calls + self._CLOSELY

    @property
    def closely(self) -> bool:
        """Whether parameters that do not change their versions are compared too in this call."""
        return self._is_watched(self.calls)

    @property
    def replayed_closely(self) -> bool:
        """Whether they were compared in the last call, which is replayed now."""
        return self._is_watched(self.calls - 1)

    def _is_watched(self, call: int) -> bool:
        return call < self._until or call % self._EVERY == 0


class _Seen(NamedTuple):
    """A tensor when the call began."""

    tensor: Tensor
    version: int
    pointer: int
    copy: Tensor | None
    role: str  # "trained", "parameter", "buffer", "statistics"

    def changed(self) -> bool:
        return self.tensor._version != self.version or _pointer(self.tensor) != self.pointer


class CallState:
    """The state of modules when a call begins.

    Args:
        roots: The modules that are called.
        trained: Parameters, by `id`, that the replay gets from elsewhere.
        watched: What earlier calls have written to.
    """

    def __init__(
        self,
        roots: Sequence[nn.Module],
        trained: Collection[int] = (),
        watched: Watched | None = None,
    ) -> None:
        self._watched = watched
        self._trained = trained
        self._spent = 0
        self._seen: dict[int, _Seen] = {}
        self._names: dict[str, int] = {}
        self._modules: dict[nn.Module, tuple[dict[str, Any], dict[str, Any]]] = {}
        self._holders: dict[int, tuple[Any, dict[str, Any]]] = {}
        self._generators: list[tuple[Any, Any]] = []
        self._queue: list[Any] = []
        self._moving: frozenset[int] = frozenset()
        self._checked = False
        self._copied = Copier(self._copy, self._visit)
        for root in roots:
            for name, module in root.named_modules():
                self._add_module(module, f"{name}." if name else "", root is roots[0])
        for module in list(self._modules):  # whose attributes may be tensors of any of them
            self._add_attributes(module)
        while self._queue:
            self._add_holder(self._queue.pop())

    # --- when the call begins --------------------------------------------------------------------

    def _add_module(self, module: nn.Module, prefix: str, named: bool) -> None:
        if module in self._modules:
            return
        if isinstance(module, torch.jit.ScriptModule):
            self._add_scripted(module, prefix, named)
            return
        params, buffers = module._parameters, module._buffers
        self._modules[module] = (dict(params), dict(buffers))
        for name, p in params.items():
            if p is not None and id(p) not in self._seen:
                self._see_parameter(p)
                if named:
                    self._names[prefix + name] = id(p)
        running = isinstance(module, _STATISTICS) and module.training
        for buffer in buffers.values():
            if buffer is not None and id(buffer) not in self._seen:
                if running and type(module) in _STATISTICS:
                    self._see(buffer, None, "statistics")  # written, never read, in training
                else:
                    self._see(buffer, self._within_budget(buffer), "buffer")

    def _add_attributes(self, module: nn.Module) -> None:
        if isinstance(module, torch.jit.ScriptModule):
            return
        self._add_holder(module)
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for hook in hooks.values():
                self._add_function(hook)

    def _add_scripted(self, module: nn.Module, prefix: str, named: bool) -> None:
        self._modules[module] = (dict(module._parameters.items()), dict(module._buffers.items()))
        for name, p in module._parameters.items():
            assert p is not None
            self._see_parameter(p)
            if named:
                self._names[prefix + name] = id(p)
        for buffer in module._buffers.values():
            assert buffer is not None
            self._see(buffer, self._within_budget(buffer), "buffer")

    def _add_function(self, function: Any) -> None:
        """What a user's hook writes to: what it closes over, or the object whose method it is."""
        if str(getattr(function, "__module__", "")).partition(".")[0] == "adler":
            return  # this library's own hooks, which are there to learn of the replay
        if isinstance(function, types.MethodType):
            self._copied(function.__self__)
        elif isinstance(function, types.FunctionType):
            if id(function) not in self._holders:
                self._add_holder(function)
        else:
            self._copied(function)

    def _add_holder(self, owner: Any) -> None:
        if isinstance(owner, nn.Module) and owner not in self._modules:
            hidden = list(owner.modules())  # from its owner, in a list or tuple
            for module in hidden:
                self._add_module(module, "", named=False)
            for module in hidden:
                self._add_attributes(module)
            return
        if id(owner) in self._holders:
            return
        generator = state_of(owner)
        if generator is not None:
            self._generators.append((owner, generator))
            return
        self._holders[id(owner)] = owner, {}
        copied = {name: self._attribute(value) for name, value in attributes(owner).items()}
        self._holders[id(owner)] = owner, copied

    def _attribute(self, value: Any) -> Any:
        if state_of(value) is not None:
            self._add_holder(value)
            return value
        if isinstance(value, types.FunctionType) and value.__closure__:
            self._add_function(value)
            return value
        return self._copied(value)

    def _visit(self, value: Any) -> None:
        self._queue.append(value)

    def _copy(self, tensor: Tensor) -> Any:
        """Parameters and buffers stand for themselves; they are replaced by what they are then."""
        if id(tensor) in self._seen:
            return tensor
        made = self._within_budget(tensor)
        return tensor if made is None else made

    def _see(self, tensor: Tensor, made: Tensor | None, role: str) -> None:
        self._seen[id(tensor)] = _Seen(tensor, tensor._version, _pointer(tensor), made, role)

    def _see_parameter(self, p: Tensor) -> None:
        role = "trained" if id(p) in self._trained else "parameter"
        made = None
        watched = self._watched
        if watched is not None and not is_sharded(p):
            twin = watched.closely and self._spent + p.numel() * p.element_size() <= _BUDGET
            if twin or id(p) in watched.moving:
                made = self._within_budget(p, always=id(p) in watched.moving)
        self._see(p, made, role)

    def _within_budget(self, tensor: Tensor, always: bool = False) -> Tensor | None:
        size = tensor.numel() * tensor.element_size()
        if not always and self._spent + size > _BUDGET:
            return None
        self._spent += size
        with torch.no_grad():
            return tensor.detach().clone()

    # --- when the call ends ----------------------------------------------------------------------

    def seal(self) -> None:
        """Looks what the call has written to."""
        moving: set[int] = set() if self._watched is None else self._watched.moving
        for key, seen in self._seen.items():
            if seen.changed():
                if seen.role in ("trained", "parameter"):
                    moving.add(key)
            elif (
                self._watched is not None
                and self._watched.closely
                and seen.role in ("trained", "parameter")
                and seen.copy is not None
                and not _same_bits(seen.copy, seen.tensor)
            ):
                moving.add(key)
        if self._watched is not None:
            self._watched.calls += 1
        self._moving = frozenset(moving)

    # --- for a replay ----------------------------------------------------------------------------

    @contextlib.contextmanager
    def installed(self, params: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, modules are in the state of when the call began, with other parameters.

        Args:
            params: By the names of the first root's ``named_parameters()``. A `Lazy` mapping is
                asked for each when the forward pass wants it.
        """
        by_id = {self._names[name]: name for name in params if name in self._names}
        lazy = isinstance(params, Lazy)
        ready: dict[int, Tensor] = {}

        def replaced(tensor: Tensor) -> Any:
            key = id(tensor)
            if lazy and key in by_id:
                return params[by_id[key]]
            if key not in ready:
                ready[key] = (
                    self._given(params[by_id[key]], key)
                    if key in by_id
                    else (self._fresh(tensor, alone=not params))
                )
            return ready[key]

        thawed = Copier(replaced, _ignore)
        undo: list[Callable[[], None]] = []
        self._look_for_moves()
        backup = self._backup(by_id)
        try:
            for module, (own, buffers) in self._modules.items():
                if isinstance(module, torch.jit.ScriptModule):
                    _put_scripted(module, own, buffers, replaced, undo)
                    continue
                names = {
                    k: by_id[id(p)] for k, p in own.items() if p is not None and id(p) in by_id
                }
                _put_tensors(module, own, buffers, names if lazy else {}, params, replaced, undo)
            for owner, values in self._holders.values():
                now = attributes(owner)
                wanted = {name: thawed(value) for name, value in values.items()}
                changed = {n: v for n, v in wanted.items() if n not in now or now[n] is not v}
                undo.append(_Undo(owner, now))
                if changed or len(now) != len(wanted):
                    put_back(owner, wanted)
            for generator, state in self._generators:
                undo.append(_UndoGenerator(generator, state_of(generator)))
                restore(generator, state)
            yield
        finally:
            for one in reversed(undo):
                one()
            if backup is not None:
                self._undo_writes(*backup)

    def _look_for_moves(self) -> None:
        """Parameters that somebody else has moved since, such as another optimizer of the model.

        They are copied when a call begins from now on.
        """
        if self._watched is not None:
            others = ((k, seen) for k, seen in self._seen.items() if seen.role == "parameter")
            self._watched.moving.update(key for key, seen in others if seen.changed())

    def not_repeated(self) -> None:
        """The replay has made other outputs: the next calls are watched closely."""
        if self._watched is not None:
            self._watched.again()

    def _given(self, p: Tensor, key: int) -> Tensor:
        """A parameter of the replay's own; a copy where the forward pass writes to it.

        There it begins where the training pass did, and as far from it as it is given.
        """
        if key not in self._moving:
            return p
        seen = self._seen[key]
        return p.clone() if seen.copy is None else p + (seen.copy - seen.tensor.detach())

    def _backup(self, given: Collection[int]) -> tuple[list[Tensor], list[Tensor]] | None:
        """Copies of the parameters that a replay is given, while calls are watched closely."""
        watched = self._watched
        if watched is None or not watched.replayed_closely or self._checked:
            return None
        own = [
            s.tensor.detach() for k, s in self._seen.items() if k in given and k not in self._moving
        ]
        own = [p for p in own if not is_sharded(p)]
        if not own:
            return None
        with torch.no_grad():
            return own, list(torch._foreach_mul(own, 1.0))

    def _undo_writes(self, own: list[Tensor], before: list[Tensor]) -> None:
        """Where a replay has written to parameters past their versions; waits for the device."""
        with torch.no_grad():
            changes = torch._foreach_norm(torch._foreach_sub(own, before))
            self._checked = True
            changed = (torch.stack([c.to(changes[0]) for c in changes]) > 0).cpu().numpy()
            if not changed.any():
                return
            torch._foreach_copy_(own, before)
        pointers = {p.data_ptr() for p, c in zip(own, changed, strict=True) if c}
        writes = {k for k, s in self._seen.items() if _pointer(s.tensor) in pointers}
        self._moving |= writes
        assert self._watched is not None
        self._watched.moving |= writes

    def _fresh(self, tensor: Tensor, alone: bool) -> Tensor:
        """What a replay sees in the place of a tensor that it is not given, and may write to."""
        seen = self._seen.get(id(tensor))
        if seen is None:  # an attribute's, copied already
            return tensor.detach().clone()
        value = seen.tensor if seen.copy is None else seen.copy
        if (
            seen.role in ("buffer", "statistics")
            or id(tensor) in self._moving
            or seen.copy is not None
        ):
            return value.detach().clone()
        return tensor if alone or not tensor.requires_grad else tensor.detach()


class _Undo:
    """Puts the attributes of an object back."""

    def __init__(self, owner: Any, values: dict[str, Any]) -> None:
        self._owner, self._values = owner, values

    def __call__(self) -> None:
        put_back(self._owner, self._values)


class _UndoItem:
    def __init__(self, held: dict[str, Any], key: str, value: Any) -> None:
        self._held, self._key, self._value = held, key, value

    def __call__(self) -> None:
        self._held[self._key] = self._value


class _UndoGenerator:
    def __init__(self, generator: Any, state: Any) -> None:
        self._generator, self._state = generator, state

    def __call__(self) -> None:
        restore(self._generator, self._state)


def _put_tensors(
    module: nn.Module,
    own: dict[str, Any],
    buffers: dict[str, Any],
    elsewhere: Mapping[str, str],
    params: Mapping[str, Tensor],
    replaced: Callable[[Tensor], Any],
    undo: list[Callable[[], None]],
) -> None:
    """Parameters and buffers; those ``elsewhere`` are made when they are asked for."""
    fresh = {k: p if p is None or k in elsewhere else replaced(p) for k, p in own.items()}
    held = module.__dict__
    now = held["_parameters"]
    if elsewhere or len(fresh) != len(now) or any(fresh[k] is not now.get(k) for k in fresh):
        undo.append(_UndoItem(held, "_parameters", now))
        held["_parameters"] = fresh
        if elsewhere:
            assert isinstance(params, Lazy)
            held["_parameters"] = OnAccess(fresh, elsewhere, params)
    if buffers or held["_buffers"]:
        undo.append(_UndoItem(held, "_buffers", held["_buffers"]))
        held["_buffers"] = {k: b if b is None else replaced(b) for k, b in buffers.items()}


def _put_scripted(
    module: Any,
    own: dict[str, Any],
    buffers: dict[str, Any],
    replaced: Callable[[Tensor], Any],
    undo: list[Callable[[], None]],
) -> None:
    """A scripted module keeps its tensors in C++: set one by one."""
    for name, tensor in {**own, **buffers}.items():
        now = getattr(module, name)
        new = replaced(tensor)
        if new is not now:
            undo.append(lambda name=name, now=now: module._c.setattr(name, now))  # type: ignore[misc]
            module._c.setattr(name, new)


def _ignore(value: Any) -> None:
    """Objects that hold state are in the list already."""


def _pointer(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except (RuntimeError, NotImplementedError):  # of a kind without memory of its own
        return 0


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Waits for the device."""
    try:
        return a.shape == b.shape and bool(torch.equal(a, b))
    except (RuntimeError, NotImplementedError):
        return True
