"""The whole comparison: ``python -m examples.cifar.table --data DIR --preset smoke|laptop|full``.

Runs what is not yet in the results, then writes the table, the costs and the figures.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from examples.cifar import data as cifar
from examples.cifar import records
from examples.cifar.config import Run
from examples.cifar.optimizers import OPTIMIZERS
from examples.cifar.plots import draw
from examples.cifar.presets import PRESETS
from examples.cifar.thesis import REPORTED, comparison
from examples.cifar.train import work
from examples.shared.jobs import record_all, shard
from examples.shared.records import Record, repair

__all__ = ["markdown"]

_TITLES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
# A network that has learned nothing; noise on a small test set stays below half more than chance.
_CHANCE = 1.5


def markdown(found: Sequence[Record], preset: str) -> str:
    """The tables of a preset's records: a pure function of them.

    Args:
        found: Records, in any order.
        preset: The preset's name, for the heading.
    """
    lines = [f"# CIFAR, preset {preset}", "", *_heading(found, preset)]
    by_size = records.by_batch_size(found)
    for size, same in by_size.items():
        for dataset, cells in records.by_cell(same).items():
            title = _TITLES[dataset] + f", minibatches of {size}" * (len(by_size) > 1)
            lines += ["", f"## {title}: final test accuracy", "", *_accuracies(dataset, cells)]
    lines += [
        "",
        f"Mean ± standard deviation over {_spread(found)}, and over the models of the row. "
        "SGD grid: the best of its learning rates for each network and seed. Diverged: the loss "
        "was no longer finite; for SGD, of all the grid's runs. At chance: of the runs averaged, "
        f"those that did not diverge and ended below {_CHANCE} times the accuracy of guessing.",
    ]
    return "\n".join([*lines, *_costs(found)]) + "\n"


def _accuracies(dataset: str, cells: Mapping[tuple[str, str], Sequence[Record]]) -> list[str]:
    """A row for each cell of the thesis's table, a column for each optimizer."""
    there = {r["optimizer"] for cell in cells.values() for r in cell}
    columns = [name for name in OPTIMIZERS if name in there]
    lines = _head("Models", "Activation", *(OPTIMIZERS[n].label for n in columns))
    for (models, activation), cell in cells.items():
        best = records.competitors(cell)
        entries = (
            _cell(best.get(n, []), [r for r in cell if r["optimizer"] == n], dataset)
            for n in columns
        )
        lines.append(_row(models, activation, *entries))
    return lines


def _spread(found: Sequence[Record]) -> str:
    """What the networks of a row differ in."""
    shapes: dict[str, dict[int, set[tuple[int, int]]]] = {}
    for r in found:
        of_seed = shapes.setdefault(r["model"], {}).setdefault(r["seed"], set())
        of_seed.add((r["width"], r["depth"]))
    if any(len(few) > 1 for seeds in shapes.values() for few in seeds.values()):
        return "widths, depths and seeds, each with each"
    if any(len(set.union(*seeds.values())) > 1 for seeds in shapes.values()):
        return "seeds, each with its own width and depth"
    return "seeds"


def _heading(found: Sequence[Record], preset: str) -> list[str]:
    def values(*path: str) -> str:
        entries: set[Any] = set()
        for record in found:
            entry: Any = record
            for name in path:
                entry = entry[name]
            entries.add(entry)
        return ", ".join(map(str, sorted(entries)))

    versions = ", ".join(f"{name} {values('versions', name)}" for name in found[0]["versions"])
    return [
        f"{records.variations(found)} networks on data, {len(found)} runs; "
        f"{values('train_examples')} training and {values('test_examples')} test examples, "
        f"{values('epochs')} epochs, minibatches of {values('batch_size')}; {versions}; "
        f"{values('device')}.",
        "",
        f"    python -m examples.cifar.table --data DIR --preset {preset}",
    ]


def _cell(best: Sequence[Record], runs: Sequence[Record], dataset: str) -> str:
    """Mean ± standard deviation, and what went wrong."""
    if not best:
        return "–"
    accuracies = [r["test_accuracy"] for r in best]
    entry = f"{statistics.fmean(accuracies):.3f}"
    if len(accuracies) > 1:
        entry += f" ± {statistics.stdev(accuracies):.3f}"
    chance = _CHANCE / cifar.ARCHIVES[dataset].classes
    notes = []
    if diverged := sum(r["diverged"] for r in runs):
        notes.append(f"{diverged} of {len(runs)} diverged")
    if dead := sum(not r["diverged"] and r["test_accuracy"] < chance for r in best):
        notes.append(f"{dead} of {len(best)} at chance")
    return entry + (f" ({'; '.join(notes)})" if notes else "")


