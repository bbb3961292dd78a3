"""Skips what a package of the benchmarks is missing for."""

import pytest
import torch

from benchmarks.suite.methods import method


def needing(name):
    found = method(name)
    if found.package is not None:
        reason = f"{found.package}: pip install -e '.[benchmarks]'"
        pytest.importorskip(found.package, reason=reason)
    if name == "muon-cosine-tuned" and not hasattr(torch.optim, "Muon"):
        pytest.skip("PyTorch has Muon since 2.9")
    return found
