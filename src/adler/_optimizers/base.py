"""What all optimizers of this library share: everything but the direction of the step.

The class is thin: `capture` knows the batch, `measurement` measures, `search` decides, `update`
moves the parameters. What is kept between steps lives in the param groups.
"""

from __future__ import annotations

import copy
import math
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from adler import _distributed as distributed
from adler import _tensors as update
from adler import losses
from adler._averaging import DiscountedMean
from adler._carried import CARRIED, Carried, completed
from adler._optimizers import options as hyperparameters
from adler._optimizers.direction import Direction
from adler._optimizers.record import Log, StepRecord
from adler._optimizers.step_counts import Attendance
from adler._recording.model_loss import ModelLoss
from adler._recording.recorder import RecordedLoss, Recorder
from adler._recording.replay import is_capturing, unwrap
from adler._recording.subbatch import part
from adler._step_length import Guard, Measurement, StepLength, remembered_step_length, step_length
from adler.curvature.measurement import BatchCurvature, batch_curvature

__all__ = ["SHARED", "MeasuredOptimizer"]

Self = TypeVar("Self", bound="MeasuredOptimizer")

# One step length serves all groups, so these have one value.
SHARED = (
    "beta",
    "eps",
    "trust_region",
    "max_kl",
    "max_relative_change",
    "jvp",
    "curvature_every",
    "curvature_fraction",
    "curvature_warmup",
)
# What `MeasuredOptimizer.low_cost` sets.
LOW_COST = {
    "jvp": "finite_difference",
    "curvature_fraction": 0.25,
    "curvature_every": 8,
    "curvature_warmup": 100,
}
# How far a finite difference may be from the slope that backpropagation found.
_INCONSISTENCY = 0.2


