r"""The fresh direction of a base that nobody has described, found from steps that are taken back.

Whether a base's step grows with its gradients is asked of each parameter at one of the first
steps. Its *momenta* are the tensors in its state that change their sign with the gradients. With
$\Delta(m, g)$ the step at rate one from momenta $m$ and gradient $g$, without weight decay,

$$
r = \frac{\|\Delta(m / 2, 0) - \Delta(0, 0)\|}{\|\Delta(m, 0) - \Delta(0, 0)\|}
$$

is one half where the step is linear in them (SGD, the Adams, SOAP), and one where they are
normalised: signs (Lion), orthogonalisation (Muon), trust ratios (LAMB).

- *Linear* ($r \le 3/4$, or no momenta): with $F = \Delta(m, g) - \Delta(m, 0)$ and
  $\mu = \Delta(m, 0)^\top \Delta_{-1} / \|\Delta_{-1}\|^2$, the fraction (of at most 0.99) of its
  last step that the base repeats without a gradient, $D = F / (1 - \mu)$: what equal gradients
  would add up to.
- *Scale-invariant* ($r > 3/4$): without a gradient the step is as long as with one, and $F$ is what
  the gradient turns, not what it adds. So $D = \Delta(0, g)$: momenta emptied, what else the state
  holds (second moments, eigenbases, counts) as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from adler import _tensors
from adler._optimizers.base_steps import displacement, drop_decay, restarted
from adler._optimizers.direction import State
from adler._optimizers.state_backup import SavedState

__all__ = ["Found", "find"]

# An unknown base is taken to forget at least this much of its last step.
_LONGEST_MEMORY = 0.99
# Between one half, of a linear step, and one.
_SCALE_INVARIANT = 0.75

# What is known of a parameter, as its state holds it. Smaller numbers count the trials that have
# found the base at rest: some do nothing with their first gradient.
_LINEAR = 3.0
_INVARIANT = 4.0
_INVARIANT_DRIFTING = 5.0  # its parameter moves without gradients and momenta

Momenta = dict[Tensor, list[str]]


@dataclass
class Found:
    """What the trial steps have found.

    Attributes:
        step: Of the base; its state has advanced.
        along: The fresh direction.
        kept: What the wrapper's state is to hold of each parameter, unless the step is skipped.
        invariant: Parameters that have turned out scale-invariant in this step.
        at_rest: Whether gradients that are not zero have no direction: some bases do nothing with
            their first.
    """

    step: list[Tensor]
    along: list[Tensor]
    kept: dict[Tensor, dict[str, Tensor]] = field(default_factory=dict)
    invariant: list[Tensor] = field(default_factory=list)
    at_rest: bool = False


def find(
    base: Optimizer,
    params: list[Tensor],
    gradients: list[Tensor],
    saved: SavedState,
    state: State,
    momenta: Momenta,
    rule: str | None = None,
) -> Found:
    """The base's step and its fresh direction; the host waits for the device.

    Args:
        base: At the end its state has advanced by one step.
        params: Those with a gradient.
        gradients: Of this minibatch.
        saved: The base's state.
        state: The wrapper's; holds the ``kind`` of each parameter, and the ``last`` step of those
            that are linear.
        momenta: Names in the base's state, by parameter; filled in where they are needed.
        rule: ``"difference"`` or ``"memoryless"``, for all parameters; None: decide.
    """
    size = float(_tensors.squared_norm(gradients))
    if not math.isfinite(size):
        return Found(gradients, gradients)  # nobody knows what the base would do with it
    if rule is None:
        before = _kinds(state, params)
        kinds = _decide(before, base, params, gradients, saved, momenta)
    else:
        before = kinds = [_LINEAR if rule == "difference" else _INVARIANT] * len(params)
    linear = [i for i, kind in enumerate(kinds) if kind <= _LINEAR]
    other = [i for i, kind in enumerate(kinds) if kind > _LINEAR]
    along, idle = list(gradients), []
    if other:
        parts = _memoryless(base, params, gradients, saved, momenta, other, kinds)
        for i, part in zip(other, parts, strict=True):
            along[i] = part
    if linear:
        idle = displacement(base, params, _zeros(gradients))
        saved.restore()
    step = displacement(base, params, gradients)
    found = Found(step, along)
    if linear:
        last = [state[params[i]].get("last") for i in linear]
        parts = _difference([step[i] for i in linear], [idle[i] for i in linear], last)
        for i, part in zip(linear, parts, strict=True):
            along[i] = part
            found.kept[params[i]] = {"last": step[i]}
    found.at_rest = size > 0 and float(_tensors.squared_norm(along)) == 0
    if rule is None:
        found.invariant = [params[i] for i in other if before[i] != kinds[i]]
        for p, gradient, kind in zip(params, gradients, kinds, strict=True):
            found.kept.setdefault(p, {})["kind"] = torch.full(
                (), kind, dtype=gradient.dtype, device=gradient.device
            )
    return found


def _kinds(state: State, params: Sequence[Tensor]) -> list[float]:
    """What is known of each; 0 before the first step."""
    known = [state[p].get("kind") for p in params]
    held = [kind for kind in known if kind is not None]
    if not held:
        return [0.0] * len(params)
    values = iter(_tensors.stacked(held, held[0]).tolist())
    return [0.0 if kind is None else next(values) for kind in known]


def _difference(
    step: list[Tensor], idle: list[Tensor], last: Sequence[Tensor | None]
) -> list[Tensor]:
    """``F / (1 - μ)``."""
    along = list(torch._foreach_sub(step, idle))
    known = [part for part in last if part is not None]
    memory = _tensors.squared_norm(step).new_zeros(())
    if len(known) == len(last):
        memory = _tensors.dot(idle, known) / _tensors.squared_norm(known)
    # If what a step leaves of the last one is the fraction μ, equal gradients add up to
    # 1 + μ + μ² + ... times the fresh part.
    gain = 1 / (1 - memory.nan_to_num(0.0).clamp(0, _LONGEST_MEMORY))
    torch._foreach_mul_(along, [gain.to(part) for part in along])
    return along


def _memoryless(
    base: Optimizer,
    params: list[Tensor],
    gradients: list[Tensor],
    saved: SavedState,
    momenta: Momenta,
    which: list[int],
    kinds: list[float],
) -> list[Tensor]:
    """Of some parameters ``Δ(0, g)``, less ``Δ(0, 0)`` where it is not zero."""
    if not all(params[i] in momenta for i in which):
        momenta.update(_momenta(base, params, gradients))
    chosen = [params[i] for i in which]
    without = _from_momenta(base, params, gradients, saved, momenta, chosen, 0.0)
    found = [without[i] for i in which]
    if any(kinds[i] == _INVARIANT_DRIFTING for i in which):
        rest = _from_momenta(base, params, _zeros(gradients), saved, momenta, chosen, 0.0)
        found = list(torch._foreach_sub(found, [rest[i] for i in which]))
    return found


def _decide(
    kinds: list[float],
    base: Optimizer,
    params: list[Tensor],
    gradients: list[Tensor],
    saved: SavedState,
    momenta: Momenta,
) -> list[float]:
    """The kinds, those that the base has had a step on decided where that is possible."""
    kinds = list(kinds)
    open_ = [i for i, p in enumerate(params) if kinds[i] < _LINEAR and saved.knows(p)]
    if not open_:
        return kinds
    momenta.update(_momenta(base, params, gradients))
    chosen, zeros = [params[i] for i in open_], _zeros(gradients)
    whole, half, rest = (
        _from_momenta(base, params, zeros, saved, momenta, chosen, factor)
        for factor in (1.0, 0.5, 0.0)
    )
    of_whole, of_half, of_rest = (
        torch.stack([length.cpu().double() for length in _tensors.lengths(tensors)]).tolist()
        for tensors in (torch._foreach_sub(whole, rest), torch._foreach_sub(half, rest), rest)
    )
    for i in open_:
        if not momenta[params[i]]:
            kinds[i] = _LINEAR
        elif of_whole[i] == 0:
            kinds[i] += 1
        elif of_half[i] > _SCALE_INVARIANT * of_whole[i]:
            kinds[i] = _INVARIANT if of_rest[i] == 0 else _INVARIANT_DRIFTING
        else:
            kinds[i] = _LINEAR
    return kinds


def _from_momenta(
    base: Optimizer,
    params: list[Tensor],
    gradients: list[Tensor],
    saved: SavedState,
    momenta: Momenta,
    chosen: Sequence[Tensor],
    factor: float,
) -> list[Tensor]:
    """The step without weight decay, the momenta of chosen parameters multiplied first."""
    for p in chosen:
        for name in momenta[p]:
            if name in base.state[p]:
                base.state[p][name].mul_(factor)
    drop_decay(base)
    step = displacement(base, params, gradients)
    saved.restore()
    return step


def _momenta(base: Optimizer, params: list[Tensor], gradients: list[Tensor]) -> Momenta:
    """Names of the tensors in the base's state of each parameter that are odd in the gradients."""
    lengths = torch.stack([length.cpu() for length in _tensors.lengths(gradients)]).tolist()
    # Where there is no gradient, any other tells as much.
    probes = [
        g if length > 0 else torch.ones_like(g)
        for g, length in zip(gradients, lengths, strict=True)
    ]
    held = []
    for sign in (1, -1):
        with restarted(base):
            for _ in range(2):  # some do nothing with their first gradient
                displacement(base, params, [sign * g for g in probes])
            held.append({p: dict(base.state.get(p, {})) for p in params})
    there, back = held
    return {
        p: [name for name in there[p] if _odd(there[p][name], back[p].get(name))] for p in params
    }


def _odd(one: object, other: object) -> bool:
    if not (isinstance(one, Tensor) and isinstance(other, Tensor) and one.is_floating_point()):
        return False
    if one.shape != other.shape or not bool(one.any()):
        return False
    close = torch.isclose(one, -other, rtol=1e-4, atol=1e-6 * float(one.abs().max()))
    return bool(close.all())


def _zeros(gradients: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(g) for g in gradients]
