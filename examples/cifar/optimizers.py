"""The optimizers that are compared, by name. One line adds another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import nn
from torch.optim import SGD, Optimizer

import adler

__all__ = ["OPTIMIZERS", "Entry", "Factory"]

Factory = Callable[[Iterable[nn.Parameter], nn.Module, nn.Module, float], Optimizer]


class Entry(NamedTuple):
    """An optimizer of the comparison.

    Attributes:
        label: The column's head.
        tuned: Whether it is run at every rate of the grid, and the best is reported.
        passes: Forward passes, backward passes and Jacobian-vector products of one step.
        make: Builds it from the parameters, the model, the criterion and the learning rate.
    """

    label: str
    tuned: bool
    passes: int
    make: Factory


def _guarded(**bounds: float | None) -> Factory:
    """Algorithm 1 under bounds: Adler's defaults of when the comparison was run."""
    guard = adler.Guard(trust_region=2.0, **bounds)
    return lambda p, m, c, lr: adler.Adler(
        p,
        m,
        c,
        interpolation=None,
        beta=0.99,
        guard=guard,
        measure=adler.Measure.every_step(),
    )


# No momentum, no weight decay, no schedule. In the order of the table's columns.
OPTIMIZERS: dict[str, Entry] = {
    "adler-published": Entry(
        "ADLER (published)", False, 3, lambda p, m, c, lr: adler.Adler.as_published(p, m, c)
    ),
    "gauss-newton-published": Entry(
        "GN (published)", False, 3, lambda p, m, c, lr: adler.GaussNewton.as_published(p, m, c)
    ),
    "sgd": Entry("SGD grid", True, 2, lambda p, m, c, lr: SGD(p, lr=lr)),
    "adler": Entry("Adler (guarded)", False, 3, _guarded(max_kl=0.1, max_relative_change=0.1)),
    "adler-cap": Entry(
        "Adler (trust region only)", False, 3, _guarded(max_kl=None, max_relative_change=None)
    ),
}
