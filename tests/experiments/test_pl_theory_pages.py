"""`examples/pl_theory`: experiments and presets, killed runs, what is made of the records."""

import copy
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from support.figures import assert_same_figures
from support.launch import ROOT

from examples.pl_theory import __main__ as command
from examples.pl_theory import claims, experiments, figures, records, verdicts
from examples.pl_theory.config import Experiment
from examples.pl_theory.presets import FIGURES, PRESETS
from examples.shared.records import rounded

TRAINING = Experiment(
    "training", "digits", "tanh", width=12, depth=3, examples=(6,), loss="mse", rate=0.05, epochs=6,
    measurements=3, test_examples=20,
)  # fmt: skip


# --- what an experiment and a preset are ----------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "train"}, "kind='train'"),
        ({"activation": "step"}, "activation='step'"),
        ({"loss": "hinge"}, "loss='hinge'"),
        ({"width": 0}, "width=0"),
        ({"epochs": 0}, "epochs=0"),
        ({"rate": 0.0}, "rate=0.0"),
        ({"dimension": 5}, "dimension=5"),
        ({"examples": (6, 9)}, "one training set"),
        ({"kind": "initialisation", "examples": (9, 6)}, r"examples=\(9, 6\)"),
    ],
)
def test_an_experiment_that_makes_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(TRAINING, **changes)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset):
    made = list(PRESETS[preset].experiments())
    assert len({e.key() for e in made}) == len(made)
    for name, needs in FIGURES.items():
        assert any(map(needs, made)), name


def test_the_thesis_is_at_the_scale_of_the_thesis():
    made = list(PRESETS["thesis"].experiments())
    initial = [e for e in made if e.kind == "initialisation"]
    assert {(e.depth, e.examples) for e in initial} == {(30, (100, 200, 500, 1000))}
    keys = {(e.width, e.activation, e.renormalised, e.seed) for e in initial}
    assert len(keys) == len(initial) == 3 * 2 * 2 * 3
    runs = [e for e in made if e.kind == "training"]
    assert {e.width for e in runs} == {500}
    assert {e.depth for e in runs} == {6, 9}
    assert {e.examples for e in runs} == {(50,), (100,), (250,), (500,)}
    assert {e.rate for e in runs} == {0.0005, 0.001, 0.005, 0.01}
    assert {e.epochs for e in runs} == {80}
    assert len(runs) == 2 * 4 * 4 * 2 * 3 * 3
    # What the thesis did not take has a kind, and a figure, of its own.
    edges = [e for e in made if e.kind == "edge"]
    assert min(e.rate for e in edges) > max(e.rate for e in runs)
    assert not any(needs(e) for e in edges for name, needs in FIGURES.items() if name != "edge")
    # All 23 figures of the chapter, under their own numbers.
    assert {f"6.{i}" for i in range(1, 24)} <= FIGURES.keys()


# --- from the command to the page -----------------------------------------------------------------


@pytest.fixture(scope="module")
def smoke():
    """All records of the smoke preset, made in this process, as they read from a file."""
    made = (experiments.run(e) for e in PRESETS["smoke"].experiments())
    return [json.loads(json.dumps(r, allow_nan=False)) for r in made]


