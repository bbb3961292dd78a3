"""Claim against measurement in training."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from examples.pl_theory.drawing import Values, array
from examples.pl_theory.figures_training import (
    decrease_ratio,
    learned,
    loss_ratio,
    own_rate_ratio,
    step_curvature,
)
from examples.pl_theory.records import Record, of_kind
from examples.pl_theory.verdicts import Section, median, number, table, verdict

__all__ = ["SECTIONS"]

Make = Callable[[Sequence[Record]], Section | None]


def _counted(found: Sequence[Record], loss: str, activation: str, kind: str = "training") -> str:
    every = of_kind(found, kind, loss=loss, activation=activation)
    kept = learned(found, loss, activation, kind)
    tested = sum(r["results"]["measured"]["test_accuracy"][-1] > 0.12 for r in kept)
    return (
        f"{len(kept)} of {len(every)} runs end above 12 % training accuracy and are counted "
        f"({tested} above 12 % test accuracy; the thesis does not say which)."
    )


def _rates(runs: Sequence[Record]) -> list[float]:
    return sorted({float(r["rate"]) for r in runs})


def prediction(
    found: Sequence[Record], loss: str, activation: str, weak: bool, figure: str
) -> Section | None:
    """The loss ratio, early and late."""
    runs = learned(found, loss, activation)
    if not runs:
        return None
    rows, cases, own_cases = [], [], []
    for rate in _rates(runs):
        same = [r for r in runs if r["rate"] == rate]
        lines, own = [loss_ratio(r, weak) for r in same], [own_rate_ratio(r) for r in same]
        early, late = ([_part(line, first) for line in lines] for first in (True, False))
        cases += _conservative_then_exact(lines)
        own_cases += _conservative_then_exact(own)
        over = [r["rate"] * r["results"]["measured"]["smoothness"][-1] for r in same]
        numbers = (
            np.median(over),
            median(np.array(early)),
            median(np.array(late)),
            *(median(np.array([_part(line, first) for line in own])) for first in (True, False)),
            _bend(same),
        )
        rows.append((f"{rate:g}", str(len(same)), *map(number, numbers)))
    head = (
        "Rate",
        "Runs",
        "Rate · L, last",
        "log ratio, first epochs",
        "last epochs",
        "with the rate's own factor, first",
        "last",
        "Curvature along the step / L, last",
    )
    text = (
        "log of the loss over its prediction one epoch before, f₍ₖ₊₁₎ / [(1 − μ/L) fₖ]"
        + (
            ", with Lemma 22's factor 1 − G²/(8 L fₖ), G the gradient's norm, in place of 1 − μ/L"
            if weak
            else ""
        )
        + ": below 0 the prediction was conservative. Medians over runs of the means over the "
        "first and the last third of the measured epochs. Counted: early values below 0; late ones "
        f"within 0.05 of 0, or a quarter of the early ones. {_counted(found, loss, activation)} "
        "The lemma is of steps of 1/L: at other rates a step cannot keep what is predicted. The "
        "next two columns are the same ratio with the factor of the rate that was taken, "
        "1 − 2 μ η (1 − L η/2), which is what the descent inequality says of it: where they are "
        f"near 0 late and the others are not, the difference is the rate's. {_BEND}\n"
    )
    claim = (
        "The bound on the loss is too conservative in the initial epochs; for the final epochs the "
        "prediction is almost perfect."
    )
    word = f"{verdict(cases)}; with the factor of the rate taken: {verdict(own_cases)}"
    return Section((figure,), claim, "\n".join([text, *table(head, rows)]), word)


_BEND = (
    "Last column: the loss's mean curvature along the steps, from its decrease, over L. Above 1 it "
    "bends more than the GGN allows in any direction: the gradients of ReLU networks jump where a "
    "unit switches, which adds curvature that no second derivative at a point shows; those of tanh "
    "networks do not."
)


def _bend(runs: Sequence[Record]) -> float:
    """Median over runs, late in training."""
    return median(np.array([_part(step_curvature(r), False) for r in runs]))


def _conservative_then_exact(lines: Sequence[Values]) -> list[bool]:
    """For every run, whether it is below 0 early, and whether it is nearly 0 late."""
    cases = []
    for a, b in ((_part(line, True), _part(line, False)) for line in lines):
        cases += [a < 0] if np.isfinite(a) else []
        cases += [abs(b) <= max(0.05, abs(a) / 4)] if np.isfinite(a) and np.isfinite(b) else []
    return cases


def _part(line: Values, first: bool) -> float:
    third = max(1, len(line) // 3)
    values = line[:third] if first else line[-third:]
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else float("nan")


def decrease(found: Sequence[Record]) -> Section | None:
    """The poster's ratio of decreases."""
    runs = learned(found, "cross-entropy", "relu")
    if not runs:
        return None
    rows = []
    cases: dict[bool, list[bool]] = {False: [], True: []}
    for rate in _rates(runs):
        same, entries = [r for r in runs if r["rate"] == rate], []
        for own, nearer in cases.items():
            lines = [decrease_ratio(r, own) for r in same]
            early, late = ([_part(line, first) for line in lines] for first in (True, False))
            nearer += [abs(b) < abs(a) or abs(b) <= 0.05 for a, b in zip(early, late, strict=True)]
            entries += [median(np.array(values)) for values in (early, late)]
        entries.append(_bend(same))
        rows.append((f"{rate:g}", str(len(same)), *map(number, entries)))
    head = (
        "Rate",
        "Runs",
        "log ratio, first epochs",
        "last epochs",
        "with the rate's own decrease, first",
        "last",
        "Curvature along the step / L, last",
    )
    text = (
        "log of the predicted decrease fₖ μ/L over the measured one, in the first and the last "
        "third of the measured epochs. Counted: nearer to 0 late than early, or within 0.05 of it. "
        "A step of rate η shows about 2 η L (1 − η L/2) of what is predicted for 1/L, whatever the "
        "epoch: the next two columns are of the decrease 2 fₖ μ η (1 − L η/2), which the descent "
        f"inequality promises of the rate that was taken. {_BEND}\n"
    )
    return Section(
        ("poster-1",),
        "The theory is very predictive at later epochs; much less at the start.",
        "\n".join([text, *table(head, rows)]),
        f"{verdict(cases[False])}; with the decrease of the rate taken: {verdict(cases[True])}",
    )


