"""`Adler`, SGD with a measured rate, and its baseline `GaussNewton`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from adler import _averaging as averaging
from adler import _tensors, losses
from adler._distributed import like, local
from adler._optimizers.average import AveragedOptimizer, Following
from adler._optimizers.direction import (
    Direction,
    State,
    count_,
    gradients_of,
    moments,
)
from adler._options import Guard, Measure, Search
from adler._recording.model_loss import ModelLoss

__all__ = ["Adler", "GaussNewton", "Momentum"]

Self = TypeVar("Self", bound="Adler")


class Adler(AveragedOptimizer):
    r"""Stochastic gradient descent with a measured learning rate and averaged iterates.

    Each step minimises the minibatch's generalized Gauss-Newton model along the gradient and
    averages the minimisers, with discount, in log space:

    $$
    g = \nabla h(\theta), \quad v = J_F(\theta)\, g, \quad
    \eta_k = \frac{g^\top g}{v^\top \nabla^2 L\, v + \epsilon\, g^\top g}, \quad
    \hat\eta_k = \exp\Bigl(\tfrac{\sum_j \beta^{k-j} \log \eta_j}{\sum_j \beta^{k-j}}\Bigr),
    \quad \theta \leftarrow \theta - \min(\hat\eta_k, \rho_k)\, g,
    $$

    where $\rho_k$ is how far the model is trusted (the rules are in `adler._step_length`), and
    $\theta$ lies between an iterate and the average of all iterates, which is what is tested and
    kept: see `adler._optimizers.interpolation`. ``interpolation=None`` keeps the last iterate.

    The training loop does not change: hooks on ``model`` and ``criterion`` record the batch.

    Args:
        params: Parameters of ``model``, or groups of them, with or without names; or an optimizer
            of them, such as a ``configure_optimizers()`` returns: its groups and their weight decay
            are taken, its rates and all else are not.
        model: The network whose outputs the loss sees. Forward hooks record its calls.
        criterion: The loss, reduced to a scalar. A module (``nn.CrossEntropyLoss()``) is hooked;
            for any other callable the targets go to `step`. A loss that the model computes itself
            is a `ModelLoss`.
        lr: Multiplies the measured rate, so that learning-rate schedulers work; per group.
        momentum: ``μ`` in [0, 1), per group: the step goes along the bias-corrected average
            $\hat m$ of the gradients, ``m ← μ m + (1 − μ) g``, at the rate measured along ``g``.
        weight_decay: Decoupled: ``θ ← θ − rate · weight_decay · θ`` beside the step; per group.
        interpolation: ``β`` in (0, 1): gradients are taken between the iterate and its average,
            which is what is tested and kept; see `adler._optimizers.interpolation`. ``None``: the
            last iterate is, and a schedule must let the rate fall.
        beta: Discount of the average of rates, in [0, 1]; 1 forgets nothing.
        eps: ``ε``, bounds a minibatch's rate by ``1/ε``.
        guard: How long a step may be; ``None``: as long as the average says. See `Guard`.
        measure: How, and how often, curvature is measured. See `Measure`.
        output_fn: Maps what the model returns to the tensor that the criterion receives. Needed for
            ``step(targets=...)`` where the model returns no tensor; a loop that calls the criterion
            is followed without it, at more cost.
        follow_mode: Whether the weights follow the model's mode, the average in evaluation, and its
            ``state_dict()`` is of the average; if not, only `eval` and `train` place them.
        bn_batches: How many batches of training are kept, to find BatchNorm's running statistics at
            the average; 0 leaves them to ``torch.optim.swa_utils.update_bn``.

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
        params: ParamsT | Optimizer,
        model: nn.Module,
        criterion: Callable[..., Tensor] | ModelLoss,
        *,
        lr: float | Tensor = 1.0,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        interpolation: float | None = 0.9,
        beta: float = 0.9999,
        eps: float = 1e-10,
        guard: Guard | None = Guard(),
        measure: Measure = Measure(),
        output_fn: Callable[[Any], Tensor] | None = None,
        follow_mode: bool = True,
        bn_batches: int = 16,
    ) -> None:
        options = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "interpolation": interpolation,
        }
        search, following = Search(beta, eps, guard, measure), Following(follow_mode, bn_batches)
        super().__init__(params, model, criterion, output_fn, options, search, following)

    def _interpolation(self, group: Mapping[str, Any]) -> float | None:
        value: float | None = group["interpolation"]
        return value

    def _inner_direction(
        self, params: list[Tensor], gradients: list[Tensor], equal: Mapping[int, bool]
    ) -> Direction:
        if all(group["momentum"] == 0 for group in self.param_groups):
            return Direction(gradients)
        return Momentum(gradients, self.state, equal)

    def _make_inner_state(self, p: Tensor, group: Mapping[str, Any]) -> None:
        if group["momentum"] != 0:
            moments(self.state, p, "exp_avg")

    @classmethod
    def as_published(
        cls: type[Self],
        params: ParamsT | Optimizer,
        model: nn.Module,
        criterion: Callable[..., Tensor] | ModelLoss,
        **overrides: Any,
    ) -> Self:
        """Algorithm 1 to the letter, whatever the defaults become.

        ``lr=1``, ``beta=0.99``, ``eps=1e-10``, an exact Jacobian-vector product on the whole batch
        at every step, no guard, no momentum, no average of iterates. On networks without
        normalisation it can diverge; see the documentation.

        Args:
            params: See the class.
            model: See the class.
            criterion: See the class.
            **overrides: Keyword arguments of the class, in place of the published values.
        """
        published: dict[str, Any] = {
            "lr": 1.0,
            "momentum": 0.0,
            "weight_decay": 0.0,
            "interpolation": None,
            "beta": 0.99,
            "eps": 1e-10,
            "guard": None,
            "measure": Measure.every_step(),
        }
        return cls(params, model, criterion, **{**published, **overrides})


