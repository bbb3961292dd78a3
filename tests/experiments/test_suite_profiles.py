"""`benchmarks/suite`: time to target, performance profiles, and how sure it is."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.suite import horizon_tables, profile_plots, profiles, significance, standings
from benchmarks.suite.methods import METHODS, method
from benchmarks.suite.standings import TUNED
from benchmarks.suite.tasks import TASKS
from benchmarks.suite.trials import Preset

WINE, DIABETES = "wine/mlp-tanh/b16", "diabetes/mlp-relu/b32"
OURS, PEER = "adler-schedulefree", "adamw"
GRID = METHODS[TUNED].grid


def record(name, losses, task=WINE, seed=0, lr=None, seconds=1.0, diverged=False):
    """A run of as many epochs as losses, each of ten steps and so many seconds."""
    epochs = len(losses)
    curves = {
        "train_loss": losses,
        "test_loss": losses,
        "test_accuracy": [None if x is None else 1 - x / 10 for x in losses],
        "learning_rate": [0.1] * epochs,
        "seconds": [seconds] * epochs,
    }
    accuracy = TASKS[task].score == "accuracy"
    if not accuracy:
        curves["test_accuracy"] = [None] * epochs
    return {
        "task": task,
        "method": name,
        "lr": lr,
        "seed": seed,
        "epochs": epochs,
        "train_examples": 112,
        "test_examples": 60,
        "family": TASKS[task].family,
        "held_back": False,
        "batch_size": 16,
        "score": TASKS[task].score,
        "chance": 0.4 if accuracy else None,
        "parameters": 100,
        "steps": 10 * epochs,
        "test_accuracy": curves["test_accuracy"][-1],
        "best_test_accuracy": None,
        "test_loss": losses[-1],
        "train_loss": losses[-1],
        "first_loss": 5.0,
        "diverged": diverged,
        "seconds": seconds * epochs,
        "skipped": None,
        "clipped": None,
        "passes": 2,
        "versions": {"torch": "1"},
        "device": "cpu",
        "curves": curves,
    }


def tuned(losses, task=WINE, seed=0, **options):
    """A grid whose middle rate does this, and the others worse at every moment."""
    return [
        record(TUNED, [x + abs(i - 2) for x in losses], task, seed, lr=lr, **options)
        for i, lr in enumerate(GRID)
    ]


# --- targets and times ---------------------------------------------------------------------------


def test_the_target_is_where_tuned_adamw_ends():
    found = [r for seed, end in enumerate((1.0, 3.0, 2.0)) for r in tuned([4.0, end], seed=seed)]
    assert profiles.targets(found) == {WINE: -2.0}
    assert profiles.targets(found, "score") == {WINE: pytest.approx(0.8)}
    assert profiles.targets(tuned([4.0, 1.0], DIABETES), "score") == {DIABETES: -1.0}
    assert profiles.targets(tuned([4.0, math.nan], diverged=True)) == {}
    assert profiles.targets(found[:-1])[WINE] == -2.0  # an incomplete grid does not count


def test_reached_at_the_first_evaluation_that_is_good_enough():
    run = record(PEER, [5.0, 2.0, 3.0, None, 1.0], seconds=0.5)
    assert profiles.reached(run, -2.0, "seconds", "loss") == 1.0
    assert profiles.reached(run, -2.0, "steps", "loss") == 20
    assert profiles.reached(run, -1.5, "seconds", "loss") == 2.5
    assert profiles.reached(run, -0.5, "seconds", "loss") == math.inf
    assert profiles.reached(run, 0.8, "steps", "score") == 20


def test_median_over_seeds_and_fastest_rate_of_a_grid():
    found = tuned([4.0, 3.0, 1.0]) + tuned([4.0, 3.0, 1.0], seed=1)
    found += [record(OURS, [1.0, 1.0, 1.0]), record(OURS, [4.0, 4.0, 1.0], seed=1)]
    found += [record(PEER, [4.0, 4.0, 1.0]), record(PEER, [4.0, 4.0, 4.0], seed=1)]
    goals = profiles.targets(found)
    told = profiles.times(found, (TUNED, OURS, PEER), goals, "seconds")
    assert told == {WINE: {TUNED: 3.0, OURS: 2.0, PEER: math.inf}}
    # Another rate that is worse in the end but early enough counts.
    found[1]["curves"]["test_loss"] = [1.0, 9.0, 9.0]
    assert profiles.times(found, (TUNED,), goals, "seconds") == {WINE: {TUNED: 2.0}}


def test_only_tasks_on_which_all_have_run():
    found = tuned([2.0, 1.0]) + tuned([2.0, 1.0], DIABETES)
    found += [record(OURS, [1.0, 1.0]), record(PEER, [1.0, 1.0], DIABETES)]
    goals = profiles.targets(found)
    assert set(profiles.times(found, (OURS,), goals, "steps")) == {WINE}
    assert profiles.times(found, (OURS, PEER), goals, "steps") == {}
    assert set(profiles.times(found, (TUNED,), goals, "steps")) == {WINE, DIABETES}


# --- profiles ------------------------------------------------------------------------------------

BY_HAND = {
    "a": {"x": 10.0, "y": 20.0},
    "b": {"x": 30.0, "y": 10.0},
    "c": {"x": math.inf, "y": 5.0},
    "d": {"x": math.inf, "y": math.inf},
}


def test_by_hand():
    ratios = profiles.ratios(BY_HAND)
    assert ratios["x"] == {"a": 1, "b": 3, "c": math.inf, "d": math.inf}
    assert ratios["y"] == {"a": 2, "b": 1, "c": 1, "d": math.inf}
    assert [profiles.profile(ratios["x"], tau) for tau in (1, 2.9, 3, 4)] == [0.25, 0.25, 0.5, 0.5]
    # x: a quarter of the tasks over all three units, another from 3 to 4.
    assert profiles.benchmark_score(ratios["x"]) == pytest.approx((0.25 * 3 + 0.25) / 3)
    assert profiles.benchmark_score(ratios["y"]) == pytest.approx((0.5 * 3 + 0.25 * 2) / 3)


def scored_by_algoperf(times, points=40_001):
    """The order of AlgoPerf's own steps, on arrays: methods by tasks."""
    best = times.min(axis=0)
    times = np.where(times > 4 * best, np.inf, times)
    with np.errstate(invalid="ignore"):
        ratios = times / times.min(axis=0)  # NaN where nobody gets there, which is at most no τ
    taus = np.linspace(1, 4, points)
    rho = np.stack([(ratios <= tau).sum(axis=1) / times.shape[1] for tau in taus], axis=1)
    # (NumPy has its function under one name before 2.0 and under another from then on.)
    area = torch.trapezoid(torch.from_numpy(rho), torch.from_numpy(taus), dim=1).numpy()
    return area / (taus[-1] - taus[0]), rho, taus


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.lists(st.one_of(st.floats(0.1, 20), st.just(math.inf)), min_size=3, max_size=3),
        min_size=1,
        max_size=6,
    )
)
def test_as_algoperf_scores(by_task):
    names = "xyz"
    times = {str(i): dict(zip(names, row)) for i, row in enumerate(by_task)}
    score, rho, taus = scored_by_algoperf(np.array(by_task).T)
    ratios = profiles.ratios(times)
    for i, name in enumerate(names):
        assert profiles.benchmark_score(ratios[name]) == pytest.approx(score[i], abs=1e-3)
        for j in (0, 9_000, 25_000):
            assert profiles.profile(ratios[name], taus[j]) == rho[i, j]


