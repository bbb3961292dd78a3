"""The experiments at initialisation, one function each, and the one call for all."""

from __future__ import annotations

import itertools
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import adler
from adler.curvature import TangentKernel
from adler.diagnostics.gram import Conditioning, conditioning, gram
from adler.diagnostics.theory.infinite_width import eigenvalue_lower_bound, iterated_gram
from examples.pl_theory import inputs, landscapes, training
from examples.pl_theory.config import Experiment
from examples.pl_theory.networks import activation_of, features, fully_connected
from examples.pl_theory.records import columns, finite

__all__ = ["infinite_width", "initialisation", "run", "tangent_kernel"]


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
        experiment.dimension,
    )
    data = data._replace(
        **{name: getattr(data, name).to(device) for name in data._fields if name != "classes"}
    )
    work: dict[str, Any] = {
        "initialisation": initialisation,
        "infinite-width": infinite_width,
        "tangent-kernel": tangent_kernel,
        "training": training.descend,
        "edge": training.descend,
        "perturbation": landscapes.perturbation,
        "connectivity": landscapes.connectivity,
        "mean-field": landscapes.connectivity,
        "ball": landscapes.ball,
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

    Features are float32, Gram matrices float64, of features divided by the root of their number.
    The Gram matrix of fewer examples is a leading block of that of more. Results: ``layers``, by
    number of examples.
    """
    activation = activation_of(experiment.activation)
    x = data.train_x.float()
    layers = features(
        x, activation, experiment.renormalised, experiment.width, experiment.depth, experiment.seed
    )
    found: dict[int, list[Conditioning]] = {n: [] for n in experiment.examples}
    for f in itertools.chain([x], layers):
        _measure(gram(f.double()) / f.shape[1], found)
    return {"layers": {str(n): columns(rows) for n, rows in found.items()}}


def infinite_width(experiment: Experiment, data: inputs.Inputs) -> dict[str, Any]:
    """The same at infinite width, with the lower bounds of the smallest eigenvalue.

    Results: ``lemma_24``, the thesis's bound, and ``combined``, the larger one, beside ``layers``.
    """
    activation = activation_of(experiment.activation)
    start = gram(data.train_x) / data.train_x.shape[1]
    start = start + torch.diag_embed(1 - start.diagonal())
    found: dict[int, list[Conditioning]] = {n: [] for n in experiment.examples}
    for G in iterated_gram(start, activation, experiment.depth):
        _measure(G, found)
    layers = {}
    for n, rows in found.items():
        G, m = start[:n, :n], experiment.depth
        layers[str(n)] = {
            **columns(rows),
            "lemma_24": eigenvalue_lower_bound(G, activation, m, method="lemma-24").tolist(),
            "combined": eigenvalue_lower_bound(G, activation, m).tolist(),
        }
    return {"layers": layers}


def _measure(G: Tensor, found: dict[int, list[Conditioning]]) -> None:
    for n, rows in found.items():
        rows.append(conditioning(G[:n, :n]))


def tangent_kernel(experiment: Experiment, data: inputs.Inputs) -> dict[str, Any]:
    """Smallest eigenvalue of the tangent kernel of a 3-layer ReLU network of first width ``8 N``.

    As in Mondelli's slides: layers of width ``8 N`` and ``width``, one output, plain ReLU, weights
    of variance two over the width of what enters, and inputs of norm ``√d``.
    """
    x = data.train_x
    widths = (x.shape[1], 8 * len(x), experiment.width, 1)
    model = fully_connected(nn.ReLU(), widths, experiment.seed, dtype=x.dtype).to(x.device)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2**0.5)
    parts = TangentKernel(model, x).layers()
    values = torch.linalg.eigvalsh(torch.stack(list(parts.values())).sum(0))
    return {
        "smallest": float(values[0]),
        "largest": float(values[-1]),
        "parts": {name: float(torch.linalg.eigvalsh(K)[0]) for name, K in parts.items()},
    }
