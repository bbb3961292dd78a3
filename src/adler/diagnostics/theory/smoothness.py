r"""Lipschitz and smoothness constants of a network and of its loss.

Composed layer by layer, by the rules of `adler.diagnostics.theory.composition`. The result
holds, and gradient descent at rate ``1/L`` with it, but every layer loses a factor: use it on small
networks, and to see what depth and width do to it.

Lemmas 16–18 of D. Balboni, *An Optimization Perspective on Deep Neural Networks*, PhD thesis, SNS
2025, appendix B.1.1, with the constants of the losses at the present outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from adler._recording.replay import replaying
from adler.curvature.objective import Objective
from adler.diagnostics.theory.composition import (
    ENTRYWISE,
    ActivationConstants,
    Bounds,
    activation_constants,
    compose,
    constant,
    entrywise,
    linear,
)
from adler.losses import CrossEntropyHessian, MSEHessian
from adler.losses.generic import output_gradient

__all__ = ["loss_bounds", "loss_smoothness", "network_bounds"]

Activations = Mapping[type[nn.Module], ActivationConstants]


def network_bounds(
    model: nn.Module,
    inputs: Tensor,
    radius: float = 0.0,
    *,
    activations: Activations | None = None,
) -> Bounds:
    r"""Of the outputs of a whole batch, for all parameters within a distance of the present ones.

    The set is the ball $\|\theta - \theta_0\| \le r$ of all parameters of the network together;
    ``radius=0`` bounds the derivatives at $\theta_0$. A layer's value is also bounded by what it is
    now and how far it can move, $\|a(\theta_0)\| + r \|Da\|$; the smaller bound counts.

    Args:
        model: Of ``Linear``, ``Flatten`` and activations, in ``Sequential``\ s, nested or not.
        inputs: ``(b, ...)``.
        radius: ``r``. A step of gradient descent needs $\eta \|\nabla h\|$.
        activations: Constants of other entrywise modules, by their class.

    Raises:
        TypeError: If the inputs are not a tensor.
        ValueError: If a module is of another kind, or weights are used twice; if there is no
            input, one is not finite or a parameter is not, or the radius is negative.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.ReLU())
        >>> _ = torch.nn.init.eye_(model[0].weight)
        >>> network_bounds(model, torch.tensor([[3.0, 4.0]]))
        Bounds(value=5.0, lipschitz=5.0, smoothness=inf)
    """
    return _walk(model, inputs, radius, activations or {})[0]


def loss_bounds(
    objective: Objective,
    radius: float = 0.0,
    *,
    activations: Activations | None = None,
) -> Bounds:
    r"""Of the loss of a batch, for all parameters within a distance of the present ones.

    The outputs move by at most $\delta = r \|DF\|$, so with $\beta \ge \|\nabla^2 L\|$,

    $$
    L \le L_0 + \|\nabla L_0\| \delta + \tfrac12 \beta \delta^2, \qquad
    \|\nabla L\| \le \|\nabla L_0\| + \beta \delta ,
    $$

    which `compose` joins to `network_bounds`. For the squared error over ``n`` entries
    $\beta = 2/n$, 2 for the sum. For cross-entropy with the weights $\omega_i$ of
    `adler.losses.CrossEntropyHessian`, $\beta = \tfrac12 \max_i \omega_i$, because
    $u^\top (\mathrm{diag}(p) - p p^\top)\, u$ is the variance of an entry of ``u`` drawn from
    ``p``, at most $(\max u - \min u)^2 / 4 \le \|u\|^2 / 2$; and
    $\|\nabla L\|^2 \le 2 \sum_i \omega_i^2$, because $\|p - t\|^2 \le 2$ for two distributions.
    With ``radius=0``, $\beta$ is that of the present outputs.

    Args:
        objective: The loss of the batch: its network and inputs as for `network_bounds`, its
            criterion `torch.nn.MSELoss` or `torch.nn.CrossEntropyLoss`, or their functions. The
            bounds are those of all parameters of the network, whichever the objective has.
        radius: See `network_bounds`.
        activations: See `network_bounds`.

    Raises:
        ValueError: As `network_bounds`; or if the criterion is another one.

    Examples:
        >>> model, x = torch.nn.Linear(1, 1, bias=False), torch.tensor([[3.0]])
        >>> h = Objective(model, x, torch.zeros(1, 1), torch.nn.MSELoss())
        >>> loss_bounds(h).smoothness  # of 9 w²
        18.0
    """
    hessian, targets = objective.loss_hessian, objective.targets
    # Not NLLHessian, whose form is that of the logits before the outputs.
    if not isinstance(hessian, MSEHessian) and type(hessian) is not CrossEntropyHessian:
        raise ValueError(
            f"criterion={hessian.criterion!r}: bounds are known for MSELoss and CrossEntropyLoss; "
            "for another, compose(Bounds(value, gradient norm, Hessian norm), network_bounds(...))"
        )
    network, outputs = _walk(objective.model, objective.inputs, radius, activations or {})
    loss = float(objective.loss_of(outputs))
    with replaying():
        _, gradient = output_gradient(hessian.criterion, outputs, targets)
        beta = float(hessian.spectral_norm(outputs, targets))
    steep, largest = _norm(gradient), math.inf
    if isinstance(hessian, CrossEntropyHessian):
        weights = hessian.example_weights(outputs, targets)
        largest = math.sqrt(2) * _norm(weights)
        if radius > 0:
            beta = float(weights.max()) / 2
    moved = radius * network.lipschitz
    value = loss + steep * moved + beta * moved**2 / 2
    return compose(Bounds(value, min(steep + beta * moved, largest), beta), network)


def loss_smoothness(
    objective: Objective,
    radius: float = 0.0,
    *,
    activations: Activations | None = None,
) -> float:
    r"""``L`` of a batch's loss: $\|\nabla^2 h(\theta)\| \le L$; the last of `loss_bounds`.

    With ``radius`` at least $\eta \|\nabla h\|$, the descent inequality holds along the step:
    $h(\theta - \eta \nabla h) \le h - \eta (1 - L \eta / 2) \|\nabla h\|^2$.

    Args:
        objective: See `loss_bounds`.
        radius: See `loss_bounds`.
        activations: See `loss_bounds`.

    Raises:
        ValueError: As `loss_bounds`.
    """
    return loss_bounds(objective, radius, activations=activations).smoothness


# --- helpers -------------------------------------------------------------------------------------


def _layers(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Leaf modules in the order of their calls, a repeated one as often as it is called."""
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        for i, child in enumerate(module):
            yield from _layers(child, f"{name}.{i}" if name else str(i))
    else:
        yield name, module