class _Course(NamedTuple):
    """Log condition numbers over the epochs, of every layer of some runs: three values of each."""

    first: Values
    most: Values
    last: Values
    peak: float  # the median of the epochs at which they are largest

    @classmethod
    def of(cls, runs: Sequence[Record]) -> _Course:
        pairs = [
            (r["results"]["measured"]["epoch"], array(layer["log_condition"]))
            for r in runs
            for layer in r["results"]["layers"].values()
        ]
        lines = [line for _, line in pairs]
        peak = np.median([epochs[int(np.nanargmax(line))] for epochs, line in pairs])
        first, most, last = (
            np.array([f(line) for line in lines])
            for f in (lambda x: x[0], np.nanmax, lambda x: x[-1])
        )
        return cls(first, most, last, float(peak))

    def cells(self) -> tuple[str, ...]:
        """Of a table's row, under `_COURSE`."""
        first, most, last = self.first, self.most, self.last
        numbers = (first.mean(), (most - first).mean(), (last - first).mean(), self.peak)
        return (str(len(first)), *map(number, numbers), f"{np.mean(last < first):.0%}")


_COURSE = (
    "Runs × layers",
    "log κ at the start",
    "Largest − start",
    "End − start",
    "Largest at epoch, median",
    "End below the start",
)


def conditioning(
    found: Sequence[Record], activation: str, figures: tuple[str, ...]
) -> Section | None:
    """What training with cross-entropy does to κ, of every layer."""
    runs = learned(found, "cross-entropy", activation)
    if not runs:
        return None
    rows, slowly, rise, below = [], [], [], []
    for rate in _rates(runs):
        course = _Course.of([r for r in runs if r["rate"] == rate])
        if rate >= 0.005:
            rise += (course.most > course.first).tolist()
            below += (course.last < course.first).tolist()
        else:
            # Slowly: by less than a tenth of a unit of log κ over all epochs.
            slowly += (course.most <= course.first + 0.1).tolist()
        rows.append((f"{rate:g}", *course.cells()))
    text = (
        "Means over layers, runs and seeds. Counted, for every layer of every run: at 0.0005 and "
        "0.001 log κ exceeds its start by no more than 0.1 at any epoch; at 0.005 and 0.01 it "
        "exceeds it at some epoch; and there it ends below. "
        f"{_counted(found, 'cross-entropy', activation)}\n"
    )
    return Section(
        figures,
        "With cross-entropy, conditioning worsens very slowly at small rates, while for higher "
        "ones it initially increases rapidly, then decreases steadily, ending lower than the "
        "start.",
        "\n".join([text, *table(("Rate", *_COURSE), rows)]),
        f"slowly: {verdict(slowly)}; increases: {verdict(rise)}; ends lower: {verdict(below)}",
    )


