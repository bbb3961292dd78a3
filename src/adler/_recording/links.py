"""How the loop made what the criterion received from what the model returned.

The nodes of the autograd graph that made a model's outputs are marked with the call. From what the
criterion receives, the graph leads back to these marks: usually at once, else through whatever the
loop does in between (a slice, a temperature, two views concatenated). Those operations are
differentiated while their graph is alive, so that tangents of the outputs can be carried over.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from adler._distributed import is_sharded
from adler._recording.copies import tensors_in

if TYPE_CHECKING:
    from adler._recording.replay import Call

__all__ = [
    "Path",
    "Place",
    "Source",
    "accumulates",
    "flattened",
    "mark",
    "may_begin_with_time",
    "same",
    "sources",
]

# A loop does not put more operations between model and criterion.
_LONGEST = 20_000


@dataclass(frozen=True, eq=False)
class Place:
    """One of the tensors that a call returned.

    Attributes:
        call: The call.
        leaf: Which tensor of its result.
        output: The tensor, detached: later edits in place are seen in it.
        version: How often it had been written when the model returned it.
        result: All that the call returned, detached, where an ``output_fn`` may ask for it.
    """

    call: Call
    leaf: int
    output: Tensor
    version: int
    result: Any = None

    @property
    def intact(self) -> bool:
        """Whether the tensor still holds what the model returned."""
        return self.output._version == self.version


class Source(NamedTuple):
    """A place, and where in the graph it is."""

    place: Place
    node: Any
    number: int

    @property
    def edge(self) -> GradientEdge:
        """For `torch.autograd.grad`."""
        return GradientEdge(self.node, self.number)


def mark(tensor: Tensor, key: object, place: Place) -> None:
    """Marks the node that made a tensor; the graph keeps the mark alive."""
    node: Any = tensor.grad_fn
    if node is not None:
        node.metadata.setdefault(key, {})[tensor.output_nr] = place


def sources(
    tensors: Sequence[Tensor], key: object, trained: Collection[int]
) -> tuple[list[Source], bool]:
    """The marked outputs that tensors were made of.

    Args:
        tensors: Of the loop.
        key: Of the marks.
        trained: Parameters, by `id`.

    Returns:
        The sources, and whether the tensors also depend on the parameters past all of them.
    """
    found: dict[tuple[Any, int], Source] = {}
    seen: set[Any] = set()
    open_: list[tuple[Any, int]] = [
        (t.grad_fn, t.output_nr) for t in tensors if t.grad_fn is not None
    ]
    past = any(t.grad_fn is None and id(t) in trained for t in tensors)
    while open_ and len(seen) < _LONGEST:
        node, number = open_.pop()
        place = node.metadata.get(key, {}).get(number)
        if place is not None:
            found.setdefault((node, number), Source(place, node, number))
            continue
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            past = past or id(leaf) in trained
        open_.extend((n, i) for n, i in node.next_functions if n is not None)
    return list(found.values()), past


def accumulates(params: Sequence[Tensor]) -> bool:
    """Inside a hook: whether this backward pass adds to the gradient of one of the parameters.

    `torch.autograd.grad` does not.
    """
    if any(is_sharded(p) for p in params):  # gathered by others, whose leaves are not known
        return True
    for p in params:
        if not p.requires_grad:
            continue
        node = torch.autograd.graph.get_gradient_edge(p).node
        try:
            if torch._C._will_engine_execute_node(node):
                return True
        except RuntimeError as error:
            # It would capture the gradient instead.
            return "leaf node" not in str(error)
    return False


class Path:
    """The loop's operations between outputs of the model and what the criterion received.

    Args:
        origins: Where the outputs are.
        received: Tensors that were made of them.

    Raises:
        RuntimeError: If an operation in between cannot be differentiated twice.
    """

    def __init__(self, origins: list[Source], received: list[Tensor]) -> None:
        self.places = [source.place for source in origins]
        with contextlib.ExitStack() as stack, torch.enable_grad():
            # One output may be made of another inside the model, which is not of the path.
            for source in origins:
                stack.callback(source.node.register_prehook(_stop(source.number)).remove)
            self._at = [torch.zeros_like(x, requires_grad=True) for x in received]
            # u ↦ Pᵀu is linear: its own transpose is P.
            self._pulled = torch.autograd.grad(
                received,
                [source.edge for source in origins],
                self._at,
                create_graph=True,
                allow_unused=True,
            )

    def push(self, tangents: Sequence[Tensor]) -> list[Tensor]:
        """Tangents of what the criterion received, from those of the places."""
        used = [
            (pulled, v.to(pulled))
            for pulled, v in zip(self._pulled, tangents, strict=True)
            if pulled is not None and pulled.requires_grad
        ]
        if not used:
            return [torch.zeros_like(at) for at in self._at]
        with torch.enable_grad():
            found = torch.autograd.grad(
                [pulled for pulled, _ in used],
                self._at,
                [v for _, v in used],
                retain_graph=True,
                materialize_grads=True,
            )
        return [v.detach() for v in found]


def _stop(number: int) -> Callable[[tuple[Tensor | None, ...]], tuple[Tensor | None, ...]]:
    """A hook before a node, whose output of that number no gradient passes; it is seen there."""

    def hook(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        own = gradients[number]
        stopped = None if own is None else torch.zeros_like(own)
        return (*gradients[:number], stopped, *gradients[number + 1 :])

    return hook


@dataclass(frozen=True)
class Flattened:
    """What a loop makes of a model's result where it merges dimensions, the batch's first.

    Attributes:
        leaf: Which tensor of the result.
        tail: All but the first of the dimensions.
    """

    leaf: int
    tail: tuple[int, ...]

    def __call__(self, result: Any) -> Tensor:
        """Of any number of examples."""
        return tensors_in(result)[self.leaf].reshape(-1, *self.tail)


def flattened(source: Source, received: Tensor) -> Flattened | None:
    """How an output was flattened, such as by ``view(-1, classes)``; None: it was not, or not so.

    Example by example, so that the same may be done to some of them. Where the output does not have
    the first dimension that the model received, or a part of the model takes the batch as its
    second one, the first may be time.
    """
    output, call = source.place.output, source.place.call
    node, number = received.grad_fn, received.output_nr
    while (node, number) != (source.node, source.number):
        if node is None or _RESHAPES.fullmatch(node.name()) is None:
            return None
        node, number = node.next_functions[0]
    if received.ndim == 0 or output.ndim == 0 or not len(output):
        return None
    if received.dtype != output.dtype or len(received) % len(output):
        return None
    if call.examples not in (None, len(output)):
        return None
    if may_begin_with_time(call.model):
        return None
    return Flattened(source.place.leaf, tuple(received.shape[1:]))


def may_begin_with_time(model: nn.Module) -> bool:
    """Whether the first dimension may be another than the batch's, in some module of a model.

    A cell is called for one time after the other, of which nothing says where they are.
    """
    return any(
        getattr(module, "batch_first", True) is False or isinstance(module, nn.RNNCellBase)
        for module in model.modules()
    )


_RESHAPES = re.compile(r"(View|UnsafeView|ReshapeAlias|Alias|Squeeze|Unsqueeze|Clone)Backward\d*")


def same(source: Source, received: Tensor) -> bool:
    """Whether a tensor is what the model returned, and not made of it, its only source."""
    return received.grad_fn is source.node
