import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adler import Guard
from adler._averaging import Average, arithmetic, geometric
from adler._step_length import ENTRIES, Measurement, Rule, SearchState, step_length

TRUST_REGION = Guard(max_relative_change=None)
examples = settings(deadline=None)  # however busy the machine


def scalar(value):
    return torch.tensor(float(value), dtype=torch.float64)


def bounded(**bounds):
    """A guard with these bounds and the trust region only."""
    return Guard(**{"max_relative_change": None, **bounds})


def search(slope, curvature=None, state=None, *, guard=TRUST_REGION, squared_norm=None, **more):
    """One step; without a curvature it does not measure. ``d·d`` is the slope, as along ``g``."""
    seen = {"loss_per_nat": scalar(more.pop("loss_per_nat"))} if "loss_per_nat" in more else {}
    for key in ("finite", "trusted"):
        seen[key] = torch.tensor(more.pop(key)) if key in more else None
    seen["spread"] = more.pop("spread", None)
    measurement = Measurement(
        scalar(slope),
        scalar(slope if squared_norm is None else squared_norm),
        None if curvature is None else scalar(curvature),
        **seen,
    )
    state = SearchState.empty() if state is None else state
    rule = Rule(more.pop("mean", geometric), guard=guard, **{"eps": 0.0, **more})
    return step_length(measurement, state, rule)


def averaged(*rates, beta=0.99):
    """After steps at these rates, of which only the rates are known."""
    average = Average.empty()
    for rate in rates:
        average = geometric.push(average, scalar(rate), beta)
    return SearchState.empty()._replace(rates=average, steps=len(rates))


def remembering(ratio, loss_per_nat=math.inf, state=None):
    """The same, with a ratio of ``c`` to ``d·d`` of a measurement."""
    state = SearchState.empty() if state is None else state
    ratios = Average(scalar(ratio), scalar(1.0))
    return state._replace(ratios=ratios, loss_per_nat=scalar(loss_per_nat))


def mean(state):
    return float(geometric.read(state.rates))


def remembers_the_same(before, after):
    """All but the last minibatch rate and the number of steps."""
    pairs = [*zip(before.rates, after.rates), *zip(before.ratios, after.ratios)]
    return all(a.equal(b) for a, b in [*pairs, (before.loss_per_nat, after.loss_per_nat)])


def test_the_first_rate_is_the_minimiser():
    found, after = search(slope=6.0, curvature=2.0)
    assert float(found.rate) == pytest.approx(3.0)
    assert mean(after) == pytest.approx(3.0)
    assert float(after.minibatch_lr) == pytest.approx(3.0)
    assert after.steps == 1
    assert not found.clipped
    assert not found.skipped


def test_the_trust_region_bounds_the_step_not_the_average():
    found, after = search(1.0, 1.0, averaged(1e6))
    assert float(found.rate) == 2.0
    assert found.clipped
    assert mean(after) > 2.0


@pytest.mark.parametrize("guard", [None, bounded(trust_region=None)])
def test_without_trust_region_the_average_is_applied(guard):
    found, after = search(1.0, 1.0, averaged(1e6), guard=guard)
    assert float(found.rate) == mean(after)
    assert not found.clipped


def test_predictions_move_by_no_more_than_max_kl():
    # ½ η² c / nat = max_kl
    found, after = search(8.0, 2.0, averaged(3.0), loss_per_nat=4.0, guard=bounded(max_kl=0.25))
    assert float(found.rate) == pytest.approx(1.0)
    assert found.clipped
    assert mean(after) > 3.0


@pytest.mark.parametrize("nat", [0.0, -3.0, math.nan])
def test_a_scale_that_is_none_does_not_bound(nat):
    found, _ = search(8.0, 2.0, loss_per_nat=nat, guard=bounded(max_kl=0.1))
    assert float(found.rate) == pytest.approx(4.0)
    assert not found.skipped


