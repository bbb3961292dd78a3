"""What the loop made of the losses before it called ``backward()``.

The generalized Gauss–Newton model of a weighted sum of losses is the weighted sum of theirs, and
the gradient that arrives at a loss is its weight. Of any other function of losses (a root, a power,
a product) the gradient says the slope only, and its curvature is missing. Once ``backward()`` has
reached a loss, most of what these operations had saved is freed; but the graph still says which
they were.
"""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Collection, Sequence
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

__all__ = ["Marks", "not_linear"]

# A loop does not put more operations behind the losses.
_LONGEST = 20_000

# Linear, or linear but for kinks, in all that is differentiated. (The names of autograd's nodes.)
_LINEAR = re.compile(
    r"""
    Abs | Add | Alias | Amax | Amin | AsStrided | Cat | Clamp | ClampMax | ClampMin | Clone
    | ConstantPadNd | Copy | CopyBackwards | CopySlices | Cummax | Cummin | Cumsum | Diagonal
    | Expand | Flip | Gather | Hardtanh | Index | IndexAdd | IndexPut | IndexSelect | LeakyRelu
    | MaskedFill | MaskedScatter | MaskedSelect | Max | Maximum | Mean | Median | Min | Minimum
    | NanToNum | Nanmedian | Nansum | Neg | Permute | Relu | Repeat | ReshapeAlias | Roll | Rsub
    | Scatter | ScatterAdd | Select | Slice | Sort | Split | SplitWithSizes | Squeeze | Stack | Sub
    | Sum | T | Take | Threshold | ToCopy | Topk | Trace | Transpose | Unbind | UnsafeSplit
    | UnsafeView | Unsqueeze | View | Where
    """,
    re.VERBOSE,
)
_FACTORS = ({0}, {1})
_SUM_AND_FACTORS = ({0, 1}, {0, 2})
# Linear in some of what is differentiated, as long as the rest is none of the losses'.
_LINEAR_IN: dict[str, tuple[set[int], ...]] = {
    **dict.fromkeys(("Bmm", "Dot", "Linear", "Mm", "Mul", "Mv"), _FACTORS),
    **dict.fromkeys(("Addcmul", "Addmm", "Addmv", "Baddbmm"), _SUM_AND_FACTORS),
    "Div": ({0},),
    "Lerp": ({0, 1}, {2}),
}
_NODE = re.compile(r"^(?:torch::autograd::)?(?P<name>\w+?)(?:Backward\d*)?$")


class Marks:
    """Which nodes of the graph made the recorded losses; the graph keeps the marks."""

    def __init__(self) -> None:
        self._first: int | None = None

    def add(self, loss: Tensor) -> None:
        """Marks a loss."""
        node: Any = loss.grad_fn
        node.metadata.setdefault(self, set()).add(loss.output_nr)
        made = node._sequence_nr()
        self._first = made if self._first is None else min(self._first, made)

    def clear(self) -> None:
        """Losses that come are newer than all that is in the graph of those before."""
        self._first = None

    def at(self, node: Any, number: int) -> bool:
        """Whether this output of a node is a loss."""
        return number in node.metadata.get(self, ())

    def older(self, node: Any) -> bool:
        """Whether a node was made before the first loss since `clear`, and so of none."""
        return self._first is not None and node._sequence_nr() < self._first


def not_linear(marks: Marks) -> str | None:
    """Inside a hook: an operation on the marked losses that is not linear in them.

    Args:
        marks: Of the losses.

    Returns:
        The name of its node in the graph (``SqrtBackward0``); None: there is none, or what
        ``backward()`` was called on is not known (compiled autograd).
    """
    here = get_ident()
    passes = _passes(sys._getframe())
    if not passes:  # of a loss on an accelerator, the hook runs in a thread of the engine
        others = [frame for thread, frame in sys._current_frames().items() if thread != here]
        passes = [roots for frame in others for roots in _passes(frame)]
        others.clear()  # (frames keep alive what is in them)
    for roots in passes:
        found, reached = _walk([edge for t in roots if (edge := _edge(t)) is not None], marks)
        if reached:
            return found
    return None


def _passes(frame: types.FrameType | None) -> list[Sequence[Any]]:
    """What each backward pass that a frame is inside of was called on, innermost first."""
    found = []
    while frame is not None:
        if frame.f_code is torch.autograd.graph._engine_run_backward.__code__:
            found.append(frame.f_locals["t_outputs"])
        frame = frame.f_back
    return found


def _edge(output: Any) -> tuple[Any, int] | None:
    if isinstance(output, Tensor):
        return None if output.grad_fn is None else (output.grad_fn, output.output_nr)
    return output.node, output.output_nr  # of a GradientEdge


def _walk(roots: Collection[tuple[Any, int]], marks: Marks) -> tuple[str | None, bool]:
    """An operation that is not linear in the losses, and whether they were met."""
    inputs: dict[Any, list[tuple[Any, int]]] = {}  # of each node, those that may lead to a loss
    left = [edge for edge in roots if not marks.at(*edge)]
    reached = len(left) < len(roots)
    order: list[Any] = []  # each node after those that lead to it
    stack = [(node, False) for node, _ in left]
    while stack and len(inputs) < _LONGEST:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in inputs and not marks.older(node):
            inputs[node] = list(node.next_functions)
            stack.append((node, True))
            for n, i in inputs[node]:
                if n is not None and not marks.at(n, i):
                    stack.append((n, False))
    leads: set[Any] = set()
    found: str | None = None
    for node in order:  # children first
        made_of = [
            k
            for k, (n, i) in enumerate(inputs[node])
            if n is not None and (marks.at(n, i) or n in leads)
        ]
        if made_of:
            leads.add(node)
            if not _is_linear(node.name(), made_of):
                found = node.name()
    return found, reached or bool(leads)


def _is_linear(name: str, made_of: list[int]) -> bool:
    """Whether a node is linear in these of its inputs."""
    matched = _NODE.match(name)
    operation = name if matched is None else matched["name"]
    return _LINEAR.fullmatch(operation) is not None or any(
        set(made_of) <= jointly for jointly in _LINEAR_IN.get(operation, ())
    )
