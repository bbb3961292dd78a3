r"""What the steps of known optimizers would be, had all gradients been this minibatch's.

An optimizer that averages gradients takes a step $\Delta$ along the average. Its *fresh* direction
$D$ replaces every gradient in that average by the last one and keeps the preconditioner, so that
$D = \Delta$ where all gradients are alike, from the first step on. Weight decay is no part of it.

| base | $D$ |
|---|---|
| SGD | $a_t\, g$; $a_1 = 1$, $a_t = \mu a_{t-1} + 1 - \tau$; Nesterov: $(1 + \mu a_t)\, g$ |
| Adam, AdamW | $g / (\sqrt{\hat v} + \epsilon)$ |
| NAdam | $g / (\sqrt{\hat v} + \epsilon)$ times the weights of its two terms |
| RAdam | $r_t\, g / (\sqrt{\hat v} + \epsilon)$, or $g$ while its variance is not tractable |
| Adamax | $g / u$ |
| RMSprop | $a_t \odot g$; $a_t = \mu a_{t-1} + 1 / (\sqrt{v} + \epsilon)$, elementwise |
| Adagrad | $g / (\sqrt{s} + \epsilon)$, divided by its own decay of the rate |
| Muon | $s\, \mathrm{NS}(g)$: the Newton–Schulz steps of the base; $s$ of `adjust_lr_fn` |
| Lion | $\mathrm{sign}(g)$ |

The gains $a_t$ of SGD and RMSprop with momentum are kept beside the base's state. Muon's factor $s$
for a matrix of $n$ rows and $m$ columns is $\sqrt{\max(1, n / m)}$, or
$0.2 \sqrt{\max(n, m)}$ where it matches AdamW. Lion is that of the packages lion-pytorch and
pytorch_optimizer, known by name. For any other base see `adler._optimizers.found_directions`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, optim

from adler._optimizers.adam import adam_denominators

try:  # since PyTorch 2.9; without these, Muon is a base like any that is not known
    from torch.optim._muon import Muon, _adjust_lr, _zeropower_via_newtonschulz
except ImportError:
    Muon = None  # type: ignore[assignment,misc]

__all__ = ["Update", "closed_form", "sign"]


@dataclass
class Update:
    """One step of a base on one parameter.

    Attributes:
        parameter: As before the step.
        group: The base's param group.
        state: The base's state of the parameter after the step.
        started: Whether the base had made steps on it before.
        gain: Of the last step, empty before the first; replaced by that of this one.
        gradient: Of this minibatch.
    """

    parameter: Tensor
    group: Mapping[str, Any]
    state: Mapping[str, Tensor]
    started: bool
    gain: Tensor | None
    gradient: Tensor

    @property
    def step(self) -> Tensor:
        """Steps so far, float64, with the gradient."""
        return torch.as_tensor(self.state["step"]).to(self.gradient.device).double()


Fresh = Callable[[Update], Tensor]


def closed_form(base: optim.Optimizer) -> Fresh | None:
    """What gives ``D`` of each parameter after a step of this base; None: not known."""
    kind = type(base)
    if kind in _FRESH:
        return _FRESH[kind]
    function, unless = _NAMED.get(f"{kind.__module__}.{kind.__qualname__}", (None, ()))
    if any(group.get(option) for group in base.param_groups for option in unless):
        return None
    return function


def sign(update: Update) -> Tensor:
    """The signs of the gradient."""
    return update.gradient.sign()


def _muon(update: Update) -> Tensor:
    group, gradient = update.group, update.gradient
    whole = _zeropower_via_newtonschulz(
        gradient, group["ns_coefficients"], group["ns_steps"], group["eps"]
    )
    return whole.to(gradient) * _adjust_lr(1.0, group["adjust_lr_fn"], gradient.shape)


def _scaled(factor: Fresh) -> Fresh:
    """The gradient times a factor."""
    return lambda update: update.gradient * factor(update)


def _sgd(update: Update) -> Tensor:
    momentum, one = update.group["momentum"], update.gradient.new_ones(())
    if momentum == 0:
        return one
    increment = one * (1 - update.group["dampening"])
    # The first gradient enters undamped.
    gain = _accumulate(update, increment, increment if update.started else one)
    return one + momentum * gain if update.group["nesterov"] else gain


def _rmsprop(update: Update) -> Tensor:
    state, group = update.state, update.group
    square = state["square_avg"]
    if group["centered"]:
        square = square.addcmul(state["grad_avg"], state["grad_avg"], value=-1)
    inverse = (square.sqrt() + group["eps"]).reciprocal()
    return inverse if group["momentum"] == 0 else _accumulate(update, inverse, inverse)


def _accumulate(update: Update, increment: Tensor, first: Tensor) -> Tensor:
    """``a ← μ a + increment``, which starts at ``first``, or in the steady state of the base."""
    momentum, before = update.group["momentum"], update.gain
    if before is None:
        steady = update.started and momentum < 1
        before = increment / (1 - momentum) if steady else torch.zeros_like(increment)
    update.gain = torch.where(before == 0, first, momentum * before + increment)
    return update.gain


def _adam(update: Update) -> Tensor:
    state, group = update.state, update.group
    square = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"].clone()
    adam_denominators([square], [update.step], group["betas"][1], group["eps"])
    return square.reciprocal_()


def _nadam(update: Update) -> Tensor:
    state, group, t = update.state, update.group, update.step
    first, second = group["betas"]
    square = state["exp_avg_sq"].clone()
    adam_denominators([square], [t], second, group["eps"])
    decay = group["momentum_decay"]
    now, after = (first * (1 - 0.5 * 0.96 ** ((t + k) * decay)) for k in (0, 1))
    product = state["mu_product"].to(t)
    weight = (1 - now) / (1 - product) + after * (1 - first**t) / (1 - product * after)
    return square.reciprocal_().mul_(weight)


def _radam(update: Update) -> Tensor:
    state, group, t = update.state, update.group, update.step
    discount = group["betas"][1]
    correction, limit = 1 - discount**t, 2 / (1 - discount) - 1
    length = limit - 2 * t * discount**t / correction
    rectifier = (length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length)
    adapted = (state["exp_avg_sq"].sqrt() + group["eps"]).reciprocal_()
    adapted.mul_((rectifier * correction).clamp(min=0).sqrt())
    return torch.where(length > 5, adapted, torch.ones_like(adapted))


def _adamax(update: Update) -> Tensor:
    return update.state["exp_inf"].reciprocal()


def _adagrad(update: Update) -> Tensor:
    own_decay = 1 + (update.step - 1) * update.group["lr_decay"]
    denominator: Tensor = update.state["sum"].sqrt() + update.group["eps"]
    return denominator.mul_(own_decay).reciprocal_()


# Not of subclasses, which may step in another way.
_FRESH: dict[type[optim.Optimizer], Fresh] = {
    optim.SGD: _scaled(_sgd),
    optim.Adam: _scaled(_adam),
    optim.AdamW: _scaled(_adam),
    optim.NAdam: _scaled(_nadam),
    optim.RAdam: _scaled(_radam),
    optim.Adamax: _scaled(_adamax),
    optim.RMSprop: _scaled(_rmsprop),
    optim.Adagrad: _scaled(_adagrad),
}
if Muon is not None:
    _FRESH[Muon] = _muon

# Of other packages, which need not be there; unless an option is on that changes the direction.
_NAMED: dict[str, tuple[Fresh, tuple[str, ...]]] = {
    "lion_pytorch.lion_pytorch.Lion": (sign, ()),
    "pytorch_optimizer.optimizer.lion.Lion": (sign, ("use_gc", "cautious")),
}
