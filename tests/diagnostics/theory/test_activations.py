import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adler.diagnostics import activations
from adler.diagnostics.theory.activations import (
    hermite_coefficients,
    nonlinearity,
    normalised_activation,
)
from adler.diagnostics.theory.duals import dual_activation

NORMALISED = {
    "relu": torch.relu,
    "gelu": nn.GELU(),
    "sigmoid": torch.sigmoid,
    "cos": torch.cos,
    "hardtanh": F.hardtanh,
}


# --- Hermite coefficients -------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 1, 2, 7, 30])
def test_hermite_polynomials_are_their_own_coefficients(k):
    series = np.zeros(k + 1)
    series[k] = 1 / math.sqrt(math.factorial(k))

    def polynomial(x):
        return torch.from_numpy(np.polynomial.hermite_e.hermeval(x.numpy(), series))

    found = hermite_coefficients(polynomial, 40)
    expected = torch.zeros(41, dtype=torch.float64)
    expected[k] = 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


def test_hermite_coefficients_of_the_relu_and_the_sine():
    relu = [1 / math.sqrt(2 * math.pi), 0.5, 1 / (2 * math.sqrt(math.pi)), 0.0]
    found = hermite_coefficients(torch.relu, 3)
    torch.testing.assert_close(found, torch.tensor(relu).double(), rtol=1e-7, atol=1e-14)
    sine = hermite_coefficients(torch.sin, 40) ** 2
    for k in range(41):
        expected = math.exp(-1) / math.factorial(k) if k % 2 else 0.0
        assert float(sine[k]) == pytest.approx(expected, abs=1e-15)


def test_nonlinearity():
    assert nonlinearity(torch.cos) == pytest.approx(1, abs=1e-13)  # even
    relu = 1 - 0.25 / (0.5 - 1 / (2 * math.pi))
    assert nonlinearity(nn.ReLU()) == pytest.approx(relu, rel=1e-12)
    sine = 1 - math.exp(-1) / ((1 - math.exp(-2)) / 2)
    assert nonlinearity(torch.sin) == pytest.approx(sine, rel=1e-12)
    assert nonlinearity(normalised_activation(torch.sin)) == pytest.approx(sine, rel=1e-12)
    with pytest.raises(ValueError, match="is constant"):
        nonlinearity(torch.ones_like)


@pytest.mark.parametrize("size", [0.0, 1e-6, 1e-3, 1.0])
def test_a_small_nonlinearity_is_not_lost_to_rounding(size):
    def activation(x):
        return 3 * (x + size * (x**3 - 3 * x) / math.sqrt(6)) - 2  # 3 (h_1 + size h_3) - 2

    expected = size**2 / (1 + size**2)
    assert nonlinearity(activation) == pytest.approx(expected, rel=1e-9, abs=1e-28)


# --- normalised activations -----------------------------------------------------------------------


@pytest.mark.parametrize("name", NORMALISED)
def test_normalised_activations_have_mean_zero_and_variance_one(name):
    activation = NORMALISED[name]
    module, count = normalised_activation(activation), 400_000
    u = torch.randn(count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = module(u)
    assert abs(float(values.mean())) < 4.5 / math.sqrt(count)
    squares = values.square()
    assert abs(float(squares.mean()) - 1) < 4.5 * float(squares.std()) / math.sqrt(count)
    torch.testing.assert_close(values * module.scale + module.mean, activation(u))
    dual = dual_activation(module)
    assert dual(0.0) == pytest.approx(0, abs=1e-15)
    assert dual(1.0) == pytest.approx(1, rel=1e-14)


def test_a_normalised_activation_is_a_module_like_others():
    module = normalised_activation(nn.ReLU())
    model = nn.Sequential(nn.Linear(3, 4), module)
    assert not list(module.parameters())
    x = torch.randn(5, 3)
    assert model(x).dtype == torch.float32
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(x), model(x), rtol=0, atol=0)
        assert (twin[1].mean, twin[1].scale) == (module.mean, module.scale)
    assert repr(normalised_activation(torch.tanh)) == (
        "NormalisedActivation(tanh, mean=0, scale=0.627929)"
    )
    with pytest.raises(ValueError, match="is constant"):
        normalised_activation(torch.zeros_like)


def test_everything_public_is_listed():
    public = {n for n, o in vars(activations).items() if not n.startswith("_") and callable(o)}
    own = {n for n in public if getattr(activations, n).__module__ == activations.__name__}
    assert own <= set(activations.__all__)