@pytest.mark.parametrize("rate", [math.nan, math.inf])
def test_a_rate_that_is_no_number_is_no_step(rate):
    before = averaged(1.0)
    before = before._replace(rates=before.rates._replace(total=scalar(rate)))
    found, _ = search(8.0, None, before, guard=None)
    assert found.skipped
    assert float(found.rate) == 0.0


def test_an_unknown_likelihood_is_not_bounded_by_max_kl():
    for unknown in ({"loss_per_nat": math.inf}, {}):
        found, _ = search(8.0, 2.0, guard=bounded(max_kl=1e-9), **unknown)
        assert float(found.rate) == pytest.approx(4.0)


def test_every_bound_works_without_the_others():
    alone = {"trust_region": 0.1, "max_kl": 0.01}
    expected = {"trust_region": 0.4, "max_kl": 0.2}
    for name, bound in alone.items():
        guard = Guard(**{**dict.fromkeys(alone), name: bound})
        found, _ = search(8.0, 2.0, averaged(3.0), loss_per_nat=4.0, guard=guard)
        assert float(found.rate) == pytest.approx(expected[name]), name
        assert found.clipped
    found, _ = search(8.0, 2.0, averaged(3.0), loss_per_nat=4.0, guard=Guard(**alone))
    assert float(found.rate) == pytest.approx(0.2)
    # Of a tensor's move, which the step's length does not bound, nothing is known here.
    free, _ = search(8.0, 2.0, averaged(3.0), guard=Guard(None, None, 1e-9))
    assert float(free.rate) > 3.0
    assert not free.clipped


def test_without_a_guard_there_is_no_bound_at_all():
    found, _ = search(8.0, 2.0, loss_per_nat=1e-9, guard=None)
    assert float(found.rate) == pytest.approx(4.0)
    assert not found.clipped


@pytest.mark.parametrize("guard", [TRUST_REGION, None])
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
def test_nonsense_is_skipped_and_forgotten(slope, curvature, finite, guard):
    before = averaged(0.5)
    found, after = search(slope, curvature, before, finite=finite, guard=guard)
    assert found.skipped
    assert not found.clipped
    assert float(found.rate) == 0.0
    assert remembers_the_same(before, after)
    assert after.steps == before.steps + 1


@pytest.mark.parametrize("eps", [0.0, 1e-10])
@pytest.mark.parametrize("curvature", [0.0, -3.0])
def test_without_positive_curvature_the_average_steps_alone(curvature, eps):
    before = averaged(0.5, 0.25)
    found, after = search(1.0, curvature, before, eps=eps)
    assert found.clipped
    assert not found.skipped
    assert float(found.rate) == mean(before)
    assert remembers_the_same(before, after)


@pytest.mark.parametrize("eps", [0.0, 1e-10])
@pytest.mark.parametrize("curvature", [0.0, -3.0])
def test_without_positive_curvature_nor_average_there_is_no_step(curvature, eps):
    found, after = search(1.0, curvature, eps=eps)
    assert found.skipped
    assert float(found.rate) == 0.0
    assert float(after.rates.weight) == 0.0


def test_algorithm_1_takes_zero_curvature_at_one_over_eps():
    found, _ = search(1.0, 0.0, guard=None, eps=1e-10)
    assert float(found.rate) == pytest.approx(1e10)


positive = st.floats(1e-6, 1e6)


@examples
@given(st.lists(st.tuples(positive, positive), min_size=1, max_size=20), st.floats(0.1, 10))
def test_the_step_never_exceeds_the_trust_region(measurements, radius):
    state = SearchState.empty()
    for slope, curvature in measurements:
        found, state = search(slope, curvature, state, guard=bounded(trust_region=radius))
        bound = radius * slope / curvature
        assert 0 < float(found.rate) <= bound * (1 + 1e-12)
        assert bool(found.clipped) == (mean(state) > bound)


@examples
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
    state = SearchState.empty()
    for slope, curvature in measurements:
        found, state = search(slope, curvature, state, eps=1e-10)
        assert math.isfinite(float(found.rate))
        assert float(found.rate) >= 0
        assert all(torch.isfinite(t) for t in state.rates)


