"""Skips what a package of the benchmarks is missing for, or what PyTorch did not have yet."""

import pytest
import torch

from benchmarks.suite.methods import method

# PyTorch 2.6's own all-gather asks a stream of the CPU for an event, which it cannot record.
fsdp_on_cpu = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="this PyTorch shards on accelerators only"
)


def needing(name):
    found = method(name)
    if found.package is not None:
        reason = f"{found.package}: pip install -e '.[benchmarks]'"
        pytest.importorskip(found.package, reason=reason)
    if name == "muon-cosine-tuned" and not hasattr(torch.optim, "Muon"):
        pytest.skip("PyTorch has Muon since 2.9")
    return found
