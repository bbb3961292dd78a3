r"""Full-batch gradient descent, measured against what Polyak and Łojasiewicz's inequality predicts.

The rate of every step is $1/L$, with ``L`` the largest eigenvalue of the generalized Gauss-Newton
matrix (GGN) there. The infimum of both losses is taken as 0: networks here have more parameters
than there are outputs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adler.curvature import Objective, TangentKernel
from adler.curvature.parameters import flattened
from adler.diagnostics.descent import accumulated_bound, measured_smoothness, predicted_decrease
from adler.diagnostics.features import feature_grams
from adler.diagnostics.ggn import ggn_largest_eigenvalue
from adler.diagnostics.gram import Conditioning, conditioning, degradation_bound
from adler.diagnostics.polyak import kernel_pl_bound, pl_coefficient, weak_pl_bound
from adler.diagnostics.theory.generalisation import (
    generalisation_bound,
    pointwise_hypothesis_stability,
)
from examples.pl_theory.config import Experiment
from examples.pl_theory.inputs import Inputs
from examples.pl_theory.networks import activation_of, fully_connected
from examples.pl_theory.records import columns

__all__ = ["Task", "descend", "largest_eigenpair", "measured_steps"]


class Task:
    """A loss, in the forms that are needed.

    Args:
        loss: ``"mse"`` against one-hot targets, or ``"cross-entropy"``.
        labels: ``(N,)``.
        classes: Number of classes.

    Attributes:
        criterion: The mean loss.
        targets: What it receives.
    """

    def __init__(self, loss: str, labels: Tensor, classes: int) -> None:
        self.is_mse, self.classes = loss == "mse", classes
        self.criterion = nn.MSELoss() if self.is_mse else nn.CrossEntropyLoss()
        self.targets = F.one_hot(labels, classes).double() if self.is_mse else labels

    def each(self, outputs: Tensor) -> Tensor:
        """The loss of each example, ``(N,)``; its mean is the criterion's."""
        if self.is_mse:
            return (outputs - self.targets).square().mean(1)
        return F.cross_entropy(outputs, self.targets, reduction="none")

    def output_gradients(self, outputs: Tensor) -> Tensor:
        """Gradients of each example's own loss with respect to its outputs, ``(N, C)``."""
        if self.is_mse:
            return 2 * (outputs - self.targets) / self.classes
        return outputs.softmax(1) - F.one_hot(self.targets, self.classes)

    def kernel_pl(self, smallest: float, outputs: Tensor) -> float:
        """The PL coefficient that ``λ_min(K)`` guarantees here.

        Cross-entropy has none that holds everywhere: it is the one of its weak form at this loss.
        """
        if self.is_mse:
            return kernel_pl_bound(smallest, outputs, self.targets, self.criterion)
        losses = self.each(outputs)
        return max(smallest, 0.0) * float(weak_pl_bound(losses, self.classes) / losses.mean()) / 2


def measured_steps(steps: int, count: int) -> list[int]:
    """Steps from 0 to ``steps``, first and last among them, denser at the start."""
    inner = [steps * (k / (count - 1)) ** 2 for k in range(count)] if count > 1 else []
    return sorted({0, steps, *(round(step) for step in inner)})


def descend(experiment: Experiment, data: Inputs) -> dict[str, Any]:
    """Trains and measures.

    Results:
        ``steps``: series over the steps, of losses and bounds one longer than of the others.
        ``measured``: series over the steps named there, of the tangent kernel and the test set.
        ``grams``: conditioning of the hidden features' Gram matrices there, by layer.

    The bound from the kernel takes the least of the smallest eigenvalues that were measured.
    """
    dimension = data.train_x.shape[1]
    # Entries of unit mean square, as is usual in training.
    x, test_x = _in_their_span(data.train_x, data.test_x)
    x, test_x = x * math.sqrt(dimension), test_x * math.sqrt(dimension)
    activation = activation_of(experiment.activation, experiment.renormalised)
    widths = (x.shape[1], *[experiment.width] * experiment.depth, data.classes)
    model = fully_connected(activation, widths, experiment.seed, squared_norm=dimension).to(
        x.device
    )
    task = Task(experiment.loss, data.train_y, data.classes)
    test = Task(experiment.loss, data.test_y, data.classes)
    measurer = _Measurer(model, x, task, test_x, test)
    wanted = set(measured_steps(experiment.steps, experiment.measurements))
    path = _Path()
    parameters = list(model.parameters())
    top: Tensor | None = None
    for step in range(experiment.steps + 1):
        outputs = model(x)
        loss = task.criterion(outputs, task.targets)
        gradients = torch.autograd.grad(loss, parameters)
        loss = loss.detach()
        if not torch.isfinite(loss):
            break
        path.outputs.append(outputs.detach())
        path.losses.append(float(loss))
        path.pls.append(float(pl_coefficient(loss, gradients)))
        if step in wanted:
            measurer.measure(step, outputs.detach(), path)
        if step == experiment.steps:
            break
        smoothness, top = _smoothness(model, x, task, top)
        path.smoothnesses.append(smoothness)
        path.squares.append(float(sum(g.square().sum() for g in gradients)))
        with torch.no_grad():
            for p, g in zip(parameters, gradients, strict=True):
                p.sub_(g, alpha=1 / path.smoothnesses[-1])
    return {
        "steps": path.series(task, min(measurer.measured["kernel_smallest"])),
        "measured": measurer.measured,
        "grams": measurer.columns(),
        "diverged": len(path.losses) <= experiment.steps,
    }


