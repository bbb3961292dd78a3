import math

import numpy as np
import pytest
import torch
from support.cases import ACTIVATIONS
from torch import nn
from torch.nn import functional as F

from adler.diagnostics import duals
from adler.diagnostics.theory.activations import normalised_activation
from adler.diagnostics.theory.duals import DualActivation, dual_activation

SMOOTH = {
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
    "gelu": nn.GELU(),
    "silu": F.silu,
    "softplus": nn.Softplus(),
    "cubic": lambda x: x**3 - x + 1,
    "erf": torch.erf,
    "sin": torch.sin,
    "cos": torch.cos,
    "identity": nn.Identity(),
}
CLOSED = {
    "relu module": nn.ReLU(),
    "relu": torch.relu,
    "functional relu": F.relu,
    "leaky relu": nn.LeakyReLU(0.3),
    "functional leaky relu": F.leaky_relu,
    "abs": torch.abs,
    "sign": torch.sign,
    "erf": torch.erf,
    "special erf": torch.special.erf,
    "sin": torch.sin,
    "cos": torch.cos,
    "identity": nn.Identity(),
    "normalised relu": normalised_activation(nn.ReLU()),
    "normalised cos": normalised_activation(torch.cos),
}
RHO = torch.linspace(-1, 1, 41, dtype=torch.float64)


def quadrature(activation, rho, nodes=80):
    """``E φ(u) φ(ρ u + sqrt(1 - ρ²) w)``, Gauss-Hermite on pairs."""
    x, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(nodes))
    u, w = x[:, None], x
    v = rho * u + math.sqrt(1 - rho**2) * w
    weight = weights[:, None] * weights / (2 * math.pi)
    return float((weight * activation(u) * activation(v)).sum())


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_duals_agree_with_quadrature_of_the_pair(name):
    activation = SMOOTH[name]
    dual = dual_activation(activation)
    for rho in (-1.0, -0.7, 0.0, 0.3, 0.95, 1.0):
        # 80 nodes leave 1e-9 for tanh, whose poles are nearest to the real line
        assert dual(rho) == pytest.approx(quadrature(activation, rho), rel=1e-8, abs=1e-9)


