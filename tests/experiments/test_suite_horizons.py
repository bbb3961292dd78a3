"""`benchmarks/suite`: runs of several lengths, and what stands for each."""

import functools
import json
import math

import pytest
from support.needs import needing

from benchmarks.suite import __main__ as command
from benchmarks.suite import data, horizon_tables, horizons, profile_plots, run, standings
from benchmarks.suite.methods import METHODS, method
from benchmarks.suite.standings import TUNED
from benchmarks.suite.tasks import TASKS
from benchmarks.suite.trials import PRESETS, Preset, Trial, read
from examples.shared import jobs

DIABETES, WINE = "diabetes/mlp-relu/b32", "wine/mlp-tanh/b16"
LIMITS = {"epochs": 2, "train_examples": 112, "test_examples": 60}
SMALL = Preset(
    lambda task: task.name in (DIABETES, WINE),
    seeds=(0,),
    limits=LIMITS,
    methods=(TUNED, "adler", "schedulefree-plus"),
    horizons=(2, 1, 4),
)


def trained(name, horizon, task=DIABETES, lr=None):
    if lr is None and method(name).grid:
        lr = method(name).grid[2]
    trial = Trial(task, name, lr, 0, 2 * horizon, LIMITS["train_examples"], LIMITS["test_examples"])
    return run.work(trial, None, "cpu")


@functools.cache
def recorded(name, horizon):
    return trained(name, horizon)


# --- trials --------------------------------------------------------------------------------------


def test_who_need_not_know_the_steps_runs_at_the_longest_horizon_alone():
    trials = list(SMALL.trials())
    assert len({t.key() for t in trials}) == len(trials)
    epochs = {
        name: [t.epochs for t in trials if (t.task, t.method) == (WINE, name)]
        for name in SMALL.methods
    }
    assert epochs["adler"] == [8]
    assert epochs["schedulefree-plus"] == [4, 2, 8]
    assert epochs[TUNED] == [4] * 5 + [2] * 5 + [8] * 5


@pytest.mark.parametrize("name", ["horizons", "long-held-back", "long", "longer"])
def test_presets_with_horizons(name):
    preset = PRESETS[name]
    assert min(preset.horizons) == 1
    assert max(preset.horizons) == (8 if name == "longer" else 16)
    assert {METHODS[m].grid is None for m in preset.methods} == {True, False}
    assert TUNED in preset.methods
    lengths = {
        t.epochs // TASKS[t.task].epochs for t in preset.trials() if t.method == "adler-adam"
    }
    assert lengths == {max(preset.horizons)}


# --- records -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if not m.needs_steps])
def test_the_beginning_of_a_longer_run_is_the_shorter_run(name):
    needing(name)
    longer, shorter = trained(name, 2), trained(name, 1)
    told = horizons.cut(longer, 2)
    for record in (told, shorter):
        del record["seconds"], record["curves"]["seconds"]
    assert told == {k: v for k, v in shorter.items() if k not in ("skipped", "clipped")}
    assert told["test_loss"] != longer["test_loss"]


def test_the_beginning_of_a_run_with_classes():
    longer, shorter = trained("adamw", 2, WINE), trained("adamw", 1, WINE)
    told = horizons.cut(longer, 2)
    for name in ("test_accuracy", "best_test_accuracy", "steps", "diverged", "epochs"):
        assert told[name] == shorter[name]
    assert told["seconds"] == sum(longer["curves"]["seconds"][:2])
    json.dumps(told, allow_nan=False)


def test_a_run_that_explodes_later_has_not_yet():
    longer = json.loads(json.dumps(recorded("adamw", 2)))
    longer["diverged"] = True
    longer["curves"]["test_loss"][3] = 1e9
    assert not horizons.cut(longer, 2)["diverged"]
    longer["curves"]["test_loss"][1] = 101 * longer["first_loss"]
    assert horizons.cut(longer, 2)["diverged"]
    longer["curves"]["test_loss"][1] = 99 * longer["first_loss"]
    assert not horizons.cut(longer, 2)["diverged"]
    longer["curves"]["train_loss"][1] = None
    assert horizons.cut(longer, 2)["diverged"]


