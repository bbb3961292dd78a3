"""Claim against measurement in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from examples.pl_theory.drawing import Values, array
from examples.pl_theory.figures_training import (
    decrease_ratio,
    learned,
    loss_ratio,
    mean_log_condition,
    own_rate_ratio,
)
from examples.pl_theory.records import Record, of_kind
from examples.pl_theory.verdicts import Section, median, number, table, verdict

__all__ = ["SECTIONS"]

Make = Callable[[Sequence[Record]], Section | None]


def _counted(found: Sequence[Record], loss: str, activation: str) -> str:
    every = of_kind(found, "training", loss=loss, activation=activation)
    kept = learned(found, loss, activation)
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
        "last two columns are the same ratio with the factor of the rate that was taken, "
        "1 − 2 μ η (1 − L η/2), which is what the descent inequality says of it: where they are "
        "near 0 late and the others are not, the difference is the rate's.\n"
    )
    claim = (
        "The bound on the loss is too conservative in the initial epochs; for the final epochs the "
        "prediction is almost perfect."
    )
    word = f"{verdict(cases)}; with the factor of the rate taken: {verdict(own_cases)}"
    return Section((figure,), claim, "\n".join([text, *table(head, rows)]), word)


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
    rows, cases = [], []
    for rate in _rates(runs):
        lines = [decrease_ratio(r) for r in runs if r["rate"] == rate]
        early = [_part(line, True) for line in lines]
        late = [_part(line, False) for line in lines]
        cases += [abs(b) < abs(a) for a, b in zip(early, late, strict=True)]
        rows.append(
            (f"{rate:g}", str(len(lines)), *(number(median(np.array(v))) for v in (early, late)))
        )
    head = ("Rate", "Runs", "log ratio, first epochs", "last epochs")
    text = (
        "log of the predicted decrease fₖ μ/L over the measured one, in the first and the last "
        "third of the measured epochs. Counted: nearer to 0 late than early. A step of rate η "
        "shows about 2 η L (1 − η L/2) of what is predicted for 1/L, whatever the epoch.\n"
    )
    return Section(
        ("poster-1",),
        "The theory is very predictive at later epochs; much less at the start.",
        "\n".join([text, *table(head, rows)]),
        verdict(cases),
    )


def conditioning(
    found: Sequence[Record], activation: str, figures: tuple[str, ...]
) -> Section | None:
    """What training with cross-entropy does to κ."""
    runs = learned(found, "cross-entropy", activation)
    if not runs:
        return None
    rows, cases = [], []
    rates = _rates(runs)
    for rate in rates:
        lines = [mean_log_condition(r) for r in runs if r["rate"] == rate]
        first, most, last = (
            np.array([f(line) for line in lines])
            for f in (lambda x: x[0], np.nanmax, lambda x: x[-1])
        )
        large = rate >= 0.005
        for a, b, c in zip(first, most, last, strict=True):
            # Slowly: by less than a tenth of a unit of log κ over all epochs.
            cases.append(c < a < b if large else a <= b <= a + 0.1)
        numbers = (first.mean(), (most - first).mean(), (last - first).mean())
        rows.append((f"{rate:g}", str(len(lines)), *map(number, numbers)))
    head = ("Rate", "Runs", "log κ at the start", "Largest − start", "End − start")
    text = (
        "Means over layers, runs and seeds. Counted: at 0.0005 and 0.001 log κ never exceeds its "
        "start by more than 0.1; at 0.005 and 0.01 it rises and ends below its start. "
        f"{_counted(found, 'cross-entropy', activation)}\n"
    )
    return Section(
        figures,
        "With cross-entropy, conditioning worsens very slowly at small rates, while for higher "
        "ones it initially increases rapidly, then decreases steadily, ending lower than the "
        "start.",
        "\n".join([text, *table(head, rows)]),
        verdict(cases),
    )


def bounds(
    found: Sequence[Record], loss: str, activation: str, figures: tuple[str, ...]
) -> Section | None:
    """The smallest eigenvalue in training against (4.11)."""
    runs = learned(found, loss, activation)
    if not runs:
        return None
    rows, constant, vacuous = [], [], []
    for rate in _rates(runs):
        tables = [
            (r["results"]["measured"]["epoch"], t)
            for r in runs
            if r["rate"] == rate
            for t in r["results"]["layers"].values()
        ]
        ends = np.array([t["smallest"][-1] / t["smallest"][0] for _, t in tables])
        lows = np.array([min(t["smallest"]) / t["smallest"][0] for _, t in tables])
        constant += ((ends > 0.8) & (ends < 1.25 if loss != "cross-entropy" else True)).tolist()
        shares = []
        for name in ("bound_operator", "bound_frobenius", "bound_composed"):
            gone = [array(t[name])[np.array(epochs) <= 40][-1] <= 0 for epochs, t in tables]
            shares.append(f"{np.mean(gone):.0%}")
            vacuous += gone if name == "bound_operator" else []
        rows.append(
            (f"{rate:g}", str(len(tables)), *map(number, (ends.mean(), lows.min())), *shares)
        )
    head = (
        "Rate",
        "Runs × layers",
        "λ_min, end / start",
        "Least of all / start",
        "Vacuous by epoch 40: operator norm",
        "Frobenius",
        "composed",
    )
    text = (
        "(4.11) from initialisation: λ_min(G₀) less the norm of the change, in operator and "
        "Frobenius norm, and with the change bounded from the distance of the weights, layer by "
        "layer. Counted: λ_min ends between 0.8 and 1.25 of its start (cross-entropy: above "
        f"0.8); the bound in operator norm is vacuous by epoch 40. "
        f"{_counted(found, loss, activation)}\n"
    )
    word = "slowly improving" if loss == "cross-entropy" else "effectively constant"
    return Section(
        figures,
        f"The smallest eigenvalues don't decrease as much as predicted, but are {word}, while the "
        "bounds of (4.11) become vacuous.",
        "\n".join([text, *table(head, rows)]),
        f"eigenvalues: {verdict(constant)}; bounds vacuous: {verdict(vacuous)}",
    )


def generalisation(
    found: Sequence[Record], loss: str, activation: str, figure: str
) -> Section | None:
    """The bound of (4.13)."""
    runs = learned(found, loss, activation)
    if not runs:
        return None
    rows, falls, vacuous = [], [], []
    for n in sorted({r["examples"][0] for r in runs}):
        same = [r["results"]["measured"] for r in runs if r["examples"][0] == n]
        relative = [array(m["gap_bound"]) / array(m["largest_loss"]) for m in same]
        falls += [bool(line[-1] < line[0]) for line in relative]
        vacuous += [bool((line >= 1).all()) for line in relative]
        gaps = [m["test_loss"][-1] - m["loss"][-1] for m in same]
        ends = [float(np.mean([line[i] for line in relative])) for i in (0, -1)]
        rows.append((str(n), str(len(same)), *map(number, (*ends, float(np.mean(gaps))))))
    head = ("Examples", "Runs", "Bound / M, start", "Bound / M, end", "Test − training loss, end")
    text = (
        "(4.13) with δ = 0.05 (the thesis names none), the β of (4.12) with ε_A the training "
        "loss, μ the least of (6.2) and G the largest gradient of an example's loss so far; M "
        "the largest loss seen"
        + (", here 2/10, the largest possible" if loss == "mse-softmax" else "")
        + f". {_counted(found, loss, activation)}\n"
    )
    return Section(
        (figure,),
        "The generalisation bounds decrease with the number of epochs, and all are vacuous.",
        "\n".join([text, *table(head, rows)]),
        f"decrease: {verdict(falls)}; vacuous throughout: {verdict(vacuous)}",
    )


SECTIONS: tuple[Make, ...] = (
    partial(prediction, loss="mse", activation="relu", weak=False, figure="6.5"),
    partial(prediction, loss="mse", activation="tanh", weak=False, figure="paper-6d"),
    partial(prediction, loss="cross-entropy", activation="relu", weak=True, figure="6.14"),
    partial(prediction, loss="cross-entropy", activation="tanh", weak=True, figure="6.15"),
    decrease,
    partial(conditioning, activation="relu", figures=("6.7", "6.18")),
    partial(conditioning, activation="tanh", figures=("6.8", "6.19")),
    partial(bounds, loss="mse", activation="relu", figures=("6.6", "6.16", "6.22")),
    partial(bounds, loss="mse", activation="tanh", figures=("6.17", "6.23")),
    partial(bounds, loss="cross-entropy", activation="relu", figures=("6.20",)),
    partial(bounds, loss="cross-entropy", activation="tanh", figures=("6.21",)),
    partial(generalisation, loss="mse", activation="relu", figure="6.11"),
    partial(generalisation, loss="mse", activation="tanh", figure="paper-7b"),
    partial(generalisation, loss="mse-softmax", activation="relu", figure="6.12"),
    partial(generalisation, loss="mse-softmax", activation="tanh", figure="paper-7d"),
)
