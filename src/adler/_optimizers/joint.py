r"""Rate and momentum at once: the minimiser of the minibatch model over span{g, δ}.

$\delta$ is the last step. With $G = J^\top Q J$, the model of the step $-\eta g + \mu \delta$ is

$$
-\eta\, g^\top g + \mu\, g^\top \delta + \tfrac12
\begin{pmatrix} \eta \\ -\mu \end{pmatrix}^{\!\top}
\begin{pmatrix} g^\top G g & g^\top G \delta \\ g^\top G \delta & \delta^\top G \delta \end{pmatrix}
\begin{pmatrix} \eta \\ -\mu \end{pmatrix} .
$$

On a quadratic, with full batches and no averaging, its minimisers are the iterates of the method of
conjugate gradients. On minibatches $\mu$ enters a discounted arithmetic mean $\hat\mu$ and the step
goes along $d = g - \rho\, \delta$, $\rho = \hat\mu / \hat\eta$, with a rate measured along $d$: so
the average of rates and all guards of `adler._step_length` hold for the whole step.

Source: the rule of J. Martens, R. Grosse, *Optimizing Neural Networks with Kronecker-factored
Approximate Curvature*, arXiv 1503.05671, section 7, along the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adler import _tensors as update
from adler._averaging import Average, DiscountedMean, arithmetic
from adler._optimizers.direction import Direction, State, decay_
from adler.curvature.measurement import BatchCurvature
from adler.losses import LossHessian

__all__ = ["Joint", "Plane", "joint_direction", "plane_minimiser"]

_KEYS = ("momentum_total", "momentum_weight")


class Plane(NamedTuple):
    """What one minibatch says of the loss on span{g, δ}; 0-dim tensors.

    Attributes:
        slope: ``g·g``.
        last_slope: ``g·δ``.
        curvature: ``gᵀGg``.
        mixed: ``gᵀGδ``.
        last_curvature: ``δᵀGδ``.
    """

    slope: Tensor
    last_slope: Tensor
    curvature: Tensor
    mixed: Tensor
    last_curvature: Tensor


def plane_minimiser(plane: Plane, tolerance: float = 0.0) -> tuple[Tensor, Tensor]:
    r"""Rate ``η`` and momentum ``μ`` at which the model of $-\eta g + \mu \delta$ is least.

    $$
    \eta = \frac{s_g\, c_\delta - c_m s_\delta}{c_g c_\delta - c_m^2}, \qquad
    \mu = \frac{s_g\, c_m - c_g s_\delta}{c_g c_\delta - c_m^2}
    $$

    Args:
        plane: Slopes and curvatures.
        tolerance: Least $1 - c_m^2 / (c_g c_\delta)$ at which both are taken. Below, and where a
            curvature is not positive, ``μ = 0`` and ``η`` is the minimiser along ``g``.

    Returns:
        ``η`` and ``μ``, 0-dim.

    Examples:
        >>> numbers = (1.0, -0.5, 4.0, 1.0, 1.0)
        >>> rate, momentum = plane_minimiser(Plane(*map(torch.tensor, numbers)))
        >>> float(rate), float(momentum)
        (0.5, 1.0)
    """
    slope, last_slope, curvature, mixed, last_curvature = plane
    size, last_size = curvature.sqrt(), last_curvature.sqrt()
    # In units where both curvatures are one.
    s, last_s, cosine = slope / size, last_slope / last_size, mixed / (size * last_size)
    determinant = (1 - cosine) * (1 + cosine)
    rate = (s - cosine * last_s) / (determinant * size)
    momentum = (cosine * s - last_s) / (determinant * last_size)
    both = (determinant > tolerance) & torch.isfinite(rate) & torch.isfinite(momentum)
    return (
        torch.where(both, rate, slope / curvature),
        torch.where(both, momentum, torch.zeros_like(momentum)),
    )


class Joint(Direction):
    """``g − ρ δ``, measured and stepped along.

    Args:
        along: One tensor for each of ``params``.
        params: Those with a gradient.
        state: The optimizer's; holds ``last_step``.
        carried: The param group that holds the average of ``μ``.
        momenta: That average after this step.
        curvature: Of the batch along it, where measured.
    """

    def __init__(
        self,
        along: list[Tensor],
        params: list[Tensor],
        state: State,
        carried: MutableMapping[str, Any],
        momenta: Average,
        curvature: BatchCurvature | None,
    ) -> None:
        super().__init__(along, curvature)
        self._of = dict(zip(params, along, strict=True))
        self._state, self._carried, self._momenta = state, carried, momenta

    def descend(
        self, group: Mapping[str, Any], params: list[Tensor], rate: Tensor, skipped: Tensor
    ) -> None:
        """As `Direction.descend`; a step that is skipped leaves ``δ`` as it was."""
        decay_(group, params, rate)
        along = [self._of[p] for p in params]
        update.descend_(params, along, rate, skipped)
        for p, d in zip(params, along, strict=True):
            before = self._state[p].get("last_step")
            if before is None:
                before = torch.zeros_like(p, memory_format=torch.preserve_format)
            # Replaced, never mutated: a state_dict of before stays as it is.
            step = (rate.to(p.device) * d).neg_()
            self._state[p]["last_step"] = torch.where(skipped.to(p.device), before, step)

    def settle(self, skipped: Tensor) -> None:
        """The momentum of a step that is skipped stays out of the average."""
        for key, after in zip(_KEYS, self._momenta, strict=True):
            before = self._carried.get(key, torch.zeros_like(after)).to(after)
            self._carried[key] = torch.where(skipped, before, after)


def joint_direction(
    params: list[Tensor],
    gradients: list[Tensor],
    state: State,
    shared: MutableMapping[str, Any],
    average: Average,
    mean: DiscountedMean,
    measure: Callable[[list[Tensor], Tensor, LossHessian], BatchCurvature] | None,
    hessian: LossHessian,
) -> Joint:
    """The direction of this step.

    Args:
        params: Those with a gradient.
        gradients: Theirs.
        state: The optimizer's.
        shared: The param group that holds what all share.
        average: Of the rates so far.
        mean: How to read it.
        measure: From a direction, its squared norm and a loss Hessian to the batch's curvature;
            None: this step does not measure.
        hessian: The loss Hessian.
    """
    home, beta = average.total.device, shared["beta"]
    squared_norm = update.squared_norm(gradients, home)
    momenta = Average(*(shared.get(key, average.total * 0).to(average.total) for key in _KEYS))
    known = [state[p].get("last_step") for p in params]
    last = [
        torch.zeros_like(p) if delta is None else delta
        for p, delta in zip(params, known, strict=True)
    ]
    if all(delta is None for delta in known):
        first = None if measure is None else measure(gradients, squared_norm, hessian)
        return Joint(gradients, params, state, shared, momenta, first)

    # As long as g: finite differences are then as exact, and curvatures of one size.
    length = update.squared_norm(last, home).sqrt()
    scale = torch.where(length > 0, squared_norm.sqrt() / length, 0.0)
    scaled = list(torch._foreach_mul(last, [scale.to(delta) for delta in last]))
    last_slope = update.dot(gradients, scaled, home)
    rate, plane, seen = mean.read(average), None, None
    if measure is not None:
        kept: list[Tensor] = []
        measure(gradients, squared_norm, _Keeping(hessian, kept))
        seen = measure(scaled, squared_norm, _Forms(hessian, kept))
        plane = Plane(squared_norm, last_slope, *seen.value.unbind())
        found, momentum = plane_minimiser(
            _regularised(plane, shared["eps"]), _tolerance(gradients, seen.engine)
        )
        admitted = (found > 0) & torch.isfinite(found)
        # Zero: there was no last step, or it is nearly along the gradient.
        pushed = arithmetic.push(momenta, momentum * scale, beta)
        momenta = _where(admitted & (momentum != 0), pushed, momenta)
        rate = mean.read(_where(admitted, mean.push(average, found, beta), average))
    ratio = arithmetic.read(momenta) / (rate * scale)
    descends = torch.isfinite(ratio) & (squared_norm > ratio * last_slope)
    ratio = torch.where(descends, ratio, 0.0)
    along = list(torch._foreach_mul(scaled, [-ratio.to(delta) for delta in scaled]))
    torch._foreach_add_(along, gradients)
    if plane is not None and seen is not None:
        seen = seen._replace(value=_curvature_along(plane, ratio), slope=None)
    return Joint(along, params, state, shared, momenta, seen)


def _regularised(plane: Plane, eps: float) -> Plane:
    """With ``ε`` added to the curvature of every direction; ``δ`` is as long as ``g``."""
    squared_norm, last_slope = plane.slope, plane.last_slope
    return plane._replace(
        curvature=plane.curvature + eps * squared_norm,
        mixed=plane.mixed + eps * last_slope,
        last_curvature=plane.last_curvature + eps * squared_norm,
    )


def _tolerance(tensors: list[Tensor], engine: str) -> float:
    """Where ``1 - cos²`` of g and δ in the geometry of the curvature is less, δ adds rounding."""
    if engine == "finite_difference":
        return 1e-2
    return 1e-10 if all(t.dtype == torch.float64 for t in tensors) else 1e-4


def _curvature_along(plane: Plane, ratio: Tensor) -> Tensor:
    """Of ``g − ρ δ``, as a sum of squares: it cannot go negative by cancellation."""
    size, last_size = plane.curvature.sqrt(), ratio * plane.last_curvature.sqrt()
    cosine = (plane.mixed / (size * plane.last_curvature.sqrt())).clamp(-1, 1)
    value = (size - cosine * last_size).square() + (
        (1 - cosine) * (1 + cosine) * last_size.square()
    )
    return torch.where(ratio == 0, plane.curvature, value)


def _where(condition: Tensor, chosen: Average, otherwise: Average) -> Average:
    return Average(*(torch.where(condition, a, b) for a, b in zip(chosen, otherwise, strict=True)))


class _Keeping(LossHessian):
    """The forms of another, which keeps the tangents that it sees."""

    def __init__(self, hessian: LossHessian, kept: list[Tensor]) -> None:
        self._hessian, self._kept = hessian, kept

    def quadratic_form(self, outputs: Tensor, targets: Any, tangents: Tensor) -> Tensor:
        self._kept.append(tangents)
        return self._hessian.quadratic_form(outputs, targets, tangents)

    def nat(self, outputs: Tensor, targets: Any, value: Tensor) -> Tensor:
        return self._hessian.nat(outputs, targets, value)


class _Forms(LossHessian):
    """``aᵀQa``, ``aᵀQb`` and ``bᵀQb`` of the tangents kept, in their order, and those it sees."""

    def __init__(self, hessian: LossHessian, kept: list[Tensor]) -> None:
        self._hessian, self._kept = hessian, iter(kept)

    def quadratic_form(self, outputs: Tensor, targets: Any, tangents: Tensor) -> Tensor:
        def form(v: Tensor) -> Tensor:
            return self._hessian.quadratic_form(outputs, targets, v)

        a, b = next(self._kept), tangents
        first, second = form(a), form(b)
        # Polarised at equal length, where (p - m) / (p + m) cannot leave [-1, 1].
        size, last_size = first.clamp(min=0).sqrt(), second.clamp(min=0).sqrt()
        unit, last_unit = a / size.to(a), b / last_size.to(b)
        plus, minus = form(unit + last_unit), form(unit - last_unit)
        cosine = torch.where(size * last_size > 0, (plus - minus) / (plus + minus), 0.0)
        return torch.stack([first, cosine * size * last_size, second])

    def nat(self, outputs: Tensor, targets: Any, value: Tensor) -> Tensor:
        return self._hessian.nat(outputs, targets, value)
