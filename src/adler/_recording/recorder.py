"""What the optimizer sees of the training loop: which batch made the gradient.

Hooks on the model and on the criterion record each call made with gradients enabled. A call of the
criterion is linked to the call of the model that made its first argument; a loss that the model
returns (`ModelLoss`) belongs to the call that made it. The autograd graph owns
the record: only when the backward pass reaches the loss does it come here, together with the
gradient that arrives there (the factor by which the loss entered what was backpropagated). So a
forward pass that nobody differentiates leaves nothing behind, several of them before one step add
up as their gradients do, and a loss divided by the number of micro-batches is weighted so.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from adler import _distributed as distributed
from adler._recording.compiled import Compiled
from adler._recording.model_loss import ModelLoss
from adler._recording.replay import (
    Call,
    RandomState,
    accelerators,
    autocast_states,
    is_capturing,
    is_replaying,
    not_a_tensor,
    unwrap,
)

__all__ = ["RecordedLoss", "Recorder", "remove_all"]


@dataclass(eq=False)
class RecordedLoss:
    """One loss whose gradient is in ``p.grad``.

    Attributes:
        call: The call of the model that made the outputs.
        outputs: What the criterion received first, detached; None if the loop did not show it, or
            only a part is replayed.
        targets: What the criterion received after the outputs.
        value: The loss, 0-dim, detached; None if the loop did not show it.
        weight: Gradient that arrived at the loss, 0-dim; None: 1.
        output_gradient: Gradient that arrived at the outputs of the call, from all its losses;
            None if the loop did not show it.
        factor: How many of itself the loss stands for; see `adler._recording.subbatch`.
    """

    call: Call
    targets: tuple[Any, ...]
    outputs: Tensor | None = None
    value: Tensor | None = None
    weight: Tensor | None = None
    output_gradient: Tensor | None = None
    factor: float = 1.0


class _Hook:
    """A forward hook that keeps nothing alive, and whose copies and pickles do nothing."""

    def __init__(self, recorder: Recorder | None, module: nn.Module | None, method: str) -> None:
        self._recorder = None if recorder is None else weakref.ref(recorder)
        self._module = None if module is None else weakref.ref(module)
        self._method = method

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def __call__(self, module: nn.Module, *call: Any) -> None:
        recorder = None if self._recorder is None else self._recorder()
        if recorder is None or self._module is None or self._module() is not module:
            return
        # What a CUDA graph does with these tensors later, no hook sees; nor may it ask for the
        # random state. The loop then says what the batch is.
        if torch.is_grad_enabled() and not is_replaying() and not is_capturing():
            getattr(recorder, self._method)(*call)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (None, None, self._method)


class Recorder:
    """Records the calls of one model and its criterion.

    Args:
        model: Hooked.
        criterion: Hooked if it is a module.
        output_fn: Maps what the model returns to what the criterion receives.
        params: Those whose gradients the records explain.
        model_loss: The loss that the model returns, in place of calls of the criterion.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[..., Tensor],
        output_fn: Callable[[Any], Tensor] | None,
        params: Callable[[], Iterable[Tensor]],
        model_loss: ModelLoss | None = None,
    ) -> None:
        self._model, self._criterion = model, criterion
        self._model_loss, self._checked = model_loss, False
        self._output_fn, self._params = output_fn, params
        self._devices, self._compiled = accelerators(model), Compiled.of(model)
        self.ddp = distributed.find(model)  # or the one that the model is found to run inside
        self._entered: tuple[RandomState, Any] | None = None
        self._last_call: Call | None = None
        self._by_output: Any = WeakTensorKeyDictionary()
        self._backpropagated: list[RecordedLoss] = []
        self._output_gradients: dict[Call, Tensor] = {}
        self._left: list[tuple[int, int]] | None = None
        self.clear()
        handles = [
            model.register_forward_pre_hook(_Hook(self, model, "_enter_model"), with_kwargs=True),
            model.register_forward_hook(_Hook(self, model, "_leave_model"), with_kwargs=True),
        ]
        if isinstance(criterion, nn.Module) and model_loss is None:
            hook = _Hook(self, criterion, "_leave_criterion")
            handles.append(criterion.register_forward_hook(hook, with_kwargs=True))
        self._remove = weakref.finalize(self, remove_all, handles)

    def remove(self) -> None:
        """Takes the hooks off. Nothing is recorded any more."""
        self._remove()
        self.clear()

    def clear(self) -> None:
        """Forgets everything seen since the last step."""
        self._last_call = None
        self._calls = 0
        self._calls_since_loss = 0
        self._losses = 0
        self._unlinked: str | None = None
        self._by_output.clear()
        self.forget_backpropagated()

    def forget_backpropagated(self) -> None:
        """Forgets the losses whose gradients were just zeroed."""
        for loss in self._backpropagated:
            loss.weight = None  # the graph may be retained, and differentiated again
        self._backpropagated.clear()
        self._output_gradients.clear()
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
        if self._backpropagated:
            return [self._scaled(self._with_gradient(loss)) for loss in self._backpropagated]
        if self._calls == 0:
            reason = (
                "the model was not called with gradients enabled since the last step. Call "
                "criterion(model(inputs), targets).backward() before step(), on the very model "
                "and criterion given to the optimizer, or pass step(inputs=..., targets=...)"
            )
        elif self._unlinked is not None:
            reason = self._unlinked
        elif self._losses == 0:
            reason = (
                "the criterion given to the optimizer was not called on the model's outputs. If "
                "the loop computes its loss in another way (F.cross_entropy, inside the model), "
                "pass step(targets=...)"
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
            call = self._last_call
        else:
            call = Call.of(self._model, inputs, self._output_fn)
            call = replace(call, compiled=self._compiled)
            last = self._last_call
            if last is not None and _same_inputs(call, last):
                call = last  # brings the random state, and so the same dropout masks
        loss = RecordedLoss(call, targets if isinstance(targets, tuple) else (targets,))
        return [self._with_gradient(loss)]

    @property
    def saw_nothing(self) -> bool:
        """Whether there was no call since the last step."""
        return self._calls == 0 and not self._backpropagated

    # --- called by the hooks ---------------------------------------------------------------------

    def _enter_model(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._backpropagated and all(p.grad is None for p in self._params()):
            self.forget_backpropagated()  # a step that never came, its gradients zeroed elsewhere
        self._entered = RandomState.now(self._devices), autocast_states(self._devices)

    def _leave_model(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if self._entered is None:
            return
        (random_state, autocast), self._entered = self._entered, None
        self.ddp = self.ddp or distributed.active()
        args, kwargs = distributed.moved(distributed.find(self._model), (args, kwargs))
        args, kwargs = pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        call = Call(
            unwrap(self._model),
            args,
            kwargs,
            self._output_fn,
            self._devices,
            random_state,
            autocast,
            self._compiled,
        )
        self._last_call = call
        self._calls += 1
        self._calls_since_loss += 1
        if self._model_loss is not None:
            self._leave_model_with_loss(self._model_loss, call, result)
            return
        if self._output_fn is not None:
            return  # what the criterion will receive is not known yet
        if isinstance(result, Tensor):
            self._by_output[result] = call
            self._follow(result, call)
        else:
            self._unlinked = not_a_tensor(result, has_output_fn=False)

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
        # A copy: a loop may scale the loss in place.
        self._watch(value, RecordedLoss(call, targets, outputs.detach(), value.detach().clone()))

    def _leave_criterion(self, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> None:
        if not isinstance(value, Tensor) or not value.requires_grad:
            return
        outputs, *targets = _bind(self._criterion, args, kwargs)
        call = self._link(outputs)
        if call is None:
            return
        if value.ndim != 0:
            self._unlinked = (
                f"the criterion returned shape {tuple(value.shape)}, not a scalar: use "
                "reduction='mean' or 'sum'"
            )
            return
        if any(isinstance(t, Tensor) and t.requires_grad for t in targets):
            self._unlinked = (
                "the criterion's targets require grad, so the loss depends on the parameters "
                "through them too, which the curvature would miss: detach them"
            )
            return
        if self._output_fn is not None and outputs not in self._by_output:
            self._by_output[outputs] = call
            self._follow(outputs, call)
        self._watch(value, RecordedLoss(call, tuple(targets), outputs.detach(), value.detach()))

    def _watch(self, value: Tensor, loss: RecordedLoss) -> None:
        """Waits for the backward pass to reach the loss."""
        self._losses += 1
        arrived = _on_backward(weakref.ref(self), "_arrived", loss)
        value.register_hook(arrived)  # type: ignore[no-untyped-call]

    def _follow(self, outputs: Tensor, call: Call) -> None:
        """Takes note of the gradient that reaches what the loss sees of a call."""
        if outputs.requires_grad:
            arrived = _on_backward(weakref.ref(self), "_arrived_at_outputs", call)
            outputs.register_hook(arrived)  # type: ignore[no-untyped-call]

    def _link(self, outputs: Any) -> Call | None:
        """The call of the model that made the criterion's first argument."""
        if not isinstance(outputs, Tensor):
            return None
        if self._output_fn is None:
            call: Call | None = self._by_output.get(outputs)
            if call is None and self._calls and self._unlinked is None:
                self._unlinked = (
                    f"the criterion received a tensor of shape {tuple(outputs.shape)} that is not "
                    "the one that the model returned. If the loop slices, reshapes or casts the "
                    "outputs, do it in output_fn= as well, such as "
                    "output_fn=lambda out: out.squeeze(-1), or pass step(inputs=..., targets=...)"
                )
            return call
        if self._calls_since_loss > 1:
            self._unlinked = (
                f"the model was called {self._calls_since_loss} times before the criterion, and "
                "with output_fn= it is not certain which call made the loss: call the criterion "
                "after each, or run the other calls under torch.no_grad()"
            )
            return None
        self._calls_since_loss = 0
        return self._last_call

    def _arrived(self, loss: RecordedLoss, gradient: Tensor) -> None:
        weight = gradient.detach()
        if loss.weight is None:
            loss.weight = weight.clone()
            self._backpropagated.append(loss)
        else:
            loss.weight = loss.weight + weight

    def _arrived_at_outputs(self, call: Call, gradient: Tensor) -> None:
        known, gradient = self._output_gradients.get(call), gradient.detach()
        self._output_gradients[call] = gradient if known is None else known + gradient
        me = weakref.ref(self)

        def finished() -> None:
            alive = me()
            if alive is not None:
                alive._left = alive._stamps()

        torch.autograd.Variable._execution_engine.queue_callback(finished)

    def _with_gradient(self, loss: RecordedLoss) -> RecordedLoss:
        loss.output_gradient = self._output_gradients.get(loss.call)
        return loss

    def _stamps(self) -> list[tuple[int, int]]:
        """Which tensor each gradient is, and how often it was written."""
        gradients = (p.grad for p in self._params())
        return [(id(g), g._version) for g in gradients if g is not None]


def _on_backward(
    recorder: weakref.ref[Recorder], method: str, what: RecordedLoss | Call
) -> Callable[[Tensor], None]:
    """The hook on a tensor; the graph holds it, and through it the record."""

    def hook(gradient: Tensor) -> None:
        alive = recorder()
        if alive is not None:
            getattr(alive, method)(what, gradient)

    return hook


def remove_all(handles: list[torch.utils.hooks.RemovableHandle]) -> None:
    """Takes hooks off."""
    for handle in handles:
        handle.remove()


def _bind(criterion: Callable[..., Tensor], args: Any, kwargs: Any) -> tuple[Any, ...]:
    """The criterion's arguments in the order of its signature."""
    if not kwargs:
        return tuple(args)
    forward = criterion.forward if isinstance(criterion, nn.Module) else criterion
    return inspect.signature(forward).bind(*args, **kwargs).args


def _same_inputs(a: Call, b: Call) -> bool:
    """Whether two calls received the same storage in every argument."""
    left, right = (pytree.tree_leaves((c.args, dict(c.kwargs))) for c in (a, b))
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