def _in_their_span(x: Tensor, test_x: Tensor) -> tuple[Tensor, Tensor]:
    """The examples in an orthonormal basis of their span.

    Neither Gaussian weights nor gradient descent know one orthonormal basis from another, and what
    is orthogonal to all examples does not enter: the same network, with a smaller first layer.
    """
    basis = torch.linalg.qr(torch.cat([x, test_x]).T).Q
    return x @ basis, test_x @ basis


def _smoothness(
    model: nn.Module, x: Tensor, task: Task, start: Tensor | None
) -> tuple[float, Tensor]:
    """The GGN's largest eigenvalue and its eigenvector, from the last step's eigenvector.

    Rayleigh and Ritz on a small Krylov space. Power iteration would not see in time that another
    eigenvalue has overtaken.
    """
    objective = Objective(model, x, task.targets, task.criterion)
    product = flattened(objective.ggn_products(), objective.params)
    dimension = 6
    if start is None:
        generator = torch.Generator().manual_seed(0)
        size = sum(p.numel() for p in objective.params.values())
        start = torch.randn(size, generator=generator, dtype=x.dtype).to(x.device)
        dimension = 30
    return largest_eigenpair(product, start, dimension)


def largest_eigenpair(
    product: Callable[[Tensor], Tensor], start: Tensor, dimension: int
) -> tuple[float, Tensor]:
    """The largest Ritz value, and its vector, in the Krylov space of a symmetric operator."""
    basis = [start / torch.linalg.vector_norm(start)]
    images: list[Tensor] = []
    for _ in range(dimension):
        images.append(product(basis[-1]))
        V = torch.stack(basis)
        rest = images[-1] - V.T @ (V @ images[-1])
        rest = rest - V.T @ (V @ rest)  # once more: rounding
        norm = torch.linalg.vector_norm(rest)
        if norm <= 1e-10 * torch.linalg.vector_norm(images[-1]):
            break
        basis.append(rest / norm)
    V = torch.stack(basis[: len(images)])
    T = V @ torch.stack(images).T
    values, vectors = torch.linalg.eigh((T + T.T) / 2)
    return float(values[-1]), V.T @ vectors[:, -1]


class _Path:
    """What every step leaves."""

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []
        self.losses: list[float] = []
        self.pls: list[float] = []
        self.smoothnesses: list[float] = []
        self.squares: list[float] = []

    def series(self, task: Task, smallest: float) -> dict[str, list[float]]:
        """What is recorded, at full precision: losses hardly differ from one step to the next."""
        T = min(len(self.smoothnesses), len(self.losses) - 1)
        losses, pls, L = self.losses[: T + 1], self.pls[:T], self.smoothnesses[:T]
        kernel = [task.kernel_pl(smallest, outputs) for outputs in self.outputs[:T]]
        drops = [before - after for before, after in itertools.pairwise(losses)]
        taken = [
            float(measured_smoothness(before, after, square, 1 / rate))
            for before, after, square, rate in zip(
                losses, losses[1:], self.squares, L, strict=False
            )
        ]
        return {
            "loss": losses,
            "local_pl": pls,
            "kernel_pl": kernel,
            "smoothness": L,
            "measured_smoothness": taken,
            "local_ratio": _ratios(losses, pls, L, drops),
            "kernel_ratio": _ratios(losses, kernel, L, drops),
            "local_bound": _bound(losses[0], pls, L),
            "kernel_bound": _bound(losses[0], kernel, L),
        }


