"""What all optimizers of this library share: everything but the direction of the step.

`MeasuredOptimizer.step` is five stages: what made the gradient (`adler._recording`), where to go (a
`Direction`), what the batch says along it (`adler.curvature.measurement`), how far
(`adler._step_length`), and going there. What is kept between steps is one
`adler._step_length.SearchState`, which lives in the param groups, and so in checkpoints.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from adler import _distributed as distributed
from adler import _options, losses
from adler._averaging import DiscountedMean
from adler._optimizers.clipping import GradientScale
from adler._optimizers.contract import ModelOptimizer
from adler._optimizers.direction import Direction
from adler._optimizers.gradients import Gradients, gradients_in, unscale_
from adler._optimizers.groups import has_gradient, moves
from adler._optimizers.multiplier import MultiplierCheck
from adler._optimizers.record import Log, StepRecord
from adler._optimizers.relative_change import RelativeChange, keep_initial_sizes
from adler._options import Measure
from adler._recording.recorder import Recorder
from adler._recording.records import RecordedLoss
from adler._recording.replay import is_capturing
from adler._recording.subbatch import IndivisibleError, Reduction, take_first
from adler._step_length import Measurement, Rule, SearchState, StepLength, step_length
from adler._warning import warn
from adler.curvature.batch_along import BatchAlong, BatchCurvature
from adler.curvature.loss_forms import LossForms
from adler.curvature.measurement import batch_curvature
from adler.curvature.trust import Memory

__all__ = ["MeasuredOptimizer"]

Self = TypeVar("Self", bound="MeasuredOptimizer")


class MeasuredOptimizer(ModelOptimizer):
    """An optimizer that measures the length of its step along a direction that a subclass gives.

    Subclasses say along what to search and to move (`_direction`), how rates are averaged
    (``_mean``) and what takes the place of the loss Hessian (`_loss_hessian`). The arguments are
    those of `ModelOptimizer`.
    """

    _mean: ClassVar[DiscountedMean]
    _checks: Mapping[str, Tensor]
    _indivisible: bool
    _reduction: Reduction | None
    _to_say: str

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """GradScaler then hands over its scale instead of unscaling behind our back.

        Lightning asks too, and would refuse to clip gradients. Told no, it has the scaler unscale
        them first, which the scaler then tells us. It does not say by what: that is read off it.
        """
        frame = sys._getframe(1)
        asks = str(frame.f_globals.get("__name__", ""))
        self._scaler_scale = getattr(frame.f_locals.get("self"), "_scale", None)
        return not asks.startswith(("lightning", "pytorch_lightning"))

    def _loss_hessian(self) -> losses.LossHessian:
        """What takes the place of ``Q``."""
        return losses.loss_hessian(self.criterion)

    # --- the step --------------------------------------------------------------------------------

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        inputs: Any = None,
        targets: Any = None,
    ) -> Any:
        """Measures the curvature along the gradient and moves the parameters.

        Args:
            closure: Zeroes the gradients, computes the loss, backpropagates, returns it.
            inputs: What the model was called with, for loops that hooks cannot see: one argument, a
                tuple of them, or a mapping of keyword arguments. Needs ``targets``.
            targets: What the criterion receives after the outputs (a tuple where it receives
                several), for loops that do not call the criterion module. The loss that was
                backpropagated must be ``criterion(outputs, targets)``.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: If there is no gradient, or the batch that made it is unknown. The message
                says what to do; parameters and state are unchanged. Also under CUDA-graph capture:
                a step saves and sets the states of the random number generators and counts its
                steps, which the host does.
            ValueError: If explicit targets do not fit the outputs.
        """
        if is_capturing():
            raise RuntimeError(
                "step(): a CUDA graph is being captured, but the host takes part in a step: it "
                "restores random states and decides which steps measure. Capture forward and "
                "backward, and call step(inputs=..., targets=...) outside the graph"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._momenta.put_back(self.param_groups)
        for options in ({"beta": self.beta, "eps": self.eps}, *self.param_groups):
            _options.check(options)
        params, values = gradients_in(self.param_groups)
        if inputs is None and targets is None and self._only_makes_state(params, values):
            return loss
        state = SearchState.of(self.param_groups[0], self._scalar_device)
        self._multiplier.observe(self.param_groups, state.steps)
        measures = self.measure.is_due(state.steps)
        # What can be refused is refused before anything changes.
        ranks = distributed.process_groups(self._recorder.ddp, list(self._names))
        batch = self._batch(inputs, targets, alone=not ranks) if measures else None
        gradients = self._as_left(params, values)
        direction = self._direction(params, values)
        try:
            seen, consistency = self._look(batch, gradients, direction, state, ranks)
        except BaseException:
            direction.undo()
            raise
        found, state = step_length(seen, state, self._rule(state.steps))
        self._descend(found, direction)
        for group in self.param_groups:
            group.update(state.entries())
        self._recorder.clear()
        if self._to_say:
            said, self._to_say = self._to_say, ""
            warn(said)
        self._log.write(found, seen, consistency, self._checks if measures else {})
        return loss

    def _direction(self, params: list[Tensor], gradients: list[Tensor]) -> Direction:
        """What this step goes along."""
        return Direction(gradients)

    def _rule(self, steps: int) -> Rule:
        """How the step after so many is chosen."""
        # The average forgets by steps, not by measurements.
        fraction, times = self.measure.fraction, self.measure.interval(steps)
        smoothing = 0.0 if self._indivisible else 1 - fraction
        return Rule(self._mean, self.beta**times, self.eps, self.guard, smoothing, times)

    def _as_left(self, params: list[Tensor], values: list[Tensor]) -> Gradients:
        """The gradients, unscaled in place, and what the loop has done to them before."""
        unmodified = self._recorder.gradients_unmodified()
        multiplied = self._gradient_scale.factor()
        scaling = unscale_(
            values,
            self._scalar_device,
            veto=getattr(self, "found_inf", None),
            scale=getattr(self, "grad_scale", None),
            unscaled=getattr(self, "_scaler_scale", None),
        )
        return Gradients(params, values, scaling, unmodified, multiplied)

    def _look(
        self,
        batch: list[RecordedLoss] | None,
        gradients: Gradients,
        direction: Direction,
        state: SearchState,
        ranks: list[Any],
    ) -> tuple[Measurement, Tensor]:
        """What this step knows along its direction, and how well the measurement fits ``g·d``.

        Args:
            batch: What made the gradient; None: this step does not measure curvature.
            gradients: As the loop has left them.
            direction: Of the step.
            state: After the step before.
            ranks: Process groups to agree with.
        """
        look = direction.look(gradients.values, self._scalar_device, measured=batch is not None)
        slope, squared_norm, lengths = look
        if self.guard is not None and self.guard.max_relative_change is not None:
            fraction = self.guard.max_relative_change
            direction.bound = RelativeChange(
                gradients.params, direction.along, lengths, fraction, self.state
            )
        clipped = gradients.clipped()
        if clipped is not None and direction.scale_free:
            slope = slope / clipped.to(slope)
        unknown, veto = torch.full_like(slope, math.nan), gradients.scaling.veto
        if batch is None:
            if veto is not None:
                slope = torch.where(veto, math.nan, slope)
            slope, squared_norm = distributed.mean((slope, squared_norm), ranks)
            return Measurement(slope, squared_norm), unknown
        names = [self._names[p] for p in gradients.params]
        one = BatchAlong(
            batch,
            params=dict(zip(names, gradients.params, strict=True)),
            direction=dict(zip(names, direction.along, strict=True)),
            forms=self._loss_forms(),
            squared_norm=squared_norm,
            slope=slope,
            memory=self._memory,
            expected=slope if gradients.unmodified and not ranks else None,
            rate=self._present_rate(state),
            amp_scale=gradients.scaling.scale,
        )
        measured = self._measure(one, state, ranks)
        if measured.engine != self.measure.jvp:  # a fallback from forward mode is for good
            self.measure = dataclasses.replace(self.measure, jvp=measured.engine)
        self._checks = measured.checks
        finite = measured.finite if veto is None else measured.finite & ~veto
        seen, predicted = _of_all_ranks(
            Measurement(
                slope,
                squared_norm,
                measured.value,
                measured.loss_per_nat,
                finite,
                measured.trusted,
                measured.spread,
            ),
            measured.slope,
            ranks,
        )
        if predicted is None or not gradients.unmodified:
            return seen, unknown
        consistency = predicted / seen.slope
        if ranks:  # only together do they know ``g·d``
            fits = ~((consistency - 1).abs() > measured.within)  # (a NaN is for the search to find)
            self._checks = {**measured.checks, "slope": fits}
            seen = seen._replace(trusted=fits if seen.trusted is None else seen.trusted & fits)
        return seen, consistency

    def _only_makes_state(self, params: list[Tensor], gradients: list[Tensor]) -> bool:
        """Whether `torch.distributed.checkpoint` asks for state: zero gradients, zero rates."""
        if not self._recorder.saw_nothing:
            return False
        if any(float(group["lr"]) != 0 for group in self.param_groups):
            return False
        if any(bool(gradient.any()) for gradient in distributed.local(gradients)):
            return False
        self._make_state(params)
        if self.guard is not None and self.guard.max_relative_change is not None:
            keep_initial_sizes(self.state, params)
        return True

    def _make_state(self, params: list[Tensor]) -> None:
        """Creates what a direction would create for parameters that it sees first."""

    def _batch(self, inputs: Any, targets: Any, alone: bool) -> list[RecordedLoss]:
        if targets is not None:
            batch = self._recorder.explicit(inputs, targets)
        elif inputs is not None:
            raise ValueError("step(inputs=...) needs targets= too: what the criterion receives")
        else:
            batch = self._recorder.losses()
        if self._indivisible:
            return batch
        if self._reduction is None:
            self._reduction = Reduction(self.criterion, alone)
        try:
            return take_first(batch, self.measure.fraction, self._reduction)
        except IndivisibleError as error:
            self._indivisible = True
            self._to_say = f"curvature is measured on whole batches, which costs more: {error}"
            return batch

    def _measure(self, one: BatchAlong, state: SearchState, ranks: list[Any]) -> BatchCurvature:
        """The batch's curvature.

        Args:
            one: What made the gradient, and the direction.
            state: After the step before.
            ranks: Process groups to agree with.
        """
        return batch_curvature(one, self.measure.jvp, alone=not ranks)

    def _loss_forms(self) -> LossForms:
        guarded = self.guard is not None
        needs_kl_scale = self.guard is not None and self.guard.max_kl is not None
        return LossForms(
            self.criterion, self._hessian, substitute=guarded, needs_kl_scale=needs_kl_scale
        )

    def _present_rate(self, state: SearchState) -> Tensor:
        """How far steps go, which says how far a finite difference should look."""
        rate = self._mean.read(state.rates)
        # Even a distrusted measurement tells the next one.
        return torch.where(rate > 0, rate, state.minibatch_lr)

    def _descend(self, found: StepLength, direction: Direction) -> None:
        nothing_moves = not any(moves(group) for group in self.param_groups)
        for group in self.param_groups:
            lr = group["lr"]
            rate = found.rate * (lr.to(found.rate).squeeze() if isinstance(lr, Tensor) else lr)
            group["effective_lr"] = rate
            params = [p for p in group["params"] if has_gradient(p)]
            if params and (moves(group) or nothing_moves):
                direction.descend(group, params, rate, found.skipped)
        direction.finish(found.skipped)

    @classmethod
    def low_cost(
        cls: type[Self],
        params: ParamsT | Optimizer,
        model: nn.Module,
        criterion: Callable[..., Tensor],
        **overrides: Any,
    ) -> Self:
        """With ``measure=Measure.low_cost()``: finite differences in place of forward mode.

        Works for any op, and takes two passes without gradients on a quarter of the batch at every
        eighth step: about the time of forward mode. Under bfloat16 its curvatures are off by up to
        30 %.

        Args:
            params: See the class.
            model: See the class.
            criterion: See the class.
            **overrides: Keyword arguments of the class, in place of this.

        Examples:
            >>> from adler import Adler
            >>> model, criterion = nn.Linear(4, 3), nn.CrossEntropyLoss()
            >>> Adler.low_cost(model.parameters(), model, criterion).measure.jvp
            'finite_difference'
        """
        return cls(params, model, criterion, **{"measure": Measure.low_cost(), **overrides})

    # --- what a user reads -----------------------------------------------------------------------

    @property
    def last_step(self) -> StepRecord | None:
        """What the last step did; None before the first."""
        return self._log.last

    def scalars(self, prefix: str = "") -> dict[str, float]:
        """The last step as numbers for a logger, by name; waits for the device once.

        Holds what `StepRecord` names, and ``applied_lr``, the rate after the group's ``lr``
        (``applied_lr/0``, ``applied_lr/1``, ... where there are several groups). Empty before the
        first step.

        Args:
            prefix: Put before every name, such as ``"adler/"``.

        Examples:
            >>> import torch
            >>> from adler import Adler
            >>> model, criterion = torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss()
            >>> optimizer = Adler(model.parameters(), model, criterion, lr=0.5)
            >>> criterion(model(torch.randn(8, 4)), torch.randint(3, (8,))).backward()
            >>> optimizer.step()
            >>> numbers = optimizer.scalars("adler/")
            >>> numbers["adler/applied_lr"] == 0.5 * numbers["adler/effective_lr"]
            True
        """
        last = self.last_step
        if last is None:
            return {}
        found = last._asdict()
        for number, group in enumerate(self.param_groups):
            name = "applied_lr" if len(self.param_groups) == 1 else f"applied_lr/{number}"
            found[name] = group["effective_lr"]
        values = torch.stack([value.to(last.slope) for value in found.values()])
        return {prefix + name: value for name, value in zip(found, values.tolist(), strict=True)}

    def remove_hooks(self) -> None:
        """Takes the hooks off the model and the criterion; `step` then needs inputs and targets."""
        self._recorder.remove()
        self._gradient_scale.remove()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zeroes the gradients, and forgets the batches that made them."""
        super().zero_grad(set_to_none)
        self._recorder.forget_backpropagated()

    def _attach(self) -> None:
        """Hooks the model and the criterion; the hooks do not keep the optimizer alive."""
        self._hessian = self._loss_hessian()  # refuses reduction="none"
        super()._attach()
        me = weakref.ref(self)
        own = {id(p) for group in self.param_groups for p in group["params"]}
        for hook in list(self.model._forward_pre_hooks.values()):
            if hasattr(hook, "hand_over"):  # of an optimizer that was there before
                hook.hand_over(own)

        def params() -> Iterable[Tensor]:
            alive = me()
            groups = [] if alive is None else alive.param_groups
            return (p for group in groups for p in group["params"])

        def measures() -> bool:
            alive = me()
            if alive is None or not alive.param_groups:
                return True
            return alive.measure.is_due(int(alive.param_groups[0].get("steps", 0)))

        self._recorder = Recorder(
            self.model, self.criterion, self.output_fn, params, self._model_loss, measures
        )
        self._log, self._memory, self._multiplier = Log(), Memory(), MultiplierCheck()
        self._gradient_scale = GradientScale(params())
        self._indivisible, self._reduction, self._to_say = False, None, ""
        self._checks = {}


def _of_all_ranks(
    seen: Measurement, predicted: Tensor | None, ranks: list[Any]
) -> tuple[Measurement, Tensor | None]:
    """Means over the ranks: of what this one has measured, and of ``⟨∂h/∂F, v⟩``."""
    if not ranks:
        return seen, predicted
    assert seen.curvature is not None
    assert seen.loss_per_nat is not None
    assert seen.finite is not None
    known = torch.full_like(seen.slope, math.nan) if predicted is None else predicted
    sure = torch.ones_like(seen.finite) if seen.trusted is None else seen.trusted
    # (Of independent ranks the mean of these, squared, is the variance of the mean.)
    spread = torch.zeros_like(seen.slope) if seen.spread is None else seen.spread
    slope, squared_norm, curvature, per_nat, finite, sure, spread, known = distributed.mean(
        (
            seen.slope,
            seen.squared_norm,
            seen.curvature,
            seen.loss_per_nat,
            seen.finite.to(seen.slope),
            sure.to(seen.slope),
            spread,
            known,
        ),
        ranks,
    )
    joint = Measurement(slope, squared_norm, curvature, per_nat, finite == 1, sure == 1, spread)
    return joint, None if predicted is None else known
