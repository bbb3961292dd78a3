"""Claim against measurement in training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from examples.pl_theory.drawing import Values, array, network
from examples.pl_theory.records import Record, of_kind
from examples.pl_theory.verdicts import Section, median, number, table, verdict

__all__ = ["accumulated", "decrease", "generalisation", "grams", "kernel"]

_TITLES = {"mse": "mean squared error", "cross-entropy": "cross-entropy"}
# Records hold six digits.
_DIGITS = 1e-5


def decrease(found: Sequence[Record], loss: str, figures: tuple[str, ...]) -> Section | None:
    """Predicted over measured decrease of each step."""
    rows, cases = [], []
    for r in of_kind(found, "training", loss=loss):
        steps, measured = r["results"]["steps"], r["results"]["measured"]
        local, kernel = (array(steps[f"{name}_ratio"]) for name in ("local", "kernel"))
        L, taken = array(steps["smoothness"]), array(steps["measured_smoothness"])
        if not len(local):
            continue
        at = [s for s in measured["step"] if s < len(L)]
        library = array(measured["ggn"])[: len(at)]
        krylov = L[np.array(at, dtype=int)]
        fine = np.isfinite(local) & (local <= 1 + _DIGITS)
        cases.append(bool(fine.all()))
        rows.append(
            (
                *_name(r),
                f"{fine.mean():.0%}",
                number(median(local)),
                number(median(kernel)),
                number(median(taken / L)),
                f"{np.abs(krylov / library - 1).max():.1%}",
            )
        )
    if not rows:
        return None
    head = (
        "Network",
        "Hidden layers",
        "Steps with ratio ≤ 1",
        "Median ratio, local μ",
        "Median ratio, μ from λ_min(K)",
        "Median L measured / L",
        "L: largest error",
    )
    text = (
        "Ratio: predicted over measured decrease in a step of rate 1/L. L: largest eigenvalue of "
        "the GGN, in a small Krylov space from the last step's eigenvector; the last column is its "
        "error against Lanczos to convergence at the measured steps; "
        "L measured: with which the descent inequality is an equality. Counted: a ratio of at most "
        "1 in every step.\n"
    )
    claim = (
        f"The GGN's largest eigenvalue serves as smoothness of the {_TITLES[loss]}: no step "
        "decreases the loss by less than the local PL coefficient predicts."
    )
    return Section(figures, claim, "\n".join([text, *table(head, rows)]), verdict(cases))


def accumulated(found: Sequence[Record], loss: str, figures: tuple[str, ...]) -> Section | None:
    """The loss below its accumulated bound."""
    rows, cases = [], []
    for r in of_kind(found, "training", loss=loss):
        steps = r["results"]["steps"]
        losses, local, kernel = (array(steps[n]) for n in ("loss", "local_bound", "kernel_bound"))
        below = [bool((losses <= bound * (1 + _DIGITS)).all()) for bound in (local, kernel)]
        cases.append(all(below))
        ends = (losses[0], losses[-1], local[-1], kernel[-1])
        rows.append((*_name(r), *map(number, ends)))
    if not rows:
        return None
    head = (
        "Network",
        "Hidden layers",
        "Loss, start",
        "Loss, end",
        "Bound, local μ",
        "Bound, λ_min(K)",
    )
    text = (
        "Bounds at the last step. λ_min(K) is the least of those measured"
        + (
            ""
            if loss == "mse"
            else ", and enters through the weak inequality at each step's losses"
        )
        + ". Counted: both bounds hold at every step.\n"
    )
    claim = (
        f"The {_TITLES[loss]} stays below the product of the predicted factors (in the role of "
        "Lemma 11)."
    )
    return Section(figures, claim, "\n".join([text, *table(head, rows)]), verdict(cases))


def kernel(found: Sequence[Record], loss: str, figures: tuple[str, ...]) -> Section | None:
    """The tangent kernel's smallest eigenvalue in training."""
    rows, cases = [], []
    for r in of_kind(found, "training", loss=loss):
        measured = r["results"]["measured"]
        smallest = array(measured["kernel_smallest"])
        lower = array(measured["kernel_lower"])[1:]
        condition = array(measured["kernel_log_condition"])
        kept = float(smallest.min() / smallest[0])
        cases.append(kept >= 0.5)
        rows.append(
            (
                *_name(r),
                number(float(smallest[0])),
                number(kept),
                number(float(condition[0])),
                number(float(condition[-1])),
                f"{(lower > 0).mean():.0%}",
            )
        )
    if not rows:
        return None
    head = (
        "Network",
        "Hidden layers",
        "λ_min, start",
        "Least / start",
        "Log condition, start",
        "Log condition, end",
        "Weyl's lower bound above 0",
    )
    text = (
        "Last column: share of the measured steps after the first. Counted: least / start ≥ 0.5.\n"
    )
    claim = (
        f"In training with {_TITLES[loss]} the tangent kernel's smallest eigenvalue keeps at least "
        "half of its first value."
    )
    return Section(figures, claim, "\n".join([text, *table(head, rows)]), verdict(cases))


