"""`benchmarks/suite`: what is made of the records."""

import math
from pathlib import Path

import pytest
from support.figures import assert_same_figures

from benchmarks.suite import horizons, methods, plots, standings, tables
from benchmarks.suite.tasks import TASKS
from benchmarks.suite.trials import PRESETS, Trial, read
from examples.cifar.presets import GRID

CNN = "cifar10/cnn-bn-relu/b64"
DIABETES = "diabetes/mlp-relu/b32"


# --- standings -----------------------------------------------------------------------------------


def record(name, accuracy, seed=0, task=CNN, lr=None, seconds=2.0, loss=None, **changes):
    """A hand-made record: of a task with ten equal classes, or of diabetes."""
    classes = TASKS[task].score == "accuracy"
    accuracy = accuracy if classes else None
    diverged = changes.get("diverged", False)
    loss = (1 - accuracy if classes else 0.5) if loss is None else loss
    told = [0.1, accuracy] if classes else [None, None]
    return {
        **Trial(task, name, lr, seed, 2, 1000, 1000).as_dict(),
        "family": TASKS[task].family,
        "held_back": TASKS[task].held_back,
        "score": TASKS[task].score,
        "chance": 0.1 if classes else None,
        "test_accuracy": accuracy,
        "test_loss": None if diverged else loss,
        "train_loss": None if diverged else loss,
        "diverged": diverged,
        "skipped": 0,
        "seconds": seconds,
        "versions": {"python": "3.11.7", "torch": "2.13.0", "adler": "0.1.0"},
        "device": "cpu",
        "curves": {
            "train_loss": [1.0, loss],
            "test_loss": [1.0, loss],
            "test_accuracy": told,
            "learning_rate": [0.1, 0.1],
            "seconds": [seconds / 2, seconds / 2],
        },
        **changes,
    }


def grid(best, seed=0, task=CNN, **options):
    """Ten SGD runs, the eighth of which is the best."""
    return [
        record("sgd", best - 0.01 * abs(i - 7), seed, task, lr, **options)
        for i, lr in enumerate(GRID)
    ]


def met(mine, theirs, **options):
    """The verdict of accuracies seed by seed."""
    return standings.verdict(
        [
            (record("adler", a, seed, **options), record("sgd", b, seed, lr=GRID[0]))
            for seed, (a, b) in enumerate(zip(mine, theirs))
        ]
    )


def test_verdicts_win_tie_and_loss():
    assert met([0.5, 0.52, 0.54], [0.4, 0.42, 0.44]) == "win"
    assert met([0.4, 0.42, 0.44], [0.5, 0.52, 0.54]) == "loss"
    # Differences 0.03, −0.01, 0.01: mean 0.01, standard error 0.02 / √3 = 0.0115.
    assert met([0.53, 0.49, 0.51], [0.5, 0.5, 0.5]) == "tie"
    # The same mean with standard error 0.01 / √3 = 0.0058.
    assert met([0.52, 0.5, 0.51], [0.5, 0.5, 0.5]) == "win"
    assert met([0.5], [0.5]) == "tie"
    assert met([0.501], [0.5]) == "win"


def test_verdicts_of_the_dead_and_the_diverged():
    # Three standard errors above a tenth, of a thousand examples: 0.1285.
    assert met([0.5, 0.128, 0.5], [0.3, 0.3, 0.3]) == "dead"
    assert met([0.128, 0.128], [0.3, 0.3]) == "dead"
    assert met([0.129, 0.129], [0.3, 0.3]) == "loss"
    # Where SGD learns nothing either, nobody is dead.
    assert met([0.11], [0.12]) == "loss"
    assert met([0.12], [0.11]) == "win"
    assert met([0.5, 0.1], [0.3, 0.3], diverged=True) == "diverged"
    both = record("adler", 0.1, diverged=True), record("sgd", 0.1, lr=GRID[0], diverged=True)
    assert standings.verdict([both]) == "tie"
    assert standings.verdict([(record("adler", 0.3), both[1])]) == "win"


@pytest.mark.parametrize(
    ("theirs", "mine"),
    [
        ({"chance": 0.1}, {"chance": 0.101}),
        ({"data": "0a"}, {"data": "0b"}),
        ({"chance": 0.1, "data": "0a"}, {"chance": 0.1, "data": "0b"}),
    ],
)
def test_runs_on_different_examples_are_not_compared(theirs, mine):
    runs = [{**record("adler", 0.5), **mine}, {**record("adamw", 0.5), **theirs}]
    with pytest.raises(ValueError, match=r"adler and adamw|adamw and adler"):
        standings.contests(runs)
    standings.contests([*runs[:1], {**record("adamw", 0.5), "chance": mine.get("chance", 0.1)}])
    standings.contests([runs[0], {**runs[1], "seed": 7}])


