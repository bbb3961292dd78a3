"""Parameters that are made when a forward pass asks for them, and freed when it is done with them.

A perturbed copy of all parameters is as large as the parameters. A forward pass needs them one
module at a time, so on the CPU, where one kernel for each tensor is cheap, they are made module by
module, on access: the peak grows by the largest module only, and the copy is still in the cache
when it is used. The model's
own parameters are never written to, so there is nothing to restore, whatever happens in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

__all__ = ["Lazy", "OnAccess"]


class Lazy(Mapping[str, Tensor]):
    """A mapping whose values are made anew at each access.

    Args:
        names: The keys.
        make: From a key to the value.

    Examples:
        >>> import torch
        >>> ones = Lazy(["a", "b"], lambda name: torch.ones(2))
        >>> list(ones), ones["a"] is ones["a"]
        (['a', 'b'], False)
    """

    def __init__(self, names: Iterable[str], make: Callable[[str], Tensor]) -> None:
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # the mixin's would make the value

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class OnAccess(dict[str, Any]):
    """Stands in for ``Module._parameters``: some entries are looked up elsewhere.

    Args:
        own: The entries.
        elsewhere: From some of their keys to those of the mapping.
        of: Where these are looked up.
    """

    def __init__(self, own: Mapping[str, Any], elsewhere: Mapping[str, str], of: Lazy) -> None:
        super().__init__(own)
        self._elsewhere, self._of = dict(elsewhere), of

    def __getitem__(self, key: str) -> Any:
        name = self._elsewhere.get(key)
        return super().__getitem__(key) if name is None else self._of[name]

    def __setitem__(self, key: str, value: Any) -> None:
        self._elsewhere.pop(key, None)  # the forward pass has one of its own (functional_call)
        super().__setitem__(key, value)

    def get(self, key: str, default: Any = None) -> Any:
        if key in self:
            return self[key]
        return default

    def items(self) -> Any:
        return {key: self[key] for key in self}.items()

    def values(self) -> Any:
        return {key: self[key] for key in self}.values()
