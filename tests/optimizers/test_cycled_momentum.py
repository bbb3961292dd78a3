"""Schedulers that cycle a momentum do not move what is none of theirs."""

import copy
import warnings

import pytest
import torch
from support.cases import batches, flat, network
from support.loops import train
from torch import nn
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from adler import Adler, AdlerAdam, AdlerMuon, AdlerScheduleFree

KINDS = [Adler, AdlerAdam, AdlerMuon, AdlerScheduleFree]
DATA = batches("mlp-tanh", nn.CrossEntropyLoss(), 8)
SCHEDULES = {
    "OneCycleLR": lambda o, **options: OneCycleLR(o, 1.0, 9, **options),
    "CyclicLR": lambda o, **options: CyclicLR(o, 0.1, 1.0, 2, **options),
}


def run(kind, schedule, cycles):
    """The loop of everybody, with a look at the average in between."""
    model, criterion = network("mlp-tanh"), nn.CrossEntropyLoss()
    optimizer = kind(model.parameters(), model, criterion)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scheduler = schedule(optimizer, cycle_momentum=cycles)
        for batch in DATA:
            model.train()
            train(model, criterion, optimizer, [batch])
            scheduler.step()
            model.eval()
            with torch.no_grad():
                model(batch[0])
    said = [str(w.message) for w in caught if "cycles the momentum" in str(w.message)]
    return model, optimizer, said


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_cycle_of_the_momentum_is_ignored_and_said_once(kind, schedule):
    model, optimizer, said = run(kind, schedule, True)
    other, plain, quiet = run(kind, schedule, False)
    assert flat(model).equal(flat(other))
    assert len(said) == 1
    assert "cycle_momentum=False" in said[0]
    assert not quiet
    keys = ("momentum", "betas")
    own, theirs = optimizer.state_dict()["param_groups"][0], plain.param_groups[0]
    assert [own.get(key) for key in keys] == [theirs.get(key) for key in keys]


def test_checkpoints_and_copies_hold_the_users_momentum():
    _, optimizer, _ = run(AdlerScheduleFree, SCHEDULES["OneCycleLR"], True)
    optimizer.param_groups[0]["betas"] = (0.95, 0.999)  # as a scheduler's next step would
    assert copy.deepcopy(optimizer).param_groups[0]["betas"][0] == 0.9
    optimizer.param_groups[0]["betas"] = (0.95, 0.999)
    assert optimizer.state_dict()["param_groups"][0]["betas"][0] == 0.9


def test_a_momentum_that_the_user_changes_is_used():
    model, criterion = network("mlp-tanh"), nn.CrossEntropyLoss()
    optimizer = Adler(model.parameters(), model, criterion, interpolation=None)
    train(model, criterion, optimizer, DATA[:1])
    optimizer.param_groups[0]["momentum"] = 0.8
    train(model, criterion, optimizer, DATA[1:])
    assert optimizer.param_groups[0]["momentum"] == 0.8