@examples
@given(st.lists(positive, min_size=1, max_size=20), st.floats(0, 1))
def test_the_average_forgets_by_beta(rates, beta):
    state = SearchState.empty()
    for rate in rates:
        found, state = search(rate, 1.0, state, guard=None, beta=beta)
    weights = [beta**age for age in reversed(range(len(rates)))]
    logs = [w * math.log(r) for w, r in zip(weights, rates)]
    assert float(found.rate) == pytest.approx(math.exp(math.fsum(logs) / math.fsum(weights)))


# --- between measurements -------------------------------------------------------------------------


def between(slope, ratio, average=None, nat=math.inf, **more):
    """A step that does not measure, after one that found a ratio of ``c`` to ``d·d``."""
    return search(slope, None, remembering(ratio, nat, average), **more)


def test_a_step_between_measurements_uses_the_average():
    found, after = between(1.0, 1.0, averaged(0.7))
    assert float(found.rate) == pytest.approx(0.7)
    assert not found.clipped
    assert after.steps == 2


def test_a_step_between_measurements_stays_within_two_minimisers_along_its_own_direction():
    # c = 10 · d·d, so that the minimiser is g·d / (10 d·d)
    found, after = between(3.0, 10.0, averaged(0.7), squared_norm=2.0)
    assert float(found.minibatch_lr) == pytest.approx(3 / 20)
    assert float(after.minibatch_lr) == pytest.approx(3 / 20)
    assert float(found.rate) == pytest.approx(2 * 3 / 20)
    assert found.clipped


def test_a_step_between_measurements_moves_predictions_by_no_more_than_max_kl():
    # ½ η² (0.5 · 8) / 4 = 0.25 with the present gradient, whatever it was when c was measured
    found, _ = between(8.0, 0.5, averaged(3.0), nat=4.0, guard=bounded(max_kl=0.25))
    assert float(found.rate) == pytest.approx(math.sqrt(0.5))
    assert found.clipped


def test_a_step_between_measurements_is_not_bounded_without_a_guard():
    found, _ = between(3.0, 10.0, averaged(0.7), nat=1e-9, guard=None)
    assert float(found.rate) == pytest.approx(0.7)
    assert not found.clipped


def test_a_measurement_is_remembered_until_the_next():
    guard = bounded(max_kl=0.04)
    found, state = search(2.0, 3.0, averaged(1e6), loss_per_nat=8.0, guard=guard)
    assert float(state.curvature(scalar(4.0))) == pytest.approx(6.0)
    later, after = search(2.0, None, state, guard=guard)
    assert float(later.rate) == pytest.approx(float(found.rate))
    assert remembers_the_same(state, after)


@pytest.mark.parametrize(("curvature", "finite"), [(0.0, True), (-1.0, True), (5.0, False)])
def test_what_is_not_admitted_is_not_remembered(curvature, finite):
    before = remembering(3.0, 2.0, averaged(0.5))
    _, after = search(1.0, curvature, before, finite=finite, loss_per_nat=7.0)
    assert float(after.curvature(scalar(1.0))) == 3.0
    assert float(after.loss_per_nat) == 2.0


@pytest.mark.parametrize("slope", [0.0, -1.0, math.nan, math.inf])
def test_a_step_between_measurements_skips_bad_gradients(slope):
    found, _ = between(slope, 1.0, averaged(0.7))
    assert found.skipped
    assert float(found.rate) == 0.0


@pytest.mark.parametrize("guard", [TRUST_REGION, None])
def test_a_step_before_any_measurement_is_skipped(guard):
    found, _ = search(1.0, guard=guard)
    assert found.skipped
    assert float(found.rate) == 0.0


