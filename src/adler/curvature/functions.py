r"""Curvature of a loss along a direction in parameter space: pure functions.

For network outputs $F(\theta)$ and a loss $L(F)$, the generalized Gauss-Newton (GGN)
quadratic form along $d$ needs one Jacobian-vector product and no matrix:

$$
v = J_F(\theta)\, d, \qquad c = v^\top \nabla^2 L(F)\, v = d^\top (J^\top Q J)\, d.
$$

For several questions about one batch, `adler.curvature.Objective` binds the arguments once.

Source: D. Balboni, *An Optimization Perspective on Deep Neural Networks*, PhD thesis, Scuola
Normale Superiore, 2025, ch. 7; D. Balboni, D. Bacciu, arXiv 2305.16396.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from adler._recording.replay import Call
from adler.curvature.jacobian import Parameters, directional_derivative
from adler.curvature.objective import Objective
from adler.curvature.parameters import named_direction, named_parameters
from adler.losses import LossHessian

__all__ = ["ggn_product", "jvp", "learning_rate", "quadratic_form"]


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
    objective = Objective(model, inputs, targets, criterion, params, output_fn=output_fn)
    return objective.quadratic_form(direction, jvp)


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
    objective = Objective(model, inputs, targets, criterion, params, output_fn=output_fn)
    return objective.ggn(direction, jvp)


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