def edge(found: Sequence[Record]) -> Section | None:
    """The same at rates near the largest that descent bears, which the thesis did not take."""
    runs = learned(found, "cross-entropy", "relu", "edge")
    if not runs:
        return None
    rows, rise, falls, below = [], [], [], []
    for rate in _rates(runs):
        same = [r for r in runs if r["rate"] == rate]
        course = _Course.of(same)
        rise += (course.most > course.first + 0.1).tolist()
        # By more than a tenth of what it had risen.
        falls += (course.most - course.last > 0.1 * (course.most - course.first)).tolist()
        below += (course.last < course.first).tolist()
        steep = [rate * r["results"]["measured"]["smoothness"][0] for r in same]
        rows.append((f"{rate:g}", number(float(np.mean(steep))), *course.cells()))
    depths = " and ".join(map(str, sorted({r["depth"] for r in runs})))
    text = (
        f"ReLU networks of {depths} layers, as 6.7's, at larger rates than the thesis's. The first "
        "number: the rate times the loss's largest curvature at the start; descent on a quadratic "
        "diverges above 2. Counted, for every layer of every run: log κ exceeds its start by more "
        "than 0.1; it falls again by more than a tenth of what it had risen; it ends below its "
        f"start. {_counted(found, 'cross-entropy', 'relu', 'edge')}\n"
    )
    return Section(
        ("edge",),
        "Of ReLU networks under cross-entropy the rise and fall of 6.7 belongs to the largest "
        "rates that descent bears.",
        "\n".join([text, *table(("Rate", "Rate · L", *_COURSE), rows)]),
        f"increases: {verdict(rise)}; falls again: {verdict(falls)}; ends lower: {verdict(below)}",
    )


def bounds(
    found: Sequence[Record], loss: str, activation: str, figures: tuple[str, ...]
) -> Section | None:
    """The smallest eigenvalue in training, of every layer, against (4.11)."""
    runs = learned(found, loss, activation)
    if not runs:
        return None
    improves = loss == "cross-entropy"
    rows, constant, improved, vacuous = [], [], [], []
    for rate in _rates(runs):
        tables = [
            (r["results"]["measured"]["epoch"], t)
            for r in runs
            if r["rate"] == rate
            for t in r["results"]["layers"].values()
        ]
        relative = [array(t["smallest"]) / t["smallest"][0] for _, t in tables]
        ends, lows, highs = (
            np.array([f(line) for line in relative]) for f in (lambda x: x[-1], np.min, np.max)
        )
        constant += ((lows > 0.8) & (improves | (highs < 1.25))).tolist()
        improved += (ends > 1).tolist()
        shares = []
        for name in ("bound_operator", "bound_frobenius", "bound_composed"):
            gone = [array(t[name])[np.array(epochs) <= 40][-1] <= 0 for epochs, t in tables]
            shares.append(f"{np.mean(gone):.0%}")
            vacuous += gone if name == "bound_operator" else []
        numbers = map(number, (ends.mean(), lows.min(), highs.max()))
        rows.append((f"{rate:g}", str(len(tables)), *numbers, *shares))
    head = (
        "Rate",
        "Runs × layers",
        "λ_min, end / start",
        "Least of all / start",
        "Largest of all / start",
        "Vacuous by epoch 40: operator norm",
        "Frobenius",
        "composed",
    )
    what = (
        "is above 0.8 of its start at every epoch; it ends above its start"
        if improves
        else "is between 0.8 and 1.25 of its start at every epoch"
    )
    text = (
        "(4.11) from initialisation: λ_min(G₀) less the norm of the change, in operator and "
        "Frobenius norm, and with the change bounded from the distance of the weights, layer by "
        f"layer. Counted, for every layer of every run: λ_min {what}; the bound in operator norm "
        f"is vacuous by epoch 40. {_counted(found, loss, activation)}\n"
    )
    word = "slowly improving" if improves else "effectively constant"
    kept = (
        f"does not decrease: {verdict(constant)}; improves: {verdict(improved)}"
        if improves
        else f"constant: {verdict(constant)}"
    )
    return Section(
        figures,
        f"The smallest eigenvalues don't decrease as much as predicted, but are {word}, while the "
        "bounds of (4.11) become vacuous.",
        "\n".join([text, *table(head, rows)]),
        f"{kept}; bounds vacuous: {verdict(vacuous)}",
    )


