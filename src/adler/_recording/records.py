"""What is recorded of a loss: the calls that made it, what the criterion received, its weight."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adler._recording.links import Path, Place
from adler._recording.randomness import RandomState
from adler._recording.replay import Call, ExplainedError, put_back, replaying
from adler._recording.state import CallState

__all__ = [
    "WHOLE",
    "Placed",
    "RecordedLoss",
    "TargetsError",
    "loss_weights",
    "losses_by_call",
    "no_broadcast",
    "weighted",
]

# In the place of a leaf: all of what `output_fn` makes.
WHOLE = -1


class TargetsError(ExplainedError, ValueError):
    """Explicit targets do not fit the outputs."""


@dataclass(eq=False)
class RecordedLoss:
    """One loss whose gradient is in ``p.grad``.

    Attributes:
        call: The call of the model that made the outputs; of several, the first.
        outputs: What the criterion received first, detached: a tensor, or what holds several;
            None if the loop did not show it, or only a part is replayed.
        targets: What the criterion received after the outputs.
        value: The loss, 0-dim, detached; None if the loop did not show it.
        weight: Gradient that arrived at the loss, 0-dim; None: 1.
        factor: How many of itself the loss stands for; see `adler._recording.subbatch`.
        options: What the criterion received by keyword only.
        places: What the model returned of it, with their part of the outputs of their call.
        path: How the loop made the differentiable arguments of the criterion of ``places``;
            None: what the model returned, or ``output_fn`` of it, is the first argument.
        differentiable: Which of the tensors and values in the criterion's arguments these are.
        state: What the criterion held when it was called; None: not known.
        random_state: Of the generators then; None: not known.
        version: How often the outputs had been written when the criterion received them.
        whole: The loss on the whole batch, where this is on a part of it.
    """

    call: Call
    targets: tuple[Any, ...]
    outputs: Any = None
    value: Tensor | None = None
    weight: Tensor | None = None
    factor: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)
    places: list[Placed] = field(default_factory=list)
    path: Path | None = None
    differentiable: tuple[int, ...] = (0,)
    state: CallState | None = None
    random_state: RandomState | None = None
    version: int | None = None
    whole: RecordedLoss | None = None

    @property
    def of_one_tensor(self) -> bool:
        """Whether the criterion's first argument is a tensor, and all that depends on parameters.

        Only of such a loss a `LossHessian` can be asked.
        """
        return self.differentiable == (0,) and isinstance(self.outputs, Tensor | None)

    @contextlib.contextmanager
    def surroundings(self) -> Iterator[None]:
        """Inside, the criterion may be called as it was in training; nothing is left of it."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(replaying())
            devices = self.call.devices
            stack.callback(put_back, RandomState.now(devices), devices)
            if self.random_state is not None:
                self.random_state.set()
            if self.state is not None:
                stack.enter_context(self.state.installed({}))
            yield

    def arguments(self, outputs: Tensor) -> tuple[Any, Any]:
        """Outputs and targets at which the loss was computed.

        Args:
            outputs: A replay's, where those of the training pass are not known any more.
        """
        mine = self.outputs
        # (What holds several tensors was copied.)
        overwritten = isinstance(mine, Tensor) and self.version not in (None, mine._version)
        at = outputs if mine is None or overwritten else mine
        return at, self.targets[0] if len(self.targets) == 1 else self.targets

    def value_at(self, outputs: Tensor, criterion: Callable[..., Tensor]) -> Tensor:
        """The loss; where the loop did not show it, at a replay's outputs.

        Args:
            outputs: Of the replay.
            criterion: The loss.

        Raises:
            TargetsError: If explicit targets do not fit these outputs.
        """
        if self.outputs is None:
            try:
                with no_broadcast():
                    return criterion(outputs, *self.targets, **self.options)
            except Exception as error:
                shapes = [tuple(t.shape) for t in self.targets if isinstance(t, Tensor)]
                raise TargetsError(
                    f"step(targets=...): the criterion refuses outputs of shape "
                    f"{tuple(outputs.shape)} with targets of shape {shapes}: {error}"
                ) from error
        assert self.value is not None
        return self.value


@contextlib.contextmanager
def no_broadcast() -> Iterator[None]:
    """Inside, a broadcast between outputs and targets is an error; PyTorch only warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Using a target size")
        yield


@dataclass(frozen=True, eq=False)
class Placed:
    """A tensor that a call returned, as a part of what a replay of the call says.

    Attributes:
        call: The call.
        place: The tensor; None: the loop did not show it.
        part: Start, end and shape, where the replay says several tensors as one flat one.
    """

    call: Call
    place: Place | None = None
    part: tuple[int, int, torch.Size] | None = None

    def cut(self, outputs: Tensor) -> Tensor:
        """This tensor, out of the replay's."""
        if self.part is None:
            return outputs
        start, end, shape = self.part
        return outputs[start:end].view(shape)


def losses_by_call(batch: Sequence[RecordedLoss]) -> dict[Call, list[RecordedLoss]]:
    """Losses of one call share its replay."""
    calls: dict[Call, list[RecordedLoss]] = {}
    for loss in batch:
        calls.setdefault(loss.call, []).append(loss)
    return calls


def loss_weights(
    batch: Sequence[RecordedLoss], like: Tensor, amp_scale: Tensor | None
) -> dict[RecordedLoss, Tensor]:
    """Factor with which each loss entered the gradients as they now are.

    Args:
        batch: The losses.
        like: Gives the factors, 0-dim, their dtype and device.
        amp_scale: Scale of a `torch.amp.GradScaler` in the recorded weights; NaN: unknown, because
            the gradients are already unscaled.
    """
    one = torch.ones_like(like)
    weights = {loss: loss.weight.to(one) for loss in batch if loss.weight is not None}
    if amp_scale is not None and weights:
        # Gradients that the user has unscaled: the weights are taken to sum to one.
        total = torch.stack(list(weights.values())).sum()
        divisor = torch.where(torch.isnan(amp_scale), total, amp_scale.to(total))
        weights = {loss: weight / divisor for loss, weight in weights.items()}
    # (1.0 leaves every bit.)
    return {loss: weights.get(loss, one) * loss.factor for loss in batch}


def weighted(weight: Tensor, term: Tensor) -> Tensor:
    """Nothing where the weight is zero, whatever the term: a mean over no targets is NaN."""
    return torch.where(weight == 0, torch.zeros_like(weight), weight * term.to(weight))
