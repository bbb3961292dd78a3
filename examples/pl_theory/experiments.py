"""The experiments at initialisation, one function each, and the one call for all."""

from __future__ import annotations

import itertools
import math
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import adler
from adler.curvature import TangentKernel
from adler.diagnostics.gram import Conditioning, conditioning, gram
from adler.diagnostics.theory.infinite_width import eigenvalue_lower_bound, iterated_gram
from examples.pl_theory import inputs, training
from examples.pl_theory.config import Experiment
from examples.pl_theory.networks import activation_of, features, fully_connected
from examples.pl_theory.records import columns, finite

__all__ = [
    "infinite_width",
    "initialisation",
    "random_features",
    "run",
    "scaling_law",
    "tangent_kernel",
]


def run(experiment: Experiment, root: Path | None = None, device: str = "cpu") -> dict[str, Any]:
    """The record of an experiment: what it is, what was found, and by what means.

    Args:
        experiment: Which one.
        root: Directory of the archives.
        device: Where the matrices live. Weights are drawn on the CPU.
    """
    start = time.perf_counter()
    data = inputs.load(
        experiment.dataset,
        root,
        experiment.examples[-1],
        experiment.test_examples,
        experiment.seed,
    )
    data = data._replace(
        **{name: getattr(data, name).to(device) for name in data._fields if name != "classes"}
    )
    work: dict[str, Any] = {
        "initialisation": initialisation,
        "infinite-width": infinite_width,
        "random-features": random_features,
        "tangent-kernel": tangent_kernel,
        "training": training.descend,
    }
    results = work[experiment.kind](experiment, data)
    return {
        **asdict(experiment),
        "examples": list(experiment.examples),
        "results": finite(results),
        "seconds": time.perf_counter() - start,
        "device": device,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__.partition("+")[0],
            "adler": adler.__version__,
        },
    }


# --- at initialisation ----------------------------------------------------------------------------


def initialisation(experiment: Experiment, data: inputs.Inputs) -> dict[str, Any]:
    """Conditioning of the features' Gram matrices, from the inputs (layer 0) to the last layer.

    Features are float32, Gram matrices float64. The Gram matrix of fewer examples is a leading
    block of that of more. Results: ``layers``, by number of examples.
    """
    activation = activation_of(experiment.activation, experiment.renormalised)
    single = data.train_x.float()
    layers = features(single, activation, experiment.width, experiment.depth, experiment.seed)
    found: dict[int, list[Conditioning]] = {n: [] for n in experiment.examples}
    for f in itertools.chain([single], layers):
        _measure(gram(f.double()), found)
    return {"layers": {str(n): columns(rows) for n, rows in found.items()}}


def infinite_width(experiment: Experiment, data: inputs.Inputs) -> dict[str, Any]:
    """The same at infinite width, with the lower bound of the smallest eigenvalue."""
    activation = activation_of(experiment.activation, experiment.renormalised)
    start = gram(data.train_x)
    start = start + torch.diag_embed(1 - start.diagonal())
    found: dict[int, list[Conditioning]] = {n: [] for n in experiment.examples}
    for G in iterated_gram(start, activation, experiment.depth):
        _measure(G, found)
    layers = {}
    for n, rows in found.items():
        bound = eigenvalue_lower_bound(start[:n, :n], activation, experiment.depth)
        layers[str(n)] = {**columns(rows), "lower_bound": bound.tolist()}
    return {"layers": layers}


def _measure(G: Tensor, found: dict[int, list[Conditioning]]) -> None:
    for n, rows in found.items():
        rows.append(conditioning(G[:n, :n]))


def random_features(experiment: Experiment, data: inputs.Inputs) -> dict[str, Any]:
    r"""Singular values of the features, and the scaling law of their ratio.

    Results by number of examples ``N``: ``condition``, largest over smallest singular value of the
    ``(N, width)`` features of the last layer, and ``law``, $\sqrt{N n} / (\sqrt{n} - \sqrt{N})$.
    """
    activation = activation_of(experiment.activation, experiment.renormalised)
    *_, f = features(data.train_x, activation, experiment.width, experiment.depth, experiment.seed)
    found = {}
    for n in experiment.examples:
        values = torch.linalg.svdvals(f[:n])
        found[str(n)] = {
            "largest": float(values[0]),
            "smallest": float(values[-1]),
            "condition": float(values[0] / values[-1]),
            "law": scaling_law(n, experiment.width),
        }
    return {"sizes": found}


def scaling_law(examples: int, width: int) -> float:
    """``√(examples · width) / (√width − √examples)``; infinite where there is no more width."""
    room = math.sqrt(width) - math.sqrt(examples)
    return math.sqrt(examples * width) / room if room > 0 else math.inf


def tangent_kernel(experiment: Experiment, data: inputs.Inputs) -> dict[str, Any]:
    """Smallest eigenvalue of the tangent kernel of a 3-layer network with ``n_1 = 8 N``.

    Layers of width ``8 N`` and ``width``, one output. Inputs have unit norm, so the first layer's
    part of the kernel does not grow with its width; the second layer's does.
    """
    activation = activation_of(experiment.activation, experiment.renormalised)
    x = data.train_x
    widths = (x.shape[1], 8 * len(x), experiment.width, 1)
    model = fully_connected(activation, widths, experiment.seed).to(x.device)
    parts = TangentKernel(model, x).layers()
    values = torch.linalg.eigvalsh(torch.stack(list(parts.values())).sum(0))
    return {
        "first_width": 8 * len(x),
        "smallest": float(values[0]),
        "largest": float(values[-1]),
        "parts": {name: float(torch.linalg.eigvalsh(K)[0]) for name, K in parts.items()},
    }
