"""What surrounds networks: the Hessian's second term, dropout stability, linear connectivity."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adler.curvature import Objective
from adler.diagnostics.hessian import hessian_split
from adler.diagnostics.landscape import dropout_stability, linear_path, loss_barrier
from examples.pl_theory.config import Experiment
from examples.pl_theory.inputs import Inputs
from examples.pl_theory.networks import activation_of, fully_connected
from examples.pl_theory.training import Task, measured_epochs

__all__ = ["connectivity", "perturbation"]

# Draws of the last layer.
_DRAWS = 40


def perturbation(experiment: Experiment, data: Inputs) -> dict[str, Any]:
    r"""The second term of the Hessian, $\nabla L \cdot \nabla^2 F$, of section 7.5 of the thesis.

    Results:
        ``draws``: at initialisation, over draws of the last layer alone and along one random
            direction: means of the first term (GGN), of the second, and of its modulus.
        ``measured``: in training, the first term's share of the two along the gradient and along a
            random direction.
    """
    objective = _objective(experiment, data, experiment.seed)
    generator = torch.Generator().manual_seed(experiment.seed)
    direction = {
        name: torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for name, p in objective.params.items()
    }
    *_, last = objective.params.values()
    first, scale = last.detach().clone(), 1 / experiment.width**0.5
    splits = []
    for _ in range(_DRAWS):
        with torch.no_grad():
            last.normal_(0, scale, generator=generator)
        splits.append(hessian_split(objective, direction))
    with torch.no_grad():
        last.copy_(first)
    residuals = torch.stack([s.residual for s in splits])
    draws = {
        "gauss_newton": float(torch.stack([s.gauss_newton for s in splits]).mean()),
        "residual": float(residuals.mean()),
        "residual_deviation": float(residuals.std()),
        "residual_modulus": float(residuals.abs().mean()),
    }
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
        _step(objective, gradient, experiment.rate)
    return {"draws": draws, "measured": measured}


def connectivity(experiment: Experiment, data: Inputs) -> dict[str, Any]:
    """Dropout stability of a trained network, and the line from it to another one.

    Results: ``loss`` at the end, ``change`` when every other unit of each hidden layer is left out
    (the first half stays), ``barrier`` on the straight line to a network of other initial weights
    that was trained on the same examples, and ``path``, the losses along it.
    """
    networks = [_objective(experiment, data, experiment.seed + shift) for shift in (0, 1000)]
    for objective in networks:
        for _ in range(experiment.epochs):
            _step(objective, objective.gradient(), experiment.rate)
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


def _objective(experiment: Experiment, data: Inputs, seed: int) -> Objective:
    task = Task(experiment.loss, data.train_y, data.classes)
    x = data.train_x
    widths = (x.shape[1], *[experiment.width] * (experiment.depth - 1), data.classes)
    activation = activation_of(experiment.activation)
    model = fully_connected(activation, widths, seed, dtype=x.dtype).to(x.device)
    targets = task.targets.to(x.dtype) if task.targets.is_floating_point() else task.targets
    return Objective(model, x, targets, task.criterion)


@torch.no_grad()
def _step(objective: Objective, gradient: dict[str, Tensor], rate: float) -> None:
    for name, p in objective.params.items():
        assert isinstance(p, nn.Parameter)
        p.sub_(gradient[name], alpha=rate)