def test_the_verdict_names_a_tuned_adamw_and_rates_off_its_grid_do_not_count():
    rates = methods.method(standings.TUNED).grid
    tuned = [record(standings.TUNED, 0.4, lr=lr, loss=0.8) for lr in rates]
    mine = [record(standings.DEFAULT, 0.5, loss=0.6), *grid(0.3)]
    elsewhere = record(standings.TUNED, 0.9, lr=1e-9)
    sentence = "best of 5 rates ends below it on 1 of 1 tasks, level on 0; test loss 0.75 times"
    for found in ([*mine, *tuned], [*mine, *tuned, elsewhere]):
        assert sentence in tables.markdown(found, "full")
    without = [*mine, *tuned[1:], elsewhere]  # as many rates, but not all of the grid
    assert "AdamW with a cosine to zero" not in tables.markdown(without, "full")
    diverged = [record(standings.TUNED, 0.4, lr=lr, diverged=True) for lr in rates]
    assert "on 1 of 1 tasks, level on 0." in tables.markdown([*mine, *diverged], "full")


def test_at_chance_of_a_loss():
    task = "digits/autoencoder-tanh/b64"
    for loss, dead in ((0.99, True), (0.97, False)):
        assert standings.at_chance(record("adler", None, task=task, loss=loss, chance=1.0)) is dead
    assert not standings.at_chance(record("adler", None, task=DIABETES, loss=7.0))


def test_losses_count_downwards():
    mine = [record("adler", None, seed, DIABETES, loss=0.4) for seed in range(2)]
    theirs = [record("sgd", None, seed, DIABETES, GRID[0], loss=0.5) for seed in range(2)]
    assert standings.verdict(list(zip(mine, theirs))) == "win"
    assert standings.verdict(list(zip(theirs, mine))) == "loss"


def test_of_a_grid_the_best_and_only_of_a_whole_one():
    found = grid(0.4)
    best = standings.contests(found[::-1])[CNN, 0]["sgd"]
    assert (best["lr"], best["test_accuracy"]) == (GRID[7], 0.4)
    assert standings.contests(found[1:]) == {}
    found[2]["test_loss"] = 0.1
    assert standings.contests(found, "test_loss")[CNN, 0]["sgd"]["lr"] == GRID[2]
    found[7].update(diverged=True, test_loss=None)
    assert standings.contests(found)[CNN, 0]["sgd"]["lr"] == GRID[6]


def test_ranks_share_a_place_where_scores_are_equal():
    found = [
        *(record(n, a) for n, a in (("adler", 0.5), ("adamw", 0.5), ("momo", 0.2))),
        *(record(n, a, 1) for n, a in (("adler", 0.5), ("adamw", 0.4), ("momo", 0.6))),
        record("adler", 0.9, 2),
    ]
    ranks, count = standings.mean_ranks(standings.contests(found), ["adler", "adamw", "momo"])
    assert ranks == {"adler": 1.75, "adamw": 2.25, "momo": 2.0}
    assert count == 1
    # A task with one seed weighs as much as one with two.
    found += [record(n, 0, task=DIABETES, loss=x) for n, x in (("adler", 3.0), ("adamw", 2.0))]
    found.append(record("momo", 0, task=DIABETES, loss=1.0))
    ranks, count = standings.mean_ranks(standings.contests(found), ["adler", "adamw", "momo"])
    assert ranks == {"adler": (1.75 + 3) / 2, "adamw": (2.25 + 2) / 2, "momo": 1.5}
    assert count == 2


def test_loss_ratios_are_geometric_and_bounded():
    found = [
        *grid(0.4), record("adler", 0.4, loss=0.3), record("momo", 0.1, diverged=True),
        *grid(0.4, 1), record("adler", 0.4, 1, loss=1.2), record("momo", 0.4, 1, loss=0.6),
    ]  # fmt: skip
    by_loss = standings.contests(found, "test_loss")
    assert standings.loss_ratio(by_loss, "adler") == pytest.approx(1.0)
    assert standings.loss_ratio(by_loss, "momo") == pytest.approx(math.sqrt(10))
    assert standings.loss_ratio(by_loss, "prodigy") is None
    found += [record("gen-sgd", 0.4, train_loss=1e-5)]
    by_train = standings.contests(found, "train_loss")
    assert standings.loss_ratio(by_train, "gen-sgd", which="train_loss") == pytest.approx(0.1)


