r"""Curvature of a loss along a direction in parameter space: pure functions.

For network outputs $F(\theta)$ and a loss $L(F)$, the generalized Gauss-Newton (GGN)
quadratic form along $d$ needs one Jacobian-vector product and no matrix:

$$
v = J_F(\theta)\, d, \qquad c = v^\top \nabla^2 L(F)\, v = d^\top (J^\top Q J)\, d.
$$

Three engines compute ``v``:

| engine | how | |
|---|---|---|
| ``forward`` | `torch.func.jvp` | exact; the default |
| ``finite_difference`` | one more forward, any op | first order in its step |
| ``double_backward`` | transposed twice | exact; any op with a double backward |

Source: D. Balboni, *An Optimization Perspective on Deep Neural Networks*, PhD thesis, Scuola
Normale Superiore, 2025, ch. 7; D. Balboni, D. Bacciu, arXiv 2305.16396.
"""

from __future__ import annotations

import functools
import importlib
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from adler.losses import LossHessian, loss_hessian
from adler.replay import Call, replaying, unwrap

__all__ = [
    "ENGINES",
    "ForwardModeUnsupportedError",
    "directional_derivative",
    "double_backward",
    "finite_difference",
    "forward",
    "jvp",
    "learning_rate",
    "quadratic_form",
]

Parameters = Mapping[str, Tensor]
Function = Callable[[Parameters], Tensor]


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
        ForwardModeUnsupportedError: If an op has no forward-mode derivative, or drops the tangent.
    """
    _load_forward_rules()
    try:
        # No reverse graph is wanted.
        with torch.no_grad(), _differentiable_attention():
            pair = torch.func.jvp(f, (params,), (direction,), strict=True)
    except (NotImplementedError, RuntimeError) as error:
        op = _unsupported_op(str(error))
        if op is None:
            raise
        raise ForwardModeUnsupportedError(op) from error
    return cast(tuple[Tensor, Tensor], pair)


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
    to restore, whatever happens in ``f``.

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
    with torch.no_grad():
        if outputs is None:
            outputs = f(params)
        if step is None:
            step = _default_step(params, direction, outputs.dtype)
        alpha = torch.as_tensor(step, device=outputs.device)
        perturbed = {
            name: torch.addcmul(params[name], d, alpha.to(d), value=-1)
            for name, d in direction.items()
        }
        change = outputs - f({**params, **perturbed})
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
    with torch.enable_grad(), _differentiable_attention():
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
    step: float | Tensor | None = None,
    outputs: Tensor | None = None,
) -> tuple[Tensor, Tensor, str]:
    """Runs an engine; where ``forward`` cannot go, warns and takes the finite difference.

    Args:
        f: Pure function of named parameters.
        params: Where to differentiate.
        direction: Same names, shapes, dtypes.
        jvp: Name of the engine.
        step: For the finite difference.
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
            warnings.warn(
                f"forward-mode AD is not available for {error.op}; the Jacobian-vector product is "
                "taken by finite difference instead (jvp='finite_difference' says so explicitly)",
                RuntimeWarning,
                stacklevel=3,
            )
            jvp = "finite_difference"
    if jvp == "finite_difference":
        return *finite_difference(f, params, direction, step=step, outputs=outputs), jvp
    return *ENGINES[jvp](f, params, direction), jvp


# --- on modules ----------------------------------------------------------------------------------