def test_a_run_that_ended_before_has_diverged():
    longer = json.loads(json.dumps(recorded("adamw", 2)))
    for curve in longer["curves"].values():
        del curve[1:]
    longer["curves"]["test_loss"][0] = 1.0  # whatever it says
    told = horizons.cut(longer, 2)
    assert told["diverged"]
    assert told["test_loss"] == 1.0
    assert not horizons.cut(longer, 1)["diverged"]


def test_records_without_the_first_loss_diverge_where_they_are_not_finite():
    longer = json.loads(json.dumps(recorded("adamw", 2)))
    del longer["first_loss"]
    longer["curves"]["test_loss"][1] = 1e30
    assert not horizons.cut(longer, 2)["diverged"]
    longer["curves"]["test_loss"][1] = None
    assert horizons.cut(longer, 2)["diverged"]


def test_each_horizon_has_its_own_run_or_the_beginning_of_the_next():
    found = [
        recorded(name, h) for name, h in (("adler", 4), ("adler", 2), ("schedulefree-plus", 4))
    ]
    other = {**recorded("adamw", 1), "train_examples": 111}
    assert horizons.found_horizons([*found, other], SMALL) == [2, 4]
    assert horizons.at(found, SMALL, 4) == [found[0], found[2]]
    assert horizons.at([*found[::-1], other], SMALL, 2) == [found[1]]
    assert horizons.at(found, SMALL, 1) == [horizons.cut(found[1], 2)]
    assert horizons.at([other], SMALL, 1) == []
    assert horizons.horizon(found[0], PRESETS["smoke"]) is None  # other sizes


def test_horizons_have_names():
    assert horizons.title(4, PRESETS["horizons"]) == "3,200 steps"
    assert horizons.title(8, PRESETS["longer"]) == "8 × the epochs"


# --- tables --------------------------------------------------------------------------------------


def hand_made(name, losses, task=DIABETES, lr=None, horizon=None, **changes):
    """A record with these test losses after each epoch."""
    horizon = len(losses) // 2 if horizon is None else horizon
    made = json.loads(json.dumps(recorded("adamw", 1)))
    curves = {
        "train_loss": losses, "test_loss": losses, "test_accuracy": [None] * len(losses),
        "learning_rate": [0.1] * len(losses), "seconds": [2.0] * len(losses),
    }  # fmt: skip
    return {
        **made,
        **Trial(task, name, lr, 0, 2 * horizon, 112, 60).as_dict(),
        "test_loss": losses[-1],
        "train_loss": losses[-1],
        "first_loss": 2.0,
        "seconds": 2.0 * len(losses),
        "steps": 10,
        "score": "loss",
        "test_accuracy": None,
        "curves": curves,
        **changes,
    }


def some_records():
    rates = method(TUNED).grid
    found = []
    for task in (DIABETES, WINE):
        for lr in rates:
            best = lr == rates[3]
            found.append(hand_made(TUNED, [1.0, 0.5 if best else 0.8], task, lr))
            found.append(hand_made(TUNED, [1.0, 0.9, 0.6, 0.4 if best else 0.7], task, lr))
        found.append(hand_made("adler", [0.9, 0.6, 0.5, 0.2 if task == WINE else 0.3], task))
        found.append(hand_made("schedulefree-plus", [0.9, 0.4], task))
        found.append(hand_made("schedulefree-plus", [0.9, 0.8, 0.7, 0.8], task))
        found.append(hand_made("momo", [0.9, 0.7, 3.0, None], task, diverged=True))
    return found


