"""`AdlerMuon`: hidden matrices along an orthogonalised momentum, everything else along Adam."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from adler import _averaging as averaging
from adler import _tensors
from adler._distributed import gathered, like, local, scattered
from adler._optimizers.adam import Adam, Preconditioned
from adler._optimizers.average import AveragedOptimizer, Following
from adler._optimizers.direction import Direction, State, count_, gradients_of, moments
from adler._optimizers.orthogonal import orthogonalized
from adler._options import Guard, Measure, Search
from adler._recording.model_loss import ModelLoss
from adler._unwrap import unwrap

__all__ = ["AdlerMuon", "Muon", "hidden_matrices"]

# Under it the four long development tasks lose least to Muon at its best of five rates.
_GUARD = Guard(max_relative_change=0.005)
# Of an orthogonalised matrix's entries: what Adam's updates have in practice (arXiv 2502.16982).
_RMS_OF_ADAM = 0.2


class AdlerMuon(AveragedOptimizer):
    r"""Muon on hidden matrices, Adam on the rest, one measured length, an average of iterates.

    Muon's loudest complaint is its learning rate, and that there are two of them. Here both blocks
    move by one rate, and it is measured. With $m$ the momentum of a hidden matrix and
    $\mathrm{NS}$ five Newton-Schulz iterations, which bring all singular values near 1,

    $$
    u = 0.2 \sqrt{\max(n, m)}\; \mathrm{NS}\bigl((1 - \mu)\, g + \mu\, m\bigr), \qquad
    d = 0.2 \sqrt{\max(n, m)}\; \mathrm{NS}(g), \qquad
    \eta_k = \frac{g^\top d}{c(d) + \epsilon\, d^\top d}.
    $$

    Everything else moves and is measured along $g / (\sqrt{\hat v} + \epsilon_A)$, as in
    `AdlerScheduleFree`: the factor gives the entries of $u$ the size that Adam's have. Slope and
    curvature are those along *this* minibatch's direction $d$ of both blocks together, so that no
    average of gradients hides the curvature. Length, average of iterates, modes and options are
    those of `AdlerScheduleFree`.

    Args:
        params: Parameters of ``model``, or groups of them, with or without names; or an optimizer
            of them, such as a ``configure_optimizers()`` returns: its groups and their weight decay
            are taken, its rates and all else are not.
        model: The network whose outputs the loss sees. Forward hooks record its calls.
        criterion: The loss, reduced to a scalar; see `Adler`.
        lr: Multiplies the measured rate, so that learning-rate schedulers work; per group.
        momentum: ``μ`` of the hidden matrices, in [0, 1); per group.
        betas: Adam's discounts, in [0, 1); the first counts only without an average; per group.
        adam_eps: ``ε_A``, added to the root of the second moment; per group.
        weight_decay: Decoupled, at ``y``; per group.
        interpolation: How near to the average of all iterates ``y`` is, at which gradients are
            taken, in (0, 1); per group. None: no average, the last iterate is kept.
        matrices: Names of the parameters that are orthogonalised, or patterns of them such as
            ``"blocks.*.weight"``, of which vectors are left to Adam; None: `hidden_matrices` of
            the model. `blocks` tells which are where.
        beta: Discount of the average of rates, in [0, 1]; 1 forgets nothing.
        eps: ``ε``, bounds a minibatch's rate by ``1/ε``.
        guard: How long a step may be; ``None``: as long as the average says. See `Guard`. A tensor
            moves by 0.005 of its initial norm at most, a quarter of the other optimizers' bound:
            an orthogonalised direction has no small components.
        measure: How, and how often, curvature is measured. See `Measure`.
        output_fn: Maps what the model returns to the tensor that the criterion receives.
        follow_mode: Whether the weights follow the model's mode, and its ``state_dict()`` is of the
            average; if not, only `eval` and `train` place them.
        bn_batches: How many batches of training are kept, to find BatchNorm's running statistics at
            the average; 0 leaves them to ``update_bn``.

    Raises:
        ValueError: For an argument out of its range, a name or pattern in ``matrices`` that no
            matrix has, parameters that are not the model's, or a criterion with
            ``reduction="none"``.
        TypeError: For arguments of another kind, complex parameters included.

    Source: K. Jordan et al., kellerjordan.github.io/posts/muon (2024); the scale and the split: J.
    Liu et al., arXiv 2502.16982, section 2.2; the points: A. Defazio et al., arXiv 2405.15682; the
    rate: Algorithm 1 of D. Balboni's thesis (SNS 2025, ch. 7) along this direction.

    Examples:
        >>> import torch
        >>> model = nn.Sequential(*(nn.Linear(n, m) for n, m in ((5, 8), (8, 8), (8, 3))))
        >>> criterion = nn.CrossEntropyLoss()
        >>> optimizer = AdlerMuon(model.parameters(), model, criterion)
        >>> optimizer.blocks()["orthogonal"]
        ['1.weight']
        >>> criterion(model(torch.randn(8, 5)), torch.randint(3, (8,))).backward()
        >>> optimizer.step()
        >>> float(optimizer.param_groups[0]["effective_lr"]) > 0
        True
    """

    _mean = averaging.geometric
    matrices: list[str] | None
    _matrices: frozenset[Tensor] | None

    def __init__(
        self,
        params: ParamsT | Optimizer,
        model: nn.Module,
        criterion: Callable[..., Tensor] | ModelLoss,
        *,
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.999),
        adam_eps: float = 1e-8,
        weight_decay: float = 0.0,
        interpolation: float | None = 0.9,
        matrices: Iterable[str] | None = None,
        beta: float = 0.9999,
        eps: float = 1e-10,
        guard: Guard | None = _GUARD,
        measure: Measure = Measure(),
        output_fn: Callable[[Any], Tensor] | None = None,
        follow_mode: bool = True,
        bn_batches: int = 16,
    ) -> None:
        self.matrices = None if matrices is None else _checked(matrices)
        self._matrices = None
        options = {
            "lr": lr,
            "momentum": momentum,
            "betas": betas,
            "adam_eps": adam_eps,
            "weight_decay": weight_decay,
            "interpolation": interpolation,
        }
        search, following = Search(beta, eps, guard, measure), Following(follow_mode, bn_batches)
        super().__init__(params, model, criterion, output_fn, options, search, following)

    def blocks(self) -> dict[str, list[str]]:
        """The names of the parameters that are orthogonalised, and of those that Adam moves."""
        chosen = self._orthogonal()
        found: dict[str, list[str]] = {"orthogonal": [], "adam": []}
        for group in self.param_groups:
            for p in group["params"]:
                found["orthogonal" if p in chosen else "adam"].append(self._names[p])
        return found

    def _orthogonal(self) -> frozenset[Tensor]:
        """The parameters that are orthogonalised; found once, and anew when groups are added."""
        if self._matrices is None:
            self._matrices = frozenset(_chosen(self.model, self.matrices))
        return self._matrices

    def _check_group(self, group: Mapping[str, Any]) -> None:
        super()._check_group(group)
        self._matrices = None  # the model may have grown
        self._orthogonal()  # names that nothing has are refused now

    def _interpolation(self, group: Mapping[str, Any]) -> float | None:
        value: float | None = group["interpolation"]
        return value

    def _rest(self, group: Mapping[str, Any]) -> type[Preconditioned]:
        """What everything else goes along: under an average, without a momentum of its own."""
        return Preconditioned if self._interpolation(group) is not None else Adam

    def _inner_direction(
        self, params: list[Tensor], gradients: list[Tensor], equal: Mapping[int, bool]
    ) -> Direction:
        rest = self._rest(self.param_groups[0])
        chosen = self._orthogonal()
        return Muon(chosen, rest, self.param_groups, params, gradients, self.state, equal)

    def _make_inner_state(self, p: Tensor, group: Mapping[str, Any]) -> None:
        names = ("exp_avg",) if p in self._orthogonal() else self._rest(group).moments
        moments(self.state, p, *names)

    def _shared_options(self) -> dict[str, Any]:
        return {**super()._shared_options(), "matrices": self.matrices}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As for the other optimizers; which parameters are orthogonalised is loaded, too."""
        super().load_state_dict(state_dict)
        self._matrices = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._matrices = None
        super().__setstate__(state)