class GaussNewton(Adler):
    r"""The empirical-Fisher baseline that ADLER is compared with: the thesis's Gauss-Newton.

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


class Momentum(Direction):
    """The bias-corrected exponential average of the gradients; measured along the gradient.

    Args:
        gradients: Of this minibatch.
        state: The optimizer's; holds ``exp_avg`` and ``step`` where a group has momentum.
        equal: Whether the counts of a group's parameters are equal, by its id.
    """

    def __init__(self, gradients: list[Tensor], state: State, equal: Mapping[int, bool]) -> None:
        super().__init__(gradients)
        self._state, self._equal = state, equal

    def descend(
        self, group: Mapping[str, Any], params: list[Tensor], rate: Tensor, skipped: Tensor
    ) -> None:
        """As `Direction.descend`; a step that is skipped leaves the average as it was."""
        if group["momentum"] != 0:
            count_(self._averages(params)[1], skipped)
        super().descend(group, params, rate, skipped)

    def advance(
        self, group: Mapping[str, Any], params: list[Tensor], skipped: Tensor
    ) -> list[Tensor]:
        """See `Direction.advance`."""
        momentum = group["momentum"]
        if momentum == 0:
            return super().advance(group, params, skipped)
        averages, steps = self._averages(params)
        _tensors.lerp_(averages, gradients_of(params), 1 - momentum, skipped)
        mine = local(averages)
        found = torch._foreach_div(
            mine, _corrections(steps, momentum, self._equal[id(group)], mine)
        )
        return [like(part, p) for part, p in zip(found, params, strict=True)]

    def memory(self, group: Mapping[str, Any]) -> float:
        """See `Direction.memory`."""
        value: float = group["momentum"]
        return value

    def _averages(self, params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        states = [moments(self._state, p, "exp_avg") for p in params]
        return [mine["exp_avg"] for mine in states], [mine["step"] for mine in states]


def _corrections(
    steps: Sequence[Tensor], momentum: float, equal: bool, averages: Sequence[Tensor]
) -> Tensor | list[Tensor]:
    """``1 - μ^t`` of each, on the device of its average; one of all where that is enough.

    Before any step, which is then skipped, 1.
    """
    home = steps[0].device
    counts = torch.stack([t.to(home) for t in (steps[:1] if equal else steps)])
    found = 1 - momentum ** counts.to(_tensors.widest(home))
    found = torch.where(found == 0, 1.0, found)
    if equal and all(m.device == home for m in averages):
        return found[0]
    return [x.to(m.device) for x, m in zip(found.expand(len(averages)), averages, strict=True)]
