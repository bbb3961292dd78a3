"""The thesis's claims against our measurements, figure by figure, in Markdown.

A pure function of the records. The claims are in the thesis's words or close to them; each verdict
is computed: it *holds*, *holds in part* (in at least half of the cases) or *does not hold*. What is
counted is printed beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from examples.pl_theory import claims_initial as initial
from examples.pl_theory import claims_landscape as around
from examples.pl_theory import claims_training as trained
from examples.pl_theory.config import Experiment
from examples.pl_theory.presets import FIGURES, PRESETS
from examples.pl_theory.records import Record
from examples.pl_theory.verdicts import Section, table

__all__ = ["details", "markdown"]


def markdown(found: Sequence[Record], preset: str) -> str:
    """The page of a preset's records: every verdict in one table.

    Args:
        found: Records, in any order.
        preset: The preset's name: what was to be run.
    """
    sections = _made(found)
    lines = [
        "# Theory and measurement",
        "",
        _verdict(sections),
        "",
        "Each figure stands under its number in D. Balboni, *An Optimization Perspective on "
        "Deep Neural Networks* (PhD thesis, SNS 2025), chapter 6; those that D. Balboni, D. "
        "Bacciu, *An Empirical Verification of Wide Networks Theory*, or its poster add are "
        "named after them, `edge` is 6.7 at larger rates, `nmm`, `dropout` and `connectivity` are "
        "of what M. Mondelli's slides show, `ball` is of C. Liu's, L. Zhu's and M. Belkin's "
        "theorem, `7.5` of that section. Of the paper's others, 5 is 6.13 here, 6a and 6b are 6.14 "
        "and 6.15, 6c is 6.5, 7a and 7c are 6.11 and 6.12, 8 is 6.16 to 6.19 and 9 is 6.20 to "
        "6.23; of the poster's, 2 is 6.2 and 3 is 6.7. Verdicts are computed from the records. "
        "[Figure by figure](figures.md): the pictures, and what was counted.",
        "",
        *table(("Figure", "Claim", "Ours", "Verdict"), _overview(sections, found, preset)),
        "",
        "## What was run",
        "",
        *_runs(found, preset),
    ]
    return "\n".join(lines) + "\n"


def details(found: Sequence[Record]) -> str:
    """The appendix: each claim, what was counted, its picture.

    Args:
        found: Records, in any order.
    """
    lines = [
        "# Chapter 6 of the thesis, figure by figure",
        "",
        "All verdicts in one table: [theory and measurement](claims.md).",
    ]
    shown: set[str] = set()
    for number, section in enumerate(_made(found), start=1):
        lines += ["", f"## {number}. Figure{'s' * (len(section.figures) > 1)} {_names(section)}"]
        lines += ["", f"Claim: {section.claim}", "", section.measured, ""]
        lines += [f"Verdict: **{section.verdict}**.", ""]
        new = [name for name in section.figures if name not in shown]
        lines += [f"![Figure {name}]({_file(name)})" for name in new]
        shown.update(new)
    return "\n".join(lines) + "\n"


def _made(found: Sequence[Record]) -> list[Section]:
    return [section for make in _SECTIONS if (section := make(found)) is not None]


def _verdict(sections: Sequence[Section]) -> str:
    """How many statements hold; a claim that says two things has two, each with its own count."""
    said = [part.rsplit(": ", 1)[-1] for s in sections for part in s.verdict.split("; ")]
    words = [part.split(" (")[0] for part in said]
    counts = [words.count(word) for word in ("holds", "holds in part", "does not hold")]
    return (
        f"**Of {sum(counts)} statements that the chapter's figures make or that correct one, "
        f"{counts[0]} hold on our networks, {counts[1]} in at least half of the cases, "
        f"{counts[2]} do not.**"
    )


def _overview(
    sections: Sequence[Section], found: Sequence[Record], preset: str
) -> list[tuple[str, str, str, str]]:
    """A row for each figure and claim; a figure without records says so."""
    made = [Experiment.of(r) for r in found]
    planned = list(PRESETS[preset].experiments())
    rows = []
    for name in sorted(FIGURES, key=_place):
        of_it = [s for s in sections if name in s.figures]
        counts = (sum(map(FIGURES[name], part)) for part in (made, planned))
        ours = f"[figure]({_file(name)}), {' of '.join(map(str, counts))} experiments"
        rows += [(name, s.claim, ours, f"**{s.verdict}**") for s in of_it]
        if not of_it:
            rows.append((name, "–", "–", "no record yet"))
    return rows


def _place(name: str) -> tuple[int, int]:
    """The thesis's chapter 6 first, by number; then what else there is, as it is listed."""
    chapter, _, number = name.partition(".")
    return (0, int(number)) if chapter == "6" else (1, list(FIGURES).index(name))


def _file(name: str) -> str:
    return f"figure-{name.replace('.', '-')}.png"


def _names(section: Section) -> str:
    return ", ".join(section.figures)


def _runs(found: Sequence[Record], preset: str) -> list[str]:
    versions = {name: sorted({r["versions"][name] for r in found}) for name in ("torch", "adler")}
    said = ", ".join(f"{name} {', '.join(values)}" for name, values in versions.items())
    devices = ", ".join(sorted({r["device"] for r in found}))
    data = ", ".join(sorted({r["dataset"] for r in found}))
    planned = list(PRESETS[preset].experiments())
    rows = []
    for kind in dict.fromkeys(e.kind for e in planned):
        of_kind = [r for r in found if r["kind"] == kind]
        seeds = sorted({r["seed"] for r in of_kind})
        sizes = sorted({n for r in of_kind for n in r["examples"]})
        rows.append(
            (
                f"`{kind}`",
                str(len(of_kind)),
                str(sum(e.kind == kind for e in planned)),
                ", ".join(map(str, sizes)),
                ", ".join(map(str, sorted({r["width"] for r in of_kind}))),
                ", ".join(map(str, sorted({r["depth"] for r in of_kind}))),
                ", ".join(map(str, seeds)),
            )
        )
    head = ("Experiments", "Run", "Of", "Examples", "Widths", "Layers", "Seeds")
    command = f"python -m examples.pl_theory --preset {preset}"
    return [
        f"Data: {data}; {said}; {devices}. What was run, of the preset's whole plan:",
        "",
        *table(head, rows),
        "",
        "The rest is run by the same command, which takes up where it stopped:",
        "",
        f"    {command}" + ("" if preset == "smoke" else " --data DIR"),
    ]


_SECTIONS: tuple[Callable[[Sequence[Record]], Section | None], ...] = (
    initial.depth,
    initial.width,
    initial.smallest,
    initial.largest,
    initial.row_sums,
    initial.entries,
    initial.scaling,
    initial.three_layers,
    *trained.SECTIONS,
    around.dropout,
    around.connected,
    around.ball,
    around.dominance,
    around.cancellation,
)
