r"""Full-batch gradient descent at a constant rate, measured against what theory predicts of it.

The infimum of the losses is taken as 0, as the thesis does (section 6.2): the networks have more
parameters than there are outputs. The smoothness of a step is the largest eigenvalue of the
generalized Gauss-Newton matrix (GGN) there; the thesis says "empirically calculated" of it, no
more.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adler.curvature import Objective
from adler.curvature.parameters import flattened
from adler.diagnostics.gram import conditioning, eigenvalue_perturbation, gram
from adler.diagnostics.polyak import mean_pl_coefficient
from adler.diagnostics.theory.composition import activation_constants
from adler.diagnostics.theory.generalisation import (
    generalisation_gap,
    pointwise_hypothesis_stability,
)
from adler.diagnostics.theory.perturbation import feature_perturbations, gram_perturbation
from examples.pl_theory.config import Experiment
from examples.pl_theory.inputs import Inputs
from examples.pl_theory.networks import activation_of, fully_connected
from examples.pl_theory.spectrum import largest_eigenpair

__all__ = ["Task", "descend", "measured_epochs"]


class Task:
    """A loss, in the forms that are needed.

    Args:
        loss: ``"mse"`` against one-hot targets, ``"mse-softmax"`` of softmax outputs against them,
            or ``"cross-entropy"``.
        labels: ``(N,)``.
        classes: Number of classes.

    Attributes:
        criterion: The mean loss, of the network's outputs (softmax included).
        targets: What it receives.
        bound: The largest loss that an example can have.
    """

    def __init__(self, loss: str, labels: Tensor, classes: int) -> None:
        self.loss, self.labels = loss, labels
        is_mse = loss != "cross-entropy"
        self.criterion: nn.Module = nn.MSELoss() if is_mse else nn.CrossEntropyLoss()
        self.targets = F.one_hot(labels, classes).float() if is_mse else labels
        self.bound = 2 / classes if loss == "mse-softmax" else math.inf

    def head(self) -> nn.Module:
        """What follows the last linear layer."""
        return nn.Softmax(1) if self.loss == "mse-softmax" else nn.Identity()

    def each(self, outputs: Tensor) -> Tensor:
        """The loss of each example, ``(N,)``; its mean is the criterion's."""
        if self.loss == "cross-entropy":
            return F.cross_entropy(outputs, self.targets, reduction="none")
        return (outputs - self.targets).square().mean(1)

    def accuracy(self, outputs: Tensor) -> float:
        """Share of examples whose largest output is that of their label."""
        return float((outputs.argmax(1) == self.labels).double().mean())


def measured_epochs(epochs: int, count: int) -> list[int]:
    """Epochs from 0 to ``epochs``, first and last among them, denser at the start."""
    inner = [epochs * (k / (count - 1)) ** 2 for k in range(count)] if count > 1 else []
    return sorted({0, epochs, *(round(epoch) for epoch in inner)})


def descend(experiment: Experiment, data: Inputs) -> dict[str, Any]:
    """Trains and measures.

    Results:
        ``loss``: training losses of epochs 0 to ``epochs`` + 1.
        ``measured``: series over the epochs named there.
        ``layers``: for each hidden layer, series of its features' Gram matrix there.
        ``diverged``: whether training ended early, at a loss that is not finite.
    """
    dimension = data.train_x.shape[1]
    x, test_x = (t.float() for t in _in_their_span(data.train_x, data.test_x))
    task = Task(experiment.loss, data.train_y, data.classes)
    test = Task(experiment.loss, data.test_y, data.classes)
    widths = (x.shape[1], *[experiment.width] * (experiment.depth - 1), data.classes)
    model = fully_connected(
        activation_of(experiment.activation), widths, experiment.seed, squared_norm=dimension
    )
    model.append(task.head()).to(x.device)
    measurer = _Measurer(model, x, task, test_x, test)
    wanted = set(measured_epochs(experiment.epochs, experiment.measurements))
    losses: list[float] = []
    for epoch in range(experiment.epochs + 2):
        step = _Pass(model, x, task)
        losses.append(float(step.losses.double().mean()))
        if not math.isfinite(losses[-1]) or epoch > experiment.epochs:
            break
        if epoch in wanted:
            measurer.measure(epoch, step)
        with torch.no_grad():
            for weight, gradient in zip(model.parameters(), step.gradients(), strict=True):
                weight.sub_(gradient, alpha=experiment.rate)
    return {
        "loss": losses,
        "measured": measurer.measured,
        "layers": measurer.layers,
        "diverged": len(losses) < experiment.epochs + 2 or not math.isfinite(losses[-1]),
    }


def _in_their_span(x: Tensor, test_x: Tensor) -> tuple[Tensor, Tensor]:
    """The examples in an orthonormal basis of their span.

    Neither Gaussian weights nor gradient descent know one orthonormal basis from another, and what
    is orthogonal to all examples does not enter: the same network, with a smaller first layer.
    """
    basis = torch.linalg.qr(torch.cat([x, test_x]).T).Q
    return x @ basis, test_x @ basis


