"""Claim against measurement, figure by figure, in Markdown: a pure function of the records.

The claims are what theory and the thesis's figures lead one to expect, in our words. A verdict is
computed: it *holds*, *holds in part* (in at least half of the cases) or *does not hold*.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from examples.pl_theory import claims_initial as initial
from examples.pl_theory import claims_scaling as scaled
from examples.pl_theory import claims_training as trained
from examples.pl_theory.records import Record
from examples.pl_theory.verdicts import Section, table

__all__ = ["markdown"]


def markdown(found: Sequence[Record], preset: str) -> str:
    """The page of a preset's records.

    Args:
        found: Records, in any order.
        preset: The preset's name, for the heading.
    """
    sections = [section for make in _SECTIONS if (section := make(found)) is not None]
    rows = [(_title(s.figures), s.claim, f"**{s.verdict}**") for s in sections]
    lines = [
        f"# Conditioning of wide networks, preset {preset}",
        "",
        *_heading(found, preset),
        "",
        "The theory of wide networks says that a network with a well-conditioned tangent kernel "
        "satisfies a Polyak–Łojasiewicz inequality, and that gradient descent then converges at a "
        "rate known in advance; and that width and depth decide the conditioning. Chapter 6 of "
        "D. Balboni's thesis (SNS 2025) and D. Balboni, D. Bacciu, *An Empirical Verification of "
        "Wide Networks Theory*, hold it against experiments. These are ours on the same questions: "
        "figures stand in the role of the thesis's, claims are in our words, verdicts are computed "
        "from the records, with the threshold printed beside each.",
        "",
        *table(("Figures", "Claim", "Verdict"), rows),
    ]
    shown: set[str] = set()
    for section in sections:
        lines += ["", f"## {_title(section.figures)}", "", f"Claim: {section.claim}", ""]
        lines += [section.measured, "", f"Verdict: **{section.verdict}**.", ""]
        lines += [
            f"![Figure {name}](figure-{name.replace('.', '-')}.png)"
            for name in section.figures
            if name not in shown
        ]
        shown.update(section.figures)
    return "\n".join(lines) + "\n"


def _heading(found: Sequence[Record], preset: str) -> list[str]:
    versions = {name: sorted({r["versions"][name] for r in found}) for name in ("torch", "adler")}
    said = ", ".join(f"{name} {', '.join(values)}" for name, values in versions.items())
    devices = ", ".join(sorted({r["device"] for r in found}))
    seconds = sum(r["seconds"] for r in found)
    data = ", ".join(sorted({r["dataset"] for r in found}))
    return [
        f"{len(found)} experiments, {seconds / 60:.1f} minutes of one process; data: {data}; "
        f"{said}; {devices}.",
        "",
        f"    python -m examples.pl_theory --preset {preset}"
        + ("" if preset == "smoke" else " --data DIR"),
    ]


def _title(figures: Sequence[str]) -> str:
    if figures == ("nmm",):
        return "Nguyen, Mondelli, Montúfar"
    first, last = figures[0], figures[-1]
    consecutive = int(last[2:]) - int(first[2:]) == len(figures) - 1 > 0
    names = f"{first}–{last}" if consecutive else ", ".join(figures)
    return f"Figure{'s' if len(figures) > 1 else ''} {names}"


_SECTIONS: tuple[Callable[[Sequence[Record]], Section | None], ...] = (
    initial.convergence,
    initial.lower_bound,
    initial.depth,
    initial.examples,
    partial(trained.decrease, loss="mse", figures=("6.5",)),
    partial(trained.decrease, loss="cross-entropy", figures=("6.14",)),
    partial(trained.accumulated, loss="mse", figures=("6.5",)),
    partial(trained.accumulated, loss="cross-entropy", figures=("6.15",)),
    partial(trained.kernel, loss="mse", figures=("6.6", "6.7", "6.8")),
    partial(trained.kernel, loss="cross-entropy", figures=("6.20", "6.21", "6.22", "6.23")),
    partial(trained.grams, loss="mse", figures=("6.16", "6.17", "6.18", "6.19")),
    partial(trained.grams, loss="cross-entropy", figures=("6.20", "6.21", "6.22", "6.23")),
    scaled.proxies,
    partial(trained.generalisation, loss="mse", figures=("6.11",)),
    partial(trained.generalisation, loss="cross-entropy", figures=("6.12",)),
    scaled.scaling,
    scaled.three_layers,
)
