"""Options as values: bounds of a step, how curvature is measured; and checks of all options."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from adler.curvature import ENGINES

__all__ = ["Guard", "Measure", "Search", "check", "check_moved", "from_plain", "plain"]


@dataclass(frozen=True)
class Guard:
    """How long a step may be, whatever the average of the measured rates says.

    The rules stand in `adler._step_length`. ``guard=None`` in an optimizer's constructor is no
    bound at all, as in the published algorithm.

    Attributes:
        trust_region: In rates of the present minibatch: its model is back at its start at 2.
            ``None``: any.
        max_kl: By how many nats an example a step may move the batch's predictions, for losses
            that are log-likelihoods; regression losses take the residuals' variance for scale.
            ``None``: by any number.
        max_relative_change: By what fraction of its initial norm a parameter tensor may move in a
            step, where the gradient is taken; one that would move further is shortened alone. See
            `adler._optimizers.relative_change`. ``None``: by any.

    Raises:
        ValueError: If a bound is not a positive number or None.

    Examples:
        >>> Guard(max_kl=0.1)
        Guard(trust_region=2.0, max_kl=0.1, max_relative_change=0.02)
    """

    trust_region: float | None = 2.0
    max_kl: float | None = None
    max_relative_change: float | None = 0.02

    def __post_init__(self) -> None:
        for name, bound in dataclasses.asdict(self).items():
            valid = bound is None or (_number(bound) and 0 < bound < math.inf)
            _require(name, bound, valid, "a positive number, or None for no bound")


# After so many intervals of one length comes one of twice the length.
_INTERVALS = 200


@dataclass(frozen=True)
class Measure:
    """How, and how often, curvature is measured.

    By default exactly, by forward mode, on a quarter of the batch, at each of the first hundred
    steps, then at every eighth, from the 1,600th on at every sixteenth and from the 3,200th on at
    every thirty-second: for a few hundredths of the time of a step. Between measurements the
    average stays as it is; its bounds follow the present gradient, with a mean of the last ratios
    ``c / d·d``.
    `every_step` has it all, for twice the time.

    Attributes:
        jvp: ``"forward"`` (exact), ``"finite_difference"`` (one more forward, any op) or
            ``"double_backward"``.
        every: Measure every so many steps.
        fraction: Measure on this fraction of the batch, its first examples. What a part's
            logarithm is off by, its halves tell; see `adler._step_length`.
        warmup: Number of first steps that all measure, whatever ``every``: on the plateau where a
            network starts, a ratio that is a few steps old says nothing of what comes next.
        longest: The interval doubles after two hundred intervals' worth of steps, and again
            whenever the steps have doubled, up to this one: the average is of all steps, so a
            measurement is an ever smaller part of it. At ``every=1``, or where ``every`` is not
            below ``longest``, it stays.

    Raises:
        ValueError: If a value is out of its range.

    Examples:
        >>> Measure.every_step()
        Measure(jvp='forward', every=1, fraction=1.0, warmup=0, longest=1)
        >>> [Measure().interval(steps) for steps in (99, 100, 1600, 3200, 100_000)]
        [1, 8, 16, 32, 32]
    """

    jvp: str = "forward"
    every: int = 8
    fraction: float = 0.25
    warmup: int = 100
    longest: int = 32

    def __post_init__(self) -> None:
        valid = isinstance(self.jvp, str) and self.jvp in ENGINES
        _require("jvp", self.jvp, valid, f"one of {', '.join(map(repr, ENGINES))}")
        valid = _whole(self.every) and self.every >= 1
        _require("every", self.every, valid, "a whole number of at least 1")
        valid = _number(self.fraction) and 0 < self.fraction <= 1
        _require("fraction", self.fraction, valid, "a number in (0, 1]")
        valid = _whole(self.warmup) and self.warmup >= 0
        _require("warmup", self.warmup, valid, "a whole number of at least 0")
        valid = _whole(self.longest) and self.longest >= 1
        _require("longest", self.longest, valid, "a whole number of at least 1")

    @classmethod
    def every_step(cls, jvp: str = "forward") -> Measure:
        """At every step, on the whole batch."""
        return cls(jvp, every=1, fraction=1.0, warmup=0, longest=1)

    @classmethod
    def low_cost(cls) -> Measure:
        """As rarely as by default, by finite differences: two passes without gradients on a part.

        Good for any op, at about the same cost, and less exact: see the page on cost.
        """
        return cls("finite_difference")

    def is_due(self, steps: int) -> bool:
        """Whether a step measures that comes after so many."""
        return steps % self.interval(steps) == 0

    def interval(self, steps: int) -> int:
        """Steps from one measurement to the next, after so many steps."""
        if steps < self.warmup or self.every == 1:
            return 1
        interval = self.every
        while 2 * interval <= self.longest and steps >= _INTERVALS * interval:
            interval *= 2
        return interval


@dataclass(frozen=True)
class Search:
    """How the length of a step is found: what all groups share, checked.

    Attributes:
        beta: Discount of the average of rates.
        eps: Bounds a minibatch's rate by its inverse.
        guard: How long a step may be; None: as long as the average says.
        measure: How, and how often, curvature is measured.

    Raises:
        ValueError: If a number is out of its range.
        TypeError: If ``guard`` or ``measure`` is of another kind.
    """

    beta: float
    eps: float
    guard: Guard | None
    measure: Measure

    def __post_init__(self) -> None:
        guard, measure = self.guard, self.measure
        if guard is not None and not isinstance(guard, Guard):
            raise TypeError(f"guard: expected an adler.Guard or None, got {type(guard).__name__}")
        if not isinstance(measure, Measure):
            raise TypeError(f"measure: expected an adler.Measure, got {type(measure).__name__}")
        check({"beta": self.beta, "eps": self.eps})


def plain(value: Guard | Measure | None) -> dict[str, Any] | None:
    """As a checkpoint holds it."""
    return None if value is None else dataclasses.asdict(value)


def from_plain(kind: type[Any], value: Mapping[str, Any] | None) -> Any:
    """From what a checkpoint holds.

    Raises:
        ValueError: If the checkpoint has other options.
    """
    if value is None:
        return None
    try:
        return kind(**value)
    except TypeError as error:
        raise ValueError(f"state dict: not the options of {kind.__name__}: {error}") from error


_PLACES: dict[str, str] = {
    **{f.name: f"guard=Guard({f.name}=...)" for f in dataclasses.fields(Guard)},
    **{f.name: f"measure=Measure({f.name}=...)" for f in dataclasses.fields(Measure)},
    "curvature_every": "measure=Measure(every=...)",
    "curvature_fraction": "measure=Measure(fraction=...)",
    "curvature_warmup": "measure=Measure(warmup=...)",
}


def check_moved(kind: type, options: Mapping[str, Any]) -> None:
    """Refuses keyword arguments that an optimizer does not have.

    Raises:
        TypeError: Names the argument, and where it is set instead or what there is.
    """
    known = inspect.signature(kind.__init__).parameters  # type: ignore[misc]
    if any(p.kind is p.VAR_KEYWORD for p in known.values()):
        return
    for name in options:
        if name in known:
            continue
        if name in _PLACES:
            raise TypeError(f"{kind.__name__}: {name} is set by {_PLACES[name]}")
        own = ", ".join(p.name for p in known.values() if p.kind is p.KEYWORD_ONLY)
        raise TypeError(f"{kind.__name__}: unknown option {name!r}; it has {own}")


def check(options: Mapping[str, Any]) -> None:
    """Checks the options of a parameter group, and those that all groups share.

    Raises:
        ValueError: Names the option, its value and what it may be.
    """
    if "lr" in options:
        _check_lr(options["lr"])
    if "beta" in options:
        beta = options["beta"]
        _require("beta", beta, _number(beta) and 0 <= beta <= 1, "a number in [0, 1]")
    for key in ("eps", "weight_decay"):
        value = options.get(key, 0)
        _require(key, value, _number(value) and 0 <= value < math.inf, "a finite number >= 0")
    momentum = options.get("momentum", 0.0)
    _require("momentum", momentum, _number(momentum) and 0 <= momentum < 1, "a number in [0, 1)")
    if "interpolation" in options:
        value = options["interpolation"]
        valid = value is None or (_number(value) and 0 < value < 1)
        _require("interpolation", value, valid, "a number in (0, 1), or None for no average")
    if "betas" in options:
        betas = options["betas"]
        valid = isinstance(betas, (tuple, list)) and len(betas) == 2
        valid = valid and all(_number(b) and 0 <= b < 1 for b in betas)
        _require("betas", betas, valid, "two numbers in [0, 1)")
        offset = options["adam_eps"]
        _require("adam_eps", offset, _number(offset) and 0 < offset < math.inf, "a positive number")
    for key in ("power_iterations", "gershgorin_columns"):
        count = options.get(key, 1)
        valid = (_whole(count) and count >= 1) or (key == "gershgorin_columns" and count is None)
        _require(key, count, valid, "a whole number of at least 1")
    count = options.get("bn_batches", 0)
    _require("bn_batches", count, _whole(count) and count >= 0, "a whole number of at least 0")
    mean = options.get("mean_curvature", False)
    _require("mean_curvature", mean, isinstance(mean, bool), "True or False")


def _check_lr(lr: object) -> None:
    if isinstance(lr, Tensor):
        valid = lr.numel() == 1
        if valid and lr.device.type == "cpu":  # elsewhere a look would wait for the device
            valid = 0 <= lr.detach().double().numpy().item() < math.inf
        _require("lr", lr, valid, "a finite number, or a tensor of one, of at least 0")
    else:
        valid = _number(lr) and 0 <= lr < math.inf  # type: ignore[operator]
        _require("lr", lr, valid, "a finite number of at least 0")


def _require(name: str, value: object, valid: bool, expected: str) -> None:
    if not valid:
        raise ValueError(f"{name}={value!r}: expected {expected}")


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
