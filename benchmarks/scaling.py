"""How the cost of a step grows with batch and parameters, over two orders of magnitude.

    pip install -e '.[benchmarks]'
    python -m benchmarks.scaling --out benchmarks/results --figures docs/pages/assets/cost

On multilayer perceptrons. The exponent is the slope of a line through the logarithms of the three
largest sizes: 1 is linear, and smaller where overhead still counts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.networks import Task
from benchmarks.step_cost import BLOCK, arguments, blocks, measure, provenance, save
from benchmarks.steppers import BASE, OURS
from examples.shared.networks import mlp
from examples.shared.plots import colours_of, finish, panels, style
from examples.shared.plots import save as save_figure

METHODS = (BASE, "forward", "finite_difference", "low_cost")


# Width and batch sizes; widths and batch size.
BATCHES = {"cpu": (384, (16, 48, 160, 512, 1600)), "cuda": (2048, (512, 1536, 5120, 16384, 51200))}
WIDTHS = {"cpu": ((128, 256, 512, 900, 1400), 128), "cuda": ((1024, 2048, 4096, 7168, 10240), 2048)}


def batches(device: str, quick: bool) -> dict[int, Task]:
    """By number of examples, at one size of the network."""
    width, sizes = (8, (4, 8, 16)) if quick else BATCHES[device]
    return {b: Task(lambda: mlp(width, (width, width), 10, "relu"), (width,), b) for b in sizes}


def parameters(device: str, quick: bool) -> dict[int, Task]:
    """By number of parameters, at one batch size."""
    found = {}
    widths, batch_size = ((4, 8, 16), 8) if quick else WIDTHS[device]
    for width in widths:

        def build(width: int = width) -> torch.nn.Module:
            return mlp(width, (width, width), 10, "relu")

        with torch.device("meta"):
            count = sum(p.numel() for p in build().parameters())
        found[count] = Task(build, (width,), batch_size)
    return found


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """Slope of a line through the logarithms of the three largest sizes.

    Examples:
        >>> round(exponent([1, 10, 100, 1000], [5.0, 1.0, 10.0, 100.0]), 6)
        1.0
    """
    return float(np.polyfit(np.log(sizes[-3:]), np.log(seconds[-3:]), 1)[0])


def _medians(series: dict[str, Any], method: str) -> tuple[list[int], list[float]]:
    sizes = [int(size) for size in series]
    return sizes, [float(np.median(blocks(times[method]))) / BLOCK for times in series.values()]


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    parts = []
    for run in results["runs"]:
        for what, series in run["series"].items():
            sizes, base = _medians(series, BASE)
            lines = [
                f"| {what} ({run['device']}) | "
                + " | ".join(f"{s:,}" for s in sizes)
                + " | exponent |"
            ]
            lines.append("|---|" + "---|" * (len(sizes) + 1))
            for method in METHODS:
                _, seconds = _medians(series, method)
                cells = [
                    f"{1000 * s:.2f} ms" if method == BASE else f"{s / b:.2f}"
                    for s, b in zip(seconds, base, strict=True)
                ]
                label = method if method == BASE else f"`{method}`"
                lines.append(
                    f"| {label} | " + " | ".join(cells) + f" | {exponent(sizes, seconds):.2f} |"
                )
            parts.append("\n".join(lines) + "\n")
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    parts.append(
        f"Medians over {results['rounds']} interleaved steps, over SGD's; {results['threads']} CPU "
        f"thread(s), {results['machine']}, {versions}, fixed seeds. Written by "
        f"`{results['command']}`.\n"
    )
    return "\n".join(parts)


def plot(results: dict[str, Any], file: Path) -> None:
    """Seconds a step over size, on logarithmic axes."""
    with style():
        figure = _lines(results["runs"])
    save_figure(figure, file.parent, file.stem, [file.suffix])


def _lines(runs: list[dict[str, Any]]) -> Figure:
    figure, axes = panels(len(runs), 2, (9, 3.6 * len(runs)))
    colours = colours_of("sgd" if method == BASE else method for method in METHODS)
    for row, run in zip(axes, runs, strict=True):
        for axis, (what, series) in zip(row, run["series"].items(), strict=True):
            for method in METHODS:
                colour = colours["sgd" if method == BASE else method]
                axis.loglog(*_medians(series, method), color=colour, marker="o", label=method)
            axis.set_xlabel(what)
            axis.set_ylabel(f"seconds a step, {run['device']}")
    return finish(figure)


def main() -> None:
    """The command."""
    parser = arguments(__doc__, "scaling")
    parser.add_argument("--rounds", type=int, default=24, help=f"a multiple of {BLOCK}")
    options = parser.parse_args()
    if options.rounds < BLOCK or options.rounds % BLOCK:
        parser.error(f"--rounds {options.rounds}: expected a multiple of {BLOCK}")
    torch.set_num_threads(options.threads)
    rounds = BLOCK if options.quick else options.rounds
    run: dict[str, Any] = {"device": options.device, "series": {}}
    for what, build in {"examples": batches, "parameters": parameters}.items():
        run["series"][what] = {
            str(size): measure(task, {m: OURS[m] for m in METHODS}, rounds, device=options.device)[
                0
            ]
            for size, task in tqdm(build(options.device, options.quick).items(), what)
        }
    runs = [run]
    results = {**provenance(options, "benchmarks.scaling"), "rounds": rounds, "runs": runs}
    save(results, options, "scaling", table, plot)
    print(table(results))


if __name__ == "__main__":
    main()