def grams(found: Sequence[Record], loss: str, figures: tuple[str, ...]) -> Section | None:
    """The features' Gram matrices in training, and Weyl's bounds of them."""
    rows, cases, bracketed = [], [], []
    for r in of_kind(found, "training", loss=loss):
        tables = r["results"]["grams"].values()
        inside, informative, kept, change = [], [], [], []
        for t in tables:
            smallest, lower, upper = (array(t[n]) for n in ("smallest", "weyl_lower", "weyl_upper"))
            slack = _DIGITS * np.abs(upper)
            inside.append(((lower - slack <= smallest) & (smallest <= upper + slack)).all())
            informative.append(float((lower[1:] > 0).mean()) if len(lower) > 1 else 0.0)
            kept.append(smallest.min() / smallest[0])
            condition = array(t["log_condition"])
            change.append(condition[-1] - condition[0])
        bracketed.append(bool(np.all(inside)))
        cases.append(min(informative) == 1)
        low, high = float(np.min(change)), float(np.max(change))
        rows.append(
            (
                *_name(r),
                f"{np.mean(informative):.0%}",
                number(float(np.min(kept))),
                f"{low:+.2f} … {high:+.2f}",
            )
        )
    if not rows:
        return None
    head = (
        "Network",
        "Hidden layers",
        "Lower bound above 0",
        "Least λ_min / start, worst layer",
        "Change of log condition over layers",
    )
    text = (
        "Weyl's bounds from initialisation bracket λ_min, as they must, in "
        f"{sum(bracketed)} of {len(bracketed)} networks. Lower bound: share of the measured steps "
        "after the first, over layers. Counted: it is positive at every layer and step.\n"
    )
    claim = (
        f"In training with {_TITLES[loss]} Weyl's bound from initialisation keeps the smallest "
        "eigenvalue of every layer's Gram matrix away from 0."
    )
    return Section(figures, claim, "\n".join([text, *table(head, rows)]), verdict(cases))


def generalisation(found: Sequence[Record], loss: str, figures: tuple[str, ...]) -> Section | None:
    """The bound of the expected loss against what is measured."""
    rows, vacuous, above = [], [], []
    for r in of_kind(found, "training", loss=loss):
        measured, losses = r["results"]["measured"], array(r["results"]["steps"]["loss"])
        bound, most, test = (
            array(measured[n]) for n in ("generalisation_bound", "largest_loss", "test_loss")
        )
        train = losses[np.array(measured["step"], dtype=int)]
        vacuous += (bound >= most).tolist()
        above += (bound >= test).tolist()
        ends: list[Values] = [test - train, test, bound, bound / most]
        rows.append((*_name(r), *(number(float(values[-1])) for values in ends)))
    if not rows:
        return None
    head = ("Network", "Hidden layers", "Gap", "Test loss", "Bound", "Bound / largest loss")
    count = sum(vacuous)
    text = (
        "At the last step; gap: test less training loss. The bound takes the least local μ, the "
        "largest gradient of an example's loss on the path, and the largest loss seen, with "
        f"confidence 95 %. It is vacuous in {count} of {len(vacuous)} measured steps.\n"
    )
    claim = (
        f"The stability bound (in the role of Lemma 3) of the {_TITLES[loss]} lies above the test "
        "loss, and says something: it is below the largest loss."
    )
    word = "vacuous" if count == len(vacuous) else f"vacuous in {count} of {len(vacuous)} cases"
    word += "; above the test loss: " + verdict(above)
    return Section(figures, claim, "\n".join([text, *table(head, rows)]), word)


def _name(record: Record) -> tuple[str, str]:
    seed = f", seed {record['seed']}" if record["seed"] else ""
    return network(record) + seed, str(record["depth"])
