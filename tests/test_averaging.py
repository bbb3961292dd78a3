import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.loops import NoSynchronisation

from adler._averaging import Average, arithmetic, geometric

rates = st.lists(st.floats(1e-8, 1e8), min_size=1, max_size=30)
discounts = st.floats(0, 1)
examples = settings(deadline=None)  # however busy the machine


def push_all(mean, values, beta):
    average = Average.empty()
    for value in values:
        average = mean.push(average, torch.tensor(value, dtype=torch.float64), beta)
    return float(mean.read(average))


def weights(n, beta):
    return [beta ** (n - 1 - j) for j in range(n)]


@examples
@given(rates, discounts)
def test_geometric_is_the_discounted_mean_of_logarithms(values, beta):
    w = weights(len(values), beta)
    expected = math.exp(math.fsum(a * math.log(v) for a, v in zip(w, values)) / math.fsum(w))
    assert math.isclose(push_all(geometric, values, beta), expected, rel_tol=1e-9)


@examples
@given(rates, discounts)
def test_arithmetic_is_the_discounted_mean(values, beta):
    w = weights(len(values), beta)
    expected = math.fsum(a * v for a, v in zip(w, values)) / math.fsum(w)
    assert math.isclose(push_all(arithmetic, values, beta), expected, rel_tol=1e-9)


@examples
@given(rates, discounts)
def test_means_lie_between_the_extremes_and_in_order(values, beta):
    low, high = push_all(geometric, values, beta), push_all(arithmetic, values, beta)
    slack = 1 + 1e-9
    assert min(values) <= low * slack
    assert low <= high * slack
    assert high <= max(values) * slack


def test_discount_zero_keeps_the_last_value_only():
    assert math.isclose(push_all(geometric, [5.0, 3.0], 0.0), 3.0)


def test_discount_one_forgets_nothing():
    assert math.isclose(push_all(geometric, [2.0, 4.0, 8.0, 16.0], 1.0), 2**2.5)
    assert math.isclose(push_all(arithmetic, [2.0, 4.0, 8.0, 16.0], 1.0), 7.5)


def test_an_empty_average_reads_nan():
    assert math.isnan(float(geometric.read(Average.empty())))


def test_pushing_does_not_mutate():
    average = geometric.push(Average.empty(), torch.tensor(2.0), 0.9)
    before = [t.clone() for t in average]
    geometric.push(average, torch.tensor(7.0), 0.9)
    assert all(a.equal(b) for a, b in zip(average, before))


@pytest.mark.parametrize("mean", [geometric, arithmetic])
def test_an_average_is_chosen_without_a_look(mean):
    before = mean.push(Average.empty(), torch.tensor(2.0), 0.9)
    after = mean.push(before, torch.tensor(7.0), 0.9)
    with NoSynchronisation():
        kept, replaced = (after.where(torch.tensor(c), before) for c in (False, True))
    assert all(a.equal(b) for a, b in zip(kept, before))
    assert all(a.equal(b) for a, b in zip(replaced, after))


def test_a_float32_value_is_accumulated_in_float64():
    average = geometric.push(Average.empty(), torch.tensor(2.0, dtype=torch.float32), 0.9)
    assert average.total.dtype == torch.float64
    assert float(average.total) == math.log(2.0)  # its logarithm too
