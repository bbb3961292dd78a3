"""What surrounds networks: the Hessian's second term, dropout, connectivity, the ball of PL*."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adler.curvature import Objective
from adler.diagnostics.hessian import HessianSplit, hessian_split, output_hessian_norm
from adler.diagnostics.landscape import dropout_stability, linear_path, loss_barrier
from adler.diagnostics.theory.ball import conditioned_radius
from examples.pl_theory.config import Experiment
from examples.pl_theory.inputs import Inputs
from examples.pl_theory.networks import activation_of, fully_connected
from examples.pl_theory.training import Task, measured_epochs

__all__ = ["DRAWS", "ball", "connectivity", "perturbation"]

# Of the last layer.
DRAWS = 40
# More than it takes: a few hundred where the kernel's eigenvalues lie a hundredfold apart.
_MOST_STEPS = 20_000


def perturbation(experiment: Experiment, data: Inputs) -> dict[str, Any]:
    r"""The second term of the Hessian, $\nabla L \cdot \nabla^2 F$, of section 7.5 of the thesis.

    Results:
        ``draws``: at initialisation, over draws of the last layer alone: means of the first term
            (GGN), of the second and of its modulus, and the second's standard deviation; along one
            ``random`` direction and along each draw's own ``gradient``. Along the random one,
            within the hidden layers, also the second term's part with the ``targets``, $-\langle
            y, D^2 F[d, d] \rangle$ times the loss's constant.
        ``measured``: in training, the first term's share of the two along the gradient and along a
            random direction.
    """
    objective = _objective(experiment, data, experiment.seed)
    generator = torch.Generator().manual_seed(experiment.seed)
    direction = {
        name: torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for name, p in objective.params.items()
    }
    draws = _over_last_layers(experiment, data, objective, direction, generator)
    measured: dict[str, list[float]] = {}
    wanted = measured_epochs(experiment.epochs, experiment.measurements)
    for epoch in range(experiment.epochs + 1):
        loss, gradient = objective.loss_and_gradient()
        if epoch in wanted:
            row = {
                "epoch": epoch,
                "loss": float(loss),
                "gradient_share": float(hessian_split(objective, gradient).trust),
                "random_share": float(hessian_split(objective, direction).trust),
            }
            for name, value in row.items():
                measured.setdefault(name, []).append(value)
        _step(objective, gradient, _rates(experiment, data.train_x.shape[1]))
    return {"draws": draws, "measured": measured}


def _over_last_layers(
    experiment: Experiment,
    data: Inputs,
    objective: Objective,
    direction: dict[str, Tensor],
    generator: torch.Generator,
) -> dict[str, dict[str, float]]:
    """See `perturbation`."""
    y = torch.nn.functional.one_hot(data.train_y, data.classes).to(data.train_x)
    # The loss's gradient is (a function of the outputs - y) times this.
    constant = 1 / len(y) if experiment.loss == "cross-entropy" else 2 / y.numel()
    # Linear in the outputs: all of its second derivative is the second term.
    of_targets = Objective(objective.model, data.train_x, y, _Linear(-constant))
    *hidden, name = objective.params
    last = objective.params[name]
    inner = {**{n: direction[n] for n in hidden}, name: torch.zeros_like(last)}
    first, scale = last.detach().clone(), 1 / experiment.width**0.5
    random, along, targets = [], [], []
    for _ in range(DRAWS):
        with torch.no_grad():
            last.normal_(0, scale, generator=generator)
        random.append(hessian_split(objective, direction))
        along.append(hessian_split(objective, objective.gradient()))
        targets.append(hessian_split(of_targets, inner).total)
    with torch.no_grad():
        last.copy_(first)
    part = torch.stack(targets)
    return {
        "random": _summary(random),
        "gradient": _summary(along),
        "targets": {"mean": float(part.mean()), "deviation": float(part.std())},
    }


def _summary(splits: Sequence[HessianSplit]) -> dict[str, float]:
    residuals = torch.stack([s.residual for s in splits])
    return {
        "gauss_newton": float(torch.stack([s.gauss_newton for s in splits]).mean()),
        "residual": float(residuals.mean()),
        "residual_deviation": float(residuals.std()),
        "residual_modulus": float(residuals.abs().mean()),
    }


class _Linear(nn.Module):
    """The outputs' inner product with the targets, times a constant."""

    def __init__(self, constant: float) -> None:
        super().__init__()
        self.constant = constant

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.constant * (outputs * targets).sum()


