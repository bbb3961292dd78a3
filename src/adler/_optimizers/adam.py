"""`AdlerAdam`: the same search along an Adam direction."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from adler import _averaging as averaging
from adler import _tensors
from adler._distributed import like, local
from adler._optimizers.base import MeasuredOptimizer
from adler._optimizers.direction import Direction, State, count_, gradients_of, moments
from adler._options import Guard, Measure, Search
from adler._recording.model_loss import ModelLoss

__all__ = ["Adam", "AdlerAdam", "Preconditioned", "adam_denominators"]

_DTYPE = attrgetter("dtype")


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
        params: Parameters of ``model``, or groups of them, with or without names; or an optimizer
            of them, such as a ``configure_optimizers()`` returns: its groups and their weight decay
            are taken, its rates and all else are not.
        model: The network whose outputs the loss sees. Forward hooks record its calls.
        criterion: The loss, reduced to a scalar; see `Adler`.
        lr: Multiplies the measured rate, so that learning-rate schedulers work; per group.
        betas: Discounts of Adam's first and second moment, in [0, 1); per group.
        adam_eps: ``ε_A``, added to the root of the second moment; per group.
        weight_decay: Decoupled: ``θ ← θ − rate · weight_decay · θ`` beside the step; per group.
        beta: Discount of the average of rates, in [0, 1]; 1 forgets nothing.
        eps: ``ε``, bounds a minibatch's rate by ``1/ε``.
        guard: How long a step may be; ``None``: as long as the average says. See `Guard`.
        measure: How, and how often, curvature is measured. See `Measure`.
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
    ) -> None:
        options = {"lr": lr, "betas": betas, "adam_eps": adam_eps, "weight_decay": weight_decay}
        search = Search(beta, eps, guard, measure)
        super().__init__(params, model, criterion, output_fn, options, search)

    def _direction(self, params: list[Tensor], gradients: list[Tensor]) -> Direction:
        equal = self._step_counts.all_equal(self.param_groups, self.state)
        return Adam(self.param_groups, params, gradients, self.state, equal)

    def _make_state(self, params: list[Tensor]) -> None:
        for p in params:
            moments(self.state, p, *Adam.moments)


class Preconditioned(Direction):
    r"""$g / (\sqrt{\hat v} + \epsilon_A)$, measured and stepped along.

    The second moment is taken as this gradient would leave it; the state stays until the step.

    Args:
        groups: With ``betas`` and ``adam_eps``.
        params: Those with a gradient.
        gradients: Of this minibatch.
        state: The optimizer's; holds ``exp_avg_sq`` and ``step``.
        equal: Whether the counts of a group's parameters are equal, by its id.
    """

    moments: tuple[str, ...] = ("exp_avg_sq",)
    scale_free = True
    made = True

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        params: list[Tensor],
        gradients: list[Tensor],
        state: State,
        equal: Mapping[int, bool],
    ) -> None:
        self._state, self._equal = state, equal
        of = dict(zip(params, gradients, strict=True))
        found: dict[Tensor, Tensor] = {}
        for group in groups:
            mine = [p for p in group["params"] if p in of]
            if not mine:
                continue
            discount = group["betas"][1]
            states = [moments(state, p, *self.moments) for p in mine]
            seconds = local([state["exp_avg_sq"] for state in states])
            g = _as(local([of[p] for p in mine]), seconds)
            steps = [state["step"] for state in states]
            if equal[id(group)]:
                steps = steps[:1]
            roots = _denominators(seconds, g, steps, discount, group["adam_eps"])
            size = _tensors.squared_norm(roots)
            parts = self._times(mine, roots, g)
            # A square that overflows would stay in the moment for ever: NaN, and so no step.
            seen = next((part for part in parts if part.numel()), parts[0])
            if not _tensors.is_on_host(size.device):
                seen.add_((size - size).to(seen))
            elif not math.isfinite(size.numpy()):
                seen.fill_(math.nan)
            parts = _as(parts, mine)
            found.update((p, like(part, p)) for p, part in zip(mine, parts, strict=True))
        super().__init__([found[p] for p in params])
        self._of = found

    def _times(
        self, params: list[Tensor], roots: list[Tensor], gradients: list[Tensor]
    ) -> list[Tensor]:
        """The preconditioned gradients of some parameters; the roots are not needed again."""
        return _tensors.divide_into_(gradients, roots)

    def advance(
        self, group: Mapping[str, Any], params: list[Tensor], skipped: Tensor
    ) -> list[Tensor]:
        """See `Direction.advance`."""
        seconds = [moments(self._state, p, *self.moments)["exp_avg_sq"] for p in params]
        second_moments_(seconds, gradients_of(params), group["betas"][1], skipped)
        return [self._of[p] for p in params]


class Adam(Preconditioned):
    """Adam's step with decoupled decay; measured along the preconditioned gradient."""

    moments = ("exp_avg", "exp_avg_sq")

    def __init__(self, *made_of: Any) -> None:
        self._inverses: dict[Tensor, Tensor] = {}
        super().__init__(*made_of)

    def descend(
        self, group: Mapping[str, Any], params: list[Tensor], rate: Tensor, skipped: Tensor
    ) -> None:
        """As `Direction.descend`; a step that is skipped leaves the moments as they were."""
        count_([moments(self._state, p, *self.moments)["step"] for p in params], skipped)
        super().descend(group, params, rate, skipped)

    def advance(
        self, group: Mapping[str, Any], params: list[Tensor], skipped: Tensor
    ) -> list[Tensor]:
        r"""$\hat m / (\sqrt{\hat v} + \epsilon_A)$; see `Direction.advance`."""
        super().advance(group, params, skipped)
        states = [moments(self._state, p, *self.moments) for p in params]
        firsts, discount = [mine["exp_avg"] for mine in states], group["betas"][0]
        _tensors.lerp_(firsts, gradients_of(params), 1 - discount, skipped)
        steps = [mine["step"] for mine in states]
        if self._equal[id(group)]:
            steps = steps[:1]
        inverses = [self._inverses[p] for p in params]
        directions = list(torch._foreach_mul(_as(local(firsts), inverses), inverses))
        corrections = 1 - discount ** torch.stack([t.to(steps[0].device) for t in steps]).double()
        _divide_(directions, torch.where(corrections == 0, 1.0, corrections))
        directions = _as(directions, params)
        return [like(part, p) for part, p in zip(directions, params, strict=True)]

    def _times(
        self, params: list[Tensor], roots: list[Tensor], gradients: list[Tensor]
    ) -> list[Tensor]:
        # In place: a new tensor costs the host more than a pass over an old one.
        torch._foreach_reciprocal_(roots)
        self._inverses.update(zip(params, roots, strict=True))
        return list(torch._foreach_mul(roots, gradients))


