"""The experiments on conditioning: ``python -m examples.pl_theory --preset smoke|thesis``.

Makes the records that are missing, draws the figures, and writes claims beside measurements.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from examples.cifar import data as cifar
from examples.pl_theory import claims, experiments, figures, records
from examples.pl_theory.config import Experiment
from examples.pl_theory.presets import FIGURES, PRESETS, Preset
from examples.shared.jobs import record_all
from examples.shared.records import repair

__all__ = ["main"]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.pl_theory",
        description="Conditioning of wide networks, at initialisation and in training.",
    )
    option: Callable[..., Any] = parser.add_argument
    option("--preset", choices=tuple(PRESETS), required=True)
    option("--data", type=Path, help="directory of the CIFAR archives; not for smoke")
    option("--jobs", type=int, default=1, help="processes, of one CPU thread each (default: 1)")
    option("--figures", nargs="+", choices=tuple(FIGURES), metavar="n", help="such as 6.1 6.5 nmm")
    option("--results", type=Path, help="default: examples/pl_theory/results/PRESET")
    option("--minutes", type=float, help="start nothing after so many; 0: draw what is there")
    option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def _wanted(preset: Preset, chosen: Sequence[str]) -> list[Experiment]:
    return [e for e in preset.experiments() if any(FIGURES[name](e) for name in chosen)]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the preset's missing experiments, draws and writes."""
    options = _arguments(argv)
    if options.jobs < 1:
        raise SystemExit(f"error: --jobs {options.jobs}: must be at least 1")
    results = options.results or Path(__file__).parent / "results" / options.preset
    path, preset = results / "records.jsonl", PRESETS[options.preset]
    chosen = options.figures or tuple(FIGURES)
    wanted = _wanted(preset, chosen)
    try:
        if preset.dataset in cifar.ARCHIVES:
            if options.data is None and options.minutes != 0:
                raise ValueError(f"--preset {options.preset}: pass --data, where CIFAR is")
            if options.minutes != 0:
                cifar.prepare([preset.dataset], options.data)
        repair(path)
        finished = {Experiment.of(r).key() for r in records.read(path)}
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    missing = [e for e in wanted if e.key() not in finished]
    crashes = record_all(
        missing,
        len(wanted) - len(missing),
        functools.partial(experiments.run, root=options.data, device=options.device),
        path,
        jobs=options.jobs,
        minutes=options.minutes,
        unit="experiment",
    )
    keys = {e.key() for e in preset.experiments()}
    found = [r for r in records.read(path) if Experiment.of(r).key() in keys]
    if found:
        figures.draw(found, results, chosen)
        text = claims.markdown(found, options.preset)
        (results / "claims.md").write_text(text)
        (results / "figures.md").write_text(claims.details(found))
        print(text)
    if crashes:
        raise SystemExit(f"error: {crashes} experiments crashed; the same command tries again")


if __name__ == "__main__":
    main()
