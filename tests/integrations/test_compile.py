"""PyTorch's own compiler, inductor: generates code, which takes a while."""

import contextlib
import copy
import shutil
import warnings

import pytest
import torch
import torch._inductor.config
from support.cases import batches, flat, network
from support.loops import train
from support.options import measuring
from torch import nn

from adler import Adler, AdlerScheduleFree

pytestmark = [
    pytest.mark.row("torch.compile, inductor"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # PyTorch's own
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]


@pytest.mark.parametrize("kind", [Adler, AdlerScheduleFree])
@pytest.mark.parametrize("jvp", ["forward", "finite_difference"])
@pytest.mark.parametrize("name", ["batchnorm", "transformer"])
def test_generated_code_takes_the_same_steps(name, jvp, kind):
    torch.compiler.reset()
    model, criterion = network(name), nn.CrossEntropyLoss()
    twin, compiled = copy.deepcopy(model), torch.compile(model)
    data = batches(name, criterion, 4)
    optimizer = kind(model.parameters(), compiled, criterion, **measuring(jvp))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # no fallback
        train(compiled, criterion, optimizer, data)
    plain = kind(twin.parameters(), twin, criterion, **measuring(jvp))
    train(twin, criterion, plain, data)
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("fallback", [False, True])
def test_dropouts_masks_are_the_training_forwards_if_generators_are_pytorchs(fallback):
    torch.compiler.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(), nn.Linear(64, 3)).double()
    criterion, compiled = nn.CrossEntropyLoss(), torch.compile(model)
    optimizer = Adler(model.parameters(), compiled, criterion, **measuring())
    said = contextlib.nullcontext() if fallback else pytest.warns(RuntimeWarning)
    with said, torch._inductor.config.patch(fallback_random=fallback):
        train(compiled, criterion, optimizer, batches("mlp-tanh", criterion, 3))
    # Under other masks another engine measures, or nothing does, and that is said.
    assert bool(optimizer.last_step.trusted) or not fallback
