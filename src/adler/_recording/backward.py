"""What the backward pass did: which losses it reached, and how it left the gradients.

Hooks on the losses and on what the model returned are called when ``backward`` arrives there on its
way to the gradients of the parameters, with the gradient that arrives: at a loss, the factor by
which it entered what was backpropagated. `torch.autograd.grad` does not count.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from adler import _distributed as distributed
from adler._recording.beyond_loss import Marks, not_linear
from adler._recording.hooks import on_backward
from adler._recording.links import Place, Source, accumulates
from adler._recording.records import WHOLE, Placed, RecordedLoss
from adler._recording.replay import Call

__all__ = ["Backward"]

# Start, end and shape of each tensor of a call's result, by its number; None: it is alone.
_Parts = dict[int, "tuple[int, int, torch.Size] | None"]


class Backward:
    """The backward passes since the gradients were zeroed.

    Args:
        params: Those whose gradients they make.

    Attributes:
        refused: Why the loss that was backpropagated is none that can be replayed; None: it can.
        arrived: The gradient that reached each tensor that the model returned.
    """

    def __init__(self, params: Callable[[], Iterable[Tensor]]) -> None:
        self._params = params
        self._reached: list[RecordedLoss] = []
        self._marks = Marks()
        self._looked = False  # whether this backward pass was asked what it is of
        self.arrived: dict[Place, Tensor] = {}
        self.refused: str | None = None
        self._followed: weakref.WeakSet[Place] = weakref.WeakSet()
        self._versions: list[tuple[int, int]] | None = None

    def forget(self) -> None:
        """Forgets the losses whose gradients were just zeroed."""
        for loss in self._reached:
            loss.weight = None  # the graph may be retained, and differentiated again
        self._reached.clear()
        self.arrived.clear()
        self.refused = None
        self._looked = False
        self._versions = None

    def clear(self) -> None:
        """Forgets everything: a step was made."""
        self.forget()
        self._marks.clear()

    # --- what it waits for -----------------------------------------------------------------------

    def watch(self, value: Tensor, loss: RecordedLoss) -> None:
        """Waits for the backward pass to reach a loss."""
        self._marks.add(value)
        value.register_hook(on_backward(self, "_arrive", loss))  # type: ignore[no-untyped-call]

    def watch_refused(self, value: Tensor, reason: str) -> None:
        """Waits for the backward pass to reach a loss that cannot be replayed."""
        value.register_hook(on_backward(self, "_arrive_refused", reason))  # type: ignore[no-untyped-call]

    def follow(self, source: Source) -> None:
        """Takes note of the gradient that reaches a tensor that the model returned."""
        if source.place in self._followed:
            return
        self._followed.add(source.place)
        arrive = on_backward(self, "_arrive_at_outputs", source.place)
        number = source.number  # (the node must not hold itself)
        source.node.register_prehook(lambda gradients: arrive(gradients[number]))

    def _arrive(self, loss: RecordedLoss, gradient: Tensor) -> None:
        if not accumulates(list(self._params())):
            return
        self._when_finished()
        if not self._looked:
            self._looked = True
            operation = not_linear(self._marks)
            if operation is not None:
                self.refused = _NOT_LINEAR.format(operation.removesuffix("0"))
        weight = gradient.detach()
        if loss.weight is None:
            loss.weight = weight.clone()
            self._reached.append(loss)
        else:
            loss.weight = loss.weight + weight

    def _arrive_refused(self, reason: str, gradient: Tensor) -> None:
        if accumulates(list(self._params())):
            self.refused = reason

    def _arrive_at_outputs(self, place: Place, gradient: Tensor | None) -> None:
        if gradient is None or not accumulates(list(self._params())):
            return
        self._when_finished()
        known, gradient = self.arrived.get(place), gradient.detach()
        self.arrived[place] = gradient if known is None else known + gradient

    def _when_finished(self) -> None:
        """Notes the versions of the gradients, once this backward pass has made them."""
        me = weakref.ref(self)

        def finished() -> None:
            alive = me()
            if alive is not None:
                alive._versions = alive._gradient_versions()
                alive._looked = False

        torch.autograd.Variable._execution_engine.queue_callback(finished)

    # --- the losses ------------------------------------------------------------------------------

    def __bool__(self) -> bool:
        """Whether it has reached a loss."""
        return bool(self._reached)

    def losses(self) -> list[RecordedLoss]:
        """Those that it has reached, with calls that say what they all see of them."""
        used: dict[Call, dict[int, Place]] = {}
        for placed in (placed for loss in self._reached for placed in loss.places):
            assert placed.place is not None
            used.setdefault(placed.call, {})[placed.place.leaf] = placed.place
        calls: dict[Call, tuple[Call, _Parts]] = {}
        for call, places in used.items():
            calls[call] = self._joined(call, [places[leaf] for leaf in sorted(places)])
        found = []
        for loss in self._reached:
            at = []
            for placed in loss.places:
                assert placed.place is not None
                call, parts = calls[placed.call]
                at.append(Placed(call, placed.place, parts[placed.place.leaf]))
            found.append(replace(loss, call=at[0].call, places=at))
        return found

    def _joined(self, call: Call, places: list[Place]) -> tuple[Call, _Parts]:
        """A call that says some of its tensors, and where each of them is."""
        leaves = tuple(place.leaf for place in places)
        if len(places) == 1:
            gradient = self.arrived.get(places[0])
            seen = None if leaves == (WHOLE,) else leaves
            return replace(call, leaves=seen, output_gradient=gradient), {leaves[0]: None}
        parts: _Parts = {}
        start = 0
        for place in places:
            end = start + place.output.numel()
            parts[place.leaf] = start, end, place.output.shape
            start = end
        # (One tensor may be made of another, whose gradient then counts twice.)
        return replace(call, leaves=leaves), parts

    # --- the gradients ---------------------------------------------------------------------------

    def gradients_unmodified(self) -> bool:
        """Whether the gradients are known to be as the backward pass left them.

        They are not once the loop has clipped, unscaled or exchanged them.
        """
        return self._versions is not None and self._versions == self._gradient_versions()

    def were_zeroed(self) -> bool:
        """Whether the gradients were removed, or overwritten by zeros, since the last backward."""
        gradients = [p.grad for p in self._params() if p.grad is not None]
        if not gradients:
            return True
        if self._versions is None or self._versions == self._gradient_versions():
            return False
        return not any(bool(g.any()) for g in distributed.local(gradients))

    def _gradient_versions(self) -> list[tuple[int, int]]:
        """Which tensor each gradient is, and how often it was written."""
        gradients = (p.grad for p in self._params())
        return [(id(g), g._version) for g in gradients if g is not None]


_NOT_LINEAR = (
    "what backward() was called on is not a weighted sum of the recorded losses: {} is applied to "
    "them, and its curvature would be missing. Compute it inside the criterion, which then returns "
    "what is backpropagated:\n\n"
    "    class Criterion(torch.nn.Module):\n"
    "        def forward(self, outputs, targets):\n"
    "            return torch.nn.functional.mse_loss(outputs, targets).sqrt()  # for example"
)
