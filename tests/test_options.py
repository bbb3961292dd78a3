"""Options as values: what they may be, where they are, and what a checkpoint holds of them."""

import dataclasses
import itertools
import math
import pickle
import re
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import KINDS, network
from torch import nn

from adler import Adler, AdlerAdam, AdlerMuon, AdlerScheduleFree, Guard, Measure, SpectralSGD, wrap
from adler._options import from_plain, plain

NAN, INF = math.nan, math.inf
BAD_BOUNDS = [0.0, -2.0, NAN, INF, "2", True]
BAD_MEASURES = {
    "jvp": ["backward", "", None, 1],
    "every": [0, -1, 1.5, NAN, True, None],
    "fraction": [0.0, -0.5, 1.5, NAN, INF, True, "1", None],
    "warmup": [-1, 1.5, True, None],
    "longest": [0, -8, 1.5, True, None],
}


@pytest.mark.parametrize("value", BAD_BOUNDS)
@pytest.mark.parametrize("name", ["trust_region", "max_kl", "max_relative_change"])
def test_a_bad_bound_is_named_with_its_value_and_what_it_may_be(name, value):
    expected = f"{name}={value!r}: expected a positive number, or None for no bound"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        Guard(**{name: value})
    Guard(**{name: None})
    Guard(**{name: 3})


@pytest.mark.parametrize(
    ("name", "value"), [(k, v) for k, bad in BAD_MEASURES.items() for v in bad]
)
def test_a_bad_way_to_measure_is_named_with_its_value_and_what_it_may_be(name, value):
    allowed = {
        "jvp": "one of 'forward', 'finite_difference', 'double_backward'",
        "every": "a whole number of at least 1",
        "fraction": "a number in (0, 1]",
        "warmup": "a whole number of at least 0",
        "longest": "a whole number of at least 1",
    }
    expected = f"{name}={value!r}: expected {allowed[name]}"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        Measure(**{name: value})


def test_they_are_values_and_do_not_change():
    assert Guard() == Guard() != Guard(max_kl=0.1)
    assert Measure.every_step() == Measure("forward", 1, fraction=1.0, warmup=0, longest=1)
    assert Measure.every_step("double_backward").jvp == "double_backward"
    assert Measure.low_cost() == dataclasses.replace(Measure(), jvp="finite_difference")
    for value, name in ((Guard(), "max_kl"), (Measure(), "every")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, 3)
        assert hash(value) == hash(pickle.loads(pickle.dumps(value)))


def test_a_warm_up_measures_at_every_step_and_then_every_so_many():
    measure = Measure(every=4, warmup=6)
    assert [k for k in range(18) if measure.is_due(k)] == [0, 1, 2, 3, 4, 5, 8, 12, 16]
    assert [measure.interval(k) for k in (0, 5, 6, 100)] == [1, 1, 4, 4]
    assert all(map(Measure.every_step().is_due, range(20)))


@settings(deadline=None)
@given(every=st.integers(1, 20), warmup=st.integers(0, 200), longest=st.integers(1, 100))
def test_the_longer_the_run_the_rarer_it_measures(every, warmup, longest):
    measure = Measure(every=every, warmup=warmup, longest=longest)
    intervals = [measure.interval(k) for k in range(warmup, 20_000, 7)]
    assert intervals == sorted(intervals)
    assert set(intervals) <= {every << k for k in range(8)}
    assert max(intervals) <= max(every, longest)
    if every == 1 or longest < 2 * every:
        assert set(intervals) == {every}
    elif longest < 4 * every:
        assert set(intervals) == {every, 2 * every}
    # Every interval of the warmed up run begins and ends with a measurement.
    due = [k for k in range(20_000) if measure.is_due(k)]
    assert {b - a for a, b in itertools.pairwise(due) if a >= max(warmup, every)} <= set(intervals)


def test_by_default_a_longer_run_measures_less_often():
    due = [k for k in range(12_800) if Measure().is_due(k)]
    counts = [sum(a <= k < b for k in due) for a, b in ((0, 100), (100, 1600), (1600, 3200))]
    assert counts == [100, 187, 100]
    assert sum(k >= 3200 for k in due) == (12_800 - 3200) // 32


