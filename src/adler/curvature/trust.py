r"""Whether a measurement is of the training pass: checks that cost next to nothing.

| check | what must be equal | what makes it fail |
|---|---|---|
| ``outputs`` | replayed and recorded outputs | a forward pass that does not repeat itself |
| ``inputs`` | arguments of the call, whatever the parameters | outputs of one call that are inputs of the next |
| ``slope`` | $\langle \partial h / \partial F, v \rangle$ and $g \cdot d$ | tangents that are wrong; a penalty on the weights |
| ``loss`` | $\sum w \langle \partial L / \partial F, v \rangle$ and either of these | a second loss of the same outputs; outputs changed after the call |

The first needs the outputs, which every exact engine makes on its way; the second a look at the
graph of arguments that require a gradient; the third one product of outputs. The last
differentiates the loss alone, at the outputs, and is taken at the first measurements and now and
then. A number that is not finite passes: the search finds it.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adler._recording.replay import Call
from adler.curvature.difference import coarsest_dtype

__all__ = ["CAUSES", "Memory", "agree", "on_host", "outputs_agree", "tolerance"]

CAUSES = {
    "outputs": (
        "the forward pass does not repeat itself: run once more from the same state, it returns "
        "other outputs than in training. Something that it reads is no tensor, list or number held "
        "by the model or its modules: a global or class attribute, a file, the time, a generator "
        "kept elsewhere. Keep it as an attribute of the model. Or it writes to weights that are "
        "trained: do that between the steps"
    ),
    "inputs": (
        "what the model was called with depends on the trained parameters: outputs of one call are "
        "inputs of the next, as in a rollout or a recurrent cell, or a part of the model is "
        "called before it. Do both in the forward of one module, or detach what is handed on"
    ),
    "slope": (
        "the gradient is not that of the recorded losses alone, or it is changed on its way: a "
        "penalty on the weights (use weight_decay=, or compute it inside the model), a loss that "
        "the criterion does not see, a gradient edited after backward(), or, in float16 without a "
        "torch.amp.GradScaler, one that is rounded to zero on its way"
    ),
    "loss": (
        "the outputs receive a gradient that is not the criterion's: a second loss of the same "
        "outputs is computed beside it (distillation, a functional loss), or they were changed. "
        "Give the optimizer one criterion that computes the whole loss"
    ),
    "replay": ("the forward pass cannot be run once more: every way raised an error"),
}
_OUTPUTS = {
    torch.float64: 1e-6, torch.float32: 2e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1,
}  # fmt: skip
_SLOPES = {
    torch.float64: 1e-6, torch.float32: 2e-2, torch.float16: 1e-1, torch.bfloat16: 2e-1,
}  # fmt: skip
# A finite difference has an error of its own.
_DIFFERENCES = {
    torch.float64: 1e-4, torch.float32: 1e-1, torch.float16: 2e-1, torch.bfloat16: 2e-1,
}  # fmt: skip


@dataclass
class Memory:
    """What earlier measurements of one optimizer have taught; nothing here is saved.

    Attributes:
        measurements: How many there were.
        with_graph: Whether replays need the graph of a training pass.
        rests: Measurements until other engines are tried again, after all have failed.
        failed: How often all have failed in a row.
        full: Measurements of a part until the next of the whole batch.
        pending: Whether an earlier measurement was trusted, on its way to the host.
        loss: Whether the check of the loss held when it was last taken.
        whole: What the last look at a whole batch found, where parts are measured.
        ascends: Whether losses with a negative weight were seen.
    """

    measurements: int = 0
    with_graph: bool = False
    rests: int = 0
    failed: int = 0
    full: int = 0
    pending: tuple[Tensor, torch.cuda.Event] | None = None
    loss: Tensor | None = None
    whole: tuple[Tensor | None, Mapping[str, Tensor]] | None = None
    ascends: bool = False

    CLOSELY: ClassVar[int] = 3
    _EVERY: ClassVar[int] = 16

    @property
    def thorough(self) -> bool:
        """Whether this measurement takes the check of the loss too."""
        return self.measurements < self.CLOSELY or self.measurements % self._EVERY == 0

    def distrusts(self, trusted: Tensor | None) -> bool:
        """Whether a measurement failed a check (on an accelerator the last one: no waiting)."""
        if trusted is None:
            return False
        if trusted.device.type == "cpu" or self.measurements < self.CLOSELY:
            return not on_host(trusted, wait=True)
        before = self.pending
        if before is not None and not before[1].query():  # type: ignore[no-untyped-call]
            return False
        if trusted.device.type == "cuda":
            host = torch.empty_like(trusted, device="cpu", pin_memory=True)
            host.copy_(trusted, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self.pending = host, event
        return before is not None and not on_host(before[0], wait=False)

    def tries_others(self, checks: Mapping[str, Tensor]) -> bool:
        """Whether another engine may be right where one failed."""
        if self.rests > 0:
            self.rests -= 1
            return False
        others = (c for name, c in checks.items() if name not in ("inputs", "loss"))
        return any(not on_host(check, wait=True) for check in others)

    def give_up(self) -> None:
        """All engines have failed: they are not tried again for a while."""
        self.failed += 1
        self.rests = min(2**self.failed, 64)


def tolerance(call: Call, dtype: torch.dtype, engine: str | None = None) -> float:
    """How far two numbers may be apart, relative to them.

    Args:
        call: Says how it rounds.
        dtype: Of the outputs or parameters, whichever is coarser.
        engine: That computed the tangents; None: outputs are compared.
    """
    table = _OUTPUTS if engine is None else _SLOPES
    if engine == "finite_difference":
        table = _DIFFERENCES
    return table.get(coarsest_dtype(call, dtype), 2e-1)


def outputs_agree(found: Tensor, recorded: Tensor, within: float) -> Tensor:
    """0-dim bool: whether two tensors are equal to rounding, in norm."""
    a, b = found.detach(), recorded.detach()
    if a.dtype in (torch.float16, torch.bfloat16):
        a = a.float()
    b = b.to(a)
    if a.device.type == "cpu":  # where the host need not wait to know that one look will do
        error, size = torch.linalg.vector_norm(a - b), torch.linalg.vector_norm(b)
        if on_host(error.isfinite() & size.isfinite(), wait=False):
            near: Tensor = ~(error > within * size)
            return near
    # (Equal infinities have no difference.)
    error = torch.linalg.vector_norm(torch.where(a == b, torch.zeros_like(a), a - b))
    size = torch.linalg.vector_norm(torch.where(b.isinf(), torch.zeros_like(b), b))
    same: Tensor = ~(error > within * size)
    return same


def agree(found: Tensor, expected: Tensor, within: float, scale: Tensor) -> Tensor:
    """0-dim bool: whether two slopes are equal.

    Args:
        found: One.
        expected: The other.
        within: Relative to the larger.
        scale: Product of the norms whose inner product one is: cancellation leaves rounding of it.
    """
    size = torch.maximum(found.abs(), expected.abs())
    rounding = torch.where(scale.isfinite(), scale, torch.zeros_like(scale))
    apart = (found - expected).abs() > within * size + 1e-3 * within * rounding
    return ~(apart | (found.isinf() & ~expected.isinf()))


def on_host(flag: Tensor, wait: bool) -> bool | None:
    """A 0-dim bool; None where the host would have to wait and shall not."""
    if flag.device.type == "cpu":
        return bool(flag.detach().numpy())
    return bool(flag) if wait else None