@examples
@given(positive, positive, positive, positive, positive, st.floats(0.1, 10))
def test_no_average_takes_a_step_between_measurements_past_the_guard(
    slope, squared_norm, rho, nat, average, radius
):
    guard = bounded(trust_region=radius, max_kl=0.1)
    found, _ = between(slope, rho, averaged(average), nat, squared_norm=squared_norm, guard=guard)
    c, rate = rho * squared_norm, float(found.rate)
    assert 0 < rate <= radius * slope / c * (1 + 1e-12)
    assert rate**2 * c / 2 <= 0.1 * nat * (1 + 1e-12)


# --- measurements that contradict the gradient; parts of a batch ----------------------------------


def test_a_distrusted_measurement_steps_by_the_average_under_the_last_bound():
    before = remembering(10.0, state=averaged(0.7))
    found, after = search(1.0, 1e-6, before, trusted=False)
    assert float(found.rate) == pytest.approx(0.2)
    assert found.clipped
    assert not found.skipped
    assert remembers_the_same(before, after)


@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_a_distrusted_measurement_leaves_the_mean_of_the_parts_too(smoothing):
    _, before = search(1.0, 10.0, smoothing=smoothing)
    _, after = search(1.0, 1e-6, before, trusted=False, smoothing=smoothing)
    assert remembers_the_same(before, after)


@pytest.mark.parametrize("guard", [TRUST_REGION, None])
def test_a_distrusted_measurement_without_a_past_is_no_step(guard):
    found, after = search(1.0, 1.0, trusted=False, guard=guard)
    assert found.skipped
    assert float(after.rates.weight) == 0.0


def test_a_trusted_measurement_is_as_any_other():
    for past in (1e-9, 1e9):
        found, _ = search(6.0, 2.0, remembering(past), trusted=True)
        assert float(found.rate) == pytest.approx(3.0)


def test_the_bounds_see_the_mean_of_the_parts():
    state = SearchState.empty()
    for number, curvature in enumerate((1.0, 9.0, 2.0)):
        state = state._replace(rates=averaged(1e9).rates)
        found, state = search(2.0, curvature, state, guard=TRUST_REGION, smoothing=0.75)
        weights = [0.75**k for k in range(number, -1, -1)]
        mean = sum(w * c for w, c in zip(weights, (1.0, 9.0, 2.0))) / sum(weights)
        assert float(found.minibatch_lr) == pytest.approx(2 / curvature)
        assert float(found.rate) == pytest.approx(TRUST_REGION.trust_region * 2 / mean)
        assert found.clipped


def test_a_flat_part_is_as_the_mean_of_the_parts_and_an_infinite_one_does_not_count():
    _, past = search(1.0, 4.0, smoothing=0.5)
    found, after = search(1.0, 0.0, past, smoothing=0.5)
    assert float(found.minibatch_lr) == pytest.approx((0.5 + 1) / (0.5 * 4.0))
    assert float(after.rates.weight) == pytest.approx(0.99 + 1)
    found, after = search(1.0, math.inf, past, smoothing=0.5)
    assert found.skipped
    assert float(after.curvature(scalar(1.0))) == 4.0


