"""A second, slow implementation of the optimizers: dense Jacobians and Hessians, whole histories.

Written to be read against the thesis and the papers, not to share a line with ``src/adler``:
float64, one flat parameter vector, ``torch.autograd.functional`` only; every mean is taken anew of
all that it is the mean of.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call

# How `Search` measures, by the attributes of an `adler.Measure`.
EVERY_STEP = SimpleNamespace(every=1, fraction=1.0, warmup=0)


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
        parts = zip(self.shapes.items(), self.tensors(theta))
        params = {name: part.view(shape) for (name, shape), part in parts}
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
        return self.hessian_at(self.outputs(theta, x).detach(), y)

    def hessian_at(self, F: Tensor, y: Any) -> Tensor:
        """``∇²L`` at some outputs."""
        return hessian(lambda f: self.criterion(f.view_as(F), y), F.flatten())

    def loss_per_nat(self, theta: Tensor, x: Any, y: Any) -> float:
        """What one nat an example is worth: of a class distribution, or of a Gaussian."""
        if isinstance(self.criterion, nn.MSELoss):
            return 2 * float(self.criterion(self.outputs(theta, x), y))
        return 1.0 if self.criterion.reduction == "mean" else float(len(y))

    def tensors(self, theta: Tensor) -> list[Tensor]:
        """The vector's parts, flat, in the order of the parameters."""
        return list(theta.split([math.prod(shape) for shape in self.shapes.values()]))

    def with_matrices(self, direction: Tensor, gradient: Tensor) -> Tensor:
        """The direction, but of matrices the orthogonalised gradient."""
        rows = zip(self.shapes.values(), self.tensors(direction), self.tensors(gradient))
        return torch.cat([orthogonalized(g, s) if len(s) > 1 else d for s, d, g in rows])

    def initial_sizes(self) -> list[float]:
        """Of each tensor the norm it has now, or that of PyTorch's default initialisation."""
        rows = [shape[0] if shape else 1 for shape in self.shapes.values()]
        norms = [float(w.norm()) for w in self.tensors(self.flat())]
        return [max(norm, math.sqrt(n / 3)) for norm, n in zip(norms, rows)]

    def output_outer_products(self, F: Tensor, y: Any) -> Tensor:
        """The baseline's matrix: mean or sum over examples of ``∇ℓ_i ∇ℓ_iᵀ``."""
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


def discounted(
    values: Sequence[float], discounts: Sequence[float], counts: Sequence[int] | None = None
) -> float:
    """The mean in which a value counts less by each of the discounts that came after its own.

    Each was there so many times.
    """
    counts = [1] * len(values) if counts is None else counts
    weights = [count * math.prod(discounts[j + 1 :]) for j, count in enumerate(counts)]
    return sum(w * v for w, v in zip(weights, values)) / sum(weights)


