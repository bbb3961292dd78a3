"""What a change of the rule has changed: records of before it beside those of today.

    python -m benchmarks.removed

Reads the records of `benchmarks/results/removed`, whose README says what was changed, and when, and
those of today. Each change is seen beside the next; the last is of rounding alone, and says how far
one seed's result can be trusted. Ratios of test losses are of equal tasks, lengths and seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.suite import horizons, trials
from benchmarks.suite.horizons import title
from benchmarks.suite.methods import method
from benchmarks.suite.trials import PRESETS, Trial
from examples.shared.records import Record, read

__all__ = ["long_tasks", "main", "nanogpt"]

_RESULTS = Path(__file__).parent / "results"
_OURS = ("adler-schedulefree", "adler-muon")


def long_tasks(before: Sequence[Record], now: Sequence[Record]) -> str:
    """Markdown: how much larger the later test losses are, by method and number of steps."""
    preset = PRESETS["long"]
    lines = [
        "| | steps | test loss, after the change over before it | tasks |",
        "|---|---|---|---|",
    ]
    for name in _OURS:
        for times in horizons.found_horizons(now, preset):
            old, new = (_losses(found, name, times) for found in (before, now))
            ratios = [new[key] / old[key] for key in sorted(old.keys() & new.keys())]
            if ratios:
                spread = f" ({min(ratios):.3f} to {max(ratios):.3f})" if len(ratios) > 1 else ""
                steps = title(times, preset).removesuffix(" steps")
                mean = f"{statistics.geometric_mean(ratios):.3f}{spread}"
                lines.append(f"| {method(name).label} | {steps} | {mean} | {len(ratios)} |")
    return "\n".join(lines)


def _losses(found: Sequence[Record], name: str, times: int) -> dict[tuple[str, int], float]:
    chosen = horizons.at([r for r in found if r["method"] == name], PRESETS["long"], times)
    return {(r["task"], r["seed"]): r["test_loss"] for r in chosen}


def nanogpt(before: Sequence[Record], now: Sequence[Record]) -> str:
    """Markdown: validation losses in nanoGPT's loop, before and after, of the seeds of both."""
    lines = ["| | steps | before | after | seeds |", "|---|---|---|---|---|"]
    for name in ("AdlerScheduleFree", "AdlerMuon"):
        for steps in ("250", "1000", "5000"):
            old, new = (
                {
                    r["seed"]: r["losses"][steps]
                    for r in found
                    if r["optimizer"] == name and steps in r["losses"]
                }
                for found in (before, now)
            )
            if seeds := sorted(old.keys() & new.keys()):
                means = (statistics.fmean(of[s] for s in seeds) for of in (old, new))
                cells = " | ".join(f"{mean:.3f}" for mean in means)
                lines.append(f"| {name} | {int(steps):,} | {cells} | {len(seeds)} |")
    return "\n".join(lines)


def main() -> None:
    """The command."""
    removed, suite = _RESULTS / "removed", _RESULTS / "suite"
    parts, eighth, rounded = (
        read([removed / f"long-{change}.jsonl"], lambda r: Trial.of(r).key())
        for change in ("mean-of-parts", "every-eighth", "rounding")
    )
    today = trials.read([suite / part for part in PRESETS["long"].parts])
    pair = (removed / "nanogpt-mean-of-parts.jsonl", _RESULTS / "nanogpt.jsonl")
    loops = nanogpt(*(read([file], lambda r: str(r["name"])) for file in pair))
    means = "Geometric means (smallest to largest) over the tasks, one seed."
    written = "Written by `python -m benchmarks.removed`.\n"
    (removed / "mean-of-parts.md").write_text(
        f"{long_tasks(parts, eighth)}\n\n{means}\n\n{loops}\n\n"
        f"Means of the validation loss in nats a character. {written}"
    )
    for change, before, after in (
        ("every-eighth", eighth, rounded),
        ("rounding", rounded, today),
    ):
        (removed / f"{change}.md").write_text(f"{long_tasks(before, after)}\n\n{means} {written}")


if __name__ == "__main__":
    main()
