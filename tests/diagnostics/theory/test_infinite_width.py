import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import ACTIVATIONS
from torch import nn

from adler.diagnostics import infinite_width
from adler.diagnostics.gram import correlation, gram
from adler.diagnostics.theory.activations import normalised_activation
from adler.diagnostics.theory.duals import dual_activation
from adler.diagnostics.theory.infinite_width import (
    eigenvalue_lower_bound,
    iterated_gram,
    largest_correlation_change,
    maximal_distortion,
)

examples = settings(deadline=None, max_examples=40, derandomize=True)
seeds = st.integers(0, 10**6)


def unit_gram(n, d, seed):
    generator = torch.Generator().manual_seed(seed)
    return correlation(gram(torch.randn(n, d, generator=generator, dtype=torch.float64)))


def smallest(grams):
    return torch.linalg.eigvalsh(grams)[..., 0]


# --- Gram matrices over depth ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["relu", "tanh", "sigmoid"])
def test_wide_networks_approach_the_iterated_gram(name):
    activation, width, depth, repeats = ACTIVATIONS[name], 250, 3, 160
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    x = x / x.norm(dim=1, keepdim=True)
    expected = iterated_gram(gram(x), activation, depth)
    one = dual_activation(activation)(1.0)
    measured = torch.zeros_like(expected)
    measured[0] = gram(x)
    for _ in range(repeats):
        h = x
        for m in range(depth):
            W = torch.randn(h.shape[1], width, generator=generator, dtype=torch.float64)
            h = activation(h @ W) / math.sqrt(width * one)
            measured[m + 1] += gram(h) / repeats
    # The ReLU's squares have a variance of 5 about a mean of 1, which each layer adds: 4 sigma.
    tolerance = 4 * math.sqrt(5 * depth / (width * repeats))
    torch.testing.assert_close(measured, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_iterated_grams_are_gram_matrices(name, dtype):
    G = unit_gram(6, 4, seed=0).to(dtype)
    grams = iterated_gram(G, ACTIVATIONS[name], depth=5)
    assert grams.shape == (6, 6, 6)
    assert grams.dtype == dtype
    torch.testing.assert_close(grams[0], G)
    assert grams.diagonal(dim1=1, dim2=2).equal(torch.ones(6, 6, dtype=dtype))
    assert float(smallest(grams).min()) > -50 * torch.finfo(dtype).eps
    dual = dual_activation(ACTIVATIONS[name])
    assert float(grams[1, 0, 1]) == pytest.approx(dual(float(G[0, 1])) / dual(1.0), abs=1e-6)
    assert iterated_gram(G, ACTIVATIONS[name], depth=0).shape == (1, 6, 6)


def test_depth_is_a_composition():
    G = unit_gram(4, 3, seed=1)
    grams = iterated_gram(G, torch.tanh, depth=5)
    torch.testing.assert_close(iterated_gram(grams[2], torch.tanh, depth=3), grams[2:])


@examples
@given(n=st.integers(2, 8), d=st.integers(1, 12), seed=seeds, name=st.sampled_from([*ACTIVATIONS]))
def test_the_eigenvalue_bound_holds(n, d, seed, name):
    G = unit_gram(n, d, seed)
    bound = eigenvalue_lower_bound(G, ACTIVATIONS[name], depth=6)
    truth = smallest(iterated_gram(G, ACTIVATIONS[name], depth=6))
    assert bound.shape == (7,)
    assert bool((bound >= 0).all())
    assert bool((bound <= truth + 1e-12).all()), (bound, truth)
    assert float(bound[0]) == pytest.approx(max(0.0, float(truth[0])), abs=1e-12)


@pytest.mark.parametrize("rho", [0.0, 0.4, 0.9])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_two_examples_attain_the_eigenvalue_bound(name, rho):
    G = torch.tensor([[1.0, rho], [rho, 1.0]], dtype=torch.float64)
    bound = eigenvalue_lower_bound(G, ACTIVATIONS[name], depth=4)
    truth = smallest(iterated_gram(G, ACTIVATIONS[name], depth=4))
    # In particular, a share of the mean (k = 0), or 1 % more, would violate it. The tail of a kink
    # costs up to 1e-5, as its degrees beyond 512 are not known.
    torch.testing.assert_close(bound, truth, rtol=0, atol=1e-5)


def test_both_branches_of_the_eigenvalue_bound_are_attained_by_more_examples():
    n = 5
    ones, eye = torch.ones(n, n, dtype=torch.float64), torch.eye(n, dtype=torch.float64)
    # Gershgorin: equal negative correlations, under an odd power.
    simplex = eye - (ones - eye) * 0.8 / (n - 1)
    bound = eigenvalue_lower_bound(simplex, lambda x: x**3 - 3 * x, depth=2)
    truth = smallest(iterated_gram(simplex, lambda x: x**3 - 3 * x, depth=2))
    torch.testing.assert_close(bound, truth, rtol=1e-12, atol=1e-12)
    assert float(bound[1]) == pytest.approx(1 - (n - 1) * 0.2**3)
    # Schur: the identity keeps the eigenvalue, however strong the correlations.
    G = unit_gram(n, n, seed=2)
    bound = eigenvalue_lower_bound(G, nn.Identity(), depth=3)
    torch.testing.assert_close(bound, smallest(G).expand(4), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("degree", [1, 2, 5])
@pytest.mark.parametrize("activation", [torch.relu, torch.erf], ids=["relu", "erf"])
def test_the_eigenvalue_bound_holds_whatever_the_degree_of_the_series(activation, degree):
    G = unit_gram(4, 6, seed=5)
    truth = smallest(iterated_gram(G, activation, depth=5))
    known = eigenvalue_lower_bound(G, activation, depth=5)
    bound = eigenvalue_lower_bound(G, dual_activation(activation, degree=degree), depth=5)
    assert bool((bound <= truth + 1e-12).all())
    assert bool((bound <= known + 1e-12).all())  # less is known
    assert bool((bound[1:] > 0).all())


def test_normalised_layers_drive_examples_apart_and_a_mean_does_not():
    G = unit_gram(6, 20, seed=4)
    normalised = eigenvalue_lower_bound(G, normalised_activation(torch.relu), depth=30)
    assert bool((normalised.diff() > -1e-12).all())
    assert float(normalised[-1]) > 0.99
    plain = eigenvalue_lower_bound(G, torch.relu, depth=30)
    assert float(plain[-1]) < 0.05
    assert float(smallest(iterated_gram(G, torch.relu, depth=30))[-1]) < 0.05


def test_one_example_and_equal_examples():
    one = eigenvalue_lower_bound(torch.ones(1, 1), torch.cos, depth=3)
    torch.testing.assert_close(one, torch.ones(4))
    equal = eigenvalue_lower_bound(torch.ones(3, 3), torch.tanh, depth=3)
    torch.testing.assert_close(equal, torch.zeros(4), rtol=0, atol=1e-6)


def test_gram_matrices_that_do_not_fit_are_refused():
    impossible = torch.tensor([[1.0, 0.9, -0.9], [0.9, 1.0, 0.9], [-0.9, 0.9, 1.0]])
    with pytest.raises(ValueError, match=r"negative eigenvalue -0\.8"):
        eigenvalue_lower_bound(impossible, torch.relu, depth=1)
    for function in (iterated_gram, eigenvalue_lower_bound):
        with pytest.raises(ValueError, match=r"diagonal differs from 1 by up to 1: normalise"):
            function(2 * torch.eye(2), torch.relu, 1)
        with pytest.raises(ValueError, match="depth=-1"):
            function(torch.eye(2), torch.relu, -1)
        with pytest.raises(ValueError, match="is zero almost everywhere"):
            function(torch.eye(2), torch.zeros_like, 1)
        with pytest.raises(ValueError, match=r"gram: shape \(2, 3\)"):
            function(torch.ones(2, 3), torch.relu, 1)


# --- Lemma 24 -------------------------------------------------------------------------------------


@examples
@given(n=st.integers(2, 8), d=st.integers(1, 12), seed=seeds, name=st.sampled_from([*ACTIVATIONS]))
def test_lemma_24_holds_and_the_combined_bound_is_never_below_it(n, d, seed, name):
    G = unit_gram(n, d, seed)
    thesis = eigenvalue_lower_bound(G, ACTIVATIONS[name], depth=6, method="lemma-24")
    combined = eigenvalue_lower_bound(G, ACTIVATIONS[name], depth=6)
    truth = smallest(iterated_gram(G, ACTIVATIONS[name], depth=6))
    assert bool((thesis <= combined + 1e-14).all())
    assert bool((combined <= truth + 1e-12).all())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_lemma_24_is_the_difference_of_the_dual(name):
    dual = dual_activation(ACTIVATIONS[name])
    G = unit_gram(5, 8, seed=3)
    bound = eigenvalue_lower_bound(G, ACTIVATIONS[name], depth=1, method="lemma-24")
    delta = float(smallest(G))
    expected = (dual(1.0) - dual(1 - delta)) / dual(1.0)
    # The series knows its tail at ±1 alone: 1e-5 of a kink's.
    assert float(bound[1]) == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_equal_correlations_attain_lemma_24(name):
    # δI + (1 - δ)11ᵀ: f of it is (f(1) - f(1 - δ))I + f(1 - δ)11ᵀ, whatever the number of examples.
    dual, n, delta = dual_activation(ACTIVATIONS[name]), 6, 0.3
    G = delta * torch.eye(n, dtype=torch.float64) + (1 - delta)
    truth = smallest(iterated_gram(G, ACTIVATIONS[name], depth=4))
    bound = eigenvalue_lower_bound(G, ACTIVATIONS[name], depth=4, method="lemma-24")
    torch.testing.assert_close(bound, truth, rtol=0, atol=2e-5)
    assert float(dual(G).diagonal()[0]) == pytest.approx(dual(1.0))


def test_the_combined_bound_gains_where_correlations_shrink():
    G = unit_gram(21, 20, seed=0)  # singular, which Lemma 24 never gets away from
    relu = normalised_activation(torch.relu)
    thesis = eigenvalue_lower_bound(G, relu, depth=30, method="lemma-24")
    combined = eigenvalue_lower_bound(G, relu, depth=30)
    assert float(thesis[-1]) < 1e-6
    assert float(combined[-1]) > 0.9
    with pytest.raises(ValueError, match="method='other'"):
        eigenvalue_lower_bound(G, relu, 1, method="other")


# --- distortion -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("delta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_distortion_is_the_supremum_of_the_definition(name, delta):
    dual = dual_activation(ACTIVATIONS[name])
    rho = torch.linspace(delta - 1, 1 - delta, 4001, dtype=torch.float64)
    supremum = float(dual(rho).max())
    found = maximal_distortion(ACTIVATIONS[name], delta)
    assert found == pytest.approx(supremum, rel=1e-12, abs=1e-14)


def test_the_distortion_of_the_normalised_relu():
    relu = normalised_activation(torch.relu)
    found = [maximal_distortion(relu, delta) for delta in (0.1, 0.5, 0.9)]
    assert found == pytest.approx([0.867, 0.426, 0.076], abs=5e-4)
    assert maximal_distortion(relu, 0.0) == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"delta=1.5"):
        maximal_distortion(relu, 1.5)


def test_the_largest_change_in_closed_form():
    assert largest_correlation_change(torch.relu) == (-1.0, 1.0)
    assert largest_correlation_change(torch.cos) == (-1.0, 2.0)
    assert largest_correlation_change(nn.Identity()).value == 0
    # x³ - 3x: |ρ³ - ρ| at 1 / sqrt(3)
    found = largest_correlation_change(lambda x: x**3 - 3 * x)
    assert found.correlation == pytest.approx(1 / math.sqrt(3), abs=1e-5)
    assert found.value == pytest.approx(2 / 3**1.5, rel=1e-10)
    # erf: d/dρ asin(2ρ/3) / asin(2/3) = 1
    angle = math.asin(2 / 3)
    rho = 1.5 * math.sqrt(1 - (2 / 3 / angle) ** 2)
    found = largest_correlation_change(torch.erf)
    assert found.correlation == pytest.approx(rho, abs=1e-5)
    assert found.value == pytest.approx(rho - math.asin(2 * rho / 3) / angle, rel=1e-10)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_no_correlation_moves_further(name):
    dual = dual_activation(ACTIVATIONS[name])
    found = largest_correlation_change(ACTIVATIONS[name])
    rho = torch.linspace(-1, 1, 20_001, dtype=torch.float64)
    moved = (dual(rho) / dual(1.0) - rho).abs()
    assert float(moved.max()) <= found.value + 1e-12
    at = abs(dual(found.correlation) / dual(1.0) - found.correlation)
    assert at == pytest.approx(found.value, abs=1e-14)


def test_the_largest_change_refuses_an_activation_that_is_zero():
    with pytest.raises(ValueError, match="is zero almost everywhere"):
        largest_correlation_change(torch.zeros_like)


def test_everything_public_is_listed():
    public = {n for n, o in vars(infinite_width).items() if not n.startswith("_") and callable(o)}
    own = {n for n in public if getattr(infinite_width, n).__module__ == infinite_width.__name__}
    assert own <= set(infinite_width.__all__)
