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

import contextlib
import inspect
import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adler import _distributed as distributed
from adler._recording.compiled import Compiled
from adler._recording.copies import Copier, tensors_in
from adler._recording.inert import Inert
from adler._recording.links import Path, Place, Source, accumulates, mark, same, sources
from adler._recording.model_loss import ModelLoss, how_to_describe
from adler._recording.randomness import RandomState
from adler._recording.replay import (
    Call,
    accelerators,
    autocast_states,
    is_capturing,
    is_replaying,
    not_a_tensor,
    put_back,
    replaying,
    unwrap,
)
from adler._recording.state import CallState, Watched

__all__ = ["Placed", "RecordedLoss", "Recorder", "remove_all"]

# In the place of a leaf: all of what `output_fn` makes.
WHOLE = -1
# Gradients of one loss are parallel; other terms may be added to it, other targets are not.
_ALIKE = 0.5


@dataclass(eq=False)
class RecordedLoss:
    """One loss whose gradient is in ``p.grad``.

    Attributes:
        call: The call of the model that made the outputs; of several, the first.
        outputs: What the criterion received first, detached; None if the loop did not show it, or
            only a part is replayed.
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
    outputs: Tensor | None = None
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

    @property
    def outputs_overwritten(self) -> bool:
        """Whether the loop has written to the outputs after the loss was computed."""
        return self.outputs is not None and self.version not in (None, self.outputs._version)


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


@dataclass
class _Entered:
    """What is known when a call of the model begins."""

    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    random_state: RandomState
    autocast: Any
    state: CallState
    fed: bool


@dataclass
class _Received:
    """What is known when a call of the criterion begins."""

    arguments: tuple[Any, ...]
    options: dict[str, Any]
    state: CallState | None
    origins: list[Source]
    path: Path | None
    differentiable: tuple[int, ...]
    random_state: RandomState
    whole: Source | None  # the first argument, where output_fn makes it of the result
    refused: str | None = None


class _Hook:
    """A forward hook that keeps nothing alive, and whose copies and pickles do nothing."""

    def __init__(self, recorder: Recorder, module: nn.Module, method: str) -> None:
        self._recorder, self._module = weakref.ref(recorder), weakref.ref(module)
        self._method = method

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def __call__(self, module: nn.Module, *call: Any) -> None:
        recorder = self._recorder()
        if recorder is None or self._module() is not module:
            return
        # What a CUDA graph does with these tensors later, no hook sees; nor may it ask for the
        # random state. The loop then says what the batch is. Inside a function transform there
        # are no tensors to keep.
        if (
            torch.is_grad_enabled()
            and not is_replaying()
            and not is_capturing()
            and torch._C._functorch.peek_interpreter_stack() is None
        ):
            getattr(recorder, self._method)(*call)

    def __reduce__(self) -> tuple[Any, ...]:
        return Inert, ()


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
        self._whole: dict[int, bool] = {}
        self._wholes: weakref.WeakKeyDictionary[Call, Call] = weakref.WeakKeyDictionary()
        # Calls that have begun, innermost last, of each thread: they may share a criterion.
        self._entered: dict[int, list[_Entered | None]] = defaultdict(list)
        self._received: dict[int, list[_Received | None]] = defaultdict(list)
        self._last_call: tuple[Call, Any] | None = None
        self._backpropagated: list[RecordedLoss] = []
        self._output_gradients: dict[Place, Tensor] = {}
        self._followed: weakref.WeakSet[Place] = weakref.WeakSet()
        self._left: list[tuple[int, int]] | None = None
        self.clear()
        handles = [
            model.register_forward_pre_hook(_Hook(self, model, "_enter_model"), with_kwargs=True),
            model.register_forward_hook(_Hook(self, model, "_leave_model"), with_kwargs=True),
        ]
        if isinstance(criterion, nn.Module) and model_loss is None:
            before = _Hook(self, criterion, "_enter_criterion")
            after = _Hook(self, criterion, "_leave_criterion")
            handles.append(criterion.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(criterion.register_forward_hook(after, with_kwargs=True))
        self._remove = weakref.finalize(self, remove_all, handles)

    def remove(self) -> None:
        """Takes the hooks off. Nothing is recorded any more."""
        self._remove()
        self.clear()

    def clear(self) -> None:
        """Forgets everything seen since the last step."""
        self._last_call = None
        self._last_result: tuple[Any, list[Place]] = (None, [])
        self._calls = 0
        self._losses = 0
        self._unlinked: str | None = None
        self._returned_loss: str | None = None
        self._entered.clear()
        self._received.clear()
        self.forget_backpropagated()

    def forget_backpropagated(self) -> None:
        """Forgets the losses whose gradients were just zeroed."""
        for loss in self._backpropagated:
            loss.weight = None  # the graph may be retained, and differentiated again
        self._backpropagated.clear()
        self._output_gradients.clear()
        self._refused: str | None = None
        self._left = None

    def gradients_unmodified(self) -> bool:
        """Whether the gradients are known to be as the backward pass left them.

        They are not once the loop has clipped, unscaled or exchanged them.
        """
        return self._left is not None and self._left == self._stamps()

    def losses(self) -> list[RecordedLoss]:
        """The losses whose gradients are in ``p.grad``.

        Raises:
            RuntimeError: If there are none, it is not certain which they are, or the model's own
                loss is not what its description says; says what to do.
        """
        if self._refused is not None:
            reason = self._refused
        elif self._backpropagated:
            return [self._scaled(loss) for loss in self._placed()]
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

    def _placed(self) -> list[RecordedLoss]:
        """The losses, with calls that say what they all see of them."""
        used: dict[Call, dict[int, Place]] = {}
        for placed in (placed for loss in self._backpropagated for placed in loss.places):
            assert placed.place is not None
            used.setdefault(placed.call, {})[placed.place.leaf] = placed.place
        calls: dict[Call, tuple[Call, dict[int, tuple[int, int, torch.Size] | None]]] = {}
        for call, places in used.items():
            calls[call] = self._joined(call, [places[leaf] for leaf in sorted(places)])
        found = []
        for loss in self._backpropagated:
            at = []
            for placed in loss.places:
                assert placed.place is not None
                call, parts = calls[placed.call]
                at.append(Placed(call, placed.place, parts[placed.place.leaf]))
            found.append(replace(loss, call=at[0].call, places=at))
        return found

    def _joined(
        self, call: Call, places: list[Place]
    ) -> tuple[Call, dict[int, tuple[int, int, torch.Size] | None]]:
        """A call that says some of its tensors, and where each of them is."""
        leaves = tuple(place.leaf for place in places)
        if len(places) == 1:
            gradient = self._output_gradients.get(places[0])
            seen = None if leaves == (WHOLE,) else leaves
            return replace(call, leaves=seen, output_gradient=gradient), {leaves[0]: None}
        parts: dict[int, tuple[int, int, torch.Size] | None] = {}
        start = 0
        for place in places:
            end = start + place.output.numel()
            parts[place.leaf] = start, end, place.output.shape
            start = end
        # (One tensor may be made of another, whose gradient then counts twice.)
        return replace(call, leaves=leaves), parts

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
            if self._last_call is not None and _same_inputs(call, self._last_call[1]):
                call = self._last_call[0]  # brings the random state, and so the same dropout masks
        for place, gradient in self._output_gradients.items():
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
        """Compares what reached the last call's outputs with the criterion's gradient there.

        Waits for the device, at the first step whose targets are given.

        Raises:
            RuntimeError: If the targets are those of other examples.
        """
        seen, places = self._last_result
        known = [(p, self._output_gradients[p]) for p in places if p in self._output_gradients]
        if not known or not all(place.intact for place, _ in known):
            return
        leaves = [place.output.detach().requires_grad_() for place, _ in known]
        by_pointer = {
            place.output.data_ptr(): x for (place, _), x in zip(known, leaves, strict=True)
        }
        try:
            with torch.enable_grad(), replaying():
                outputs: Any = leaves[0]
                if self._output_fn is not None:
                    outputs = self._output_fn(
                        Copier(lambda t: by_pointer.get(t.data_ptr(), t))(seen)
                    )
                value = self._criterion(outputs, *targets)
                found = torch.autograd.grad(value, leaves, allow_unused=True)
        except Exception:  # that they do not fit is said where they are used
            return
        pairs = [(a, b) for a, (_, b) in zip(found, known, strict=True) if a is not None]
        cosine = _cosine(pairs)
        if math.isnan(cosine):
            return
        self._targets_checked = cosine >= _ALIKE
        if not self._targets_checked:
            raise RuntimeError(
                "step(targets=...): these are not the targets that the loss was computed from: the "
                "gradient that reached the model's outputs is not that of criterion(outputs, "
                f"targets) (cosine {cosine:.2f}). Has the loop fetched "
                "the next batch in between? " + (self._returned_loss or "")
            )

    @property
    def saw_nothing(self) -> bool:
        """Whether there was no call since the last step."""
        return self._calls == 0 and not self._backpropagated

    # --- called by the hooks: the model ----------------------------------------------------------

    def _enter_model(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._backpropagated and self._was_zeroed():
            self.forget_backpropagated()  # a step that never came, its gradients zeroed elsewhere
        if not self._measures():
            self._entered[get_ident()].append(None)
            return
        trained = {id(p) for p in self._params()}
        given = [t for t in tensors_in((args, kwargs)) if t.requires_grad]
        origins, past = sources(given, self._key, trained) if given else ([], False)
        self._entered[get_ident()].append(
            _Entered(
                Copier(_copy)((args, kwargs)),
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
                    self._follow(Source(place, tensor.grad_fn, tensor.output_nr))
                if isinstance(result, Tensor) and self._output_fn is None:
                    self._last_call = marked, given
                    self._follow(Source(place, tensor.grad_fn, tensor.output_nr))
        if not isinstance(result, Tensor) and self._output_fn is None:
            self._unlinked = self._returned_loss or self._of_several(result)

    def _of_several(self, result: Any) -> str:
        """What to tell whoever's model returns no tensor, and whose criterion was not seen."""
        if isinstance(self._criterion, nn.Module):
            return not_a_tensor(result, has_output_fn=False)
        name = getattr(self._criterion, "__name__", "criterion")
        return (
            f"the model returned {type(result).__name__}, and the criterion is a function, whose "
            "calls no hook sees. Make it a module, give that to the optimizer and call it in the "
            "loop; it may receive any of what the model returned:\n\n"
            "    class Criterion(nn.Module):\n"
            "        def forward(self, *args, **kwargs):\n"
            f"            return {name if name.isidentifier() else 'loss_of'}(*args, **kwargs)\n\n"
            "For a loss of one of them, output_fn= and step(targets=...) do as well"
        )

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
        if not self._measures():
            self._received[get_ident()].append(None)
            return
        arguments, options = _bind(self._criterion, args, kwargs)
        values, shape = pytree.tree_flatten(arguments)
        tensors = [(i, t) for i, t in enumerate(values) if _differentiable(t)]
        origins, past = sources([t for _, t in tensors], self._key, {id(p) for p in self._params()})
        way, whole, refused = None, None, None
        if past:
            refused = _PAST if origins else _ELSEWHERE.format(_shapes(values))
        elif origins:
            try:
                way, whole = self._way(origins, tensors)
            except (RuntimeError, NotImplementedError) as error:
                refused = _NOT_TWICE.format(error)
        module = self._criterion
        copied = Copier(_copy)
        for i, t in tensors:
            if way is None:  # the graph keeps it, and its version says whether it was written to
                values[i] = t.detach()
        self._received[get_ident()].append(
            _Received(
                pytree.tree_unflatten(
                    [
                        v if way is None and _is_at(i, tensors) else copied(v)
                        for i, v in enumerate(values)
                    ],
                    shape,
                ),
                copied(options),
                CallState((module,)) if isinstance(module, nn.Module) else None,
                origins,
                way,
                tuple(i for i, _ in tensors),
                RandomState.now(self._devices),
                whole,
                refused,
            )
        )

    def _way(
        self, origins: list[Source], tensors: list[tuple[int, Tensor]]
    ) -> tuple[Path | None, Source | None]:
        """How the loop made the criterion's arguments; the first, where ``output_fn`` makes it."""
        received = [t for _, t in tensors]
        direct = len(received) == 1 and len(origins) == 1 and tensors[0][0] == 0
        if direct and same(origins[0], received[0]):
            return None, None
        if direct and self._output_fn is not None and self._is_whole(origins[0], received[0]):
            x = received[0]
            call = self._wholes.setdefault(
                origins[0].place.call, replace(origins[0].place.call, output_fn=self._output_fn)
            )
            place = Place(call, WHOLE, x.detach(), x._version)
            return None, Source(place, x.grad_fn, x.output_nr)
        return Path(origins, received), None

    def _is_whole(self, origin: Source, received: Tensor) -> bool:
        """Whether ``output_fn`` makes of the model's result what the criterion received."""
        assert self._output_fn is not None
        nth = self._losses
        with torch.no_grad():
            try:
                made = self._output_fn(origin.place.result)
            except Exception:  # the loop does otherwise
                return False
        if not isinstance(made, Tensor) or made.shape != received.shape:
            return False
        known = self._whole.get(nth)
        if made.device.type == "cpu" or known is None or self._watched.closely:
            known = self._whole[nth] = _equal(made, received.detach())
        return known

    def _leave_criterion(self, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> None:
        begun = self._received[get_ident()]
        received = begun.pop() if begun else None
        if received is None or not isinstance(value, Tensor) or not value.requires_grad:
            return
        if received.refused is None and not received.origins:
            return  # another network's
        if value.ndim != 0:
            received.refused = (
                f"the criterion returned shape {tuple(value.shape)}, not a scalar: use "
                "reduction='mean' or 'sum'"
            )
        if received.refused is not None:
            self._unlinked = received.refused
            arrived = _on_backward(weakref.ref(self), "_arrived_refused", received.refused)
            value.register_hook(arrived)  # type: ignore[no-untyped-call]
            return
        outputs, *targets = received.arguments
        origins = received.origins if received.whole is None else [received.whole]
        places = [Placed(source.place.call, source.place) for source in origins]
        if received.path is None:
            self._follow(origins[0])
        loss = RecordedLoss(
            places[0].call,
            tuple(targets),
            outputs,
            value.detach().clone(),  # a loop may scale the loss in place
            options=received.options,
            places=places,
            path=received.path,
            differentiable=received.differentiable,
            state=received.state,
            random_state=received.random_state,
            version=outputs._version if isinstance(outputs, Tensor) else None,
        )
        self._watch(value, loss)

    # --- called by the hooks: backward -----------------------------------------------------------

    def _watch(self, value: Tensor, loss: RecordedLoss) -> None:
        """Waits for the backward pass to reach the loss."""
        self._losses += 1
        arrived = _on_backward(weakref.ref(self), "_arrived", loss)
        value.register_hook(arrived)  # type: ignore[no-untyped-call]

    def _follow(self, source: Source) -> None:
        """Takes note of the gradient that reaches a tensor that the model returned."""
        if source.place in self._followed:
            return
        self._followed.add(source.place)
        arrived = _on_backward(weakref.ref(self), "_arrived_at_outputs", source.place)
        number = source.number  # (the node must not hold itself)
        source.node.register_prehook(lambda gradients: arrived(gradients[number]))

    def _arrived(self, loss: RecordedLoss, gradient: Tensor) -> None:
        if not accumulates(list(self._params())):
            return
        self._when_finished()
        weight = gradient.detach()
        if loss.weight is None:
            loss.weight = weight.clone()
            self._backpropagated.append(loss)
        else:
            loss.weight = loss.weight + weight

    def _arrived_refused(self, reason: str, gradient: Tensor) -> None:
        if accumulates(list(self._params())):
            self._refused = reason

    def _arrived_at_outputs(self, place: Place, gradient: Tensor | None) -> None:
        if gradient is None or not accumulates(list(self._params())):
            return
        self._when_finished()
        known, gradient = self._output_gradients.get(place), gradient.detach()
        self._output_gradients[place] = gradient if known is None else known + gradient

    def _when_finished(self) -> None:
        """Notes the versions of the gradients, once this backward pass has made them."""
        me = weakref.ref(self)

        def finished() -> None:
            alive = me()
            if alive is not None:
                alive._left = alive._stamps()

        torch.autograd.Variable._execution_engine.queue_callback(finished)

    def _stamps(self) -> list[tuple[int, int]]:
        """Which tensor each gradient is, and how often it was written."""
        gradients = (p.grad for p in self._params())
        return [(id(g), g._version) for g in gradients if g is not None]

    def _was_zeroed(self) -> bool:
        """Whether the gradients were removed, or overwritten by zeros, since the last backward."""
        gradients = [p.grad for p in self._params() if p.grad is not None]
        if not gradients:
            return True
        if self._left is None or self._left == self._stamps():
            return False
        return not any(bool(g.any()) for g in distributed.local(gradients))


_ELSEWHERE = (
    "the criterion received tensors of shapes {} that depend on the parameters, but were not made "
    "of what a recorded call of the model returned, or that was changed in place as a view of "
    "another tensor. Call the model itself (model(inputs), not a method of it or a submodule), "
    "write x = x / 2 for x /= 2, or pass step(inputs=..., targets=...)"
)
_PAST = (
    "what the criterion received depends on the parameters not only through what the model "
    "returned (a penalty on the weights, or an output that was changed in place as a view of "
    "another tensor): compute it inside the model, or from what the model returns"
)
_NOT_TWICE = (
    "an operation between the model and the criterion cannot be differentiated twice ({}): do it "
    "inside the model, or give output_fn="
)


def _on_backward(
    recorder: weakref.ref[Recorder], method: str, what: RecordedLoss | Place | str
) -> Callable[[Any], None]:
    """The hook on a tensor; the graph holds it, and through it the record."""

    def hook(gradient: Any) -> None:
        alive = recorder()
        if alive is not None:
            getattr(alive, method)(what, gradient)

    return hook


def remove_all(handles: Iterable[Any]) -> None:
    """Takes hooks off, by their handles."""
    for handle in handles:
        handle.remove()


def _bind(
    criterion: Callable[..., Tensor], args: Any, kwargs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The criterion's arguments in the order of its signature, and those by keyword only."""
    if not kwargs:
        return tuple(args), {}
    forward = criterion.forward if isinstance(criterion, nn.Module) else criterion
    bound = inspect.signature(forward).bind(*args, **kwargs)
    return bound.args, bound.kwargs


def _copy(tensor: Tensor) -> Tensor:
    made = tensor.detach().clone()
    return made.requires_grad_() if tensor.requires_grad else made


def _differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _is_at(index: int, tensors: list[tuple[int, Tensor]]) -> bool:
    return any(i == index for i, _ in tensors)


def _shapes(values: list[Any]) -> str:
    shapes = [str(tuple(v.shape)) for v in values if _differentiable(v)]
    return ", ".join(shapes)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaN included; waits for the device unless they are one tensor."""
    if a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
        return True
    return a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _cosine(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Of two lists of tensors as vectors; NaN where one is zero or not finite. Waits."""
    pairs = [(a.double(), b.double()) for a, b in pairs]
    product = sum(float((a * b).sum()) for a, b in pairs)
    squares = [sum(float(x.square().sum()) for x in side) for side in zip(*pairs, strict=True)]
    if not squares or not all(0 < square < math.inf for square in squares):
        return math.nan
    return product / math.sqrt(math.prod(squares))


def _same_inputs(call: Call, given: Any) -> bool:
    """Whether a call receives the same storage in every argument as was given before."""
    left, right = pytree.tree_leaves((call.args, dict(call.kwargs))), pytree.tree_leaves(given)
    return len(left) == len(right) and all(
        (x is y)
        or (
            isinstance(x, Tensor)
            and isinstance(y, Tensor)
            and x.data_ptr() == y.data_ptr()
            and x.shape == y.shape
            and x.stride() == y.stride()
        )
        for x, y in zip(left, right, strict=True)
    )
