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
from adler._optimizers.base_steps import displacement
from adler._optimizers.direction import Direction, State
from adler._optimizers.found_directions import Momenta, find_direction
from adler._optimizers.fresh_directions import Fresh, Update, closed_form, sign
from adler._optimizers.state_backup import SavedState
from adler._options import Guard, Measure, Search
from adler._warning import warn

__all__ = ["Displacement", "Wrapped", "wrap"]

# What `fresh` may be but a function.
_RULES = ("difference", "memoryless", "sign")


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
    - For SGD, the Adams, RMSprop, Adagrad, Muon and Lion, $D$ is in closed form. Of any other base
      it is found from steps that are taken back (`adler._optimizers.found_directions`): the step
      with its averages of gradients emptied, times what equal gradients would add up to where the
      step is linear in them, and as it is where the step is *scale-invariant*, as those of sign
      and orthogonalising methods are. One warning says so, and another where a base has turned
      out to be scale-invariant. The host then waits for the device. ``fresh`` says it instead.
    - Bases that keep a copy of the parameters in their state (schedule-free methods) assume that
      their own step was taken, and do not fit. What a base keeps outside its state and its groups
      sees the steps that are taken back.

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
        fresh: What $D$ is. None: in closed form or found. A function of an `Update`, called for
            each parameter after the base's step, that returns a tensor of its shape. Or for all
            parameters ``"sign"``, the signs of the gradient; ``"memoryless"``, the base's step
            with its averages of gradients emptied; ``"difference"``, what the gradient changes in
            the base's step, and equal gradients would add up to. No part of a checkpoint.

    Attributes:
        base: The optimizer that gives the direction.
        fresh: As given.

    Raises:
        ValueError: For an argument out of its range, a base that maximises, parameters that are
            not the model's, or a criterion with ``reduction="none"``.
        TypeError: For arguments of another kind, and a base that needs a closure.

    Source: the rule is Algorithm 1 of D. Balboni's thesis (SNS 2025, ch. 7) along another
    direction.

    Examples:
        A base that steps along the signs of an average of gradients:

        >>> class Signs(torch.optim.SGD):
        ...     @torch.no_grad()
        ...     def step(self, closure=None):
        ...         for group in self.param_groups:
        ...             for p in group["params"]:
        ...                 mean = self.state[p].setdefault("mean", torch.zeros_like(p))
        ...                 p.sub_(mean.lerp_(p.grad, 0.1).sign(), alpha=group["lr"])
        >>> model, criterion = nn.Linear(4, 3), nn.CrossEntropyLoss()
        >>> optimizer = Wrapped(Signs(model.parameters()), model, criterion, fresh="sign")
        >>> criterion(model(torch.randn(8, 4)), torch.randint(3, (8,))).backward()
        >>> slope = sum(float(p.grad.abs().sum()) for p in model.parameters())
        >>> optimizer.step()
        >>> abs(float(optimizer.last_step.slope) / slope - 1) < 1e-5
        True
    """

    _mean = averaging.geometric
    _said_invariant = False
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
        fresh: Fresh | str | None = None,
    ) -> None:
        _check_base(base)
        if isinstance(fresh, str) and fresh not in _RULES:
            raise ValueError(f"fresh={fresh!r}: expected a function or one of {', '.join(_RULES)}")
        if not (fresh is None or isinstance(fresh, str) or callable(fresh)):
            raise TypeError(f"fresh: expected a function or a name, got {type(fresh).__name__}")
        groups = [{"params": _params_of(group)} for group in base.param_groups]
        search = Search(beta, eps, guard, measure)
        super().__init__(groups, model, criterion, output_fn, {"lr": lr}, search)
        self.base, self.fresh = base, fresh
        self._base_momenta: Momenta = {}
        if fresh is None and closed_form(base) is None:
            warn(
                f"wrap: {type(base).__name__} is not one of the optimizers that this library "
                "knows, so the rate is measured along what this minibatch alone does in its step, "
                "found by stepping twice, with its averages of gradients and without. fresh= says "
                "otherwise"
            )

    def _direction(self, params: list[Tensor], gradients: list[Tensor]) -> Direction:
        theirs = [p for group in self.base.param_groups for p in group["params"]]
        mine = [p for group in self.param_groups for p in group["params"]]
        if len(theirs) != len(mine) or any(p is not q for p, q in zip(theirs, mine, strict=True)):
            raise RuntimeError(
                "step(): the base has other parameters than its wrapper: add groups with "
                "add_param_group of the wrapper, which passes them on"
            )
        found = Displacement(
            self.base, params, gradients, self.state, self.fresh, self._base_momenta
        )
        if found.invariant and not self._said_invariant:
            self._said_invariant = True
            names = [self._names[p] for p in found.invariant]
            self._to_say = (
                f"wrap: the step of {type(self.base).__name__} does not grow with its gradients "
                f"(it is scale-invariant) at {len(names)} of {len(params)} parameters "
                f"({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}), so equal gradients "
                "do not add up. There the rate is measured along the step of this minibatch alone, "
                "as long as it is. fresh= says otherwise"
            )
        return found

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
        return {**super().__getstate__(), "base": self.base, "fresh": self.fresh}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What is known of the base's state is found again."""
        self._base_momenta = {}
        super().__setstate__(state)


