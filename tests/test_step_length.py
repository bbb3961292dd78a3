import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adler._averaging import Average, geometric
from adler._step_length import Guard, Measurement, Remembered, remembered_step_length, step_length


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
    trusted=None,
    remembered=None,
    smoothing=0.0,
):
    measured = Measurement(
        *(scalar(value) for value in (slope, curvature, slope, nat, reach)),
        torch.tensor(finite),
        None if trusted is None else torch.tensor(trusted),
    )
    return step_length(
        measured,
        Average.empty() if average is None else average,
        geometric,
        Guard(trust_region, max_kl, max_relative_change),
        beta=beta,
        eps=eps,
        remembered=Remembered.nothing() if remembered is None else remembered,
        smoothing=smoothing,
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


# --- between measurements -------------------------------------------------------------------------


def ratio(value, nat=math.inf):
    return Remembered(Average(scalar(value), scalar(1.0)), scalar(nat))


def remembered(slope, past, average, reach=math.inf, squared_norm=None, **guard):
    numbers = (scalar(v) for v in (slope, slope if squared_norm is None else squared_norm, reach))
    options = {"trust_region": 2.0, "max_kl": None, "max_relative_change": 0.1, **guard}
    return remembered_step_length(*numbers, past, average, geometric, Guard(**options), eps=0.0)


def test_a_step_between_measurements_uses_the_average():
    found = remembered(1.0, ratio(1.0), averaged(0.7))
    assert float(found.rate) == pytest.approx(0.7)
    assert not found.clipped


def test_a_step_between_measurements_stays_within_two_minimisers_along_its_own_direction():
    # c = 10 · d·d, so that the minimiser is g·d / (10 d·d)
    found = remembered(3.0, ratio(10.0), averaged(0.7), squared_norm=2.0)
    assert float(found.minibatch_lr) == pytest.approx(3 / 20)
    assert float(found.rate) == pytest.approx(2 * 3 / 20)
    assert found.clipped


def test_a_step_between_measurements_moves_predictions_by_no_more_than_max_kl():
    # ½ η² (0.5 · 8) / 4 = 0.25 with the present gradient, whatever it was when c was measured
    found = remembered(8.0, ratio(0.5, nat=4.0), averaged(3.0), max_kl=0.25)
    assert float(found.rate) == pytest.approx(math.sqrt(0.5))
    assert found.clipped


def test_a_step_between_measurements_looks_at_its_own_reach():
    found = remembered(1.0, ratio(10.0), averaged(0.7), reach=0.5)
    assert float(found.rate) == pytest.approx(0.05)
    assert found.clipped


def test_a_measurement_is_remembered_until_the_next():
    found, average = search(2.0, 3.0, averaged(1e6), nat=8.0, max_kl=0.04)
    assert float(found.remembered.curvature(scalar(4.0))) == pytest.approx(6.0)
    after = remembered(2.0, found.remembered, average, max_kl=0.04)
    assert float(after.rate) == pytest.approx(float(found.rate))
    assert after.remembered is found.remembered


@pytest.mark.parametrize(("curvature", "finite"), [(0.0, True), (-1.0, True), (5.0, False)])
def test_what_is_not_admitted_is_not_remembered(curvature, finite):
    found, _ = search(1.0, curvature, averaged(0.5), finite, remembered=ratio(3.0, nat=2.0))
    assert float(found.remembered.curvature(scalar(1.0))) == 3.0
    assert float(found.remembered.nat) == 2.0


@pytest.mark.parametrize("slope", [0.0, -1.0, math.nan, math.inf])
def test_a_step_between_measurements_skips_bad_gradients(slope):
    found = remembered(slope, ratio(1.0), averaged(0.7))
    assert found.skipped
    assert float(found.rate) == 0.0


def test_a_step_before_any_measurement_is_skipped():
    found = remembered(1.0, Remembered.nothing(), Average.empty())
    assert found.skipped
    assert float(found.rate) == 0.0


@given(positive, positive, positive, positive, positive, st.floats(0.1, 10))
def test_no_average_takes_a_step_between_measurements_past_the_guard(
    slope, squared_norm, rho, nat, average, radius
):
    options = {"trust_region": radius, "max_kl": 0.1, "max_relative_change": None}
    found = remembered(
        slope, ratio(rho, nat), averaged(average), squared_norm=squared_norm, **options
    )
    c, rate = rho * squared_norm, float(found.rate)
    assert 0 < rate <= radius * slope / c * (1 + 1e-12)
    assert rate**2 * c / 2 <= 0.1 * nat * (1 + 1e-12)


# --- measurements that contradict the gradient; parts of a batch ----------------------------------


def test_a_distrusted_measurement_steps_by_the_average_under_the_last_bound():
    before = averaged(0.7)
    found, after = search(1.0, 1e-6, before, trusted=False, remembered=ratio(10.0))
    assert float(found.rate) == pytest.approx(0.2)
    assert found.clipped
    assert not found.skipped
    assert all(a.equal(b) for a, b in zip(before, after))
    assert float(found.remembered.curvature(scalar(1.0))) == 10.0


@pytest.mark.parametrize("trust_region", [2.0, None])
def test_a_distrusted_measurement_without_a_past_is_no_step(trust_region):
    found, after = search(1.0, 1.0, trusted=False, trust_region=trust_region)
    assert found.skipped
    assert float(after.weight) == 0.0


def test_a_trusted_measurement_is_as_any_other():
    for past in (ratio(1e-9), ratio(1e9)):
        found, _ = search(6.0, 2.0, trusted=True, remembered=past)
        assert float(found.rate) == pytest.approx(3.0)


def test_parts_are_averaged_before_they_are_inverted():
    past = Remembered.nothing()
    for number, curvature in enumerate((1.0, 9.0, 2.0)):
        found, _ = search(2.0, curvature, smoothing=0.75, remembered=past)
        past = found.remembered
        weights = [0.75**k for k in range(number, -1, -1)]
        mean = sum(w * c for w, c in zip(weights, (1.0, 9.0, 2.0))) / sum(weights)
        assert float(found.minibatch_lr) == pytest.approx(2 / mean)


def test_a_flat_part_counts_and_an_infinite_one_does_not():
    past = search(1.0, 4.0, smoothing=0.5)[0].remembered
    found, _ = search(1.0, 0.0, smoothing=0.5, remembered=past)
    assert float(found.minibatch_lr) == pytest.approx((0.5 + 1) / (0.5 * 4.0))
    found, _ = search(1.0, math.inf, smoothing=0.5, remembered=past)
    assert found.skipped
    assert float(found.remembered.curvature(scalar(1.0))) == 4.0


@pytest.mark.parametrize("slope", [1e-30, 1.0, 1e30])
def test_no_step_is_so_long_that_many_of_them_overflow(slope):
    """A flat batch has no rate of its own, and the average may hold one of 1/eps."""
    flat_before = Average(scalar(math.log(1e300)), scalar(1.0))
    found, _ = search(slope, 0.0, flat_before)
    assert float(found.rate) * max(1.0, math.sqrt(slope)) == pytest.approx(1e18)
    assert found.clipped
    unguarded, _ = search(slope, 1e-300 * slope, flat_before, trust_region=None, beta=0.5)
    assert float(unguarded.rate) > 1e200
