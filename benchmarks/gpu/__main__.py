"""One GPU, as few minutes as there are: what matters most first.

    python -m benchmarks.gpu prepare --root DIR --data FILES
    python -m benchmarks.gpu --data FILES --minutes 9
    python -m benchmarks.gpu --preset two-cores --data FILES --minutes 180

Parts, in order: (a) the tests that need a GPU, (b) time and memory of a step, (c) a decoder of ten
million parameters on prose, (d) a residual network on CIFAR-10, (e) Table 7.1 at full size. Where
there is no GPU, two-cores has (c) and (d) as large as a few hours of two CPU cores allow. Each part
writes its JSON when its time is over, and the next call goes on where this one stopped. A part that
fails is recorded and does not stop the others. ``prepare`` makes the data into files under 60 MiB.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import cells, cost, data, gpt, pictures, report, tests
from benchmarks.gpu.presets import PRESETS, Preset
from benchmarks.gpu.session import Session
from examples.cifar import data as cifar
from examples.shared.records import Record, read

__all__ = ["main"]

_PROJECT = Path(__file__).parents[2]


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    option: Callable[..., Any] = parser.add_argument
    option("--preset", choices=tuple(PRESETS), default="full")
    option("--minutes", type=float, default=9.0, help="after which nothing goes on (default: 9)")
    option("--data", type=Path, help="what `prepare` wrote, or the originals")
    option("--parts", help="letters (default: all that the preset has)")
    option("--results", type=Path, help="default: the preset's own")
    option("--device", choices=("cuda", "cpu"), help="default: what the preset is for")
    return parser.parse_args(argv)


def _prepare(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu prepare")
    parser.add_argument("--root", type=Path, required=True, help="novels.txt and CIFAR's folders")
    parser.add_argument("--data", type=Path, required=True, help="where the files go")
    parser.add_argument("--datasets", nargs="*", choices=tuple(cifar.ARCHIVES), default=["cifar10"])
    parser.add_argument(
        "--quality", type=int, default=95, help="of the JPEG: 95 takes 49 MiB, 90 takes 35"
    )
    options = parser.parse_args(argv)
    try:
        written = data.prepare(options.root, options.data, options.datasets, options.quality)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    for path in written:
        print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what fits, and writes records and tables."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["prepare"]:
        _prepare(argv[1:])
        return
    options = _arguments(argv)
    preset = PRESETS[options.preset]
    options.device = options.device or preset.device
    options.parts = options.parts or "".join(preset.shares)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: no GPU: pass --preset two-cores, or smoke")
    if options.data is None and not preset.synthetic:
        raise SystemExit("error: --data: where `prepare` wrote its files")
    if unknown := set(options.parts) - set(preset.shares):
        raise SystemExit(f"error: --parts {options.parts}: no part {', '.join(sorted(unknown))}")
    results = options.results or _PROJECT / preset.results
    session = Session(results, options.device, options.minutes)
    with tempfile.TemporaryDirectory() as made:
        root = options.data
        if preset.synthetic and root is None:
            root = Path(made)
            cifar.synthetic(root)
        _run(session, preset, root, options)
    found = {letter: _read(results, letter) for letter in preset.shares}
    (results / "tables.md").write_text(report.markdown(found, options.preset))
    print((results / "tables.md").read_text())


def _run(session: Session, preset: Preset, root: Path, options: argparse.Namespace) -> None:
    sys.path.append(str(root / data.PACKAGES))
    text = None if preset.synthetic and options.data is None else root
    parts: dict[str, Callable[[], None]] = {
        "a": lambda: tests.run(session),
        "c": lambda: gpt.run(session, preset.gpt, text),
        "d": lambda: pictures.run(session, preset.pictures, root),
    }
    if preset.cost is not None:
        parts["b"] = functools.partial(cost.run, session, preset.cost)
    if preset.cells is not None:
        parts["e"] = functools.partial(cells.run, session, preset.cells, root)
    for letter, share in preset.shares.items():
        if letter in options.parts:
            with session.part(letter, share):
                parts[letter]()
            print(f"part {letter}: {len(_read(session.results, letter))} records", flush=True)


def _read(results: Path, letter: str) -> list[Record]:
    path = results / f"{letter}.jsonl"
    return read([path], lambda r: f"{r['key']}{'/failed' if 'failed' in r else ''}")


if __name__ == "__main__":
    main()
