"""The rules against dense first and second derivatives, and where they are attained."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import SMOOTH_ACTIVATIONS
from support.reference import scalar
from torch import nn

from adler.diagnostics.theory.activations import normalised_activation
from adler.diagnostics.theory.composition import (
    Bounds,
    activation_constants,
    compose,
    constant,
    entrywise,
    linear,
)

examples = settings(deadline=None, max_examples=20, derandomize=True)
positive = st.floats(0.01, 10)
# Of rounding in float64.
SLACK = 1 + 1e-9
FUNCTIONS = {f.__name__: f for f in (torch.erf, torch.sigmoid, torch.sin, torch.tanh)}


# --- rules: attained, so that a smaller constant would fail ---------------------------------------


@examples
@given(w1=positive, w2=positive, x=positive)
def test_a_chain_of_two_weights_attains_the_linear_rule(w1, w2, x):
    bounds = linear(linear(constant(x), w1), w2)
    # With the second weight at 0 the Hessian is that of w₁ w₂ x: the bound does not depend on it.
    assert bounds == pytest.approx(scalar(lambda t: t[0] * t[1] * x, w1, w2), rel=1e-9)


@examples
@given(slope=positive, bend=positive, weight=positive)
def test_the_linear_rule_is_attained_with_a_curved_inner_map(slope, bend, weight):
    # z = w a(t), a = 1 + slope t + bend t²/2 at t = 0.
    found = scalar(lambda t: t[1] * (1 + slope * t[0] + bend * t[0] ** 2 / 2), 0.0, weight)
    assert linear(Bounds(1.0, slope, bend), weight) == pytest.approx(found, rel=1e-9)


@examples
@given(w=positive, b=positive, x=positive, n=st.integers(1, 4))
def test_equal_examples_attain_the_linear_rule_with_a_bias(w, b, x, n):
    xs = torch.full((n,), x, dtype=torch.float64)
    J = torch.stack([xs, torch.ones_like(xs)], dim=1)  # of w x_i + b
    norm = float((w * xs + b).norm())
    bounds = linear(constant(float(xs.norm())), w, b, n)
    assert bounds == pytest.approx((norm, float(torch.linalg.matrix_norm(J, 2)), 0.0), rel=1e-9)


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "erf", "sin"])
def test_the_entrywise_rule_is_attained_where_the_activation_bends_most(name):
    f = {**FUNCTIONS, "sigmoid": torch.sigmoid}[name]
    grid = torch.linspace(-3, 3, 60_001, dtype=torch.float64)
    curvatures = torch.func.vmap(torch.func.grad(torch.func.grad(f)))(grid).abs()
    z, x = float(grid[curvatures.argmax()]), 5.0
    constants = activation_constants(f)
    bounds = entrywise(linear(constant(x), abs(z) / x), constants, 1)
    assert bounds.smoothness == pytest.approx(scalar(lambda t: f(t[0] * x), z / x)[2], rel=1e-6)
    steepest = entrywise(linear(constant(x), 0.0), constants, 1)
    assert steepest.lipschitz == pytest.approx(scalar(lambda t: f(t[0] * x), 0.0)[1], rel=1e-9)


@examples
@given(outer=st.tuples(positive, positive), inner=st.tuples(positive, positive))
def test_polynomials_attain_the_chain_rule(outer, inner):
    (a, b), (c, d) = outer, inner
    found = scalar(lambda t: a * (u := c * t[0] + d * t[0] ** 2 / 2) + b * u**2 / 2, 0.0)
    bounds = compose(Bounds(0.0, a, b), Bounds(0.0, c, d))
    assert bounds == pytest.approx(found, rel=1e-9)


def test_a_kink_is_not_smooth_unless_nothing_reaches_it():
    relu = activation_constants(nn.ReLU())
    assert entrywise(Bounds(1.0, 2.0, 0.0), relu, 1) == (1.0, 2.0, math.inf)
    assert entrywise(constant(1.0), relu, 1) == (1.0, 0.0, 0.0)
    assert linear(Bounds(1.0, 2.0, math.inf), 0.0).smoothness == 2.0
    assert linear(Bounds(1.0, 2.0, math.inf), 0.5).smoothness == math.inf


# --- activations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SMOOTH_ACTIVATIONS, *FUNCTIONS])
def test_the_constants_are_the_suprema(name):
    f = SMOOTH_ACTIVATIONS.get(name) or FUNCTIONS[name]
    z = torch.linspace(-15, 15, 300_001, dtype=torch.float64, requires_grad=True)
    value = f(z)
    (slope,) = torch.autograd.grad(value.sum(), z, create_graph=True)
    bend = torch.zeros_like(z)
    if slope.requires_grad:
        (bend,) = torch.autograd.grad(slope.sum(), z)
    constants = activation_constants(f)
    # From above, and by no more than the grid or the printed digits: 1e-4 squared, 1e-6.
    for found, stated in ((slope.detach(), constants.slope), (bend, constants.bend)):
        most = float(found.abs().max())
        assert most <= stated * SLACK
        assert stated == pytest.approx(most, rel=2e-6)
    zero = torch.zeros((), dtype=torch.float64)
    assert constants.at_zero == pytest.approx(float(f(zero).abs()), rel=1e-9)
    largest = float(value.detach().abs().max())
    assert largest <= constants.largest
    assert constants.largest == pytest.approx(largest, rel=1e-5) or constants.largest == math.inf


def test_a_shifted_activation_is_bounded_by_the_sum():
    shifted = normalised_activation(nn.Sigmoid())
    constants, zero = activation_constants(shifted), torch.zeros((), dtype=torch.float64)
    assert float(shifted(zero).abs()) <= constants.at_zero
    assert constants.slope == pytest.approx(0.25 / shifted.scale)
    assert constants.largest == pytest.approx((1 + shifted.mean) / shifted.scale)


def test_kinks_are_seen():
    for module in (nn.ReLU(), nn.LeakyReLU(0.1), nn.ELU(0.5), nn.Softplus(threshold=1.0)):
        assert activation_constants(module).bend == math.inf
    assert activation_constants(nn.LeakyReLU(3.0)).slope == 3.0
    assert activation_constants(nn.ELU(2.0)).slope == 2.0


def test_an_unknown_activation_is_named():
    with pytest.raises(ValueError, match=r"activation=.*relu6"):
        activation_constants(nn.functional.relu6)
