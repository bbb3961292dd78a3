"""`AdlerScheduleFree`: the same search, at the point between an Adam iterate and its average."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from adler import _averaging as averaging
from adler import _distributed as distributed
from adler import _tensors as update
from adler._optimizers.base import MeasuredOptimizer
from adler._optimizers.direction import Adam, Direction, moments
from adler._recording.model_loss import ModelLoss
from adler._recording.recorder import RecordedLoss, remove_all
from adler._recording.replay import is_replaying

__all__ = ["AdlerScheduleFree"]


class AdlerScheduleFree(MeasuredOptimizer):
    r"""Schedule-free AdamW that measures its own learning rate: neither rate nor horizon to set.

    Gradients, slope and curvature are taken at $y$, between the fast iterate $z$ and the average
    $x$ of all $z$ so far, which is what is tested and kept:

    $$
    d = \frac{\nabla h(y)}{\sqrt{\hat v} + \epsilon_A}, \quad
    \eta_k = \frac{g^\top d}{c(d) + \epsilon\, d^\top d}, \quad
    z \leftarrow z - \min(\hat\eta_k, \rho_k)\, d, \quad
    x \leftarrow \bigl(1 - \tfrac1k\bigr)\, x + \tfrac1k z, \quad
    y = (1 - \beta_1)\, z + \beta_1 x,
    $$

    with $\hat v$, the mean $\hat\eta_k$ and the bounds $\rho_k$ of `AdlerAdam`. The average takes
    the place of a schedule: no number of steps need be known.

    While training the parameters are $y$. They follow the model's mode: a call of the model after
    ``model.eval()``, without gradients, finds $x$ in their place, and the next call in training
    mode, with gradients, finds $y$. `eval` and `train` do the same at once: call `eval` before you
    save the model. With BatchNorm, whose running statistics belong to $y$,
    ``torch.optim.swa_utils.update_bn(loader, model)`` after `eval` makes them those of $x$.

    Args:
        params: Parameters of ``model``, or groups of them, with or without names.
        model: The network whose outputs the loss sees. Forward hooks record its calls.
        criterion: The loss, reduced to a scalar; see `Adler`.
        lr: Multiplies the measured rate; per group. At 1 the fast iterate minimises the minibatch's
            model, but of its step only the fraction ``1 - betas[0]`` arrives at once where the next
            gradient is taken.
        betas: How near ``y`` is to the average, in (0, 1), and the discount of the second moment,
            in [0, 1); per group.
        adam_eps: ``ε_A``, added to the root of the second moment; per group.
        beta: Discount of the average of rates, in [0, 1).
        eps: ``ε``, bounds a minibatch's rate by ``1/ε``.
        trust_region: A step is at most this many minibatch rates long. ``None``: no guard at all,
            whatever the next two say.
        max_kl: As in `Adler`, for steps of ``z``. Off: it costs a little nearly everywhere.
        max_relative_change: As in `Adler`, for steps of ``z`` before ``lr``.
        weight_decay: Decoupled, at ``y``: ``z ← z − rate · weight_decay · y``; per group.
        jvp: ``"forward"``, ``"finite_difference"`` or ``"double_backward"``; see `Adler`.
        curvature_every: Measure every so many steps; the steps between use the average.
        curvature_fraction: Measure on this fraction of the batch; see `Adler`.
        curvature_warmup: Number of first steps that all measure; see `Adler`.
        output_fn: Maps what the model returns to the tensor that the criterion receives.
        follow_mode: Whether a call of the model brings the weights of its mode; if not, only `eval`
            and `train` do.

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
        params: ParamsT,
        model: nn.Module,
        criterion: Callable[..., Tensor] | ModelLoss,
        *,
        lr: float | Tensor = 2.0,
        betas: tuple[float, float] = (0.9, 0.999),
        adam_eps: float = 1e-8,
        beta: float = 0.99,
        eps: float = 1e-10,
        trust_region: float | None = 2.0,
        max_kl: float | None = None,
        max_relative_change: float | None = 0.1,
        weight_decay: float = 0.0,
        jvp: str = "forward",
        curvature_every: int = 1,
        curvature_fraction: float = 1.0,
        curvature_warmup: int = 0,
        output_fn: Callable[[Any], Tensor] | None = None,
        follow_mode: bool = True,
    ) -> None:
        self.follow_mode = follow_mode
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

    def eval(self) -> None:
        """Puts the averages in place of the parameters. Without effect when they are there."""
        # A tensor made under inference_mode could not be used in training.
        with torch.inference_mode(False), torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    mine = self.state.get(p, {})
                    if "z" in mine and "y" not in mine:
                        mine["y"] = p.detach().clone()  # a copy, so that `train` restores every bit
                        p.lerp_(mine["z"], 1 - 1 / group["betas"][0])
            distributed.let_go(self.model)

    def train(self) -> None:
        """Puts the parameters back, bit for bit. Without effect when they are there."""
        with torch.inference_mode(False), torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    if p in self.state and "y" in self.state[p]:
                        p.copy_(self.state[p].pop("y"))
            distributed.let_go(self.model)

    def remove_hooks(self) -> None:
        """As for the other optimizers; the parameters no longer follow the model's mode either."""
        super().remove_hooks()
        self._unfollow()

    def _attach(self) -> None:
        super()._attach()
        handles = [self.model.register_forward_pre_hook(_Follow(self, self.model), prepend=True)]
        self._unfollow = weakref.finalize(self, remove_all, handles)

    def __getstate__(self) -> dict[str, Any]:
        """As for the other optimizers."""
        return {**super().__getstate__(), "follow_mode": self.follow_mode}

    def _direction(
        self,
        params: list[Tensor],
        gradients: list[Tensor],
        batch: list[RecordedLoss],
        scale: Tensor | None,
    ) -> Direction:
        if any("y" in self.state[p] for p in params if p in self.state):
            raise RuntimeError(
                "step(): the parameters are the averages, for testing: call optimizer.train() "
                "before the forward pass of a training step"
            )
        equal = self._attendance.equal(self.param_groups, self.state)
        return ScheduleFree(self.param_groups, params, gradients, self.state, equal)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        super()._check_group(group)
        _check_interpolation(group.get("betas", self.defaults["betas"]))

    def _make_state(self, params: list[Tensor]) -> None:
        for p in params:
            _state(self.state, p)


