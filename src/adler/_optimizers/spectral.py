"""`SpectralSGD`: the rate that is safe along every direction, not only the gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from adler import _averaging as averaging
from adler._distributed import groups_of
from adler._optimizers.base import SHARED, MeasuredOptimizer
from adler._recording.model_loss import ModelLoss
from adler._recording.recorder import RecordedLoss
from adler.curvature.measurement import BatchCurvature
from adler.curvature.spectral import batch_gershgorin_curvature, batch_spectral_curvature
from adler.losses import LossHessian

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

    A step costs one forward with its graph more than SGD's, and for each iteration or column one
    backward and one Jacobian-vector product.

    Args:
        params: Parameters of ``model``, or groups of them, with or without names.
        model: The network whose outputs the loss sees. Forward hooks record its calls.
        criterion: The loss, reduced to a scalar; see `Adler`.
        lr: Multiplies the rate, so that learning-rate schedulers work; per group.
        power_iterations: Of each measurement; the first takes thirty times as many.
        gershgorin_columns: Of each measurement, in place of power iteration; ``None``: none.
        beta: Discount of the geometric mean of the rates, in [0, 1); 0: the last one.
        eps: ``ε``, bounds a minibatch's rate by ``1/ε``.
        trust_region: A step is at most this many minibatch rates long; ``None``: no guard at all.
        max_kl: See `Adler`.
        max_relative_change: See `Adler`.
        weight_decay: Decoupled: ``θ ← θ − rate · weight_decay · θ`` beside the step; per group.
        jvp: See `Adler`.
        curvature_every: Measure every so many steps; the steps between use the average.
        curvature_fraction: Measure on this fraction of the batch; see `Adler`.
        curvature_warmup: Number of first steps that all measure; see `Adler`.
        output_fn: See `Adler`.

    Raises:
        ValueError: For an argument out of its range, parameters that are not the model's, or a
            criterion with ``reduction="none"``.
        TypeError: For arguments of another kind, complex parameters included.

    Source: in the role of Lemma 13 of D. Balboni's thesis (SNS 2025, ch. 7).

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
    _shared = (*SHARED, "power_iterations", "gershgorin_columns")

    def __init__(
        self,
        params: ParamsT,
        model: nn.Module,
        criterion: Callable[..., Tensor] | ModelLoss,
        *,
        lr: float | Tensor = 1.0,
        power_iterations: int = 1,
        gershgorin_columns: int | None = None,
        beta: float = 0.99,
        eps: float = 1e-10,
        trust_region: float | None = 2.0,
        max_kl: float | None = None,
        max_relative_change: float | None = None,
        weight_decay: float = 0.0,
        jvp: str = "forward",
        curvature_every: int = 1,
        curvature_fraction: float = 1.0,
        curvature_warmup: int = 0,
        output_fn: Callable[[Any], Tensor] | None = None,
    ) -> None:
        options = {
            "lr": lr,
            "power_iterations": power_iterations,
            "gershgorin_columns": gershgorin_columns,
            "beta": beta,
            "eps": eps,
            "trust_region": trust_region,
            "max_kl": max_kl,
            "max_relative_change": max_relative_change,
            "weight_decay": weight_decay,
            "jvp": jvp,
            "curvature_every": curvature_every,
            "curvature_fraction": curvature_fraction,
            "curvature_warmup": curvature_warmup,
        }
        super().__init__(params, model, criterion, options, output_fn)

    def _measure(
        self,
        batch: list[RecordedLoss],
        params: list[Tensor],
        direction: list[Tensor],
        slope: Tensor,
        squared_norm: Tensor,
        scale: Tensor | None,
        hessian: LossHessian | None = None,
    ) -> BatchCurvature:
        """``2 λ* ‖∇²L‖ d·d`` in place of the curvature along ``d``: the rate follows."""
        if groups_of(self._recorder.ddp, params):
            raise RuntimeError(
                "step(): SpectralSGD does not run on several processes: the largest eigenvalue of "
                "a mean of kernels is not the mean of theirs; use Adler"
            )
        shared = self.param_groups[0]
        hessian = self._hessian if hessian is None else hessian
        named = {self._names[p]: p for p in params}
        options: dict[str, Any] = {
            "jvp": shared["jvp"],
            "squared_norm": squared_norm,
            "wants_nat": shared["max_kl"] is not None,
            "amp_scale": scale,
        }
        if shared["gershgorin_columns"] is not None:
            found = batch_gershgorin_curvature(
                batch,
                named,
                self.criterion,
                hessian,
                columns=shared["gershgorin_columns"],
                seed=shared["steps"],
                **options,
            )
            self._remember_engine(found.engine)
            return found._replace(value=2 * found.value * squared_norm)
        known = all("eigenvector" in self.state[p] for p in params)
        # The gradient lies in the range of Jᵀ.
        start = [self.state[p]["eigenvector"] for p in params] if known else direction
        found, vector = batch_spectral_curvature(
            batch,
            named,
            dict(zip(named, start, strict=True)),
            self.criterion,
            hessian,
            iterations=shared["power_iterations"] * (1 if known else _FIRST),
            **options,
        )
        # A batch that is not finite must not spoil the next one's start.
        good = torch.isfinite(found.value) & (found.value > 0)
        for p, old, new in zip(params, start, vector.values(), strict=True):
            # Replaced, never mutated: a state_dict of before stays as it is.
            self.state[p] = {"eigenvector": torch.where(good.to(p.device), new, old)}
        self._remember_engine(found.engine)
        return found._replace(value=2 * found.value * squared_norm)
