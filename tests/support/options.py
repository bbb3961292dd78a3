"""Options that tests state which are exact, or need one kind of measurement: not the defaults."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from adler import Measure


def measuring(jvp: str = "forward", **changes: Any) -> dict[str, Measure]:
    """``measure=``, at every step and on the whole batch but for what is said."""
    return {"measure": replace(Measure.every_step(jvp), **changes)}


EXACT = measuring()
