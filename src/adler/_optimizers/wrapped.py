"""The search along the direction of any optimizer: `wrap`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from adler import _averaging as averaging
from adler import _tensors as update
from adler._optimizers.base import MeasuredOptimizer
from adler._optimizers.direction import Direction, State
from adler._optimizers.fresh_directions import FRESH, Update, fresh
from adler._optimizers.state_backup import SavedState
from adler._options import Guard, Measure
from adler._warning import warn

__all__ = ["Displacement", "Wrapped", "wrap"]

# An unknown base is taken to forget at least this much of its last step.
_LONGEST_MEMORY = 0.99


def wrap(
    base: Optimizer, model: nn.Module, criterion: Callable[..., Tensor], **options: Any
) -> Wrapped:
    """`Wrapped`: ``base`` gives the direction of every step, the search its length.

    Args:
        base: Any optimizer of parameters of ``model`` that steps without a closure.
        model: See `Wrapped`.
        criterion: See `Wrapped`.
        **options: Keyword arguments of `Wrapped`.

    Examples:
        >>> import adler
        >>> model, criterion = nn.Linear(4, 3), nn.CrossEntropyLoss()
        >>> base = torch.optim.NAdam(model.parameters())
        >>> optimizer = wrap(base, model, criterion, guard=adler.Guard(max_kl=0.05))
        >>> optimizer.zero_grad()
        >>> criterion(model(torch.randn(8, 4)), torch.randint(3, (8,))).backward()
        >>> optimizer.step()
        >>> float(optimizer.param_groups[0]["effective_lr"]) > 0
        True
    """
    return Wrapped(base, model, criterion, **options)


class Wrapped(MeasuredOptimizer):
    r"""Steps along the direction of another optimizer, at a measured rate.

    With $\Delta$ the step that the base would take with a learning rate of one, and $D$ what that
    step would be if all gradients had been this minibatch's (`adler._optimizers.fresh_directions`),

    $$
    \eta_k = \frac{g^\top D}{c(D) + \epsilon\, D^\top D}, \qquad
    \theta \leftarrow \theta - \min(\hat\eta_k, \rho_k)\, \Delta,
    $$

    with the average and the bounds of `AdlerAdam`. Along $\Delta$ itself, an average of gradients,
    there is nearly no curvature, and the rates would come out many times too large.

    - The base's state advances once a step, and not at all in a step that is skipped.
    - The base's ``lr`` does not matter: it is one while the base steps, and as it was afterwards.
      Schedulers act on this optimizer, whose ``lr`` multiplies the measured rate.
    - A decoupled weight decay of the base is part of $\Delta$, so it is scaled by the measured
      rate; it is no part of $D$. A coupled one, added to the gradient, enters $\Delta$ and the
      base's moments alone.
    - Any other base is stepped twice from the same state, with the gradient and without. With
      $F = \Delta(g) - \Delta(0)$ and $\mu = \Delta(0)^\top \Delta_{-1} / \|\Delta_{-1}\|^2$, the
      fraction (of at most 0.99) of its last step that the base repeats without a gradient,
      $D = F / (1 - \mu)$: what equal gradients would add up to. The host then waits for the
      device. One warning says so.
    - Bases that keep a copy of the parameters in their state (schedule-free methods) assume that
      their own step was taken, and do not fit.

    Beside the forward pass, a step holds a copy of the gradients, two of the parameters and one of
    the base's state; for bases that are not known, the last step too. The displacement is a
    difference of parameters: in half precision it is coarse. Known bases make the host wait only
    where their state changes its form, at their first step.

    Args:
        base: Any optimizer of parameters of ``model`` that steps without a closure. Its groups are
            taken over.
        model: The network whose outputs the loss sees. Forward hooks record its calls.
        criterion: The loss, reduced to a scalar; see `Adler`.
        lr: Multiplies the measured rate, so that learning-rate schedulers work; per group.
        beta: Discount of the average of rates, in [0, 1]; 1 forgets nothing.
        eps: ``ε``, bounds a minibatch's rate by ``1/ε``.
        guard: How long a step may be; ``None``: as long as the average says. See `Guard`.
        measure: How, and how often, curvature is measured. See `Measure`.
        output_fn: Maps what the model returns to the tensor that the criterion receives.

    Attributes:
        base: The optimizer that gives the direction.

    Raises:
        ValueError: For an argument out of its range, a base that maximises, parameters that are
            not the model's, or a criterion with ``reduction="none"``.
        TypeError: For arguments of another kind, and a base that needs a closure.

    Source: the rule is Algorithm 1 of D. Balboni's thesis (SNS 2025, ch. 7) along another
    direction.
    """

    _mean = averaging.geometric
    base: Optimizer

    def __init__(
        self,
        base: Optimizer,
        model: nn.Module,
        criterion: Callable[..., Tensor],
        *,
        lr: float | Tensor = 1.0,
        beta: float = 0.9999,
        eps: float = 1e-10,
        guard: Guard | None = Guard(),
        measure: Measure = Measure(),
        output_fn: Callable[[Any], Tensor] | None = None,
    ) -> None:
        _check_base(base)
        groups = [{"params": _params_of(group)} for group in base.param_groups]
        super().__init__(
            groups,
            model,
            criterion,
            {"lr": lr},
            beta=beta,
            eps=eps,
            guard=guard,
            measure=measure,
            output_fn=output_fn,
        )
        self.base = base
        if type(base) not in FRESH:
            warn(
                f"wrap: {type(base).__name__} is not one of PyTorch's optimizers that this library "
                "knows, so the rate is measured along what the gradient changes in its step, "
                "found by stepping twice, with and without the gradient"
            )

    def _direction(self, params: list[Tensor], gradients: list[Tensor]) -> Direction:
        theirs = [p for group in self.base.param_groups for p in group["params"]]
        mine = [p for group in self.param_groups for p in group["params"]]
        if len(theirs) != len(mine) or any(p is not q for p, q in zip(theirs, mine, strict=True)):
            raise RuntimeError(
                "step(): the base has other parameters than its wrapper: add groups with "
                "add_param_group of the wrapper, which passes them on"
            )
        return Displacement(self.base, params, gradients, self.state)

    # --- the contract of torch.optim.Optimizer ---------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group here and to the base: ``lr`` is of this optimizer, the rest the base's.

        Raises:
            ValueError: If a parameter is not the model's.
        """
        if "base" not in self.__dict__:  # the constructor: the base has its groups
            super().add_param_group(param_group)
            return
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        own = {key: value for key, value in param_group.items() if key == "lr"}
        super().add_param_group({**own, "params": params})
        theirs = {key: value for key, value in param_group.items() if key != "lr"}
        try:
            self.base.add_param_group({**theirs, "params": params})
            _check_base(self.base)
        except BaseException:
            del self.param_groups[-1]
            del self.base.param_groups[len(self.param_groups) :]
            raise

    def state_dict(self) -> dict[str, Any]:
        """State and groups, and under ``"base"`` those of the base."""
        return {**super().state_dict(), "base": self.base.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads both.

        Raises:
            ValueError: If the groups are others, or there is no base's state.
        """
        own = dict(state_dict)
        if "base" not in own:
            raise ValueError("loaded state dict has no 'base': it is not that of a wrapped one")
        theirs = own.pop("base")
        super().load_state_dict(own)
        self.base.load_state_dict(theirs)

    def __getstate__(self) -> dict[str, Any]:
        """With the base."""
        return {**super().__getstate__(), "base": self.base}


class Displacement(Direction):
    """A step of the base, measured along what it would be with fresh gradients only.

    The base's state has advanced; the parameters are where they were.

    Args:
        base: The optimizer that gives the step.
        params: Those with a gradient.
        gradients: Of this minibatch.
        state: The wrapper's; holds ``gain`` where a known base has momentum, and the ``last`` step
            of any other.
    """

    def __init__(
        self, base: Optimizer, params: list[Tensor], gradients: list[Tensor], state: State
    ) -> None:
        self._saved, self._state = SavedState(base), state
        self.scale_free = type(base) in FRESH and type(base) is not torch.optim.SGD
        self._kept: dict[Tensor, dict[str, Tensor]] = {}
        try:
            if type(base) in FRESH:
                step = _displacement(base, params, gradients)
                along = self._fresh(base, params, gradients)
            else:
                step, along = self._fresh_part(base, params, gradients)
        except BaseException:
            self.undo()
            raise
        self._step = dict(zip(params, step, strict=True))
        super().__init__(along)

    def _fresh(
        self, base: Optimizer, params: list[Tensor], gradients: list[Tensor]
    ) -> list[Tensor]:
        groups = {p: group for group in base.param_groups for p in group["params"]}
        found = []
        for p, gradient in zip(params, gradients, strict=True):
            started, gain = self._saved.knows(p), self._state[p].get("gain")
            one = Update(groups[p], base.state[p], started, gain, gradient)
            found.append(fresh(base, one))
            if one.gain is not None:
                self._kept[p] = {"gain": one.gain}
        return found

    def _fresh_part(
        self, base: Optimizer, params: list[Tensor], gradients: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        squared_norm = update.squared_norm(gradients)
        if not bool(torch.isfinite(squared_norm)):  # nobody knows what the base would do with it
            return gradients, gradients
        idle = _displacement(base, params, [torch.zeros_like(g) for g in gradients])
        self._saved.restore()
        step = _displacement(base, params, gradients)
        along = list(torch._foreach_sub(step, idle))
        memory = torch.zeros_like(squared_norm)
        if all("last" in self._state[p] for p in params):
            last = [self._state[p]["last"] for p in params]
            memory = update.dot(idle, last) / update.squared_norm(last)
        # If what a step leaves of the last one is the fraction μ, equal gradients add up to
        # 1 + μ + μ² + ... times the fresh part.
        gain = 1 / (1 - memory.nan_to_num(0.0).clamp(0, _LONGEST_MEMORY))
        torch._foreach_mul_(along, [gain.to(part) for part in along])
        self._kept = {p: {"last": part} for p, part in zip(params, step, strict=True)}
        return step, along

    def descend(
        self, group: Mapping[str, Any], params: list[Tensor], rate: Tensor, skipped: Tensor
    ) -> None:
        """As `Direction.descend`; a decoupled decay is part of the base's step."""
        steps = self.within_reach(params, [self._step[p] for p in params], rate)
        update.descend_(params, steps, rate, skipped)

    def finish(self, skipped: Tensor) -> None:
        """In a step that is skipped, the base's state goes back to what it was."""
        self._saved.restore_where(skipped)
        for p, kept in self._kept.items():
            for key, after in kept.items():
                before = self._state[p].get(key)
                before = torch.zeros_like(after) if before is None else before
                # Replaced, never mutated: a state_dict of before stays as it is.
                self._state[p][key] = torch.where(skipped.to(after.device), before, after)

    def undo(self) -> None:
        """Puts the base's state back to what it was."""
        self._saved.restore()


@torch.no_grad()
def _displacement(base: Optimizer, params: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    """What a step of the base at rate one subtracts; its state advances, the parameters stay."""
    before = [p.detach().clone() for p in params]
    kept = [p.grad for p in params]
    rates = [group["lr"] for group in base.param_groups]
    try:
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient.clone()  # the base may write into it
        for group, lr in zip(base.param_groups, rates, strict=True):
            group["lr"] = torch.ones_like(lr) if isinstance(lr, Tensor) else 1.0
        base.step()
        return list(torch._foreach_sub(before, params))
    finally:
        torch._foreach_copy_(params, before)
        for p, grad in zip(params, kept, strict=True):
            p.grad = grad
        for group, lr in zip(base.param_groups, rates, strict=True):
            group["lr"] = lr


def _params_of(group: Mapping[str, Any]) -> list[Any]:
    params = list(group["params"])
    return (
        list(zip(group["param_names"], params, strict=True)) if "param_names" in group else params
    )


def _check_base(base: object) -> None:
    if not isinstance(base, Optimizer):
        raise TypeError(f"base: expected a torch.optim.Optimizer, got {type(base).__name__}")
    name = type(base).__name__
    if isinstance(base, MeasuredOptimizer):
        raise TypeError(f"base: {name} measures its rate already")
    needed = [
        parameter.name
        for parameter in inspect.signature(base.step).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    if needed:
        raise TypeError(
            f"base: {name}.step() needs {needed[0]!r}, so its step is not a direction that can be "
            "had at the loop's gradients: wrap an optimizer that steps without one"
        )
    for key in ("maximize", "differentiable"):
        if any(group.get(key, False) for group in base.param_groups):
            raise ValueError(f"base: {key}=True of {name} is not supported: the loss is minimised")