class Displacement(Direction):
    """A step of the base, measured along what it would be with fresh gradients only.

    The base's state has advanced; the parameters are where they were.

    Args:
        base: The optimizer that gives the step.
        params: Those with a gradient.
        gradients: Of this minibatch.
        state: The wrapper's; holds ``gain`` where a known base has momentum, and the ``kind`` and
            the ``last`` step of the parameters of any other.
        fresh: See `Wrapped`.
        momenta: What `find_direction` remembers.

    Attributes:
        invariant: Parameters whose step has turned out to be scale-invariant.
    """

    def __init__(
        self,
        base: Optimizer,
        params: list[Tensor],
        gradients: list[Tensor],
        state: State,
        fresh: Fresh | str | None = None,
        momenta: Momenta | None = None,
    ) -> None:
        self._saved, self._state = SavedState(base), state
        self.scale_free = closed_form(base) is not None and type(base) is not torch.optim.SGD
        self._kept: dict[Tensor, dict[str, Tensor]] = {}
        self.invariant: list[Tensor] = []
        self._at_rest = False
        function = sign if fresh == "sign" else fresh
        if function is None:
            function = closed_form(base)
        try:
            if function is None or isinstance(function, str):
                memory = {} if momenta is None else momenta
                found = find_direction(
                    base, params, gradients, self._saved, state, memory, function
                )
                step, along = found.step, found.along
                self._kept, self.invariant = found.kept, found.invariant
                self._at_rest = found.at_rest
            else:
                step = displacement(base, params, gradients)
                along = self._described(function, base, params, gradients)
        except BaseException:
            self.undo()
            raise
        self._step = dict(zip(params, step, strict=True))
        super().__init__(along)

    def _described(
        self, fresh: Fresh, base: Optimizer, params: list[Tensor], gradients: list[Tensor]
    ) -> list[Tensor]:
        groups = {p: group for group in base.param_groups for p in group["params"]}
        along = []
        for p, gradient in zip(params, gradients, strict=True):
            started, gain = self._saved.knows(p), self._state[p].get("gain")
            one = Update(p, groups[p], base.state[p], started, gain, gradient)
            along.append(_checked(fresh(one), gradient))
            if one.gain is not None:
                self._kept[p] = {"gain": one.gain}
        return along

    def descend(
        self, group: Mapping[str, Any], params: list[Tensor], rate: Tensor, skipped: Tensor
    ) -> None:
        """As `Direction.descend`; a decoupled decay is part of the base's step."""
        steps = self.bounded(params, [self._step[p] for p in params], rate)
        update.descend_(params, steps, rate, skipped)

    def finish(self, skipped: Tensor) -> None:
        """In a step that is skipped, the base's state goes back to what it was.

        Not where it was the base that took no step: it would not take one ever after.
        """
        if self._at_rest:
            skipped = torch.zeros_like(skipped)
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


def _checked(found: object, gradient: Tensor) -> Tensor:
    if not isinstance(found, Tensor):
        raise TypeError(f"fresh: expected a tensor, got {type(found).__name__}")
    if found.shape != gradient.shape:
        raise ValueError(
            f"fresh: a direction of shape {tuple(found.shape)} for a parameter of shape "
            f"{tuple(gradient.shape)}"
        )
    return found.to(gradient)


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
        if getattr(base, key, False) or any(group.get(key, False) for group in base.param_groups):
            raise ValueError(f"base: {key}=True of {name} is not supported: the loss is minimised")
