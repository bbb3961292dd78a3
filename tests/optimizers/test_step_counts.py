"""Equal counts of steps are known without a look at them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import flat, network
from support.loops import NoSynchronisation, train
from torch import nn

from adler import Adler, AdlerAdam, AdlerScheduleFree

KINDS = {
    "averaged": Adler,
    "momentum": lambda *args: Adler(*args, momentum=0.9),
    "momentum, last iterate": lambda *args: Adler(*args, momentum=0.9, interpolation=None),
    "adam": AdlerAdam,
    "schedule-free": AdlerScheduleFree,
}


def grown(model, criterion, present, finite):
    """Gradients of a step at which only some parameters are, and which may be skipped."""
    x, y = torch.randn(4, 4).double(), torch.randint(3, (4,))
    loss = criterion(model(x), y)
    (loss if finite else loss * float("nan")).backward()
    for p, there in zip(model.parameters(), present):
        if not there:
            p.grad = None


@pytest.mark.filterwarnings("ignore:.*were skipped")
@pytest.mark.parametrize("kind", KINDS)
@given(
    steps=st.lists(
        st.tuples(st.lists(st.booleans(), min_size=4, max_size=4).filter(any), st.booleans()),
        max_size=6,
    ),
    loads_at=st.integers(0, 6),
)
@settings(max_examples=30, deadline=None)
def test_what_is_said_to_be_equal_is(kind, steps, loads_at):
    model, criterion = network("mlp-tanh"), nn.CrossEntropyLoss()
    optimizer = KINDS[kind](model.parameters(), model, criterion)
    for number, (present, finite) in enumerate(steps):
        optimizer.zero_grad()
        grown(model, criterion, present, finite)
        if number == loads_at:
            optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
        (group,) = optimizer.param_groups
        _, equal = optimizer._step_counts._last[0]
        here = [p for p in group["params"] if p.grad is not None]
        counts = {float(optimizer.state[p]["step"]) for p in here}
        assert not equal or len(counts) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_loop_needs_no_factor_for_each_and_waits_only_after_loading(kind):
    model, criterion = network("mlp-tanh"), nn.CrossEntropyLoss()
    optimizer = KINDS[kind](model.parameters(), model, criterion)
    for reload in (False, False, True, False):
        if reload:
            optimizer.load_state_dict(optimizer.state_dict())
            train(model, criterion, optimizer, [(torch.randn(4, 4).double(), torch.arange(4) % 3)])
        optimizer.zero_grad()
        grown(model, criterion, [True] * 4, True)
        with NoSynchronisation():
            optimizer.step()
        assert optimizer._step_counts._last[0][1]


@pytest.mark.parametrize("kind", KINDS)
def test_one_factor_for_all_gives_the_steps_of_one_for_each(kind, monkeypatch):
    found = []
    for known in (True, False):
        model, criterion = network("mlp-tanh"), nn.CrossEntropyLoss()
        optimizer = KINDS[kind](model.parameters(), model, criterion)
        if not known:
            monkeypatch.setattr(
                "adler._optimizers.step_counts.StepCounts.all_equal",
                lambda self, groups, state: {id(group): False for group in groups},
            )
        torch.manual_seed(0)
        for _ in range(5):
            optimizer.zero_grad()
            grown(model, criterion, [True] * 4, True)
            optimizer.step()
        found.append(flat(model))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_that_were_frozen_with_a_gradient_have_had_fewer_steps(kind):
    model, criterion = network("mlp-tanh"), nn.CrossEntropyLoss()
    optimizer = KINDS[kind](model.parameters(), model, criterion)
    first = next(iter(model.parameters()))
    for frozen in (False, False, True, True, False):
        first.requires_grad_(not frozen)
        optimizer.zero_grad(set_to_none=False)
        grown(model, criterion, [True] * 4, True)
        optimizer.step()
        assert first.grad is not None
    assert float(optimizer.state[first]["step"]) == 3
    assert not optimizer._step_counts._last[0][1]
