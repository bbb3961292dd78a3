"""What an option may be: checked when the optimizer is made, and again at every step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from adler.curvature.jacobian import ENGINES

__all__ = ["check"]


def check(options: Mapping[str, Any]) -> None:
    """Checks the options of a parameter group.

    Raises:
        ValueError: Names the option, its value and what it may be.
    """
    lr = options["lr"]
    if isinstance(lr, Tensor):
        one = lr.numel() == 1
        if one and lr.device.type == "cpu":  # elsewhere a look would wait for the device
            one = 0 <= lr.detach().double().numpy().item() < math.inf
        _require(options, "lr", one, "a finite number, or a tensor of one, of at least 0")
    else:
        _require(options, "lr", _number(lr) and 0 <= lr < math.inf, "a finite number of at least 0")
    beta = options["beta"]
    _require(options, "beta", _number(beta) and 0 <= beta < 1, "a number in [0, 1)")
    for key in ("eps", "weight_decay"):
        valid = _number(options.get(key, 0)) and 0 <= options.get(key, 0) < math.inf
        _require(options, key, valid, "a finite number of at least 0")
    momentum = options.get("momentum", 0.0)
    valid = momentum == "joint" or (_number(momentum) and 0 <= momentum < 1)
    _require(options, "momentum", valid, "a number in [0, 1), or 'joint'")
    for key in ("trust_region", "max_kl", "max_relative_change"):
        bound = options[key]
        valid = bound is None or (_number(bound) and 0 < bound < math.inf)
        _require(options, key, valid, "a positive number, or None for no bound")
    if "betas" in options:
        betas = options["betas"]
        valid = isinstance(betas, (tuple, list)) and len(betas) == 2
        valid = valid and all(_number(b) and 0 <= b < 1 for b in betas)
        _require(options, "betas", valid, "two numbers in [0, 1)")
        offset = options["adam_eps"]
        valid = _number(offset) and 0 < offset < math.inf
        _require(options, "adam_eps", valid, "a positive number")
    jvp = options["jvp"]
    valid = isinstance(jvp, str) and jvp in ENGINES
    _require(options, "jvp", valid, f"one of {', '.join(map(repr, ENGINES))}")
    fraction = options["curvature_fraction"]
    valid = _number(fraction) and 0 < fraction <= 1
    _require(options, "curvature_fraction", valid, "a number in (0, 1]")
    count = options["curvature_warmup"]
    valid = isinstance(count, int) and not isinstance(count, bool) and count >= 0
    _require(options, "curvature_warmup", valid, "a whole number of at least 0")
    for key in ("curvature_every", "power_iterations", "gershgorin_columns"):
        count = options.get(key, 1)
        valid = isinstance(count, int) and not isinstance(count, bool) and count >= 1
        if key == "gershgorin_columns":
            valid = valid or count is None
        _require(options, key, valid, "a whole number of at least 1")


def _require(options: Mapping[str, Any], key: str, valid: bool, expected: str) -> None:
    if not valid:
        raise ValueError(f"{key}={options[key]!r}: expected {expected}")


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
