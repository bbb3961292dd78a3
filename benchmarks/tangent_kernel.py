"""Tangent kernels and extreme eigenvalues: this library, curvlinops, and the usual recipe.

    pip install -e '.[benchmarks]'
    python -m benchmarks.tangent_kernel --out benchmarks/results

Every answer is compared with the reference (a float64 Jacobian, made dense), so that none is fast
and wrong. The contestants take turns, round by round; the table shows medians of the ratio to this
library's time in the same round, with quartiles.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from tqdm import tqdm

import adler
from adler.curvature import Objective
from adler.diagnostics import TangentKernel, ggn_largest_eigenvalue

# network, shape of an example, examples; ten outputs each
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {}


def network(name: str, shape: tuple[int, ...], examples: int) -> Callable[..., Any]:
    """Enters a network into the comparison."""

    def enter(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        NETWORKS[name] = (make, shape, examples)
        return make

    return enter


@network("MLP", (256,), 50)
def mlp() -> nn.Module:
    """Three linear layers."""
    return nn.Sequential(
        nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )


@network("CNN", (3, 16, 16), 30)
def cnn() -> nn.Module:
    """Two convolutions and two linear layers."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


@network("CNN + BatchNorm", (3, 16, 16), 20)
def cnn_bn() -> nn.Module:
    """Examples see each other: no kernel layer by layer."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(4),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


class Setting:
    """A network on its examples, and the reference."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        make, shape, examples = NETWORKS[name]
        self.model, self.criterion = make(), nn.CrossEntropyLoss()
        self.x, self.y = torch.randn(examples, *shape), torch.randint(10, (examples,))
        self.params = list(self.model.parameters())
        self.v = torch.randn(10 * examples)
        exact = copy.deepcopy(self.model).double()
        J = _jacobian(exact, self.x.double())
        p = exact(self.x.double()).softmax(1).detach()
        roots = torch.linalg.cholesky(
            torch.diag_embed(p) - p[:, :, None] * p[:, None] + 1e-12 * torch.eye(10)
        )
        half = (roots.mT @ J.view(examples, 10, -1)).flatten(0, 1) / examples**0.5
        K = J @ J.T
        self.reference: dict[str, Tensor] = {
            "product K v": K @ self.v.double(),
            "dense K": K,
            "λ_max of K": torch.linalg.eigvalsh(K)[-1],
            "λ_max of the GGN": torch.linalg.eigvalsh(half @ half.T)[-1],
        }


def _jacobian(model: nn.Module, x: Tensor) -> Tensor:
    F = model(x).flatten()
    params = list(model.parameters())
    rows = [torch.autograd.grad(out, params, retain_graph=True) for out in F]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


# --- contestants ---------------------------------------------------------------------------------


def ours(s: Setting) -> dict[str, Callable[[], Any]]:
    """This library."""
    return {
        "product K v": lambda: TangentKernel(s.model, s.x).matvec(s.v),
        "dense K": lambda: TangentKernel(s.model, s.x).to_dense(),
        "λ_max of K": lambda: TangentKernel(s.model, s.x).largest_eigenvalue(),
        "λ_max of the GGN": lambda: ggn_largest_eigenvalue(
            Objective(s.model, s.x, s.y, s.criterion)
        ),
    }


def curvlinops(s: Setting) -> dict[str, Callable[[], Any]]:
    """`curvlinops-for-pytorch`: operators composed, and SciPy's Lanczos on them."""
    from curvlinops import (  # only who measures needs it
        GGNLinearOperator,
        JacobianLinearOperator,
        TransposedJacobianLinearOperator,
    )

    data: Any = [(s.x, s.y)]

    def kernel() -> tuple[Any, Any]:
        J = JacobianLinearOperator(s.model, s.params, data, check_deterministic=False)
        JT = TransposedJacobianLinearOperator(s.model, s.params, data, check_deterministic=False)
        return J, JT

    def product(v: Tensor) -> Tensor:
        J, JT = kernel()
        found: Tensor = J @ (JT @ v)
        return found

    def largest() -> float:
        J, JT = kernel()
        n = len(s.v)
        operator = LinearOperator(
            (n, n),
            matvec=lambda v: (J @ (JT @ torch.as_tensor(v, dtype=torch.float32))).numpy(),
            dtype="float32",
        )
        return float(eigsh(operator, 1, which="LA", return_eigenvectors=False)[0])

    def ggn() -> float:
        G = GGNLinearOperator(s.model, s.criterion, s.params, data, check_deterministic=False)
        return float(eigsh(G.to_scipy(), 1, which="LA", tol=1e-4, return_eigenvectors=False)[0])

    return {
        "product K v": lambda: product(s.v),
        "dense K": lambda: product(torch.eye(len(s.v))),
        "λ_max of K": largest,
        "λ_max of the GGN": ggn,
    }


