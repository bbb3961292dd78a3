"""Every optimizer, with its defaults and without, against the dense reference at every step."""

from itertools import cycle
from types import SimpleNamespace

import pytest
import torch
from support.cases import CRITERIA, batches, flat, network
from support.loops import train
from support.options import EXACT, GUARDS, LAST_ITERATE
from support.reference import run

from adler import Adler, AdlerAdam, AdlerMuon, AdlerScheduleFree, GaussNewton, Guard, Measure

STEPS = 16
# Of the inputs: rates jump, so that they meet the bounds. Larger ones where the bound on tensors
# holds them, where all tensors would be shortened else; without it rounding would grow.
SIZES, LARGE_SIZES = (2.0, 1.0, 3.0), (4.0, 1.0, 8.0)

MATRICES = {"matrices": ["*weight"]}  # every one, not the hidden ones alone
# How it is made, and what the reference calls that.
METHODS = {
    "adler": (Adler, {}, {"interpolation": 0.9}),
    "nearer the iterate": (Adler, {"interpolation": 0.5}, {"interpolation": 0.5}),
    "last iterate": (Adler, LAST_ITERATE, {}),
    "momentum": (Adler, {"momentum": 0.9}, {"interpolation": 0.9, "momentum": 0.9}),
    "momentum, last iterate": (Adler, {"momentum": 0.5, **LAST_ITERATE}, {"momentum": 0.5}),
    "gauss-newton": (GaussNewton, {}, {"interpolation": 0.9, "kind": "gauss_newton"}),
    "adam": (AdlerAdam, {}, {"momentum": 0.9, "second_moment": 0.999}),
    "schedule-free": (AdlerScheduleFree, {}, {"interpolation": 0.9, "second_moment": 0.999}),
    "muon": (AdlerMuon, MATRICES, {"interpolation": 0.9, "second_moment": 0.999, "muon": 0.9}),
    "muon, last iterate": (
        AdlerMuon,
        {"momentum": 0.5, **MATRICES, **LAST_ITERATE},
        {"momentum": 0.9, "second_moment": 0.999, "muon": 0.5},
    ),
}
# The defaults are written out here: the reference takes none from the library.
GUARD = SimpleNamespace(trust_region=2.0, max_kl=None, max_relative_change=0.02)
DEFAULTS = {"beta": 0.9999, "eps": 1e-10, "guard": GUARD}
DEFAULTS |= {"measure": SimpleNamespace(every=8, fraction=0.25, warmup=100)}
# Where a default differs.
OTHERS = {AdlerMuon: {"guard": SimpleNamespace(**{**vars(GUARD), "max_relative_change": 0.005})}}
# (A mean of two rates, at beta=0.5, follows single parts so far that rounding is all there is.)
CLOSE = Guard(trust_region=0.9, max_relative_change=None)
RARE = Measure(every=3, fraction=0.5, warmup=4)
OPTIONS = {
    "defaults": {},
    "whole batch": EXACT,
    "trust region": {"guard": CLOSE, "beta": 0.8},
    "all bounds": {"guard": GUARDS, **EXACT},
    "rarely": {"measure": RARE, "guard": CLOSE, "beta": 0.9},
    "rarely, all bounds": {"measure": RARE, "guard": GUARDS},
    "decayed": {"weight_decay": 0.1},
}


def follow(method, options, name, criterion_name):
    """Compares everything that a step does; the trajectory of the reference."""
    make, own, known = METHODS[method]
    model, criterion = network(name), CRITERIA[criterion_name]()
    sizes = cycle(SIZES if options.get("guard") is CLOSE else LARGE_SIZES)
    data = [(size * x, y) for (x, y), size in zip(batches(name, criterion, STEPS), sizes)]
    usual = {**DEFAULTS, **OTHERS.get(make, {})}
    expected = run(model, criterion, data, **{**usual, **options, **known})
    optimizer = make(model.parameters(), model, criterion, **own, **options)
    for k, batch in enumerate(data):
        train(model, criterion, optimizer, [batch])
        # Where no bound holds a tensor's step, two roundings part by a factor of about three a
        # step: by 3e-9 after these sixteen, and by 1e-14 where one does.
        loose = 10 if options.get("guard") is CLOSE else 1
        within = {"rtol": 1e-9 * loose, "atol": 1e-11 * loose}
        torch.testing.assert_close(flat(model), expected.parameters[k], **within)
        last = optimizer.last_step
        rel = within["rtol"]
        assert float(last.minibatch_lr) == pytest.approx(expected.minibatch_lrs[k], rel=rel)
        assert float(last.effective_lr) == pytest.approx(expected.effective_lrs[k], rel=rel)
        assert bool(last.clipped) == expected.clipped[k]
    if hasattr(optimizer, "eval"):
        optimizer.eval()
        torch.testing.assert_close(flat(model), expected.averages[-1], rtol=1e-8, atol=1e-10)
    return expected


# Options act on sums over tensors, whatever the network: of the second, the two that differ most.
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("name", "options"),
    [*(("mlp-relu", o) for o in OPTIONS), ("cnn", "defaults"), ("cnn", "all bounds")],
)
def test_every_step_is_that_of_the_dense_reference(name, method, options):
    follow(method, OPTIONS[options], name, "ce-mean")


@pytest.mark.parametrize("criterion_name", CRITERIA)
@pytest.mark.parametrize("method", ["adler", "gauss-newton", "schedule-free"])
def test_every_loss_is_measured_on_a_part_as_the_reference_measures_it(method, criterion_name):
    follow(method, {"guard": GUARDS}, "mlp-tanh", criterion_name)


# Not along Adam's direction: where a gradient is zero, as that of a bias before a normalisation,
# it makes steps of the rounding, which is not the reference's.
@pytest.mark.parametrize("method", ["adler", "last iterate", "momentum", "gauss-newton"])
@pytest.mark.parametrize("name", ["batchnorm", "transformer"])
def test_with_its_defaults_it_follows_on_networks_with_normalisation(name, method):
    follow(method, {}, name, "ce-mean")


def test_the_cases_meet_the_bounds_and_the_average():
    """Else the trajectories above would show less than they say."""
    runs = {
        name: follow("adler", options, "mlp-relu", "ce-mean") for name, options in OPTIONS.items()
    }
    for name in ("defaults", "whole batch", "trust region", "all bounds", "rarely"):
        assert {*runs[name].clipped} == {True, False}, name
    for name in ("defaults", "whole batch", "all bounds", "rarely, all bounds", "decayed"):
        assert any(0 < count < 4 for count in runs[name].shortened), name
    assert not any(runs["trust region"].shortened)
