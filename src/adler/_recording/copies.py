"""Copies of what a forward pass may write to: tensors, containers, arrays; and who holds them.

Unlike `copy.deepcopy`, other objects keep their identity. Those that can hold state are *visited*
instead: their attributes are copied, and put in the place of the present ones for a replay.
"""

from __future__ import annotations

import collections
import copy
import itertools
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from adler._recording.randomness import copied_generator, state_of

__all__ = ["Copier", "attributes", "copy_of", "put_back", "put_in", "tensors_in"]

_ATOMS = frozenset(
    (
        bool, int, float, complex, str, bytes, type(None), type(Ellipsis), type, range, slice,
        types.ModuleType, types.BuiltinFunctionType, torch.dtype, torch.device, torch.Size,
        torch.memory_format, torch.layout,
    )
)  # fmt: skip
# Of their kinds alone a copy goes on by itself: a zip's would draw from the same iterators.
_ITERATORS = frozenset(map(type, (iter([]), iter(()), iter(range(0)), itertools.count())))
# What `nn.Module` itself keeps in an instance, beside the mode. Parameters and buffers are
# replaced by name, not here.
_INTERNAL = frozenset(vars(nn.Module())) - {"training"}
# Objects of these packages are machinery, not the state of a forward pass.
_FOREIGN = frozenset(sys.stdlib_module_names) | {"adler", "numpy", "torch"}
_MACHINERY = _FOREIGN | {"accelerate", "lightning", "pytorch_lightning", "transformers"}


class Copier:
    """Copies values; what is the same object in two places stays so.

    Args:
        tensor: Makes the copy of a tensor.
        visit: Told of every object that may hold state of its own, which is not copied; None:
            such objects are copied too, attribute by attribute.
    """

    def __init__(
        self, tensor: Callable[[Tensor], Any], visit: Callable[[Any], None] | None = None
    ) -> None:
        self._tensor, self._visit = tensor, visit
        self._made: dict[int, Any] = {}
        self._kept: list[Any] = []  # so that no other object gets the identity of one seen

    def __call__(self, value: Any) -> Any:
        """The copy, or the value itself where there is nothing to copy."""
        kind = type(value)
        if kind in _ATOMS:
            return value
        if id(value) in self._made:
            return self._made[id(value)]
        self._kept.append(value)
        if isinstance(value, Tensor):
            made = self._tensor(value)
        elif isinstance(value, tuple):
            parts = [self(part) for part in value]
            same = all(a is b for a, b in zip(parts, value, strict=True))
            made = value if same else _tuple_like(value, parts)
        elif isinstance(value, (list, dict, set, collections.deque, bytearray)):
            return self._container(value)
        elif _is_array(value):
            made = value.copy()
        elif kind in _ITERATORS:
            made = _copied_iterator(value)
        elif self._visit is None and state_of(value) is not None:
            made = copied_generator(value)
        elif _holds_state(value, _FOREIGN if self._visit is None else _MACHINERY):
            return self._object(value)
        else:
            made = value
        self._made[id(value)] = made
        return made

    def _container(self, value: Any) -> Any:
        try:
            made = self._made[id(value)] = copy.copy(value)
        except Exception:  # of a kind that does not let itself be copied
            self._made[id(value)] = value
            return value
        if isinstance(value, dict):
            for key, part in dict.items(value):
                dict.__setitem__(made, key, self(part))
        elif isinstance(value, (list, collections.deque)):
            for place, part in enumerate(value):
                made[place] = self(part)
        return made

    def _object(self, value: Any) -> Any:
        self._made[id(value)] = value
        if self._visit is not None:
            self._visit(value)
            return value
        if isinstance(value, (nn.Module, types.FunctionType, types.MethodType)):
            return value
        try:
            made = self._made[id(value)] = copy.copy(value)
            put_in(made, {name: self(part) for name, part in attributes(value).items()})
        except Exception:
            self._made[id(value)] = made = value
        return made


