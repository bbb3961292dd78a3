r"""Jacobian products of a pure function of named parameters, ``F = f(θ)``.

Three engines compute the Jacobian-vector product $v = J d$:

| engine | how | |
|---|---|---|
| ``forward`` | `torch.func.jvp` | exact; the default |
| ``finite_difference`` | one more forward, any op | first order in its step |
| ``double_backward`` | transposed twice | exact; any op with a double backward |

`transpose` gives $u \mapsto J^\top u$.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from adler import _tensors as update
from adler._distributed import local, reshard
from adler._process_setting import ProcessSetting
from adler._recording.compiled import derivative
from adler._recording.compiled import outputs as compiled_outputs
from adler._recording.lazy_parameters import Lazy
from adler._recording.replay import Call
from adler._warning import warn
from adler.curvature.difference import relative_step
from adler.curvature.forward_rules import ForwardRules, load

__all__ = [
    "ENGINES",
    "ForwardModeUnsupportedError",
    "Function",
    "Parameters",
    "differentiable_attention",
    "directional_derivative",
    "double_backward",
    "finite_difference",
    "forward",
    "sharded_difference",
    "transpose",
    "warn_of_fallback",
]

Parameters = Mapping[str, Tensor]
Function = Callable[[Parameters], Tensor]
Found = TypeVar("Found")


class ForwardModeUnsupportedError(RuntimeError):
    """Forward-mode differentiation met an op that has none.

    Attributes:
        op: Name of the op, or a description where PyTorch does not name it.
    """

    def __init__(self, op: str) -> None:
        super().__init__(
            f"forward-mode AD is not available for {op}: use jvp='finite_difference' or "
            "jvp='double_backward'"
        )
        self.op = op


# --- the engines: (f, params, direction) -> (F, v) -----------------------------------------------


def forward(f: Function, params: Parameters, direction: Parameters) -> tuple[Tensor, Tensor]:
    """Outputs and exact tangents by `torch.func.jvp`.

    Args:
        f: Pure function of named parameters.
        params: Where to differentiate.
        direction: Same names, shapes, dtypes.

    Returns:
        ``F`` and ``v = J d``, of the same shape, detached.

    Raises:
        ForwardModeUnsupportedError: If an op has no forward-mode derivative, or drops the tangent;
            in general, if ``f`` fails with tangents and not without.
    """
    load()
    nested = torch._C._functorch.peek_interpreter_stack() is not None

    def plain() -> tuple[Tensor, Tensor]:
        if isinstance(f, Call) and not nested:
            return _with_duals(f, params, direction)
        with torch.no_grad(), ForwardRules():  # no reverse graph is wanted
            pair = torch.func.jvp(f, (params,), (direction,), strict=True)
        return cast(tuple[Tensor, Tensor], pair)

    try:
        with differentiable_attention(), _differentiable_lstm(f):
            if isinstance(f, Call) and f.compiled is not None:
                along = {name: direction[name] for name in params}
                with torch.no_grad():
                    return _compiled(f, derivative, plain, dict(params), along)
            return plain()
    except torch.OutOfMemoryError:
        raise
    except (NotImplementedError, RuntimeError) as error:
        op = _unsupported_op(str(error))
        if op is None:
            # PyTorch words one error differently from kernel to kernel: ask the function itself.
            if not _runs(f, params):
                raise
            op = f"an op that fails with tangents alone ({str(error).splitlines()[0]})"
        raise ForwardModeUnsupportedError(op) from error


# PyTorch has one level of dual numbers in a process.
_one_at_a_time = threading.RLock()


def _with_duals(call: Call, params: Parameters, direction: Parameters) -> tuple[Tensor, Tensor]:
    """Of a replay: with plain tensors, which a model may keep, and not those of a transform.

    Gradients are enabled, as in training, but no parameter requires one unless the call wants its
    graph: so none is built.
    """
    graph, make_dual = call.with_graph, cast(Callable[..., Tensor], forward_ad.make_dual)
    unpack_dual = cast(Callable[..., Any], forward_ad.unpack_dual)
    with (
        _one_at_a_time,
        torch.enable_grad(),
        forward_ad.dual_level(),
        ForwardRules(plain=graph, obeys_no_grad=True),
    ):
        duals = {
            name: make_dual(p.detach().requires_grad_(graph), direction[name])
            for name, p in params.items()
        }
        pair = unpack_dual(call(duals))
        if pair.tangent is None:
            raise ForwardModeUnsupportedError(_DROPPED)
        return pair.primal.detach(), pair.tangent.detach()


def finite_difference(
    f: Function,
    params: Parameters,
    direction: Parameters,
    *,
    step: float | Tensor | None = None,
    outputs: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Outputs and tangents $v \approx (F(\theta) - F(\theta - \alpha d)) / \alpha$.

    The parameters themselves are not touched: the perturbed ones are copies, so there is nothing
    to restore, whatever happens in ``f``. A `Call` on the CPU asks for them one by one;
    elsewhere they are made together, by as many kernels whatever their number.

    Args:
        f: Pure function of named parameters.
        params: Where to differentiate.
        direction: Same names, shapes, dtypes.
        step: ``α``, positive, a number or 0-dim tensor. Default: moves the parameters by the square
            root of the working precision, relative to their norm.
        outputs: ``F(θ)`` if known, which saves a forward.

    Returns:
        ``F`` and ``v``; ``v`` has error O(α) + O(rounding / α).
    """

    def at(theta: Parameters) -> Tensor:
        if isinstance(f, Call) and f.compiled is not None:
            return _compiled(f, compiled_outputs, lambda: f(theta), dict(theta))
        if isinstance(f, Call) and f.with_graph:
            with torch.enable_grad():
                leaves = {name: p.detach().requires_grad_() for name, p in theta.items()}
                return f(leaves).detach()
        return f(theta)

    with torch.no_grad():
        if outputs is None:
            outputs = at(params)
        if step is None:
            length = update.squared_norm(list(direction.values()))
            step = relative_step([params[n] for n in direction], length, outputs.dtype)
        alpha = torch.as_tensor(step, device=outputs.device)
        change = outputs - at(_shifted(f, params, direction, -alpha))
        return outputs, change / alpha.to(torch.promote_types(change.dtype, torch.float32))


