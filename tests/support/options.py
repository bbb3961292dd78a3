"""Options that tests state which are exact, or need one kind of measurement: not the defaults."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from adler import Guard, Measure


def measuring(jvp: str = "forward", **changes: Any) -> dict[str, Any]:
    """``measure=``, at every step and on the whole batch but for what is said."""
    return {"measure": replace(Measure.every_step(jvp), **changes)}


# Curvature is that of the whole batch, at every step.
EXACT = measuring()
# The rate is the average, at the first step the minimiser.
UNGUARDED = {"guard": None, "eps": 0.0}
# The parameters are those of the last step, not between an iterate and its average.
LAST_ITERATE = {"interpolation": None}
# Every bound that there is; the one alone that the quadratic model gives.
GUARDS = Guard(trust_region=2.0, max_kl=0.1, max_relative_change=0.1)
TRUST_REGION = Guard(trust_region=2.0, max_kl=None, max_relative_change=None)
BOUNDS = {"guard": GUARDS}

# How a step may measure, each with another choice of bounds.
MODES = {
    "default": {},
    "exact": {**EXACT, **BOUNDS},
    "difference": {**measuring("finite_difference"), **BOUNDS},
    "part": {**measuring("finite_difference", fraction=0.5), **BOUNDS},
    "amortised": {**measuring(every=2), **BOUNDS},
}