def attributes(owner: Any) -> dict[str, Any]:
    """What an object holds, by name: of a function, what it closes over by its cells."""
    if isinstance(owner, types.CellType):
        try:
            return {"cell_contents": owner.cell_contents}
        except ValueError:  # empty
            return {}
    if isinstance(owner, types.MethodType):
        return {"__self__": owner.__self__}
    if isinstance(owner, types.FunctionType):
        cells = {f"cell {i}": cell for i, cell in enumerate(owner.__closure__ or ())}
        return {"__defaults__": owner.__defaults__, **cells}
    found = dict(getattr(owner, "__dict__", {}))
    if isinstance(owner, nn.Module):
        return {name: value for name, value in found.items() if name not in _INTERNAL}
    for kind in type(owner).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(owner, name) and name not in ("__dict__", "__weakref__"):
                found[name] = getattr(owner, name)
    return found


def put_in(owner: Any, values: dict[str, Any]) -> None:
    """Sets attributes, past whatever the class does when one is set."""
    own = getattr(owner, "__dict__", None)
    for name, value in values.items():
        if isinstance(owner, types.FunctionType):
            if name == "__defaults__" and value is not owner.__defaults__:
                owner.__defaults__ = value
        elif isinstance(owner, types.MethodType):
            pass
        elif isinstance(owner, types.CellType):
            owner.cell_contents = value
        elif own is not None and (name in own or not hasattr(type(owner), name)):
            own[name] = value
        else:
            object.__setattr__(owner, name, value)


def put_back(owner: Any, values: dict[str, Any]) -> None:
    """Sets attributes to what they were, and takes away those that there were not."""
    own = getattr(owner, "__dict__", {})
    internal = _INTERNAL if isinstance(owner, nn.Module) else ()
    if not isinstance(owner, types.FunctionType):
        for name in [n for n in own if n not in values and n not in internal]:
            del own[name]
    now = attributes(owner)
    changed = {n: v for n, v in values.items() if n not in now or now[n] is not v}
    if changed:
        put_in(owner, changed)


def copy_of(tensor: Tensor) -> Tensor:
    """A leaf with the values of a tensor; it requires a gradient where the tensor does."""
    made = tensor.detach().clone()
    return made.requires_grad_() if tensor.requires_grad else made


def tensors_in(result: Any) -> list[Tensor]:
    """The tensors in what a model returns, in a fixed order."""
    if isinstance(result, Tensor):
        return [result]
    found: list[Tensor] = []
    seen: set[int] = set()

    def look(value: Any) -> None:
        if isinstance(value, Tensor):
            found.append(value)
        elif type(value) not in _ATOMS and id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, dict):
                for part in value.values():
                    look(part)
            elif isinstance(value, (list, tuple)):
                for part in value:
                    look(part)
            elif not isinstance(value, (nn.Module, types.FunctionType, types.MethodType)):
                for part in getattr(value, "__dict__", {}).values():
                    look(part)

    look(result)
    return found


def _holds_state(value: Any, machinery: frozenset[str]) -> bool:
    kind = type(value)
    if isinstance(value, (nn.Module, types.CellType, types.SimpleNamespace)):
        return True
    if isinstance(value, (types.FunctionType, types.MethodType)):
        return False  # (hooks are visited by name)
    package = str(getattr(kind, "__module__", "")).partition(".")[0]
    if package in machinery:
        return state_of(value) is not None
    return hasattr(value, "__dict__") or hasattr(kind, "__slots__")


def _copied_iterator(value: Any) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # itertools', from Python 3.12 on
            return copy.copy(value)
    except TypeError:
        return value


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def _tuple_like(value: tuple[Any, ...], parts: list[Any]) -> Any:
    if type(value) is tuple:
        return tuple(parts)
    return tuple.__new__(type(value), parts)  # named ones, and subclasses