def test_accuracy_at_a_moment():
    one = record("adler", 0.5, seconds=4.0)
    one["curves"]["test_accuracy"] = [0.3, 0.5]
    for where, expected in ((0, 0.1), (1, 0.2), (2, 0.3), (3, 0.4), (4, 0.5), (9, 0.5)):
        assert standings.value_at(one, where, "seconds") == pytest.approx(expected)
        assert standings.value_at(one, where / 4, "share") == pytest.approx(expected)
    one["diverged"] = True
    assert standings.value_at(one, 4, "seconds") == pytest.approx(0.1)


def test_costs_are_relative_to_one_sgd_run_of_the_same_task():
    found = [
        *grid(0.4, seconds=2.0), record("adler", 0.5, seconds=4.0),
        *grid(0.4, 1, seconds=4.0), record("adler", 0.5, 1, seconds=12.0),
    ]  # fmt: skip
    found[0].update(diverged=True, seconds=0.1)
    seconds = standings.seconds_of(found)
    assert seconds == {(CNN, 0): 2.0, (CNN, 1): 4.0}
    assert standings.cost_ratio(standings.contests(found), "adler", seconds) == 2.5


def test_what_is_recorded_gives_the_tables_that_are_recorded():
    results = Path(tables.__file__).parents[1] / "results" / "suite"
    for name in ("development", "held-back", "full"):
        preset = PRESETS[name]
        found = read([results / part for part in preset.parts or (name,)])
        text = tables.markdown(horizons.at(found, preset, 1), name)
        assert text == (results / name / "tables.md").read_text(), name


# --- tables and figures --------------------------------------------------------------------------


def fixed_records():
    """Two tasks, two seeds; one method wins, one dies, one diverges, one is a variant."""
    found = []
    for seed in range(2):
        found += grid(0.4 + 0.02 * seed, seed) + grid(0.5, seed, DIABETES)
        for name, accuracy, loss in (
            ("adler", 0.5, 0.3),
            ("adamw", 0.412, 0.5),
            ("momo", 0.1, 0.6),
            ("adler@max_kl=0.03", 0.45, 0.4),
            ("adler@max_kl=0.3", 0.46, 0.4),
            ("adler@max_kl=0.3,lr=0.5", 0.44, 0.4),
        ):
            for task in (CNN, DIABETES):
                told = {"loss": loss, "seconds": 5.0 - seed}
                if name == "adler":
                    told["train_loss"] = loss / 2
                found.append(record(name, accuracy, seed, task, **told))
    found += [record("dog", 0.1, seed, diverged=True) for seed in range(2)]
    return found


OVERALL = """\
| Method | Tasks | Wins | Ties | Losses | Dead | Diverged | Accuracy gained (points) | Mean rank | Test loss, ratio | Training loss, ratio |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
| SGD grid | 2 |  |  |  |  |  | +0.0 | 2.5 | 1.00 | 1.00 |
| Adler | 2 | 2 | 0 | 0 | 0 | 0 | +9.0 | 1.0 | 0.55 | 0.28 |
| AdamW (default) | 2 | 0 | 2 | 0 | 0 | 0 | +0.2 | 2.5 | 0.92 | 0.92 |
| DoG | 1 | 0 | 0 | 0 | 0 | 1 | -31.0 | 5.0 | 10.00 | 10.00 |
| MoMo | 2 | 0 | 0 | 1 | 1 | 0 | -31.0 | 4.0 | 1.10 | 1.10 |
"""  # noqa: E501


UNTUNED = """\
| Method | Mean rank | Best on | Within 5 % on | Furthest behind | where |
| --- | --- | --- | --- | --- | --- |
| Adler | 1.0 | 1 | 1 | 0 % | cifar10/cnn-bn-relu/b64 |
| AdamW (default) | 2.0 | 0 | 0 | 18 % | cifar10/cnn-bn-relu/b64 |
| MoMo | 3.0 | 0 | 0 | 80 % | cifar10/cnn-bn-relu/b64 |
| DoG | 4.0 | 0 | 0 | 80 % | cifar10/cnn-bn-relu/b64 |

On the 1 tasks"""
VARIANTS = """\
| `adler@max_kl=0.03` | 2 | 0 | 0 | 2 | -5.0 | 1.33 |
| `adler@max_kl=0.3` | 2 | 0 | 0 | 2 | -4.0 | 1.33 |
"""


