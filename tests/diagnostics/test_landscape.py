"""Dropout stability and linear paths, against networks that are made by hand."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import draw
from support.loops import unchanged
from torch import nn

from adler.curvature import Objective
from adler.diagnostics.landscape import dropout_stability, linear_path, loss_barrier

examples = settings(deadline=None, max_examples=20, derandomize=True)


def setting(seed=0, widths=(3, 8, 6, 2)):
    torch.manual_seed(seed)
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.Tanh())]
    model = nn.Sequential(*layers[:-1]).double()
    x, y = draw(5, 3, seed=seed), draw(5, 2, seed=seed + 1)
    return Objective(model, x, y, nn.MSELoss())


@examples
@given(seed=st.integers(0, 1000), kept=st.floats(0.05, 1.0), random=st.booleans())
def test_thinned_is_the_smaller_network_with_larger_weights(seed, kept, random):
    h = setting(seed)
    with unchanged(h.model):
        found = dropout_stability(h, kept, seed if random else None)
    generator = torch.Generator().manual_seed(seed)
    first, second, last = h.model[0], h.model[2], h.model[4]
    units = []
    for layer in (first, second):
        n = layer.out_features
        order = torch.randperm(n, generator=generator) if random else torch.arange(n)
        units.append((order[: max(1, round(kept * n))], n))
    (a, n), (b, m) = units
    f = torch.tanh(h.inputs @ first.weight[a].T + first.bias[a])
    f = torch.tanh(f @ second.weight[b][:, a].T * (n / len(a)) + second.bias[b])
    out = f @ last.weight[:, b].T * (m / len(b)) + last.bias
    assert found.thinned == pytest.approx(
        float((out - h.targets).square().mean().detach()), rel=1e-12
    )
    assert found.loss == pytest.approx(float(h.loss().detach()), rel=1e-12)
    assert found.change == pytest.approx(abs(found.loss - found.thinned))


def test_copies_of_one_unit_are_stable_and_unlike_units_are_not():
    h = setting(widths=(3, 8, 2))
    with torch.no_grad():
        h.model[0].weight[4:] = h.model[0].weight[:4]
        h.model[0].bias[4:] = h.model[0].bias[:4]
        h.model[2].weight[:, 4:] = h.model[2].weight[:, :4]
    assert dropout_stability(h).change == pytest.approx(0, abs=1e-14)
    with torch.no_grad():
        h.model[2].weight[:, 4:] *= -1
    assert dropout_stability(h).change > 1e-3


def test_a_path_is_the_loss_of_networks_between():
    h, other = setting(0), setting(1)
    start = {n: p.detach().clone() for n, p in h.params.items()}
    end = {n: p.detach().clone() for n, p in other.params.items()}
    with unchanged(h.model):
        losses = linear_path(h, start, end, points=5)
    for i, t in enumerate((0.0, 0.25, 0.5, 0.75, 1.0)):
        with torch.no_grad():
            for n, p in other.params.items():
                p.copy_((1 - t) * start[n] + t * end[n])
        out = other.model(h.inputs)
        expected = (out - h.targets).square().mean()
        assert float(losses[i]) == pytest.approx(float(expected.detach()), rel=1e-12)
    assert loss_barrier(losses) == max(0.0, float(losses[1:-1].max() - max(losses[0], losses[-1])))


def test_a_convex_loss_has_no_barrier_and_exchanged_units_have_one():
    torch.manual_seed(0)
    linear = Objective(nn.Linear(3, 2).double(), draw(5, 3), draw(5, 2, seed=1), nn.MSELoss())
    ends = [{n: torch.randn_like(p) for n, p in linear.params.items()} for _ in range(2)]
    assert loss_barrier(linear_path(linear, *ends)) == 0.0
    # F = tanh(w x): the network of w and that of its negative, with negative output weights, agree.
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Tanh(), nn.Linear(1, 1, bias=False))
    x = torch.tensor([[1.0]])
    h = Objective(model, x, torch.tanh(x), nn.MSELoss())
    one = {"0.weight": torch.ones(1, 1), "2.weight": torch.ones(1, 1)}
    losses = linear_path(h, one, {n: -p for n, p in one.items()})
    assert float(losses[0]) == float(losses[-1]) == 0
    assert loss_barrier(losses) == pytest.approx(float(torch.tanh(x)) ** 2, rel=1e-6)


def test_bad_input_is_named():
    h = setting()
    with pytest.raises(ValueError, match=r"kept=0: expected"):
        dropout_stability(h, 0)
    with pytest.raises(ValueError, match="its model is Linear, not a Sequential"):
        dropout_stability(Objective(nn.Linear(3, 2), h.inputs, h.targets, nn.MSELoss()))
    single = Objective(nn.Sequential(nn.Linear(3, 2)), h.inputs, h.targets, nn.MSELoss())
    with pytest.raises(ValueError, match="no Sequential of at least two Linear layers"):
        dropout_stability(single)
    part = Objective(h.model, h.inputs, h.targets, nn.MSELoss(), [h.model[0].weight])
    with pytest.raises(ValueError, match=r"the weights of \['2', '4'\] are not among"):
        dropout_stability(part)
    params = dict(h.params)
    with pytest.raises(ValueError, match="points=1"):
        linear_path(h, params, params, points=1)
    with pytest.raises(ValueError, match=r"end: its names differ from the objective's"):
        linear_path(h, params, {})
    with pytest.raises(ValueError, match=r"losses: shape \(1,\)"):
        loss_barrier(torch.zeros(1))
