r"""What the losses of a batch say along the tangents of their outputs.

Of each loss, at the outputs where it was computed and along their tangents $v$: the quadratic form
$v^\top \nabla^2 L\, v$, what one nat is worth, and where that is asked for the slope
$\langle \partial L / \partial F, v \rangle$.

Where the form of the losses is zero or negative, because a loss is linear or not convex in the
outputs (policy gradients, margins, differences of losses), a quadratic model has no minimiser. Its
place is taken by the empirical Fisher matrix of the outputs, the sum over examples of
$\omega_i (\nabla \ell_i^\top v_i)^2$, which is positive wherever the outputs' gradient is not
normal to what the step changes.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adler._recording.records import RecordedLoss, weighted
from adler.losses import LossHessian
from adler.losses.fisher import outer_products
from adler.losses.generic import AutogradHessian, gradients_of, joint_form

__all__ = ["LossAlong", "LossForms", "SumAlong"]


class LossAlong(NamedTuple):
    """What one loss says along its tangents; 0-dim.

    Attributes:
        form: ``vᵀ ∇²L v``.
        loss_per_nat: See `LossHessian.loss_per_nat`; None: not asked.
        finite: Whether the loss is finite.
        fisher: The empirical Fisher matrix's form; None: not asked.
        slope: ``⟨∂L/∂F, v⟩``; None: not asked.
        scale: The product of the two norms; None: not asked.
    """

    form: Tensor
    loss_per_nat: Tensor | None
    finite: Tensor
    fisher: Tensor | None = None
    slope: Tensor | None = None
    scale: Tensor | None = None


@dataclass(frozen=True)
class LossForms:
    """One criterion, asked along tangents.

    Args:
        criterion: The loss.
        hessian: Its quadratic form.
        substitute: Whether the empirical Fisher matrix takes the place of a form that is not
            positive.
        needs_kl_scale: Whether to compute ``loss_per_nat``.
    """

    criterion: Callable[..., Tensor]
    hessian: LossHessian
    substitute: bool
    needs_kl_scale: bool

    def along(
        self,
        loss: RecordedLoss,
        outputs: Tensor,
        tangents: Sequence[Tensor],
        *,
        wants_slope: bool,
        ascends: bool,
    ) -> LossAlong:
        """One loss.

        Args:
            loss: The loss.
            outputs: The first of its outputs, by a replay.
            tangents: Of all that the model returned of it.
            wants_slope: Whether its slope is compared with others.
            ascends: Whether some loss of the batch is maximised.
        """
        one, curved = loss.of_one_tensor, self._is_closed(loss)
        with loss.surroundings() if loss.outputs is None else contextlib.nullcontext():
            loss_value = loss.value_at(outputs, self.criterion)
        if loss.path is not None:
            tangents = loss.path.push(tangents)
        at, targets = loss.arguments(outputs)
        loss_per_nat = None
        with self._around(loss):
            form = self._form(loss, at, targets, tangents)
            if self.needs_kl_scale:
                loss_per_nat = torch.full_like(loss_value, math.inf)
                if one:
                    loss_per_nat = self._hessian_of(loss).loss_per_nat(at, targets, loss_value)
        # That of a part may be a mean over no targets.
        finite = torch.isfinite(loss_value if loss.value is None else loss.value)
        replaced = self.substitute and not form.ndim and (ascends or not curved)
        if not wants_slope and not replaced:
            return LossAlong(form, loss_per_nat, finite)
        with loss.surroundings():
            _, gradients = gradients_of(
                self.criterion,
                (at, *loss.targets),
                loss.differentiable,
                options=loss.options,
                strict=False,
            )
        slope, scale = _slope(gradients, tangents)
        fisher = None
        if replaced:
            fisher = _fisher(self.hessian if one else None, at, targets, gradients, tangents)
        return LossAlong(form, loss_per_nat, finite, fisher, slope, scale)

    def form(self, loss: RecordedLoss, outputs: Tensor, tangents: Sequence[Tensor]) -> Tensor:
        """Of one loss the quadratic form alone; see `along`."""
        at, targets = loss.arguments(outputs)
        with self._around(loss):
            return self._form(loss, at, targets, tangents)

    def _around(self, loss: RecordedLoss) -> contextlib.AbstractContextManager[None]:
        """Closed forms do not call the criterion. Others do, each time as it was in training."""
        return contextlib.nullcontext() if self._is_closed(loss) else loss.surroundings()

    def _is_closed(self, loss: RecordedLoss) -> bool:
        return loss.of_one_tensor and self.hessian.curved and not loss.options

    def _form(
        self, loss: RecordedLoss, at: Any, targets: Any, tangents: Sequence[Tensor]
    ) -> Tensor:
        """The quadratic form; zero where PyTorch cannot differentiate the loss twice."""
        try:
            if loss.of_one_tensor:
                return self._hessian_of(loss).quadratic_form(at, targets, tangents[0])
            return joint_form(
                self.criterion, (at, *loss.targets), loss.differentiable, tangents, loss.options
            )
        except (RuntimeError, NotImplementedError) as error:
            if not self.substitute or "not implemented" not in str(error):
                raise
            return tangents[0].new_zeros(())

    def _hessian_of(self, loss: RecordedLoss) -> LossHessian:
        """The form of a loss; one that received options by keyword only is another loss."""
        if not loss.options:
            return self.hessian
        return AutogradHessian(functools.partial(self.criterion, **loss.options))


class SumAlong(NamedTuple):
    """Weighted sums over the losses of what each says; 0-dim, see `LossAlong`."""

    form: Tensor
    loss_per_nat: Tensor
    finite: Tensor
    fisher: Tensor | None
    slope: Tensor
    scale: Tensor

    @classmethod
    def empty(cls, zero: Tensor, needs_kl_scale: bool) -> SumAlong:
        """Over no losses; ``loss_per_nat`` is infinite where it is not asked."""
        loss_per_nat = zero if needs_kl_scale else torch.full_like(zero, math.inf)
        return cls(zero, loss_per_nat, torch.ones_like(zero, dtype=torch.bool), None, zero, zero)

    def plus(self, weight: Tensor, seen: LossAlong) -> SumAlong:
        """With one more, and the weight with which it entered the gradient."""
        loss_per_nat, fisher, slope, scale = self.loss_per_nat, self.fisher, self.slope, self.scale
        if seen.loss_per_nat is not None:
            loss_per_nat = loss_per_nat + weighted(weight, seen.loss_per_nat)
        if seen.fisher is not None:
            positive = weighted(weight.abs(), seen.fisher)
            fisher = positive if fisher is None else fisher + positive
        if seen.slope is not None and seen.scale is not None:
            slope = slope + weighted(weight, seen.slope)
            scale = scale + weighted(weight.abs(), seen.scale)
        form = self.form + weighted(weight, seen.form)
        finite = self.finite & seen.finite.to(self.finite.device)
        return SumAlong(form, loss_per_nat, finite, fisher, slope, scale)


def _slope(gradients: Sequence[Tensor], tangents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """``⟨∂L/∂F, v⟩``, and the product of the two norms."""
    pairs = [(g, v.to(g)) for g, v in zip(gradients, tangents, strict=True)]
    slope = functools.reduce(torch.add, ((g * v).sum() for g, v in pairs))
    norms = (torch.linalg.vector_norm(g) * torch.linalg.vector_norm(v) for g, v in pairs)
    return slope, functools.reduce(torch.add, norms)


def _fisher(
    hessian: LossHessian | None,
    outputs: Any,
    targets: Any,
    gradients: Sequence[Tensor],
    tangents: Sequence[Tensor],
) -> Tensor:
    """The empirical Fisher matrix's form; of several tensors, rows of all are one example."""
    if hessian is not None and hasattr(hessian, "criterion"):
        weights = hessian.example_weights(outputs, targets).to(gradients[0])
        if weights.numel() == 1 or weights.shape[:1] == gradients[0].shape[:1]:
            return outer_products(gradients[0], tangents[0], weights)
    rows = {len(g) if g.ndim else 1 for g in gradients}
    count = rows.pop() if len(rows) == 1 else 1
    products = [(g * v.to(g)).reshape(count, -1).sum(1) for g, v in zip(gradients, tangents)]  # noqa: B905
    return count * functools.reduce(torch.add, products).square().sum()
