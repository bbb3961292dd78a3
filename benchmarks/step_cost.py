"""Time of a training step over that of SGD: this library's modes and its peers.

    pip install -e '.[benchmarks]'
    python -m benchmarks.step_cost --out benchmarks/results --figures docs/pages/assets/cost

All methods take turns, step by step, on the same batch, a new one in each round, so that noise in
the machine's speed meets all alike; the tables show medians of the ratio to SGD's step in the same
rounds, with quartiles. The error of c is that along the method's own gradient, over a few steps,
beside float64.
``--device cuda`` writes files of its own, on networks of a size that a GPU is made for.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

import adler
from benchmarks.networks import QUICK, TASKS, Task
from benchmarks.steppers import BASE, OURS, PEERS, Step, Stepper
from examples.shared.plots import colours_of, finish, panels, style
from examples.shared.plots import save as save_figure

# What is run compiled: peers differentiate in ways that compiled modules do not support.
COMPILED = (BASE, "forward", "finite_difference", "low_cost", "AdlerScheduleFree")
# What the README compares, and what with: the habit, and the method that also needs no schedule.
HABIT, SCHEDULE_FREE = "AdamW", "Schedule-Free AdamW"
SHOWN = ("AdlerScheduleFree", "Adler", SCHEDULE_FREE)
# Rounds are summed in blocks, so that a step that measures every eighth time is seen whole.
BLOCK = adler.Measure().every
# The place in a block of the step that measures: each method takes one step before all rounds.
_MEASURES = BLOCK - 1
_RAREST = adler.Measure().longest
_LONG = next(k for k in itertools.count() if adler.Measure().interval(k) == _RAREST)
_AT_LENGTH = f"from {_LONG:,} steps on"
Sums = Callable[[list[float]], "np.ndarray[Any, Any]"]


def measure(
    task: Task,
    steppers: dict[str, Stepper],
    rounds: int,
    *,
    device: str = "cpu",
    compiled: bool = False,
    warmup: int = BLOCK,
    strict: bool = True,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of each method's step in each round, and why some methods have none.

    Args:
        task: The network and its batch.
        steppers: The methods.
        rounds: That are timed.
        device: Where.
        compiled: Whether the network is.
        warmup: Rounds before those.
        strict: Whether a method of this library that fails is an error; else it is reported.
    """
    x, y = task.batch(device)  # with the first step of each
    torch._dynamo.reset()  # what is compiled of one function is limited in number
    steps: dict[str, Step] = {}
    failures: dict[str, str] = {}
    for name, make in steppers.items():
        network = task.network(device)
        model: nn.Module = torch.compile(network) if compiled else network  # type: ignore[assignment]
        try:
            step = make(model, nn.CrossEntropyLoss())
            step(x, y)
        except Exception as error:  # a peer that cannot do this network is reported, not hidden
            if strict and name in OURS:
                raise
            failures[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        else:
            steps[name] = step
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(warmup + rounds):
        # Never the same again: on a batch that is learnt by heart the outputs' rounding is larger
        # than their differences, and another engine than the one that is timed takes over.
        x, y = task.batch(device, seed=number + 1)
        for name, step in steps.items():
            _wait(device)
            begun = time.perf_counter()
            step(x, y)
            _wait(device)
            if number >= warmup:
                times[name].append(time.perf_counter() - begun)
    return times, failures


def errors(task: Task, steps: int, device: str = "cpu") -> dict[str, float]:
    """Largest relative error of c of each engine, beside float64 along the same directions.

    A GPU's convolutions are kept from rounding to TensorFloat32, as its matrix products are.
    """
    criterion, largest = nn.CrossEntropyLoss(), {}
    torch.backends.cudnn.allow_tf32 = False
    engines = ("forward", "finite_difference")
    for name in (*engines, *(f"{engine}, bfloat16 autocast" for engine in engines)):
        model, found = task.network(device), []
        engine, _, autocast = name.partition(", ")
        optimizer = adler.Adler(
            model.parameters(), model, criterion, measure=adler.Measure.every_step(engine)
        )
        for seed in range(steps):
            x, y = task.batch(device, seed=seed)
            wide = x.double() if x.is_floating_point() else x
            optimizer.zero_grad()
            with torch.autocast(device, dtype=torch.bfloat16, enabled=bool(autocast)):
                loss = criterion(model(x), y)
            loss.backward()
            twin = copy.deepcopy(model).double()
            direction = [p.grad.double() for p in model.parameters() if p.grad is not None]
            c = adler.curvature.quadratic_form(
                twin, twin.parameters(), wide, y, criterion, direction
            )
            optimizer.step()
            assert optimizer.last_step is not None
            found.append(abs(float(optimizer.last_step.curvature) / float(c) - 1))
        largest[name] = max(found)
    torch.backends.cudnn.allow_tf32 = True
    return largest


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def blocks(values: list[float]) -> np.ndarray[Any, Any]:
    """Sums over consecutive rounds."""
    summed: np.ndarray[Any, Any] = np.asarray(values).reshape(-1, BLOCK).sum(1)
    return summed


def at_length(values: list[float]) -> np.ndarray[Any, Any]:
    """The sums, had measurements been as rare as in a long run, in place of one a block."""
    each = np.asarray(values).reshape(-1, BLOCK)
    plain = np.delete(each, _MEASURES, axis=1).mean(1)
    found: np.ndarray[Any, Any] = BLOCK * (plain + (each[:, _MEASURES] - plain) / _RAREST)
    return found


def ratios(times: dict[str, list[float]], name: str) -> np.ndarray[Any, Any]:
    """Quartiles of the ratio to SGD's step."""
    found: np.ndarray[Any, Any] = np.percentile(
        blocks(times[name]) / blocks(times[BASE]), [25, 50, 75]
    )
    return found


def table(results: dict[str, Any]) -> str:
    """The results as Markdown; between markers what the README shows of them."""
    parts = [_times(run) for run in results["runs"] if run["seconds"]]
    if results["runs"] and all(HABIT in times for times in results["runs"][0]["seconds"].values()):
        start, end = (f"<!-- --8<-- [{mark}:readme] -->" for mark in ("start", "end"))
        parts.insert(0, f"{start}\n\n{_beside_habit(results['runs'][0])}\n{end}\n")
    parts.append(_errors(results["errors"]))
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    parts.append(
        f"Medians over {results['rounds']} interleaved steps, in blocks of {BLOCK} (quartiles); "
        f"{results['threads']} CPU thread(s), {results['machine']}, {versions}, fixed seeds. "
        f"Written by `{results['command']}`.\n"
    )
    return "\n".join(parts)


def _beside_habit(run: dict[str, Any]) -> str:
    """Of a few methods, the median ratio to AdamW's step, and ours to Schedule-Free AdamW's."""
    networks = run["seconds"]
    lines = [f"| step time over AdamW's ({run['device']}) | " + " | ".join(networks) + " |"]
    lines.append("|---|" + "---|" * len(networks))

    def compare(name: str, other: str, label: str, sums: Sums = blocks) -> None:
        cells = [
            f"{np.median(sums(times[name]) / blocks(times[other])):.2f}"
            if name in times and other in times
            else "–"
            for times in networks.values()
        ]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")

    rarely = "every" in run  # older runs measured at each step
    for name in (n for n in SHOWN if n in run["methods"]):
        compare(name, HABIT, name)
        if rarely and name != SCHEDULE_FREE:
            compare(name, HABIT, f"{name}, {_AT_LENGTH}", at_length)
    if SCHEDULE_FREE in run["methods"]:
        label = f"{SHOWN[0]}, over {SCHEDULE_FREE}'s"
        compare(SHOWN[0], SCHEDULE_FREE, label)
        if rarely:
            compare(SHOWN[0], SCHEDULE_FREE, f"{label}, {_AT_LENGTH}", at_length)
    return "\n".join(lines) + "\n"


def _times(run: dict[str, Any]) -> str:
    names = [name for name in (*OURS, *PEERS) if name != BASE and name in run["methods"]]
    kind = f"{run['device']}, {'compiled' if run['compiled'] else 'eager'}"
    networks = list(run["seconds"])
    lines = [f"| step time over SGD's ({kind}) | " + " | ".join(networks) + " |"]
    lines.append("|---|" + "---|" * len(networks))
    cells = [
        f"{1000 * np.median(blocks(times[BASE])) / BLOCK:.1f} ms"
        for times in run["seconds"].values()
    ]
    lines.append(f"| {BASE} | " + " | ".join(cells) + " |")
    for name in names:
        cells = []
        for times in run["seconds"].values():
            if name not in times:
                cells.append("fails")
                continue
            low, middle, high = ratios(times, name)
            cells.append(f"{middle:.2f} ({low:.2f}–{high:.2f})")
        label = f"`{name}`" if name in OURS and " " not in name else name
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _errors(by_task: dict[str, dict[str, float]]) -> str:
    names = list(next(iter(by_task.values())))
    lines = ["| largest relative error of c | " + " | ".join(by_task) + " |"]
    lines.append("|---|" + "---|" * len(by_task))
    for name in names:
        engine, _, rest = name.partition(", ")
        cells = [f"{found[name]:.0e}" for found in by_task.values()]
        label = f"`{engine}`" + (f", {rest}" if rest else "")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


# What the figures show, by the name that its colour goes by in other figures; no colour stands for
# two, and the tables have every method.
_KNOWN = {"AdlerScheduleFree": "adler-schedulefree", "Adler": "adler"}
_FIGURE = (
    *_KNOWN,
    "forward",
    "finite_difference",
    "low_cost",
    SCHEDULE_FREE,
    "curvlinops",
    "gen-optim",
)
_COLOURS = colours_of(_KNOWN.get(name, name) for name in _FIGURE)
DRAWN = {name: _COLOURS[_KNOWN.get(name, name)] for name in _FIGURE}


def plot(results: dict[str, Any], file: Path) -> None:
    """Median ratios as bars, a panel a run."""
    runs = [run for run in results["runs"] if run["seconds"]]
    with style():
        figure = _bars(runs)
    save_figure(figure, file.parent, file.stem, [file.suffix])


def _bars(runs: list[dict[str, Any]]) -> Figure:
    figure, axes = panels(len(runs), 1, (10.5, 3.4 * len(runs)))
    for axis, run in zip(axes[:, 0], runs, strict=True):
        names = [name for name in DRAWN if name in run["methods"]]
        networks = run["seconds"]
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            known = [k for k, times in enumerate(networks.values()) if name in times]
            middle = [ratios(times, name) for times in networks.values() if name in times]
            axis.bar(
                [k + (i - len(names) / 2) * width for k in known],
                [m[1] for m in middle],
                width,
                yerr=[[m[1] - m[0] for m in middle], [m[2] - m[1] for m in middle]],
                label=name,
                color=DRAWN[name],
            )
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(range(len(networks)), list(networks), fontsize=8)
        axis.set_ylabel("step time / SGD's")
        axis.set_title(f"{run['device']}, {'compiled' if run['compiled'] else 'eager'}")
    return finish(figure)


def arguments(
    description: str | None, name: str, *, by_network: bool = False
) -> argparse.ArgumentParser:
    """What every benchmark of cost accepts, and what those on `networks.TASKS` do besides."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs") / name)
    parser.add_argument("--figures", type=Path, help="where the figure goes; default: --out")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="tiny; numbers mean nothing")
    if by_network:
        parser.add_argument("--no-peers", action="store_true")
        parser.add_argument("--networks", nargs="+", metavar="n", help="only those that begin so")
    return parser


def chosen(options: argparse.Namespace) -> dict[str, Task]:
    """The networks of a command."""
    tasks = QUICK if options.quick else TASKS[options.device]
    begins = tuple(options.networks or ("",))
    found = {name: task for name, task in tasks.items() if name.startswith(begins)}
    if not found:
        raise SystemExit(f"error: --networks {' '.join(begins)}: none of {', '.join(tasks)}")
    return found


def provenance(options: argparse.Namespace, module: str) -> dict[str, Any]:
    """What every result carries."""
    gpu = [torch.cuda.get_device_name()] if options.device == "cuda" else []
    return {
        "threads": options.threads,
        "machine": ", ".join([*gpu, platform.machine()]),
        "versions": {"torch": torch.__version__, "adler": adler.__version__},
        "command": " ".join(["python -m", module, *sys.argv[1:]]),
    }


def save(
    results: dict[str, Any],
    options: argparse.Namespace,
    name: str,
    show: Callable[[dict[str, Any]], str],
    draw: Callable[[dict[str, Any], Path], None],
) -> None:
    """JSON, table and figure."""
    name += "" if options.device == "cpu" else f"-{options.device}"
    out, figures = options.out, options.figures or options.out
    out.mkdir(parents=True, exist_ok=True)
    figures.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(results))
    (out / f"{name}.md").write_text(show(results))
    draw(results, figures / f"{name}.png")


def main() -> None:
    """The command."""
    parser = arguments(__doc__, "step_cost", by_network=True)
    parser.add_argument("--rounds", type=int, default=80, help=f"a multiple of {BLOCK}")
    parser.add_argument("--compiled", action="store_true", help="also with torch.compile")
    options = parser.parse_args()
    if options.rounds < BLOCK or options.rounds % BLOCK:
        parser.error(f"--rounds {options.rounds}: expected a multiple of {BLOCK}")
    torch.set_num_threads(options.threads)
    rounds = BLOCK if options.quick else options.rounds
    runs: list[dict[str, Any]] = []
    for compiled in (False, True)[: 1 + options.compiled]:
        methods = OURS if options.no_peers else {**OURS, **PEERS}
        runs.append(
            {
                "device": options.device,
                "compiled": compiled,
                "methods": list(COMPILED if compiled else methods),
                "every": BLOCK,
                "seconds": {},
                "failures": {},
            }
        )
    results = provenance(options, "benchmarks.step_cost")
    results |= {"rounds": rounds, "runs": runs, "errors": {}}
    for name, task in tqdm(chosen(options).items()):
        results["errors"][name] = errors(task, 2 if options.quick else 10, options.device)
        for run in runs:
            steppers = {m: {**OURS, **PEERS}[m] for m in run["methods"]}
            times, run["failures"][name] = measure(
                task, steppers, rounds, device=options.device, compiled=run["compiled"]
            )
            run["seconds"][name] = {m: [round(t, 7) for t in ts] for m, ts in times.items()}
            save(results, options, "step_cost", table, plot)  # what is cut keeps what is done
    print(table(results))


if __name__ == "__main__":
    main()
