"""Constants of a network in its inputs, against dense Jacobians: they hold, and smaller do not."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import draw
from torch import nn
from torch.autograd.functional import jacobian

from adler.diagnostics.theory.composition import ActivationConstants
from adler.diagnostics.theory.input_smoothness import input_bounds, layer_input_bounds

examples = settings(deadline=None, max_examples=40, derandomize=True)
seeds = st.integers(0, 10**6)
BENDS = {torch.tanh: 4 / 3**1.5, torch.sigmoid: 1 / (6 * math.sqrt(3)), torch.sin: 1.0}


def norm(matrix):
    return float(torch.linalg.matrix_norm(matrix, ord=2))


@pytest.mark.parametrize("activation", BENDS)
@examples
@given(seed=seeds, out=st.integers(1, 6), width=st.integers(1, 6), scale=st.floats(0.01, 5))
def test_lemma_21_holds_with_the_spectral_norm(activation, seed, out, width, scale):
    M = draw(out, width, seed=seed)
    bounds = layer_input_bounds(M, activation)
    x, y = (scale * draw(width, seed=seed + i) for i in (1, 2))
    away = float((x - y).norm())
    layer = [jacobian(lambda t: M @ activation(t), z) for z in (x, y)]
    assert norm(layer[0]) <= bounds.lipschitz * (1 + 1e-12)
    assert norm(layer[0] - layer[1]) <= bounds.smoothness * away * (1 + 1e-12)


def gradients_apart(M, activation, x, y):
    """Change of the gradient over the distance, from dense Jacobians."""
    one, two = (jacobian(lambda t: M @ activation(t), z) for z in (x, y))
    return norm(one - two) / float((x - y).norm())


def test_lemma_21_as_printed_is_violated_and_ours_is_attained():
    M = torch.ones(25, 1, dtype=torch.float64)
    bounds = layer_input_bounds(M, torch.tanh)
    assert list(bounds) == pytest.approx([5.0, 20 / 3**1.5])
    steepest = torch.atanh(torch.tensor([1 / math.sqrt(3)], dtype=torch.float64))
    found = gradients_apart(M, torch.tanh, steepest - 1e-4, steepest + 1e-4)
    assert found == pytest.approx(3.849, abs=1e-3)
    assert found == pytest.approx(bounds.smoothness, rel=1e-6)
    printed = float(M.abs().max()) * 4 / 3**1.5
    assert printed == pytest.approx(0.770, abs=1e-3)
    assert found > 4.9 * printed


def test_a_rotated_matrix_attains_both_constants():
    # Along one input at a time; the columns are orthogonal and one is the longest.
    Q, _ = torch.linalg.qr(draw(4, 4, seed=0))
    M = Q @ torch.diag(torch.tensor([3.0, 1.0, 0.5, 0.1], dtype=torch.float64))
    bounds = layer_input_bounds(M, torch.sin)
    x = torch.zeros(4, dtype=torch.float64)
    assert norm(jacobian(lambda t: M @ torch.sin(t), x)) == pytest.approx(bounds.lipschitz)
    top = torch.tensor([math.pi / 2, 0, 0, 0], dtype=torch.float64)
    step = torch.tensor([1e-4, 0, 0, 0], dtype=torch.float64)
    found = gradients_apart(M, torch.sin, top - step, top + step)
    assert found == pytest.approx(bounds.smoothness, rel=1e-6)


@examples
@given(seed=seeds, depth=st.integers(1, 3))
def test_networks_compose_by_lemma_16(seed, depth):
    torch.manual_seed(seed)
    layers = [m for _ in range(depth) for m in (nn.Linear(4, 4), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(4, 2)).double()
    bounds = input_bounds(model)
    x, y = 2 * draw(4, seed=seed + 1), 2 * draw(4, seed=seed + 2)
    J, K = jacobian(model, x), jacobian(model, y)
    assert norm(J) <= bounds.lipschitz * (1 + 1e-12)
    assert norm(J - K) <= bounds.smoothness * float((x - y).norm()) * (1 + 1e-12)


def test_scalars_attain_the_composition():
    # sin(2 sin(3 x)): G = 6; L = 2·3²·1 + … by hand: G_f² L_g + G_g L_f, twice.
    model = nn.Sequential(nn.Linear(1, 1), nn.Tanh(), nn.Linear(1, 1))
    with torch.no_grad():
        model[0].weight.fill_(3.0)
        model[2].weight.fill_(2.0)
    bounds = input_bounds(model.double())
    assert bounds.lipschitz == pytest.approx(6.0)
    assert bounds.smoothness == pytest.approx(2 * 9 * 4 / 3**1.5)
    model.double()[0].bias.data.zero_()
    at = torch.atanh(torch.tensor([1 / math.sqrt(3)], dtype=torch.float64)) / 3
    J, K = (jacobian(model, at + s * 1e-5) for s in (1, -1))
    assert norm(J - K) / 2e-5 == pytest.approx(bounds.smoothness, rel=1e-6)


def test_kinks_constants_of_ones_own_and_bad_input():
    assert layer_input_bounds(torch.eye(2), torch.relu) == (1.0, math.inf)
    assert layer_input_bounds(torch.zeros(2, 2), torch.relu) == (0.0, 0.0)
    own = ActivationConstants(slope=0.5, bend=0.25)
    assert layer_input_bounds(2 * torch.eye(2), own) == (1.0, 0.5)
    with pytest.raises(ValueError, match="module '0' is Conv1d"):
        input_bounds(nn.Sequential(nn.Conv1d(1, 1, 1)))
    with pytest.raises(ValueError, match="weight: not finite"):
        layer_input_bounds(torch.tensor([[math.nan]]), torch.tanh)