@dataclass
class Search:
    """Algorithm 1's rate from the list of all measurements, and the bounds of a guard.

    ``kind="gauss_newton"`` is the baseline: another matrix, an arithmetic mean.
    """

    dense: Dense
    kind: str
    beta: float
    eps: float
    guard: Any
    measure: Any
    muon: bool = False

    def __post_init__(self) -> None:
        self.rates: list[float] = []
        self.discounts: list[float] = []
        self.counts: list[int] = []
        self.ratios: list[float] = []
        self.variance = 0.0
        self.loss_per_nat = math.inf

    def look(self, theta: Tensor, d: Tensor, x: Any, y: Any) -> None:
        """Measures ``c / d·d`` on the first examples of a batch, and what a nat is worth there.

        By the first half of them, how much the curvature of so many varies about that of the batch.
        """
        examples = len(y)
        count = min(examples, max(2, math.ceil(self.measure.fraction * examples)))
        x, y = x[:count], y[:count]
        of_all = 1.0 if self.dense.criterion.reduction == "mean" else examples / count
        published = self.kind == "adler"
        matrix = self.dense.hessian_at if published else self.dense.output_outer_products
        v, F = self.dense.jacobian(theta, x) @ d, self.dense.outputs(theta, x).detach()
        c = float(v @ matrix(F, y) @ v)
        self.ratios.append(of_all * c / float(d @ d))
        half, self.variance = count // 2, 0.0
        if count < examples and half > 0:
            w = v[: half * len(v) // count]
            of_half = float(w @ matrix(F[:half], y[:half]) @ w)
            of_half *= 1.0 if self.dense.criterion.reduction == "mean" else count / half
            share = half / (count - half) * (1 - count / examples)
            self.variance = min(1.0, share * (of_half / c - 1) ** 2)
        self.loss_per_nat = of_all * self.dense.loss_per_nat(theta, x, y)

    def rate(self, theta: Tensor, g: Tensor, d: Tensor, x: Any, y: Any, steps: int) -> list[float]:
        """The rate of the step after so many, the minimiser of its model, whether it is bounded."""
        interval = 1 if steps < self.measure.warmup else self.measure.every
        if due := steps % interval == 0:
            self.look(theta, d, x, y)
        slope, size = self.along(g, d, due)
        curvature = discounted(self.ratios, [1 - self.measure.fraction] * len(self.ratios)) * size
        minimiser = slope / (curvature + self.eps * size)
        bound = min(self.bounds(minimiser, curvature))
        if due:
            # Unbiased, to second order, of the batch's log 1/c, or of its 1/c.
            minimiser = slope / ((self.ratios[-1] + self.eps) * size)
            published = self.kind == "adler"
            minimiser /= math.exp(self.variance / 2) if published else 1 + self.variance
            self.rates.append(minimiser)
            self.discounts.append(self.beta**interval)
            self.counts.append(interval)
        if self.kind == "adler":
            logs = [math.log(r) for r in self.rates]
            mean = math.exp(discounted(logs, self.discounts, self.counts))
        else:
            mean = discounted(self.rates, self.discounts, self.counts)
        return [min(mean, bound), minimiser, float(mean > bound)]

    def along(self, g: Tensor, d: Tensor, due: bool) -> tuple[float, float]:
        """``g·d`` and ``d·d``; with Muon, of a matrix by the last measurement's ratio and size."""
        tensors = list(
            zip(self.dense.shapes.values(), self.dense.tensors(g), self.dense.tensors(d))
        )
        if due:
            self.seen = [(float(a @ b / a.norm()), float(b @ b)) for _, a, b in tensors]
        if due or not self.muon:
            return float(g @ d), float(d @ d)
        slope = size = 0.0
        for (shape, a, b), (ratio, square) in zip(tensors, self.seen):
            slope += ratio * float(a.norm()) if len(shape) > 1 else float(a @ b)
            size += square if len(shape) > 1 else float(b @ b)
        return slope, size

    def bounds(self, minimiser: float, curvature: float) -> list[float]:
        """Of the quadratic model, those that there are."""
        found, guard = [math.inf], self.guard
        if guard is not None and guard.trust_region is not None:
            found.append(guard.trust_region * minimiser)
        if guard is not None and guard.max_kl is not None:
            found.append(math.sqrt(2 * guard.max_kl * self.loss_per_nat / curvature))
        return found

    def bounded(self, step: Tensor, rate: float, initial_sizes: Sequence[float]) -> Tensor:
        """The step's direction, in which each tensor that would go too far is shortened alone."""
        if self.guard is None or self.guard.max_relative_change is None:
            return step
        parts = []
        for part, initial in zip(self.dense.tensors(step), initial_sizes):
            most, length = self.guard.max_relative_change * initial, rate * float(part.norm())
            parts.append(part if length <= most else part * most / length)
        return torch.cat(parts)


def orthogonalized(part: Tensor, shape: Sequence[int]) -> Tensor:
    """Muon's direction by singular values, which a polynomial brings near one; flat."""
    matrix = part.view(shape).flatten(1)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / matrix.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return 0.2 * math.sqrt(max(matrix.shape)) * (left * values @ right).flatten()


class Preconditioned:
    """Adam's directions: gradients over the roots of their bias-corrected second moments."""

    def __init__(self, beta: float = 0.999) -> None:
        self.beta, self.count = beta, 0
        self.squares: list[Tensor] = []

    def __call__(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        beta, before = self.beta, self.squares or [torch.zeros_like(g) for g in gradients]
        self.count += 1
        self.squares = [beta * v + (1 - beta) * g * g for v, g in zip(before, gradients)]
        correction = 1 - beta**self.count
        return [g / ((v / correction).sqrt() + 1e-8) for v, g in zip(self.squares, gradients)]


@dataclass
class Trajectory:
    """After every step: where gradients are taken, what is tested, and how far the step went.

    ``clipped`` is by the quadratic model; ``shortened`` counts tensors that would go too far.
    """

    parameters: list[Tensor]
    averages: list[Tensor]
    minibatch_lrs: list[float]
    effective_lrs: list[float]
    clipped: list[bool]
    shortened: list[int]


def run(
    model: nn.Module,
    criterion: nn.Module,
    batches: Sequence[tuple[Any, Any]],
    *,
    kind: str = "adler",
    beta: float = 0.99,
    eps: float = 1e-10,
    guard: Any = None,
    measure: Any = EVERY_STEP,
    momentum: float = 0.0,
    second_moment: float | None = None,
    interpolation: float | None = None,
    weight_decay: float = 0.0,
    muon: float | None = None,
) -> Trajectory:
    """Steps along the gradient, its average, or either of them over Adam's denominator.

    Algorithm 1, or the baseline, without further options. ``second_moment`` is Adam's β₂.
    ``interpolation`` is the β between the iterate and the mean of all iterates; without it the
    parameters are the iterate. Of a step of the iterate the share s arrives at y. It is made longer
    by 1/s, or where momentum repeats each gradient by as much as that is more than 1 / (1 - μ).
    ``muon`` is the momentum of matrices, which are orthogonalised; the rest is as without it.
    """
    search = Search(Dense(model, criterion), kind, beta, eps, guard, measure, muon is not None)
    theta = z = search.dense.flat()
    initial_sizes = search.dense.initial_sizes()
    history: list[Tensor] = []
    first, second, buffer = (torch.zeros_like(z) for _ in range(3))
    out = Trajectory([], [], [], [], [], [])
    for t, (x, y) in enumerate(batches, start=1):
        g = search.dense.gradient(theta, x, y)
        first, scale = momentum * first + (1 - momentum) * g, torch.ones_like(g)
        if second_moment is not None:
            second = second_moment * second + (1 - second_moment) * g**2
            scale = 1 / ((second / (1 - second_moment**t)).sqrt() + 1e-8)
        along, full = scale * g, scale * first / (1 - momentum**t)
        if muon is not None:
            buffer = muon * buffer + (1 - muon) * g
            along = search.dense.with_matrices(along, g)
            full = search.dense.with_matrices(full, (1 - muon) * g + muon * buffer)
        rate, minimiser, clipped = search.rate(theta, g, along, x, y, t - 1)
        step = search.bounded(full, rate, initial_sizes)
        if interpolation is None:
            theta = average = theta - rate * (step + weight_decay * theta)
        else:
            longer = max(1.0, (1 - momentum) / (1 - interpolation * (1 - 1 / t)))
            z = z - rate * longer * (step + weight_decay * theta)
            history.append(z)
            average = torch.stack(history).mean(0)
            theta = (1 - interpolation) * z + interpolation * average
        out.parameters.append(theta)
        out.averages.append(average)
        out.minibatch_lrs.append(minimiser)
        out.effective_lrs.append(rate)
        out.clipped.append(bool(clipped))
        tensors = zip(search.dense.tensors(full), search.dense.tensors(step))
        out.shortened.append(sum(not a.equal(b) for a, b in tensors))
    return out


def jacobian_of(model: nn.Module, x: Any) -> Tensor:
    """Rows by autograd, one output at a time, on the model itself; ``[outputs, parameters]``."""
    state = torch.get_rng_state()
    F = model(x).flatten()
    torch.set_rng_state(state)
    params = list(model.parameters())
    rows = []
    for output in F:
        gradients = torch.autograd.grad(output, params, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(rows)
