"""Peak memory of training steps over that of SGD: this library's modes and its peers.

    pip install -e '.[benchmarks]'
    python -m benchmarks.memory --out benchmarks/results --figures docs/pages/assets/cost

On the CPU the peak is that of PyTorch's allocator: every allocation and release that the profiler
saw during a few steps, added up, on top of what lived before (parameters, buffers, gradients, the
optimizer's state, the batch). On a GPU it is `torch.cuda.max_memory_allocated`. Nothing is timed.
"""

from __future__ import annotations

import gc
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from benchmarks.networks import Task
from benchmarks.step_cost import BLOCK, DRAWN, arguments, chosen, provenance, save
from benchmarks.steppers import BASE, OURS, PEERS, Step, Stepper
from examples.shared.plots import finish, panels, style
from examples.shared.plots import save as save_figure


def cpu_peak(step: Step, task: Task, resident: int, steps: int) -> int:
    """Bytes at the peak of some steps."""
    x, y = task.batch()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        for _ in range(steps):
            step(x, y)
    assert profiled.profiler is not None
    events = profiled.profiler.kineto_results.events()
    changes = sorted(
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    )
    return resident + max(accumulate(size for _, size in changes), default=0)


def cuda_peak(step: Step, task: Task, steps: int) -> int:
    """Bytes at the peak of some steps."""
    x, y = task.batch("cuda")
    torch.cuda.reset_peak_memory_stats()
    for _ in range(steps):
        step(x, y)
    return torch.cuda.max_memory_allocated()


def measure(task: Task, stepper: Stepper, steps: int, device: str) -> int:
    """Bytes at the peak, once the method has made its state."""
    gc.collect()
    model = task.network(device)
    step = stepper(model, nn.CrossEntropyLoss())
    x, y = task.batch(device)
    for _ in range(2):
        step(x, y)
    if device == "cuda":
        return cuda_peak(step, task, steps)
    tensors = [*model.parameters(), *model.buffers(), x, y]
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    return cpu_peak(step, task, sum(t.numel() * t.element_size() for t in tensors), steps)


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    parts = []
    for run in results["runs"]:
        networks = list(run["bytes"])
        lines = [f"| peak memory over SGD's ({run['device']}) | " + " | ".join(networks) + " |"]
        lines.append("|---|" + "---|" * len(networks))
        cells = [f"{found[BASE] / 2**20:.1f} MiB" for found in run["bytes"].values()]
        lines.append(f"| {BASE} | " + " | ".join(cells) + " |")
        for name in run["methods"]:
            if name == BASE:
                continue
            cells = [
                f"{found[name] / found[BASE]:.2f}" if name in found else "fails"
                for found in run["bytes"].values()
            ]
            label = f"`{name}`" if name in OURS and " " not in name else name
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines) + "\n")
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    parts.append(
        f"Allocated bytes at the peak of {results['steps']} steps; {versions}, fixed seeds. "
        f"Written by `{results['command']}`.\n"
    )
    return "\n".join(parts)


def plot(results: dict[str, Any], file: Path) -> None:
    """Ratios as bars, a panel a device."""
    with style():
        figure = _bars(results["runs"])
    save_figure(figure, file.parent, file.stem, [file.suffix])


def _bars(runs: list[dict[str, Any]]) -> Figure:
    figure, axes = panels(len(runs), 1, (10.5, 3.4 * len(runs)))
    for axis, run in zip(axes[:, 0], runs, strict=True):
        names = [name for name in DRAWN if name in run["methods"]]
        for i, name in enumerate(names):
            known = [(k, f) for k, f in enumerate(run["bytes"].values()) if name in f]
            at = [k + (i - len(names) / 2) * 0.8 / len(names) for k, _ in known]
            width, heights = 0.8 / len(names), [f[name] / f[BASE] for _, f in known]
            axis.bar(at, heights, width, label=name, color=DRAWN[name])
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(range(len(run["bytes"])), list(run["bytes"]), fontsize=8)
        axis.set_ylabel("peak memory / SGD's")
        axis.set_title(run["device"])
    return finish(figure)


def main() -> None:
    """The command."""
    parser = arguments(__doc__, "memory", by_network=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    methods = OURS if options.no_peers else {**OURS, **PEERS}
    steps = 1 if options.quick else BLOCK
    found: dict[str, dict[str, int]] = {}
    runs = [{"device": options.device, "methods": list(methods), "bytes": found}]
    results = {**provenance(options, "benchmarks.memory"), "steps": steps, "runs": runs}
    for name, task in tqdm(chosen(options).items()):
        found[name] = {}
        for method, stepper in methods.items():
            try:
                found[name][method] = measure(task, stepper, steps, options.device)
            except Exception:
                # A peer that cannot do this network is reported, not hidden.
                if method in OURS:
                    raise
        save(results, options, "memory", table, plot)
    print(table(results))


if __name__ == "__main__":
    main()
