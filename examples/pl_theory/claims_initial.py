"""Claim against measurement at initialisation."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from examples.pl_theory.drawing import Values, array, network
from examples.pl_theory.networks import ODD
from examples.pl_theory.records import Record, of_kind
from examples.pl_theory.verdicts import Section, median, number, table, verdict

__all__ = ["convergence", "depth", "examples", "lower_bound"]


def convergence(found: Sequence[Record]) -> Section | None:
    """Distance of the finite-width curves from the infinite-width line."""
    rows, cases = [], []
    widths = sorted({r["width"] for r in of_kind(found, "initialisation")})
    for limit in of_kind(found, "infinite-width"):
        same = {name: limit[name] for name in ("activation", "renormalised", "dataset")}
        for size in limit["results"]["layers"]:
            for quantity in ("smallest", "largest"):
                distances = [
                    _distance(
                        of_kind(found, "initialisation", width=width, **same),
                        limit,
                        size,
                        quantity,
                    )
                    for width in widths
                ]
                if len(distances) > 1 and np.isfinite(distances).all():
                    cases.append(distances[-1] < distances[0] and _falls(distances))
                    rows.append((network(limit), size, quantity, *map(number, distances)))
    if not rows:
        return None
    head = ("Network", "Examples", "Eigenvalue", *(f"width {width}" for width in widths))
    text = (
        "Median over layers of |log λ − log λ at infinite width|, where both are above rounding; "
        "mean over seeds. Counted: it falls from the smallest to the largest width, with a "
        "negative slope. Left out: where some width is singular to rounding in every layer.\n"
    )
    return Section(
        ("6.1", "6.2"),
        "Eigenvalues of finite networks approach the infinite-width line as width grows.",
        "\n".join([text, *table(head, rows)]),
        verdict(cases),
    )


def _falls(values: Sequence[float]) -> bool:
    return float(np.polyfit(np.arange(len(values)), values, 1)[0]) < 0


def _distance(runs: Sequence[Record], limit: Record, size: str, quantity: str) -> float:
    line = _logarithms(limit, size, quantity)
    distances = [np.abs(_logarithms(r, size, quantity) - line)[1:] for r in runs]
    medians = [median(d) for d in distances]
    return float(np.mean(medians)) if medians else np.nan


def _logarithms(record: Record, size: str, quantity: str) -> Values:
    """Logarithms of eigenvalues, NaN where the smallest are rounding."""
    layers = record["results"]["layers"][size]
    known = np.isfinite(array(layers["log_condition"])) | (quantity == "largest")
    return np.log(np.where(known, array(layers[quantity]), np.nan))


def depth(found: Sequence[Record]) -> Section | None:
    """Log condition numbers in the first and in the last layer."""
    runs = of_kind(found, "infinite-width") + of_kind(found, "initialisation")
    if not runs:
        return None
    widest = max(r["width"] for r in runs)
    rows, cases = [], []
    for r in runs:
        if r["width"] not in (0, widest) or r["seed"] != 0:
            continue
        size = str(min(r["examples"]))
        inputs, first, *_, last = _log_conditions(r, size)
        centred = r["renormalised"] or r["activation"] in ODD
        cases.append(last < first if centred else last > first)
        width = "infinite" if r["width"] == 0 else str(r["width"])
        rows.append((network(r), width, *map(number, (inputs, first, last))))
    head = ("Network", "Width", "Inputs", "First layer", "Last layer")
    text = (
        f"Log condition numbers with {min(runs[0]['examples'])} examples. Counted: from the first "
        "to the last layer it falls where the activation has mean 0 (renormalised, or odd), and "
        "rises where not. Seed 0. ∞: singular to rounding.\n"
    )
    return Section(
        ("6.3",),
        "Depth improves the conditioning of features with renormalised activations, and degrades "
        "it with plain ones (but odd ones, which need no renormalisation).",
        "\n".join([text, *table(head, rows)]),
        verdict(cases),
    )


def _log_conditions(record: Record, size: str) -> Values:
    values = array(record["results"]["layers"][size]["log_condition"])
    return np.where(np.isfinite(values), values, np.inf)


def examples(found: Sequence[Record]) -> Section | None:
    """What more examples do, in the last layer."""
    runs = of_kind(found, "initialisation")
    if not runs:
        return None
    widest = of_kind(runs, "initialisation", width=max(r["width"] for r in runs), seed=0)
    sizes = [str(n) for n in widest[0]["examples"]]
    rows, cases = [], []
    for r in widest:
        last = [float(_log_conditions(r, size)[-1]) for size in sizes]
        cases.append(all(b >= a for a, b in itertools.pairwise(last)))
        rows.append((network(r), *map(number, last)))
    head = ("Network", *(f"{size} examples" for size in sizes))
    text = "Log condition numbers in the last layer, at the largest width.\n"
    return Section(
        ("6.4",),
        "More examples are conditioned worse (certain here, by Cauchy's interlacing: fewer "
        "examples are part of more).",
        "\n".join([text, *table(head, rows)]),
        verdict(cases),
    )


def lower_bound(found: Sequence[Record]) -> Section | None:
    """The bound in the role of Lemma 24."""
    rows, cases = [], []
    for r in of_kind(found, "infinite-width"):
        for size, layers in r["results"]["layers"].items():
            smallest, bound = array(layers["smallest"]), array(layers["lower_bound"])
            rounding = 1e-5 * np.abs(smallest) + 1e-12 * array(layers["largest"])  # six digits
            cases.append(bool((bound <= smallest + rounding).all()))
            known = np.isfinite(array(layers["log_condition"])) & (smallest > 0)
            share = bound[known] / smallest[known]
            rows.append((network(r), size, number(share[-1]), number(bound[-1])))
    if not rows:
        return None
    head = (
        "Network",
        "Examples",
        "Bound / λ_min, deepest layer above rounding",
        "Bound, last layer",
    )
    return Section(
        ("6.1",),
        "The lower bound at infinite width (in the role of Lemma 24) is below λ_min in all layers.",
        "\n".join(table(head, rows)),
        verdict(cases),
    )