def stability(found: Sequence[Record], loss: str, figures: tuple[str, ...]) -> Section | None:
    """How much the smallest eigenvalues move in training: tanh against ReLU, layer by layer."""
    moves: dict[str, dict[tuple[object, ...], float]] = {}
    for activation in ("relu", "tanh"):
        of_it = moves.setdefault(activation, {})
        for r in learned(found, loss, activation):
            for layer, t in r["results"]["layers"].items():
                key = r["depth"], r["examples"][0], r["rate"], r["seed"], layer
                of_it[key] = float(np.log(array(t["smallest"]) / t["smallest"][0]).std())
    pairs = sorted(moves["relu"].keys() & moves["tanh"].keys(), key=str)
    if not pairs:
        return None
    rows, cases = [], []
    for rate in sorted({float(str(key[2])) for key in pairs}):
        same = [key for key in pairs if key[2] == rate]
        relu, tanh = (np.array([moves[a][key] for key in same]) for a in ("relu", "tanh"))
        cases += (tanh > relu).tolist()
        share = f"{np.mean(tanh > relu):.0%}"
        numbers = map(number, (np.median(relu), np.median(tanh)))
        rows.append((f"{rate:g}", str(len(same)), *numbers, share))
    head = ("Rate", "Pairs of layers", "ReLU, median", "Tanh, median", "Tanh moves more")
    text = (
        "Standard deviation over the measured epochs of log λ_min, relative to the start, of the "
        "same layer of two runs that differ in their activation alone. Counted: larger with "
        "tanh.\n"
    )
    return Section(
        figures,
        "The smallest eigenvalues of ReLU networks are more stable; those of tanh networks show "
        "greater variability.",
        "\n".join([text, *table(head, rows)]),
        verdict(cases),
    )


def generalisation(
    found: Sequence[Record], loss: str, activation: str, figure: str
) -> Section | None:
    """The bound of (4.13)."""
    runs = learned(found, loss, activation)
    if not runs:
        return None
    rows, falls, vacuous = [], [], []
    sizes: list[tuple[int, float]] = []
    for n in sorted({r["examples"][0] for r in runs}):
        same = [r["results"]["measured"] for r in runs if r["examples"][0] == n]
        relative = [array(m["gap_bound"]) / array(m["largest_loss"]) for m in same]
        falls += [bool(line[-1] < line[0]) for line in relative]
        vacuous += [bool((line >= 1).all()) for line in relative]
        gaps = [m["test_loss"][-1] - m["loss"][-1] for m in same]
        ends = [float(np.mean([line[i] for line in relative])) for i in (0, -1)]
        sizes.append((n, ends[1]))
        rows.append((str(n), str(len(same)), *map(number, (*ends, float(np.mean(gaps))))))
    head = ("Examples", "Runs", "Bound / M, start", "Bound / M, end", "Test − training loss, end")
    text = (
        "(4.13) with δ = 0.05 (the thesis names none), the β of (4.12) with ε_A the training "
        "loss, μ the least of (6.2) and G the largest gradient of an example's loss so far; M "
        "the largest loss seen"
        + (", here 2/10, the largest possible" if loss == "mse-softmax" else "")
        + f". {_counted(found, loss, activation)} Counted besides, from each number of examples to "
        "the next: the last bound falls by less than their square roots' ratio, which a bound of "
        "order 1/√n with equal constants would fall by.\n"
    )
    slower = [
        later / earlier > (n / m) ** 0.5 for (n, earlier), (m, later) in itertools.pairwise(sizes)
    ]
    return Section(
        (figure,),
        "The generalisation bounds decrease with the number of epochs, but not as much as it would "
        "be expected with the number of examples, and all are vacuous.",
        "\n".join([text, *table(head, rows)]),
        f"decrease: {verdict(falls)}; less than expected of the examples: {verdict(slower)}; "
        f"vacuous throughout: {verdict(vacuous)}",
    )


SECTIONS: tuple[Make, ...] = (
    partial(prediction, loss="mse", activation="relu", weak=False, figure="6.5"),
    partial(prediction, loss="mse", activation="tanh", weak=False, figure="paper-6d"),
    partial(prediction, loss="cross-entropy", activation="relu", weak=True, figure="6.14"),
    partial(prediction, loss="cross-entropy", activation="tanh", weak=True, figure="6.15"),
    decrease,
    partial(conditioning, activation="relu", figures=("6.7", "6.18")),
    partial(conditioning, activation="tanh", figures=("6.8", "6.19")),
    edge,
    partial(bounds, loss="mse", activation="relu", figures=("6.6", "6.16", "6.22")),
    partial(bounds, loss="mse", activation="tanh", figures=("6.17", "6.23")),
    partial(bounds, loss="cross-entropy", activation="relu", figures=("6.20",)),
    partial(bounds, loss="cross-entropy", activation="tanh", figures=("6.21",)),
    partial(stability, loss="mse", figures=("6.22", "6.23")),
    partial(stability, loss="cross-entropy", figures=("6.20", "6.21")),
    partial(generalisation, loss="mse", activation="relu", figure="6.11"),
    partial(generalisation, loss="mse", activation="tanh", figure="paper-7b"),
    partial(generalisation, loss="mse-softmax", activation="relu", figure="6.12"),
    partial(generalisation, loss="mse-softmax", activation="tanh", figure="paper-7d"),
)