def _costs(found: Sequence[Record]) -> list[str]:
    """What one run of an untuned optimizer costs, against one SGD run and the whole grid."""
    settings: dict[str, list[Record]] = {}
    for record in found:
        settings.setdefault(records.setting(record), []).append(record)
    grids = {s: [r for r in runs if r["optimizer"] == "sgd"] for s, runs in settings.items()}
    rates = max(map(len, grids.values()), default=0)
    lines: list[str] = []
    for models in dict.fromkeys(records.ROWS.values()):
        for name, entry in OPTIMIZERS.items():
            ratios = [
                (seconds(run) / statistics.median(map(seconds, tuned)), run["seconds"] / whole)
                for s, runs in settings.items()
                if len(grids[s]) == rates > 0
                and (tuned := [r for r in grids[s] if not r["diverged"]])
                for whole in [sum(r["seconds"] for r in grids[s])]
                for run in runs
                if run["optimizer"] == name
                and not run["diverged"]
                and records.ROWS[run["model"]] == models
            ]
            if entry.tuned or not ratios:
                continue
            passes = entry.passes / OPTIMIZERS["sgd"].passes
            one, all_ = (statistics.median(column) for column in zip(*ratios, strict=True))
            lines.append(
                _row(
                    models,
                    entry.label,
                    f"{one:.2f}",
                    f"{all_:.3f}",
                    f"{passes:.2f}",
                    f"{passes / rates:.3f}",
                )
            )
    if not lines:
        return []
    return [
        "",
        "## Cost",
        "",
        *_head(
            "Models",
            "Optimizer",
            "Seconds / one SGD run",
            "Seconds / whole grid",
            "Passes / one SGD run",
            "Passes / whole grid",
        ),
        *lines,
        "",
        f"Medians over networks and seeds, of training without evaluation; the grid is {rates} "
        "runs. A forward pass, a backward pass and a Jacobian-vector product count one pass each. "
        "Diverged runs, which stop early, enter only the whole grid's seconds.",
    ]


def seconds(record: Record) -> float:
    """A run's training time."""
    return float(record["seconds"])


def _row(*entries: str) -> str:
    return f"| {' | '.join(entries)} |"


def _head(*entries: str) -> list[str]:
    return [_row(*entries), _row(*("---" for _ in entries))]


# --- the command line ----------------------------------------------------------------------------


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.cifar.table",
        description="Compares ADLER with Gauss-Newton and ten SGD learning rates on CIFAR.",
    )
    option: Callable[..., Any] = parser.add_argument
    option("--data", type=Path, required=True, help="directory of the archives")
    option("--preset", choices=tuple(PRESETS), required=True)
    option("--jobs", type=int, default=1, help="processes, of one CPU thread each (default: 1)")
    option("--shard", type=shard, default=(1, 1), metavar="i/n", help="the i-th of n parts")
    option("--results", type=Path, help="default: examples/cifar/results/PRESET")
    option("--limit-minutes", type=float, help="start no run after this time")
    option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def part(runs: Sequence[Run], index: int, count: int) -> Sequence[Run]:
    """The index-th of so many parts, counted from 1; each is spread over the whole grid."""
    return runs[index - 1 :: count]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the preset's missing runs and writes table and figures."""
    options = _arguments(argv)
    if options.jobs < 1:
        raise SystemExit(f"error: --jobs {options.jobs}: must be at least 1")
    results = options.results or Path(__file__).parent / "results" / options.preset
    index, count = options.shard
    path = results / f"shard-{index}-of-{count}.jsonl"
    preset = PRESETS[options.preset]
    try:
        cifar.prepare(preset.datasets, options.data, preset.synthetic)
        repair(path)
        finished = {Run.of(r).key() for r in records.read(results)}
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    wanted = part(list(preset.runs()), index, count)
    missing = [run for run in wanted if run.key() not in finished]
    crashes = record_all(
        missing,
        len(wanted) - len(missing),
        functools.partial(
            work, root=options.data, device=options.device, checkpoints=results / "checkpoints"
        ),
        path,
        jobs=options.jobs,
        minutes=options.limit_minutes,
    )
    _write(results, options.preset, (run.key() for run in preset.runs()))
    if crashes:
        raise SystemExit(f"error: {crashes} runs crashed; the same command tries them again")


def _write(results: Path, preset: str, wanted: Iterable[str]) -> None:
    """Table and figures of the preset's runs in the results, whichever shard made them."""
    keys = set(wanted)
    found = [r for r in records.read(results) if Run.of(r).key() in keys]
    if not found:
        return
    text = markdown(found, preset)
    (results / "table.md").write_text(text)
    if REPORTED.keys() <= records.by_cell(found).get("cifar100", {}).keys():
        (results / "thesis.md").write_text(comparison(found))
    draw(found, results)
    print(text)


if __name__ == "__main__":
    main()