def connectivity(experiment: Experiment, data: Inputs) -> dict[str, Any]:
    r"""Dropout stability of a trained network, and the line from it to another one.

    In the mean-field scaling of the slides, a ``mean-field`` network of width ``N`` is the mean of
    its units, $f(x) = \frac1N \sum_i a_i\, \varphi(w_i \cdot x)$ with $a_i$ of unit variance. The
    rate is that of each unit's own parameters, times ``N``; of ``w`` over ``‖x‖² = d``.

    Results: ``loss`` at the end, ``change`` when every other unit of each hidden layer is left out
    (the first half stays), ``barrier`` on the straight line to a network of other initial weights
    that was trained on the same examples, and ``path``, the losses along it.
    """
    networks = [_objective(experiment, data, experiment.seed + shift) for shift in (0, 1000)]
    rates = _rates(experiment, data.train_x.shape[1])
    for objective in networks:
        for _ in range(experiment.epochs):
            _step(objective, objective.gradient(), rates)
    one, other = networks
    found = dropout_stability(one, kept=0.5)
    ends = [{n: p.detach() for n, p in o.params.items()} for o in networks]
    path = linear_path(one, ends[0], ends[1])
    return {
        "loss": found.loss,
        "other_loss": float(other.loss().detach()),
        "change": found.change,
        "barrier": loss_barrier(path),
        "path": path.tolist(),
    }


def ball(experiment: Experiment, data: Inputs) -> dict[str, Any]:
    r"""Whether gradient descent stays where its tangent kernel is sure to be conditioned.

    One output, the half sum of squares against ±1 (digits from 5 on, and below), steps of
    $1/\lambda_{\max}(K)$ of the start until the loss is a thousandth of it.

    Results: ``radius``, of the ball about the start in which $\lambda_{\min}(K)$ is at least half
    of what it is there, by the constants at its centre; ``distance``, how far training went; the
    kernel's ``smallest`` and ``largest`` eigenvalue at the start and ``smallest_after``;
    ``hessian_norm``, the largest over examples; ``loss_left``, of the start's.
    """
    x = data.train_x
    y = torch.where(data.train_y >= 5, 1.0, -1.0).to(x).unsqueeze(1)
    widths = (x.shape[1], *[experiment.width] * (experiment.depth - 1), 1)
    activation = activation_of(experiment.activation)
    model = fully_connected(activation, widths, experiment.seed, dtype=x.dtype).to(x.device)
    objective = Objective(model, x, y, _HalfSquares())
    eigenvalues = torch.linalg.eigvalsh(objective.tangent_kernel().to_dense())
    smallest, largest = float(eigenvalues[0]), float(eigenvalues[-1])
    bend = max(output_hessian_norm(model, x[i : i + 1], tolerance=1e-3) for i in range(len(x)))
    start = {name: p.detach().clone() for name, p in objective.params.items()}
    first = float(objective.loss().detach())
    for _ in range(_MOST_STEPS):
        loss, gradient = objective.loss_and_gradient()
        if float(loss) <= first / 1000:
            break
        _step(objective, gradient, [1 / largest] * experiment.depth)
    moved = [(p.detach() - start[name]).square().sum() for name, p in objective.params.items()]
    after = torch.linalg.eigvalsh(objective.tangent_kernel().to_dense())
    return {
        "radius": conditioned_radius(smallest, smallest / 2, largest**0.5, bend, len(x)),
        "distance": float(torch.stack(moved).sum().sqrt()),
        "smallest": smallest,
        "largest": largest,
        "smallest_after": float(after[0]),
        "hessian_norm": bend,
        "loss_left": float(objective.loss().detach()) / first,
    }


class _HalfSquares(nn.Module):
    """Half the sum of the squared residuals."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * (outputs - targets).square().sum()


def _objective(experiment: Experiment, data: Inputs, seed: int) -> Objective:
    task = Task(experiment.loss, data.train_y, data.classes)
    x = data.train_x
    widths = (x.shape[1], *[experiment.width] * (experiment.depth - 1), data.classes)
    activation = activation_of(experiment.activation)
    model = fully_connected(activation, widths, seed, dtype=x.dtype).to(x.device)
    if experiment.kind == "mean-field":
        *_, last = model.parameters()
        with torch.no_grad():
            last.mul_(experiment.width**-0.5)  # from variance 1/N to that of a/N
    targets = task.targets.to(x.dtype) if task.targets.is_floating_point() else task.targets
    return Objective(model, x, targets, task.criterion)


def _rates(experiment: Experiment, dimension: int) -> list[float]:
    """Of every weight matrix."""
    rate, N = experiment.rate, experiment.width
    # The last one holds a/N, whose gradient is N times that with respect to a.
    of_means = [rate * N / dimension, rate / N]
    return of_means if experiment.kind == "mean-field" else [rate] * experiment.depth


@torch.no_grad()
def _step(objective: Objective, gradient: dict[str, Tensor], rates: Sequence[float]) -> None:
    for (name, p), rate in zip(objective.params.items(), rates, strict=True):
        assert isinstance(p, nn.Parameter)
        p.sub_(gradient[name], alpha=rate)
