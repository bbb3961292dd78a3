"""nanoGPT's own training loop with one line changed, against its AdamW at the best of six rates.

    git clone https://github.com/karpathy/nanoGPT
    python -m benchmarks.nanogpt --checkout nanoGPT --text input.txt --out benchmarks/results

``--text`` is the file that nanoGPT's ``data/shakespeare_char/prepare.py`` downloads: one megabyte
of Shakespeare, also in the repository karpathy/char-rnn. The network is the one that nanoGPT's
README proposes for a CPU (4 layers, width 128, context 64, batches of 12), with its gradient
clipping, its weight decay, warm-up and cosine to a tenth of the rate.

Of a copy of the program the line that makes the optimizer is replaced, and for each seed the
number of its ``manual_seed``. AdamW is run anew for each number of steps, which its schedule has to
know. The others are told none, and run once, without the program's schedule: ``--decay_lr=False
--learning_rate=1.0``. Runs that are in the file are not repeated.
"""

from __future__ import annotations

import argparse
import pickle
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from examples.shared.records import Record, append, finite, read, repair

__all__ = ["Run", "main", "tables"]

HORIZONS = (250, 1000, 5000)
RATES = (1e-4, 3.16e-4, 1e-3, 3.16e-3, 1e-2, 3.16e-2)
OWN_RATE = 1e-3  # of nanoGPT's configuration
SEEDS = (0, 1, 2, 3, 4)
UNTUNED = ("AdlerScheduleFree", "AdlerMuon")

_SIZES = {
    "device": "cpu",
    "dtype": "float32",
    "compile": False,
    "block_size": 64,
    "batch_size": 12,
    "n_layer": 4,
    "n_head": 4,
    "n_embd": 128,
    "dropout": 0.0,
    "log_interval": 1000,
}
_MADE = re.compile(r"^optimizer = (?P<own>.*)$", re.MULTILINE)
_SEEDED = re.compile(r"(?<=torch\.manual_seed\()\d+")
_TESTED = re.compile(r"^step (\d+): train loss ([\d.]+|nan), val loss ([\d.]+|nan)", re.MULTILINE)
# nanoGPT's model returns logits and loss, and decides itself which parameters decay.
_LINE = """\
import adler
optimizer = adler.{name}({own}, model, adler.ModelLoss(
    torch.nn.CrossEntropyLoss(), outputs=lambda result: result[0].flatten(0, -2),
    targets=lambda idx, targets: targets.flatten(), loss=lambda result: result[1]))
"""


class Run(NamedTuple):
    """One training run.

    Attributes:
        optimizer: ``"AdamW"``, nanoGPT's own, or a class of this library.
        lr: Of AdamW; None for the others.
        steps: How many.
        seed: Of initialisation and batches.
    """

    optimizer: str
    lr: float | None
    steps: int
    seed: int

    @property
    def name(self) -> str:
        """Its identity in the file."""
        return f"{self.optimizer} {self.lr} {self.steps} {self.seed}"


def runs(horizons: Sequence[int] = HORIZONS, seeds: Sequence[int] = SEEDS) -> Iterator[Run]:
    """Seed by seed, so that what was stopped early holds comparisons that are complete."""
    for seed in seeds:
        for name in UNTUNED:
            yield Run(name, None, max(horizons), seed)
        for steps in horizons:
            for lr in RATES:
                yield Run("AdamW", lr, steps, seed)


def patched(program: str, run: Run) -> str:
    """nanoGPT's program with another seed and, unless it is to be AdamW, another optimizer.

    Raises:
        ValueError: If it does not have exactly one of each line.
    """
    program, seeded = _SEEDED.subn(str(1337 + run.seed), program)
    made = len(_MADE.findall(program))
    if made != 1 or seeded != 1:
        raise ValueError(
            f"train.py makes {made} optimizers and sets {seeded} seeds: expected one of each; use "
            "commit 3adf61e of karpathy/nanoGPT"
        )
    if run.optimizer == "AdamW":
        return program
    return _MADE.sub(lambda m: _LINE.format(name=run.optimizer, own=m["own"]), program)


def prepare(text: str, folder: Path) -> None:
    """Writes a text as nanoGPT's characters: nine tenths to train on, one to test."""
    alphabet = sorted(set(text))
    numbers = {c: i for i, c in enumerate(alphabet)}
    tokens = np.array([numbers[c] for c in text], dtype=np.uint16)
    split = len(tokens) * 9 // 10
    folder.mkdir(parents=True, exist_ok=True)
    tokens[:split].tofile(folder / "train.bin")
    tokens[split:].tofile(folder / "val.bin")
    meta = {"vocab_size": len(alphabet), "itos": dict(enumerate(alphabet)), "stoi": numbers}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