def second_moments_(
    squares: Sequence[Tensor], gradients: Sequence[Tensor], discount: float, skip: Tensor
) -> None:
    r"""In place, $v \leftarrow \beta_2 v + (1 - \beta_2)\, g^2$, or nothing at all.

    Args:
        squares: ``v``; updated.
        gradients: As many, of the same shapes and devices; may be non-finite when skipped.
        discount: ``β₂``.
        skip: 0-dim bool: leave every bit alone.
    """
    for (device, _, _), (v, narrow) in _tensors.local_alike(squares, gradients).items():
        g = _as(narrow, v)
        if _tensors.is_on_host(device) and _tensors.is_on_host(skip.device):
            if not skip.numpy():
                torch._foreach_mul_(v, discount)
                torch._foreach_addcmul_(v, g, g, value=1 - discount)
            continue
        apart = torch._foreach_addcmul(v, g, g, value=-1)
        weight = torch.full((), 1 - discount, dtype=_tensors.widest(device), device=device)
        _tensors.descend_(v, list(apart), weight, skip)


def _denominators(
    seconds: list[Tensor],
    gradients: list[Tensor],
    steps: Sequence[Tensor],
    discount: float,
    offset: float,
) -> list[Tensor]:
    """`adam_denominators` of the moments as the gradients would leave them, in new tensors.

    Args:
        seconds: Second moments before this step; unchanged.
        gradients: Of this step.
        steps: Before this step, of each, or one of all; 0-dim.
        discount: ``β₂``.
        offset: ``ε_A``.
    """
    if not _tensors.is_on_host(seconds[0].device):
        squares = list(torch._foreach_mul(seconds, discount))
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - discount)
        adam_denominators(squares, steps, discount, offset, ahead=1)
        return squares
    # There each pass over the parameters counts. So the first is v + (1/β₂ - 1) g², and what it
    # lacks of v / (1 - β₂ᵗ) is multiplied to the root, as the offset is added.
    if discount == 0:
        roots, known = list(torch._foreach_mul(gradients, gradients)), 1.0
    else:
        known = discount
        roots = list(torch._foreach_addcmul(seconds, gradients, gradients, 1 / discount - 1))
    torch._foreach_sqrt_(roots)
    factors = [math.sqrt(known / (1 - discount ** (float(step.numpy()) + 1))) for step in steps]
    offsets: dict[torch.dtype, Tensor] = {}
    for i, root in enumerate(roots):
        added = offsets.setdefault(root.dtype, torch.tensor(offset, dtype=root.dtype))
        torch.add(added, root, alpha=factors[i % len(factors)], out=root)
    return roots


def adam_denominators(
    squares: list[Tensor],
    steps: Sequence[Tensor],
    discount: float,
    offset: float,
    ahead: int = 0,
) -> None:
    r"""In place, second moments $v$ become $\sqrt{v / (1 - \beta_2^t)} + \epsilon_A$.

    Args:
        squares: Second moments; overwritten.
        steps: ``t`` of each, or one of all; 0-dim, less ``ahead``.
        discount: ``β₂``.
        offset: ``ε_A``.
        ahead: Steps to come.
    """
    home = squares[0].device
    # In float64: 1 - 0.999 keeps four digits in float32.
    corrections = 1 - discount ** (torch.stack([step.to(home) for step in steps]).double() + ahead)
    _divide_(squares, corrections)
    torch._foreach_sqrt_(squares)
    torch._foreach_add_(squares, offset)


def _as(tensors: list[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in the dtypes of others; each itself where that is its own."""
    if all(map(is_, map(_DTYPE, tensors), map(_DTYPE, like))):
        return list(tensors)
    return [t.to(other.dtype) for t, other in zip(tensors, like, strict=True)]


def _divide_(tensors: list[Tensor], by: Tensor) -> None:
    """In place, each by an entry of a vector, or all by its only one."""
    if len(by) == 1:
        _tensors.scale_(tensors, by[0].reciprocal())
    else:
        own = [x.to(t.device) for x, t in zip(by, tensors, strict=True)]
        torch._foreach_div_(tensors, own)