class _Pass:
    """One forward and one backward pass: what enters and leaves every linear layer."""

    def __init__(self, model: nn.Sequential, x: Tensor, task: Task) -> None:
        entering, leaving, a = [], [], x
        self.features: list[Tensor] = []
        with torch.enable_grad():
            for layer in model:
                if isinstance(layer, nn.Linear):
                    entering.append(a.detach())
                    a = layer(a)
                    leaving.append(a)
                else:
                    a = layer(a)
            losses = task.each(a)
            self.deltas = torch.autograd.grad(losses.sum(), leaving)
        self.entering, self.outputs, self.losses = entering, a.detach(), losses.detach()

    def gradients(self) -> list[Tensor]:
        """Of the mean loss, by weight matrix: ``δᵀ a / N``."""
        n = len(self.losses)
        return [d.T @ a / n for d, a in zip(self.deltas, self.entering, strict=True)]

    def squared_norms(self) -> Tensor:
        """``‖∇ℓ_i‖²`` of each example's own loss: its gradients are outer products."""
        pairs = zip(self.deltas, self.entering, strict=True)
        return torch.stack([d.square().sum(1) * a.square().sum(1) for d, a in pairs]).sum(0)


class _Measurer:
    """What is measured at some epochs, against the matrices at initialisation."""

    def __init__(
        self, model: nn.Sequential, x: Tensor, task: Task, test_x: Tensor, test: Task
    ) -> None:
        self.model, self.task, self.test_x, self.test = model, task, test_x, test
        self.objective = Objective(model, x, task.targets, task.criterion)
        self.slope = activation_constants(model[1]).slope
        self.start = [w.detach().clone() for w in model.parameters()]
        self.norms = [float(torch.linalg.matrix_norm(w, ord=2)) for w in self.start]
        self.measured: dict[str, list[float]] = {}
        self.layers: dict[str, dict[str, list[float]]] = {}
        self.grams: list[Tensor] = []
        self.feature_norms: list[float] = []
        self.top: Tensor | None = None
        self.lipschitz = self.most = 0.0
        self.least_pl = math.inf

    def measure(self, epoch: int, step: _Pass) -> None:
        """Adds what belongs to this epoch."""
        loss = float(step.losses.double().mean())
        squared = float(sum(g.double().square().sum() for g in step.gradients()))
        squares = step.squared_norms().double()
        with torch.no_grad():
            test_outputs = self.model(self.test_x)
            test_losses = self.test.each(test_outputs)
        pl = squared / (2 * loss) if loss > 0 else math.inf
        self._add(
            self.measured,
            epoch=epoch,
            loss=loss,
            squared_norm=squared,
            pl=pl,
            mean_pl=float(mean_pl_coefficient(step.losses.double(), squares)),
            smoothness=self._smoothness(),
            accuracy=self.task.accuracy(step.outputs),
            test_loss=float(test_losses.mean()),
            test_accuracy=self.test.accuracy(test_outputs),
            **self._generalisation(loss, pl, squares, step.losses, test_losses),
        )
        self._grams(step)

    def _smoothness(self) -> float:
        """The GGN's largest eigenvalue, from the last measurement's eigenvector."""
        product = flattened(self.objective.ggn_products(), self.objective.params)
        dimension, start = 4, self.top
        if start is None:
            size = sum(w.numel() for w in self.start)
            start = torch.randn(size, generator=torch.Generator().manual_seed(0))
            dimension = 12
        value, self.top = largest_eigenpair(product, start.to(self.start[0]), dimension)
        return value

    def _generalisation(
        self, loss: float, pl: float, squares: Tensor, losses: Tensor, test_losses: Tensor
    ) -> dict[str, float]:
        """(4.12) and (4.13), with the constants seen so far: least μ, largest G and loss."""
        self.lipschitz = max(self.lipschitz, float(squares.max().sqrt()))
        self.least_pl = min(self.least_pl, pl)
        self.most = max(self.most, float(losses.max()), float(test_losses.max()))
        n = len(losses)
        largest = (
            min(self.task.bound, self.most) if self.task.bound == math.inf else self.task.bound
        )
        stability = pointwise_hypothesis_stability(self.least_pl, self.lipschitz, n, loss)
        return {
            "lipschitz": self.lipschitz,
            "least_pl": self.least_pl,
            "largest_loss": largest,
            "stability": stability,
            "gap_bound": generalisation_gap(stability, n, largest),
        }

    def _grams(self, step: _Pass) -> None:
        """Conditioning of every hidden layer, and the bounds of (4.11) from initialisation."""
        hidden = step.entering[1:]
        grams = [gram(f.double()) for f in hidden]
        if not self.grams:
            self.grams = grams
            norms = [float(torch.linalg.matrix_norm(step.entering[0], ord=2))]
            self.feature_norms = norms + [float(torch.linalg.eigvalsh(G)[-1].sqrt()) for G in grams]
        moved = [
            float(torch.linalg.vector_norm(w.detach() - start))
            for w, start in zip(self.model.parameters(), self.start, strict=True)
        ]
        changes = feature_perturbations(
            self.feature_norms[:-1], self.norms[:-1], moved[:-1], self.slope
        )
        for i, G in enumerate(grams):
            found, first = conditioning(G), self.grams[i]
            start = self.layers.get(str(i + 1), {}).get("smallest", [found.smallest])[0]
            self._add(
                self.layers.setdefault(str(i + 1), {}),
                smallest=found.smallest,
                largest=found.largest,
                log_condition=found.log_condition,
                max_row_sum=found.max_row_sum,
                min_diagonal=found.min_diagonal,
                max_off_diagonal=found.max_off_diagonal,
                bound_operator=start - eigenvalue_perturbation(first, G, "operator"),
                bound_frobenius=start - eigenvalue_perturbation(first, G, "frobenius"),
                bound_composed=start - gram_perturbation(self.feature_norms[i + 1], changes[i]),
            )

    @staticmethod
    def _add(table: dict[str, list[float]], **row: float) -> None:
        for name, value in row.items():
            table.setdefault(name, []).append(value)
