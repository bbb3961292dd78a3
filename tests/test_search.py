import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adler.averaging import Average, geometric
from adler.search import Guard, Measurement, remembered_step_length, step_length


def scalar(value):
    return torch.tensor(float(value), dtype=torch.float64)


def search(
    slope,
    curvature,
    average=None,
    finite=True,
    trust_region=2.0,
    eps=0.0,
    beta=0.99,
    nat=1.0,
    reach=math.inf,
    max_kl=None,
    max_relative_change=None,
):
    measured = Measurement(
        *(scalar(value) for value in (slope, curvature, slope, nat, reach)), torch.tensor(finite)
    )
    return step_length(
        measured,
        Average.empty() if average is None else average,
        geometric,
        Guard(trust_region, max_kl, max_relative_change),
        beta=beta,
        eps=eps,
    )


def averaged(*rates, beta=0.99):
    average = Average.empty()
    for rate in rates:
        average = geometric.push(average, scalar(rate), beta)
    return average


def test_the_first_rate_is_the_minimiser():
    found, average = search(slope=6.0, curvature=2.0)
    assert float(found.rate) == pytest.approx(3.0)
    assert float(geometric.read(average)) == pytest.approx(3.0)
    assert not found.clipped
    assert not found.skipped


def test_the_trust_region_bounds_the_step_not_the_average():
    found, average = search(1.0, 1.0, averaged(1e6))
    assert float(found.rate) == 2.0
    assert found.clipped
    assert float(geometric.read(average)) > 2.0


def test_without_trust_region_the_average_is_applied():
    found, average = search(1.0, 1.0, averaged(1e6), trust_region=None)
    assert float(found.rate) == float(geometric.read(average))
    assert not found.clipped


def test_predictions_move_by_no_more_than_max_kl():
    # ½ η² c / nat = max_kl
    found, average = search(8.0, 2.0, averaged(3.0), nat=4.0, max_kl=0.25)
    assert float(found.rate) == pytest.approx(1.0)
    assert found.clipped
    assert float(geometric.read(average)) > 3.0


@pytest.mark.parametrize("nat", [0.0, -3.0, math.nan])
def test_a_scale_that_is_none_does_not_bound(nat):
    found, _ = search(8.0, 2.0, nat=nat, max_kl=0.1)
    assert float(found.rate) == pytest.approx(4.0)
    assert not found.skipped


@pytest.mark.parametrize("reach", [math.nan, -math.inf])
def test_a_rate_that_is_no_number_is_no_step(reach):
    found, _ = search(8.0, 2.0, reach=reach, max_relative_change=0.1)
    assert found.skipped
    assert float(found.rate) == 0.0


def test_an_unknown_likelihood_is_not_bounded_by_max_kl():
    found, _ = search(8.0, 2.0, nat=math.inf, max_kl=1e-9)
    assert float(found.rate) == pytest.approx(4.0)


def test_weights_move_by_no_more_than_max_relative_change():
    found, _ = search(8.0, 2.0, reach=5.0, max_relative_change=0.1)
    assert float(found.rate) == pytest.approx(0.5)
    assert found.clipped


def test_weights_are_bounded_where_there_is_no_curvature():
    found, _ = search(1.0, 0.0, averaged(3.0), reach=5.0, max_relative_change=0.1)
    assert float(found.rate) == pytest.approx(0.5)


def test_without_trust_region_there_is_no_guard_at_all():
    options = {"nat": 1e-9, "reach": 1e-9, "max_kl": 1e-9, "max_relative_change": 1e-9}
    found, _ = search(8.0, 2.0, trust_region=None, **options)
    assert float(found.rate) == pytest.approx(4.0)
    assert not found.clipped


@pytest.mark.parametrize("trust_region", [2.0, None])
@pytest.mark.parametrize(
    ("slope", "curvature", "finite"),
    [
        (0.0, 0.0, True),
        (0.0, 1.0, True),
        (math.nan, 1.0, True),
        (math.inf, 1.0, True),
        (1.0, math.nan, True),
        (1.0, math.inf, True),
        (-1.0, 1.0, True),
        (1.0, 1.0, False),
    ],
)
def test_nonsense_is_skipped_and_forgotten(slope, curvature, finite, trust_region):
    before = averaged(0.5)
    found, after = search(slope, curvature, before, finite, trust_region)
    assert found.skipped
    assert not found.clipped
    assert float(found.rate) == 0.0
    assert all(a.equal(b) for a, b in zip(before, after))


