"""`AdlerScheduleFree`: the Adam direction, the average of the iterates, a measured length."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from adler import _averaging as averaging
from adler._optimizers.adam import Preconditioned
from adler._optimizers.average import AveragedOptimizer, Following
from adler._optimizers.direction import Direction, moments
from adler._options import Guard, Measure, Search
from adler._recording.model_loss import ModelLoss

__all__ = ["AdlerScheduleFree"]


class AdlerScheduleFree(AveragedOptimizer):
    r"""Schedule-free AdamW that measures its own learning rate: neither rate nor horizon to set.

    Gradients, slope and curvature are taken at $y$, between the fast iterate $z$ and the average
    $x$ of all $z$ so far, which is what is tested and kept:

    $$
    d = \frac{\nabla h(y)}{\sqrt{\hat v} + \epsilon_A}, \quad
    \eta_k = \frac{g^\top d}{c(d) + \epsilon\, d^\top d}, \quad
    z \leftarrow z - \frac{\min(\hat\eta_k, \rho_k)}{s_k}\, d, \quad
    x \leftarrow \bigl(1 - \tfrac1k\bigr)\, x + \tfrac1k z, \quad
    y = (1 - \beta_1)\, z + \beta_1 x,
    $$

    with Adam's second moment $\hat v$, the mean $\hat\eta_k$ and the bounds $\rho_k$ of
    `adler._step_length`, and the share $s_k = 1 - \beta_1 (1 - 1/k)$ of a step of $z$ that arrives
    at $y$: the measured length is that of $y$'s move. The average takes the place of a schedule: no
    number of steps need be known.

    While training the parameters are $y$. They follow the model's mode: ``model.eval()`` puts $x$
    in their place, for all that is called of the model, and the next call in training mode, with
    gradients, finds $y$. `eval` and `train` do the same by hand. The model's ``state_dict()`` holds
    $x$ in either mode; ``torch.save(model)`` holds what is there. When the optimizer goes, $x$
    stays in the model. In half precision $z$ and $y$ are kept in float32.

    BatchNorm's running statistics belong to $y$. Where $x$ is tested or saved they are found anew,
    by a forward pass on each of at most ``bn_batches`` batches that training has seen since the
    last time; ``torch.optim.swa_utils.update_bn(loader, model)`` after `eval` takes the whole data.

    Args:
        params: Parameters of ``model``, or groups of them, with or without names; or an optimizer
            of them, such as a ``configure_optimizers()`` returns: its groups and their weight decay
            are taken, its rates and all else are not.
        model: The network whose outputs the loss sees. Forward hooks record its calls.
        criterion: The loss, reduced to a scalar; see `Adler`.
        lr: Multiplies the measured rate, so that learning-rate schedulers work; per group.
        betas: How near ``y`` is to the average, in (0, 1), and the discount of the second moment,
            in [0, 1); per group.
        adam_eps: ``ε_A``, added to the root of the second moment; per group.
        weight_decay: Decoupled, at ``y``: ``z ← z − rate / s · weight_decay · y``; per group.
        beta: Discount of the average of rates, in [0, 1]; 1 forgets nothing.
        eps: ``ε``, bounds a minibatch's rate by ``1/ε``.
        guard: How long a step may be; ``None``: as long as the average says. See `Guard`.
        measure: How, and how often, curvature is measured. See `Measure`.
        output_fn: Maps what the model returns to the tensor that the criterion receives.
        follow_mode: Whether the weights follow the model's mode, and its ``state_dict()`` is of
            the average; if not, only `eval` and `train` place them.
        bn_batches: How many batches of training are kept, to find BatchNorm's running statistics at
            the average; 0 leaves them to ``update_bn``.

    Raises:
        ValueError: For an argument out of its range, parameters that are not the model's, or a
            criterion with ``reduction="none"``.
        TypeError: For arguments of another kind, complex parameters included.

    Source: the points are A. Defazio et al., *The Road Less Scheduled*, arXiv 2405.15682; the rate
    is Algorithm 1 of D. Balboni's thesis (SNS 2025, ch. 7) along the preconditioned gradient.

    Examples:
        >>> import torch
        >>> model, criterion = torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss()
        >>> optimizer = AdlerScheduleFree(model.parameters(), model, criterion)
        >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     criterion(model(x), y).backward()
        ...     optimizer.step()
        >>> _ = model.eval()
        >>> with torch.no_grad():
        ...     tested = criterion(model(x), y)  # at the average
        >>> _ = model.train()
    """

    _mean = averaging.geometric

    def __init__(
        self,
        params: ParamsT | Optimizer,
        model: nn.Module,
        criterion: Callable[..., Tensor] | ModelLoss,
        *,
        lr: float | Tensor = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        adam_eps: float = 1e-8,
        weight_decay: float = 0.0,
        beta: float = 0.9999,
        eps: float = 1e-10,
        guard: Guard | None = Guard(),
        measure: Measure = Measure(),
        output_fn: Callable[[Any], Tensor] | None = None,
        follow_mode: bool = True,
        bn_batches: int = 16,
    ) -> None:
        options = {"lr": lr, "betas": betas, "adam_eps": adam_eps, "weight_decay": weight_decay}
        search, following = Search(beta, eps, guard, measure), Following(follow_mode, bn_batches)
        super().__init__(params, model, criterion, output_fn, options, search, following)

    def _interpolation(self, group: Mapping[str, Any]) -> float | None:
        value: float = group["betas"][0]
        return value

    def _inner_direction(
        self, params: list[Tensor], gradients: list[Tensor], equal: Mapping[int, bool]
    ) -> Direction:
        return Preconditioned(self.param_groups, params, gradients, self.state, equal)

    def _make_inner_state(self, p: Tensor, group: Mapping[str, Any]) -> None:
        moments(self.state, p, *Preconditioned.moments)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        super()._check_group(group)
        betas = group.get("betas", self.defaults["betas"])
        if betas[0] == 0:
            raise ValueError(
                f"betas={betas!r}: the first must be above 0, or the average is never where "
                "gradients are taken; the default is 0.9"
            )
