"""`SpectralSGD`: the rate that is safe along every direction, not only the gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from adler import _averaging as averaging
from adler import _options
from adler._optimizers.base import MeasuredOptimizer
from adler._options import Guard, Measure, Search
from adler._recording.model_loss import ModelLoss
from adler._step_length import SearchState
from adler.curvature.batch_along import BatchAlong, BatchCurvature
from adler.curvature.spectral import batch_gershgorin_curvature, batch_spectral_curvature

__all__ = ["SpectralSGD"]

# A vector without history takes this many times the iterations.
_FIRST = 30


class SpectralSGD(MeasuredOptimizer):
    r"""Stochastic gradient descent at a rate from the tangent kernel's largest eigenvalue.

    $$
    \eta_k = \frac{1}{2\, \lambda^*(\theta)\, \|\nabla^2 L\| + \epsilon}, \qquad
    \lambda^* = \lambda_{\max}(K), \quad K = J J^\top .
    $$

    $\lambda^* \|\nabla^2 L\|$ bounds the generalized Gauss-Newton matrix in every direction, where
    `Adler` measures it along one: this rate is at most half of Adler's, and its model of the loss
    falls along any step. The eigenvector is kept between steps, in parameter space, so that one
    iteration a step follows the kernel from minibatch to minibatch. Power iteration approaches
    $\lambda^*$ from below, and the guards of `adler._step_length` hold here too.

    With ``gershgorin_columns``, $\lambda^*$ is bounded instead by the largest absolute sum of so
    many columns of $K$, drawn anew at every step: an overestimate once they are all columns.

    With ``mean_curvature``, the mean eigenvalue of $\nabla^2 L$ over all ``n`` outputs takes the
    place of its norm, $\eta_k = n / (2\, \lambda^*\, \mathrm{tr}\, \nabla^2 L)$: a longer step,
    right where the outputs' changes are spread evenly over all directions, and without the
    guarantee above.

    A step costs one forward with its graph more than SGD's, and for each iteration or column one
    backward and one Jacobian-vector product.

    Args:
        params: Parameters of ``model``, or groups of them, with or without names.
        model: The network whose outputs the loss sees. Forward hooks record its calls.
        criterion: The loss, reduced to a scalar; see `Adler`.
        lr: Multiplies the rate, so that learning-rate schedulers work; per group.
        power_iterations: Of each measurement; the first takes thirty times as many.
        gershgorin_columns: Of each measurement, in place of power iteration; ``None``: none.
        mean_curvature: Whether the mean eigenvalue of the loss Hessian stands for its norm.
        weight_decay: Decoupled: ``θ ← θ − rate · weight_decay · θ`` beside the step; per group.
        beta: Discount of the geometric mean of the rates, in [0, 1]; 0: the last one.
        eps: ``ε``, bounds a minibatch's rate by ``1/ε``.
        guard: How long a step may be; ``None``: as long as the average says. See `Guard`.
        measure: How, and how often, the eigenvalue is measured. See `Measure`.
        output_fn: See `Adler`.

    Raises:
        ValueError: For an argument out of its range, parameters that are not the model's, or a
            criterion with ``reduction="none"``.
        TypeError: For arguments of another kind, complex parameters included.

    Source: in the role of Lemma 13 of D. Balboni's thesis (SNS 2025, section 7.5), whose footnote 3
    and section 7.6 propose the mean.

    Examples:
        >>> import torch
        >>> model, criterion = torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss()
        >>> optimizer = SpectralSGD(model.parameters(), model, criterion)
        >>> criterion(model(torch.randn(8, 4)), torch.randint(3, (8,))).backward()
        >>> optimizer.step()
        >>> float(optimizer.param_groups[0]["effective_lr"]) > 0
        True
    """

    _mean = averaging.geometric

    def __init__(
        self,
        params: ParamsT | Optimizer,
        model: nn.Module,
        criterion: Callable[..., Tensor] | ModelLoss,
        *,
        lr: float | Tensor = 1.0,
        power_iterations: int = 1,
        gershgorin_columns: int | None = None,
        mean_curvature: bool = False,
        weight_decay: float = 0.0,
        beta: float = 0.99,
        eps: float = 1e-10,
        guard: Guard | None = Guard(max_relative_change=None),
        measure: Measure = Measure.every_step(),
        output_fn: Callable[[Any], Tensor] | None = None,
    ) -> None:
        own = {
            "power_iterations": power_iterations,
            "gershgorin_columns": gershgorin_columns,
            "mean_curvature": mean_curvature,
        }
        _options.check(own)
        self.power_iterations, self.gershgorin_columns = power_iterations, gershgorin_columns
        self.mean_curvature = mean_curvature
        options = {"lr": lr, "weight_decay": weight_decay}
        search = Search(beta, eps, guard, measure)
        super().__init__(params, model, criterion, output_fn, options, search)

    def _shared_options(self) -> dict[str, Any]:
        return {
            **super()._shared_options(),
            "power_iterations": self.power_iterations,
            "gershgorin_columns": self.gershgorin_columns,
            "mean_curvature": self.mean_curvature,
        }

    def _measure(self, one: BatchAlong, state: SearchState, ranks: list[Any]) -> BatchCurvature:
        """``2 λ* ‖∇²L‖ d·d`` in place of the curvature along ``d``: the rate follows."""
        params = list(one.params.values())
        if ranks:
            raise RuntimeError(
                "step(): SpectralSGD does not run on several processes: the largest eigenvalue of "
                "a mean of kernels is not the mean of theirs; use Adler"
            )
        options: dict[str, Any] = {"jvp": self.measure.jvp, "mean": self.mean_curvature}
        if self.gershgorin_columns is not None:
            found = batch_gershgorin_curvature(
                one, columns=self.gershgorin_columns, seed=state.steps, **options
            )
            return found._replace(value=2 * found.value * one.squared_norm)
        known = all("eigenvector" in self.state[p] for p in params)
        # The gradient lies in the range of Jᵀ.
        start = list(one.direction.values())
        if known:
            start = [self.state[p]["eigenvector"] for p in params]
        found, vectors = batch_spectral_curvature(
            replace(one, direction=dict(zip(one.params, start, strict=True))),
            iterations=self.power_iterations * (1 if known else _FIRST),
            **options,
        )
        # A batch that is not finite must not spoil the next one's start.
        good = torch.isfinite(found.value) & (found.value > 0)
        for p, old, new in zip(params, start, vectors, strict=True):
            # Replaced, never mutated: a state_dict of before stays as it is.
            vector = torch.where(good.to(p.device), new, old)
            self.state[p] = {**self.state[p], "eigenvector": vector}
        return found._replace(value=2 * found.value * one.squared_norm)