class _Follow:
    """A hook before the model's forward; its copies and pickles do nothing, as in `capture`."""

    def __init__(self, optimizer: AdlerScheduleFree | None, model: nn.Module | None) -> None:
        self._optimizer = None if optimizer is None else weakref.ref(optimizer)
        self._model = None if model is None else weakref.ref(model)

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def __call__(self, model: nn.Module, _: Any) -> None:
        optimizer = None if self._optimizer is None else self._optimizer()
        if optimizer is None or self._model is None or self._model() is not model:
            return
        if not optimizer.follow_mode or is_replaying():
            return
        # Neither: fine-tuning in eval mode, `update_bn`; what is there stays.
        if model.training and torch.is_grad_enabled():
            optimizer.train()
        elif not model.training and not torch.is_grad_enabled():
            optimizer.eval()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Follow, (None, None)


class ScheduleFree(Adam):
    """From ``y``, measured along the preconditioned gradient there; moves ``z``, ``x`` and ``y``.

    Args:
        groups: With ``betas`` and ``adam_eps``.
        params: Those with a gradient.
        gradients: Of this minibatch.
        state: The optimizer's; holds ``z``, ``exp_avg_sq`` and ``step``.
        equal: Whether the counts of a group's parameters are equal, by its id.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        params: list[Tensor],
        gradients: list[Tensor],
        state: Any,
        equal: Mapping[int, bool],
    ) -> None:
        super().__init__(groups, params, gradients, state, equal)
        self._of = dict(zip(params, self.along, strict=True))

    def descend(
        self, group: Mapping[str, Any], params: list[Tensor], rate: Tensor, skipped: Tensor
    ) -> None:
        """As `Direction.descend`; a step that is skipped leaves the state as it was."""
        states = [self._moments(p) for p in params]
        update.schedule_free_(
            params,
            [self._of[p] for p in params],
            [p.grad for p in params if p.grad is not None],
            [state["z"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["step"] for state in states],
            rate,
            skipped,
            betas=group["betas"],
            weight_decay=group["weight_decay"],
            equal=self._equal[id(group)],
        )

    def _moments(self, p: Tensor) -> dict[str, Tensor]:
        return _state(self._state, p)


def _state(state: Any, p: Tensor) -> dict[str, Tensor]:
    mine = moments(state, p, "exp_avg_sq")
    if "z" not in mine:
        mine["z"] = p.detach().clone(memory_format=torch.preserve_format)
    return mine


def _check_interpolation(betas: tuple[float, float]) -> None:
    if betas[0] == 0:
        raise ValueError(
            f"betas={betas!r}: the first must be above 0, or the average is never where gradients "
            "are taken; the default is 0.9"
        )