def double_backward(
    f: Function, params: Parameters, direction: Parameters
) -> tuple[Tensor, Tensor]:
    r"""Outputs and exact tangents by transposing a vector-Jacobian product.

    $u \mapsto J^\top u$ is linear, so its derivative along ``d`` is $J d$.

    Args:
        f: Pure function of named parameters.
        params: Where to differentiate.
        direction: Same names, shapes, dtypes.

    Raises:
        RuntimeError: If the outputs do not depend on the parameters.
    """
    with torch.enable_grad(), differentiable_attention():
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        outputs = f(leaves)
        if not outputs.requires_grad:
            raise RuntimeError("the outputs do not depend on the parameters: nothing to measure")
        u = torch.zeros_like(outputs, requires_grad=True)
        pulled = torch.autograd.grad(
            outputs, list(leaves.values()), u, create_graph=True, allow_unused=True
        )
        reached = [(p, d) for p, d in zip(pulled, direction.values(), strict=True) if p is not None]
        (tangents,) = torch.autograd.grad(
            [p for p, _ in reached], u, [d for _, d in reached], materialize_grads=True
        )
    return outputs.detach(), tangents


def transpose(f: Function, params: Parameters) -> tuple[Tensor, Callable[[Tensor], Parameters]]:
    r"""Outputs, and the pullback $u \mapsto J^\top u$, which may be called many times.

    Args:
        f: Pure function of named parameters.
        params: Where to differentiate.

    Returns:
        ``F``, detached, and a function from ``u``, of the shape of ``F``, to a mapping with the
        names and shapes of ``params``.

    Raises:
        RuntimeError: If the outputs do not depend on the parameters.
    """
    with torch.enable_grad(), differentiable_attention():
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        outputs = f(leaves)
    if not outputs.requires_grad:
        raise RuntimeError("the outputs do not depend on the parameters: nothing to measure")

    def pull(u: Tensor) -> Parameters:
        gradients = torch.autograd.grad(
            outputs, list(leaves.values()), u, retain_graph=True, materialize_grads=True
        )
        return dict(zip(leaves, gradients, strict=True))

    return outputs.detach(), pull


class Engine(Protocol):
    """What computes outputs and tangents."""

    def __call__(
        self, f: Function, params: Parameters, direction: Parameters, /
    ) -> tuple[Tensor, Tensor]:
        """``(F, v)``."""
        ...


ENGINES: dict[str, Engine] = {
    "forward": forward,
    "finite_difference": finite_difference,
    "double_backward": double_backward,
}


def directional_derivative(
    f: Function,
    params: Parameters,
    direction: Parameters,
    jvp: str = "forward",
    *,
    step: float | Tensor | Callable[[], Tensor] | None = None,
    outputs: Tensor | None = None,
) -> tuple[Tensor, Tensor, str]:
    """Runs an engine; where ``forward`` cannot go, warns and takes the finite difference.

    Args:
        f: Pure function of named parameters.
        params: Where to differentiate.
        direction: Same names, shapes, dtypes.
        jvp: Name of the engine.
        step: For the finite difference; a function is asked only there.
        outputs: Known ``F(θ)``, for the finite difference.

    Returns:
        ``F``, ``v``, and the name of the engine that computed them.
    """
    if jvp not in ENGINES:
        raise ValueError(f"jvp={jvp!r}: expected one of {', '.join(map(repr, ENGINES))}")
    if jvp == "forward":
        try:
            return *forward(f, params, direction), jvp
        except ForwardModeUnsupportedError as error:
            warn_of_fallback(error.op)
            jvp = "finite_difference"
    if jvp == "finite_difference":
        step = step() if callable(step) else step
        return *finite_difference(f, params, direction, step=step, outputs=outputs), jvp
    return *ENGINES[jvp](f, params, direction), jvp