def test_the_tables_of_fixed_records():
    text = tables.markdown(fixed_records(), "development")
    assert text == tables.markdown(fixed_records()[::-1], "development")
    assert "| Adler | 1.0 | 2 / 0 / 0 | 0 | +9.0 |\n" in text
    assert OVERALL in text
    assert UNTUNED in text
    assert VARIANTS in text
    assert "66 runs: 2 tasks (0 held back), 2 seeds; " in text
    assert "| MoMo | cifar10/cnn-bn-relu/b64 | dead |\n" in text
    assert "| DoG | cifar10/cnn-bn-relu/b64 | diverged |\n" in text
    assert "| AdamW (default) | 0.412 ± 0.000 = |\n" in text
    assert "| DoG | NaN ‡ |\n" in text
    assert "| MoMo | 0.600 ± 0.000 − |\n" in text
    # Of 5 and 4 seconds, an SGD run of 2: after 4.4 seconds at 0.404 and at 0.5, SGD at 0.41.
    assert "| Adler | 2.25 | 1.50 | -31.0 | +4.2 |\n" in text


def test_the_verdict_counts_what_the_recommended_optimizer_won_and_lost():
    found = fixed_records()
    assert "AdlerScheduleFree has not run." in tables.markdown(found, "development")
    for seed in range(2):
        found.append(record("adler-schedulefree", 0.45, seed, CNN))
        found.append(record("adler-schedulefree", 0.0, seed, DIABETES, loss=0.6))
    text = tables.markdown(found, "development")
    assert (
        "**Untuned, AdlerScheduleFree ends above the best of 10 SGD learning rates on 1 of 2 short "
        "tasks, level with it on 0, below on 1.** It failed to train on none. Accuracy gained, in "
        "the mean: +4.0 points. Mean rank among 6 methods, that SGD among them: 2.0, place 2, over "
        "1 task. The first is Adler, 1.0.\n"
    ) in text
    for r in found:
        if r["method"] == "adler-schedulefree":
            r["diverged"] = True
    assert "It failed to train on 2." in tables.markdown(found, "development")


def test_how_far_behind_the_best():
    found = [
        record(name, accuracy, seed, task, loss=loss, diverged=diverged)
        for name, accuracy, loss, diverged in (
            ("adler", 0.50, 0.30, False),
            ("adamw", 0.49, 0.33, False),
            ("momo", 0.20, 0.30, True),
        )
        for task in (CNN, DIABETES)
        for seed in range(2)
    ]
    told, count = standings.behind(standings.contests(found), ["adler", "adamw", "momo"])
    assert count == 2
    assert told["adler"] == (2, 2, 0.0, CNN)
    assert told["adamw"][:2] == (0, 1)
    assert told["adamw"].furthest == pytest.approx(0.1)
    assert told["momo"] == (0, 0, pytest.approx(9.0), DIABETES)
    assert standings.behind(standings.contests(found), ["adler", "dog"]) == ({}, 0)


def test_the_tasks_that_are_lost_are_listed():
    found = [*grid(0.5), *grid(0.5, task=DIABETES)]
    found += [record(standings.DEFAULT, 0.4), record("adamw", 0.45)]
    found += [
        record(standings.DEFAULT, 0, task=DIABETES, loss=0.4),
        record("adamw", 0, task=DIABETES),
    ]
    text = tables.markdown(found, "development")
    (row,) = [line for line in text.splitlines() if line.endswith("| AdamW (default) |")]
    assert row == f"| {CNN} | 0.400 − | 0.500 | 0.450 | AdamW (default) |"
    found[-2] = record(standings.DEFAULT, 0, task=DIABETES, loss=0.499)  # above SGD's 0.5
    found.append(record("momo", 0, task=DIABETES, loss=0.4))
    found.append(record("momo", 0.1))
    assert f"| {DIABETES} | 0.499 | 0.500 | 0.400 | MoMo |" in tables.markdown(found, "development")


