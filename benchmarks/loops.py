"""What the habits of a training loop do to a measured rate: clipping, schedules, decay, batch size.

    pip install 'torch-adler[benchmarks]'
    python -m benchmarks.loops --out benchmarks/results

A character transformer on Python's documentation (`examples.programs.char_lm`), at equal steps; and
BatchNorm's running statistics on handwritten digits. Runs that are in the file are not repeated;
``--only PART`` makes those whose name contains it.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import platform
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR
from torch.optim.swa_utils import update_bn

import adler
from examples.programs.char_lm import LENGTH, CharTransformer, corpus
from examples.shared.records import append, read

__all__ = ["main"]

STEPS = 300
BATCH = 16


class Loop(NamedTuple):
    """One way to train the character model.

    Attributes:
        optimizer: Its name.
        clip: Largest norm of the gradient; 0: any.
        schedule: ``"none"``, ``"linear"`` (to zero) or ``"one cycle"`` (up to 1).
        decay: Weight decay.
        batch: Sequences in a batch.
    """

    optimizer: str = "AdlerScheduleFree"
    clip: float = 0.0
    schedule: str = "none"
    decay: float = 0.0
    batch: int = BATCH


PEERS = ("AdlerScheduleFree", "AdamW")
LOOPS = {
    "clipping": [
        Loop(name, clip, "linear" if name == "AdamW" else "none")
        for name in PEERS
        for clip in (0.0, 1.0, 0.2, 0.05)
    ],
    "schedule": [
        *(Loop("AdlerScheduleFree", 0.0, schedule) for schedule in ("none", "linear", "one cycle")),
        *(Loop("AdlerAdam", 0.0, schedule) for schedule in ("none", "linear")),
    ],
    "weight decay": [Loop(decay=decay) for decay in (0.0, 0.1, 1.0, 10.0)],
    "batch size": [
        Loop(name, 0.0, "linear" if name == "AdamW" else "none", 0.0, batch)
        for name in PEERS
        for batch in (2, BATCH, 48)
    ],
}


def _optimizer(loop: Loop, model: nn.Module, criterion: nn.Module) -> torch.optim.Optimizer:
    if loop.optimizer == "AdamW":
        return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=loop.decay)
    make = getattr(adler, loop.optimizer)
    made: torch.optim.Optimizer = make(
        model.parameters(), model, criterion, weight_decay=loop.decay
    )
    return made


def _schedule(loop: Loop, optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler | None:
    if loop.schedule == "linear":
        return LambdaLR(optimizer, lambda k: 1 - k / steps)
    if loop.schedule == "one cycle":
        return OneCycleLR(optimizer, 1.0, steps + 1, cycle_momentum=False)
    return None


def train(loop: Loop, seed: int, steps: int = STEPS) -> dict[str, float]:
    """Held-out loss in nats a character, mean factor of the clipping, last rate."""
    torch.manual_seed(seed)
    tokens, alphabet = corpus()
    split = len(tokens) * 9 // 10
    held = tokens[split:][: 64 * (LENGTH + 1)].view(64, LENGTH + 1)
    model, criterion = CharTransformer(len(alphabet)), nn.CrossEntropyLoss()
    optimizer = _optimizer(loop, model, criterion)
    schedule, factors = _schedule(loop, optimizer, steps), []
    for _ in range(steps):
        starts = torch.randint(split - LENGTH - 1, (loop.batch,))
        batch = tokens[starts[:, None] + torch.arange(LENGTH + 1)]
        optimizer.zero_grad()
        criterion(model(batch[:, :-1]), batch[:, 1:]).backward()
        if loop.clip:
            norm = float(nn.utils.clip_grad_norm_(model.parameters(), loop.clip))
            factors.append(min(1.0, loop.clip / norm))
        optimizer.step()
        if schedule is not None:
            schedule.step()
    model.eval()
    with torch.no_grad():
        loss = float(criterion(model(held[:, :-1]), held[:, 1:]))
    group = optimizer.param_groups[0]
    factor = sum(factors) / len(factors) if factors else 1.0
    return {"loss": loss, "factor": factor, "rate": float(group.get("effective_lr", group["lr"]))}


def running_statistics(kept: int, seed: int, steps: int) -> dict[str, float]:
    """Accuracy on held-out digits as the loop tests, and after `update_bn` on all of the data.

    Args:
        kept: ``bn_batches``.
        seed: Of initialisation and batches.
        steps: Before the test.
    """
    from sklearn.datasets import load_digits

    torch.manual_seed(seed)
    pixels, labels = load_digits(return_X_y=True)
    x = torch.as_tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    y = torch.as_tensor(labels)
    order = torch.randperm(len(x))
    train_x, train_y, test_x, test_y = (
        x[order[:1200]],
        y[order[:1200]],
        x[order[1200:]],
        y[order[1200:]],
    )
    channels = (1, 16, 32, 32)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(channels):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * channels[-1], 10))
    criterion = nn.CrossEntropyLoss()
    optimizer = adler.AdlerScheduleFree(model.parameters(), model, criterion, bn_batches=kept)
    for _ in range(steps):
        rows = torch.randint(len(train_x), (64,))
        optimizer.zero_grad()
        criterion(model(train_x[rows]), train_y[rows]).backward()
        optimizer.step()

    def accuracy() -> float:
        model.eval()
        with torch.no_grad():
            return float((model(test_x).argmax(1) == test_y).float().mean())

    found = accuracy()
    optimizer.eval()
    update_bn(torch.split(train_x, 64), model)
    return {"accuracy": found, "updated": accuracy()}


def jobs(seeds: int, steps: int) -> dict[str, Callable[[], dict[str, float]]]:
    """All runs by name."""
    found: dict[str, Callable[[], dict[str, float]]] = {}
    for loop in dict.fromkeys(loop for loops in LOOPS.values() for loop in loops):
        for seed in range(seeds):
            found[_name(loop, seed)] = functools.partial(train, loop, seed, steps)
    for kept in (0, 16):
        for count in (10, 40, 150):
            for seed in range(seeds):
                job = functools.partial(running_statistics, kept, seed, count)
                found[f"digits {kept} {count} {seed}"] = job
    return found


def _name(loop: Loop, seed: int) -> str:
    return " ".join(map(str, (*loop, seed)))


def _mean(rows: Iterable[dict[str, Any]], key: str) -> float:
    values = [row[key] for row in rows]
    return sum(values) / len(values) if values else math.nan


def tables(records: dict[str, dict[str, Any]]) -> str:
    """Markdown, a part for each habit."""
    seeds = range(max(record["seeds"] for record in records.values()))
    parts = []
    for part, loops in LOOPS.items():
        clips = part == "clipping"
        names = ["optimizer", part, "held-out nats", *["mean factor"] * clips, "last rate"]
        lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
        for loop in loops:
            rows = [records[name] for seed in seeds if (name := _name(loop, seed)) in records]
            if not rows:
                continue
            of: dict[str, object] = {"clipping": loop.clip or "none", "schedule": loop.schedule}
            of |= {"weight decay": loop.decay, "batch size": loop.batch}
            rate = _mean(rows, "rate")
            row = [loop.optimizer, str(of[part]), f"{_mean(rows, 'loss'):.3f}"]
            row += [f"{_mean(rows, 'factor'):.2f}"] * clips
            row.append(f"{rate:.1e}" if rate else "0")  # AdamW's schedule has ended
            lines.append(f"| {' | '.join(row)} |")
        parts.append((part.replace(" ", "_"), "\n".join(lines)))
    lines = ["| steps | `bn_batches=0` | as it is | after `update_bn` |", "|---|---|---|---|"]
    for count in (10, 40, 150):
        kept_of = {
            kept: [records[n] for s in seeds if (n := f"digits {kept} {count} {s}") in records]
            for kept in (0, 16)
        }
        columns = (kept_of[0], "accuracy"), (kept_of[16], "accuracy"), (kept_of[16], "updated")
        cells = " | ".join(f"{_mean(rows, key):.1%}" for rows, key in columns)
        lines.append(f"| {count} | {cells} |")
    parts.append(("running_statistics", "\n".join(lines)))
    blocks = [
        f"<!-- --8<-- [start:{name}] -->\n{text}\n<!-- --8<-- [end:{name}] -->\n"
        for name, text in parts
    ]
    first = next(iter(records.values()))
    blocks.append(
        f"{STEPS} steps, {len(seeds)} seed(s), torch {first['torch']}, {first['machine']}, one CPU "
        "thread; AdamW at 1e-3 with linear decay. Written by `python -m benchmarks.loops`.\n"
    )
    return "\n".join(blocks)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--only", default="", help="make the runs whose name contains this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    file = options.out / "loops.jsonl"
    done = {record["name"] for record in read([file], lambda record: str(record["name"]))}
    for name, job in jobs(options.seeds, options.steps).items():
        if name not in done and options.only in name:
            found = job()
            about = {"torch": torch.__version__, "machine": platform.machine()}
            append(file, {"name": name, "seeds": options.seeds, **about, **found})
            print(name, found, flush=True)
    records = {
        str(record["name"]): dict(record) for record in read([file], lambda r: str(r["name"]))
    }
    if records:
        (options.out / "loops.md").write_text(tables(records))


if __name__ == "__main__":
    main()