def _ratios(
    losses: list[float], pls: list[float], smoothnesses: list[float], drops: list[float]
) -> list[float]:
    """Predicted over measured decrease; NaN where the loss did not fall."""
    return [
        h * (1 - float(predicted_decrease(mu, L))) / drop if drop > 0 else math.nan
        for h, mu, L, drop in zip(losses, pls, smoothnesses, drops, strict=False)
    ]


def _bound(initial: float, pls: list[float], smoothnesses: list[float]) -> list[float]:
    if not pls:
        return [initial]
    bounds: list[float] = accumulated_bound(initial, pls, smoothnesses).tolist()
    return bounds


class _Measurer:
    """What is measured at some steps, against the matrices at initialisation."""

    def __init__(
        self, model: nn.Sequential, x: Tensor, task: Task, test_x: Tensor, test: Task
    ) -> None:
        self.model, self.x, self.task, self.test_x, self.test = model, x, task, test_x, test
        # Widths by the name of the activation: linear layers and activations alternate.
        self.layers = {
            str(i + 1): layer.out_features
            for i, layer in enumerate(list(model)[:-1])
            if isinstance(layer, nn.Linear)
        }
        self.measured: dict[str, list[float]] = {}
        self.grams: dict[str, list[Conditioning]] = {}
        self.weyl: dict[str, list[tuple[float, float]]] = {}
        self.first_grams: dict[str, Tensor] = {}
        self.first_kernel: Tensor | None = None
        self.lipschitz = 0.0

    def measure(self, step: int, outputs: Tensor, path: _Path) -> None:
        """Adds what belongs to this step."""
        kernel = TangentKernel(self.model, self.x)
        K = kernel.to_dense()
        if self.first_kernel is None:
            self.first_kernel = K
        found = conditioning(K)
        lower, upper = degradation_bound(self.first_kernel, K)
        ggn = ggn_largest_eigenvalue(
            Objective(self.model, self.x, self.task.targets, self.task.criterion)
        )
        with torch.no_grad():
            test_losses = self.test.each(self.model(self.test_x))
        row = {
            "step": step,
            "kernel_smallest": found.smallest,
            "kernel_largest": found.largest,
            "kernel_log_condition": found.log_condition,
            "kernel_lower": lower,
            "kernel_upper": upper,
            "ggn": ggn,
            **self._generalisation(K, outputs, test_losses, path),
        }
        for name, value in row.items():
            self.measured.setdefault(name, []).append(value)
        for name, G in feature_grams(self.model, self.x, list(self.layers)).items():
            G = G / self.layers[name]
            first = self.first_grams.setdefault(name, G)
            self.grams.setdefault(name, []).append(conditioning(G))
            self.weyl.setdefault(name, []).append(degradation_bound(first, G))

    def _generalisation(
        self, K: Tensor, outputs: Tensor, test_losses: Tensor, path: _Path
    ) -> dict[str, float]:
        """The bound of the expected loss, with the constants seen so far, and what it bounds.

        The largest loss is that of the examples seen, the PL coefficient the least and the
        Lipschitz constant the largest on the path: each is at best as large as the bound demands.
        """
        N, C = outputs.shape
        # ‖∇ℓ_i‖² = δᵀ K_ii δ, with δ the gradient of ℓ_i in the outputs of example i
        delta = self.task.output_gradients(outputs)
        blocks = K.view(N, C, N, C).diagonal(dim1=0, dim2=2)  # (C, C, N)
        squares = torch.einsum("nc,cdn,nd->n", delta, blocks, delta)
        self.lipschitz = max(self.lipschitz, float(squares.max().clamp(min=0).sqrt()))
        losses = self.task.each(outputs)
        most = max(float(losses.max()), float(test_losses.max()))
        pl = min(path.pls)
        risk = float(losses.mean())
        stability = pointwise_hypothesis_stability(pl, self.lipschitz, N, suboptimality=risk)
        bound = generalisation_bound(risk, stability, N, most)
        return {
            "test_loss": float(test_losses.mean()),
            "largest_loss": most,
            "lipschitz": self.lipschitz,
            "least_pl": pl,
            "stability": stability,
            "generalisation_bound": bound.value,
        }

    def columns(self) -> dict[str, dict[str, list[float]]]:
        """The Gram matrices' series, by the number of the hidden layer."""
        return {
            str(layer): {
                **columns(self.grams[name]),
                "weyl_lower": [lower for lower, _ in self.weyl[name]],
                "weyl_upper": [upper for _, upper in self.weyl[name]],
            }
            for layer, name in enumerate(self.layers, start=1)
        }
