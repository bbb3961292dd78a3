"""What `torch.optim.Optimizer` asks of an optimizer: groups, checkpoints, copies.

The options of the search are one value that all groups share (`adler._options.Search`), and so is
its state, one `adler._step_length.SearchState`; that lives in the groups, and so in checkpoints.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from adler import _distributed as distributed
from adler import _options
from adler._optimizers.cycled_momentum import OwnMomenta
from adler._optimizers.direction import load_moments
from adler._optimizers.groups import as_list, names_of, taken_from
from adler._optimizers.step_counts import StepCounts
from adler._options import Guard, Measure, Search
from adler._recording.model_loss import ModelLoss
from adler._step_length import ENTRIES, SearchState

__all__ = ["ModelOptimizer"]

Self = TypeVar("Self", bound="ModelOptimizer")


class ModelOptimizer(Optimizer):
    """An optimizer of a model's parameters, with a search whose options and state all groups share.

    Args:
        params: Parameters of ``model``, or groups of them, with or without names, or an optimizer
            whose groups and weight decays to take.
        model: The network whose outputs the loss sees.
        criterion: The loss, reduced to a scalar, or a `ModelLoss`.
        output_fn: Maps what the model returns to the tensor that the criterion receives.
        options: Defaults of the param groups: what may differ from group to group.
        search: What may not.

    Attributes:
        model: As given.
        criterion: As given; of a `ModelLoss`, the criterion that it equals.
        output_fn: As given; of a `ModelLoss`, its ``outputs``.
        beta: See `adler._options.Search`.
        eps: See `adler._options.Search`.
        guard: See `adler._options.Search`.
        measure: See `adler._options.Search`.
    """

    def __new__(cls: type[Self], *_: Any, **options: Any) -> Self:
        """Refuses unknown options by name, and says where one is that has moved."""
        _options.check_moved(cls, options)
        return super().__new__(cls)

    def __init__(
        self,
        params: ParamsT | Optimizer,
        model: nn.Module,
        criterion: Callable[..., Tensor] | ModelLoss,
        output_fn: Callable[[Any], Tensor] | None,
        options: dict[str, Any],
        search: Search,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        distributed.check_supported(model)
        self._model_loss: ModelLoss | None = None
        if isinstance(criterion, ModelLoss):
            if output_fn is not None:
                raise ValueError("output_fn: the ModelLoss has outputs= already; pass only one")
            self._model_loss, output_fn = criterion, criterion.outputs
            criterion = criterion.criterion
        if not callable(criterion):
            raise TypeError(f"criterion: expected a loss, got {type(criterion).__name__}")
        if output_fn is not None and not callable(output_fn):
            raise TypeError(f"output_fn: expected a function, got {type(output_fn).__name__}")
        self.model, self.criterion, self.output_fn = model, criterion, output_fn
        self.beta, self.eps = search.beta, search.eps
        self.guard, self.measure = search.guard, search.measure
        _options.check(options)
        self._names = names_of(model)
        self._step_counts = StepCounts()
        if isinstance(params, Optimizer):
            params = taken_from(params, options)
        super().__init__(params, options)
        self._attach()

    def _attach(self) -> None:
        """What is no part of a checkpoint, a copy or a pickle, and is made anew for each."""
        self._momenta = OwnMomenta(self.param_groups)

    @property
    def _scalar_device(self) -> torch.device:
        """Where the scalars live: with the first parameter."""
        everything = (p for group in self.param_groups for p in group["params"])
        return next((p.device for p in everything), torch.device("cpu"))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters of the model, with its own ``lr`` and ``weight_decay``.

        Raises:
            ValueError: If a parameter is not the model's, or an option is not a group's.
        """
        if isinstance(param_group, dict) and "params" in param_group:
            param_group = {**param_group, "params": as_list(param_group["params"])}
            self._check_group(param_group)
        super().add_param_group(param_group)
        group, first = self.param_groups[-1], self.param_groups[0]
        if group is first:
            first.update(SearchState.empty(self._scalar_device).entries())
        group.update({key: first[key] for key in ENTRIES})
        group.setdefault("effective_lr", torch.zeros_like(first["rate_total"]))

    def _check_group(self, group: Mapping[str, Any]) -> None:
        # A scheduler made in the middle of training needs initial_lr.
        known = {"params", "param_names", "effective_lr", "initial_lr"}
        allowed = {*known, *self.defaults, *ENTRIES}
        if unknown := sorted(group.keys() - allowed):
            raise ValueError(
                f"{unknown[0]!r} is no option of a parameter group: one step length serves all "
                f"groups, and a group may set {', '.join(sorted(self.defaults))}"
            )
        _options.check({**self.defaults, **group})
        names = self._names
        for entry in group["params"]:
            parameter = entry[1] if isinstance(entry, tuple) else entry
            if not isinstance(parameter, Tensor):
                continue  # the base class says so
            if parameter.layout != torch.strided:
                raise TypeError("params: sparse parameters are not supported")
            if parameter.is_complex():
                raise TypeError("params: complex parameters are not supported")
            if parameter not in names:
                names = self._names = names_of(self.model)  # the model may have grown
            if parameter not in names:
                raise ValueError(
                    f"params: a parameter of shape {tuple(parameter.shape)} is not a parameter of "
                    "the model given to the optimizer; the curvature needs the model that holds it"
                )

    def __deepcopy__(self: Self, memo: dict[int, Any]) -> Self:
        """A twin on the copied model; a criterion without parameters is shared with the loop."""
        if not (
            isinstance(self.criterion, nn.Module) and any(True for _ in self.criterion.parameters())
        ):
            memo.setdefault(id(self.criterion), self.criterion)
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def __repr__(self) -> str:
        """The options, without the state."""
        lines = [f"{type(self).__name__} ("]
        for number, group in enumerate(self.param_groups):
            lines.append(f"Parameter Group {number}")
            for key in sorted(self.defaults):
                value = group[key]
                shown = float(value) if isinstance(value, Tensor) else value
                lines.append(f"    {key}: {shown}")
        shared = [f"{name}: {getattr(self, name)}" for name in self._shared_options()]
        return "\n".join([*lines, *shared, ")"])

    def state_dict(self) -> dict[str, Any]:
        """As any optimizer's, and under ``"search"`` the options that all groups share.

        They are plain numbers, strings and dictionaries.
        """
        self._momenta.put_back(self.param_groups)
        return {**super().state_dict(), "search": self._shared_options()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads state, groups and shared options: what the checkpoint holds is what counts.

        Raises:
            ValueError: If the groups or the options are others, or those of an optimizer that does
                not measure; nothing has changed then.
        """
        own = dict(state_dict)
        for group in own.get("param_groups", ()):
            if not set(ENTRIES) & set(group):
                raise ValueError(
                    f"loaded state dict is not that of an optimizer of adler: its lr="
                    f"{group.get('lr')!r} would multiply the measured rate, not set it. Start "
                    f"{type(self).__name__} afresh on the trained weights"
                )
        # A tool may save no more than state and groups.
        shared = dict(own.pop("search", None) or {})
        if unknown := sorted(shared.keys() - self._shared_options().keys()):
            raise ValueError(
                f"loaded state dict: {unknown[0]!r} is no option of {type(self).__name__}"
            )
        for name, kind in (("guard", Guard), ("measure", Measure)):
            if name in shared:
                shared[name] = _options.from_plain(kind, shared[name])
        super().load_state_dict(own)
        numbers = [number for group in own["param_groups"] for number in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        load_moments(self.state, params, [own["state"].get(number) for number in numbers])
        self._momenta.note(self.param_groups)
        for name, value in shared.items():
            setattr(self, name, value)

    def _shared_options(self) -> dict[str, Any]:
        return {
            "beta": self.beta,
            "eps": self.eps,
            "guard": _options.plain(self.guard),
            "measure": _options.plain(self.measure),
        }

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the hooks, which are made anew."""
        self._momenta.put_back(self.param_groups)
        kept = ("model", "criterion", "output_fn", "_model_loss", *self._shared_options())
        return {**super().__getstate__(), **{key: self.__dict__[key] for key in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # the base class adds what is no option here
        self._step_counts = StepCounts()
        first = self.param_groups[0]
        search = SearchState.of(first, self._scalar_device)
        for group in self.param_groups:
            for key, default in self.defaults.items():
                group.setdefault(key, first.get(key, default))
            group.update(search.entries())
            like, rate = search.minibatch_lr, group.get("effective_lr", 0.0)
            group["effective_lr"] = torch.as_tensor(rate, dtype=like.dtype, device=like.device)
        if "model" in state:  # a copy or a pickle; otherwise load_state_dict
            self._names = names_of(self.model)
            self._attach()
