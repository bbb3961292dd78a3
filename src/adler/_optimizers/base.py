"""What all optimizers of this library share: everything but the direction of the step.

`MeasuredOptimizer.step` is five stages: what made the gradient (`adler._recording`), where to go (a
`Direction`), what the batch says along it (`adler.curvature.measurement`), how far
(`adler._step_length`), and going there. What is kept between steps is one
`adler._step_length.SearchState`, which lives in the param groups, and so in checkpoints.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from adler import _distributed as distributed
from adler import _options, losses
from adler._averaging import DiscountedMean
from adler._optimizers.clipping import GradientScale
from adler._optimizers.cycled_momentum import OwnMomenta
from adler._optimizers.direction import Direction, Reach, keep_initial_sizes
from adler._optimizers.multiplier import MultiplierCheck
from adler._optimizers.record import Log, StepRecord
from adler._optimizers.step_counts import StepCounts
from adler._options import Guard, Measure
from adler._recording.model_loss import ModelLoss
from adler._recording.recorder import RecordedLoss, Recorder
from adler._recording.replay import is_capturing, unwrap
from adler._recording.subbatch import IndivisibleError, take_first
from adler._step_length import (
    ENTRIES,
    Measurement,
    Rule,
    SearchState,
    StepLength,
    step_length,
)
from adler._warning import warn
from adler.curvature.measurement import BatchCurvature, batch_curvature
from adler.curvature.trust import Memory

__all__ = ["MeasuredOptimizer"]

Self = TypeVar("Self", bound="MeasuredOptimizer")


class _Scaling(NamedTuple):
    """What a GradScaler asks of a step: its scale (NaN: unscaled by the user), and its veto."""

    scale: Tensor | None = None
    veto: Tensor | None = None


class MeasuredOptimizer(Optimizer):
    """An optimizer that measures the length of its step along a direction that a subclass gives.

    Subclasses say along what to search and to move (`_direction`), how rates are averaged
    (``_mean``) and what takes the place of the loss Hessian (`_loss_hessian`).

    Args:
        params: Parameters of ``model``, or groups of them, with or without names, or an optimizer
            whose groups and weight decays to take.
        model: The network whose outputs the loss sees.
        criterion: The loss, reduced to a scalar, or a `ModelLoss`.
        options: Defaults of the param groups: what may differ from group to group.
        beta: Discount of the average of rates.
        eps: Bounds a minibatch's rate by its inverse.
        guard: How long a step may be.
        measure: How, and how often, curvature is measured.
        output_fn: Maps what the model returns to the tensor that the criterion receives.
    """

    _mean: ClassVar[DiscountedMean]
    _checks: Mapping[str, Tensor]
    _indivisible: bool
    _to_say: str

    def __new__(cls: type[Self], *_: Any, **options: Any) -> Self:
        """Refuses unknown options by name, and says where one is that has moved."""
        _options.check_moved(cls, options)
        return super().__new__(cls)

    def __init__(
        self,
        params: ParamsT | Optimizer,
        model: nn.Module,
        criterion: Callable[..., Tensor] | ModelLoss,
        options: dict[str, Any],
        *,
        beta: float,
        eps: float,
        guard: Guard | None,
        measure: Measure,
        output_fn: Callable[[Any], Tensor] | None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        distributed.check_supported(model)
        self._model_loss: ModelLoss | None = None
        if isinstance(criterion, ModelLoss):
            if output_fn is not None:
                raise ValueError("output_fn: the ModelLoss has outputs= already; pass only one")
            self._model_loss, output_fn = criterion, criterion.outputs
            criterion = criterion.criterion
        if not callable(criterion):
            raise TypeError(f"criterion: expected a loss, got {type(criterion).__name__}")
        if output_fn is not None and not callable(output_fn):
            raise TypeError(f"output_fn: expected a function, got {type(output_fn).__name__}")
        if guard is not None and not isinstance(guard, Guard):
            raise TypeError(f"guard: expected an adler.Guard or None, got {type(guard).__name__}")
        if not isinstance(measure, Measure):
            raise TypeError(f"measure: expected an adler.Measure, got {type(measure).__name__}")
        self.model, self.criterion, self.output_fn = model, criterion, output_fn
        self.beta, self.eps, self.guard, self.measure = beta, eps, guard, measure
        self._hessian = self._loss_hessian()  # refuses reduction="none"
        _options.check({"beta": beta, "eps": eps, **options})
        self._names = _names_of(model)
        self._step_counts = StepCounts()
        if isinstance(params, Optimizer):
            params = _groups_of(params, options)
        super().__init__(params, options)
        self._attach()

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
        params, gradients = self._gradients()
        if inputs is None and targets is None and self._only_makes_state(params, gradients):
            return loss
        state = SearchState.of(self.param_groups[0], self._scalar_device)
        self._multiplier.observe(self.param_groups, state.steps)
        measures = self.measure.is_due(state.steps)
        # What can be refused is refused before anything changes.
        ranks = distributed.process_groups(self._recorder.ddp, list(self._names))
        batch = self._batch(inputs, targets) if measures else None
        unmodified = self._recorder.gradients_unmodified()
        multiplied = self._gradient_scale.factor()
        scaling = self._amp_unscale(gradients)
        direction = self._direction(params, gradients)
        try:
            seen, consistency = self._look(
                batch, params, gradients, direction, state, scaling, ranks, unmodified, multiplied
            )
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
        # The average forgets by steps, not by measurements; parts of as many as make one batch.
        fraction = 1.0 if self._indivisible else self.measure.fraction
        beta, smoothing = self.beta ** self.measure.interval(steps), 1 - fraction
        return Rule(self._mean, beta, self.eps, self.guard, smoothing)

    def _look(
        self,
        batch: list[RecordedLoss] | None,
        params: list[Tensor],
        gradients: list[Tensor],
        direction: Direction,
        state: SearchState,
        scaling: _Scaling,
        ranks: list[Any],
        unmodified: bool,
        multiplied: Tensor | None,
    ) -> tuple[Measurement, Tensor]:
        """What this step knows along its direction, and how well the measurement fits ``g·d``.

        Args:
            batch: What made the gradient; None: this step does not measure curvature.
            params: Those with a gradient.
            gradients: Theirs, unscaled.
            direction: Of the step.
            state: After the step before.
            scaling: Of a GradScaler.
            ranks: Process groups to agree with.
            unmodified: Whether the gradients are as the backward pass left them.
            multiplied: By what the loop has multiplied them; see `GradientScale`.
        """
        look = direction.look(gradients, self._scalar_device, measured=batch is not None)
        slope, squared_norm, lengths = look
        along = direction.along
        if self.guard is not None and self.guard.max_relative_change is not None:
            fraction = self.guard.max_relative_change
            direction.reach = Reach(params, along, lengths, fraction, self.state)
        if multiplied is not None and direction.scale_free:
            slope = slope / _clipped(multiplied.to(slope), scaling)
        unknown = torch.full_like(slope, math.nan)
        if batch is None:
            if scaling.veto is not None:
                slope = torch.where(scaling.veto, math.nan, slope)
            slope, squared_norm = distributed.mean((slope, squared_norm), ranks)
            return Measurement(slope, squared_norm), unknown
        expected = slope if unmodified and not ranks else None
        measured = self._measure(
            batch, params, along, slope, squared_norm, state, scaling.scale, expected
        )
        self._checks = measured.checks
        finite = measured.finite if scaling.veto is None else measured.finite & ~scaling.veto
        trusted = measured.trusted
        seen, predicted = _of_all_ranks(
            Measurement(
                slope, squared_norm, measured.value, measured.loss_per_nat, finite, trusted
            ),
            measured.slope,
            ranks,
        )
        if predicted is None or not unmodified:
            return seen, unknown
        consistency = predicted / seen.slope
        if ranks:  # only together do they know ``g·d``
            within = measured.within
            fits = ~((consistency - 1).abs() > within)  # (a NaN is for the search to find)
            self._checks = {**measured.checks, "slope": fits}
            seen = seen._replace(trusted=fits if seen.trusted is None else seen.trusted & fits)
        return seen, consistency

    def _gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """Parameters with a gradient, and the gradients."""
        groups = [group for group in self.param_groups if _moves(group)] or self.param_groups
        params = [p for group in groups for p in group["params"] if _has_gradient(p)]
        if not params:
            raise RuntimeError(
                "step(): no parameter has a gradient: call loss.backward() before step(), on a "
                "loss that depends on the parameters given to the optimizer"
            )
        if any(p.grad.is_sparse for p in params if p.grad is not None):
            raise RuntimeError(
                "step(): sparse gradients are not supported: build the embedding with sparse=False"
            )
        return params, [p.grad for p in params if p.grad is not None]

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

    def _batch(self, inputs: Any, targets: Any) -> list[RecordedLoss]:
        if targets is not None:
            batch = self._recorder.explicit(inputs, targets)
        elif inputs is not None:
            raise ValueError("step(inputs=...) needs targets= too: what the criterion receives")
        else:
            batch = self._recorder.losses()
        if self._indivisible:
            return batch
        try:
            return take_first(batch, self.measure.fraction, self.criterion)
        except IndivisibleError as error:
            self._indivisible = True
            self._to_say = f"curvature is measured on whole batches, which costs more: {error}"
            return batch

    def _measure(
        self,
        batch: list[RecordedLoss],
        params: list[Tensor],
        along: list[Tensor],
        slope: Tensor,
        squared_norm: Tensor,
        state: SearchState,
        scale: Tensor | None,
        expected: Tensor | None,
    ) -> BatchCurvature:
        """The batch's curvature; remembers a fallback from the forward engine.

        Args:
            batch: What made the gradient.
            params: Those with a gradient.
            along: The direction.
            slope: ``g·d``.
            squared_norm: ``d·d``.
            state: After the step before.
            scale: Of a GradScaler.
            expected: ``g·d``, where the gradient is as this batch's backward pass left it.
        """
        rate = self._mean.read(state.rates)
        # Even a distrusted measurement tells the next one how far to look.
        rate = torch.where(rate > 0, rate, state.minibatch_lr)
        names = [self._names[p] for p in params]
        found = batch_curvature(
            batch,
            dict(zip(names, params, strict=True)),
            dict(zip(names, along, strict=True)),
            self.criterion,
            self._hessian,
            jvp=self.measure.jvp,
            squared_norm=squared_norm,
            slope=slope,
            rate=rate,
            needs_kl_scale=self._needs_kl_scale,
            amp_scale=scale,
            expected=expected,
            substitute=self.guard is not None,
            alone=not distributed.process_groups(self._recorder.ddp, list(self._names)),
            memory=self._memory,
        )
        self._remember_engine(found.engine)
        return found

    @property
    def _needs_kl_scale(self) -> bool:
        return self.guard is not None and self.guard.max_kl is not None

    def _remember_engine(self, engine: str) -> None:
        if engine != self.measure.jvp:
            self.measure = dataclasses.replace(self.measure, jvp=engine)

    def _descend(self, found: StepLength, direction: Direction) -> None:
        nothing_moves = not any(_moves(group) for group in self.param_groups)
        for group in self.param_groups:
            lr = group["lr"]
            rate = found.rate * (lr.to(found.rate).squeeze() if isinstance(lr, Tensor) else lr)
            group["effective_lr"] = rate
            params = [p for p in group["params"] if _has_gradient(p)]
            if params and (_moves(group) or nothing_moves):
                direction.descend(group, params, rate, found.skipped)
        direction.finish(found.skipped)

    def _amp_unscale(self, gradients: list[Tensor]) -> _Scaling:
        """Takes over from a GradScaler: unscales in place, unless the user has."""
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None:
            return _Scaling()
        scale, home = getattr(self, "grad_scale", None), self._scalar_device
        if scale is not None:
            for gradient in distributed.local(gradients):
                gradient.div_(scale.to(gradient.device))
        else:
            scale = getattr(self, "_scaler_scale", None)
            if not isinstance(scale, Tensor):
                scale = torch.full((), math.nan, device=home)
        return _Scaling(scale.to(home), found_inf.to(home).bool().squeeze())

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
        eighth step: 2 % of SGD's time. Under bfloat16 its curvatures are off by up to 30 %.

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

    # --- the contract of torch.optim.Optimizer ---------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zeroes the gradients, and forgets the batches that made them."""
        super().zero_grad(set_to_none)
        self._recorder.forget_backpropagated()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters of the model, with its own ``lr`` and ``weight_decay``.

        Raises:
            ValueError: If a parameter is not the model's, or an option is not a group's.
        """
        if isinstance(param_group, dict) and "params" in param_group:
            param_group = {**param_group, "params": _as_list(param_group["params"])}
            self._check_group(param_group)
        super().add_param_group(param_group)
        group, first = self.param_groups[-1], self.param_groups[0]
        if group is first:
            first.update(SearchState.empty(self._scalar_device).entries())
        group.update({key: first[key] for key in ENTRIES})
        group.setdefault("effective_lr", torch.zeros_like(first["rate_total"]))

    def _check_group(self, group: Mapping[str, Any]) -> None:
        # A scheduler made in the middle of training needs initial_lr.
        known = {"params", "param_names", "effective_lr", "initial_lr"}
        allowed = {*known, *self.defaults, *ENTRIES}
        if unknown := sorted(group.keys() - allowed):
            raise ValueError(
                f"{unknown[0]!r} is no option of a parameter group: one step length serves all "
                f"groups, and a group may set {', '.join(sorted(self.defaults))}"
            )
        _options.check({**self.defaults, **group})
        names = self._names
        for entry in group["params"]:
            parameter = entry[1] if isinstance(entry, tuple) else entry
            if not isinstance(parameter, Tensor):
                continue  # the base class says so
            if parameter.layout != torch.strided:
                raise TypeError("params: sparse parameters are not supported")
            if parameter.is_complex():
                raise TypeError("params: complex parameters are not supported")
            if parameter not in names:
                names = self._names = _names_of(self.model)  # the model may have grown
            if parameter not in names:
                raise ValueError(
                    f"params: a parameter of shape {tuple(parameter.shape)} is not a parameter of "
                    "the model given to the optimizer; the curvature needs the model that holds it"
                )

    def __deepcopy__(self: Self, memo: dict[int, Any]) -> Self:
        """A twin on the copied model; a criterion without parameters is shared with the loop."""
        if not (
            isinstance(self.criterion, nn.Module) and any(True for _ in self.criterion.parameters())
        ):
            memo.setdefault(id(self.criterion), self.criterion)
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def __repr__(self) -> str:
        """The options, without the state."""
        lines = [f"{type(self).__name__} ("]
        for number, group in enumerate(self.param_groups):
            lines.append(f"Parameter Group {number}")
            for key in sorted(self.defaults):
                value = group[key]
                shown = float(value) if isinstance(value, Tensor) else value
                lines.append(f"    {key}: {shown}")
        shared = [f"{name}: {getattr(self, name)}" for name in self._shared_options()]
        return "\n".join([*lines, *shared, ")"])

    def state_dict(self) -> dict[str, Any]:
        """As any optimizer's, and under ``"search"`` the options that all groups share.

        They are plain numbers, strings and dictionaries.
        """
        self._momenta.put_back(self.param_groups)
        return {**super().state_dict(), "search": self._shared_options()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads state, groups and shared options: what the checkpoint holds is what counts.

        Raises:
            ValueError: If the groups or the options are others, or those of an optimizer that does
                not measure; nothing has changed then.
        """
        own = dict(state_dict)
        for group in own.get("param_groups", ()):
            if not set(ENTRIES) & set(group):
                raise ValueError(
                    f"loaded state dict is not that of an optimizer of adler: its lr="
                    f"{group.get('lr')!r} would multiply the measured rate, not set it. Start "
                    f"{type(self).__name__} afresh on the trained weights"
                )
        # A tool may save no more than state and groups.
        shared = dict(own.pop("search", None) or {})
        if unknown := sorted(shared.keys() - self._shared_options().keys()):
            raise ValueError(
                f"loaded state dict: {unknown[0]!r} is no option of {type(self).__name__}"
            )
        for name, kind in (("guard", Guard), ("measure", Measure)):
            if name in shared:
                shared[name] = _options.from_plain(kind, shared[name])
        super().load_state_dict(own)
        self._momenta.note(self.param_groups)
        for name, value in shared.items():
            setattr(self, name, value)

    def _shared_options(self) -> dict[str, Any]:
        return {
            "beta": self.beta,
            "eps": self.eps,
            "guard": _options.plain(self.guard),
            "measure": _options.plain(self.measure),
        }

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the hooks, which are made anew."""
        self._momenta.put_back(self.param_groups)
        kept = ("model", "criterion", "output_fn", "_model_loss", *self._shared_options())
        return {**super().__getstate__(), **{key: self.__dict__[key] for key in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # the base class adds what is no option here
        if "model" in state:  # a copy or a pickle; otherwise load_state_dict
            self._hessian = self._loss_hessian()
            self._names = _names_of(self.model)
            self._attach()
        self._step_counts = StepCounts()
        first = self.param_groups[0]
        search = SearchState.of(first, self._scalar_device)
        for group in self.param_groups:
            for key, default in self.defaults.items():
                group.setdefault(key, first.get(key, default))
            group.update(search.entries())
            like, rate = search.minibatch_lr, group.get("effective_lr", 0.0)
            group["effective_lr"] = torch.as_tensor(rate, dtype=like.dtype, device=like.device)

    def _attach(self) -> None:
        """Hooks the model and the criterion; the hooks do not keep the optimizer alive."""
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
        self._momenta = OwnMomenta(self.param_groups)
        self._gradient_scale = GradientScale(params())
        self._indivisible, self._to_say = False, ""
        self._checks = {}

    @property
    def _scalar_device(self) -> torch.device:
        """Where the scalars live: with the first parameter."""
        everything = (p for group in self.param_groups for p in group["params"])
        return next((p.device for p in everything), torch.device("cpu"))


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
    slope, squared_norm, curvature, per_nat, finite, sure, known = distributed.mean(
        (
            seen.slope,
            seen.squared_norm,
            seen.curvature,
            seen.loss_per_nat,
            seen.finite.to(seen.slope),
            sure.to(seen.slope),
            known,
        ),
        ranks,
    )
    joint = Measurement(slope, squared_norm, curvature, per_nat, finite == 1, sure == 1)
    return joint, None if predicted is None else known


def _clipped(multiplied: Tensor, scaling: _Scaling) -> Tensor:
    """By what the loop has clipped the gradients, apart from a GradScaler's scale; 1: not known."""
    if scaling.scale is not None:
        multiplied = multiplied * scaling.scale.to(multiplied)
    return torch.where(multiplied > 0, multiplied, torch.ones_like(multiplied))


