r"""Curvature of a loss along a direction in parameter space: pure functions.

For network outputs $F(\theta)$ and a loss $L(F)$, the generalized Gauss-Newton (GGN)
quadratic form along $d$ needs one Jacobian-vector product and no matrix:

$$
v = J_F(\theta)\, d, \qquad c = v^\top \nabla^2 L(F)\, v = d^\top (J^\top Q J)\, d.
$$

`adler.curvature.jacobian` computes ``v``; its names are here too.

Source: D. Balboni, *An Optimization Perspective on Deep Neural Networks*, PhD thesis, Scuola
Normale Superiore, 2025, ch. 7; D. Balboni, D. Bacciu, arXiv 2305.16396.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from adler._recording.replay import Call, replaying, unwrap
from adler.curvature.jacobian import (
    ENGINES,
    ForwardModeUnsupportedError,
    Parameters,
    directional_derivative,
    double_backward,
    finite_difference,
    forward,
    transpose,
)
from adler.losses import LossHessian, loss_hessian

__all__ = [
    "ENGINES",
    "ForwardModeUnsupportedError",
    "directional_derivative",
    "double_backward",
    "finite_difference",
    "forward",
    "ggn_product",
    "jvp",
    "learning_rate",
    "named_direction",
    "named_parameters",
    "quadratic_form",
    "transpose",
]


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
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> outputs, tangents = jvp(model, model.parameters(), x, [torch.tensor([[10.0, 1.0]])])
        >>> float(tangents)
        12.0
    """
    named = named_parameters(model, params)
    along = named_direction(named, direction)
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
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x, y = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1)
        >>> direction = [torch.tensor([[10.0, 1.0]])]
        >>> float(quadratic_form(model, model.parameters(), x, y, torch.nn.MSELoss(), direction))
        288.0
    """
    hessian = loss_hessian(criterion)
    named = named_parameters(model, params)
    along = named_direction(named, direction)
    call = Call.of(model, inputs, output_fn)
    outputs, tangents, _ = directional_derivative(call, named, along, jvp)
    with replaying():
        return hessian.quadratic_form(outputs, targets, tangents)


def ggn_product(
    model: nn.Module,
    params: Parameters | Iterable[Tensor],
    inputs: Any,
    targets: Any,
    criterion: Callable[..., Tensor] | LossHessian,
    direction: Parameters | Iterable[Tensor],
    jvp: str = "forward",
    *,
    output_fn: Callable[[Any], Tensor] | None = None,
) -> dict[str, Tensor]:
    r"""The GGN times a direction, $J^\top \nabla^2 L\, J d$, of one batch.

    Args:
        model: The network.
        params: See `jvp`.
        inputs: See `jvp`.
        targets: See `quadratic_form`.
        criterion: See `quadratic_form`.
        direction: See `jvp`.
        jvp: See `jvp`.
        output_fn: See `jvp`.

    Returns:
        Names and shapes of ``params``.

    Raises:
        ValueError: As `quadratic_form`.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x, y = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1)
        >>> direction = [torch.tensor([[10.0, 1.0]])]
        >>> product = ggn_product(model, model.parameters(), x, y, torch.nn.MSELoss(), direction)
        >>> product["weight"]
        tensor([[24., 48.]])
    """
    hessian = loss_hessian(criterion)
    named = named_parameters(model, params)
    along = named_direction(named, direction)
    call = Call.of(model, inputs, output_fn)
    outputs, tangents, _ = directional_derivative(call, named, along, jvp)
    _, pull = transpose(call, named)
    with replaying():
        curved = hessian.product(outputs, targets, tangents)
    return dict(pull(curved.to(outputs)))


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
        >>> import torch
        >>> four, two = torch.tensor(4.0), torch.tensor(2.0)
        >>> float(learning_rate(slope=four, curvature=two, squared_norm=four))
        2.0
    """
    return slope / (curvature.to(slope) + eps * squared_norm)


def named_parameters(model: nn.Module, params: Parameters | Iterable[Tensor]) -> dict[str, Tensor]:
    """Parameters by name.

    Args:
        model: The network.
        params: By name already, or a sequence of parameters of the model.

    Raises:
        ValueError: If one of the sequence is not the model's.
    """
    if isinstance(params, Mapping):
        return dict(params)
    names: dict[Tensor, str] = {p: name for name, p in unwrap(model).named_parameters()}
    params = list(params)
    missing = [i for i, p in enumerate(params) if p not in names]
    if missing:
        raise ValueError(f"params: entries {missing} are not parameters of the model")
    return {names[p]: p for p in params}


def named_direction(
    params: Parameters, direction: Parameters | Iterable[Tensor]
) -> dict[str, Tensor]:
    """A direction by name, in the order of the parameters.

    Args:
        params: By name, as `named_parameters` returns them.
        direction: By name too, or a sequence of the same length.

    Raises:
        ValueError: If names, lengths or shapes differ from those of the parameters.
    """
    if isinstance(direction, Mapping):
        along = {name: direction[name] for name in params if name in direction}
        if direction.keys() != params.keys():
            difference = sorted(direction.keys() ^ params.keys())
            raise ValueError(f"direction: its names differ from those of params: {difference}")
    else:
        direction = list(direction)
        if len(direction) != len(params):
            raise ValueError(
                f"direction: {len(direction)} tensors for {len(params)} parameters; pass one each"
            )
        along = dict(zip(params, direction, strict=True))
    for name, d in along.items():
        if d.shape != params[name].shape:
            raise ValueError(
                f"direction: {name!r} has shape {tuple(d.shape)}, its parameter "
                f"{tuple(params[name].shape)}"
            )
    return along