def test_the_tables_by_horizon():
    found = some_records()
    short = [
        hand_made(name, [1.0, loss], lr=lr)
        for name, loss, lr in (
            ("adler", 0.2, None), ("schedulefree-plus", 0.3, None), ("momo", 0.1, None),
            ("prodigy", 0.01, None), ("sgd", 0.001, 0.1),
        )
    ]  # fmt: skip
    text = horizon_tables.markdown(found, SMALL, "small", short)
    assert text == horizon_tables.markdown(found[::-1], SMALL, "small", short[::-1])
    ranks, _, rest = text.partition("<!-- --8<-- [end:horizons] -->")
    assert "<!-- --8<-- [start:horizons] -->" in ranks
    assert (
        "| Untuned | 200 steps: of 4, 1 tasks | 1 × the epochs: of 3, 2 tasks "
        "| 2 × the epochs: of 3, 2 tasks | Dead or diverged |\n"
    ) in ranks
    assert "| ScheduleFree+ | 4.0 | 1.0 | 2.0 | 0 |\n" in ranks
    assert "| Adler | 3.0 | 2.0 | 1.0 | 0 |\n" in ranks
    assert "| MoMo | 2.0 | 3.0 | 3.0 | 2 |\n" in ranks
    assert "| Prodigy | 1.0 | – | – | – |\n" in ranks
    order = [ranks.index(f"| {name} |") for name in ("Adler", "ScheduleFree+", "MoMo", "Prodigy")]
    assert order == sorted(order)
    assert "SGD" not in ranks

    ratio = math.sqrt(0.2 * 0.3) / 0.4
    assert (
        f"| Adler | 1.200 | 1.20 | {DIABETES}, of 2 | {ratio:.3f} | 0.75 | {DIABETES}, of 2 |"
        in rest
    )
    assert (
        f"| ScheduleFree+ | 0.800 | 0.80 | {DIABETES}, of 2 | 2.000 | 2.00 | {DIABETES}, of 2 |"
        in rest
    )
    assert f"| MoMo | 1.400 | 1.40 | {DIABETES}, of 2 | 10.000 | 10.00 | {DIABETES}, of 2 |" in rest

    # Tasks, wins, ties, losses, accuracy, test loss, lowest test loss, training loss, time.
    beside = rest.partition("[start:tuned]")[2]
    one, two = beside.split("### 1 × the epochs")[1].split("### 2 × the epochs")[:2]
    assert "| Adler | 2 | 0 | 0 | 2 | – | 1.20 | 1.20 | 1.20 | 1.00 |" in one
    assert f"| Adler | 2 | 2 | 0 | 0 | – | {ratio:.2f} | {ratio:.2f} | {ratio:.2f} | 1.00 |" in two
    assert "| ScheduleFree+ | 2 | 0 | 0 | 2 | – | 2.00 | 1.75 | 2.00 | 1.00 |" in two
    assert f"| MoMo | 2 × the epochs | {DIABETES} | diverged |" in rest
    assert "| AdamW + cosine, grid | 0.500 | 0.400 |" in rest
    assert "| Adler | 0.600 − | 0.300 + |" in rest


def test_a_horizon_that_nobody_has_finished():
    text = horizon_tables.markdown([hand_made("adler", [0.9, 0.6])], SMALL, "small")
    assert text.count("It has not run.") == 5
    assert "No task has a target" in text
    assert "| Adler | 1.0 | 0 |" in text
    assert "Not yet run beside a tuned AdamW: 1 × the epochs.\n" in text


def test_the_verdict_by_horizon_is_of_the_recommended_optimizer():
    found = [
        {**r, "method": "adler-schedulefree"} if r["method"] == "adler" else r
        for r in some_records()
    ]
    text = horizon_tables.markdown(found, SMALL, "small")
    assert (
        "**AdlerScheduleFree's test loss beside AdamW with a cosine to zero and the best of 5 "
        "rates: after 1 × the epochs 1.200 times AdamW's on 2 tasks (at most 1.20); after 2 × the "
        f"epochs {math.sqrt(0.2 * 0.3) / 0.4:.3f} times AdamW's on 2 tasks (at most 0.75).**\n"
    ) in text
    assert "Not yet run" not in text