class Muon(Direction):
    """Orthogonalised momentum for some matrices, another direction for the rest.

    Args:
        matrices: Those that are orthogonalised.
        rest: What the others go along.
        groups: With ``momentum``, ``betas`` and ``adam_eps``.
        params: Those with a gradient.
        gradients: Of this minibatch.
        state: The optimizer's; holds ``exp_avg`` of the matrices, and of their last measurement
            ``slope_ratio`` and ``along_size``; and the moments of the rest.
        equal: Whether the counts of a group's parameters are equal, by its id.
    """

    scale_free = True
    made = True

    def __init__(
        self,
        matrices: frozenset[Tensor],
        rest: type[Preconditioned],
        groups: Sequence[Mapping[str, Any]],
        params: list[Tensor],
        gradients: list[Tensor],
        state: State,
        equal: Mapping[int, bool],
    ) -> None:
        self._state, self._matrices, self._params = state, matrices, params
        self._gradients = dict(zip(params, gradients, strict=True))
        others = self._split(params)[1]
        self._seen: dict[Tensor, tuple[Tensor, Tensor]] = {}
        self._rest: Preconditioned | None = None
        if others:
            own = [self._gradients[p] for p in others]
            self._rest = rest(groups, others, own, state, equal)
        super().__init__(gradients)

    def look(
        self, gradients: list[Tensor], home: torch.device, measured: bool
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        r"""As `Direction.look`; orthogonalises only where that is needed.

        Where curvature is not measured, the slope along $\mathrm{NS}(g)$ is taken to have the
        ratio to $\|g\|$, and the norm of $\mathrm{NS}(g)$ the value, of the last measurement: a
        step then costs the iterations of its momentum alone.
        """
        mine, others = self._split(self._params)
        own = [self._gradients[p] for p in mine]
        along = dict(zip(others, self._rest.along if self._rest else (), strict=True))
        if measured or not all("along_size" in self._state[p] for p in mine):
            whole = gathered(own)
            found = _scaled(whole)
            self._seen = dict(zip(mine, _ratios_and_sizes(whole, found), strict=True))
            along.update(zip(mine, scattered(found, own), strict=True))
            self.along = [along[p] for p in self._params]
            return super().look(gradients, home, measured)
        zero = torch.zeros((), dtype=_tensors.widest(home), device=home)
        slope, squared_norm, sizes = zero, zero, dict.fromkeys(mine, zero)
        if mine:
            norms = _tensors.stacked(_tensors.lengths(own), zero)
            ratios = _tensors.stacked([self._state[p]["slope_ratio"] for p in mine], zero)
            lengths = _tensors.stacked([self._state[p]["along_size"] for p in mine], zero)
            ratios, lengths = _completed(ratios, lengths, norms, mine)
            slope, squared_norm = (ratios * norms).sum(), lengths.square().sum()
            sizes = dict(zip(mine, lengths.unbind(), strict=True))
        if others:
            rest = [along[p] for p in others]
            squares, of_rest = _tensors.squared_norm_and_lengths(rest, home)
            slope = slope + _tensors.dot([self._gradients[p] for p in others], rest, home)
            squared_norm = squared_norm + squares
            sizes.update(zip(others, of_rest, strict=True))
        self.along = [along.get(p, self._gradients[p]) for p in self._params]
        return slope, squared_norm, [sizes[p] for p in self._params]

    def descend(
        self, group: Mapping[str, Any], params: list[Tensor], rate: Tensor, skipped: Tensor
    ) -> None:
        """As `Direction.descend`; a step that is skipped leaves the moments as they were."""
        count_([moments(self._state, p)["step"] for p in params], skipped)
        super().descend(group, params, rate, skipped)

    def finish(self, skipped: Tensor) -> None:
        """Keeps what was seen along the matrices, unless the step is skipped."""
        for p, new in self._seen.items():
            for name, value in zip(("slope_ratio", "along_size"), new, strict=True):
                before = self._state[p].get(name, torch.full_like(value, math.nan))
                # Replaced, never mutated: a state_dict of before stays as it is.
                self._state[p][name] = torch.where(skipped.to(value.device), before, value)

    def advance(
        self, group: Mapping[str, Any], params: list[Tensor], skipped: Tensor
    ) -> list[Tensor]:
        """See `Direction.advance`."""
        mine, others = self._split(params)
        found: dict[Tensor, Tensor] = {}
        if mine:
            averages = [moments(self._state, p, "exp_avg")["exp_avg"] for p in mine]
            gradients, momentum = gradients_of(mine), group["momentum"]
            _tensors.lerp_(averages, gradients, 1 - momentum, skipped)
            ahead = torch._foreach_lerp(local(gradients), local(averages), momentum)
            rows = zip(ahead, gradients, strict=True)
            whole = gathered([like(a, g) for a, g in rows])
            found.update(zip(mine, scattered(_scaled(whole), gradients), strict=True))
        if self._rest and others:
            found.update(zip(others, self._rest.advance(group, others, skipped), strict=True))
        return [found[p] for p in params]

    def _split(self, params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Those that are orthogonalised, and the others."""
        mine = [p for p in params if p in self._matrices]
        return mine, [p for p in params if p not in self._matrices]


def _scaled(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Orthogonalised, with entries of the size that Adam's updates have."""
    found = orthogonalized(gradients)
    if found:
        sizes = [_RMS_OF_ADAM * max(g.flatten(1).shape) ** 0.5 for g in gradients]
        torch._foreach_mul_(found, sizes)
    return found


def _completed(
    ratios: Tensor, lengths: Tensor, norms: Tensor, matrices: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """What is remembered of each matrix; of those without a gradient then, what is likely.

    That is an orthogonal matrix, at the angle with its gradient that the others have in the mean.

    Args:
        ratios: ``g·d / ‖g‖`` of the last measurement, 1-dim; NaN: there was none.
        lengths: ``‖d‖`` of it; 0 or NaN: there was none.
        norms: ``‖g‖`` of now; where it is 0, so is ``d``.
        matrices: The parameters.
    """
    shapes = [p.flatten(1).shape for p in matrices]
    full = lengths.new_tensor([_RMS_OF_ADAM * math.sqrt(max(s) * min(s)) for s in shapes])
    known = (lengths > 0) & ratios.isfinite()
    cosines = torch.where(known, ratios / lengths, 0.0)
    # Of a matrix alone at least one over the root of its rank.
    least = lengths.new_tensor([1 / math.sqrt(min(s)) for s in shapes])
    count = known.sum()
    usual = torch.where(count > 0, cosines.sum() / count.clamp(min=1), least)
    lengths = torch.where(known, lengths, full)
    ratios = torch.where(known, ratios, usual * full)
    there = norms != 0
    return torch.where(there, ratios, 0.0), torch.where(there, lengths, 0.0)


def _ratios_and_sizes(
    gradients: Sequence[Tensor], along: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """``g·d / ‖g‖`` and ``‖d‖`` of each; 0-dim, of the gradient's dtype, as PyTorch loads state."""
    if not gradients:
        return []
    norms, sizes = _tensors.lengths(gradients), _tensors.lengths(along)
    found = []
    for g, d, norm, size in zip(gradients, along, norms, sizes, strict=True):
        slope = _tensors.dot([g], [d])
        found.append(((slope / norm).to(g.dtype), size.to(g.dtype)))
    return found


# --- which parameters are hidden matrices ---------------------------------------------------------


def hidden_matrices(model: nn.Module) -> list[str]:
    """The names of the weights that Muon is meant for: of all layers but the first and the last.

    Muon's authors leave embeddings, inputs, outputs, and vectors such as biases and gains to Adam.
    A layer is a module that holds a ``weight`` of two or more dimensions (``weight_hh_l0`` and
    ``in_proj_weight`` are such, too); a convolution's kernel is the matrix of its output channels.
    The first and the last are those by the order in which the model lists its modules. Embeddings
    count as layers, but give no matrix, nor does a layer whose weight an embedding shares. Tensors
    of any other name, such as a learned position, are left to Adam.

    Args:
        model: Any module.

    Returns:
        Names as in ``model.named_parameters()``.

    Examples:
        >>> model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), nn.Linear(3, 2))
        >>> hidden_matrices(model)
        ['2.weight']
    """
    model = unwrap(model)
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    layers = [found for module in model.modules() if (found := list(_weights(module)))]
    embedded = {p for module in model.modules() if _is_embedding(module) for p in _weights(module)}
    ends = {*layers[0], *layers[-1]} if layers else set()
    inner = (p for layer in layers for p in layer if p not in ends and p not in embedded)
    return [names[p] for p in dict.fromkeys(inner)]


def _weights(module: nn.Module) -> Iterator[Tensor]:
    if "Norm" in type(module).__name__:
        return
    for name, parameter in module.named_parameters(recurse=False):
        # (The gains of an old `torch.nn.utils.weight_norm` are a column.)
        if "weight" in name and parameter.ndim > 1 and min(parameter.flatten(1).shape) > 1:
            yield parameter


def _is_embedding(module: nn.Module) -> bool:
    return "Embedding" in type(module).__name__


def _checked(wanted: Iterable[str]) -> list[str]:
    """As a list of names.

    Raises:
        TypeError: For one string, or for what is none.
    """
    if isinstance(wanted, str):
        raise TypeError(f"matrices={wanted!r}: expected a list of names or patterns, got a string")
    names = list(wanted)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"matrices: expected names or patterns, got {type(name).__name__}")
    return names


def _chosen(model: nn.Module, wanted: Sequence[str] | None) -> list[Tensor]:
    """The parameters that are orthogonalised, by names or patterns of names."""
    parameters = dict(unwrap(model).named_parameters())
    if wanted is None:
        return [parameters[name] for name in hidden_matrices(model)]
    found: list[Tensor] = []
    for pattern in wanted:
        named = fnmatch.filter(parameters, pattern)
        matrices = [parameters[name] for name in named if parameters[name].ndim > 1]
        if not matrices:
            there = "only vectors are" if named else "no parameter is"
            raise ValueError(
                f"matrices: {there} called {pattern!r}; there are "
                f"{', '.join(list(parameters)[:8])}, ..."
            )
        found.extend(matrices)
    return found
