"""How far Gram matrices of features move with the weights: it holds, and is attained."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import draw

from adler.diagnostics.theory.perturbation import feature_perturbations, gram_perturbation

examples = settings(deadline=None, max_examples=50, derandomize=True)
seeds = st.integers(0, 10**6)


def norm(matrix):
    return float(torch.linalg.matrix_norm(matrix, ord=2))


def forward(x, weights, activation):
    found = [x]
    for W in weights:
        found.append(activation(found[-1] @ W.T))
    return found


@pytest.mark.parametrize("activation", [torch.tanh, torch.relu])
@examples
@given(seed=seeds, depth=st.integers(1, 4), scale=st.floats(0, 2))
def test_features_and_their_gram_matrices_move_no_further(activation, seed, depth, scale):
    x = draw(5, 4, seed=seed)
    start = [draw(4, 4, seed=seed + 10 * m) for m in range(1, depth + 1)]
    now = [W + scale * draw(4, 4, seed=seed + 10 * m + 5) for m, W in enumerate(start, 1)]
    before, after = forward(x, start, activation), forward(x, now, activation)
    distances = [float((V - W).norm()) for V, W in zip(now, start)]
    entering = [norm(F) for F in before[:-1]]
    found = feature_perturbations(entering, list(map(norm, start)), distances, 1.0)
    for F, G, change in zip(before[1:], after[1:], found):
        assert float((F - G).norm()) <= change * (1 + 1e-12)
        moved = norm(F @ F.T - G @ G.T)
        assert moved <= gram_perturbation(norm(F), change) * (1 + 1e-12)


def test_scalars_attain_every_layer():
    # One example, one unit, the identity: features are products of weights.
    x, weights, moved = 3.0, [2.0, 0.5, 4.0], [2.5, 0.75, 4.25]
    features, now = [x], [x]
    for W, V in zip(weights, moved):
        features.append(features[-1] * W)
        now.append(now[-1] * V)
    distances = [V - W for V, W in zip(moved, weights)]
    found = feature_perturbations(features[:-1], weights, distances, 1.0)
    assert found == pytest.approx([b - a for a, b in zip(features[1:], now[1:])])
    grams = [gram_perturbation(f, c) for f, c in zip(features[1:], found)]
    assert grams == pytest.approx([b**2 - a**2 for a, b in zip(features[1:], now[1:])])
    # and the slope multiplies each layer's
    assert feature_perturbations([1.0], [1.0], [0.5], 2.0) == [1.0]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="lengths 1, 2, 1"):
        feature_perturbations([1.0], [1.0, 1.0], [1.0], 1.0)
    with pytest.raises(ValueError, match="expected none below 0"):
        feature_perturbations([1.0], [1.0], [-1.0], 1.0)
    with pytest.raises(ValueError, match=r"change=-1.0"):
        gram_perturbation(1.0, -1.0)
