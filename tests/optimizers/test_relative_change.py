"""No tensor moves by more than a fraction of its initial norm; it is shortened alone."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import batches, network
from support.loops import train
from torch import nn

from adler import Adler, AdlerAdam, AdlerScheduleFree, Guard, Measure, wrap
from adler._optimizers.relative_change import RelativeChange

KINDS = {
    "adler": Adler,
    "last-iterate": lambda *args, **options: Adler(*args, interpolation=None, **options),
    "adam": AdlerAdam,
    "schedule-free": AdlerScheduleFree,
    "wrapped": lambda params, *args, **options: wrap(
        torch.optim.SGD(list(params), lr=1.0), *args, **options
    ),
}
EXACT = Measure.every_step()


def size(p):
    return max(float(p.norm()), math.sqrt(p.shape[0] / 3))


def drift(optimizer, p):
    """What moves y beside its own step: towards z, by the new iterate's share of the average."""
    mine = optimizer.state[p]
    if "z" not in mine:
        return torch.zeros_like(p)
    return (mine["z"] - p.detach()) / (float(mine["step"]) + 1)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 1000), fraction=st.sampled_from([1e-3, 0.02, 0.3]))
def test_no_tensor_moves_further(kind, seed, fraction):
    model, criterion = network("mlp-tanh", seed), nn.CrossEntropyLoss()
    guard = Guard(trust_region=None, max_relative_change=fraction)
    optimizer = KINDS[kind](model.parameters(), model, criterion, guard=guard, measure=EXACT)
    bounds = {p: fraction * size(p.detach()) for p in model.parameters()}
    shortened = 0
    for batch in batches("mlp-tanh", criterion, 6, seed=seed):
        before = {p: p.detach() + drift(optimizer, p) for p in model.parameters()}
        train(model, criterion, optimizer, [batch])
        moves = {p: float((p.detach() - before[p]).norm()) for p in model.parameters()}
        assert all(moves[p] <= bounds[p] * (1 + 1e-9) for p in moves)
        shortened += sum(moves[p] > bounds[p] * (1 - 1e-6) for p in moves)
    if fraction == 1e-3:
        assert shortened > 0


@pytest.mark.parametrize("make", [Adler, AdlerScheduleFree], ids=["gradient", "adam"])
def test_the_others_go_on_at_the_measured_rate(make):
    """A tensor that starts at zero is held to its floor; what it does not reach moves by η d."""
    model, criterion = network("mlp-tanh"), nn.CrossEntropyLoss()
    (batch,) = batches("mlp-tanh", criterion, 1)
    free, bound = copy.deepcopy(model), copy.deepcopy(model)
    for net, fraction in ((free, None), (bound, 0.02)):
        guard = Guard(trust_region=None, max_relative_change=fraction)
        optimizer = make(net.parameters(), net, criterion, guard=guard, measure=EXACT)
        train(net, criterion, optimizer, [batch])
    kept = 0
    for start, a, b in zip(model.parameters(), free.parameters(), bound.parameters()):
        full, found = (a - start).detach(), (b - start).detach()
        expected = full * min(1.0, 0.02 * size(start.detach()) / float(full.norm()))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        kept += bool(torch.equal(full, found))
    assert 0 <= kept < 4


def test_the_bound_is_the_initial_norms_whatever_the_weights_become():
    p = nn.Parameter(torch.full((3, 4), 2.0, dtype=torch.float64))
    state = {p: {}}
    one, along = torch.ones((), dtype=torch.float64), [torch.ones(3, 4).double()]

    @torch.no_grad()
    def factor():
        bound = RelativeChange([p], along, [torch.tensor(10.0)], 0.5, state)
        return bound.factors([p], along, one)

    first = factor()
    with torch.no_grad():
        p.mul_(100)
    later = factor()
    expected = 0.5 * math.sqrt(48) / 10
    assert float(first) == pytest.approx(expected)
    assert float(later) == pytest.approx(expected)


def test_a_group_with_a_larger_multiplier_is_held_to_the_same_bound():
    model, criterion = network("mlp-tanh"), nn.CrossEntropyLoss()
    start = [p.detach().clone() for p in model.parameters()]
    groups = [{"params": [p], "lr": 10.0**i} for i, p in enumerate(model.parameters())]
    guard = Guard(trust_region=None, max_relative_change=0.01)
    optimizer = Adler(groups, model, criterion, guard=guard, measure=EXACT)
    train(model, criterion, optimizer, batches("mlp-tanh", criterion, 1))
    for before, p in zip(start, model.parameters()):
        assert float((p.detach() - before).norm()) <= 0.01 * size(before) * (1 + 1e-9)