def test_the_short_table_is_of_the_longest_horizon_with_most_tasks():
    found = [
        {**r, "method": "adler-schedulefree"} if r["method"] == "adler" else r
        for r in some_records()
    ]
    text = horizon_tables.markdown(found, SMALL, "small")
    end = "After 2 × the epochs | At most, after 2 × the epochs"
    heads = f"It is told | After 1 × the epochs: 2 tasks | {end}"
    assert f"| Test loss over tuned AdamW's | {heads} |" in text
    mean = math.sqrt(0.2 * 0.3) / 0.4
    assert f"| AdlerScheduleFree | nothing | {0.6 / 0.5:.3f} | {mean:.3f} | 0.75 |" in text
    # What has run on fewer tasks at the other horizon is not compared there.
    plus = "schedulefree-plus", WINE, 2
    fewer = [r for r in found if (r["method"], r["task"], r["epochs"]) != plus]
    assert len(fewer) < len(found)
    text = horizon_tables.markdown(fewer, SMALL, "small")
    assert "| ScheduleFree+ | the horizon | – | 2.000 | 2.00 |" in text
    assert "geometric mean over 2 tasks, 1 seed." in text
    # Wherever in the grid the best rate is, of which `some_records` has the fourth.
    rates = method(TUNED).grid
    for count, lr in ((0, rates[3]), (2, rates[0]), (0, rates[1]), (2, rates[-1])):
        exchanged = {rates[3]: lr, lr: rates[3]}
        moved = [{**r, "lr": exchanged.get(r["lr"], r["lr"])} for r in found]
        text = horizon_tables.markdown(moved, SMALL, "small")
        assert f"at an end of its grid in {count} of 2 runs of AdamW + cosine." in text


def test_the_short_table_keeps_what_was_held_back_apart():
    found = [
        {
            **r,
            "method": "adler-schedulefree" if r["method"] == "adler" else r["method"],
            "held_back": r["task"] == WINE,
        }
        for r in some_records()
    ]
    text = horizon_tables.markdown(found, SMALL, "small")
    held = "1 held back, after 2 × the epochs"
    assert f"| After 2 × the epochs: 1 tasks to choose on | {held} | At most, after" in text
    assert "| AdlerScheduleFree | nothing | 1.200 | 0.750 | 0.500 | 0.75 |" in text


def test_who_did_not_run_on_all_tasks_of_the_default_does_not_compete():
    found = [
        hand_made(name, [0.9, 0.6], task)
        for name, task in (
            ("adler-schedulefree", DIABETES), ("adler-schedulefree", WINE),
            ("adler", DIABETES), ("adler", WINE), ("momo", WINE),
            ("adler@beta=0.5", WINE), ("adler@beta=0.5", DIABETES),
        )
    ]  # fmt: skip
    assert profile_plots.untuned(found) == ["adler", "adler-schedulefree"]


def test_loss_ratios_are_those_that_the_mean_is_of():
    runs = standings.contests(horizons.at(some_records(), SMALL, 2), "test_loss")
    ratios = standings.loss_ratios(runs, "adler", TUNED)
    assert ratios == pytest.approx({DIABETES: 0.75, WINE: 0.5})
    assert standings.loss_ratio(runs, "adler", TUNED) == pytest.approx(math.sqrt(0.375))


# --- the command ---------------------------------------------------------------------------------


@pytest.mark.long
def test_horizons_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "longer", SMALL)
    results = tmp_path / "longer"
    common = ["--preset", "longer", "--results", str(results), "--tasks", "diabetes"]
    command.main([*common, "--horizons", "1", "2"])
    found = read([results])
    assert len(found) == 5 * 2 + 1 + 2
    text = (results / "tables.md").read_text()
    assert text == horizon_tables.markdown(found, SMALL, "longer")
    assert "| Adler | 0." in text

    asked = []
    monkeypatch.setattr(jobs, "run_all", lambda trials, *rest: asked.extend(trials) or iter(()))
    command.main(common)
    assert {t.epochs for t in asked} == {8}
    assert len(asked) == 5 + 1 + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--preset", "smoke", "--horizons", "2"],
            "--horizons 2: .* with several: hor",
        ),
        (["--preset", "horizons", "--horizons", "0"], "--horizons 0: positive numbers"),
        (["--preset", "horizons", "--tasks", "long/novels"], "novels.txt: pass --data"),
    ],
)
def test_horizons_that_cannot_run(arguments, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        command.main([*arguments, "--methods", "adler", "--results", str(tmp_path)])


def test_a_text_is_missed_before_anything_runs(tmp_path):
    arguments = ["--preset", "horizons", "--methods", "adler", "--tasks", "long/novels"]
    with pytest.raises(SystemExit, match=rf"{data.NOVELS}: missing"):
        command.main([*arguments, "--data", str(tmp_path), "--results", str(tmp_path)])