class MeasuredOptimizer(Optimizer):
    """An optimizer that measures the length of its step along a direction that a subclass gives.

    Subclasses say along what to search and to move (`_direction`), how rates are averaged
    (``_mean``) and what takes the place of the loss Hessian (`_loss_hessian`).

    Args:
        params: Parameters of ``model``, or groups of them, with or without names.
        model: The network whose outputs the loss sees.
        criterion: The loss, reduced to a scalar, or a `ModelLoss`.
        options: Defaults of the param groups.
        output_fn: Maps what the model returns to the tensor that the criterion receives.
    """

    _mean: ClassVar[DiscountedMean]
    _shared: ClassVar[tuple[str, ...]] = SHARED

    def __init__(
        self,
        params: ParamsT,
        model: nn.Module,
        criterion: Callable[..., Tensor] | ModelLoss,
        options: dict[str, Any],
        output_fn: Callable[[Any], Tensor] | None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        distributed.refuse(model)
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
        self.model, self.criterion, self.output_fn = model, criterion, output_fn
        self._hessian = self._loss_hessian()  # refuses reduction="none"
        hyperparameters.check(options)
        self._names = _names_of(model)
        self._attendance = Attendance()
        super().__init__(params, options)
        self._attach()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """GradScaler then hands over its scale instead of unscaling behind our back.

        Lightning asks too, and would refuse to clip gradients. Told no, it has the scaler unscale
        them first, which the scaler then tells us.
        """
        asks = str(sys._getframe(1).f_globals.get("__name__", ""))
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
            ValueError: If explicit targets do not fit the outputs, or ``curvature_fraction`` meets
                a batch that it cannot divide.
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
        for group in self.param_groups:
            hyperparameters.check(group)
            self._check_shared(group)
        shared = self.param_groups[0]
        average, _, remembered, steps = Carried.of(shared)
        every = 1 if steps < shared["curvature_warmup"] else shared["curvature_every"]
        measures = steps % every == 0
        params, gradients = self._gradients()
        if inputs is None and targets is None and self._only_makes_state(params, gradients):
            return loss
        ranks = distributed.groups_of(self._recorder.ddp, list(self._names))
        batch = self._batch(inputs, targets) if measures else []  # raises before anything changes
        untouched = self._recorder.untouched()
        scale, veto = self._amp_unscale(gradients)
        course = self._direction(params, gradients, batch, scale)
        direction = course.along
        guard = Guard(*(shared[key] for key in Guard._fields))
        reach: Tensor | None = None
        if guard.max_relative_change is None:
            squared_norm = update.squared_norm(direction, self._home)
        else:
            squared_norm, reach = update.squared_norm_and_reach(params, direction, self._home)
        plain = direction is gradients
        slope = squared_norm if plain else update.dot(gradients, direction, self._home)
        curvature = consistency = torch.full_like(squared_norm, math.nan)
        trusted: Tensor | None = None
        if measures:
            measured = course.curvature or self._measure(
                batch, params, direction, slope, squared_norm, scale
            )
            finite = measured.finite if veto is None else measured.finite & ~veto
            seen, predicted = _of_all_ranks(
                Measurement(slope, measured.value, squared_norm, measured.nat, reach, finite),
                measured.slope,
                ranks,
            )
            slope, curvature = seen.slope, seen.curvature
            if predicted is not None and untouched:
                consistency = predicted / slope
                if measured.engine == "finite_difference":
                    # (A NaN is for the search to find.)
                    trusted = ~((consistency - 1).abs() > _INCONSISTENCY)
            found, average = step_length(
                seen._replace(trusted=trusted),
                average,
                self._mean,
                guard,
                # The average forgets by steps, not by measurements.
                beta=shared["beta"] ** every,
                eps=shared["eps"],
                remembered=remembered,
                # As many parts as make one batch.
                smoothing=1 - shared["curvature_fraction"],
            )
        else:
            if veto is not None:
                slope = torch.where(veto, math.nan, slope)
            slope, squared_norm = distributed.mean((slope, squared_norm), ranks)
            found = remembered_step_length(
                slope,
                squared_norm,
                reach,
                remembered,
                average,
                self._mean,
                guard,
                eps=shared["eps"],
            )
        self._apply(found, course)
        carried = Carried(average, found.minibatch_lr, found.remembered, steps + 1)
        for group in self.param_groups:
            group.update(carried.entries())
        self._log.write(found, slope, curvature, consistency, trusted)
        self._recorder.clear()
        return loss

    def _direction(
        self,
        params: list[Tensor],
        gradients: list[Tensor],
        batch: list[RecordedLoss],
        scale: Tensor | None,
    ) -> Direction:
        """What this step goes along; ``batch`` is empty where the step does not measure."""
        return Direction(gradients)

    def _gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """Parameters with a gradient, and the gradients."""
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
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
        return True

    def _make_state(self, params: list[Tensor]) -> None:
        """Creates what a step would create for parameters that it sees first."""

    def _batch(self, inputs: Any, targets: Any) -> list[RecordedLoss]:
        if targets is not None:
            batch = self._recorder.explicit(inputs, targets)
        elif inputs is not None:
            raise ValueError("step(inputs=...) needs targets= too: what the criterion receives")
        else:
            batch = self._recorder.losses()
        return part(batch, self.param_groups[0]["curvature_fraction"], self.criterion)

    def _measure(
        self,
        batch: list[RecordedLoss],
        params: list[Tensor],
        direction: list[Tensor],
        slope: Tensor,
        squared_norm: Tensor,
        scale: Tensor | None,
        hessian: losses.LossHessian | None = None,
    ) -> BatchCurvature:
        """The batch's curvature; remembers a fallback from the forward engine."""
        shared = self.param_groups[0]
        average, minibatch_lr, _, _ = Carried.of(shared)
        rate = self._mean.read(average)
        # Even a distrusted measurement tells the next one how far to look.
        rate = torch.where(rate > 0, rate, minibatch_lr)
        names = [self._names[p] for p in params]
        found = batch_curvature(
            batch,
            dict(zip(names, params, strict=True)),
            dict(zip(names, direction, strict=True)),
            self.criterion,
            self._hessian if hessian is None else hessian,
            jvp=shared["jvp"],
            squared_norm=squared_norm,
            slope=slope,
            rate=rate,
            wants_nat=shared["max_kl"] is not None,
            amp_scale=scale,
        )
        self._remember_engine(found.engine)
        return found

    def _remember_engine(self, engine: str) -> None:
        for group in self.param_groups:
            group["jvp"] = engine

    def _apply(self, found: StepLength, course: Direction) -> None:
        for group in self.param_groups:
            lr = group["lr"]
            rate = found.rate * (lr.to(found.rate).squeeze() if isinstance(lr, Tensor) else lr)
            group["effective_lr"] = rate
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                course.descend(group, params, rate, found.skipped)
        course.settle(found.skipped)

    def _amp_unscale(self, gradients: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """Takes over from a GradScaler: its scale (unscales in place), and whether it vetoes."""
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None:
            return None, None
        scale = getattr(self, "grad_scale", None)
        if scale is not None:
            for gradient in distributed.local(gradients):
                gradient.div_(scale.to(gradient.device))
        else:
            scale = torch.full((), math.nan, device=self._home)  # unscaled by the user
        return scale.to(self._home), found_inf.to(self._home).bool().squeeze()

    @classmethod
    def low_cost(
        cls: type[Self],
        params: ParamsT,
        model: nn.Module,
        criterion: Callable[..., Tensor],
        **overrides: Any,
    ) -> Self:
        """Measures rarely and on a part of the batch: a few percent above SGD's step.

        ``jvp="finite_difference"``, ``curvature_fraction=1/4``, ``curvature_every=8`` after the
        first hundred steps, all of which measure: on the plateau where a network starts, a ratio
        that is eight steps old says nothing of what comes next, and could kill every unit. A part's
        finite difference runs two forward passes without gradients on it (see
        `adler._recording.subbatch`): two thirds of a quarter of a step, every eighth step, or 2 %
        of SGD's. Four parts make one
        batch, so the curvature is averaged over the last 32 steps, and the rate over the last
        hundred as always. Between measurements the bounds follow the present gradient.

        Args:
            params: See the class.
            model: See the class.
            criterion: See the class.
            **overrides: Keyword arguments of the class, in place of these.

        Examples:
            >>> from adler import Adler
            >>> model, criterion = nn.Linear(4, 3), nn.CrossEntropyLoss()
            >>> Adler.low_cost(model.parameters(), model, criterion).defaults["curvature_every"]
            8
        """
        return cls(params, model, criterion, **{**LOW_COST, **overrides})

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

    # --- the contract of torch.optim.Optimizer ---------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zeroes the gradients, and forgets the batches that made them."""
        super().zero_grad(set_to_none)
        self._recorder.forget_backpropagated()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters of the model, with its own ``lr`` and ``weight_decay``.

        Raises:
            ValueError: If a parameter is not the model's, or a shared option differs.
        """
        if isinstance(param_group, dict) and "params" in param_group:
            param_group = {**param_group, "params": _as_list(param_group["params"])}
            self._check_group(param_group)
            if self.param_groups:
                shared = {key: self.param_groups[0][key] for key in self._shared}
                param_group = {**shared, **param_group}
        super().add_param_group(param_group)
        group, first = self.param_groups[-1], self.param_groups[0]
        if group is first:
            first.update(Carried.fresh(self._home).entries())
        group.update({key: first[key] for key in CARRIED})
        group.setdefault("effective_lr", torch.zeros_like(first["rate_total"]))

    def _check_group(self, group: Mapping[str, Any]) -> None:
        # A scheduler made in the middle of training needs initial_lr.
        known = {"params", "param_names", "effective_lr", "initial_lr"}
        allowed = {*known, *self.defaults, *CARRIED}
        if unknown := sorted(group.keys() - allowed):
            raise ValueError(
                f"unknown option {unknown[0]!r} in a parameter group: a group may set {self._own}"
            )
        hyperparameters.check({**self.defaults, **group})
        self._check_shared(group)
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

    def _check_shared(self, group: Mapping[str, Any]) -> None:
        shared = self.param_groups[0] if self.param_groups else self.defaults
        for key in self._shared:
            if group.get(key, shared[key]) != shared[key]:
                raise ValueError(
                    f"{key}={group[key]!r} in a parameter group: one step length serves all "
                    f"groups, so {key} is the optimizer's ({shared[key]!r}); only {self._own} may "
                    "differ"
                )

    @property
    def _own(self) -> str:
        """What a group may set."""
        return ", ".join(sorted(self.defaults.keys() - set(self._shared)))

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
        return "\n".join([*lines, ")"])

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the hooks, which are made anew."""
        kept = ("model", "criterion", "output_fn", "_model_loss")
        return {**super().__getstate__(), **{key: self.__dict__[key] for key in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # the base class adds what is no option here
        if "model" in state:  # a copy or a pickle; otherwise load_state_dict
            self._hessian = self._loss_hessian()
            self._names = _names_of(self.model)
            self._attach()
        self._attendance = Attendance()
        first = self.param_groups[0]
        carried = completed(first, self._home)
        for group in self.param_groups:
            group.pop("rate_bound", None)  # of old checkpoints
            for key, default in self.defaults.items():
                group.setdefault(key, first.get(key, default))
            group.update(carried)
            group["effective_lr"] = torch.as_tensor(group.get("effective_lr", 0.0)).to(
                carried["rate_total"]
            )

    def _attach(self) -> None:
        """Hooks the model and the criterion; the hooks do not keep the optimizer alive."""
        me = weakref.ref(self)

        def params() -> Iterable[Tensor]:
            alive = me()
            groups = [] if alive is None else alive.param_groups
            return (p for group in groups for p in group["params"])

        self._recorder = Recorder(
            self.model, self.criterion, self.output_fn, params, self._model_loss
        )
        self._log = Log()

    @property
    def _home(self) -> torch.device:
        """Where the scalars live: with the first parameter."""
        everything = (p for group in self.param_groups for p in group["params"])
        return next((p.device for p in everything), torch.device("cpu"))


def _of_all_ranks(
    seen: Measurement, predicted: Tensor | None, ranks: list[Any]
) -> tuple[Measurement, Tensor | None]:
    """Means over the ranks: of what this one has measured, and of ``⟨∂h/∂F, v⟩``."""
    if not ranks:
        return seen, predicted
    known = torch.full_like(seen.slope, math.nan) if predicted is None else predicted
    slope, curvature, squared_norm, nat, finite, known = distributed.mean(
        (*seen[:4], seen.finite.to(seen.slope), known), ranks
    )
    joint = Measurement(slope, curvature, squared_norm, nat, seen.reach, finite == 1)
    return joint, None if predicted is None else known


def _names_of(model: nn.Module) -> dict[Tensor, str]:
    return {p: name for name, p in unwrap(model).named_parameters()}


def _as_list(params: Any) -> Any:
    """A list, so that looking at the parameters does not use an iterator up."""
    if isinstance(params, Tensor):
        return [params]
    return params if isinstance(params, (set, list, tuple)) else list(params)
