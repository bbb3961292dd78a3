"""Do Muon's two blocks want two rates? ``python -m benchmarks.muon_blocks --data DIR``.

`AdlerMuon` moves orthogonalised matrices and Adam's parameters by one measured rate. Two things are
measured on tasks of the suite:

- the test loss after one epoch where either block moves by a multiple of that rate;
- along the run with one rate, the two rates that minimise a minibatch's quadratic model together,
  from ``A_ij = (J d_i)ᵀ Q (J d_j)`` and ``b_i = g·d_i``, both averaged over the run before solving.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import adler
from adler.curvature import Objective
from benchmarks.suite.run import evaluate, minibatches
from benchmarks.suite.tasks import TASKS, Task
from benchmarks.suite.trials import Trial

__all__ = ["main"]

_RESULTS = Path(__file__).parent / "results"
_TASKS = ("long/novels/transformer", "long/cifar10/vit")
# Of the measured rate: of the matrices, and of the rest.
_FACTORS = ((1.0, 1.0), (4.0, 1.0), (2.0, 1.0), (1.0, 0.5), (1.0, 2.0), (1.0, 0.25), (1.0, 4.0))
_GUARD = adler.Guard()  # wider than `AdlerMuon`'s own, under which a longer step is cut
_EVERY = 40  # steps between two looks at the blocks


def _blocks(model: nn.Module, factors: tuple[float, float]) -> Iterator[dict[str, Any]]:
    chosen = set(adler.hidden_matrices(model))
    for orthogonal, factor in zip((True, False), factors, strict=True):
        params = [p for name, p in model.named_parameters() if (name in chosen) == orthogonal]
        yield {"params": params, "lr": factor}


def _look(
    optimizer: adler.AdlerMuon, criterion: nn.Module, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """``A`` and ``b`` of this minibatch, whose gradients are there."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in params if p.grad is not None]
    direction = optimizer._direction(params, gradients)
    direction.look(gradients, gradients[0].device, measured=True)
    along = direction.along
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    objective = Objective(optimizer.model, x, y, criterion, params)
    first = [d if i < sizes[0] else torch.zeros_like(d) for i, d in enumerate(along)]
    second = [d - e for d, e in zip(along, first, strict=True)]
    products = [list(objective.ggn(d).values()) for d in (first, second)]
    blocks = (first, second)
    a = torch.tensor([[_dot(d, product) for product in products] for d in blocks])
    return a.double(), torch.tensor([_dot(d, gradients) for d in blocks]).double()


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return float(sum((x * y).sum() for x, y in zip(a, b, strict=True)))


def _run(task: Task, factors: tuple[float, float], root: Path, seed: int) -> dict[str, Any]:
    examples = task.load(root, task.pool or task.train_examples, task.test_examples)
    model, criterion = task.build(seed, examples), task.criterion()
    optimizer = adler.AdlerMuon(_blocks(model, factors), model, criterion, guard=_GUARD)
    sizes = {"train_examples": task.train_examples, "test_examples": task.test_examples}
    trial = Trial(task.name, "adler-muon", None, seed, epochs=1, **sizes)
    seen = []
    for k, (x, y) in enumerate(minibatches(trial, task, examples, 0)):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        if factors == (1.0, 1.0) and k % _EVERY == 0 and k:
            seen.append(_look(optimizer, criterion, x, y))
        optimizer.step()
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        optimizer.eval()
        batches = (x for x, _ in minibatches(trial, task, examples, 1))
        torch.optim.swa_utils.update_bn((x for x, _ in zip(batches, range(50))), model)  # noqa: B905
    model.eval()
    found = {
        "task": task.name,
        "matrices": factors[0],
        "rest": factors[1],
        "seed": seed,
        "steps": k + 1,
    }
    found |= evaluate(task, model, examples)
    if seen:
        a, b = (torch.stack(list(part)).mean(0) for part in zip(*seen, strict=True))
        together, alone = torch.linalg.solve(a, b), b.sum() / a.sum()
        found |= {
            "rates_over_the_common_one": (together / alone).tolist(),
            "without_cross_terms": (b / a.diagonal() / alone).tolist(),
            "cross_term": float(a[0, 1] / (a[0, 0] * a[1, 1]).sqrt()),
            "looks": len(seen),
        }
    return {**found, "versions": {"torch": torch.__version__, "adler": adler.__version__}}


def _markdown(records: Sequence[dict[str, Any]]) -> str:
    lines = [
        "# One rate for both of Muon's blocks",
        "",
        "<!-- --8<-- [start:table] -->",
        "",
        "`python -m benchmarks.muon_blocks`, one seed, one epoch (about 800 steps); no tensor moves"
        " by more than 0.02 of its initial norm in a step. Test loss where the matrices, or all"
        " that is not a hidden matrix, move by a multiple of the measured"
        " rate:",
        "",
        "| task | " + " | ".join(map(_title, _FACTORS)) + " |",
        "|---|" + "---|" * len(_FACTORS),
    ]
    names = list(dict.fromkeys(r["task"] for r in records))
    for name in names:
        losses = {(r["matrices"], r["rest"]): r["test_loss"] for r in records if r["task"] == name}
        row = (f"{losses[f]:.3f}" if f in losses else "" for f in _FACTORS)
        lines.append(f"| {name} | {' | '.join(row)} |")
    lines += [
        "",
        "The two rates that minimise the averaged model together, over the common one; what each"
        " would be if the other did not move; and the correlation of the two blocks' changes of the"
        " outputs, $A_{12} / \\sqrt{A_{11} A_{22}}$:",
        "",
        "| task | matrices | the rest | matrices alone | the rest alone | correlation |",
        "|---|---|---|---|---|---|",
    ]
    for r in records:
        if "cross_term" in r:
            numbers = [*r["rates_over_the_common_one"], *r["without_cross_terms"], r["cross_term"]]
            lines.append(f"| {r['task']} | {' | '.join(f'{x:.2f}' for x in numbers)} |")
    return "\n".join([*lines, "", "<!-- --8<-- [end:table] -->", ""])


def _title(factors: tuple[float, float]) -> str:
    named = zip(("matrices", "rest"), factors, strict=True)
    return ", ".join(f"{name} {f:g}" for name, f in named if f != 1.0) or "one rate"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing, and writes the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.muon_blocks")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=_TASKS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=_RESULTS)
    options = parser.parse_args(argv)
    path = options.results / "muon_blocks.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(r["task"], r["matrices"], r["rest"], r["seed"]) for r in records}
    for name in options.tasks:
        for factors in _FACTORS:
            if (name, *factors, options.seed) in done:
                continue
            records.append(_run(TASKS[name], factors, options.data, options.seed))
            with path.open("a") as file:
                file.write(json.dumps(records[-1]) + "\n")
    (options.results / "muon_blocks.md").write_text(_markdown(records))


if __name__ == "__main__":
    main()
