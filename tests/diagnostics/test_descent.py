"""Predictions of gradient descent: each holds, and a smaller bound would not."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.cases import Quadratic, Wavy, draw

from adler.diagnostics.descent import (
    accumulated_bound,
    convergence_radius,
    measured_smoothness,
    predicted_contraction,
    predicted_decrease,
)
from adler.diagnostics.polyak import pl_coefficient

examples = settings(deadline=None, max_examples=50, derandomize=True)
seeds = st.integers(0, 10**6)
# Of rounding in float64, over a few dozen operations.
SLACK = 1e-10


def descend(f, x, lrs):
    """Losses, and local coefficients, along gradient descent."""
    losses, pls = [f(x)], []
    for lr in lrs:
        g = f.gradient(x)
        pls.append(pl_coefficient(f(x), g, f.least))
        x = x - lr * g
        losses.append(f(x))
    return torch.tensor(losses, dtype=torch.float64), pls


@examples
@given(seed=seeds, fraction=st.floats(0.05, 2.5))
def test_the_bound_holds_on_quadratics(seed, fraction):
    f = Quadratic(seed)
    lr = fraction / f.smoothness  # beyond 2/L too: the coefficients are local
    losses, pls = descend(f, f.centre + draw(5, seed=seed + 3), [lr] * 10)
    bound = accumulated_bound(losses[0], pls, f.smoothness, f.least, lr)
    slack = SLACK * (1 + bound.abs())
    assert (losses <= bound + slack).all()
    if fraction <= 2:  # then the smallest eigenvalue serves every step
        bound = accumulated_bound(losses[0], [f.pl] * 10, f.smoothness, f.least, lr)
        assert (losses <= bound + slack).all()


@examples
@given(seed=seeds, fraction=st.floats(0.05, 2.0))
@example(seed=0, fraction=1.0)
def test_the_bound_holds_on_a_function_that_is_not_convex(seed, fraction):
    f = Wavy()
    lr = fraction / f.smoothness
    losses, pls = descend(f, 5 * draw(1, seed=seed), [lr] * 20)
    bound = accumulated_bound(losses[0], pls, [f.smoothness] * 20, lrs=[lr] * 20)
    assert (losses <= bound * (1 + SLACK) + 1e-250).all()
    if fraction == 1:
        assert accumulated_bound(losses[0], pls, f.smoothness).equal(bound)


@pytest.mark.parametrize("fraction", [0.2, 0.7, 1.6])
def test_the_bound_is_attained_on_a_round_bowl(fraction):
    class Bowl:
        least = 0.25

        def __call__(self, x):
            return float(3 * x.square().sum() / 2) + self.least

        def gradient(self, x):
            return 3 * x

    lr = fraction / 3.0
    losses, pls = descend(Bowl(), draw(4), [lr] * 5)
    bound = accumulated_bound(losses[0], pls, 3.0, Bowl.least, lr)
    torch.testing.assert_close(bound, losses, rtol=1e-12, atol=1e-15)
    # So a bound that is a tenth smaller, in any factor, fails.
    gap, first = losses - Bowl.least, predicted_decrease(pls[0], 3.0, lr)
    assert float(gap[1]) > 0.9 * float(first * gap[0])


def test_too_small_an_l_fails_where_the_curvature_is_largest():
    # Wavy has f'' = 8 at 0, so near 0 a step of 1/L₀ with L₀ < 8 overshoots the prediction.
    f, x = Wavy(), torch.tensor([1e-3], dtype=torch.float64)
    for share, holds in ((1.0, True), (0.9, False)):
        L, lr = share * f.smoothness, 0.5 / f.smoothness
        losses, pls = descend(f, x, [lr])
        bound = accumulated_bound(losses[0], pls, L, lrs=lr)
        assert bool(losses[1] <= bound[1] * (1 + 1e-6)) == holds


def test_without_a_rate_it_is_the_best_one():
    mu, L = 0.7, 3.0
    rates = torch.linspace(0, 2 / L, 201, dtype=torch.float64)
    factors = predicted_decrease(mu, L, rates)
    assert float(factors.min()) == pytest.approx(1 - mu / L, rel=1e-12)
    assert float(rates[factors.argmin()]) == pytest.approx(1 / L)
    assert float(predicted_decrease(mu, L)) == pytest.approx(1 - mu / L, rel=1e-12)
    assert float(factors[-1]) == pytest.approx(1)


def test_a_factor_below_zero_counts_as_zero():
    assert float(predicted_decrease(4.0, 2.0)) == -1
    assert accumulated_bound(3.0, [4.0, 4.0], 2.0, optimum=1.0).tolist() == [3, 1, 1]
    assert accumulated_bound(3.0, [math.inf], 2.0, optimum=1.0).tolist() == [3, 1]


def test_tensors_numbers_and_no_steps():
    mixed = accumulated_bound(torch.tensor(2.0), [torch.tensor(1.0), 0.5], torch.tensor([2.0, 1.0]))
    assert mixed.tolist() == [2, 1, 0.5]
    assert accumulated_bound(2.0, [], 1.0).tolist() == [2]


@examples
@given(seed=seeds, lr=st.floats(0.01, 10))
def test_the_measured_smoothness_of_a_quadratic_is_its_curvature_along_the_gradient(seed, lr):
    f = Quadratic(seed)
    x = f.centre + draw(5, seed=seed + 3)
    g = f.gradient(x)
    found = measured_smoothness(f(x), f(x - lr * g), g.square().sum(), lr)
    expected = float(g @ f.matrix @ g / (g @ g))
    # f is rounded to 1e-16 of its size, and the numerator is lr² g·g of it.
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_with_the_measured_smoothness_the_prediction_is_exact():
    f, x, lr = Wavy(), torch.tensor([2.0], dtype=torch.float64), 0.05
    losses, pls = descend(f, x, [lr])
    g = f.gradient(x)
    L = measured_smoothness(losses[0], losses[1], g.square().sum(), lr)
    assert float(accumulated_bound(losses[0], pls, L, lrs=lr)[1]) == pytest.approx(float(losses[1]))


# --- Lemma 1's radius -----------------------------------------------------------------------------


@examples
@given(seed=seeds)
def test_gradient_descent_stays_within_the_radius(seed):
    f = Quadratic(seed)
    start = x = f.centre + draw(5, seed=seed + 3)
    radius = float(convergence_radius(f(x) - f.least, f.pl, f.smoothness))
    for _ in range(200):
        x = x - f.gradient(x) / f.smoothness
        assert float((x - start).norm()) <= radius * (1 + SLACK)


@pytest.mark.parametrize("L", [0.01, 1.0, 50.0])
def test_a_parabola_attains_the_radius_and_the_printed_formula_does_not_hold(L):
    start = 3.0
    radius = float(convergence_radius(L * start**2 / 2, L, L))
    assert radius == pytest.approx(start)  # one step leads to 0
    if L < 1:  # (4.4) bounds the distance over L by the same: the distance by L times the radius
        assert L * radius < start


@pytest.mark.parametrize("mu", [0.01, 0.5, 0.9, 1.0])
def test_the_radius_is_the_sum_of_the_longest_steps_that_smoothness_allows(mu):
    # ‖∇h_k‖ / L ≤ √(2 gap_k / L), with gaps that shrink by 1 - μ/L: nothing else is in the proof.
    L, gap = 1.5, 2.0
    gaps = [gap * (1 - mu / L) ** k for k in range(20_000)]
    expected = math.fsum(math.sqrt(2 * g / L) for g in gaps)
    assert float(convergence_radius(gap, mu, L)) == pytest.approx(expected, rel=1e-9)


# --- under PL⁺ and PL -----------------------------------------------------------------------------


@examples
@given(seed=seeds, fraction=st.floats(0.0, 1.0))
def test_the_contraction_holds_on_quadratics(seed, fraction):
    f = Quadratic(seed)
    lr = fraction / f.smoothness
    x = f.centre + draw(5, seed=seed + 3)
    for _ in range(5):
        after = x - lr * f.gradient(x)
        factor = float(predicted_contraction(f.pl, f.smoothness, lr))
        before, now = ((z - f.centre).square().sum() for z in (x, after))
        assert float(now) <= factor * float(before) * (1 + SLACK)
        x = after


@examples
@given(gap=st.floats(0.1, 10), mu=st.floats(0.01, 1.0), ratio=st.floats(1.0, 50), f=st.floats(0, 1))
def test_the_contraction_is_attained_where_all_three_inequalities_are(gap, mu, ratio, f):
    L = mu * ratio
    # ‖v‖² = 2 gap/μ, ‖g‖² = 2 L gap, ⟨g, v⟩ = gap: in the plane, with a cosine of ½ √(μ/L).
    v = torch.tensor([math.sqrt(2 * gap / mu), 0.0], dtype=torch.float64)
    cosine = math.sqrt(mu / L) / 2
    g = math.sqrt(2 * L * gap) * torch.tensor(
        [cosine, math.sqrt(1 - cosine**2)], dtype=torch.float64
    )
    lr = f / L
    found = float((v - lr * g).square().sum() / v.square().sum())
    assert float(predicted_contraction(mu, L, lr)) == pytest.approx(found, rel=1e-9, abs=1e-12)
    best = float(predicted_contraction(mu, L))
    assert best == pytest.approx(1 - mu / (4 * L))
    assert best <= found + 1e-12


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"pl: the least is -1.0"):
        predicted_decrease(-1.0, 1.0)
    with pytest.raises(ValueError, match=r"smoothness: the least is 0.0"):
        predicted_decrease(1.0, 0.0)
    with pytest.raises(ValueError, match=r"lr: the least is -0.1"):
        predicted_decrease(1.0, 1.0, -0.1)
    with pytest.raises(ValueError, match=r"smoothnesses: shape \(2,\) for 1 steps"):
        accumulated_bound(1.0, [1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match=r"pls: shape \(\); expected one number a step"):
        accumulated_bound(1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match=r"initial=1.0 is below optimum=2.0"):
        accumulated_bound(1.0, [1.0], 1.0, optimum=2.0)
    with pytest.raises(ValueError, match=r"squared_norm=0.0: expected a positive number"):
        measured_smoothness(1.0, 1.0, 0.0, 0.1)
    with pytest.raises(ValueError, match=r"lr=0.0: expected a positive number"):
        measured_smoothness(1.0, 1.0, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"pl=2.0, smoothness=1.0"):
        convergence_radius(1.0, 2.0, 1.0)
    with pytest.raises(ValueError, match=r"gap=-1.0"):
        convergence_radius(-1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="lr: expected numbers between 0 and 1/L"):
        predicted_contraction(1.0, 1.0, 1.1)
    with pytest.raises(ValueError, match=r"upper_pl: the least is 0.0"):
        predicted_contraction(1.0, 0.0)
