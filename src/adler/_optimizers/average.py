"""Which point the parameters are: where gradients are taken, or the average of the iterates.

While training, the parameters are $y$ (`adler._optimizers.interpolation`). They follow the model's
mode (`adler._optimizers.mode`): ``model.eval()`` puts the average $x$ in their place, for calls of
the model, of its other methods and of the modules within it, and the next call in training mode,
with gradients, finds $y$. A model that was last trained in evaluation mode says nothing by it:
there $x$ comes with the first call without gradients. BatchNorm's running statistics follow
(`adler._optimizers.running_statistics`).

What is saved follows too. The model's ``state_dict()`` holds $x$ whatever the parameters are, and
the optimizer's holds $z$ and $y$: a run that is resumed from both goes on bit for bit. Once another
optimizer trains the parameters, or this one is gone, they are $x$.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT
from torch.utils.hooks import RemovableHandle

from adler import _distributed as distributed
from adler import _options
from adler._optimizers import mode, points
from adler._optimizers.base import MeasuredOptimizer
from adler._optimizers.direction import Direction
from adler._optimizers.edits import Edits, equal, loaded
from adler._optimizers.interpolation import Interpolation, fast_state
from adler._optimizers.running_statistics import RunningStatistics
from adler._optimizers.saving import SavedWeights
from adler._optimizers.steps_of_others import StepsOfOthers
from adler._options import Search
from adler._recording.hooks import ForwardHook, Hook, remove_all
from adler._recording.model_loss import ModelLoss
from adler._recording.replay import is_capturing, is_replaying
from adler._step_length import StepLength
from adler._unwrap import unwrap
from adler._warning import warn

__all__ = ["AveragedOptimizer", "Following"]


_MIXED = (
    "interpolation: either all groups keep an average, or none does; pass it to the constructor"
)


@dataclass(frozen=True)
class Following:
    """How the weights of a model follow its mode.

    Attributes:
        follow_mode: Whether the weights follow the model's mode, and its ``state_dict()`` is of the
            average; if not, only `eval` and `train` place them.
        bn_batches: How many batches of training are kept to find running statistics at the average.

    Raises:
        ValueError: If ``bn_batches`` is no whole number of at least 0.
    """

    follow_mode: bool
    bn_batches: int

    def __post_init__(self) -> None:
        _options.check({"bn_batches": self.bn_batches})


class AveragedOptimizer(MeasuredOptimizer):
    """A measured optimizer that may test and keep the average of its iterates.

    Subclasses give the direction (`_inner_direction`) and say how near to the average the gradient
    is taken (`_interpolation`).

    The arguments are those of `MeasuredOptimizer`, and how the average is followed.

    Attributes:
        follow_mode: See `Following`.
        bn_batches: See `Following`.
    """

    _edits: Edits
    _placed: dict[int, float]  # β of the averages that are in place
    _unreconciled: bool
    _statistics: RunningStatistics
    _weights: SavedWeights
    _handles: list[RemovableHandle | mode.Follower | StepsOfOthers]
    _group_of: dict[int, int]
    _trains_in_eval: bool
    _only_by_mode: bool
    _said_of_gradients: bool

    def __init__(
        self,
        params: ParamsT | Optimizer,
        model: nn.Module,
        criterion: Callable[..., Tensor] | ModelLoss,
        output_fn: Callable[[Any], Tensor] | None,
        options: dict[str, Any],
        search: Search,
        following: Following,
    ) -> None:
        self.follow_mode, self.bn_batches = following.follow_mode, following.bn_batches
        super().__init__(params, model, criterion, output_fn, options, search)

    def eval(self) -> None:
        """Puts the averages in place of the parameters. Without effect when they are there.

        Running statistics of normalisation layers are found anew at the averages, by forward passes
        on at most ``bn_batches`` batches that training has seen since the last time.

        Weights that were loaded or edited since the last step are taken as they are: they become
        the average, and training goes on from them.
        """
        self._reconcile()
        self._only_by_mode = False
        # A tensor made under inference_mode could not be used in training.
        with torch.inference_mode(False), torch.no_grad():
            moved = False
            self._edits.look([p for p, _ in self._averaged() if "y" not in self.state[p]])
            for p, interpolation in self._averaged():
                mine = self.state[p]
                if "y" not in mine:
                    moved = not self._take_edits([p]) or moved
                    mine["y"] = p.detach().clone()  # a copy, so that `train` restores every bit
                    self._placed[id(p)] = interpolation
                    p.copy_(points.average(p, mine, interpolation))
                    self._edits.note(p)
            distributed.reshard(self.model)
            if moved:  # loaded weights come with their own statistics
                self._statistics.bring()

    def train(self) -> None:
        """Puts the parameters back, bit for bit. Without effect when they are there."""
        self._reconcile()
        self._only_by_mode = False
        with torch.inference_mode(False), torch.no_grad():
            moved = False
            for p, interpolation in self._averaged():
                mine = self.state[p]
                if "y" in mine:
                    sharded = distributed.is_sharded(p)
                    # (As it was placed: the group's may have been changed since.)
                    interpolation = self._placed.pop(id(p), interpolation)
                    if not sharded and self._edits.of_average(p, mine, interpolation):
                        points.restart(mine, p)
                    else:
                        p.copy_(mine["y"])
                        moved = True
                    del mine["y"]
                    self._edits.note(p)
            distributed.reshard(self.model)
            self._statistics.leave(back=moved)

    def _mode_set(self, module: nn.Module, training: bool) -> None:
        """The model, or a module that holds all of these parameters, was put into a mode.

        What evaluation mode alone has brought, training mode takes away, but not without gradients:
        `torch.optim.swa_utils.update_bn` sets it, too.
        """
        if not self.follow_mode or self._trains_in_eval or is_replaying():
            return
        if training:
            if self._only_by_mode and torch.is_grad_enabled():
                self.train()
            return
        self._reconcile()
        if any("y" in mine for mine in self.state.values()):
            return
        own = [id(p) for group in self.param_groups for p in group["params"]]
        if mode.holds(module, own):  # groups may have been added
            self.eval()
            self._only_by_mode = True

    def _model_called(self, training: bool) -> None:
        """The model is about to be called, with gradients enabled or not."""
        if torch.is_grad_enabled():
            # Evaluation mode with gradients is training on frozen statistics, unless the averages
            # were asked for by more than the mode.
            if training or self._only_by_mode:
                tested = not training and bool(self._placed)
                if not self._is_in_training():
                    self.train()
                if tested and not self._said_of_gradients:
                    self._said_of_gradients = True
                    warn(_WITH_GRADIENTS)
        elif not training:
            self.eval()

    def _is_in_training(self) -> bool:
        """Whether `train` has nothing to do: nearly always, and this is asked at each forward.

        Sharded parameters are looked at in any case: a forward pass without a backward pass, since
        the last step, leaves them gathered as they were before it.
        """
        self._reconcile()
        self._only_by_mode = False
        first = next((p for group in self.param_groups for p in group["params"]), None)
        at_y = self._statistics.set_aside is None and not self._placed
        return at_y and not distributed.is_sharded(first)

    def _averaged(self) -> Iterator[tuple[Tensor, float]]:
        """The parameters that have an average by now, and how near to it gradients are taken."""
        for group in self.param_groups:
            interpolation = self._interpolation(group)
            if interpolation is not None:
                yield from (
                    (p, interpolation)
                    for p in group["params"]
                    if p in self.state and "z" in self.state[p]
                )

    def _reconcile(self) -> None:
        """Once after a state was loaded, looks which of the points the parameters hold.

        Those of a checkpoint are the averages. Whoever loads no weights has those of training.
        """
        self._momenta.put_back(self.param_groups)
        if not self._unreconciled:
            return
        self._unreconciled = False
        held = [(p, i) for p, i in self._averaged() if "y" in self.state[p]]
        with torch.no_grad():
            if held and all(equal(p, self.state[p]["y"]) for p, _ in held):
                for p, _ in held:
                    del self.state[p]["y"]
                self._statistics.set_aside = None
                return
            others = 0
            for p, interpolation in held:
                mine = self.state[p]
                if loaded(p, points.average(mine["y"], mine, interpolation)):
                    self._placed[id(p)] = interpolation
                else:
                    points.restart(mine, p)
                    del mine["y"]
                    others += 1
        if others:
            warn(
                f"{others} of {len(held)} parameters are not those of the checkpoint that the "
                "optimizer has loaded: their average begins anew. Load the state of the model "
                "before the optimizer is used"
            )

    def _take_edits(self, params: Sequence[Tensor]) -> bool:
        """Begins the average anew at those that were written to since this optimizer did.

        Returns:
            Whether there are any.
        """
        found = self._edited(params)
        for p in found:
            points.restart(self.state[p], p)
        return bool(found)

    def _edited(self, params: Sequence[Tensor]) -> list[Tensor]:
        """The parameters that were written to since this optimizer wrote to them."""
        return [
            p
            for p in self._edits.among(params)
            if "z" in self.state.get(p, {}) and not distributed.is_sharded(p)
        ]

    def _descend(self, found: StepLength, direction: Direction) -> None:
        self._trains_in_eval = not self.model.training
        params = [p for group in self.param_groups for p in group["params"]]
        self._edits.look(params)
        if found.skipped.device.type == "cpu" and bool(found.skipped.numpy()):
            # Edits are taken by the next step.
            params = [p for p in params if self._edits.known(p)]
        else:
            self._take_edits(params)
        super()._descend(found, direction)
        self._edits.note_step(params, self.state)

    def _retire(self, move: bool = True) -> None:
        """Leaves the average in the parameters and forgets the iterates: the run has ended.

        Args:
            move: Whether to put the average in place; not where gradients have been taken already.
        """
        if move:
            self.eval()
        for p, _ in self._averaged():
            # Replaced, never mutated: a state_dict of before holds these very numbers.
            ended = ("y", *points.NAMES)
            self.state[p] = {k: v for k, v in self.state[p].items() if k not in ended}
        self._placed.clear()
        self._statistics.set_aside = None

    def __del__(self) -> None:
        """A model whose optimizer is gone keeps the average, not the point of the last gradient.

        Not where the user says which point the parameters are.
        """
        with contextlib.suppress(Exception):
            if self.follow_mode and not sys.is_finalizing() and not is_capturing():
                self._retire()

    def remove_hooks(self) -> None:
        """As for the other optimizers; the parameters no longer follow the model's mode either."""
        super().remove_hooks()
        self._unfollow()

    def _interpolation(self, group: Mapping[str, Any]) -> float | None:
        """``β`` of a group; None: the last iterate is kept, and there is no average."""
        raise NotImplementedError

    def _inner_direction(
        self, params: list[Tensor], gradients: list[Tensor], equal: Mapping[int, bool]
    ) -> Direction:
        """What the iterate moves along.

        Args:
            params: Those with a gradient.
            gradients: Theirs.
            equal: Whether the counts of a group's parameters are equal, by its id.
        """
        raise NotImplementedError

    def _direction(self, params: list[Tensor], gradients: list[Tensor]) -> Direction:
        self._reconcile()
        if any("y" in self.state[p] for p in params if p in self.state):
            raise RuntimeError(
                "step(): the parameters are the averages, for testing: call optimizer.train() "
                "before the forward pass of a training step"
            )
        if len({self._interpolation(group) is None for group in self.param_groups}) > 1:
            raise ValueError(_MIXED)
        equal = self._step_counts.all_equal(self.param_groups, self.state)
        inner = self._inner_direction(params, gradients, equal)
        if all(self._interpolation(group) is None for group in self.param_groups):
            return inner
        return Interpolation(inner, self.state, equal, self._interpolation)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        super()._check_group(group)
        others = [self.defaults, *self.param_groups]
        averaged = [self._interpolation({**self.defaults, **g}) is not None for g in others]
        if (self._interpolation({**self.defaults, **group}) is not None) not in averaged:
            raise ValueError(_MIXED)

    def _make_state(self, params: list[Tensor]) -> None:
        groups = {p: group for group in self.param_groups for p in group["params"]}
        for p in params:
            self._make_inner_state(p, groups[p])
            if self._interpolation(groups[p]) is not None:
                fast_state(self.state, p)

    def _make_inner_state(self, p: Tensor, group: Mapping[str, Any]) -> None:
        """Creates what the direction would create at a parameter's first step."""

    # --- what is saved ---------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As for the other optimizers, and what training goes on from: ``"y"`` of each parameter.

        The model's own ``state_dict()`` holds the averages. Running statistics of training are
        under ``"running_statistics"``, where the model has any.
        """
        self._reconcile()
        packed = super().state_dict()
        averaged = {id(p) for p, _ in self._averaged()}
        if not averaged:
            return packed
        params = [p for group in self.param_groups for p in group["params"]]
        numbers = [number for group in packed["param_groups"] for number in group["params"]]
        # What was written to since the last step becomes the average, in what the model saves too.
        edited = set(map(id, self._edited(params)))
        for p, number in zip(params, numbers, strict=True):
            mine = packed["state"].get(number, {})
            if id(p) not in averaged or "y" in mine:
                continue
            if id(p) in edited:
                mine = packed["state"][number] = dict(mine)
                points.restart(mine, p)
            if self.follow_mode:
                # A copy: the parameter moves to the average where that is tested, or the run ends.
                packed["state"][number] = {**mine, "y": p.detach().clone()}
        if not self.follow_mode:
            return packed
        statistics = self._statistics.of_training()
        return {**packed, "running_statistics": statistics} if statistics else packed

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As for the other optimizers; the weights are taken to be those of the checkpoint."""
        own = dict(state_dict)
        statistics = own.pop("running_statistics", None)
        super().load_state_dict(own)
        numbers = [number for group in own["param_groups"] for number in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        points.load(self.state, params, [own["state"].get(number) for number in numbers])
        self._edits, self._placed, self._unreconciled = Edits(), {}, True
        self._statistics.set_aside = None if statistics is None else dict(statistics)

    def _holds_y(self, p: Tensor) -> float | None:
        """``β``, where a parameter is where gradients are taken and has an average elsewhere."""
        mine = self.state.get(p, {})
        if "z" not in mine or "y" in mine or self._edited([p]):
            return None
        return self._interpolation(self.param_groups[self._group_of[id(p)]])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As for the other optimizers."""
        super().add_param_group(param_group)
        if "_weights" in self.__dict__:  # not in the constructor
            self._follow_saving()

    def _follow_saving(self) -> None:
        """Has the model save the averages."""
        groups = enumerate(self.param_groups)
        self._group_of = {id(p): number for number, group in groups for p in group["params"]}
        for module in unwrap(self.model).modules():
            owns = any(id(p) in self._group_of for p in module._parameters.values())
            if owns or self._statistics.names_of(module):
                self._handles.extend(self._weights.hook([module]))

    def _attach(self) -> None:
        super()._attach()
        self._edits, self._unreconciled = Edits(), False
        # (A copy may have been made while the averages were tested.)
        self._placed = {id(p): i for p, i in self._averaged() if "y" in self.state[p]}
        self._trains_in_eval = self._only_by_mode = self._said_of_gradients = False
        self._statistics = RunningStatistics(self.model, self.bn_batches)
        self._weights = SavedWeights(self)
        others = StepsOfOthers(self)
        others.listen()
        follow = self.model.register_forward_pre_hook(_Follow(self, self.model), prepend=True)
        see = self.model.register_forward_pre_hook(
            ForwardHook(self._statistics, self.model, "see"), with_kwargs=True
        )
        own = [id(p) for group in self.param_groups for p in group["params"]]
        modes = mode.follow(self, mode.holders(unwrap(self.model), own), "_mode_set")
        self._handles = [follow, see, others, *modes]
        self._follow_saving()
        self._unfollow = weakref.finalize(self, remove_all, self._handles)

    def __getstate__(self) -> dict[str, Any]:
        """As for the other optimizers."""
        own = {"follow_mode": self.follow_mode, "bn_batches": self.bn_batches}
        return {**super().__getstate__(), **own}


_WITH_GRADIENTS = (
    "the model was called in evaluation mode with gradients enabled, which is taken for training "
    "on frozen statistics: the weights are those of training, not their average. To test the "
    "average, call it under torch.no_grad(); for gradients at the average (an attack, a saliency "
    "map), call optimizer.eval() after model.eval(). This is said once"
)


class _Follow(Hook):
    """Before the model's forward."""

    def __init__(self, optimizer: AveragedOptimizer, model: nn.Module) -> None:
        self._optimizer, self._model = weakref.ref(optimizer), weakref.ref(model)

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def __call__(self, model: nn.Module, _: Any) -> None:
        optimizer = self._optimizer()
        if optimizer is None or self._model() is not model:
            return
        if not optimizer.follow_mode or is_replaying():
            return
        # Training mode without gradients, as in `update_bn`, leaves the weights unchanged.
        optimizer._model_called(model.training)

    def hand_over(self, params: set[int]) -> None:
        """Another optimizer of some of these parameters, by `id`, begins: this one has ended."""
        optimizer = self._optimizer()
        if optimizer is None or not optimizer.follow_mode:
            return
        if any(id(p) in params for group in optimizer.param_groups for p in group["params"]):
            optimizer._retire()