def test_what_other_measurements_do():
    found = [one for seed in range(2) for one in grid(0.4, seed)]
    for name, accuracy, seconds in (
        (standings.DEFAULT, 0.5, 5.0),
        *zip(standings.MODES, (0.55, 0.5, 0.4), (6, 3, 2)),
    ):
        for seed in range(2):
            found.append(record(name, accuracy, seed, seconds=seconds, skipped=seed))
    text = tables.markdown(found, "development")
    assert "| AdlerScheduleFree, every step | 1 | 1 | 0 | 0 | +5.0 | 0.90 | 1 | 3.00 |" in text
    assert (
        "| AdlerScheduleFree, finite difference | 1 | 0 | 1 | 0 | +0.0 | 1.00 | 1 | 1.50 |" in text
    )
    assert "| AdlerScheduleFree, low_cost | 1 | 0 | 0 | 1 | -10.0 | 1.20 | 1 | 1.00 |" in text
    assert "They have not run." in tables.markdown(fixed_records(), "development")
    without = [r for r in found if r["method"] != "adler-schedulefree-difference"]
    assert "AdlerScheduleFree, every step" in tables.markdown(without, "development")


def test_passes_are_those_of_the_records():
    found = [*grid(0.4), record("adler", 0.5), record("adler-schedulefree-low-cost", 0.5)]
    text = tables.markdown(found, "development")
    assert "| Adler | 1.00 | 1.50 |" in text  # measured at every step before there was a default
    assert "| AdlerScheduleFree, low_cost | 1.00 | 1.03 |" in text
    found[-2]["passes"] = 2.2
    assert "| Adler | 1.00 | 1.10 |" in tables.markdown(found, "development")


def test_tuned_adamw_is_a_reference_of_its_own():
    rates = methods.METHODS[standings.TUNED].grid
    found = [*grid(0.4), record("adler", 0.5), record("adler", 0.5, 1)]
    for seed in range(2):
        for index, lr in enumerate(rates):
            found.append(record(standings.TUNED, 0.41 + 0.01 * index, seed, lr=lr))
    text = tables.markdown(found, "development")
    assert "| Adler | 1 | 1 | 0 | 0 | +5.0 | 0.91 |" in text
    assert "| SGD grid | 1 | 0 | 0 | 1 | -5.0 |" in text
    assert "AdamW + cosine, grid" not in text


def test_one_method_against_another():
    text = tables.markdown(fixed_records(), "development")
    row = next(line for line in text.splitlines() if line.startswith("| 2 Adler"))
    assert row.split(" | ")[1:6] == ["2/0/0", "", "2/0/0", "1/0/0", "2/0/0 |"]


def test_sweeps_vary_one_option():
    names = standings.names(fixed_records())
    found = {(s.option, repr(s.others)): list(s.methods.values()) for s in plots.sweeps(names)}
    assert found == {
        ("max_kl", "{}"): ["adler@max_kl=0.03", "adler@max_kl=0.3"],
        ("lr", "{'max_kl': 0.3}"): ["adler@max_kl=0.3,lr=0.5", "adler@max_kl=0.3"],
    }


@pytest.mark.long
def test_figures_are_drawn_and_do_not_change(tmp_path):
    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        made.append(plots.draw(fixed_records(), tmp_path / name))
    assert [path.name for path in made[0]] == [
        "accuracy.png", "accuracy.svg", "sensitivity.png", "sensitivity.svg",
    ]  # fmt: skip
    assert_same_figures(*made)


def test_a_figure_of_many_methods_shows_eight_each_in_its_colour():
    others = ["dog", "ldog", "momo", "prodigy", "gen-sgd", "mechanic-adamw"]
    found = [*grid(0.4), *(record(n, 0.3 + 0.01 * i) for i, n in enumerate(others))]
    found += [record(n, 0.2) for n in ("adler", "adler-adam", "adamw", *standings.MODES)]
    figure = plots.curves(found)
    drawn = (*others[-4:], "sgd", "adler", "adler-adam", "adamw")
    for axis in figure.axes:
        lines = {line.get_label(): line.get_color() for line in axis.lines[1:]}
        assert lines.keys() == {methods.method(name).label for name in drawn}
        assert len(set(lines.values())) == 8
    assert "the 4 of best mean rank" in figure.get_suptitle()


def test_of_a_sweep_the_optimizer_has_the_colour():
    names = ["adler-adam", "adler-adam@lr=0.5", "adler-adam@max_kl=0.3,lr=0.5"]
    found = [*grid(0.4), *(record(n, 0.4) for n in [*names, "adler-adam@max_kl=0.3,lr=2.0"])]
    lines = plots.sensitivity(found).axes[0].lines[:-1]
    assert len({line.get_color() for line in lines}) == 1
    looks = {line.get_label(): (line.get_marker(), line.get_linestyle()) for line in lines}
    assert len(set(looks.values())) == len(looks) == 2


def test_without_what_they_need_there_are_no_figures(tmp_path):
    assert plots.draw([record("adler", None, task=DIABETES)], tmp_path) == []
