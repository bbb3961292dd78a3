"""The weak PL condition: each bound holds, and a smaller one would not."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import Quadratic, draw
from torch import nn

from adler.diagnostics.descent import predicted_decrease
from adler.diagnostics.polyak import pl_coefficient
from adler.diagnostics.weak_polyak import (
    cross_entropy_gradient_bound,
    cross_entropy_gradient_constant,
    distance_estimate,
    proxy_pl_coefficient,
    weak_pl_coefficient,
    weak_predicted_decrease,
)

examples = settings(deadline=None, max_examples=50, derandomize=True)
seeds = st.integers(0, 10**6)
SLACK = 1e-10


# --- Definition 13 and Lemma 22 -------------------------------------------------------------------


@examples
@given(seed=seeds)
def test_lemma_22_holds_on_convex_functions(seed):
    f = Quadratic(seed)
    x = f.centre + draw(5, seed=seed + 3)
    for _ in range(10):
        g, gap, distance = f.gradient(x), f(x) - f.least, (x - f.centre).norm()
        coefficient = weak_pl_coefficient(f(x), g, distance, f.least)
        assert coefficient >= 1 - SLACK
        x = x - g / f.smoothness
        # With the weak coefficient of all convex functions, and with the point's own.
        for mu in (1.0, coefficient):
            factor = weak_predicted_decrease(gap, f.smoothness, distance, mu)
            assert f(x) - f.least <= float(factor) * gap + SLACK * (1 + gap)


@pytest.mark.long
@examples
@given(seed=seeds)
def test_lemma_22_holds_on_logistic_regression(seed):
    # Convex, with a minimiser that 2,000 steps find: nothing is quadratic here.
    A, y = draw(8, 3, seed=seed), torch.randint(2, (8,), generator=torch.Generator().manual_seed(1))
    signs = (2.0 * y - 1).double()

    def value(w):
        return nn.functional.softplus(-signs * (A @ w)).mean() + 0.05 * w.square().sum()

    def slope(w):
        w = w.clone().requires_grad_()
        return torch.autograd.grad(value(w), w)[0]

    L = float(torch.linalg.matrix_norm(A, ord=2)) ** 2 / 32 + 0.1
    best = torch.zeros(3, dtype=torch.float64)
    for _ in range(2000):
        best = best - slope(best) / L
    x, least = 5 * draw(3, seed=seed + 1), float(value(best))
    for _ in range(5):
        gap, distance = float(value(x)) - least, float((x - best).norm())
        after = x - slope(x) / L
        factor = float(weak_predicted_decrease(gap, L, distance))
        assert float(value(after)) - least <= factor * gap + 1e-9
        assert float(weak_pl_coefficient(value(x), slope(x), distance, least)) >= 1 - 1e-6
        x = after


@pytest.mark.parametrize("L", [0.01, 1.0, 30.0])
def test_a_parabola_attains_lemma_22(L):
    # ½ L θ² falls to 0 in one step: any other constant in the factor is not 0.
    theta = torch.tensor([3.0], dtype=torch.float64)
    loss = float(L * theta.square() / 2)
    mu = weak_pl_coefficient(loss, L * theta, 3.0)
    assert float(mu) == pytest.approx(4.0)
    assert float(weak_predicted_decrease(loss, L, 3.0, mu)) == pytest.approx(0.0, abs=1e-12)


@examples
@given(seed=seeds)
def test_the_points_own_coefficient_gives_the_factor_of_the_pl_inequality(seed):
    f = Quadratic(seed)
    x = f.centre + draw(5, seed=seed + 3)
    g, gap, distance = f.gradient(x), f(x) - f.least, (x - f.centre).norm()
    mu = weak_pl_coefficient(f(x), g, distance, f.least)
    weak = weak_predicted_decrease(gap, f.smoothness, distance, mu)
    strong = predicted_decrease(pl_coefficient(f(x), g, f.least), f.smoothness)
    assert float(weak) == pytest.approx(float(strong), rel=1e-9, abs=1e-9)
    # With the thesis's estimate of the distance, and the gradient's norm for its slope.
    estimate = distance_estimate(gap, g.norm())
    found = weak_predicted_decrease(gap, f.smoothness, estimate)
    quarter = 1 - (1 - float(strong)) / 4
    assert float(found) == pytest.approx(quarter, rel=1e-9)
    G = float(g.norm())
    assert float(found) == pytest.approx(1 - G**2 / (8 * f.smoothness * gap), rel=1e-9)


def test_the_distance_estimate_is_exact_for_a_square():
    for theta in (0.1, 2.0):
        assert float(distance_estimate(theta**2, 2 * theta)) == pytest.approx(theta)
    # and no bound: |θ|³ has its minimiser further away, √|θ| nearer.
    assert float(distance_estimate(8.0, 12.0)) < 2.0
    assert float(distance_estimate(2.0, 0.25)) > 4.0


# --- a proxy in the loss's place ------------------------------------------------------------------


def test_the_proxy_inequality_holds_with_its_coefficient_and_with_no_more():
    g = torch.tensor([0.6, 0.8], dtype=torch.float64)
    for exponent in (0.5, 1.0, 2.0):
        gradient, proxy, offset = 3 * g, 7.0, 1.0
        mu = float(proxy_pl_coefficient(gradient, proxy, offset, exponent))
        assert mu * (proxy - offset) == pytest.approx(3.0**exponent)
    twice = 2 * float(pl_coefficient(5.0, g))
    assert float(proxy_pl_coefficient(g, 5.0)) == pytest.approx(twice)
    assert float(proxy_pl_coefficient(g, 1.0, 1.0)) == math.inf
    with pytest.raises(ValueError, match=r"exponent=0: expected"):
        proxy_pl_coefficient(g, 1.0, exponent=0)
    with pytest.raises(ValueError, match=r"proxy=1.0 is below optimum=2.0"):
        proxy_pl_coefficient(g, 1.0, 2.0)


# --- cross-entropy --------------------------------------------------------------------------------


def gradient_and_losses(logits, y, reduction):
    logits = logits.clone().requires_grad_()
    loss = nn.functional.cross_entropy(logits, y, reduction=reduction)
    (gradient,) = torch.autograd.grad(loss, logits)
    losses = nn.functional.cross_entropy(logits, y, reduction="none").detach()
    return float(gradient.square().sum()), losses, float(loss.detach())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@examples
@given(seed=seeds, classes=st.integers(2, 6), size=st.integers(1, 5), scale=st.floats(0.01, 20))
def test_the_bounds_of_the_gradient_hold(reduction, seed, classes, size, scale):
    logits = scale * draw(size, classes, seed=seed)
    y = torch.randint(classes, (size,), generator=torch.Generator().manual_seed(seed))
    squared, losses, loss = gradient_and_losses(logits, y, reduction)
    bound = float(cross_entropy_gradient_bound(losses, classes, reduction))
    coefficient = cross_entropy_gradient_constant(float(losses.max()), classes, size)
    assert coefficient * loss**2 <= bound * (1 + SLACK)
    # The gradient p - e_y itself is rounded where p_y is nearly 1.
    assert bound <= squared * (1 + SLACK) + 1e-20


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("margin", [-9.0, -1.0, 0.0, 3.0])
def test_the_bounds_are_attained_where_the_wrong_classes_agree(margin, classes, reduction):
    logits = torch.zeros(4, classes, dtype=torch.float64)
    logits[:, 0] = margin
    y = torch.zeros(4, dtype=torch.long)
    squared, losses, loss = gradient_and_losses(logits, y, reduction)
    bound = cross_entropy_gradient_bound(losses, classes, reduction)
    assert float(bound) == pytest.approx(squared, rel=1e-9)
    coefficient = cross_entropy_gradient_constant(float(losses.max()), classes, 4)
    assert coefficient * loss**2 == pytest.approx(squared, rel=1e-9)


def test_the_constant_falls_with_the_largest_loss():
    found = [cross_entropy_gradient_constant(m, 10, 8) for m in (0.0, 1e-12, 0.1, 1.0, 10.0, 1e4)]
    assert found[0] == pytest.approx(10 / 9 / 8)
    assert found == sorted(found, reverse=True)


def test_cross_entropy_has_no_pl_coefficient():
    # Its local coefficient falls like the loss: no constant bounds it from below.
    for margin in (5.0, 10.0, 15.0):
        logits = torch.tensor([[margin, 0.0]], dtype=torch.float64, requires_grad=True)
        loss = nn.functional.cross_entropy(logits, torch.tensor([0]))
        (gradient,) = torch.autograd.grad(loss, logits)
        found = float(pl_coefficient(loss, gradient))
        assert found == pytest.approx(float(loss.detach()), rel=0.01)


# --- bad input ------------------------------------------------------------------------------------


def test_bad_input_is_named():
    g = torch.ones(2)
    with pytest.raises(ValueError, match=r"distance=-1.0"):
        weak_pl_coefficient(1.0, g, -1.0)
    with pytest.raises(ValueError, match=r"gap: the least is -1.0"):
        weak_predicted_decrease(-1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match=r"distance: the least is 0.0"):
        weak_predicted_decrease(1.0, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"lipschitz: the least is 0.0"):
        distance_estimate(1.0, 0.0)
    with pytest.raises(ValueError, match="reduction='none'"):
        cross_entropy_gradient_bound(g, 2, "none")
    with pytest.raises(ValueError, match=r"losses: shape \(0,\)"):
        cross_entropy_gradient_bound(torch.zeros(0), 2)
    with pytest.raises(ValueError, match=r"losses: the least is -1.0"):
        cross_entropy_gradient_bound(-g, 2)
    with pytest.raises(ValueError, match="classes=1"):
        cross_entropy_gradient_bound(g, 1)
    with pytest.raises(ValueError, match="largest_loss=inf"):
        cross_entropy_gradient_constant(math.inf, 2, 1)
    with pytest.raises(ValueError, match="examples=0"):
        cross_entropy_gradient_constant(1.0, 2, 0)
