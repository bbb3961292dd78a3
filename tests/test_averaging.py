import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.swa_utils import AveragedModel

from adler._averaging import Average, arithmetic, geometric, polynomial_decay

rates = st.lists(st.floats(1e-8, 1e8), min_size=1, max_size=30)
discounts = st.floats(0, 0.999)


def push_all(mean, values, beta):
    average = Average.empty()
    for value in values:
        average = mean.push(average, torch.tensor(value, dtype=torch.float64), beta)
    return float(mean.read(average))


def weights(n, beta):
    return [beta ** (n - 1 - j) for j in range(n)]


@given(rates, discounts)
def test_geometric_is_the_discounted_mean_of_logarithms(values, beta):
    w = weights(len(values), beta)
    expected = math.exp(math.fsum(a * math.log(v) for a, v in zip(w, values)) / math.fsum(w))
    assert math.isclose(push_all(geometric, values, beta), expected, rel_tol=1e-9)


@given(rates, discounts)
def test_arithmetic_is_the_discounted_mean(values, beta):
    w = weights(len(values), beta)
    expected = math.fsum(a * v for a, v in zip(w, values)) / math.fsum(w)
    assert math.isclose(push_all(arithmetic, values, beta), expected, rel_tol=1e-9)


@given(rates, discounts)
def test_means_lie_between_the_extremes_and_in_order(values, beta):
    low, high = push_all(geometric, values, beta), push_all(arithmetic, values, beta)
    slack = 1 + 1e-9
    assert min(values) <= low * slack
    assert low <= high * slack
    assert high <= max(values) * slack


def test_discount_zero_keeps_the_last_value_only():
    assert math.isclose(push_all(geometric, [5.0, 3.0], 0.0), 3.0)


def test_an_empty_average_reads_nan():
    assert math.isnan(float(geometric.read(Average.empty())))


def test_pushing_does_not_mutate():
    average = geometric.push(Average.empty(), torch.tensor(2.0), 0.9)
    before = [t.clone() for t in average]
    geometric.push(average, torch.tensor(7.0), 0.9)
    assert all(a.equal(b) for a, b in zip(average, before))


def test_a_float32_value_is_accumulated_in_float64():
    average = geometric.push(Average.empty(), torch.tensor(2.0, dtype=torch.float32), 0.9)
    assert average.total.dtype == torch.float64


# --- iterates -------------------------------------------------------------------------------------


def averaged(values, gamma):
    """The library's way: a model of one parameter, averaged after every step."""
    model = torch.nn.Linear(1, 1, bias=False).double()
    twin = AveragedModel(model, multi_avg_fn=polynomial_decay(gamma), use_buffers=True)
    for value in values:
        torch.nn.init.constant_(model.weight, value)
        twin.update_parameters(model)
    return float(twin.module.weight.detach())


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-10, 10), min_size=1, max_size=30), st.floats(0, 20))
def test_iterates_are_averaged_by_the_recurrence(values, gamma):
    expected = values[0]
    for t, value in enumerate(values[1:], start=2):
        expected += (gamma + 1) / (gamma + t) * (value - expected)
    assert math.isclose(averaged(values, gamma), expected, rel_tol=1e-9, abs_tol=1e-9)


@pytest.mark.parametrize("gamma", [0, 1, 3, 8])
def test_the_weight_of_an_iterate_is_a_binomial_coefficient(gamma):
    """Unrolled, the recurrence gives iterate j the weight C(j + γ − 1, γ), of degree γ in j."""
    steps = 12
    weights = [math.comb(j + gamma - 1, gamma) for j in range(1, steps + 1)]
    for j in range(steps):
        impulse = [float(i == j) for i in range(steps)]
        assert math.isclose(averaged(impulse, gamma), weights[j] / sum(weights), rel_tol=1e-12)


def test_buffers_are_averaged_too_and_counts_are_the_last():
    model = torch.nn.BatchNorm1d(2)
    twin = AveragedModel(model, multi_avg_fn=polynomial_decay(1.0), use_buffers=True)
    means = []
    for _ in range(3):
        model(torch.randn(5, 2))
        means.append(model.running_mean.clone())
        twin.update_parameters(model)
    assert int(twin.module.num_batches_tracked) == 3
    expected = (means[0] + 2 * means[1] + 3 * means[2]) / 6
    torch.testing.assert_close(twin.module.running_mean, expected)


@pytest.mark.parametrize("gamma", [-1.0, math.nan, math.inf, "8", True])
def test_a_bad_gamma_is_named(gamma):
    with pytest.raises(ValueError, match="gamma="):
        polynomial_decay(gamma)
