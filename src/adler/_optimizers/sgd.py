"""`Adler` and `GaussNewton`: what they search along, and how they average."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from adler import _averaging as averaging
from adler import losses
from adler._averaging import Average
from adler._distributed import groups_of
from adler._optimizers.base import MeasuredOptimizer
from adler._optimizers.direction import Direction, Momentum, moments
from adler._optimizers.joint import joint_direction
from adler._recording.model_loss import ModelLoss
from adler._recording.recorder import RecordedLoss
from adler.curvature.measurement import BatchCurvature

__all__ = ["Adler", "GaussNewton"]

Self = TypeVar("Self", bound="Adler")


class Adler(MeasuredOptimizer):
    r"""Stochastic gradient descent with a measured learning rate: nothing to tune.

    Each step minimises the minibatch's generalized Gauss-Newton model along the gradient and
    averages the minimisers, with discount, in log space:

    $$
    g = \nabla h(\theta), \quad v = J_F(\theta)\, g, \quad
    \eta_k = \frac{g^\top g}{v^\top \nabla^2 L\, v + \epsilon\, g^\top g}, \quad
    \hat\eta_k = \exp\Bigl(\tfrac{\sum_j \beta^{k-j} \log \eta_j}{\sum_j \beta^{k-j}}\Bigr),
    \quad \theta \leftarrow \theta - \min(\hat\eta_k, \rho_k)\, g,
    $$

    where $\rho_k$ is how far the model is trusted: the rules are in `adler._step_length`.

    The training loop does not change: hooks on ``model`` and ``criterion`` record the batch.

    Args:
        params: Parameters of ``model``, or groups of them, with or without names.
        model: The network whose outputs the loss sees. Forward hooks record its calls.
        criterion: The loss, reduced to a scalar. A module (``nn.CrossEntropyLoss()``) is hooked;
            for any other callable the targets go to `step`. A loss that the model computes itself
            is a `ModelLoss`.
        lr: Multiplies the measured rate, so that learning-rate schedulers work; per group.
        beta: Discount of the average, in [0, 1).
        eps: ``ε``, bounds a minibatch's rate by ``1/ε``.
        trust_region: A step is at most this many minibatch rates long: the model is back at its
            start at 2. ``None``: no guard at all, whatever the next two say.
        max_kl: A step moves the batch's predictions by at most so many nats an example, for losses
            that are log-likelihoods; regression losses take the residuals' variance for scale.
            ``None``: by any number.
        max_relative_change: No weight tensor moves by more than this fraction of its norm.
            ``None``: by any fraction.
        weight_decay: Decoupled: ``θ ← θ − rate · weight_decay · θ`` beside the step; per group.
        momentum: ``μ`` in [0, 1), per group: the step goes along the bias-corrected average
            $\hat m$ of the gradients, ``m ← μ m + (1 − μ) g``, at the rate measured along ``g``.
            ``"joint"``: measured with the rate, as the minimiser over the plane of the gradient and
            the last step (`adler._optimizers.joint`), by one more Jacobian-vector product.
        jvp: ``"forward"`` (exact), ``"finite_difference"`` (one more forward, any op) or
            ``"double_backward"``.
        curvature_every: Measure every so many steps; the steps between use the average, under the
            bounds that the last measurement gives along their own direction.
        curvature_fraction: Measure on this fraction of the batch, its first examples; the parts'
            curvatures are averaged over as many as make one batch. See `adler._recording.subbatch`.
        curvature_warmup: Number of first steps that all measure, whatever ``curvature_every``.
        output_fn: Maps what the model returns to the tensor that the criterion receives. Needed
            when the model returns no tensor, or the loop slices or reshapes before the loss.

    Every group carries ``effective_lr``, the rate of its last step; `last_step` says more.

    Raises:
        ValueError: For an argument out of its range, parameters that are not the model's, or a
            criterion with ``reduction="none"``.
        TypeError: For arguments of another kind, complex parameters included.

    Source: D. Balboni, *An Optimization Perspective on Deep Neural Networks*, PhD thesis, SNS 2025,
    ch. 7, Algorithm 1; D. Balboni, D. Bacciu, arXiv 2305.16396. The bounds are ours; `as_published`
    has none.

    Examples:
        >>> import torch
        >>> model, criterion = torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss()
        >>> optimizer = Adler(model.parameters(), model, criterion)
        >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
        >>> optimizer.zero_grad()
        >>> loss = criterion(model(x), y)
        >>> loss.backward()
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
        beta: float = 0.99,
        eps: float = 1e-10,
        trust_region: float | None = 2.0,
        max_kl: float | None = 0.1,
        max_relative_change: float | None = 0.1,
        weight_decay: float = 0.0,
        momentum: float | str = 0.0,
        jvp: str = "forward",
        curvature_every: int = 1,
        curvature_fraction: float = 1.0,
        curvature_warmup: int = 0,
        output_fn: Callable[[Any], Tensor] | None = None,
    ) -> None:
        options = {
            "lr": lr,
            "beta": beta,
            "eps": eps,
            "trust_region": trust_region,
            "max_kl": max_kl,
            "max_relative_change": max_relative_change,
            "weight_decay": weight_decay,
            "momentum": momentum,
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
        shared = self.param_groups[0]
        if shared["momentum"] != "joint":
            plain = all(group["momentum"] == 0 for group in self.param_groups)
            if plain:
                return Direction(gradients)
            equal = self._attendance.equal(self.param_groups, self.state)
            return Momentum(gradients, self.state, equal)

        if groups_of(self._recorder.ddp, params):
            raise RuntimeError(
                "step(): momentum='joint' does not run on several processes: each would find a "
                "momentum of its own; pass a number"
            )

        def measure(
            direction: list[Tensor], squared_norm: Tensor, hessian: losses.LossHessian
        ) -> BatchCurvature:
            return self._measure(
                batch, params, direction, squared_norm, squared_norm, scale, hessian
            )

        return joint_direction(
            params,
            gradients,
            self.state,
            shared,
            Average(shared["rate_total"], shared["rate_weight"]),
            self._mean,
            measure if batch else None,
            self._hessian,
        )

    def _make_state(self, params: list[Tensor]) -> None:
        momentum = {p: group["momentum"] for group in self.param_groups for p in group["params"]}
        for p in params:
            if momentum[p] not in (0, "joint"):
                moments(self.state, p, "exp_avg")

    def _check_shared(self, group: Mapping[str, Any]) -> None:
        super()._check_shared(group)
        shared = self.param_groups[0] if self.param_groups else self.defaults
        kinds = [which.get("momentum", shared["momentum"]) for which in (group, shared)]
        if (kinds[0] == "joint") != (kinds[1] == "joint"):
            raise ValueError(
                f"momentum={kinds[0]!r} in a parameter group, {kinds[1]!r} in another: the joint "
                "minimiser is one for all groups, so momentum='joint' is the optimizer's"
            )

    @classmethod
    def as_published(
        cls: type[Self],
        params: ParamsT,
        model: nn.Module,
        criterion: Callable[..., Tensor] | ModelLoss,
        **overrides: Any,
    ) -> Self:
        """Algorithm 1 to the letter, whatever the defaults become.

        ``lr=1``, ``beta=0.99``, ``eps=1e-10``, an exact Jacobian-vector product at every step, no
        guard, no momentum. On networks without normalisation it can diverge; see the documentation.

        Args:
            params: See the class.
            model: See the class.
            criterion: See the class.
            **overrides: Keyword arguments of the class, in place of the published values.
        """
        published: dict[str, Any] = {
            "lr": 1.0,
            "beta": 0.99,
            "eps": 1e-10,
            "trust_region": None,
            "max_kl": None,
            "max_relative_change": None,
            "weight_decay": 0.0,
            "momentum": 0.0,
            "jvp": "forward",
            "curvature_every": 1,
            "curvature_fraction": 1.0,
            "curvature_warmup": 0,
        }
        return cls(params, model, criterion, **{**published, **overrides})


class GaussNewton(Adler):
    r"""The baseline that ADLER is compared with: outer products of output gradients.

    Everything is as in `Adler` but two pieces. The loss Hessian is replaced by the outer products
    of the per-example output gradients (in the field's terms the empirical Fisher of the outputs,
    BHHH), and the minibatch rates are averaged arithmetically:

    $$
    c = \frac{1}{b} \sum_i (\nabla \ell_i^\top v_i)^2, \qquad
    \hat\eta_k = \frac{\sum_j \beta^{k-j} \eta_j}{\sum_j \beta^{k-j}}.
    $$

    The arguments, the guards and the errors are those of `Adler`.

    Examples:
        >>> import torch
        >>> model, criterion = torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss()
        >>> optimizer = GaussNewton(model.parameters(), model, criterion)
        >>> criterion(model(torch.randn(8, 4)), torch.randint(3, (8,))).backward()
        >>> optimizer.step()
    """

    _mean = averaging.arithmetic

    def _loss_hessian(self) -> losses.LossHessian:
        return losses.EmpiricalFisher(self.criterion)
