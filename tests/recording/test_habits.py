"""Modules, criteria and loops built at random out of what people write: right or flagged, and
untouched.
"""

import copy
import random
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.habits import BESIDE, LOOPS, WRONG, Habits, Judging, expected, habits, training_passes
from support.right import DOUBLE, untouched

from adler import Adler, Measure


def right_or_said(jvp, names, judging, loop, beside, seed, parts):
    """One step of one loop: what is measured is right or flagged, and nothing has changed."""
    model, criterion = Habits(names, seed), Judging(judging, seed)
    torch.manual_seed(seed)
    random.seed(seed)
    x, y = torch.randn(8, 6, dtype=DOUBLE), torch.randint(3, (8,))
    labels = y.chunk(parts)
    twin, other = copy.deepcopy((model, criterion))
    start = torch.get_rng_state(), random.getstate()

    inputs = [part.clone() for part in x.chunk(parts)]
    wanted = expected(twin, other, loop, beside, inputs, labels)
    held, after = untouched(twin, other), (torch.get_rng_state(), random.getstate())

    torch.set_rng_state(start[0])
    random.setstate(start[1])
    measure = Measure.every_step(jvp)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = Adler(trained, model, criterion, lr=0.0, measure=measure)
    inputs = [part.clone() for part in x.chunk(parts)]
    for _, loss, _ in training_passes(model, criterion, loop, beside, inputs, labels, trained):
        (loss / parts).backward()
    given = [part.clone() for part in inputs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        optimizer.step()
    last = optimizer.last_step
    assert untouched(model, criterion) == held
    assert torch.get_rng_state().equal(after[0])
    assert random.getstate() == after[1]
    assert all(a.equal(b) for a, b in zip(inputs, given))
    copy.deepcopy((model, criterion))
    if loop in WRONG:
        assert not bool(last.trusted)
    else:
        assert bool(last.trusted)
        # A difference also sees what no_grad and detach hide: state that is made of activations and
        # read later in the same pass. The check of the slope is one number, and what of it is
        # orthogonal to that number passes: half a percent in the worst of hundreds of examples.
        tolerance = 1e-2 if optimizer.measure.jvp == "finite_difference" else 1e-6
        assert float(last.curvature) == pytest.approx(wanted, rel=tolerance, abs=1e-12)


every_engine = pytest.mark.parametrize("jvp", ["forward", "finite_difference", "double_backward"])
drawn = given(
    names=st.lists(st.sampled_from(habits(Habits)), min_size=1, max_size=5),
    judging=st.lists(st.sampled_from(habits(Judging)), max_size=3, unique=True),
    loop=st.sampled_from(sorted(LOOPS)),
    beside=st.sampled_from(sorted(BESIDE)),
    seed=st.integers(0, 1000),
    parts=st.integers(1, 2),
)


@every_engine
@settings(deadline=None, max_examples=15, derandomize=True)
@drawn
def test_a_step_measures_right_or_says_so_and_changes_nothing(jvp, **example):
    right_or_said(jvp, **example)


@pytest.mark.long
@every_engine
@settings(deadline=None, max_examples=300)
@drawn
def test_many_steps_measure_right_or_say_so_and_change_nothing(jvp, **example):
    right_or_said(jvp, **example)