def warn_of_fallback(op: str, jvp: str = "forward") -> None:
    """Warns once per optimizer that the finite difference takes over."""
    mode = "forward-mode AD" if jvp == "forward" else f"jvp={jvp!r}"
    warn(
        f"{mode} is not available for {op}; the Jacobian-vector product is taken by finite "
        "difference instead (jvp='finite_difference' says so explicitly)"
    )


# --- helpers -------------------------------------------------------------------------------------

_DROPPED = "an op that drops the tangent (a detach, or reentrant checkpointing)"
_UNSUPPORTED = re.compile(r"forward AD with (?P<op>\S+?)\.? that does not support")


def _unsupported_op(message: str) -> str | None:
    """What forward mode failed on, or None if the message does not say so."""
    if match := _UNSUPPORTED.search(message):
        return match["op"]
    if "setup_context" in message or "implement the jvp function" in message:
        return "a custom autograd.Function"
    if "independent of the inputs" in message:
        return _DROPPED
    if "would mutate a captured Tensor" in message:
        return "an in-place update of a tensor that is not a registered buffer"
    if "view size is not compatible" in message:
        return "an op whose derivative needs contiguous tensors (GroupNorm in channels_last)"
    if "attempting to call Tensor.requires_grad_()" in message:
        return "a call of requires_grad_() in the forward (activation checkpointing makes one)"
    return None


def _runs(f: Function, params: Parameters) -> bool:
    """Whether a function can be computed without tangents."""
    try:
        with torch.no_grad(), differentiable_attention():
            f(params)
    except Exception:
        return False
    return True


def differentiable_attention() -> contextlib.AbstractContextManager[None]:
    """Of the attention kernels only MATH has a forward derivative and a second backward one."""
    return _math_kernel.wanted()


_math_kernel = ProcessSetting(lambda: sdpa_kernel(SDPBackend.MATH))


def _differentiable_lstm(f: Function) -> contextlib.AbstractContextManager[None]:
    """On the CPU an LSTM goes to a kernel of oneDNN's that has no forward derivative."""
    if isinstance(f, Call) and any(isinstance(m, nn.LSTM) for m in f.model.modules()):
        return _no_onednn.wanted()
    return contextlib.nullcontext()


@contextlib.contextmanager
def _without_onednn() -> Iterator[None]:
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


_no_onednn = ProcessSetting(_without_onednn)


def _compiled(
    call: Call, function: Callable[..., Found], plain: Callable[[], Found], *points: Any
) -> Found:
    """A compiled function of a call, under what surrounds its replay."""
    assert call.compiled is not None
    with call.surroundings() as state, state.installed({}):
        args, kwargs = call.arguments()
        whole = call.leaves in (None, (0,)) and call.output_fn is None
        return call.compiled(
            function,
            plain,
            call.model,
            *points,
            dict(call.model.named_buffers()),
            args,
            kwargs,
            None if whole else call.picked,
        )


def _shifted(f: Function, params: Parameters, direction: Parameters, by: Tensor) -> Parameters:
    """``θ + by · d``, in new tensors."""
    one_by_one = isinstance(f, Call) and f.compiled is None
    if one_by_one and all(update.is_on_host(d.device) for d in direction.values()):
        steps = {dtype: by.to(dtype) for dtype in {d.dtype for d in direction.values()}}

        def moved_one(name: str) -> Tensor:
            if name not in direction:
                return params[name]
            d = direction[name]
            return torch.addcmul(params[name], d, steps[d.dtype])

        return Lazy(params, moved_one)
    moved = update.shifted([params[name] for name in direction], list(direction.values()), by)
    return {**params, **dict(zip(direction, moved, strict=True))}


def sharded_difference(
    call: Callable[[Mapping[str, Tensor]], Tensor],
    model: nn.Module,
    params: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
    step: Tensor,
    outputs: Tensor | None,
) -> tuple[Tensor, Tensor]:
    r"""Outputs and tangents $v \approx (F(\theta) - F(\theta - \alpha d)) / \alpha$, in place.

    FSDP gathers parameters from its own shards, so these are moved, and put back bit for bit,
    whatever happens in between. Parameters that an earlier forward has left gathered are
    resharded before and after: they would hide the move.

    Args:
        call: The model's call; with an empty mapping, at the parameters that the model has.
        model: The model that ``call`` calls.
        params: Parameters by name.
        direction: Same names and layouts.
        step: ``α``, positive, 0-dim, the same on all ranks.
        outputs: ``F(θ)`` if known.
    """
    parts = local([params[name] for name in direction])
    with torch.no_grad():
        reshard(model)
        if outputs is None:
            outputs = call({})
            reshard(model)
        before = [part.clone() for part in parts]
        try:
            for part, along in zip(parts, local(list(direction.values())), strict=True):
                part.addcmul_(along, step.to(part), value=-1)
            change = outputs - call({})
        finally:
            torch._foreach_copy_(parts, before)
            reshard(model)
        return outputs, change / step.to(torch.promote_types(change.dtype, torch.float32))