@torch.no_grad()
def _walk(
    model: nn.Module, inputs: Tensor, radius: float, activations: Activations
) -> tuple[Bounds, Tensor]:
    """Bounds of the outputs, and the outputs, float32 or wider."""
    if not isinstance(inputs, Tensor):
        raise TypeError(f"inputs: expected a tensor, got {type(inputs).__name__}")
    if not 0 <= radius < math.inf:
        raise ValueError(f"radius={radius!r}: expected a finite number, at least 0")
    if inputs.numel() == 0:
        raise ValueError(f"inputs: shape {tuple(inputs.shape)}; expected at least one example")
    features = _finite("inputs", inputs)
    bounds = constant(_norm(features))
    seen: set[Tensor] = set()
    for name, module in _layers(model):
        if type(module) is nn.Linear:
            if module.weight in seen:
                raise ValueError(f"model: the weights of {name!r} are used twice; no rule for that")
            seen.add(module.weight)
            bounds, features = _linear(bounds, features, name, module, radius)
        elif type(module) is nn.Flatten:
            features = module(features)
        else:
            constants = _entrywise_constants(name, module, activations)
            with replaying():
                features = module(features.clone())  # it may work in place
            bounds = entrywise(bounds, constants, features.numel())
        now = _norm(features) + radius * bounds.lipschitz
        bounds = bounds._replace(value=min(bounds.value, now))
    return bounds, features


def _linear(
    inner: Bounds, features: Tensor, name: str, module: nn.Linear, radius: float
) -> tuple[Bounds, Tensor]:
    weight = _finite(f"{name}.weight", module.weight)
    bias = None if module.bias is None else _finite(f"{name}.bias", module.bias)
    rows = features.reshape(-1, features.shape[-1])
    hat = rows if bias is None else torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
    bounds = linear(
        inner,
        _spectral_norm(weight) + radius,
        None if bias is None else _norm(bias) + radius,
        len(rows),
        min(
            _spectral_norm(hat) + radius * inner.lipschitz,
            math.sqrt(inner.value**2 + (0 if bias is None else len(rows))),
        ),
    )
    return bounds, nn.functional.linear(features, weight, bias)


def _entrywise_constants(
    name: str, module: nn.Module, activations: Activations
) -> ActivationConstants:
    if type(module) in activations:
        return activations[type(module)]
    try:
        return activation_constants(module)
    except ValueError as error:
        known = ", ".join(sorted(t.__name__ for t in ENTRYWISE))
        raise ValueError(
            f"model: module {name!r} is {type(module).__name__}; known are Linear, Flatten, "
            f"Sequential, {known}; for another entrywise one pass activations="
        ) from error


def _finite(name: str, tensor: Tensor) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name}: not finite, so nothing bounds the network")
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))


def _spectral_norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, ord=2))