# --- how sure it is ------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", list(itertools.product(range(5), repeat=2)))
def test_sign_test_by_enumeration(counts):
    better, worse = counts
    n = better + worse
    outcomes = [sum(flips) for flips in itertools.product((0, 1), repeat=n)]
    uneven = [abs(2 * k - n) >= abs(better - worse) for k in outcomes]
    assert significance.sign_test(better, worse) == pytest.approx(sum(uneven) / len(uneven))


def test_bootstrap_of_one_number_a_task_is_that_of_their_mean():
    draw = np.random.default_rng(1)
    values = draw.normal(size=40)
    low, high = significance.bootstrap({str(i): [v] for i, v in enumerate(values)})
    error = values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_bootstrap_sees_both_tasks_and_seeds():
    draw = np.random.default_rng(2)
    tasks, seeds = 30, 3
    between, within = draw.normal(size=(tasks, 1)), 2 * draw.normal(size=(tasks, seeds))
    by_task = {str(i): row for i, row in enumerate(between + within)}
    low, high = significance.bootstrap(by_task)
    means = (between + within).mean(1)
    # Tasks drawn anew, and of each the seeds: the two variances add up.
    variance = means.var() / tasks + (between + within).var(axis=1).mean() / seeds / tasks
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(variance), rel=0.1)
    assert significance.bootstrap(by_task) == (low, high)