@pytest.mark.parametrize("curvature", [0.0, -3.0])
def test_without_positive_curvature_the_average_steps_alone(curvature):
    before = averaged(0.5, 0.25)
    found, after = search(1.0, curvature, before)
    assert found.clipped
    assert not found.skipped
    assert float(found.rate) == float(geometric.read(before))
    assert all(a.equal(b) for a, b in zip(before, after))


@pytest.mark.parametrize("curvature", [0.0, -3.0])
def test_without_positive_curvature_nor_average_there_is_no_step(curvature):
    found, after = search(1.0, curvature)
    assert found.skipped
    assert float(found.rate) == 0.0
    assert float(after.weight) == 0.0


def test_algorithm_1_takes_zero_curvature_at_one_over_eps():
    found, _ = search(1.0, 0.0, trust_region=None, eps=1e-10)
    assert float(found.rate) == pytest.approx(1e10)


positive = st.floats(1e-6, 1e6)


@given(st.lists(st.tuples(positive, positive), min_size=1, max_size=20), st.floats(0.1, 10))
def test_the_step_never_exceeds_the_trust_region(measurements, radius):
    average = Average.empty()
    for slope, curvature in measurements:
        found, average = search(slope, curvature, average, trust_region=radius)
        bound = radius * slope / curvature
        assert 0 < float(found.rate) <= bound * (1 + 1e-12)
        assert bool(found.clipped) == (float(geometric.read(average)) > bound)


@given(
    st.lists(
        st.tuples(
            st.floats(allow_nan=True, allow_infinity=True),
            st.floats(allow_nan=True, allow_infinity=True),
        ),
        max_size=20,
    )
)
def test_no_sequence_of_measurements_breaks_the_average(measurements):
    average = Average.empty()
    for slope, curvature in measurements:
        found, average = search(slope, curvature, average, eps=1e-10)
        assert math.isfinite(float(found.rate))
        assert float(found.rate) >= 0
        assert all(torch.isfinite(t) for t in average)


def remembered(slope, bound, average, reach=math.inf):
    numbers = (scalar(value) for value in (slope, reach, 0.5, bound))
    guard = Guard(2.0, None, 0.1)
    return remembered_step_length(*numbers, average, geometric, guard)


def test_a_step_between_measurements_uses_the_average():
    found = remembered(1.0, math.inf, averaged(0.7))
    assert float(found.rate) == pytest.approx(0.7)
    assert not found.clipped


def test_a_step_between_measurements_stays_within_the_last_bound():
    found = remembered(1.0, 0.2, averaged(0.7))
    assert float(found.rate) == pytest.approx(0.2)
    assert found.clipped


def test_a_step_between_measurements_looks_at_its_own_reach():
    found = remembered(1.0, 0.2, averaged(0.7), reach=0.5)
    assert float(found.rate) == pytest.approx(0.05)
    assert found.clipped


def test_the_bound_of_a_measurement_lasts_until_the_next():
    found, average = search(1.0, 1.0, averaged(1e6), nat=8.0, max_kl=0.04)
    assert float(found.bound) == pytest.approx(0.8)
    assert float(remembered(1.0, float(found.bound), average).rate) == pytest.approx(0.8)


@pytest.mark.parametrize("slope", [0.0, -1.0, math.nan, math.inf])
def test_a_step_between_measurements_skips_bad_gradients(slope):
    found = remembered(slope, 0.5, averaged(0.7))
    assert found.skipped
    assert float(found.rate) == 0.0


def test_a_step_before_any_measurement_is_skipped():
    found = remembered(1.0, math.nan, Average.empty())
    assert found.skipped
    assert float(found.rate) == 0.0


@pytest.mark.parametrize("slope", [1e-30, 1.0, 1e30])
def test_no_step_is_so_long_that_many_of_them_overflow(slope):
    """A flat batch has no rate of its own, and the average may hold one of 1/eps."""
    flat_before = Average(scalar(math.log(1e300)), scalar(1.0))
    found, _ = search(slope, 0.0, flat_before)
    assert float(found.rate) * max(1.0, math.sqrt(slope)) == pytest.approx(1e18)
    assert found.clipped
    unguarded, _ = search(slope, 1e-300 * slope, flat_before, trust_region=None, beta=0.5)
    assert float(unguarded.rate) > 1e200
