"""What it costs to compare a measurement with the training pass, as a share of a step.

    python -m benchmarks.check_cost --out benchmarks/results

The functions that compare are timed where they are called, in the time of the thread itself, and
their sum is divided by the time of whole steps in the same run: another load of the machine meets
both alike. Networks that stand in ``--out`` already are kept, so that each may have its own run
(``--networks``). ``--quick`` is tiny, and its numbers mean nothing.
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import adler
from adler import Measure
from adler._recording.backward import Backward
from adler.curvature import loss_forms, measurement, trust
from adler.curvature.batch_along import BatchAlong
from benchmarks.networks import Task
from benchmarks.step_cost import arguments, chosen, provenance

# Owner, function, and what is compared by it.
COMPARISONS: tuple[tuple[Any, str, str], ...] = (
    (BatchAlong, "_compare", "outputs"),
    (BatchAlong, "_arrived", "slope"),
    (Backward, "_arrive_at_outputs", "slope"),
    (Backward, "_gradient_versions", "slope"),
    (trust, "agree", "slope"),
    (trust.Memory, "distrusts", "slope"),
    (loss_forms, "gradients_of", "loss"),
    (loss_forms, "_slope", "loss"),
)
KINDS = ("outputs", "slope", "loss", "whole batch")
# A look at the whole batch comes once in so many measurements of a part.
PERIOD = measurement._PARTS + 1
# The first measurements compare more than the later ones.
WARMUP = trust.Memory.CLOSELY


class Timer:
    """Adds up the time of some functions, by what they are for; those within others count once."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self._inside = False

    def wrapped(
        self, function: Callable[..., Any], name: str, counts: Callable[..., bool]
    ) -> Callable[..., Any]:
        """The function, timed where it counts."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside or not counts(*args):
                return function(*args, **kwargs)
            self._inside, begun = True, time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.spent[name] += time.thread_time() - begun
                self._inside = False

        return timed


def _always(*_: Any) -> bool:
    return True


def _is_whole(one: Any, *_: Any) -> bool:
    """Whether a measurement is on the whole batch, where others are on a part."""
    return not one.partial


@contextlib.contextmanager
def timed(parts: bool) -> Iterator[dict[str, float]]:
    """Inside, the comparisons are timed; ``parts``: a look at the whole batch is one of them."""
    timer = Timer()
    places = [(owner, name, kind, _always) for owner, name, kind in COMPARISONS]
    if parts:
        places.append((measurement, "_best", "whole batch", _is_whole))
    kept = [(owner, name, getattr(owner, name)) for owner, name, _, _ in places]
    for owner, name, kind, counts in places:
        setattr(owner, name, timer.wrapped(getattr(owner, name), kind, counts))
    try:
        yield timer.spent
    finally:
        for owner, name, function in kept:
            setattr(owner, name, function)


def run(task: Task, measure: Measure, steps: int) -> tuple[dict[str, float], float]:
    """Seconds of the comparisons, by kind, and of everything, in some steps."""
    model, criterion = task.network(), nn.CrossEntropyLoss()
    optimizer = adler.AdlerScheduleFree(model.parameters(), model, criterion, measure=measure)
    batches = [task.batch(seed=seed) for seed in range(4)]
    with timed(parts=measure.fraction < 1) as spent:
        for number in range(WARMUP + steps):
            if number == WARMUP:
                spent.clear()
                begun = time.thread_time()
            x, y = batches[number % len(batches)]
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
        return dict.fromkeys(KINDS, 0.0) | spent, time.thread_time() - begun


def shares(task: Task, periods: int) -> dict[str, dict[str, float]]:
    """Of a step, by default and where every step measures, by what is compared."""
    steps = periods * PERIOD
    spent, seconds = run(task, Measure(every=1, warmup=0), steps)
    _, between = run(task, Measure(every=10**9, warmup=0), steps)
    default = Measure()
    period = seconds + (default.every - 1) * between
    exact, total = run(task, Measure.every_step(), steps)
    return {
        "by default": {kind: spent[kind] / period for kind in KINDS},
        "every step measured": {kind: exact[kind] / total for kind in KINDS},
    }


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    found = results["shares"]
    lines = ["| comparisons, share of a step | " + " | ".join(found) + " |"]
    lines.append("|---|" + "---|" * len(found))
    for mode in next(iter(found.values())):
        cells = [f"**{sum(kinds[mode].values()):.2%}**" for kinds in found.values()]
        lines.append(f"| **{mode}** | " + " | ".join(cells) + " |")
        for kind in KINDS:
            cells = [f"{kinds[mode][kind]:.2%}" for kinds in found.values()]
            lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return "\n".join(
        [
            *lines,
            "",
            f"`AdlerScheduleFree`, {results['steps']} measurements of each kind; "
            f"{results['threads']} CPU thread(s), {results['machine']}, {versions}. "
            f"Written by `{results['command']}`.\n",
        ]
    )


def main() -> None:
    """The command."""
    parser = arguments(__doc__, "check_cost", by_network=True)
    parser.add_argument("--periods", type=int, default=2, help=f"of {PERIOD} measurements")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    periods = 1 if options.quick else options.periods
    results = provenance(options, "benchmarks.check_cost")
    results |= {"steps": periods * PERIOD, "shares": {}}
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "check_cost.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    if known.get("steps") == results["steps"] and known["versions"] == results["versions"]:
        results["shares"] = known["shares"]
    for name, task in tqdm(chosen(options).items()):
        results["shares"][name] = shares(task, periods)
        file.write_text(json.dumps(results, indent=1) + "\n")
        (options.out / "check_cost.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
