"""The suite: ``python -m benchmarks.suite --data DIR --preset full``, or another preset.

    pip install -e '.[benchmarks]'

Runs what is not yet in the results, then writes tables and figures. A run takes seconds: one that
is killed is repeated, finished ones are kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.suite import (
    data,
    headlines,
    horizon_tables,
    horizons,
    plots,
    profile_plots,
    tables,
    trials,
)
from benchmarks.suite.methods import METHODS, method
from benchmarks.suite.run import work
from benchmarks.suite.tasks import TASKS
from benchmarks.suite.trials import PRESETS, Preset, Trial
from examples.cifar import data as cifar
from examples.shared.jobs import record_all, shard
from examples.shared.records import Record, repair

__all__ = ["main"]

_RESULTS = Path(__file__).parents[1] / "results" / "suite"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.suite",
        description="Untuned optimizers against ten SGD learning rates on many small tasks.",
    )
    option: Callable[..., Any] = parser.add_argument
    option("--preset", choices=tuple(PRESETS), required=True)
    option("--data", type=Path, help="directory of the CIFAR archives; smoke makes its own")
    option("--methods", nargs="+", metavar="m", help=f"{', '.join(METHODS)}, adler@option=value")
    option("--tasks", nargs="+", metavar="t", help="only tasks whose names begin so")
    option("--seeds", nargs="+", type=int, metavar="s", help="only these seeds")
    option(
        "--horizons", nargs="+", type=int, metavar="h", help="only these multiples of the epochs"
    )
    option("--jobs", type=int, default=1, help="processes, of one CPU thread each (default: 1)")
    option("--shard", type=shard, default=(1, 1), metavar="i/n", help="the i-th of n parts")
    option("--results", type=Path, help="default: benchmarks/results/suite/PRESET")
    option("--figures", type=Path, help="where the figures go; default: --results")
    option("--limit-minutes", type=float, help="start no run after this time")
    option("--device", default="cpu")
    return parser.parse_args(argv)


def _chosen(preset: Preset, options: argparse.Namespace) -> list[Trial]:
    """The trials of the command.

    Raises:
        ValueError: For an unknown method, one whose package is missing, or a choice without trials.
    """
    names = tuple(options.methods or preset.methods)
    if missing := sorted({m.package or "" for m in map(method, names) if not m.installed}):
        raise ValueError(
            f"not installed: {', '.join(missing)}: pip install -e '.[benchmarks]', or pass "
            "--methods"
        )
    begins = tuple(options.tasks or ("",))
    if options.horizons:
        if len(preset.horizons) == 1 or min(options.horizons) < 1:
            raise ValueError(
                f"--horizons {' '.join(map(str, options.horizons))}: positive numbers, for presets "
                f"with several: {', '.join(n for n, p in PRESETS.items() if len(p.horizons) > 1)}"
            )
        preset = dataclasses.replace(preset, horizons=tuple(options.horizons))
    found = [
        trial
        for trial in preset.trials(names)
        if trial.task.startswith(begins) and trial.seed in (options.seeds or preset.seeds)
    ]
    if not found:
        raise ValueError(
            f"--tasks {' '.join(begins)} --seeds {options.seeds}: none in {options.preset}"
        )
    return found


def _prepare(trials: Iterable[Trial], synthetic: bool, root: Path | None) -> None:
    """Makes or downloads what is missing, before several processes look for it."""
    tasks = [TASKS[name] for name in dict.fromkeys(trial.task for trial in trials)]
    if any(task.load is data.novels for task in tasks):
        data.novels_path(root)
    archives = sorted({task.archive for task in tasks if task.archive is not None})
    if archives and root is None:
        raise ValueError(f"--data: {archives[0]} is needed; pass the directory of its archive")
    if root is not None:
        cifar.prepare(archives, root, synthetic)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the missing trials and writes tables and figures."""
    options = _arguments(argv)
    if options.jobs < 1:
        raise SystemExit(f"error: --jobs {options.jobs}: must be at least 1")
    preset = PRESETS[options.preset]
    with tempfile.TemporaryDirectory() as made:
        if preset.synthetic and options.data is None:
            options.data = Path(made)
        _main(preset, options)


def _main(preset: Preset, options: argparse.Namespace) -> None:
    results = options.results or _RESULTS / options.preset
    # The records of a preset's parts serve it too, where they lie beside it.
    directories = [results, *(results.parent / part for part in preset.parts)]
    index, count = options.shard
    path = results / f"shard-{index}-of-{count}.jsonl"
    try:
        chosen = _chosen(preset, options)
        _prepare(chosen, preset.synthetic, options.data)
        repair(path)
        finished = {Trial.of(r).key() for r in trials.read(directories)}
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    wanted = chosen[index - 1 :: count]
    missing = [trial for trial in wanted if trial.key() not in finished]
    crashes = record_all(
        missing,
        len(wanted) - len(missing),
        functools.partial(work, root=options.data, device=options.device),
        path,
        jobs=options.jobs,
        minutes=options.limit_minutes,
    )
    found = trials.read(directories)
    if found:
        _write(preset, options, results, found)
    if crashes:
        raise SystemExit(f"error: {crashes} runs crashed; the same command tries them again")


def _write(preset: Preset, options: argparse.Namespace, results: Path, found: list[Record]) -> None:
    """Tables and figures of the preset's records."""
    if len(preset.horizons) > 1:
        short = trials.read([results.parent / part for part in preset.short])
        text = horizon_tables.markdown(found, preset, options.preset, short)
        there = horizons.found_horizons(found, preset)
        by_title = {horizons.title(h, preset): horizons.at(found, preset, h) for h in there}
        drawn = by_title.get(headlines.fullest(by_title) or "", [])
    else:
        drawn = horizons.at(found, preset, preset.horizons[0])
        text = tables.markdown(drawn, options.preset)
    results.mkdir(parents=True, exist_ok=True)
    (results / "tables.md").write_text(text)
    figures = options.figures or results
    figures.mkdir(parents=True, exist_ok=True)
    plots.draw(drawn, figures)
    if len(preset.horizons) > 1:
        profile_plots.draw(drawn, figures)
    print(text)


if __name__ == "__main__":
    main()
