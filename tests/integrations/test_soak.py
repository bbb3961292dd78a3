"""Ten thousand steps on bad batches and changing options: finite, and nothing piles up."""

from __future__ import annotations

import functools
import gc
import os
import random
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from adler import Adler, AdlerAdam, AdlerScheduleFree, Guard, Measure

STEPS, WARM = 10_000, 4_000


def batch(kind, generator):
    """Mostly good, sometimes anything that a loader has been seen to deliver."""
    n = 0 if kind == "empty" else int(torch.randint(1, 9, (), generator=generator))
    x = torch.randn(n, 4, generator=generator)
    y = torch.randint(3, (n,), generator=generator)
    if kind in ("nan", "inf"):
        x[0, 1] = float(kind)
    elif kind == "huge":
        x = x * 10.0 ** int(torch.randint(3, 39, (), generator=generator))
    elif kind == "tiny":
        x = x * 1e-30
    elif kind == "constant":
        x, y = torch.ones_like(x), torch.zeros_like(y)
    elif kind == "zero":
        x = torch.zeros_like(x)
    return x, y


KINDS = ["good"] * 8 + ["nan", "inf", "huge", "tiny", "constant", "zero", "empty"]
CHANGES = {
    "lr": [0.0, 0.1, 1.0, 2.0],
    "weight_decay": [0.0, 1e-4, 0.1],
    "beta": [0.0, 0.9, 0.99],
    "eps": [1e-10, 1e-3],  # 0 would leave the rate on a flat batch without any bound
    "trust_region": [0.5, 1.0, 2.0],
    "max_kl": [None, 0.01, 0.1, 1.0],
    "max_relative_change": [None, 0.01, 0.1],
    "jvp": ["forward", "finite_difference", "double_backward"],
    "every": [1, 2, 5],
    "fraction": [0.25, 0.5, 1.0],
}


MAKERS = {
    "last iterate": functools.partial(Adler, interpolation=None, measure=Measure.every_step()),
    "adam": functools.partial(AdlerAdam, measure=Measure.every_step()),
    "schedule-free": AdlerScheduleFree,
}


def change(optimizer, chance):
    key = chance.choice(list(CHANGES))
    value = chance.choice(CHANGES[key])
    if key in ("lr", "weight_decay"):
        chance.choice(optimizer.param_groups)[key] = value
    elif key in ("beta", "eps"):
        setattr(optimizer, key, value)
    elif key in ("jvp", "every", "fraction"):
        optimizer.measure = replace(optimizer.measure, **{key: value})
    else:
        optimizer.guard = replace(optimizer.guard, **{key: value})


def descriptors():
    return len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0


def resident():
    """In bytes."""
    if sys.platform != "linux":
        return 0
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def live(model, criterion):
    """What must not grow: objects, tensors, files, hooks."""
    gc.collect()
    objects = gc.get_objects()
    modules = [*model.modules(), criterion]
    return {
        "objects": len(objects),
        "tensors": sum(type(o) is torch.Tensor for o in objects),
        "files": descriptors(),
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules),
    }


@pytest.mark.row("Soak")
@pytest.mark.filterwarnings("ignore:the last 10 steps were skipped:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:jvp='finite_difference' contradicts:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:measurement contradicts the training pass:RuntimeWarning")
@pytest.mark.parametrize("kind", MAKERS)
def test_bad_batches_and_changing_options(kind):
    torch.manual_seed(0)
    chance, generator = random.Random(0), torch.Generator().manual_seed(0)
    model, criterion = nn.Linear(4, 3), nn.CrossEntropyLoss()
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.5}]
    optimizer = MAKERS[kind](groups, model, criterion)
    warm, memory, seen = None, 0, set()
    for step in range(STEPS):
        if step % 10 == 0:
            change(optimizer, chance)
        sort = chance.choice(KINDS)
        x, y = batch(sort, generator)
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
        if step % 100 == 0:
            assert all(torch.isfinite(p).all() for p in model.parameters()), (step, sort)
        if bool(optimizer.last_step.skipped):
            seen.add(sort)
        if step == WARM:
            warm, memory = live(model, criterion), resident()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert {"nan", "inf", "empty"} <= seen
    assert optimizer.param_groups[0]["steps"] == STEPS
    end = live(model, criterion)
    assert end["tensors"] <= warm["tensors"] + 2
    assert end["objects"] <= warm["objects"] + 200  # the interpreter's own caches
    assert (end["files"], end["hooks"]) == (warm["files"], warm["hooks"])
    assert resident() - memory < 20e6

    assert all(
        torch.isfinite(t).all() for state in optimizer.state.values() for t in state.values()
    )
    if kind != "last iterate":
        return  # remembers a huge gradient's square, or where it led, for thousands of steps

    # The same optimizer learns on, once the parameters are sane.
    model.reset_parameters()
    for group in optimizer.param_groups:
        group.update(lr=1.0, weight_decay=0.0)
    optimizer.beta, optimizer.eps = 0.9, 1e-10
    optimizer.guard = Guard(2.0, max_kl=None, max_relative_change=None)
    optimizer.measure = Measure.every_step()
    x = torch.randn(60, 4, generator=generator)
    y = x[:, :3].argmax(1)
    for _ in range(300):
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.3