def recipe(s: Setting) -> dict[str, Callable[[], Any]]:
    """Per-example Jacobians by `torch.func`, contracted: PyTorch's tutorial on tangent kernels."""
    params = {name: p.detach() for name, p in s.model.named_parameters()}

    def dense() -> Tensor:
        def one(p: dict[str, Tensor], x: Tensor) -> Tensor:
            found: Tensor = functional_call(s.model, p, (x[None],))[0]
            return found

        jacobians = vmap(jacrev(one), (None, 0))(params, s.x)
        n = len(s.v)
        K = torch.zeros(n, n)
        for j in jacobians.values():
            rows = j.flatten(2).flatten(0, 1)
            K += rows @ rows.T
        return K

    return {
        "dense K": dense,
        "λ_max of K": lambda: float(torch.linalg.eigvalsh(dense())[-1]),
    }


CONTESTANTS = {"adler": ours, "curvlinops": curvlinops, "torch.func recipe": recipe}


def measure(name: str, rounds: int) -> dict[str, dict[str, Any]]:
    """By task and contestant: seconds of each round, and the error."""
    setting = Setting(name)
    found: dict[str, dict[str, Any]] = {}
    works = {contestant: make(setting) for contestant, make in CONTESTANTS.items()}
    for task, reference in setting.reference.items():
        rows: dict[str, Any] = {}
        for contestant, tasks in works.items():
            if task not in tasks:
                continue
            try:
                answer = torch.as_tensor(tasks[task]()).detach().double()
            except (RuntimeError, ValueError) as failure:  # BatchNorm of one example
                rows[contestant] = {"failed": str(failure).splitlines()[0]}
                continue
            error = float((answer - reference).norm() / reference.norm())
            rows[contestant] = {"seconds": [], "error": float(f"{error:.2g}")}
        for _ in range(rounds):
            for contestant, row in rows.items():
                if "failed" in row:
                    continue
                begun = time.perf_counter()
                works[contestant][task]()
                row["seconds"].append(round(time.perf_counter() - begun, 6))
        found[task] = rows
    return found


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    peers = [name for name in CONTESTANTS if name != "adler"]
    lines = [
        "| network | task | adler, ms | error | "
        + " | ".join(f"{p} | error" for p in peers)
        + " |",
        "|---|---|---|---|" + "---|---|" * len(peers),
    ]
    for network_name, tasks in results["networks"].items():
        for task, rows in tasks.items():
            base = rows["adler"]["seconds"]
            cells = [f"{1e3 * statistics.median(base):.1f}", f"{rows['adler']['error']:.0e}"]
            for peer in peers:
                row = rows.get(peer)
                if row is None:
                    cells += ["–", "–"]
                elif "failed" in row:
                    cells += ["fails", "–"]
                else:
                    ratios = np.asarray(row["seconds"]) / np.asarray(base)
                    low, middle, high = np.percentile(ratios, [25, 50, 75])
                    cells += [f"{middle:.1f}× ({low:.1f}–{high:.1f})", f"{row['error']:.0e}"]
            lines.append(f"| {network_name} | {task} | " + " | ".join(cells) + " |")
    versions = ", ".join(f"{name} {value}" for name, value in results["versions"].items())
    lines += [
        "",
        f"Medians of {results['rounds']} interleaved rounds; peers as multiples of adler's time in "
        f"the same round (quartiles), and the relative error against a float64 Jacobian. "
        f"{results['threads']} CPU thread, {results['machine']}, {versions}. Written by "
        "`python -m benchmarks.tangent_kernel`.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/tangent_kernel"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = {
        "rounds": options.rounds,
        "threads": options.threads,
        "machine": platform.machine(),
        "versions": {
            "torch": torch.__version__,
            "adler": adler.__version__,
            "curvlinops": importlib.metadata.version("curvlinops-for-pytorch"),
        },
        "networks": {name: measure(name, options.rounds) for name in tqdm(NETWORKS)},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "tangent_kernel.json").write_text(json.dumps(results, ensure_ascii=False))
    (options.out / "tangent_kernel.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
