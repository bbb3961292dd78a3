r"""The fresh direction of an unknown base, found from steps that are taken back.

Whether a base's step grows with its gradients is asked of each parameter at one of the first
steps. Its *momenta* are the tensors in its state that change their sign with the gradients. With
$\Delta(m, g)$ the step at rate one from momenta $m$ and gradient $g$, without weight decay,

$$
r = \frac{\|\Delta(m / 2, 0) - \Delta(0, 0)\|}{\|\Delta(m, 0) - \Delta(0, 0)\|}
$$

is one half where the step is linear in them (SGD, the Adams, SOAP), and one where they are
normalised: signs (Lion), orthogonalisation (Muon), trust ratios (LAMB).

The momenta emptied, and what else the state holds (second moments, eigenbases, counts) as it is,
$F = \Delta(0, g)$ is what this minibatch's gradient does. Then

- where the step is *scale-invariant* ($r > 3/4$), $D = F$. The difference
  $\Delta(m, g) - \Delta(m, 0)$ would be what the gradient turns, not what it adds: without a
  gradient such a step is as long as with one;
- where it is *linear*, $D = F / (1 - \mu)$: what equal gradients would add up to, with
  $\mu = (\Delta - F)^\top \Delta_{-1} / \|\Delta_{-1}\|^2$, the fraction (of at most 0.99) of
  its last step $\Delta_{-1}$ that the base repeats;
- where no momenta are seen, and before they are, $F = \Delta(m, g) - \Delta(m, 0)$ in the same
  formula.
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

__all__ = ["Found", "find_direction"]

# An unknown base is taken to forget at least this much of its last step.
_LONGEST_MEMORY = 0.99
# Between one half, of a linear step, and one.
_SCALE_INVARIANT = 0.75

# What is known of a parameter, as its state holds it. Smaller numbers count the trials that have
# found the base at rest: some do nothing with their first gradient.
_DIFFERENCE = 3.0
_LINEAR = 4.0
_INVARIANT = 5.0
_DRIFTS = 2.0  # more, where a step is not zero without gradients and momenta

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


def find_direction(
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
            that are not scale-invariant.
        momenta: Names in the base's state, by parameter; filled in where they are needed.
        rule: ``"difference"`` or ``"memoryless"``, for all parameters; None: decide.
    """
    size = float(_tensors.squared_norm(gradients))
    if not math.isfinite(size):
        return Found(gradients, gradients)  # what the base does with it is not known
    if rule is None:
        before = _kinds(state, params)
        kinds = _decide(before, base, params, gradients, saved, momenta)
    else:
        kinds = [_DIFFERENCE if rule == "difference" else _INVARIANT] * len(params)
    emptied = [kind >= _LINEAR for kind in kinds]
    without = idle = gradients
    if any(emptied):
        without = _memoryless(base, params, gradients, saved, momenta, kinds)
    if not all(emptied):
        idle = displacement(base, params, _zeros(gradients))
        saved.restore()
    step = displacement(base, params, gradients)
    choices = zip(emptied, without, step, idle, strict=True)
    along = [alone if empty else whole - rest for empty, alone, whole, rest in choices]
    found = Found(step, along)
    summed = [i for i, kind in enumerate(kinds) if not _is_invariant(kind)]
    if summed:
        last = [state[params[i]].get("last") for i in summed]
        _add_up_([along[i] for i in summed], [step[i] for i in summed], last)
        found.kept = {params[i]: {"last": step[i]} for i in summed}
    found.at_rest = size > 0 and float(_tensors.squared_norm(along)) == 0
    if rule is None:
        for p, gradient, then, now in zip(params, gradients, before, kinds, strict=True):
            kind = torch.full((), now, dtype=gradient.dtype, device=gradient.device)
            found.kept.setdefault(p, {})["kind"] = kind
            if now != then and _is_invariant(now):
                found.invariant.append(p)
    return found


def _is_invariant(kind: float) -> bool:
    return kind in (_INVARIANT, _INVARIANT + _DRIFTS)


def _kinds(state: State, params: Sequence[Tensor]) -> list[float]:
    """What is known of each; 0 before the first step."""
    known = [state[p].get("kind") for p in params]
    held = [kind for kind in known if kind is not None]
    if not held:
        return [0.0] * len(params)
    values = iter(_tensors.stacked(held, held[0]).tolist())
    return [0.0 if kind is None else next(values) for kind in known]


def _add_up_(fresh: list[Tensor], step: list[Tensor], last: Sequence[Tensor | None]) -> None:
    """In place, ``F / (1 - μ)``."""
    known = [part for part in last if part is not None]
    if len(known) < len(last):
        return
    repeated = torch._foreach_sub(step, fresh)
    memory = _tensors.dot(repeated, known) / _tensors.squared_norm(known)
    # If what a step leaves of the last one is the fraction μ, equal gradients add up to
    # 1 + μ + μ² + ... times the fresh part.
    gain = 1 / (1 - memory.nan_to_num(0.0).clamp(0, _LONGEST_MEMORY))
    torch._foreach_mul_(fresh, [gain.to(part) for part in fresh])


def _memoryless(
    base: Optimizer,
    params: list[Tensor],
    gradients: list[Tensor],
    saved: SavedState,
    momenta: Momenta,
    kinds: list[float],
) -> list[Tensor]:
    """``Δ(0, g)``, less ``Δ(0, 0)`` where it is not zero; of parameters whose momenta are known."""
    chosen = [p for p, kind in zip(params, kinds, strict=True) if kind >= _LINEAR]
    if not all(p in momenta for p in chosen):
        momenta.update(_momenta(base, params, gradients))
    found = _from_momenta(base, params, gradients, saved, momenta, chosen, 0.0)
    drifts = [kind >= _LINEAR + _DRIFTS for kind in kinds]
    if any(drifts):
        rest = _from_momenta(base, params, _zeros(gradients), saved, momenta, chosen, 0.0)
        parts = zip(found, rest, drifts, strict=True)
        found = [part - idle if drift else part for part, idle, drift in parts]
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
    open_ = [i for i, p in enumerate(params) if kinds[i] < _DIFFERENCE and saved.knows(p)]
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
            kinds[i] = _DIFFERENCE
        elif of_whole[i] == 0 and kinds[i] + 1 < _DIFFERENCE:
            kinds[i] += 1
        else:
            invariant = of_half[i] > _SCALE_INVARIANT * of_whole[i]
            kinds[i] = _INVARIANT if invariant else _LINEAR
            kinds[i] += _DRIFTS if of_rest[i] > 0 else 0.0
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
