"""`AdlerAdam`: the same search along an Adam direction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from adler import _averaging as averaging
from adler._optimizers.base import MeasuredOptimizer
from adler._optimizers.direction import Adam, Direction, moments
from adler._recording.model_loss import ModelLoss
from adler._recording.recorder import RecordedLoss

__all__ = ["AdlerAdam"]


class AdlerAdam(MeasuredOptimizer):
    r"""Adam with decoupled weight decay that measures its own learning rate: nothing to tune.

    Slope and curvature are measured along this minibatch's preconditioned gradient, and the step
    goes along Adam's momentum:

    $$
    d = \frac{g}{\sqrt{\hat v} + \epsilon_A}, \quad
    \eta_k = \frac{g^\top d}{c(d) + \epsilon\, d^\top d}, \quad
    \theta \leftarrow \theta - \min(\hat\eta_k, \rho_k)\, \frac{\hat m}{\sqrt{\hat v} + \epsilon_A},
    $$

    with Adam's bias-corrected moments $\hat m, \hat v$, the discounted geometric mean
    $\hat\eta_k$ of `Adler`, and the bounds $\rho_k$ of `adler._step_length`. Along the momentum
    itself the curvature would be far too small: averaging cancels the sharp, oscillating part of
    the gradient, but not the slope.

    Args:
        params: Parameters of ``model``, or groups of them, with or without names.
        model: The network whose outputs the loss sees. Forward hooks record its calls.
        criterion: The loss, reduced to a scalar; see `Adler`.
        lr: Multiplies the measured rate, so that learning-rate schedulers work; per group.
        betas: Discounts of Adam's first and second moment, in [0, 1); per group.
        adam_eps: ``ε_A``, added to the root of the second moment; per group.
        beta: Discount of the average of rates, in [0, 1).
        eps: ``ε``, bounds a minibatch's rate by ``1/ε``.
        trust_region: A step is at most this many minibatch rates long. ``None``: no guard at all,
            whatever the next two say.
        max_kl: A step moves the batch's predictions by at most so many nats an example, as in
            `Adler`.
        max_relative_change: No weight tensor moves by more than this fraction of its norm.
        weight_decay: Decoupled: ``θ ← θ − rate · weight_decay · θ`` beside the step; per group.
        jvp: ``"forward"``, ``"finite_difference"`` or ``"double_backward"``; see `Adler`.
        curvature_every: Measure every so many steps; the steps between use the average.
        curvature_fraction: Measure on this fraction of the batch; see `Adler`.
        curvature_warmup: Number of first steps that all measure; see `Adler`.
        output_fn: Maps what the model returns to the tensor that the criterion receives.

    Raises:
        ValueError: For an argument out of its range, parameters that are not the model's, or a
            criterion with ``reduction="none"``.
        TypeError: For arguments of another kind, complex parameters included.

    Source: the rule is Algorithm 1 of D. Balboni's thesis (SNS 2025, ch. 7) along another
    direction, which its outlook suggests; the direction is D. P. Kingma, J. Ba, arXiv 1412.6980,
    with the decay of I. Loshchilov, F. Hutter, arXiv 1711.05101.

    Examples:
        >>> import torch
        >>> model, criterion = torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss()
        >>> optimizer = AdlerAdam(model.parameters(), model, criterion)
        >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
        >>> optimizer.zero_grad()
        >>> criterion(model(x), y).backward()
        >>> optimizer.step()
        >>> float(optimizer.param_groups[0]["effective_lr"]) > 0
        True
    """

    _mean = averaging.geometric

    def __init__(
        self,
        params: ParamsT,
        model: nn.Module,
        criterion: Callable[..., Tensor] | ModelLoss,
        *,
        lr: float | Tensor = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        adam_eps: float = 1e-8,
        beta: float = 0.99,
        eps: float = 1e-10,
        trust_region: float | None = 2.0,
        max_kl: float | None = 0.1,
        max_relative_change: float | None = 0.1,
        weight_decay: float = 0.0,
        jvp: str = "forward",
        curvature_every: int = 1,
        curvature_fraction: float = 1.0,
        curvature_warmup: int = 0,
        output_fn: Callable[[Any], Tensor] | None = None,
    ) -> None:
        options = {
            "lr": lr,
            "betas": betas,
            "adam_eps": adam_eps,
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

    def _direction(
        self,
        params: list[Tensor],
        gradients: list[Tensor],
        batch: list[RecordedLoss],
        scale: Tensor | None,
    ) -> Direction:
        equal = self._attendance.equal(self.param_groups, self.state)
        return Adam(self.param_groups, params, gradients, self.state, equal)

    def _make_state(self, params: list[Tensor]) -> None:
        for p in params:
            moments(self.state, p, "exp_avg", "exp_avg_sq")