@pytest.mark.parametrize(("mean", "third_order"), [(geometric, 0.015), (arithmetic, 0.03)])
def test_rates_of_parts_are_on_average_those_of_the_whole(mean, third_order):
    """Of 32 examples, the first eight, in two halves; an average over many batches."""
    torch.manual_seed(0)
    count, n, m = 4000, 32, 8
    each = torch.distributions.Gamma(1.0, 1.0).sample((count, n)).double()  # vᵀQv of each example
    each += 0.5 * torch.rand(count, 1).double()  # what a batch has in common
    whole, part, half = each.mean(1), each[:, :m].mean(1), each[:, : m // 2].mean(1)
    spread = (1 - m / n) ** 0.5 * (half - part)
    rates = {"whole": 1 / whole, "uncorrected": 1 / part}
    found = [
        search(1.0, c, spread=scalar(s), smoothing=0.75, mean=mean)[0].minibatch_lr
        for c, s in zip(part.tolist(), spread.tolist(), strict=True)
    ]
    rates["corrected"] = torch.stack(found)
    middle = {name: float(mean.inverse(mean.transform(v).mean())) for name, v in rates.items()}
    assert middle["uncorrected"] / middle["whole"] > 1.03
    assert middle["corrected"] / middle["whole"] == pytest.approx(1, abs=third_order)


def test_a_part_with_a_flat_half_is_corrected_by_no_more_than_its_own_variance():
    found, _ = search(1.0, 2.0, spread=scalar(1e6), smoothing=0.75)
    assert float(found.minibatch_lr) == pytest.approx(0.5 / math.exp(0.5))
    found, _ = search(1.0, 0.0, spread=scalar(1.0), smoothing=0.0)
    assert found.skipped


def test_a_measurement_counts_as_the_steps_that_it_stands_for():
    """As if each of the steps had measured the same."""
    once, often = SearchState.empty(), SearchState.empty()
    for curvature in (1.0, 4.0, 2.0):
        _, once = search(1.0, curvature, once, beta=0.9**8, times=8)
    for curvature in (1.0, 4.0, 2.0):
        for _ in range(8):
            _, often = search(1.0, curvature, often, beta=1.0)
    exact = [0.9 ** (8 * k) for k in (2, 1, 0)]
    wanted = sum(w * math.log(1 / c) for w, c in zip(exact, (1.0, 4.0, 2.0))) / sum(exact)
    assert float(geometric.read(once.rates)) == pytest.approx(math.exp(wanted))
    _, forgets_nothing = search(1.0, 1.0, beta=1.0, times=8)
    for curvature in (4.0, 2.0):
        _, forgets_nothing = search(1.0, curvature, forgets_nothing, beta=1.0, times=8)
    assert float(geometric.read(forgets_nothing.rates)) == pytest.approx(
        float(geometric.read(often.rates))
    )
    assert float(forgets_nothing.rates.weight) == float(often.rates.weight) == 24


@pytest.mark.parametrize("slope", [1e-30, 1.0, 1e30])
def test_no_step_is_so_long_that_many_of_them_overflow(slope):
    """A flat batch has no rate of its own, and the average may hold one of 1/eps."""
    before = averaged(1e300)
    found, _ = search(slope, 0.0, before)
    assert float(found.rate) * max(1.0, math.sqrt(slope)) == pytest.approx(1e18)
    assert found.clipped
    unguarded, _ = search(slope, 1e-300 * slope, before, guard=None, beta=0.5)
    assert float(unguarded.rate) > 1e200


# --- the state ------------------------------------------------------------------------------------


def test_the_state_goes_through_a_group_and_back():
    state = SearchState.empty()
    for slope, curvature in ((2.0, 3.0), (5.0, None), (7.0, 0.5)):
        _, state = search(slope, curvature, state, loss_per_nat=8.0, smoothing=0.25)
    group = {"lr": 1.0, **state.entries()}
    assert tuple(state.entries()) == ENTRIES
    back = SearchState.of(group, "cpu")
    assert remembers_the_same(state, back)
    assert (back.minibatch_lr, back.steps) == (state.minibatch_lr, 3)
    # A checkpoint may hold plain numbers.
    numbers = {key: float(value) for key, value in group.items()}
    assert remembers_the_same(state, SearchState.of(numbers, "cpu"))


def test_what_a_group_does_not_hold_is_as_before_the_first_step():
    state = SearchState.of({}, "cpu")
    assert remembers_the_same(state, SearchState.empty())
    assert math.isnan(float(arithmetic.read(state.ratios)))
    assert float(state.loss_per_nat) == math.inf
    assert math.isnan(float(state.minibatch_lr))
    assert state.steps == 0


def test_a_step_replaces_the_state_and_mutates_nothing():
    before = remembering(3.0, 2.0, averaged(0.5))
    kept = [t.clone() for t in (*before.rates, *before.ratios, before.loss_per_nat)]
    search(2.0, 5.0, before, loss_per_nat=7.0)
    after = (*before.rates, *before.ratios, before.loss_per_nat)
    assert all(a.equal(b) for a, b in zip(kept, after))
