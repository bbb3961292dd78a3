"""What the optimizer sees of the training loop: which batch made the gradient.

Hooks on the model and on the criterion record each call made with gradients enabled: before it,
arguments, generators and the state of the modules, by value where they may change; after it, what
was returned. What a criterion receives is linked to the calls of the model that made it
(`adler._recording.links`); a loss that the model returns (`ModelLoss`) belongs to the call that
made it. The autograd graph owns the record: only when ``backward`` reaches the loss, on its way to
the gradients of the parameters, does it come here, together with the gradient that arrives there
(the factor by which the loss entered what was backpropagated). So a forward pass that is not
differentiated leaves nothing behind, several of them before one step add up as their gradients do,
and a loss divided by the number of micro-batches keeps that weight.

Where the coming step does not measure, calls are counted and nothing else.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adler import _distributed as distributed
from adler._recording.backward import Backward
from adler._recording.compiled import Compiled
from adler._recording.copies import Copier, copy_of, tensors_in
from adler._recording.criterion_calls import CriterionCalls, Refused
from adler._recording.explicit_targets import check_targets, same_inputs
from adler._recording.first_message import how_to_describe, of_several
from adler._recording.hooks import ForwardHook, remove_all
from adler._recording.links import Place, Source, mark, sources
from adler._recording.model_loss import ModelLoss
from adler._recording.randomness import RandomState
from adler._recording.records import WHOLE, Placed, RecordedLoss
from adler._recording.replay import Call, accelerators, autocast_states, not_a_tensor
from adler._recording.state import CallState, Watched
from adler._unwrap import unwrap

__all__ = ["Recorder"]


@dataclass
class _Entered:
    """What is known when a call of the model begins."""

    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    random_state: RandomState
    autocast: Any
    state: CallState
    fed: bool


class Recorder:
    """Records the calls of one model and its criterion.

    Args:
        model: Hooked.
        criterion: Hooked if it is a module.
        output_fn: Maps what the model returns to what the criterion receives.
        params: Those whose gradients the records explain.
        model_loss: The loss that the model returns, in place of calls of the criterion.
        measures: Whether the coming step will ask for `losses`; where it says no, nothing is kept.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[..., Tensor],
        output_fn: Callable[[Any], Tensor] | None,
        params: Callable[[], Iterable[Tensor]],
        model_loss: ModelLoss | None = None,
        measures: Callable[[], bool] = lambda: True,
    ) -> None:
        self._model, self._criterion = model, criterion
        self._model_loss, self._checked = model_loss, False
        self._targets_checked = False
        self._output_fn, self._params, self._measures = output_fn, params, measures
        self._devices, self._compiled = accelerators(model), Compiled.of(model)
        self.ddp = distributed.find_ddp(model)  # or the one that the model is found to run inside
        self._watched = Watched()
        self._key = object()  # of this recorder's marks in the graph
        # Calls that have begun, innermost last, of each thread: they may share a model.
        self._entered: dict[int, list[_Entered | None]] = defaultdict(list)
        self._criterion_calls = CriterionCalls(
            criterion, output_fn, params, self._devices, self._key, self._watched
        )
        self._backward = Backward(params)
        self.clear()
        handles = [
            model.register_forward_pre_hook(
                ForwardHook(self, model, "_enter_model"), with_kwargs=True
            ),
            model.register_forward_hook(ForwardHook(self, model, "_leave_model"), with_kwargs=True),
        ]
        if isinstance(criterion, nn.Module) and model_loss is None:
            before = ForwardHook(self, criterion, "_enter_criterion")
            after = ForwardHook(self, criterion, "_leave_criterion")
            handles.append(criterion.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(criterion.register_forward_hook(after, with_kwargs=True))
        self._remove = weakref.finalize(self, remove_all, handles)

    def remove(self) -> None:
        """Takes the hooks off. Nothing is recorded any more."""
        self._remove()
        self.clear()

    def clear(self) -> None:
        """Forgets everything seen since the last step."""
        self._last_call: tuple[Call, Any] | None = None
        self._last_result: tuple[Any, list[Place]] = (None, [])
        self._calls = 0
        self._losses = 0
        self._unlinked: str | None = None
        self._returned_loss: str | None = None
        self._entered.clear()
        self._criterion_calls.clear()
        self._backward.clear()

    def forget_backpropagated(self) -> None:
        """Forgets the losses whose gradients were just zeroed."""
        self._backward.forget()

    def gradients_unmodified(self) -> bool:
        """Whether the gradients are known to be as the backward pass left them."""
        return self._backward.gradients_unmodified()

    def losses(self) -> list[RecordedLoss]:
        """The losses whose gradients are in ``p.grad``.

        Raises:
            RuntimeError: If there are none, it is not certain which they are, or the model's own
                loss is not what its description says; says what to do.
        """
        if self._backward.refused is not None:
            reason = self._backward.refused
        elif self._backward:
            return [self._scaled(loss) for loss in self._backward.losses()]
        elif self._calls == 0:
            reason = (
                "the model was not called with gradients enabled since the last step. Call "
                "criterion(model(inputs), targets).backward() before step(), on the very model "
                "and criterion given to the optimizer, or pass step(inputs=..., targets=...)"
            )
        elif self._unlinked is not None:
            reason = self._unlinked
        elif self._losses == 0:
            reason = self._returned_loss or (
                "the criterion given to the optimizer was not called on the model's outputs. If "
                "the loop computes its loss in another way (F.cross_entropy), pass "
                "step(targets=...); if the model computes it, give the optimizer an "
                "adler.ModelLoss in the criterion's place"
            )
        else:
            reason = "backward() has not reached the recorded loss: call loss.backward() first"
        raise RuntimeError(f"step(): {reason}")

    def _scaled(self, loss: RecordedLoss) -> RecordedLoss:
        """In units of the criterion, where the model computed the loss."""
        described = self._model_loss
        if described is None:
            return loss
        assert loss.outputs is not None
        assert loss.value is not None
        assert loss.weight is not None
        seen = loss.value, loss.outputs, loss.targets
        factor = described.factor(*seen, loss.call.kwargs)
        if not self._checked:
            self._checked = described.check(*seen, factor)
        return loss if factor is None else replace(loss, weight=loss.weight * factor)

    def explicit(self, inputs: Any, targets: Any) -> list[RecordedLoss]:
        """The batch as the user states it.

        Args:
            inputs: As for `Call.of`; None: those of the only call of the model since the last step.
            targets: What the criterion receives after the outputs.

        Raises:
            RuntimeError: If ``inputs`` is None and there is not exactly one call, or the loss is
                a `ModelLoss`, whose batches are always recorded.
        """
        if self._model_loss is not None:
            raise RuntimeError(
                "step(targets=...): the optimizer was given a ModelLoss, which takes the targets "
                "from the call of the model: call step() without arguments"
            )
        if inputs is None:
            if self._last_call is None or self._calls != 1:
                raise RuntimeError(
                    f"step(targets=...): the model was called {self._calls} times with gradients "
                    "enabled since the last step, so it is not certain which call made the "
                    "gradient: pass inputs= as well, or run the other calls under torch.no_grad()"
                )
            call, _ = self._last_call
        else:
            call = Call.of(self._model, inputs, self._output_fn)
            call = replace(call, compiled=self._compiled)
            if self._last_call is not None and same_inputs(call, self._last_call[1]):
                call = self._last_call[0]  # brings the random state, and so the same dropout masks
        for place, gradient in self._backward.arrived.items():
            if place.call is call and self._output_fn is None and place.leaf == 0:
                call = replace(call, output_gradient=gradient)
                break
        targets = targets if isinstance(targets, tuple) else (targets,)
        if self._last_call is not None and not self._targets_checked:
            last = self._last_call[0]
            if call is last or call.args is last.args:
                self._check_targets(targets)
        return [RecordedLoss(call, targets, places=[Placed(call)])]

    def _check_targets(self, targets: tuple[Any, ...]) -> None:
        """Refuses targets of other examples than the last call's.

        Waits for the device, at the first step whose targets are given.
        """
        result, places = self._last_result
        known = self._backward.arrived
        arrived = [(place, known[place]) for place in places if place in known]
        wrong = check_targets(targets, self._criterion, self._output_fn, result, arrived)
        if wrong:
            raise RuntimeError(f"step(targets=...): {wrong}{self._returned_loss or ''}")
        self._targets_checked = wrong is not None

    @property
    def saw_nothing(self) -> bool:
        """Whether there was no call since the last step."""
        return self._calls == 0 and not self._backward

    # --- called by the hooks: the model ----------------------------------------------------------

    def _enter_model(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._backward and self._backward.were_zeroed():
            self.forget_backpropagated()  # a step that never came, its gradients zeroed elsewhere
        if not self._measures():
            self._entered[get_ident()].append(None)
            return
        trained = {id(p) for p in self._params()}
        given = [t for t in tensors_in((args, kwargs)) if t.requires_grad]
        origins, past = sources(given, self._key, trained) if given else ([], False)
        self._entered[get_ident()].append(
            _Entered(
                Copier(copy_of)((args, kwargs)),
                RandomState.now(self._devices),
                autocast_states(self._devices),
                CallState((unwrap(self._model),), trained, self._watched),
                past or bool(origins),
            )
        )

    def _leave_model(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if not self._entered[get_ident()]:
            return
        entered = self._entered[get_ident()].pop()
        self.ddp = self.ddp or distributed.active()
        self._calls += 1
        if entered is None:
            return
        entered.state.seal()
        after = RandomState.now(self._devices)
        ddp = distributed.find_ddp(self._model)
        given = pytree.tree_map_only(Tensor, Tensor.detach, distributed.moved(ddp, (args, kwargs)))
        args, kwargs = distributed.moved(ddp, entered.arguments)
        call = Call(
            unwrap(self._model),
            args,
            kwargs,
            self._output_fn,
            self._devices,
            entered.random_state,
            entered.autocast,
            self._compiled,
            state=entered.state,
            draws=not after.same(entered.random_state),
            fed=entered.fed,
        )
        self._last_call = call, given
        if self._model_loss is not None:
            self._leave_model_with_loss(self._model_loss, call, result)
            return
        self._returned_loss = how_to_describe(call.model, call.args, call.kwargs, result)
        # Which of its tensors the loss will see is not known yet.
        marked = replace(call, output_fn=None)
        seen = None if self._output_fn is None else Copier(Tensor.detach)(result)
        self._last_result = seen, []
        for leaf, tensor in enumerate(tensors_in(result)):
            if tensor.grad_fn is not None:
                place = Place(marked, leaf, tensor.detach(), tensor._version, seen)
                mark(tensor, self._key, place)
                self._last_result[1].append(place)
                if self._output_fn is not None and not self._targets_checked:
                    self._backward.follow(Source(place, tensor.grad_fn, tensor.output_nr))
                if isinstance(result, Tensor) and self._output_fn is None:
                    self._last_call = marked, given
                    self._backward.follow(Source(place, tensor.grad_fn, tensor.output_nr))
        if not isinstance(result, Tensor) and self._output_fn is None:
            self._unlinked = self._returned_loss or of_several(self._criterion, result)

    def _leave_model_with_loss(self, described: ModelLoss, call: Call, result: Any) -> None:
        value = described.loss(result)
        if not isinstance(value, Tensor) or not value.requires_grad or value.ndim != 0:
            self._unlinked = (
                "the optimizer was given a ModelLoss, but the model returned no differentiable "
                "scalar as its loss: call the model with its targets (labels=...), and say in "
                "ModelLoss(loss=...) where the loss is"
            )
            return
        with torch.no_grad():
            outputs = described.outputs(result)
            targets = described.targets(*call.args, **call.kwargs)
        if not isinstance(outputs, Tensor):
            raise TypeError(not_a_tensor(outputs, has_output_fn=True))
        targets = targets if isinstance(targets, tuple) else (targets,)
        loss = RecordedLoss(
            call,
            targets,
            outputs.detach(),
            value.detach().clone(),  # a loop may scale the loss in place
            places=[Placed(call, Place(call, WHOLE, outputs.detach(), outputs._version))],
            version=outputs._version,
        )
        self._watch(value, loss)

    # --- called by the hooks: the criterion ------------------------------------------------------

    def _enter_criterion(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._measures():
            self._criterion_calls.enter(args, kwargs, self._losses)
        else:
            self._criterion_calls.skip()

    def _leave_criterion(self, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> None:
        found = self._criterion_calls.leave(value)
        if isinstance(found, Refused):
            self._unlinked = found.reason
            self._backward.watch_refused(value, found.reason)
        elif found is not None:
            loss, source = found
            if source is not None:
                self._backward.follow(source)
            self._watch(value, loss)

    def _watch(self, value: Tensor, loss: RecordedLoss) -> None:
        self._losses += 1
        self._backward.watch(value, loss)
