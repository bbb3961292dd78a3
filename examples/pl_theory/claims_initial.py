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
    """Fall, stagnation and rise of the log condition number, at every layer."""
    rows, falls, straight, later = [], [], [], []
    for w, n, renormalised in _settings(found):
        line = _mean(found, n, "log_condition", width=w, renormalised=renormalised)
        last, least = len(line) - 1, int(np.nanargmin(line))
        fall = line[0] - line[least]
        end = _settled(line)
        early = line[: end + 1]
        falls += (np.diff(early) < 0).tolist()
        linear = len(early) > 2 and np.ptp(early) > 0
        r_squared = np.corrcoef(np.arange(len(early)), early)[0, 1] ** 2 if linear else np.nan
        straight += [bool(r_squared >= 0.9)] if linear else []
        # Of the whole fall; what lies within a tenth of it above the least value is stagnation.
        above = line[end:] - line[least] > 0.1 * fall
        rises = bool(above[-1])
        later += [not a for a in above[1:]] if renormalised else [rises]
        rows.append(
            (
                str(w),
                str(n),
                "yes" if renormalised else "no",
                *map(number, (line[0], line[least], line[last])),
                str(end + 1),
                number(r_squared),
                f"{int((np.diff(line) < 0).sum())} of {last}",
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
        "Nine tenths fallen by layer",
        "R² of a line to there",
        "Steps that fall",
        "Afterwards",
    )
    text = (
        "ReLU, means over seeds. Counted, layer by layer: log κ falls from each layer to the next "
        "until nine tenths of its fall are done; R² of a line through these layers is at least "
        "0.9; from there on it stays within a tenth of the fall above its least value in every "
        "layer (renormalised), or has left it in the last one (not renormalised).\n"
    )
    return Section(
        ("6.1",),
        "Conditioning decreases exponentially in the first layers (log κ falls linearly); it "
        "continues to decrease, or stagnates, when the examples are renormalised, and without "
        "renormalisation there is a layer after which it increases again.",
        "\n".join([text, *table(head, rows)]),
        f"falls: {verdict(falls)}; linearly: {verdict(straight)}; "
        f"stagnates or rises: {verdict(later)}",
    )


def _settled(line: Values, share: float = 0.9) -> int:
    """The first layer, from 0, by which so much of the way to the least value is done."""
    target = line[0] - share * (line[0] - np.nanmin(line))
    return int(np.flatnonzero(line <= target)[0])


def width(found: Sequence[Record]) -> Section | None:
    """Wider is better conditioned at every layer, and rises later."""
    both = [set(_widths(found, renormalised=flag)) for flag in (False, True)]
    widths = sorted(both[0] & both[1])
    if len(widths) < 2:
        return None
    n, rows = middle_size(found), []
    lower: list[bool] = []
    lines = {
        flag: [_mean(found, n, "log_condition", width=w, renormalised=flag) for w in widths]
        for flag in (False, True)
    }
    for renormalised, of_widths in lines.items():
        ordered = _falling(of_widths)
        lower += ordered
        name = "yes" if renormalised else "no"
        last = [float(line[-1]) for line in of_widths]
        rows.append((name, "log κ, last layer", *map(number, last)))
        rows.append(
            (name, f"ordered at {sum(ordered)} of {len(ordered)} layers", *["" for _ in widths])
        )
    departures = [_departure(a, b) for a, b in zip(*lines.values(), strict=True)]
    later = [b >= a for a, b in itertools.pairwise(departures)]
    rows.append(
        ("both", "departure, layer", *("none" if d == np.inf else f"{d:.0f}" for d in departures))
    )
    head = ("Renormalised", "What", *(f"width {w}" for w in widths))
    text = (
        f"{n} examples, means over seeds. Counted, at every layer: the wider, the lower. And from "
        "width to width: the departure does not come earlier. It is the layer from which on log κ "
        "without renormalisation stays above that with it by more than a tenth of the "
        "fall.\n"
    )
    return Section(
        ("6.2",),
        "The wider the network, the lower the conditioning; larger widths also allow for a later "
        "departure between renormalised and not.",
        "\n".join([text, *table(head, rows)]),
        f"lower: {verdict(lower)}; later departure: {verdict(later)}",
    )


def _falling(lines: Sequence[Values]) -> list[bool]:
    """At each layer, whether every line is below the one before."""
    there = zip(*(line.tolist() for line in lines), strict=True)
    return [all(b < a for a, b in itertools.pairwise(values)) for values in there]


def _departure(plain: Values, renormalised: Values) -> float:
    """The layer, from 1, from which on the first line stays above the second; else infinity."""
    fall = float(renormalised[0] - np.nanmin(renormalised))
    above = plain - renormalised > 0.1 * fall
    if not above[-1]:
        return float("inf")
    below = np.flatnonzero(~above)
    return float(below[-1] + 2 if len(below) else 1)


def smallest(found: Sequence[Record]) -> Section | None:
    """Rescaled smallest singular values, and Lemma 24."""
    infinite = of_kind(found, "infinite-width", activation="relu")
    if not _runs(found, renormalised=True) or not infinite:
        return None
    n, rows, grows, stable = middle_size(found), [], [], []
    lines = []
    for w in _widths(found, renormalised=True):
        line = np.sqrt(_mean(found, n, "smallest", width=w, renormalised=True))
        lines.append(line)
        end = _settled(-line)
        grows.append(end < len(line) / 2)
        stable += (np.abs(line[end:] - line[-1]) <= 0.1 * (line.max() - line[0])).tolist()
        rows.append((f"width {w}", *map(number, (line[0], line.max(), line[-1])), str(end + 1)))
    later = slice(len(lines[0]) // 2, None)
    higher = _falling([-line[later] for line in lines])
    layers = infinite[0]["results"]["layers"][str(n)]
    for name, label in (
        ("smallest", "infinite width"),
        ("lemma_24", "Lemma 24"),
        ("combined", "combined bound"),
    ):
        line = np.sqrt(np.array(layers[name][1:], dtype=float))
        risen = str(_settled(-line) + 1)
        rows.append((label, *map(number, (line[0], line.max(), line[-1])), risen))
    one = [float(np.sqrt(layers["smallest"][-1])) > 0.9] + [bool(line[-1] < 0.9) for line in lines]
    head = ("Network", "Layer 1", "Most", "Last layer", "Nine tenths risen by layer")
    text = (
        f"Smallest singular value of the features over √width, renormalised ReLU, {n} examples. "
        "Counted: nine tenths of the rise are done in the first half of the layers; at every layer "
        "after that it is within a tenth of the rise of its last value; at every layer of the "
        "second half it grows with width; at infinite width alone the last value is above 0.9.\n"
    )
    return Section(
        ("6.3",),
        "The rescaled smallest eigenvalues increase a lot in the first layers and stabilise, "
        "higher for wider networks, at values around one, which only infinite width reaches.",
        "\n".join([text, *table(head, rows)]),
        f"rise: {verdict(grows)}; stabilise: {verdict(stable)}; higher: {verdict(higher)}; "
        f"one: {verdict(one)}",
    )


def largest(found: Sequence[Record]) -> Section | None:
    """Rescaled largest singular values."""
    if not _runs(found, renormalised=True):
        return None
    n, rows, falls, stable = middle_size(found), [], [], []
    for w in _widths(found, renormalised=True):
        line = np.sqrt(_mean(found, n, "largest", width=w, renormalised=True))
        end = _settled(line)
        falls += (np.diff(line[: end + 1]) < 0).tolist()
        stable += (np.abs(line[end:] - line[-1]) <= 0.1 * (line[0] - line.min())).tolist()
        rows.append((f"width {w}", *map(number, (line[0], line.min(), line[-1])), str(end + 1)))
    head = ("Network", "Layer 1", "Least", "Last layer", "Nine tenths fallen by layer")
    text = (
        f"Largest singular value over √width, renormalised ReLU, {n} examples. Counted: it falls "
        "from each layer to the next until nine tenths of its fall are done, and is within a tenth "
        "of the fall of its last value at every layer after that.\n"
    )
    return Section(
        ("6.4",),
        "The highest eigenvalue decreases in the first layers and later stabilises.",
        "\n".join([text, *table(head, rows)]),
        f"falls: {verdict(falls)}; stabilises: {verdict(stable)}",
    )


def row_sums(found: Sequence[Record]) -> Section | None:
    """Whether row sums turn where the conditioning does."""
    both = [set(_widths(found, renormalised=flag)) for flag in (False, True)]
    if not both[0] & both[1]:
        return None
    n, rows, aligned = middle_size(found), [], []
    turns: list[bool] = []
    for w in sorted(both[0] & both[1]):
        sums, condition = (
            [_mean(found, n, name, width=w, renormalised=flag) for flag in (False, True)]
            for name in ("max_row_sum", "log_condition")
        )
        at = _departure(*(np.log(line) for line in sums)), _departure(*condition)
        aligned.append(abs(at[0] - at[1]) <= 3)
        for line, flag in zip(sums, ("no", "yes"), strict=True):
            least = int(np.argmin(line))
            above = line[least:] > 1.1 * line[least]
            turns += [bool(above[-1])] if flag == "no" else (~above).tolist()
            values = map(number, (line[0], line[least], line[-1]))
            where = (
                ["none" if d == np.inf else f"{d:.0f}" for d in at] if flag == "no" else ["", ""]
            )
            rows.append((str(w), flag, *values, str(least + 1), *where))
    head = (
        "Width",
        "Renormalised",
        "Row sum, layer 1",
        "Least",
        "Last layer",
        "Layer of the least",
        "Departure of the sums, layer",
        "of κ",
    )
    text = (
        f"ReLU, {n} examples, Gram matrices over width. Counted: after their least value the sums "
        "stay within a tenth above it at every layer (renormalised), or end higher (not "
        "renormalised); the layer from which on the sums without renormalisation stay above those "
        "with it, in logarithms, by more than a tenth of the fall is within three of that of "
        "κ.\n"
    )
    return Section(
        ("6.9",),
        "Off-diagonal row sums decrease and stabilise for renormalised networks, and grow again "
        "without renormalisation; the divergence aligns with the rise in conditioning.",
        "\n".join([text, *table(head, rows)]),
        f"stabilise or grow: {verdict(turns)}; aligned: {verdict(aligned)}",
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
        "diagonal entry exceeds the largest other entry; in the last layer it does not. The wider "
        "the network, the later the inversion, as the departure of 6.2: where it has not come by "
        "the last layer, it counts against the claim.\n"
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
    rows: list[tuple[str, ...]] = []
    exponents, laws = [], []
    depth = runs[0]["depth"]
    shown = {1, 2, 5, 10, depth // 2, 2 * depth // 3, depth}
    for layer in range(1, depth + 1):
        points = [
            (scaling_law(n, r["width"]), float(np.exp(series(r, n, "log_condition")[layer])))
            for r in runs
            for n in r["examples"]
            if n < r["width"]
        ]
        x, y = (np.array(values) for values in zip(*points, strict=True))
        kept = np.isfinite(y)
        fit = power_law(x[kept], y[kept])
        exponents.append(abs(fit.exponent - 2) <= 0.3)
        laws.append(fit.r_squared >= 0.9)
        if layer in shown:
            fitted = f"{fit.exponent:.2f}", f"{fit.r_squared:.3f}"
            rows.append((str(layer), *fitted, str(kept.sum())))
    head = ("Layer", "Exponent", "R²", "Gram matrices")
    text = (
        "Tanh without renormalisation, fewer examples than units: κ(G) ∝ factor^exponent. The "
        "law that (6.8) quotes is of the singular values of the features F, and κ(G) = κ(F)², so "
        "that the exponent to expect of κ(G) is 2, not 1 as printed. Counted, at every layer: 2 ± "
        "0.3, and R² of at least 0.9. Some layers are shown.\n"
    )
    return Section(
        ("6.13",),
        "The conditioning is proportional to √(examples · width) / (√width − √examples), at every "
        "layer (for κ(G): to its square).",
        "\n".join([text, *table(head, rows)]),
        f"a power law: {verdict(laws)}; of exponent 2: {verdict(exponents)}",
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
