"""The tables of runs of several lengths: ranks, scores and ratios by horizon."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence

from benchmarks.suite import (
    headlines,
    horizons,
    profile_plots,
    profiles,
    significance,
    standings,
)
from benchmarks.suite.methods import method
from benchmarks.suite.profiles import Unit
from benchmarks.suite.standings import DEFAULT, REFERENCE, TUNED, Runs
from benchmarks.suite.tables import BESIDE, beside, cell, document, head, row
from benchmarks.suite.trials import Preset
from examples.shared.records import Record

__all__ = ["SHORT", "markdown"]

# The suite's short tasks, beside the horizons of others.
SHORT = "200 steps"
MUON = "muon-cosine-tuned"


def markdown(
    found: Sequence[Record], preset: Preset, name: str, short: Sequence[Record] = ()
) -> str:
    """All tables of a preset with several horizons.

    Args:
        found: Records, in any order; those of other presets are left out.
        preset: The preset.
        name: The preset's name, for the heading.
        short: Records of the suite's short tasks, which are the horizon of 200 steps.
    """
    there = horizons.found_horizons(found, preset)
    by_horizon = {horizons.title(h, preset): horizons.at(found, preset, h) for h in there}
    mine = [r for r in found if horizons.horizon(r, preset) is not None]
    sections = {
        "verdict": ("Verdict", headlines.long(by_horizon)),
        "readme": ("In short", _summary(by_horizon)),
        "horizons": ("Rank by horizon", _ranks(by_horizon, short)),
        "profiles": ("Time and steps to where tuned AdamW ends", _profiles(by_horizon)),
        "significance": ("How sure it is", _significance(by_horizon)),
        "ratios": ("Beside AdamW with a cosine and its best rate", _ratios(by_horizon, TUNED)),
        "muon": ("Beside Muon + AdamW with a cosine and its best rate", _ratios(by_horizon, MUON)),
        "tuned": ("Horizon by horizon", _details(by_horizon)),
        "failures": ("Runs that failed", _failures(by_horizon)),
        "scores": ("Task by task", _scores(by_horizon)),
    }
    return document(mine, name, sections)


# --- what the README shows ------------------------------------------------------------------------

_SHOWN = (
    "adler-muon",
    "adler-schedulefree",
    "muon-cosine-tuned",
    "schedulefree-adamw",
    "schedulefree-plus",
)


def _summary(by_horizon: Mapping[str, Sequence[Record]]) -> list[str]:
    """At the horizon that most is known of, `headlines.fullest`, and in short at the others."""
    title = headlines.fullest(by_horizon)
    if title is None:
        return ["It has not run."]
    everything = {t: standings.contests(found, "test_loss") for t, found in by_horizon.items()}
    by_loss = everything[title]
    told = standings.loss_ratios(by_loss, DEFAULT, TUNED)
    others = {
        t: runs
        for t, runs in everything.items()
        if t != title and standings.loss_ratios(runs, DEFAULT, TUNED).keys() == told.keys()
    }
    held_back = {r["task"] for r in by_horizon[title] if r["held_back"]}
    heads = [f"After {title}", f"At most, after {title}"]
    if split := bool(held_back) and not held_back >= told.keys():
        counts = len(told.keys() - held_back), len(told.keys() & held_back)
        chosen_on, held = f"{counts[0]} tasks to choose on", f"{counts[1]} held back"
        heads = [f"{heads[0]}: {chosen_on}", f"{held}, after {title}", *heads[1:]]
    before = [f"After {t}: {len(told)} tasks" for t in others]
    lines = head("Test loss over tuned AdamW's", "It is told", *before, *heads)
    for name in _SHOWN:
        ratios = standings.loss_ratios(by_loss, name, TUNED)
        if told.keys() != ratios.keys():
            continue
        parts = [standings.loss_ratios(runs, name, TUNED) for runs in others.values()]
        parts = [part if part.keys() == told.keys() else {} for part in parts]
        if split:
            for back in (False, True):
                parts.append({t: x for t, x in ratios.items() if (t in held_back) is back})
        else:
            parts.append(ratios)
        means = (
            f"{statistics.geometric_mean(part.values()):.3f}" if part else "–" for part in parts
        )
        chosen = method(name)
        knows = "nothing" if not chosen.needs_steps else "the horizon"
        knows = f"the horizon, best of {len(chosen.grid)} rates" if chosen.grid else knows
        lines.append(row(chosen.label, knows, *means, f"{max(ratios.values()):.2f}"))
    rates, seeds = method(TUNED).grid or (), {r["seed"] for r in by_horizon[title]}
    return [
        *lines,
        "",
        f"AdamW with warm-up, a cosine over the same horizon and the best of {len(rates)} rates by "
        f"the test set is 1; geometric mean over {len(told)} tasks, {len(seeds)} "
        f"seed{'s' * (len(seeds) > 1)}. After {title}: {_grid_ends(by_loss)}",
    ]


def _grid_ends(by_loss: Runs) -> str:
    """On how many tasks a rate beyond all that were tried may be better yet."""
    told = []
    for name in (TUNED, MUON):
        ends, runs = standings.at_grid_end(by_loss, name)
        if runs:
            told.append(f"{ends} of {runs} runs of {method(name).label.removesuffix(', grid')}")
    return f"the best rate is at an end of its grid in {' and '.join(told)}." if told else ""


# --- ranks ---------------------------------------------------------------------------------------


def _ranks(by_horizon: Mapping[str, Sequence[Record]], short: Sequence[Record]) -> list[str]:
    columns = {**({SHORT: short} if short else {}), **by_horizon}
    ranks: dict[str, dict[str, float]] = {}
    heads = []
    failed: Counter[str] = Counter()
    for title, found in columns.items():
        runs, here = standings.contests(found), profile_plots.untuned(found)
        ranks[title], count = standings.mean_ranks(runs, here)
        heads.append(f"{title}: of {len(here)}, {count} tasks")
        if title != SHORT:
            for name in here:
                given = standings.verdicts(runs, name, TUNED).values()
                failed[name] += sum(verdict in ("dead", "diverged") for verdict in given)
    lines = head("Untuned", *heads, "Dead or diverged")
    names = {name for by_name in ranks.values() for name in by_name}

    def place(name: str) -> tuple[int, float]:
        told = [by_name[name] for by_name in ranks.values() if name in by_name]
        return -len(told), sum(told)

    for name in sorted(names, key=place):
        entries = [f"{r[name]:.1f}" if name in r else "–" for r in ranks.values()]
        lines.append(row(method(name).label, *entries, failed.get(name, "–")))
    told = [
        "Mean rank, 1 the best, of the untuned methods that ran on every task that "
        f"{method(DEFAULT).label} did, of a task the mean over its seeds: among more methods, "
        "ranks are larger. Dead or diverged: tasks, of the long horizons, where AdamW with a "
        "cosine and its best rate is neither.",
    ]
    if SHORT in columns:
        told.append(
            f"{SHORT}: the suite's short tasks, which are others than those of the other columns."
        )
    return [*lines, "", " ".join(told)]


# --- time to target, and how sure it is ----------------------------------------------------------


def _profiles(by_horizon: Mapping[str, Sequence[Record]]) -> list[str]:
    lines: list[str] = []
    for title, found in by_horizon.items():
        goals = profiles.targets(found)
        untuned = profile_plots.untuned(found)
        grids = [n for n in standings.names(found) if n != REFERENCE and method(n).grid]
        for among in (untuned, [*untuned, *grids]):
            units: tuple[Unit, ...] = ("seconds", "steps")
            by_unit = {unit: profiles.times(found, among, goals, unit) for unit in units}
            if not by_unit["seconds"] or (among is not untuned and not grids):
                continue
            what = "untuned methods" if among is untuned else "and tuned ones"
            lines += [f"### {title}, {what}: {len(by_unit['seconds'])} tasks", ""]
            lines += [*_profile_rows(by_unit), ""]
    if not lines:
        return ["No task has a target that all the methods were asked for."]
    return [
        *lines,
        "The share of tasks on which a method is at most τ times slower than the fastest to reach "
        "the test loss where AdamW with a cosine and its best rate ends, and their integral from "
        "1 to 4, which is AlgoPerf's score. A method's time on a task: the median over seeds, at "
        "evaluations, each an epoch apart; of a grid the fastest rate. Time includes all training "
        "and no evaluation.",
    ]


def _profile_rows(by_unit: Mapping[Unit, Mapping[str, Mapping[str, float]]]) -> list[str]:
    taus = (1.0, 1.5, 2.0, 4.0)
    ratios = {unit: profiles.ratios(times) for unit, times in by_unit.items()}
    heads = ("Score, time", *(f"τ = {tau:g}" for tau in taus))
    lines = head("Method", *heads, "Score, steps", *heads[1:])
    scores = {n: profiles.benchmark_score(r) for n, r in ratios["seconds"].items()}
    for name in sorted(scores, key=lambda n: -scores[n]):
        entries = []
        for of_method in ratios.values():
            entries.append(f"{profiles.benchmark_score(of_method[name]):.2f}")
            entries += [f"{profiles.profile(of_method[name], tau):.2f}" for tau in taus]
        lines.append(row(_label(name), *entries))
    return lines


def _significance(by_horizon: Mapping[str, Sequence[Record]]) -> list[str]:
    lines: list[str] = []
    for title, found in by_horizon.items():
        by_loss = standings.contests(found, "test_loss")
        rows = []
        for name in standings.names(found):
            told = significance.compare(by_loss, name) if name != TUNED else None
            if told is not None:
                few, many = told.seeds
                interval = f"{told.ratio:.3f} ({told.low:.3f}–{told.high:.3f})"
                counts = told.tasks, f"{few}" if few == many else f"{few}–{many}"
                rows.append(
                    row(_label(name), *counts, interval, told.better, told.worse, f"{told.p:.2g}")
                )
        if rows:
            heads = ("Tasks", "Seeds", "Test loss, ratio (95 %)", "Better", "Worse", "p")
            lines += [f"### {title}", "", *head("Method", *heads), *rows, ""]
    if not lines:
        return ["It has not run."]
    return [
        *lines,
        "Test loss at the end over that of AdamW with a cosine and its best rate of the same task "
        "and seed: geometric mean, and its bootstrap interval over tasks and their seeds. Better "
        "and worse: tasks, by the mean over seeds. p: of so uneven a count, or more, were both "
        "equally good (sign test, two-sided; not corrected for the number of methods).",
    ]


# --- against tuned AdamW -------------------------------------------------------------------------


def _ratios(by_horizon: Mapping[str, Sequence[Record]], reference: str) -> list[str]:
    everything = [r for found in by_horizon.values() for r in found]
    by_loss = {t: standings.contests(f, "test_loss") for t, f in by_horizon.items()}
    by_loss = {t: r for t, r in by_loss.items() if any(reference in told for told in r.values())}
    heads = [entry for title in by_loss for entry in (title, "at most", "on")]
    lines = head("Method", *heads)
    for name in standings.names(everything):
        if name == reference or (reference == TUNED and "@" in name):
            continue  # options that were tried are in the other tables
        entries = []
        for runs in by_loss.values():
            ratios = standings.loss_ratios(runs, name, reference)
            mean = standings.loss_ratio(runs, name, reference)
            if mean is None:
                entries += ["–", "", ""]
            else:
                worst = max(ratios, key=lambda task: ratios[task])
                on = f"{worst}, of {len(ratios)}" if len(ratios) > 1 else worst
                entries += [f"{mean:.3f}", f"{ratios[worst]:.2f}", on]
        if any(entry not in ("–", "") for entry in entries):
            lines.append(row(_label(name), *entries))
    if len(lines) == 2:
        return ["It has not run."]
    rates = ", ".join(f"{rate:g}" for rate in method(reference).grid or ())
    return [
        *lines,
        "",
        f"Test loss at the end over that of {method(reference).label} (5 % of warm-up, a cosine to "
        f"zero over this very horizon, the best of the rates {rates} by the test set): geometric "
        "mean over tasks, the largest ratio, the task that has it, and of how many tasks. Of "
        "another grid too the best rate.",
    ]


def _details(by_horizon: Mapping[str, Sequence[Record]]) -> list[str]:
    lines: list[str] = []
    for title, found in by_horizon.items():
        runs = standings.contests(found)
        by_loss = standings.contests(found, "test_loss")
        by_lowest = standings.contests(found, "lowest")
        by_train = standings.contests(found, "train_loss")
        seconds = standings.seconds_of(found, TUNED)
        rows = []
        for name in standings.names(found):
            cells = None if name == TUNED else beside(runs, by_loss, name, TUNED)
            if cells is not None:
                lowest = standings.loss_ratio(by_lowest, name, TUNED, "lowest")
                trained = standings.loss_ratio(by_train, name, TUNED, "train_loss")
                cost = standings.cost_ratio(runs, name, seconds)
                told = ("–" if x is None else f"{x:.2f}" for x in (lowest, trained, cost))
                rows.append(row(_label(name), *cells, *told))
        if rows:
            ratios = ("Lowest test loss, ratio", "Training loss, ratio")
            heads = head("Method", *BESIDE, *ratios, "Time / one AdamW run")
            lines += [f"### {title}", "", *heads, *rows, ""]
    if not lines:
        return ["It has not run."]
    return [
        *lines,
        "Against AdamW with a cosine over the same horizon and its best rate. Wins, ties and "
        "losses, dead and diverged runs among them, by test accuracy where there are classes to "
        "name, by test loss elsewhere. Losses at the end; the lowest test loss is that after the "
        "best epoch of each run, the most that stopping early could give. Time of training, "
        "without evaluation.",
    ]


def _failures(by_horizon: Mapping[str, Sequence[Record]]) -> list[str]:
    lines = []
    for title, found in by_horizon.items():
        runs = standings.contests(found)
        for name in standings.names(found):
            for task, given in standings.verdicts(runs, name, TUNED).items():
                if given in ("dead", "diverged"):
                    lines.append(row(_label(name), title, task, given))
    return [*head("Method", "Horizon", "Task", "In some seed"), *lines] if lines else ["None."]


# --- task by task --------------------------------------------------------------------------------


def _scores(by_horizon: Mapping[str, Sequence[Record]]) -> list[str]:
    everything = [r for found in by_horizon.values() for r in found]
    runs: dict[str, Runs] = {t: standings.contests(f) for t, f in by_horizon.items()}
    score = {r["task"]: r["score"] for r in everything}
    held_back = {r["task"] for r in everything if r["held_back"]}
    lines: list[str] = []
    for task in sorted(score):
        lines += [f"### {task}{' *' if task in held_back else ''}, {score[task]}", ""]
        lines += head("Method", *by_horizon)
        for name in standings.names(everything):
            entries = [
                cell(at, task, name, {} if name == TUNED else _against(at, name))
                for at in runs.values()
            ]
            if any(entries):
                lines.append(row(_label(name), *entries))
        lines.append("")
    return [
        *lines,
        "Mean over seeds ± its standard error at the end of the horizon; of a grid the best rate "
        "of each seed. Against AdamW with a cosine: + better, = within the standard error of the "
        "difference, − worse, † dead, ‡ diverged. * Held back.",
    ]


def _against(runs: Runs, name: str) -> Mapping[str, str]:
    return standings.verdicts(runs, name, TUNED)


def _label(name: str) -> str:
    return f"`{name}`" if "@" in name else method(name).label
