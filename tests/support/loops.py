"""The training loop of the README, and what watches it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


def train(
    model: nn.Module,
    criterion: Callable[..., Tensor],
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[Any, Any]],
) -> None:
    for x, y in batches:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()


class NoSynchronisation(TorchDispatchMode):
    """Fails on every op that would make the host wait for a device."""

    FORBIDDEN = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.equal.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.is_nonzero.default,
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in self.FORBIDDEN, f"{func} makes the host wait"
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def unchanged(model: nn.Module, gradients: bool = True) -> Iterator[None]:
    """Buffers, gradients, train/eval mode and the random state are bit for bit as before."""

    def snapshot() -> list[Tensor]:
        grads = [p.grad for p in model.parameters() if p.grad is not None] if gradients else []
        return [t.clone() for t in [*model.buffers(), *grads, torch.get_rng_state()]]

    before, modes = snapshot(), [m.training for m in model.modules()]
    yield
    after = snapshot()
    assert len(before) == len(after)
    assert all(a.equal(b) for a, b in zip(before, after))
    assert modes == [m.training for m in model.modules()]


def same(a: Any, b: Any) -> bool:
    """Bit for bit, types and dtypes too, through dicts, lists and tuples."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def numbers(optimizer: Any) -> dict[str, float]:
    """The last step's, but for the one that tells whether the loop has touched the gradients."""
    return {key: value for key, value in optimizer.scalars().items() if key != "consistency"}