def _moves(group: Mapping[str, Any]) -> bool:
    """Whether the group's multiplier is not zero, as far as the host knows."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        return lr.device.type != "cpu" or bool(lr.detach().numpy().any())
    return bool(lr != 0)


def _has_gradient(p: Tensor) -> bool:
    """One that was frozen may hold an old one."""
    return p.grad is not None and p.requires_grad


def _names_of(model: nn.Module) -> dict[Tensor, str]:
    return {p: name for name, p in unwrap(model).named_parameters()}


def _groups_of(other: Optimizer, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Groups as another optimizer has them, with its weight decay and nothing else of it.

    Raises:
        ValueError: If there are two weight decays, or it has one and this optimizer cannot.
    """
    if options.get("weight_decay", 0) != 0:
        raise ValueError(
            f"weight_decay={options['weight_decay']}: the groups of the {type(other).__name__} "
            "given as params have theirs; pass its parameters, or no weight_decay"
        )
    groups = []
    for group in other.param_groups:
        decay = group.get("weight_decay", 0)
        if decay and "weight_decay" not in options:
            raise ValueError(
                f"params: {type(other).__name__} has weight_decay={decay}, which this optimizer "
                "does not have: pass its parameters"
            )
        params = group["params"]
        if "param_names" in group:
            params = list(zip(group["param_names"], params, strict=True))
        own = {"weight_decay": float(decay)} if "weight_decay" in options else {}
        groups.append({"params": params, **own})
    return groups


def _as_list(params: Any) -> Any:
    """A list, so that looking at the parameters does not use an iterator up."""
    if isinstance(params, Tensor):
        return [params]
    return params if isinstance(params, (set, list, tuple)) else list(params)
