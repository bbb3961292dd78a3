"""`examples/pl_theory`: each experiment's numbers, killed runs, what is made of the records."""

import copy
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.launch import ROOT
from torch import nn
from torch.nn import functional as F

from adler.diagnostics.features import feature_grams
from examples.pl_theory import __main__ as command
from examples.pl_theory import claims, experiments, figures, inputs, records, training, verdicts
from examples.pl_theory.config import Experiment
from examples.pl_theory.networks import activation_of, features, fully_connected, mean_square
from examples.pl_theory.presets import FIGURES, PRESETS
from examples.shared.records import rounded

TRAINING = Experiment(
    "training", "digits", "tanh", False, 12, 2, (6,), "mse", 6, 3, 20
)  # fmt: skip


def eigenvalues(matrix):
    return torch.linalg.eigvalsh(matrix)


def jacobian(model, x):
    """Dense, ``(N C, parameters)``, one output and one backward pass at a time."""
    rows = []
    for output in model(x).flatten():
        gradients = torch.autograd.grad(output, list(model.parameters()), retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(rows)


# --- inputs and networks --------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", ["digits", "sphere"])
def test_inputs_have_unit_norm_and_fewer_are_the_first_of_more(dataset):
    more, fewer = (inputs.load(dataset, None, n, 5) for n in (40, 10))
    assert more.train_x.shape[0] == 40
    assert more.test_x.shape[0] == 5
    assert more.train_x.dtype == torch.float64
    torch.testing.assert_close(more.train_x.norm(dim=1), torch.ones(40, dtype=torch.float64))
    torch.testing.assert_close(more.train_x[:10], fewer.train_x)
    assert int(more.train_y.max()) < more.classes


@pytest.mark.parametrize(
    ("dataset", "n", "message"),
    [
        ("mnist", 5, "dataset='mnist'"),
        ("cifar10", 5, "pass --data"),
        ("digits", 10**6, "train_examples=1000000: digits has 1200"),
    ],
)
def test_data_that_is_not_there(dataset, n, message):
    with pytest.raises(ValueError, match=message):
        inputs.load(dataset, None, n)


@pytest.mark.parametrize(
    ("name", "renormalised"), [("relu", False), ("relu", True), ("tanh", False), ("sigmoid", True)]
)
def test_layer_by_layer_is_the_whole_network(name, renormalised):
    x = inputs.load("digits", None, 7).train_x
    activation = activation_of(name, renormalised)
    model = fully_connected(activation, (64, 30, 30, 30, 3), seed=5)
    whole = feature_grams(model, x, ["1", "3", "5"])
    norm = 30 * mean_square(activation)
    for f, G in zip(features(x, activation, 30, 3, seed=5), whole.values()):
        torch.testing.assert_close(f @ f.T, G / norm)


def test_layers_keep_the_scale():
    x = inputs.load("digits", None, 20).train_x
    for name in ("relu", "tanh", "sigmoid", "gelu"):
        for renormalised in (False, True):
            *_, f = features(x, activation_of(name, renormalised), 1000, 3, seed=0)
            # One layer's squared norm deviates by about √(5/width) at most: 7 %, and 12 % in 3.
            assert float(f.square().sum(1).mean()) == pytest.approx(1, abs=0.25)
    u = torch.randn(10**6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    renormalised = activation_of("sigmoid", True)(u)
    assert float(renormalised.mean()) == pytest.approx(0, abs=5e-3)  # five standard errors
    assert float(renormalised.square().mean()) == pytest.approx(1, abs=1e-2)


# --- the experiments at initialisation ------------------------------------------------------------


def test_initialisation_against_singular_values():
    experiment = Experiment("initialisation", "digits", "relu", False, 80, 3, (5, 9))
    found = experiments.run(experiment)["results"]["layers"]
    x = inputs.load("digits", None, 9).train_x
    f, generator = x.float(), torch.Generator().manual_seed(0)
    for layer in range(4):
        if layer:
            weight = torch.randn(80, f.shape[1], generator=generator)
            f = (f @ weight.T).relu() / (1 if layer == 1 else math.sqrt(40))
        for n in (5, 9):
            values = torch.linalg.svdvals(f[:n].double()) ** 2 / (40 if layer else 1)
            table = found[str(n)]
            # The order of rounding in float32 differs.
            assert table["largest"][layer] == pytest.approx(float(values[0]), rel=1e-4)
            assert table["smallest"][layer] == pytest.approx(float(values[-1]), rel=1e-3)
            condition = math.log(float(values[0] / values[-1]))
            assert table["log_condition"][layer] == pytest.approx(condition, abs=2e-3)


def test_infinite_width_against_the_arc_cosine_kernel():
    experiment = Experiment("infinite-width", "digits", "relu", False, 0, 2, (4, 8))
    found = experiments.run(experiment)["results"]["layers"]
    x = inputs.load("digits", None, 8).train_x
    G = x @ x.T
    for layer in range(3):
        for n in (4, 8):
            smallest = float(eigenvalues(G[:n, :n])[0])
            assert found[str(n)]["smallest"][layer] == pytest.approx(smallest, rel=1e-6)
            assert found[str(n)]["lower_bound"][layer] <= smallest * (1 + 1e-9)
        rho = G.clamp(-1, 1)
        G = ((1 - rho**2).sqrt() + rho * (math.pi - rho.arccos())) / math.pi


def test_wide_networks_approach_infinite_width():
    limit = experiments.run(Experiment("infinite-width", "digits", "relu", True, 0, 1, (6,)))
    line = limit["results"]["layers"]["6"]["smallest"][1]
    errors = []
    for width in (50, 20000):
        wide = experiments.run(Experiment("initialisation", "digits", "relu", True, width, 1, (6,)))
        errors.append(abs(wide["results"]["layers"]["6"]["smallest"][1] / line - 1))
    # Fluctuations fall like 1/√width, to a twentieth.
    assert errors[1] < 0.05 < errors[0]


def test_random_features_against_their_gram_matrix():
    experiment = Experiment("random-features", "sphere", width=60, examples=(4, 10), seed=3)
    found = experiments.run(experiment)["results"]["sizes"]
    x = inputs.load("sphere", None, 10, seed=3).train_x
    weight = fully_connected(nn.ReLU(), (x.shape[1], 60, 1), seed=3)[0].weight.detach()
    f = (x @ weight.T).relu()
    for n in (4, 10):
        values = eigenvalues(f[:n] @ f[:n].T)
        condition = math.sqrt(float(values[-1] / values[0]))
        assert found[str(n)]["condition"] == pytest.approx(condition, rel=1e-8)
    assert experiments.scaling_law(100, 400) == pytest.approx(20)
    assert experiments.scaling_law(400, 400) == math.inf


def test_tangent_kernel_against_the_dense_jacobian():
    experiment = Experiment("tangent-kernel", "digits", width=5, depth=2, examples=(4,), seed=1)
    found = experiments.run(experiment)["results"]
    x = inputs.load("digits", None, 4).train_x
    model = fully_connected(nn.ReLU(), (64, 32, 5, 1), seed=1)
    J = jacobian(model, x)
    assert found["first_width"] == 32
    assert found["smallest"] == pytest.approx(float(eigenvalues(J @ J.T)[0]), rel=1e-8)
    part = J[:, 64 * 32 : 64 * 32 + 32 * 5]
    assert found["parts"]["2"] == pytest.approx(float(eigenvalues(part @ part.T)[0]), rel=1e-8)


# --- training -------------------------------------------------------------------------------------


def losses_of(loss, outputs, y):
    if loss == "mse":
        return (outputs - F.one_hot(y, 10)).square().mean(1)
    return F.cross_entropy(outputs, y, reduction="none")


@pytest.mark.parametrize("loss", ["mse", "cross-entropy"])
def test_training_against_dense_matrices(loss):
    experiment = replace(TRAINING, loss=loss)
    found = experiments.run(experiment)["results"]
    steps, measured = found["steps"], found["measured"]
    data = inputs.load("digits", None, 6, 20)
    x, test_x = (8 * part for part in training._in_their_span(data.train_x, data.test_x))
    y, N, C = data.train_y, 6, 10
    model = fully_connected(nn.Tanh(), (x.shape[1], 12, 12, 10), seed=0, squared_norm=64)
    parameters = list(model.parameters())
    smallest, lipschitz, bounds = [], 0.0, []
    for t in range(7):
        outputs = model(x)
        each = losses_of(loss, outputs, y)
        h = float(each.detach().mean())
        g = torch.cat([p.flatten() for p in torch.autograd.grad(each.mean(), parameters)])
        assert steps["loss"][t] == pytest.approx(h, rel=1e-9)
        J = jacobian(model, x)
        K = J @ J.T
        if loss == "mse":
            Q = torch.eye(N * C, dtype=K.dtype) * 2 / C / N
        else:
            p = outputs.detach().softmax(1)
            Q = torch.block_diag(*(row.diag() - row.outer(row) for row in p)) / N
        L = float(eigenvalues(J.T @ Q @ J)[-1])
        if t in measured["step"]:
            at = measured["step"].index(t)
            smallest.append(float(eigenvalues(K)[0]))
            assert measured["kernel_smallest"][at] == pytest.approx(smallest[-1], rel=1e-6)
            assert measured["kernel_largest"][at] == pytest.approx(float(eigenvalues(K)[-1]))
            assert measured["ggn"][at] == pytest.approx(L, rel=1e-3)
            for one in losses_of(loss, model(x), y):
                gradient = torch.autograd.grad(one, parameters, retain_graph=True)
                norm = math.sqrt(float(sum(part.square().sum() for part in gradient)))
                lipschitz = max(lipschitz, norm)
            assert measured["lipschitz"][at] == pytest.approx(lipschitz, rel=1e-8)
            test = losses_of(loss, model(test_x), data.test_y).detach()
            assert measured["test_loss"][at] == pytest.approx(float(test.mean()))
            most = max(float(test.max()), float(each.detach().max()))
            least = min(steps["local_pl"][: t + 1]) if t < 6 else measured["least_pl"][at]
            beta = 2 * lipschitz * math.sqrt(2 * h / least) + 2 * lipschitz**2 / (least * (N - 1))
            bounds = h + math.sqrt((most**2 + 12 * most * N * beta) / (2 * N * 0.05))
            assert measured["generalisation_bound"][at] == pytest.approx(bounds, rel=1e-6)
        if t == 6:
            break
        assert steps["smoothness"][t] == pytest.approx(L, rel=1e-3)
        assert steps["local_pl"][t] == pytest.approx(float(g @ g) / (2 * h), rel=1e-8)
        rate, start = 1 / steps["smoothness"][t], 0
        with torch.no_grad():
            for p in parameters:
                p -= rate * g[start : start + p.numel()].view_as(p)
                start += p.numel()
        after = float(losses_of(loss, model(x), y).detach().mean())
        predicted = rate * float(g @ g) / 2
        assert steps["local_ratio"][t] == pytest.approx(predicted / (h - after), rel=1e-6)
        taken = 2 * (after - h + rate * float(g @ g)) / (rate**2 * float(g @ g))
        assert steps["measured_smoothness"][t] == pytest.approx(taken, rel=1e-6)
    # The kernel's bound takes the least of the measured eigenvalues, at every step.
    first = losses_of(loss, fully_connected(
        nn.Tanh(), (x.shape[1], 12, 12, 10), seed=0, squared_norm=64
    )(x), y).detach()  # fmt: skip
    weak = 2 / (N * C) if loss == "mse" else float(
        10 / 9 * (1 - (-first).exp()).square().sum() / N**2 / (2 * first.mean())
    )  # fmt: skip
    assert steps["kernel_pl"][0] == pytest.approx(min(smallest) * weak, rel=1e-6)
    factors = [1 - mu / L for mu, L in zip(steps["local_pl"], steps["smoothness"])]
    assert steps["local_bound"] == pytest.approx(steps["loss"][0] * np.cumprod([1, *factors]))


def test_the_features_in_training():
    found = experiments.run(replace(TRAINING, renormalised=True, activation="relu"))["results"]
    assert list(found["grams"]) == ["1", "2"]
    data = inputs.load("digits", None, 6, 20)
    x, _ = training._in_their_span(data.train_x, data.test_x)
    *_, f = features(x, activation_of("relu", True), 12, 2, seed=0)
    second = found["grams"]["2"]
    assert second["smallest"][0] == pytest.approx(float(eigenvalues(f @ f.T)[0]), rel=1e-8)
    assert second["weyl_lower"][0] == pytest.approx(second["smallest"][0])
    for lower, smallest, upper in zip(
        second["weyl_lower"], second["smallest"], second["weyl_upper"]
    ):
        assert lower - 1e-9 <= smallest <= upper + 1e-9


def test_largest_eigenpair_where_another_has_overtaken():
    A = torch.diag(torch.tensor([1.0, 2.0, 2.9, 3.0, 0.5], dtype=torch.float64))
    start = torch.tensor([1e-3, 1e-3, 1.0, 1e-3, 1e-3], dtype=torch.float64)  # of the 2.9
    value, vector = training.largest_eigenpair(lambda v: A @ v, start, 6)
    assert value == pytest.approx(3)
    torch.testing.assert_close(vector.abs(), torch.eye(5, dtype=torch.float64)[3])


def test_coordinates_in_the_span_keep_all_inner_products():
    generator = torch.Generator().manual_seed(0)
    x, test_x = (torch.randn(n, 50, generator=generator, dtype=torch.float64) for n in (4, 6))
    a, b = training._in_their_span(x, test_x)
    assert a.shape == (4, 10)
    torch.testing.assert_close(a @ b.T, x @ test_x.T)
    torch.testing.assert_close(b @ b.T, test_x @ test_x.T)


@pytest.mark.parametrize(
    ("steps", "count", "expected"),
    [(100, 5, [0, 6, 25, 56, 100]), (3, 9, [0, 1, 2, 3]), (7, 1, [0, 7])],
)
def test_measured_steps(steps, count, expected):
    assert training.measured_steps(steps, count) == expected


# --- what an experiment and a preset are ----------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "train"}, "kind='train'"),
        ({"activation": "step"}, "activation='step'"),
        ({"loss": "hinge"}, "loss='hinge'"),
        ({"width": 0}, "width=0"),
        ({"steps": 0}, "steps=0"),
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


def test_the_laptop_is_at_the_scale_of_the_thesis_at_initialisation():
    laptop = PRESETS["laptop"]
    assert laptop.depth == 30
    assert (min(laptop.widths), max(laptop.widths)) == (1000, 5000)
    assert (min(laptop.examples), max(laptop.examples)) == (100, 1000)


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
    chosen = ["6.10"]
    arguments = [sys.executable, "-m", "examples.pl_theory", "--preset", "smoke", "--device", "cpu"]
    arguments += ["--results", str(tmp_path), "--figures", *chosen]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        arguments, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        while len(lines(path)) < 8:
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
    assert {p.name for p in tmp_path.iterdir()} == {"records.jsonl", "claims.md", *drawn}
    assert (tmp_path / "claims.md").read_text() == claims.markdown(found, "smoke")
    assert "6.9–6.10" in done.stdout


def test_figures_are_functions_of_the_records(smoke, tmp_path):
    before = copy.deepcopy(smoke)
    made = [
        figures.draw(found, tmp_path / name, ["6.9"])
        for name, found in (("a", smoke), ("b", random.Random(0).sample(smoke, len(smoke))))
    ]
    assert smoke == before
    for first, second in zip(*made):
        assert first.stat().st_size > 10_000
        if first.suffix == ".svg":
            assert first.read_bytes() == second.read_bytes()


def test_every_figure_has_labels_and_a_legend(smoke):
    assert figures._FIGURES.keys() == FIGURES.keys()
    for name, make in figures._FIGURES.items():
        figure = make(smoke)
        assert figure.legends, name
        assert figure.axes[0].get_ylabel(), name
        assert figure.axes[-1].get_xlabel(), name
        assert all(axis.lines for axis in figure.axes if "as above" not in axis.get_title()), name
        assert make([]) is None


def test_claims_are_a_function_of_the_records(smoke):
    before = copy.deepcopy(smoke)
    text = claims.markdown(smoke, "smoke")
    assert claims.markdown(random.Random(0).sample(smoke, len(smoke)), "smoke") == text
    assert smoke == before
    # All the figures of the presets are shown.
    for name in FIGURES:
        assert f"(figure-{name.replace('.', '-')}.png)" in text
    assert "nan" not in text


def verdict_of(text, title):
    """The verdict in the summary's row that begins with a title and holds a word."""
    (row,) = (line for line in text.splitlines() if line.startswith("|") and title in line)
    return row.split("**")[1]


def altered(smoke, kind, change):
    found = copy.deepcopy(smoke)
    for r in found:
        if r["kind"] == kind:
            change(r["results"])
    return claims.markdown(found, "smoke")


def test_verdicts_follow_the_records(smoke):
    """Each verdict changes when the numbers that it speaks of do."""
    text = claims.markdown(smoke, "smoke")
    bound, ratio = "mean squared error stays below", "smoothness of the mean squared error"
    rule, limit = "lower bound at infinite width", "approach the infinite-width line"
    law, kernel = "N random features", "3-layer ReLU"
    for title in (bound, ratio, rule):
        assert verdict_of(text, title).startswith("holds (")

    def raise_last_loss(results):
        results["steps"]["loss"][-1] = 1.01 * results["steps"]["local_bound"][-1]

    def raise_ratio(results):
        results["steps"]["local_ratio"][1] = 1.001

    def raise_bound(results):
        for layers in results["layers"].values():
            layers["lower_bound"][1] = 1.01 * layers["smallest"][1]

    def obey_the_law(results):
        for entry in results["sizes"].values():
            entry["condition"] = 3 * entry["law"]

    def grow_linearly(results):
        results["smallest"] = 0.5 * results["first_width"]

    def generalise(results):
        results["measured"]["generalisation_bound"] = [
            0.9 * most for most in results["measured"]["largest_loss"]
        ]

    def shift(results):
        for layers in results["layers"].values():
            layers["smallest"] = [10 * v for v in layers["smallest"]]
            layers["largest"] = [10 * v for v in layers["largest"]]

    assert "does not hold (0 of 4)" in altered(smoke, "training", raise_last_loss)
    assert (
        verdict_of(altered(smoke, "training", raise_last_loss), bound) == "does not hold (0 of 4)"
    )
    assert verdict_of(altered(smoke, "training", raise_ratio), ratio) == "does not hold (0 of 4)"
    changed = verdict_of(altered(smoke, "infinite-width", raise_bound), rule)
    assert changed == "does not hold (0 of 6)"
    changed = verdict_of(altered(smoke, "infinite-width", shift), limit)
    assert changed != verdict_of(text, limit)
    assert verdict_of(altered(smoke, "random-features", obey_the_law), law) == "holds (2 of 2)"
    assert verdict_of(altered(smoke, "tangent-kernel", grow_linearly), kernel) == "holds (2 of 2)"
    stability = "stability bound (in the role of Lemma 3) of the mean squared error"
    assert verdict_of(text, stability).startswith("vacuous;")
    assert verdict_of(altered(smoke, "training", generalise), stability).startswith(
        "vacuous in 0 of 12 cases"
    )


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


def test_fits_and_rank_correlation():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=30), rng.integers(0, 5, size=30).astype(float)
    expected = stats.spearmanr(x, y).statistic
    assert verdicts.rank_correlation(x, y) == pytest.approx(expected)
    assert math.isnan(verdicts.rank_correlation(x, np.ones(30)))
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
        (["--preset", "laptop"], "--preset laptop: pass --data"),
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
    assert made == {experiment.key() for experiment in PRESETS[name].experiments()}
    assert claims.markdown(found, name) == (RESULTS / name / "claims.md").read_text()
