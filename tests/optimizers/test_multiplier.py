"""A learning rate of another optimizer is not taken for a multiplier without a word."""

import math
import warnings

import pytest
import torch
from support.cases import batches, network
from support.loops import train
from torch import nn
from torch.optim import lr_scheduler

from adler import Adler, AdlerAdam, AdlerScheduleFree

KINDS = [Adler, AdlerAdam, AdlerScheduleFree]
STEPS = 300


def said(rate, steps=STEPS, kind=Adler, start=0):
    """Messages of a run in which the loop writes ``rate(k)`` into every group."""
    model, criterion = nn.Linear(4, 3).double(), nn.CrossEntropyLoss()
    optimizer = kind(model.parameters(), model, criterion)
    data = batches("linear", criterion, 1) * steps
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for k, batch in enumerate(data[start:], start=start):
            for group in optimizer.param_groups:
                group["lr"] = rate(k)
            train(model, criterion, optimizer, [batch])
    return [str(w.message) for w in caught if "multiplies the measured" in str(w.message)]


def warm_up(most, over):
    return lambda k: most * min(1.0, (k + 1) / over)


@pytest.mark.parametrize("kind", KINDS)
def test_a_foreign_rate_is_said_once_within_the_first_steps(kind):
    (message,) = said(lambda k: 6e-4, steps=10, kind=kind)
    assert "lr=0.0006" in message
    assert "1667 times" in message
    assert "delete it" in message


@pytest.mark.parametrize(
    "rate",
    [warm_up(6e-4, 100), warm_up(1e-3, 5), lambda k: 0.01 * 0.99**k],
    ids=["warm-up", "short warm-up", "decay"],
)
def test_foreign_schedules_are_said_when_they_no_longer_rise(rate):
    assert len(said(rate)) == 1


@pytest.mark.parametrize(
    "rate",
    [
        lambda k: 1.0,
        lambda k: (1 + math.cos(math.pi * k / STEPS)) / 2,
        warm_up(1.0, 250),
        warm_up(1.0, 10_000),
        lambda k: 0.1,
        lambda k: 0.0,
    ],
    ids=["one", "cosine", "warm-up", "long warm-up", "a tenth", "frozen"],
)
def test_legitimate_multipliers_are_quiet(rate):
    assert not said(rate)


def test_a_run_resumed_at_the_end_of_its_schedule_is_quiet():
    model, criterion = network("mlp-tanh"), nn.CrossEntropyLoss()
    optimizer = Adler(model.parameters(), model, criterion)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 20)
    data = batches("mlp-tanh", criterion, 30)
    for batch in data[:18]:
        train(model, criterion, optimizer, [batch])
        scheduler.step()
    other = Adler(model.parameters(), model, criterion)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] < 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, criterion, other, data[18:])


def test_one_group_at_its_default_keeps_it_quiet():
    """Others may be slowed down on purpose."""
    model, criterion = network("mlp-tanh"), nn.CrossEntropyLoss()
    groups = [{"params": model[0].parameters(), "lr": 1e-3}, {"params": model[2].parameters()}]
    optimizer = Adler(groups, model, criterion)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, criterion, optimizer, batches("mlp-tanh", criterion, 12))
    assert torch.is_tensor(optimizer.param_groups[0]["effective_lr"])
