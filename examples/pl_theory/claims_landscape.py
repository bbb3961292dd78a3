"""Claim against measurement around networks: the Hessian's second term, dropout, connectivity."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from examples.pl_theory.figures import relative
from examples.pl_theory.records import Record, of_kind
from examples.pl_theory.verdicts import Section, number, table, verdict

__all__ = ["cancellation", "connected", "dominance", "dropout"]


def _surroundings(
    found: Sequence[Record], quantity: str, figure: str, claim: str, text: str
) -> Section | None:
    runs = of_kind(found, "connectivity")
    widths = sorted({int(r["width"]) for r in runs})
    if len(widths) < 2:
        return None
    rows, cases = [], []
    for activation, loss in sorted({(r["activation"], r["loss"]) for r in runs}):
        line = [
            float(np.mean([relative(r, quantity) for r in same]))
            for w in widths
            if (same := of_kind(runs, "connectivity", activation=activation, loss=loss, width=w))
        ]
        cases.append(line[-1] < line[0])
        rows.append((activation, loss, *map(number, line)))
    head = ("Activation", "Loss", *(f"width {w}" for w in widths))
    return Section((figure,), claim, "\n".join([text, *table(head, rows)]), verdict(cases))


def dropout(found: Sequence[Record]) -> Section | None:
    """Dropout stability by width."""
    return _surroundings(
        found,
        "change",
        "dropout",
        "Trained networks are dropout stable, the more the wider: |L_N − L_M| falls with the "
        "width.",
        "Half of the units of each of two hidden layers left out, the others' weights doubled; "
        "over the loss where nothing is known (0.1, or log 10). Means over seeds. Counted: less "
        "at the largest width than at the smallest. The theorem is of stochastic gradient "
        "descent in the mean-field scaling; these networks are trained by gradient descent in "
        "the usual one.\n",
    )


def connected(found: Sequence[Record]) -> Section | None:
    """Linear connectivity by width."""
    return _surroundings(
        found,
        "barrier",
        "connectivity",
        "Two solutions are connected by a path of low loss, of lower loss the wider the "
        "networks (the theorem's path is piecewise linear, through networks that have lost half "
        "their units; this is the straight line).",
        "The largest loss on the straight line between two trained networks less that at its "
        "ends, over the loss where nothing is known. Means over seeds. Counted: lower at the "
        "largest width than at the smallest.\n",
    )


def dominance(found: Sequence[Record]) -> Section | None:
    """Section 7.5, second argument: the first term dominates as training goes on."""
    runs = of_kind(found, "perturbation")
    if not runs:
        return None
    rows, cases = [], []
    for activation, loss, w in sorted({(r["activation"], r["loss"], r["width"]) for r in runs}):
        same = of_kind(runs, "perturbation", activation=activation, loss=loss, width=w)
        measured = [r["results"]["measured"] for r in same]
        shares = [m["gradient_share"] for m in measured]
        cases += [s[-1] > s[0] for s in shares]
        ends = [float(np.mean([s[i] for s in shares])) for i in (0, -1)]
        fallen = float(np.mean([m["loss"][-1] / m["loss"][0] for m in measured]))
        rows.append((activation, loss, str(w), *map(number, (*ends, fallen))))
    head = ("Activation", "Loss", "Width", "Share, start", "Share, end", "Loss, end / start")
    text = (
        "The GGN's share |c| / (|c| + |r|) of the second derivative along the gradient, before and "
        "after training on handwritten digits. Counted: larger at the end.\n"
    )
    return Section(
        ("7.5",),
        "The kernel-driven term becomes more dominant the more the optimisation progresses "
        "(7.5, 2).",
        "\n".join([text, *table(head, rows)]),
        verdict(cases),
    )


def cancellation(found: Sequence[Record]) -> Section | None:
    """Section 7.5, third argument: the second term cancels over draws of the last layer."""
    runs = of_kind(found, "perturbation")
    if not runs:
        return None
    rows, cases = [], []
    for activation, loss, w in sorted({(r["activation"], r["loss"], r["width"]) for r in runs}):
        same = of_kind(runs, "perturbation", activation=activation, loss=loss, width=w)
        draws = [r["results"]["draws"] for r in same]
        mean_share = [abs(d["residual"]) / d["gauss_newton"] for d in draws]
        modulus = [d["residual_modulus"] / d["gauss_newton"] for d in draws]
        errors = [d["residual_deviation"] / 40**0.5 for d in draws]
        cases += [abs(d["residual"]) <= 3 * e for d, e in zip(draws, errors, strict=True)]
        distance = [abs(d["residual"]) / e for d, e in zip(draws, errors, strict=True)]
        values = (np.mean(mean_share), np.mean(modulus), np.mean(distance))
        rows.append((activation, loss, str(w), *(number(float(v)) for v in values)))
    head = (
        "Activation",
        "Loss",
        "Width",
        "|mean second term| / mean GGN",
        "mean |second term| / mean GGN",
        "Mean in standard errors",
    )
    text = (
        "Over 40 draws of the last layer at initialisation, along one random direction in all "
        "parameters. Counted: the mean is within three standard errors of 0. The part of the "
        "second term with the targets cancels by symmetry; the part with the outputs, F · D²F, "
        "is even in the last layer's weights, and its mean need not be 0 (the thesis's "
        "independence assumption sets it so). The thesis's D-symmetry holds for neither loss "
        "with one-hot targets.\n"
    )
    return Section(
        ("7.5",),
        "On average over the initialisation of the last layer the second term is negligible "
        "(7.5, 3).",
        "\n".join([text, *table(head, rows)]),
        verdict(cases),
    )