def without_time(found):
    return {Experiment.of(r).key(): {k: v for k, v in r.items() if k != "seconds"} for r in found}


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.long
def test_a_killed_run_resumes_to_the_same_records(smoke, tmp_path):
    path = tmp_path / "records.jsonl"
    chosen = ["6.13", "nmm"]
    arguments = [sys.executable, "-m", "examples.pl_theory", "--preset", "smoke", "--device", "cpu"]
    arguments += ["--results", str(tmp_path), "--figures", *chosen]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        arguments, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        while len(lines(path)) < 4:
            assert process.poll() is None, "ended before it could be killed"
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = path.read_text()
    kept = kept[: kept.rindex("\n") + 1]
    time.sleep(0.2)  # its worker ends with it
    with path.open("a") as file:
        file.write('{"kind":"training","da')  # as if the kill had come within a record
    done = subprocess.run(
        arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert path.read_text().startswith(kept)
    found = records.read(path)
    assert len(lines(path)) == len(found)
    expected = [r for r in smoke if any(FIGURES[name](Experiment.of(r)) for name in chosen)]
    assert without_time(found) == without_time(map(rounded, expected))
    drawn = {f"figure-{name.replace('.', '-')}.{s}" for name in chosen for s in ("png", "svg")}
    assert {p.name for p in tmp_path.iterdir()} == {
        "records.jsonl",
        "claims.md",
        "figures.md",
        *drawn,
    }
    assert (tmp_path / "claims.md").read_text() == claims.markdown(found, "smoke")
    assert (tmp_path / "figures.md").read_text() == claims.details(found)
    assert "| 6.13 |" in done.stdout


@pytest.mark.long
def test_figures_are_functions_of_the_records(smoke, tmp_path):
    before = copy.deepcopy(smoke)
    made = [
        figures.draw(found, tmp_path / name, ["6.9"])
        for name, found in (("a", smoke), ("b", random.Random(0).sample(smoke, len(smoke))))
    ]
    assert smoke == before
    assert_same_figures(*made)


@pytest.mark.long
def test_every_figure_has_labels_and_a_legend(smoke):
    assert figures._FIGURES.keys() == FIGURES.keys()
    for name, make in figures._FIGURES.items():
        figure = make(smoke)
        assert figure.legends, name
        assert figure.axes[0].get_ylabel(), name
        assert figure.axes[-1].get_xlabel(), name
        assert all(axis.lines for axis in figure.axes), name
        assert make([]) is None


@pytest.mark.long
def test_claims_are_a_function_of_the_records(smoke):
    before = copy.deepcopy(smoke)
    text, shown = claims.markdown(smoke, "smoke"), claims.details(smoke)
    shuffled = random.Random(0).sample(smoke, len(smoke))
    assert claims.markdown(shuffled, "smoke") == text
    assert claims.details(shuffled) == shown
    assert smoke == before
    # Every figure has a verdict and is shown.
    for name in FIGURES:
        assert shown.count(f"(figure-{name.replace('.', '-')}.png)") == 1
        (row, *_) = (line for line in text.splitlines() if line.startswith(f"| {name} |"))
        assert "**" in row
    assert "no record yet" not in text
    assert not re.search(r"\bnan\b", text + shown)


def test_the_first_line_counts_the_verdicts():
    section = verdicts.Section(("6.1",), "", "", "")
    said = (
        "holds (4 of 4)",
        "a: holds in part (2 of 3); b: holds (1 of 1)",
        "does not hold (0 of 8)",
    )
    line = claims._verdict([section._replace(verdict=v) for v in said])
    assert line.startswith("**Of 4 statements ")
    assert "2 hold on our networks, 1 in at least half of the cases, 1 do not.**" in line


@pytest.mark.long
def test_a_figure_without_records_says_so(smoke):
    few = [r for r in smoke if r["kind"] != "training" or r["loss"] == "mse"]
    text = claims.markdown(few, "smoke")
    assert "| 6.12 | – | – | no record yet |" in text
    # Of three losses, two activations, two rates and two seeds.
    assert re.search(r"\| 6\.5 \|.*\| \[figure\]\(figure-6-5\.png\), 4 of 4 experiments \|", text)
    first = [r for r in smoke if r["seed"] == 0]
    assert "(figure-6-5.png), 2 of 4 experiments |" in claims.markdown(first, "smoke")
    order = re.findall(r"^\| 6\.(\d+) \|", text, re.MULTILINE)
    assert [int(n) for n in order] == sorted(map(int, order))
    assert figures._FIGURES["6.12"](few) is None


def verdict_of(text, figure):
    """The verdict in the summary's first row of a figure."""
    return next(line for line in text.splitlines() if line.startswith(f"| {figure} |")).split("**")[
        1
    ]


def altered(smoke, kind, change):
    found = copy.deepcopy(smoke)
    for r in found:
        if r["kind"] == kind:
            change(r["results"], r)
    return claims.markdown(found, "smoke")


@pytest.mark.long
def test_verdicts_follow_the_records(smoke):
    """Each verdict changes when the numbers that it speaks of do."""

    def deep(results, r):
        for t in results["layers"].values():
            fall = [5.0 - m if m < 5 else 1.0 for m in range(len(t["smallest"]))]
            if not r["renormalised"]:
                fall[-1] = 4.0
            t["log_condition"] = [f - r["width"] / 1000 for f in fall]
            t["smallest"] = [1 - 0.9**m + r["width"] / 1000 for m in range(len(fall))]
            t["largest"] = [2 + 0.5**m for m in range(len(fall))]
            t["max_row_sum"] = list(fall)
            t["min_diagonal"] = [1.0] * (len(fall) - 1) + [0.1]
            t["max_off_diagonal"] = [0.5] * len(fall)

    def flat(results, r):
        for t in results["layers"].values():
            for name in t:
                t[name] = [1.0 + r["width"] / 1000] * len(t[name])

    good, bad = altered(smoke, "initialisation", deep), altered(smoke, "initialisation", flat)
    for figure in ("6.1", "6.2", "6.4", "6.9", "6.10"):
        judged = verdict_of(good, figure).split("; ")
        assert all(re.search(r"(^|: )holds \(", part) for part in judged), (figure, judged)
        judged = verdict_of(bad, figure).split("; ")
        assert not all(re.search(r"(^|: )holds \(", part) for part in judged), (figure, judged)

    def law(results, r):
        for n, t in results["layers"].items():
            value = 2 * math.log(figures.scaling_law(int(n), r["width"]))
            t["log_condition"] = [value if math.isfinite(value) else None] * len(t["smallest"])

    def linear(results, r):
        results["smallest"] = 0.5 * r["examples"][0]

    text = verdict_of(altered(smoke, "initialisation", law), "6.13")
    assert text.count("holds (") == 2
    assert "not" not in text
    assert verdict_of(altered(smoke, "tangent-kernel", linear), "nmm") == "holds (2 of 2)"

    def predicted(late):
        def change(results, r):
            m = results["measured"]
            m["pl"], m["smoothness"] = [0.1] * 4, [1.0] * 4
            for k in range(len(results["loss"]) - 1):
                gap = -0.5 if k < 2 else late
                for weak in (0.9, 0.975):
                    if (r["loss"] == "cross-entropy") == (weak == 0.975):
                        results["loss"][k + 1] = results["loss"][k] * weak * math.exp(gap)

        return change

    for figure in ("6.5", "6.14", "6.15"):
        assert verdict_of(altered(smoke, "training", predicted(0.0)), figure).startswith("holds (")
        worse = verdict_of(altered(smoke, "training", predicted(-0.6)), figure)
        assert not worse.startswith("holds (")

    def constant(results, r):
        for t in results["layers"].values():
            t["smallest"] = [1.0] * len(t["smallest"])
            t["bound_operator"] = [1.0, *[-1.0] * (len(t["smallest"]) - 1)]

    def small(results, r):
        m = results["measured"]
        m["gap_bound"] = [0.5 * v for v in m["largest_loss"]]
        for t in results["layers"].values():
            t["smallest"] = [0.5**i for i in range(len(t["smallest"]))]
            t["bound_operator"] = list(t["smallest"])

    text = altered(smoke, "training", constant)
    assert verdict_of(text, "6.22").count("holds (") == 2
    assert "improves: does not hold (0" in verdict_of(text, "6.20")
    text = altered(smoke, "training", small)
    assert verdict_of(text, "6.22").count("does not hold (0") == 2
    assert "vacuous throughout: does not hold (0" in verdict_of(text, "6.11")

    def rising(results, r):
        for t in results["layers"].values():
            count = len(t["smallest"])
            step = 0.2 if r["activation"] == "tanh" else 0.1
            t["smallest"] = [1 + step * i for i in range(count)]
            # One layer of all, in the middle of training, is above its start.
            t["log_condition"] = [1.0] * count
            t["log_condition"][1] += 0.01 if r["rate"] < 0.005 else 1.0
            t["log_condition"][-1] -= 0.5

    text = altered(smoke, "training", rising)
    assert "improves: holds (" in verdict_of(text, "6.20")
    assert "increases: holds (" in verdict_of(text, "6.7")
    assert "ends lower: holds (" in verdict_of(text, "6.7")
    variability = [line for line in text.splitlines() if "greater variability" in line]
    assert len(variability) >= 4
    assert all("**holds (" in line for line in variability if line.startswith("|"))

    def one_layer(results, r):
        rising(results, r)
        last = list(results["layers"].values())[-1]
        last["log_condition"] = [1.0] * len(last["log_condition"])

    assert "ends lower: holds in part" in verdict_of(altered(smoke, "training", one_layer), "6.7")

    def course(*heights):
        def change(results, r):
            for t in results["layers"].values():
                t["log_condition"] = np.interp(
                    np.linspace(0, 1, len(t["smallest"])), [0, 0.5, 1], heights
                ).tolist()

        return change

    for heights, verdicts_ in (
        ((3, 5, 2), ("holds", "holds", "holds")),
        ((3, 5, 4), ("holds", "holds", "does not hold")),
        ((3, 4, 5), ("holds", "does not hold", "does not hold")),
        ((3, 3.05, 2), ("does not hold", "holds", "holds")),
    ):
        said = verdict_of(altered(smoke, "edge", course(*heights)), "edge")
        for what, word in zip(("increases", "falls again", "ends lower"), verdicts_, strict=True):
            assert f"{what}: {word} (" in said

    def near(results, r):
        results["distance"] = 0.5 * results["radius"] * 8 / r["width"]
        results["smallest_after"] = results["smallest"]

    def far(results, r):
        results["distance"] = 3 * results["radius"] * r["width"] / 8
        results["smallest_after"] = 0.1 * results["smallest"]

    assert verdict_of(altered(smoke, "ball", near), "ball").count("holds (") == 3
    assert verdict_of(altered(smoke, "ball", far), "ball").count("does not hold (0") == 3

    def split(share):
        def change(results, r):
            for along in ("gradient", "random"):
                results["draws"][along]["residual"] = (
                    share * results["draws"][along]["gauss_newton"]
                )
            results["draws"]["targets"]["mean"] = share * results["draws"]["targets"]["deviation"]

        return change

    def second(text):
        return next(line for line in text.splitlines() if line.startswith("| 7.5 | On average"))

    assert second(altered(smoke, "perturbation", split(0.05))).count("holds (") == 3
    assert second(altered(smoke, "perturbation", split(2.0))).count("does not hold (0") == 3


@pytest.mark.long
def test_runs_that_did_not_learn_are_left_out(smoke):
    def unlearned(results, r):
        results["measured"]["accuracy"][-1] = 0.12

    text = altered(smoke, "training", unlearned)
    assert "| 6.5 | – | – | no record yet |" in text


@pytest.mark.parametrize(
    ("cases", "expected"),
    [
        ([True, True], "holds (2 of 2)"),
        ([True, False], "holds in part (1 of 2)"),
        ([True, False, False], "does not hold (1 of 3)"),
        ([], "not measured"),
    ],
)
def test_verdicts(cases, expected):
    assert verdicts.verdict(cases) == expected


def test_fits():
    u = np.array([1.0, 2.0, 4.0, 8.0])
    fit = verdicts.power_law(u, 3 * u**1.5)
    assert fit.exponent == pytest.approx(1.5)
    assert fit.r_squared == pytest.approx(1)
    linear = verdicts.power_law(u, 3 * u)
    assert linear.constant_at_one == pytest.approx(3)
    assert linear.spread_at_one == pytest.approx(0, abs=1e-12)


def test_a_line_that_is_no_record_is_named(tmp_path):
    (tmp_path / "records.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"records\.jsonl, line 1: not a record"):
        records.read(tmp_path / "records.jsonl")


@pytest.mark.long
def test_of_several_records_of_one_experiment_the_first_counts(smoke, tmp_path):
    path = tmp_path / "records.jsonl"
    second = {**smoke[0], "seconds": -1.0}
    path.write_text("".join(json.dumps(r) + "\n" for r in (smoke[0], smoke[1], second)))
    assert sorted(r["seconds"] for r in records.read(path)) == sorted(
        r["seconds"] for r in smoke[:2]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "thesis"], "--preset thesis: pass --data"),
        (["--preset", "smoke", "--jobs", "0"], "--jobs 0"),
    ],
)
def test_a_command_that_makes_no_sense(arguments, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        command.main([*arguments, "--results", str(tmp_path)])


# --- the committed results ------------------------------------------------------------------------

RESULTS = ROOT / "examples/pl_theory/results"
COMMITTED = [name for name in PRESETS if name != "smoke" and (RESULTS / name).exists()]


@pytest.mark.parametrize("name", COMMITTED)
def test_the_committed_claims_are_those_of_the_committed_records(name):
    found = records.read(RESULTS / name / "records.jsonl")
    made = {Experiment.of(record).key() for record in found}
    # A part of the plan, which the page counts.
    assert made <= {experiment.key() for experiment in PRESETS[name].experiments()}
    assert claims.markdown(found, name) == (RESULTS / name / "claims.md").read_text()
    assert claims.details(found) == (RESULTS / name / "figures.md").read_text()