# --- arguments ------------------------------------------------------------------------------------


def wrapped(params, model, criterion, **options):
    return wrap(torch.optim.AdamW(params), model, criterion, **options)


MADE = {
    **KINDS,
    "as-published": Adler.as_published,
    "low-cost": Adler.low_cost,
    "wrapped": wrapped,
}
MOVED = {
    "trust_region": "guard=Guard(trust_region=...)",
    "max_kl": "guard=Guard(max_kl=...)",
    "max_relative_change": "guard=Guard(max_relative_change=...)",
    "jvp": "measure=Measure(jvp=...)",
    "every": "measure=Measure(every=...)",
    "fraction": "measure=Measure(fraction=...)",
    "warmup": "measure=Measure(warmup=...)",
    "curvature_every": "measure=Measure(every=...)",
    "curvature_fraction": "measure=Measure(fraction=...)",
    "curvature_warmup": "measure=Measure(warmup=...)",
}


@pytest.mark.parametrize(("name", "place"), MOVED.items(), ids=MOVED)
@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_an_option_of_another_place_is_refused_with_that_place(make, name, place):
    model = network("mlp-tanh")
    with pytest.raises(TypeError, match=re.escape(f"{name} is set by {place}")):
        make(model.parameters(), model, nn.CrossEntropyLoss(), **{name: 1})
    assert not model._forward_hooks


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_an_unknown_option_is_refused_with_those_that_there_are(make):
    model = network("mlp-tanh")
    with pytest.raises(TypeError, match=r"unknown option 'momentun'; it has lr, .*guard, measure"):
        make(model.parameters(), model, nn.CrossEntropyLoss(), momentun=0.9)
    assert not model._forward_hooks


OWN = {
    "Adler": (Adler, {"momentum", "weight_decay", "interpolation", "follow_mode", "bn_batches"}),
    "AdlerAdam": (AdlerAdam, {"betas", "adam_eps", "weight_decay"}),
    "AdlerScheduleFree": (
        AdlerScheduleFree,
        {"betas", "adam_eps", "weight_decay", "follow_mode", "bn_batches"},
    ),
    "AdlerMuon": (
        AdlerMuon,
        {
            *("momentum", "betas", "adam_eps", "weight_decay"),
            *("interpolation", "matrices", "follow_mode", "bn_batches"),
        },
    ),
    "SpectralSGD": (
        SpectralSGD,
        {"power_iterations", "gershgorin_columns", "mean_curvature", "weight_decay"},
    ),
    "Wrapped": (wrapped, {"fresh"}),
}


@pytest.mark.parametrize(("make", "own"), OWN.values(), ids=OWN)
def test_what_an_optimizer_has_is_said_in_full(make, own):
    model = network("mlp-tanh")
    with pytest.raises(TypeError) as caught:
        make(model.parameters(), model, nn.CrossEntropyLoss(), nesterov=True)
    said = set(str(caught.value).partition("it has ")[2].split(", "))
    assert said == {"lr", "beta", "eps", "guard", "measure", "output_fn", *own}


def test_a_subclass_says_its_own_options():
    class Mine(Adler):
        def __init__(self, params, model, criterion, *, colour):
            super().__init__(params, model, criterion)

    model = network("mlp-tanh")
    make = partial(Mine, model.parameters(), model, nn.CrossEntropyLoss())
    with pytest.raises(TypeError, match="Mine: unknown option 'lr'; it has colour"):
        make(lr=0.5)
    assert make(colour="red").param_groups[0]["lr"] == 1.0


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [Guard(), Guard(None, 0.1, None), Measure(), Measure.low_cost()])
def test_they_go_through_a_checkpoint_as_plain_values(value):
    held = plain(value)
    assert type(held) is dict
    assert {type(v) for v in held.values()} <= {str, int, float, type(None)}
    assert from_plain(type(value), held) == value
    assert plain(None) is from_plain(type(value), None) is None


def test_what_is_no_option_is_refused():
    with pytest.raises(ValueError, match=r"state dict: not the options of Guard: .*'radius'"):
        from_plain(Guard, {"radius": 2.0})
    with pytest.raises(ValueError, match=re.escape("trust_region=-1.0")):
        from_plain(Guard, {"trust_region": -1.0})