def jvp(
    model: nn.Module,
    params: Parameters | Iterable[Tensor],
    inputs: Any,
    direction: Parameters | Iterable[Tensor],
    jvp: str = "forward",
    *,
    output_fn: Callable[[Any], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Outputs of a module and their derivative $v = J_F(\theta)\, d$ along a direction.

    Buffers, random number generators, ``.grad`` and train/eval mode are as before afterwards.
    Dropout draws the mask that it would draw next.

    Args:
        model: The network.
        params: By name, as ``dict(model.named_parameters())``, or a sequence of parameters of the
            model. Parameters left out are constants.
        inputs: One argument, a tuple of positional arguments, or a mapping of keyword arguments.
        direction: As ``params``: a mapping with the same names, or a sequence of the same length.
        jvp: ``"forward"``, ``"finite_difference"`` or ``"double_backward"``.
        output_fn: Picks the tensor of interest from what the model returns.

    Returns:
        ``F`` of shape ``(b, C, ...)`` and ``v`` of the same shape, detached.

    Raises:
        ValueError: If names, lengths or shapes do not fit, or the engine is unknown.

    Examples:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> outputs, tangents = jvp(model, model.parameters(), x, [torch.tensor([[10.0, 1.0]])])
        >>> float(tangents)
        12.0
    """
    named, along = _named(model, params, direction)
    call = Call.of(model, inputs, output_fn)
    outputs, tangents, _ = directional_derivative(call, named, along, jvp)
    return outputs, tangents


def quadratic_form(
    model: nn.Module,
    params: Parameters | Iterable[Tensor],
    inputs: Any,
    targets: Any,
    criterion: Callable[..., Tensor] | LossHessian,
    direction: Parameters | Iterable[Tensor],
    jvp: str = "forward",
    *,
    output_fn: Callable[[Any], Tensor] | None = None,
) -> Tensor:
    r"""The GGN quadratic form $c = d^\top (J^\top \nabla^2 L\, J)\, d$ of one batch.

    Args:
        model: The network.
        params: See `jvp`.
        inputs: See `jvp`.
        targets: What the criterion receives after the outputs; a tuple where it receives several.
        criterion: The loss, reduced to a scalar, or a `LossHessian`.
        direction: See `jvp`.
        jvp: See `jvp`.
        output_fn: See `jvp`.

    Returns:
        0-dim tensor, float32 or wider; not negative for a convex loss.

    Raises:
        ValueError: As `jvp`; or if the criterion does not reduce, or targets do not fit outputs.

    Examples:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x, y = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1)
        >>> direction = [torch.tensor([[10.0, 1.0]])]
        >>> float(quadratic_form(model, model.parameters(), x, y, torch.nn.MSELoss(), direction))
        288.0
    """
    hessian = loss_hessian(criterion)
    named, along = _named(model, params, direction)
    call = Call.of(model, inputs, output_fn)
    outputs, tangents, _ = directional_derivative(call, named, along, jvp)
    with replaying():
        return hessian.quadratic_form(outputs, targets, tangents)


def learning_rate(
    slope: Tensor, curvature: Tensor, squared_norm: Tensor, eps: float = 1e-10
) -> Tensor:
    r"""The minimiser of the quadratic model, $\eta = g^\top d / (c + \epsilon\, d^\top d)$.

    Args:
        slope: ``g·d``, 0-dim.
        curvature: ``c``, 0-dim.
        squared_norm: ``d·d``, 0-dim.
        eps: ``ε``, bounds the rate by ``1/ε`` where the curvature vanishes.

    Examples:
        >>> four, two = torch.tensor(4.0), torch.tensor(2.0)
        >>> float(learning_rate(slope=four, curvature=two, squared_norm=four))
        2.0
    """
    return slope / (curvature.to(slope) + eps * squared_norm)


# --- helpers -------------------------------------------------------------------------------------

_UNSUPPORTED = re.compile(r"forward AD with (?P<op>\S+?)\.? that does not support")


def _unsupported_op(message: str) -> str | None:
    """What forward mode failed on, or None if the error is about something else."""
    if match := _UNSUPPORTED.search(message):
        return match["op"]
    if "setup_context" in message or "implement the jvp function" in message:
        return "a custom autograd.Function"
    if "independent of the inputs" in message:
        return "an op that drops the tangent (a detach, or reentrant checkpointing)"
    if "would mutate a captured Tensor" in message:
        return "an in-place update of a tensor that is not a registered buffer"
    return None


def _differentiable_attention() -> AbstractContextManager[None]:
    """Of the attention kernels only MATH has a forward derivative and a second backward one."""
    return sdpa_kernel(SDPBackend.MATH)


@functools.cache
def _load_forward_rules() -> None:
    """PyTorch loads them at first use, with a deprecation warning that users can't heed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        importlib.import_module("torch._decomp.decompositions_for_jvp")


def _default_step(params: Parameters, direction: Parameters, dtype: torch.dtype) -> Tensor:
    """Moves the parameters by the square root of the precision, relative to their norm."""
    along = torch.stack([torch.linalg.vector_norm(d, dtype=_wide(d)) for d in direction.values()])
    at = torch.stack(
        [torch.linalg.vector_norm(params[n], dtype=_wide(params[n])) for n in direction]
    )
    length = torch.linalg.vector_norm(along)
    reach = torch.linalg.vector_norm(at).clamp(min=1.0)
    step = torch.finfo(dtype).eps ** 0.5 * reach / length
    return torch.where(length > 0, step, torch.ones_like(step))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _named(
    model: nn.Module,
    params: Parameters | Iterable[Tensor],
    direction: Parameters | Iterable[Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters and direction by name, checked against each other."""
    if isinstance(params, Mapping):
        named = dict(params)
    else:
        names: dict[Tensor, str] = {p: name for name, p in unwrap(model).named_parameters()}
        params = list(params)
        missing = [i for i, p in enumerate(params) if p not in names]
        if missing:
            raise ValueError(f"params: entries {missing} are not parameters of the model")
        named = {names[p]: p for p in params}
    if isinstance(direction, Mapping):
        along = {name: direction[name] for name in named if name in direction}
        if direction.keys() != named.keys():
            difference = sorted(direction.keys() ^ named.keys())
            raise ValueError(f"direction: its names differ from those of params: {difference}")
    else:
        direction = list(direction)
        if len(direction) != len(named):
            raise ValueError(
                f"direction: {len(direction)} tensors for {len(named)} parameters; pass one each"
            )
        along = dict(zip(named, direction, strict=True))
    for name, d in along.items():
        if d.shape != named[name].shape:
            raise ValueError(
                f"direction: {name!r} has shape {tuple(d.shape)}, its parameter "
                f"{tuple(named[name].shape)}"
            )
    return named, along
