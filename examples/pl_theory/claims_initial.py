"""Claim against measurement at initialisation."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from examples.pl_theory.drawing import Values, mean
from examples.pl_theory.figures import middle_size, scaling_law, series
from examples.pl_theory.records import Record, of_kind
from examples.pl_theory.verdicts import Section, number, power_law, table, verdict

__all__ = [
    "depth",
    "entries",
    "largest",
    "row_sums",
    "scaling",
    "smallest",
    "three_layers",
    "width",
]


def _runs(found: Sequence[Record], **values: object) -> list[Record]:
    return of_kind(found, "initialisation", activation="relu", **values)


def _widths(found: Sequence[Record], **values: object) -> list[int]:
    return sorted({int(r["width"]) for r in _runs(found, **values)})


def _mean(found: Sequence[Record], n: int, quantity: str, **values: object) -> Values:
    """Over seeds, by layer from the first."""
    return mean([series(r, n, quantity) for r in _runs(found, **values)])[1:]


def _settings(found: Sequence[Record]) -> list[tuple[int, int, bool]]:
    """Width, examples, and whether renormalised, where there are fewer examples than units."""
    keys = {(r["width"], n, r["renormalised"]) for r in _runs(found) for n in r["examples"]}
    return sorted(key for key in keys if key[1] < key[0])


def depth(found: Sequence[Record]) -> Section | None:
    """Fall, stagnation and rise of the log condition number."""
    rows, cases = [], []
    for w, n, renormalised in _settings(found):
        line = _mean(found, n, "log_condition", width=w, renormalised=renormalised)
        last, least = len(line) - 1, int(np.nanargmin(line))
        early = line[: max(2, min(least + 1, 6))]
        falls = bool((np.diff(early) < 0).all())
        # Of the whole fall; what lies within a tenth of it of the minimum counts as stagnation.
        fall = line[0] - line[least]
        rises = line[last] - line[least] > 0.1 * fall
        cases += [falls, rises != renormalised]
        moves = np.ptp(early) > 0
        straight = np.corrcoef(np.arange(len(early)), early)[0, 1] ** 2 if moves else np.nan
        values = (line[0], line[least], line[last])
        rows.append(
            (
                str(w),
                str(n),
                "yes" if renormalised else "no",
                *map(number, values),
                str(least + 1),
                number(straight),
                "rises" if rises else "stagnates",
            )
        )
    if not rows:
        return None
    head = (
        "Width",
        "Examples",
        "Renormalised",
        "log κ, layer 1",
        "Least",
        "Last layer",
        "Layer of the least",
        "R² of a line, first layers",
        "After the least",
    )
    text = (
        "ReLU, means over seeds. Counted: log κ falls in each of the first five layers (or up to "
        "its least value, if that comes before); and at the end it has risen by more than a "
        "tenth of its fall without renormalisation, and has not with it.\n"
    )
    return Section(
        ("6.1",),
        "Conditioning decreases exponentially in the first layers; it continues to decrease, or "
        "stagnates, when the examples are renormalised, and without renormalisation there is a "
        "layer after which it increases again.",
        "\n".join([text, *table(head, rows)]),
        verdict(cases),
    )


def width(found: Sequence[Record]) -> Section | None:
    """Wider is better conditioned, and rises later."""
    both = [set(_widths(found, renormalised=flag)) for flag in (False, True)]
    widths = sorted(both[0] & both[1])
    if len(widths) < 2:
        return None
    n, rows, cases = middle_size(found), [], []
    for renormalised in (False, True):
        lines = [
            _mean(found, n, "log_condition", width=w, renormalised=renormalised) for w in widths
        ]
        last = [float(line[-1]) for line in lines]
        least = [int(np.nanargmin(line)) + 1 for line in lines]
        cases.append(all(b < a for a, b in itertools.pairwise(last)))
        if not renormalised:
            cases.append(all(b >= a for a, b in itertools.pairwise(least)))
        rows.append(("yes" if renormalised else "no", "last layer", *map(number, last)))
        rows.append(("yes" if renormalised else "no", "layer of the least", *map(str, least)))
    head = ("Renormalised", "log κ", *(f"width {w}" for w in widths))
    text = (
        f"{n} examples. Counted: the last layer's log κ falls with every width; the layer of the "
        "least one, without renormalisation, does not come earlier.\n"
    )
    return Section(
        ("6.2",),
        "The wider the network, the lower the conditioning; larger widths also allow for a later "
        "departure between renormalised and not.",
        "\n".join([text, *table(head, rows)]),
        verdict(cases),
    )


def smallest(found: Sequence[Record]) -> Section | None:
    """Rescaled smallest singular values, and Lemma 24."""
    infinite = of_kind(found, "infinite-width", activation="relu")
    if not _runs(found, renormalised=True) or not infinite:
        return None
    n, rows, cases = middle_size(found), [], []
    ends = []
    for w in _widths(found, renormalised=True):
        line = np.sqrt(_mean(found, n, "smallest", width=w, renormalised=True))
        ends.append(float(line[-1]))
        half = len(line) // 2
        cases.append(float(line[half] - line[0]) > float(line[-1] - line[half]))
        rows.append((f"width {w}", *map(number, (line[0], line[half], line[-1]))))
    cases.append(all(b > a for a, b in itertools.pairwise(ends)))
    layers = infinite[0]["results"]["layers"][str(n)]
    for name, label in (
        ("smallest", "infinite width"),
        ("lemma_24", "Lemma 24"),
        ("combined", "combined bound"),
    ):
        line = np.sqrt(np.array(layers[name][1:], dtype=float))
        rows.append((label, *map(number, (line[0], line[len(line) // 2], line[-1]))))
    cases.append(float(np.sqrt(layers["smallest"][-1])) > 0.9)
    head = ("Network", "Layer 1", "Middle layer", "Last layer")
    text = (
        f"Smallest singular value of the features over √width, renormalised ReLU, {n} examples. "
        "Counted: more is gained in the first half of the layers than in the second; the last "
        "value grows with width; at infinite width it is above 0.9.\n"
    )
    return Section(
        ("6.3",),
        "The rescaled smallest eigenvalues increase a lot in the first layers and stabilise, "
        "higher for wider networks, at values around one, which only infinite width reaches.",
        "\n".join([text, *table(head, rows)]),
        verdict(cases),
    )


def largest(found: Sequence[Record]) -> Section | None:
    """Rescaled largest singular values."""
    if not _runs(found, renormalised=True):
        return None
    n, rows, cases = middle_size(found), [], []
    for w in _widths(found, renormalised=True):
        line = np.sqrt(_mean(found, n, "largest", width=w, renormalised=True))
        half = len(line) // 2
        cases.append(line[half] < line[0] and abs(line[-1] - line[half]) < line[0] - line[half])
        rows.append((f"width {w}", *map(number, (line[0], line[half], line[-1]))))
    head = ("Network", "Layer 1", "Middle layer", "Last layer")
    text = (
        f"Largest singular value over √width, renormalised ReLU, {n} examples. Counted: it falls "
        "to the middle layer, and changes by less from there on.\n"
    )
    return Section(
        ("6.4",),
        "The highest eigenvalue decreases in the first layers and later stabilises.",
        "\n".join([text, *table(head, rows)]),
        verdict(cases),
    )


def row_sums(found: Sequence[Record]) -> Section | None:
    """Whether row sums turn where the conditioning does."""
    if not _runs(found):
        return None
    n, rows, cases = middle_size(found), [], []
    for w, renormalised in itertools.product(_widths(found), (False, True)):
        if not _runs(found, width=w, renormalised=renormalised):
            continue
        options = {"width": w, "renormalised": renormalised}
        sums = _mean(found, n, "max_row_sum", **options)
        condition = _mean(found, n, "log_condition", **options)
        turn, where = int(np.argmin(sums)) + 1, int(np.nanargmin(condition)) + 1
        rises = sums[-1] > 1.1 * sums[turn - 1]
        cases.append(rises != renormalised)
        if not renormalised:
            cases.append(abs(turn - where) <= 3)
        values = map(number, (sums[0], sums[turn - 1], sums[-1]))
        rows.append((str(w), "yes" if renormalised else "no", *values, str(turn), str(where)))
    head = (
        "Width",
        "Renormalised",
        "Row sum, layer 1",
        "Least",
        "Last layer",
        "Layer of the least",
        "Layer of the least κ",
    )
    text = (
        f"ReLU, {n} examples, Gram matrices over width. Counted: the sums end more than a tenth "
        "above their least value without renormalisation, and not with it; without it their "
        "least value is within three layers of that of κ.\n"
    )
    return Section(
        ("6.9",),
        "Off-diagonal row sums decrease and stabilise for renormalised networks, and grow again "
        "without renormalisation; the divergence aligns with the rise in conditioning.",
        "\n".join([text, *table(head, rows)]),
        verdict(cases),
    )


def entries(found: Sequence[Record]) -> Section | None:
    """Least diagonal against largest off-diagonal entry."""
    if not _runs(found, renormalised=False):
        return None
    n, rows, cases = middle_size(found), [], []
    for w in _widths(found, renormalised=False):
        options = {"width": w, "renormalised": False}
        diagonal = _mean(found, n, "min_diagonal", **options)
        off = _mean(found, n, "max_off_diagonal", **options)
        above = np.flatnonzero(diagonal > off) + 1
        there = f"{above[0]}–{above[-1]}" if len(above) else "none"
        cases += [len(above) > 0, bool(diagonal[-1] < off[-1])]
        rows.append((str(w), there, number(diagonal[-1]), number(off[-1])))
    head = (
        "Width",
        "Layers with the diagonal above",
        "Least diagonal, last",
        "Largest other, last",
    )
    text = (
        f"ReLU without renormalisation, {n} examples. Counted: there are layers whose least "
        "diagonal entry exceeds the largest other entry; in the last layer it does not.\n"
    )
    return Section(
        ("6.10",),
        "In some intermediate layers the least entry on the diagonal is higher than the largest "
        "off it; the condition later inverts.",
        "\n".join([text, *table(head, rows)]),
        verdict(cases),
    )


def scaling(found: Sequence[Record]) -> Section | None:
    """The exponent of (6.8), layer by layer."""
    runs = of_kind(found, "initialisation", activation="tanh", renormalised=False)
    if not runs:
        return None
    rows, cases = [], []
    depth = runs[0]["depth"]
    for layer in sorted({1, 2, 5, 10, depth // 2, 2 * depth // 3, depth}):
        if layer > depth:
            continue
        points = [
            (scaling_law(n, r["width"]), float(np.exp(series(r, n, "log_condition")[layer])))
            for r in runs
            for n in r["examples"]
            if n < r["width"]
        ]
        x, y = (np.array(values) for values in zip(*points, strict=True))
        kept = np.isfinite(y)
        fit = power_law(x[kept], y[kept])
        cases += [abs(fit.exponent - 2) <= 0.3, fit.r_squared >= 0.9]
        rows.append((str(layer), f"{fit.exponent:.2f}", f"{fit.r_squared:.3f}", str(kept.sum())))
    head = ("Layer", "Exponent", "R²", "Gram matrices")
    text = (
        "Tanh without renormalisation, fewer examples than units: κ(G) ∝ factor^exponent. The "
        "law that (6.8) quotes is of the singular values of the features F, and κ(G) = κ(F)², so "
        "that the exponent to expect of κ(G) is 2, not 1 as printed. Counted: 2 ± 0.3, and R² of "
        "at least 0.9.\n"
    )
    return Section(
        ("6.13",),
        "The conditioning is proportional to √(examples · width) / (√width − √examples), at every "
        "layer (for κ(G): to its square).",
        "\n".join([text, *table(head, rows)]),
        verdict(cases),
    )


def three_layers(found: Sequence[Record]) -> Section | None:
    """Growth of the tangent kernel's smallest eigenvalue."""
    rows, cases = [], []
    runs = of_kind(found, "tangent-kernel")
    for d, second in sorted({(r["dimension"], r["width"]) for r in runs}):
        same = of_kind(runs, "tangent-kernel", dimension=d, width=second)
        sizes = np.array([float(r["examples"][0]) for r in same])
        if len(set(sizes.tolist())) < 2:
            continue
        fit = power_law(sizes, np.array([float(r["results"]["smallest"]) for r in same]))
        cases.append(abs(fit.exponent - 1) <= 0.2)
        rows.append((str(d), str(second), f"{fit.exponent:.2f}", f"{fit.r_squared:.3f}"))
    if not rows:
        return None
    head = ("d", "n₂", "Exponent", "R²")
    text = (
        "λ_min(K) ∝ N^exponent by least squares of logarithms, over N and seeds; inputs on the "
        "sphere of radius √d, as in the slides. Counted: 1 ± 0.2. The theorem bounds the "
        "eigenvalue by terms that grow with d and with n₁ = 8 N: the first, which does not grow "
        "with N, hides the second where d is large.\n"
    )
    return Section(
        ("nmm",),
        "The smallest eigenvalue of the tangent kernel of a 3-layer ReLU network of first width "
        "8 N scales linearly in N.",
        "\n".join([text, *table(head, rows)]),
        verdict(cases),
    )