def train(run: Run, checkout: Path, text: str, every: int, batches: int) -> dict[str, float]:
    """Validation losses by step.

    Args:
        run: Which.
        checkout: nanoGPT's files; unchanged.
        text: To train on.
        every: Steps between tests of a method that does not know where it ends.
        batches: Of a test.

    Raises:
        RuntimeError: If the program fails, with what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "nanoGPT"
        shutil.copytree(checkout, place, ignore=shutil.ignore_patterns(".git", "out*"))
        prepare(text, place / "data" / "shakespeare_char")
        program = place / "train.py"
        program.write_text(patched(program.read_text(), run))
        options = {**_SIZES, "max_iters": run.steps, "lr_decay_iters": run.steps}
        options["eval_iters"] = batches
        if run.lr is None:
            options |= {"decay_lr": False, "learning_rate": 1.0, "eval_interval": every}
        else:
            options |= {"learning_rate": run.lr, "min_lr": run.lr / 10, "eval_interval": run.steps}
        given = [f"--{name}={value}" for name, value in options.items()]
        said = subprocess.run(
            [sys.executable, "train.py", "config/train_shakespeare_char.py", *given],
            cwd=place,
            capture_output=True,
            text=True,
        )
    if said.returncode != 0:
        raise RuntimeError(f"{run.name}: nanoGPT failed:\n{said.stdout}\n{said.stderr}")
    return {step: float(loss) for step, _, loss in _TESTED.findall(said.stdout) if step != "0"}


def tables(records: Sequence[Record]) -> str:
    """Markdown: validation losses by number of steps; the rate of AdamW is the best in the mean.

    Of each number of steps, the seeds count of which there are all runs.
    """
    lines = [
        "| steps | "
        + " | ".join(UNTUNED)
        + " | AdamW, best rate | its rate | AdamW at 1e-3 | seeds |",
        "|" + "---|" * (len(UNTUNED) + 5),
    ]
    for steps in sorted({r["steps"] for r in records if r["optimizer"] == "AdamW"}):
        by_rate = {
            lr: {
                r["seed"]: _number(r["losses"].get(str(steps)))
                for r in records
                if (r["optimizer"], r["lr"], r["steps"]) == ("AdamW", lr, steps)
            }
            for lr in RATES
        }
        # A run that was made for fewer steps is the beginning of the longer one.
        untuned = {
            name: {
                r["seed"]: _number(r["losses"][str(steps)])
                for r in records
                if r["optimizer"] == name and str(steps) in r["losses"]
            }
            for name in UNTUNED
        }
        columns = [*by_rate.values(), *untuned.values()]
        seeds = sorted(set.intersection(*map(set, columns)))
        if not seeds:
            continue
        means = {lr: statistics.fmean(losses[s] for s in seeds) for lr, losses in by_rate.items()}
        best = min(means, key=lambda lr: means[lr] if means[lr] == means[lr] else float("inf"))
        cells = [f"{steps:,}"]
        cells += [_spread([untuned[name][s] for s in seeds]) for name in UNTUNED]
        cells += [_spread([by_rate[best][s] for s in seeds]), f"{best:g}"]
        cells += [_spread([by_rate[OWN_RATE][s] for s in seeds]), f"{len(seeds)}"]
        lines.append("| " + " | ".join(cells) + " |")
    first = records[0]
    table = "\n".join(lines)
    return (
        f"<!-- --8<-- [start:losses] -->\n{table}\n<!-- --8<-- [end:losses] -->\n\n"
        "Validation loss in nats a character, mean (smallest to largest) over the seeds; "
        f"rates {', '.join(f'{lr:g}' for lr in RATES)}, chosen by this very loss. torch "
        f"{first['torch']}, {first['machine']}, one CPU thread. Written by `python -m "
        "benchmarks.nanogpt`.\n"
    )


def _number(loss: float | None) -> float:
    """A loss of a record, which holds None where it was not finite."""
    return float("nan") if loss is None else loss


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkout", type=Path, help="nanoGPT's files; default: tables only")
    parser.add_argument("--text", type=Path, help="what to train on")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--horizons", type=int, nargs="+", default=list(HORIZONS), metavar="n")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), metavar="s")
    parser.add_argument("--batches", type=int, default=200, help="of a test (default: 200)")
    options = parser.parse_args()
    file = options.out / "nanogpt.jsonl"
    repair(file)
    done = {record["name"] for record in read([file], lambda record: str(record["name"]))}
    if options.checkout is not None:
        text = options.text.read_text()
        every = min(options.horizons)
        for run in runs(options.horizons, options.seeds):
            if run.name in done:
                continue
            losses = train(run, options.checkout, text, every, options.batches)
            about = {"torch": torch.__version__, "machine": platform.machine()}
            append(file, {"name": run.name, **run._asdict(), "losses": finite(losses), **about})
            print(run.name, losses, flush=True)
    records = read([file], lambda record: str(record["name"]))
    if records:
        (options.out / "nanogpt.md").write_text(tables(records))


if __name__ == "__main__":
    main()
