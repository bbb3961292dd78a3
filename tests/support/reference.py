"""A second, slow implementation of Algorithm 1 and of the baseline: dense Jacobians and Hessians.

Written to be read against the thesis, not to share a line with ``src/adler``: float64, one flat
parameter vector, ``torch.autograd.functional`` only.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call


@dataclass
class Dense:
    """A model and a criterion as functions of one flat vector."""

    model: nn.Module
    criterion: nn.Module

    def __post_init__(self) -> None:
        self.shapes = {name: p.shape for name, p in self.model.named_parameters()}

    def flat(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])

    def outputs(self, theta: Tensor, x: Any) -> Tensor:
        parts = theta.split([math.prod(shape) for shape in self.shapes.values()])
        params = {n: part.view(s) for (n, s), part in zip(self.shapes.items(), parts)}
        twin = copy.deepcopy(self.model)  # running statistics of the original stay
        return functional_call(twin, params, (x,))

    def gradient(self, theta: Tensor, x: Any, y: Any) -> Tensor:
        theta = theta.clone().requires_grad_()
        (g,) = torch.autograd.grad(self.criterion(self.outputs(theta, x), y), theta)
        return g

    def jacobian(self, theta: Tensor, x: Any) -> Tensor:
        full = jacobian(lambda t: self.outputs(t, x), theta)
        return full.reshape(-1, theta.numel())

    def loss_hessian(self, theta: Tensor, x: Any, y: Any) -> Tensor:
        """``∇²L`` at the outputs, as a matrix."""
        F = self.outputs(theta, x).detach()
        return hessian(lambda f: self.criterion(f.view_as(F), y), F.flatten())

    def nat(self, theta: Tensor, x: Any, y: Any) -> float:
        """What one nat an example is worth: of a class distribution, or of a Gaussian."""
        if isinstance(self.criterion, nn.MSELoss):
            return 2 * float(self.criterion(self.outputs(theta, x), y))
        return 1.0 if self.criterion.reduction == "mean" else float(len(y))

    def reach(self, theta: Tensor, g: Tensor) -> float:
        """Step length at which the first weight matrix has moved by its norm."""
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        ratios = [
            max(float(w.norm()), math.sqrt(shape[0] / 3)) / float(d.norm())
            for w, d, shape in zip(theta.split(sizes), g.split(sizes), self.shapes.values())
            if len(shape) > 1
        ]
        return min(ratios)

    def output_outer_products(self, theta: Tensor, x: Any, y: Any) -> Tensor:
        """The baseline's matrix: mean or sum over examples of ``∇ℓ_i ∇ℓ_iᵀ``."""
        F = self.outputs(theta, x).detach()
        b, width = len(F), F[0].numel()
        total = torch.zeros(F.numel(), F.numel(), dtype=F.dtype)
        for i in range(b):
            row = F[i : i + 1].clone().requires_grad_()
            (slope,) = torch.autograd.grad(self.criterion(row, y[i : i + 1]), row)
            at = slice(i * width, (i + 1) * width)
            total[at, at] = torch.outer(slope.flatten(), slope.flatten())
        return total / b if self.criterion.reduction == "mean" else total


def scalar(f: Callable[[Tensor], Tensor], *at: float) -> tuple[float, float, float]:
    """Value, gradient norm and spectral norm of the Hessian of a scalar function, at a point."""
    theta = torch.tensor(at, dtype=torch.float64)
    gradient = jacobian(f, theta)
    curvature = torch.linalg.eigvalsh(hessian(f, theta)).abs().max()
    return tuple(map(float, (f(theta).abs(), gradient.norm(), curvature)))


@dataclass
class Trajectory:
    parameters: list[Tensor]
    minibatch_lrs: list[float]
    effective_lrs: list[float]


def run(
    model: nn.Module,
    criterion: nn.Module,
    batches: Sequence[tuple[Any, Any]],
    *,
    kind: str = "adler",
    beta: float = 0.99,
    eps: float = 1e-10,
    trust_region: float | None = None,
    max_kl: float | None = None,
    max_relative_change: float | None = None,
) -> Trajectory:
    """Algorithm 1 (``kind="adler"``) or the Gauss-Newton baseline (``kind="gauss_newton"``)."""
    dense = Dense(model, criterion)
    theta = dense.flat()
    out = Trajectory([], [], [])
    matrix: Callable[..., Tensor] = (
        dense.loss_hessian if kind == "adler" else dense.output_outer_products
    )
    rates: list[float] = []
    for x, y in batches:
        g, J, Q = dense.gradient(theta, x, y), dense.jacobian(theta, x), matrix(theta, x, y)
        G = J.T @ Q @ J
        rate = float(g @ g / (g @ G @ g + eps * g @ g))
        rates.append(rate)
        discounts = [beta ** (len(rates) - 1 - j) for j in range(len(rates))]
        if kind == "adler":
            logs = sum(d * math.log(r) for d, r in zip(discounts, rates))
            mean = math.exp(logs / sum(discounts))
        else:
            mean = sum(d * r for d, r in zip(discounts, rates)) / sum(discounts)
        if trust_region is not None:
            mean = min(mean, trust_region * rate)
        if max_kl is not None:
            mean = min(mean, math.sqrt(2 * max_kl * dense.nat(theta, x, y) / float(g @ G @ g)))
        if max_relative_change is not None:
            mean = min(mean, max_relative_change * dense.reach(theta, g))
        theta = theta - mean * g
        out.parameters.append(theta)
        out.minibatch_lrs.append(rate)
        out.effective_lrs.append(mean)
    return out