def test_comparison_by_hand():
    found = tuned([2.0, 1.0]) + tuned([2.0, 1.0], seed=1) + tuned([2.0, 2.0], DIABETES)
    found += [record(OURS, [1.0, 0.5]), record(OURS, [1.0, 2.0], seed=1)]
    found += [record(OURS, [2.0, 8.0], DIABETES)]
    told = significance.compare(standings.contests(found, "test_loss"), OURS)
    assert told.ratio == pytest.approx(2.0)  # 1 on one task, 4 on the other
    assert (told.better, told.worse, told.tasks, told.seeds) == (0, 1, 2, (1, 2))
    assert told.low < told.ratio < told.high
    assert significance.compare(standings.contests(found, "test_loss"), PEER) is None


# --- tables and figures --------------------------------------------------------------------------

PRESET = Preset(
    lambda task: task.name in (WINE, DIABETES),
    seeds=(0,),
    limits={"epochs": 2, "train_examples": 112, "test_examples": 60},
    methods=(TUNED, OURS, PEER),
    horizons=(1, 2),
)


def finished():
    found = []
    for task in (WINE, DIABETES):
        found += tuned([4.0, 4.0, 4.0, 1.0], task) + tuned([4.0, 1.5], task)
        found += [record(OURS, [2.0, 1.5, 1.0, 0.5], task, seconds=2.0)]
        found += [record(PEER, [4.0, 3.0, 3.0, 3.0 if task == WINE else 1.0], task)]
    return found


def test_tables_say_what_the_records_say():
    text = horizon_tables.markdown(finished(), PRESET, "test")
    section = text[text.index("[start:profiles]") : text.index("[end:profiles]")]
    untuned, all_of_them = (
        section[section.index(f"### 2 × the epochs, {what}") :] for what in ("untuned", "and tuned")
    )
    # Ours: 6 s on both tasks; the peer: 4 s on one; AdamW: 4 s on both.
    row = "| AdlerScheduleFree | 0.92 | 0.50 | 1.00 | 1.00 | 1.00 | 1.00 | 1.00 |"
    assert row in untuned
    row = "| AdlerScheduleFree | 0.83 | 0.00 | 1.00 | 1.00 | 1.00 | 1.00 | 1.00 |"
    assert row in all_of_them
    assert f"| {method(TUNED).label} | 1.00 | 1.00 | 1.00 | 1.00 | 1.00 | 0.89 | 0.00 |" in (
        all_of_them
    )
    section = text[text.index("[start:significance]") : text.index("[end:significance]")]
    assert "| AdlerScheduleFree | 2 | 1 | 0.500 (0.500–0.500) | 2 | 0 | 0.5 |" in section


def test_figures(tmp_path):
    found = [r for r in finished() if r["epochs"] == 4]
    written = profile_plots.draw(found, tmp_path)
    assert {path.name for path in written} == {
        f"{name}.{suffix}" for name in ("profiles", "untuned") for suffix in ("png", "svg")
    }
    figure = profile_plots.as_good(found)
    [axis] = figure.axes
    lengths = {
        label.get_text(): bar.get_width()
        for label, bar in zip(axis.get_yticklabels(), axis.patches)
    }
    # The peer ties on one task: one seed, and equal.
    assert lengths == {"AdlerScheduleFree": 2, "AdamW (default)": 1}
    assert profile_plots.draw([], tmp_path) == []