@pytest.mark.parametrize("name", CLOSED)
def test_closed_forms_agree_with_the_hermite_series(name):
    dual = dual_activation(CLOSED[name])
    assert dual.closed_form is not None
    series = DualActivation(dual.coefficients, dual.tail)
    # Left of the series: its tail, at most, at a high power of ρ.
    error = (dual(RHO) - series(RHO)).abs()
    allowed = sum(dual.tail) * RHO.abs() ** len(dual.coefficients) + 1e-14
    assert bool((error <= allowed).all())
    torch.testing.assert_close(dual(RHO)[[0, -1]], series(RHO)[[0, -1]], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", [*ACTIVATIONS, "hardswish", "sign", "leaky relu"])
def test_duals_agree_with_monte_carlo(name):
    activation = {**ACTIVATIONS, **CLOSED, "hardswish": F.hardswish}[name]
    dual, count = dual_activation(activation), 400_000
    u, w = torch.randn(2, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for rho in (-0.95, -0.4, 0.2, 0.8, 1.0):
        product = activation(u) * activation(rho * u + math.sqrt(1 - rho**2) * w)
        sigma = float(product.std()) / math.sqrt(count)
        assert abs(float(product.mean()) - dual(rho)) < 4.5 * sigma + 1e-15


def test_known_values():
    relu = dual_activation(nn.ReLU())
    assert [relu(1.0), relu(0.0), relu(-1.0)] == pytest.approx([0.5, 1 / (2 * math.pi), 0.0])
    assert dual_activation(torch.erf)(1.0) == pytest.approx(2 / math.pi * math.asin(2 / 3))
    assert dual_activation(torch.exp)(0.5) == pytest.approx(math.exp(1.5), rel=1e-13)
    assert dual_activation(torch.tanh)(0.0) == 0  # odd, exactly


def test_the_result_is_of_the_kind_dtype_and_shape_of_the_correlation():
    for activation in (torch.relu, torch.tanh):
        dual = dual_activation(activation)
        assert isinstance(dual(0.5), float)
        found = dual(torch.full((2, 3), 0.5, dtype=torch.float32))
        assert found.dtype == torch.float32
        assert found.shape == (2, 3)
        torch.testing.assert_close(found, torch.full((2, 3), dual(0.5), dtype=torch.float32))
        assert dual_activation(dual) is dual


def test_rounding_beyond_one_is_forgiven_and_more_is_refused():
    dual = dual_activation(torch.relu)
    assert dual(1 + 1e-15) == dual(1.0)
    for bad in (1.001, math.nan, torch.tensor([0.0, -1.1])):
        with pytest.raises(ValueError, match="rho="):
            dual(bad)
    with pytest.raises(TypeError, match=r"rho: dtype torch.int64"):
        dual(torch.tensor(1))


@pytest.mark.parametrize(
    "activation", [torch.erf, torch.relu, torch.cos], ids=["erf", "relu", "cos"]
)
@pytest.mark.parametrize("degree", [0, 3, 4, 9])
def test_the_tail_bounds_the_error_of_a_truncated_series(activation, degree):
    exact = dual_activation(activation)
    dual = dual_activation(activation, degree=degree)
    truncated = DualActivation(dual.coefficients, dual.tail)
    assert len(truncated.coefficients) == degree + 1
    error = truncated(RHO) - exact(RHO)
    bound = sum(truncated.tail) * RHO.abs() ** (degree + 1)
    assert bool((error.abs() <= bound + 1e-14).all())
    assert bool((error[RHO >= 0] >= -1e-14).all())  # an upper bound there
    assert float(error[[0, -1]].abs().max()) < 1e-14
    # The tail is needed: without it the error at 1 is all of it, up to rounding.
    bare = DualActivation(dual.coefficients, (0.0, 0.0))
    assert float(exact(RHO)[-1] - bare(RHO)[-1]) == pytest.approx(sum(dual.tail), abs=1e-14)


def test_a_module_is_evaluated_in_double_precision_and_left_alone():
    prelu = nn.PReLU(init=0.3)
    state = torch.get_rng_state()
    found = dual_activation(prelu)(RHO)
    assert prelu.weight.dtype == torch.float32
    assert torch.get_rng_state().equal(state)
    expected = dual_activation(nn.LeakyReLU(float(prelu.weight.detach())))(RHO)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # the tail at degree 512
    in_place = dual_activation(nn.ELU(inplace=True))(RHO)
    torch.testing.assert_close(in_place, dual_activation(F.elu)(RHO), rtol=0, atol=0)


def test_a_subclass_is_not_taken_for_its_parent():
    class Shifted(nn.ReLU):
        def forward(self, x):
            return super().forward(x) + 1

    dual = dual_activation(Shifted())
    assert dual(0.0) == pytest.approx((1 + 1 / math.sqrt(2 * math.pi)) ** 2)


def test_what_is_no_activation_is_refused():
    for bad in (nn.Tanh, 3, None):
        with pytest.raises(TypeError, match=r"activation=.*expected a module or a function"):
            dual_activation(bad)
    for bad in (nn.Dropout(), nn.Softmax(0), torch.sum, lambda x: x[:5], lambda x: 1.0):
        with pytest.raises(ValueError, match=r"activation=.*each entry by itself"):
            dual_activation(bad)
    with pytest.raises(ValueError, match=r"activation=.* not finite on"):
        dual_activation(torch.log)
    with pytest.raises(ValueError, match="grows too fast"):
        dual_activation(lambda x: torch.exp(x**2 / 4))
    for degree in (-1, 1.5, True):
        with pytest.raises(ValueError, match="degree="):
            dual_activation(torch.tanh, degree=degree)


def test_everything_public_is_listed():
    public = {n for n, o in vars(duals).items() if not n.startswith("_") and callable(o)}
    own = {n for n in public if getattr(duals, n).__module__ == duals.__name__}
    assert own <= set(duals.__all__)
