"""`examples/pl_theory`: each experiment's numbers, killed runs, what is made of the records."""

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
import torch
from support.figures import assert_same_figures
from support.launch import ROOT
from torch import nn
from torch.nn import functional as F

from adler.diagnostics.features import feature_grams
from examples.pl_theory import __main__ as command
from examples.pl_theory import claims, experiments, figures, inputs, records, training, verdicts
from examples.pl_theory import figures_training as trained
from examples.pl_theory.config import Experiment
from examples.pl_theory.networks import Renormalise, activation_of, features, fully_connected
from examples.pl_theory.presets import FIGURES, PRESETS
from examples.pl_theory.spectrum import largest_eigenpair
from examples.shared.records import rounded

TRAINING = Experiment(
    "training", "digits", "tanh", width=12, depth=3, examples=(6,), loss="mse", rate=0.05, epochs=6,
    measurements=3, test_examples=20,
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


@pytest.mark.parametrize(("dataset", "dimension"), [("digits", 0), ("sphere", 30)])
def test_inputs_have_the_norm_of_their_dimension_and_fewer_are_the_first_of_more(
    dataset, dimension
):
    more, fewer = (inputs.load(dataset, None, n, 5, 1, dimension) for n in (40, 10))
    assert more.train_x.shape[0] == 40
    assert more.test_x.shape[0] == 5
    assert more.train_x.dtype == torch.float64
    d = more.train_x.shape[1]
    norms = more.train_x.norm(dim=1)
    torch.testing.assert_close(norms, torch.full((40,), d**0.5, dtype=torch.float64))
    torch.testing.assert_close(more.train_x[:10], fewer.train_x)
    assert int(more.train_y.max()) < more.classes
    other = inputs.load(dataset, None, 10, 5, 2, dimension)  # a random subset, by the seed
    assert not torch.allclose(other.train_x, fewer.train_x)


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


@pytest.mark.parametrize("name", ["relu", "tanh"])
def test_layer_by_layer_is_the_whole_network(name):
    x = inputs.load("digits", None, 7).train_x
    activation = activation_of(name)
    model = fully_connected(activation, (64, 30, 30, 30, 3), seed=5, dtype=torch.float64)
    whole = feature_grams(model, x, ["1", "3", "5"])
    # Weights are drawn as normal(0, 1/√d) there, as normal(0, 1)/√d here.
    for f, G in zip(features(x, activation, False, 30, 3, seed=5), whole.values()):
        torch.testing.assert_close(f @ f.T, G)


def test_renormalised_examples_have_the_norm_of_the_width_after_every_layer():
    x = inputs.load("digits", None, 20).train_x
    plain, renormalised = (
        list(features(x, activation_of("relu"), flag, 50, 3, seed=0)) for flag in (False, True)
    )
    for f in renormalised:
        norms = f.norm(dim=1)
        torch.testing.assert_close(norms, torch.full((20,), 50**0.5, dtype=torch.float64))
    first = plain[0] * (50**0.5 / plain[0].norm(dim=1, keepdim=True))
    torch.testing.assert_close(renormalised[0], first)
    assert float((plain[0].norm(dim=1) / 50**0.5 - 1).abs().max()) > 0.02
    zero = Renormalise()(torch.zeros(2, 3))
    assert bool((zero == 0).all())


def test_layers_keep_the_scale_and_activations_are_normalised():
    x = inputs.load("digits", None, 20).train_x
    u = torch.randn(10**6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for name in ("relu", "tanh"):
        *_, f = features(x, activation_of(name), False, 1000, 3, seed=0)
        assert float(f.square().mean()) == pytest.approx(1, abs=0.25)
        normalised = activation_of(name)(u)
        assert float(normalised.mean()) == pytest.approx(0, abs=5e-3)  # five standard errors
        assert float(normalised.square().mean()) == pytest.approx(1, abs=1e-2)


# --- the experiments at initialisation ------------------------------------------------------------


@pytest.mark.parametrize("renormalised", [False, True])
def test_initialisation_against_singular_values(renormalised):
    experiment = Experiment("initialisation", "digits", "relu", renormalised, 80, 3, (5, 9))
    found = experiments.run(experiment)["results"]["layers"]
    f, generator = inputs.load("digits", None, 9).train_x, torch.Generator().manual_seed(0)
    mean, scale = 1 / math.sqrt(2 * math.pi), math.sqrt(1 / 2 - 1 / (2 * math.pi))
    for layer in range(4):
        if layer:
            weight = torch.randn(80, f.shape[1], generator=generator).double()
            f = ((f @ weight.T / math.sqrt(f.shape[1])).relu() - mean) / scale
            if renormalised:
                f = math.sqrt(80) * f / f.norm(dim=1, keepdim=True)
        for n in (5, 9):
            values = torch.linalg.svdvals(f[:n]) ** 2 / f.shape[1]
            table = found[str(n)]
            # There in float32.
            assert table["largest"][layer] == pytest.approx(float(values[0]), rel=1e-4)
            assert table["smallest"][layer] == pytest.approx(float(values[-1]), rel=1e-3)
            condition = math.log(float(values[0] / values[-1]))
            assert table["log_condition"][layer] == pytest.approx(condition, abs=2e-3)


def test_infinite_width_against_the_arc_cosine_kernel():
    experiment = Experiment("infinite-width", "digits", "relu", False, 0, 2, (4, 8))
    found = experiments.run(experiment)["results"]["layers"]
    x = inputs.load("digits", None, 8).train_x
    G = x @ x.T / 64
    for layer in range(3):
        for n in (4, 8):
            smallest = float(eigenvalues(G[:n, :n])[0])
            table = found[str(n)]
            assert table["smallest"][layer] == pytest.approx(smallest, rel=1e-6)
            assert table["lemma_24"][layer] <= table["combined"][layer] + 1e-12
            assert table["combined"][layer] <= smallest * (1 + 1e-9)
        rho = G.clamp(-1, 1)
        plain = ((1 - rho**2).sqrt() + rho * (math.pi - rho.arccos())) / (2 * math.pi)
        G = (plain - 1 / (2 * math.pi)) / (1 / 2 - 1 / (2 * math.pi))


def test_wide_networks_approach_infinite_width():
    limit = experiments.run(Experiment("infinite-width", "digits", "relu", False, 0, 1, (6,)))
    line = limit["results"]["layers"]["6"]["smallest"][1]
    errors = []
    for width in (50, 20000):
        wide = experiments.run(
            Experiment("initialisation", "digits", "relu", False, width, 1, (6,))
        )
        errors.append(abs(wide["results"]["layers"]["6"]["smallest"][1] / line - 1))
    # Fluctuations fall like 1/√width, to a twentieth.
    assert errors[1] < 0.05 < errors[0]


def test_tangent_kernel_against_the_dense_jacobian():
    experiment = Experiment(
        "tangent-kernel", "sphere", width=5, depth=3, examples=(4,), dimension=7, seed=1
    )
    found = experiments.run(experiment)["results"]
    x = inputs.load("sphere", None, 4, seed=1, dimension=7).train_x
    model = fully_connected(nn.ReLU(), (7, 32, 5, 1), seed=1, dtype=torch.float64)
    for weight in model.parameters():  # variance 2 over the width of what enters
        weight.data *= math.sqrt(2)
    J = jacobian(model, x)
    assert found["smallest"] == pytest.approx(float(eigenvalues(J @ J.T)[0]), rel=1e-8)
    part = J[:, 7 * 32 : 7 * 32 + 32 * 5]
    assert found["parts"]["2"] == pytest.approx(float(eigenvalues(part @ part.T)[0]), rel=1e-8)


# --- training -------------------------------------------------------------------------------------


def losses_of(loss, logits, y):
    if loss == "cross-entropy":
        return F.cross_entropy(logits, y, reduction="none")
    outputs = logits.softmax(1) if loss == "mse-softmax" else logits
    return (outputs - F.one_hot(y, 10)).square().mean(1)


@pytest.mark.parametrize("loss", ["mse", "mse-softmax", "cross-entropy"])
def test_training_against_dense_matrices(loss):
    experiment = replace(TRAINING, loss=loss)
    found = experiments.run(experiment)["results"]
    measured, layers = found["measured"], found["layers"]
    data = inputs.load("digits", None, 6, 20)
    x, test_x = training._in_their_span(data.train_x, data.test_x)
    y, N, close = data.train_y, 6, {"rel": 2e-3, "abs": 1e-6}  # there in float32
    model = fully_connected(activation_of("tanh"), (x.shape[1], 12, 12, 10), 0, squared_norm=64)
    model.double()
    start = [p.detach().clone() for p in model.parameters()]
    parameters, lipschitz, most, least, at = list(model.parameters()), 0.0, 0.0, math.inf, 0
    for epoch in range(8):
        logits = model(x)
        each = losses_of(loss, logits, y)
        h = float(each.detach().mean())
        g = torch.cat([p.flatten() for p in torch.autograd.grad(each.mean(), parameters)])
        assert found["loss"][epoch] == pytest.approx(h, **close)
        if epoch in measured["epoch"]:
            assert measured["epoch"][at] == epoch
            head = nn.Softmax(1) if loss == "mse-softmax" else nn.Identity()
            J = jacobian(nn.Sequential(model, head), x)
            Q = torch.eye(N * 10, dtype=J.dtype) * 2 / (10 * N)
            if loss == "cross-entropy":
                p = logits.detach().softmax(1)
                Q = torch.block_diag(*(row.diag() - row.outer(row) for row in p)) / N
            L = float(eigenvalues(J.T @ Q @ J)[-1])
            squares = []
            for one in losses_of(loss, model(x), y):
                gradient = torch.autograd.grad(one, parameters, retain_graph=True)
                squares.append(float(sum(part.square().sum() for part in gradient)))
            test = losses_of(loss, model(test_x), data.test_y).detach()
            lipschitz = max(lipschitz, math.sqrt(max(squares)))
            most = max(most, float(each.detach().max()), float(test.max()))
            least = min(least, float(g @ g) / (2 * h))
            M = 0.2 if loss == "mse-softmax" else most
            beta = 2 * lipschitz * math.sqrt(2 * h / least) + 2 * lipschitz**2 / (least * (N - 1))
            expected = {
                "pl": float(g @ g) / (2 * h),
                "mean_pl": sum(squares) / (2 * N * h),
                "test_loss": float(test.mean()),
                "accuracy": float((logits.argmax(1) == y).double().mean()),
                "lipschitz": lipschitz,
                "gap_bound": math.sqrt((M**2 + 12 * M * N * beta) / (2 * N * 0.05)),
            }
            # Four products from the last eigenvector: within a percent, and never above.
            assert 0.99 * L <= measured["smoothness"][at] <= L * (1 + 1e-4)
            for name, value in expected.items():
                assert measured[name][at] == pytest.approx(value, **close), name
            check_layers(layers, at, model, start, x)
            at += 1
        position = 0
        with torch.no_grad():
            for p in parameters:
                p -= experiment.rate * g[position : position + p.numel()].view_as(p)
                position += p.numel()
    assert at == 3
    assert not found["diverged"]
    check_ratios({"results": found, "rate": experiment.rate})


def check_layers(layers, at, model, start, x):
    """Gram matrices and bounds of (4.11), dense."""
    first = fully_connected(activation_of("tanh"), (x.shape[1], 12, 12, 10), 0, squared_norm=64)
    for p, s in zip(first.double().parameters(), start):
        p.data.copy_(s)
    f, f0 = x, x
    slope = 1 / activation_of("tanh").scale
    change = 0.0
    for i, m in enumerate((0, 2)):
        W, W0 = model[m].weight.detach(), first[m].weight.detach()
        entering = f0
        f, f0 = (a[m + 1](a[m](b)).detach() for a, b in ((model, f), (first, f0)))
        G, G0 = f @ f.T, f0 @ f0.T
        table, low = layers[str(i + 1)], float(eigenvalues(G0)[0])
        away = float((W - W0).norm())
        change = slope * (change * (norm(W0) + away) + norm(entering) * away)
        expected = {
            "smallest": float(eigenvalues(G)[0]),
            "largest": float(eigenvalues(G)[-1]),
            "bound_operator": low - norm(G - G0),
            "bound_frobenius": low - float((G - G0).norm()),
            "bound_composed": low - 2 * norm(f0) * change - change**2,
        }
        for name, value in expected.items():
            assert table[name][at] == pytest.approx(value, rel=5e-3, abs=1e-3), name
        assert table["bound_composed"][at] <= table["bound_operator"][at] + 1e-3
        assert table["bound_operator"][at] <= table["smallest"][at] + 1e-3


def norm(matrix):
    return float(torch.linalg.matrix_norm(matrix, ord=2))


def check_ratios(record):
    m, h = record["results"]["measured"], record["results"]["loss"]
    rate = record["rate"]
    for i, k in enumerate(m["epoch"]):
        factor = 1 - m["pl"][i] / m["smoothness"][i]
        expected = math.log(h[k + 1] / (factor * h[k]))
        assert trained.loss_ratio(record, weak=False)[i] == pytest.approx(expected, abs=1e-6)
        # With G the gradient's norm: G² = 2 μ h.
        weak = 1 - m["squared_norm"][i] / (8 * m["smoothness"][i] * m["loss"][i])
        expected = math.log(h[k + 1] / (weak * h[k]))
        assert trained.loss_ratio(record, weak=True)[i] == pytest.approx(expected, abs=1e-5)
        expected = math.log(h[k] * m["pl"][i] / m["smoothness"][i] / (h[k] - h[k + 1]))
        assert trained.decrease_ratio(record)[i] == pytest.approx(expected, abs=1e-6)
        bend = 2 * (1 - (h[k] - h[k + 1]) / (rate * m["squared_norm"][i])) / rate
        assert trained.step_curvature(record)[i] == pytest.approx(bend / m["smoothness"][i])
        own = 2 * rate * (1 - m["smoothness"][i] * rate / 2)
        expected = math.log(h[k] * m["pl"][i] * own / (h[k] - h[k + 1]))
        assert trained.decrease_ratio(record, own=True)[i] == pytest.approx(expected, abs=1e-6)


# --- what surrounds networks ----------------------------------------------------------------------

SURROUNDINGS = Experiment(
    "perturbation", "digits", "tanh", width=5, depth=3, examples=(3,), loss="mse", rate=0.05,
    epochs=2, measurements=2, seed=1,
)  # fmt: skip


def second_derivative(model, x, y, loss, direction):
    """Along a direction: that of the loss, and its first term, by differences in float64."""
    start = [p.detach().clone() for p in model.parameters()]

    def at(t):
        with torch.no_grad():
            for p, s, d in zip(model.parameters(), start, direction):
                p.copy_(s + t * d)
            return model(x)

    step = 1e-4
    ahead, here, behind = (at(t) for t in (step, 0.0, -step))
    values = [float(losses_of(loss, out, y).mean()) for out in (ahead, here, behind)]
    total = (values[0] - 2 * values[1] + values[2]) / step**2
    at(0.0)
    v = (ahead - behind) / (2 * step)
    if loss == "mse":
        return total, float(2 * v.square().mean())
    p = here.softmax(1)
    return total, float(((p * v**2).sum(1) - (p * v).sum(1) ** 2).mean())


def bend_of_targets(model, x, y, loss, direction):
    """The part of the second term that holds the one-hot targets, by differences in float64."""
    start = [p.detach().clone() for p in model.parameters()]
    values = []
    for t in (1e-3, 0.0, -1e-3):
        with torch.no_grad():
            for p, s, d in zip(model.parameters(), start, direction):
                p.copy_(s + t * d)
            values.append(float(model(x)[torch.arange(len(y)), y].sum()))
    for p, s in zip(model.parameters(), start):
        p.data.copy_(s)
    constant = 2 / (10 * len(y)) if loss == "mse" else 1 / len(y)
    return -constant * (values[0] - 2 * values[1] + values[2]) / 1e-6


@pytest.mark.parametrize("loss", ["mse", "cross-entropy"])
def test_the_second_term_against_differences(loss):
    experiment = replace(SURROUNDINGS, loss=loss)
    found = experiments.run(experiment)["results"]
    data = inputs.load("digits", None, 3, seed=1)
    x, y = data.train_x, data.train_y
    model = fully_connected(activation_of("tanh"), (64, 5, 5, 10), seed=1, dtype=torch.float64)
    parameters = list(model.parameters())
    generator = torch.Generator().manual_seed(1)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    first, terms, of_gradient, of_targets = parameters[-1].detach().clone(), [], [], []
    for _ in range(40):
        with torch.no_grad():
            parameters[-1].normal_(0, 5**-0.5, generator=generator)
        total, kept = second_derivative(model, x, y, loss, direction)
        terms.append((kept, total - kept))
        gradient = torch.autograd.grad(losses_of(loss, model(x), y).mean(), parameters)
        total, kept = second_derivative(model, x, y, loss, gradient)
        of_gradient.append((kept, total - kept))
        inner = [*direction[:-1], torch.zeros_like(direction[-1])]
        of_targets.append(bend_of_targets(model, x, y, loss, inner))
    parameters[-1].data.copy_(first)
    for name, pairs in (("random", terms), ("gradient", of_gradient)):
        kept, rest = np.array(pairs).T
        draws = found["draws"][name]
        assert draws["gauss_newton"] == pytest.approx(kept.mean(), rel=1e-4)
        assert draws["residual"] == pytest.approx(rest.mean(), rel=1e-3, abs=1e-4 * kept.mean())
        assert draws["residual_deviation"] == pytest.approx(rest.std(ddof=1), rel=1e-3)
        assert draws["residual_modulus"] == pytest.approx(np.abs(rest).mean(), rel=1e-3)
    targets, part = found["draws"]["targets"], np.array(of_targets)
    deviation = part.std(ddof=1)
    assert targets["mean"] == pytest.approx(part.mean(), abs=1e-3 * deviation)
    assert targets["deviation"] == pytest.approx(deviation, rel=1e-3)


def test_the_ball_against_dense_matrices():
    experiment = Experiment("ball", "digits", "tanh", width=4, depth=3, examples=(3,), seed=2)
    found = experiments.run(experiment)["results"]
    data = inputs.load("digits", None, 3, seed=2)
    x, y = data.train_x, torch.where(data.train_y >= 5, 1.0, -1.0).double()
    model = fully_connected(activation_of("tanh"), (64, 4, 4, 1), seed=2, dtype=torch.float64)
    shapes = [p.shape for p in model.parameters()]
    start = torch.cat([p.detach().flatten() for p in model.parameters()])

    def outputs(theta):
        W, V, u = (t.view(s) for t, s in zip(theta.split([s.numel() for s in shapes]), shapes))
        return (model[3](model[1](x @ W.T) @ V.T) @ u.T).flatten()

    def kernel(theta):
        J = torch.autograd.functional.jacobian(outputs, theta)
        return eigenvalues(J @ J.T)

    before = kernel(start)
    bends = []
    for i in range(3):
        dense = torch.autograd.functional.hessian(lambda t: outputs(t)[i], start)  # noqa: B023
        bends.append(float(eigenvalues(dense).abs().max()))
    theta, steps = start.clone(), 0
    losses = [0.5 * float((outputs(theta) - y).square().sum())]
    while losses[-1] > losses[0] / 1000:
        J = torch.autograd.functional.jacobian(outputs, theta)
        theta = theta - J.T @ (outputs(theta) - y) / before[-1]
        losses.append(0.5 * float((outputs(theta) - y).square().sum()))
        steps += 1
    assert steps > 3
    expected = {
        "smallest": float(before[0]),
        "largest": float(before[-1]),
        "smallest_after": float(kernel(theta)[0]),
        "distance": float((theta - start).norm()),
        "loss_left": losses[-1] / losses[0],
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-6), name
    assert found["hessian_norm"] == pytest.approx(max(bends), rel=1e-2)
    radius = float(before[0]) / 2 / (2 * math.sqrt(float(before[-1]) * 3) * max(bends))
    assert found["radius"] == pytest.approx(radius, rel=1e-2)


@pytest.mark.parametrize("units", [5, 50])
def test_a_network_in_the_mean_field_scaling_is_the_mean_of_its_units(units):
    experiment = replace(
        SURROUNDINGS, kind="mean-field", depth=2, width=units, measurements=0, epochs=3
    )
    found = experiments.run(experiment)["results"]
    data = inputs.load("digits", None, 3, seed=1)
    x, y = data.train_x, F.one_hot(data.train_y, 10).double()
    model = fully_connected(activation_of("tanh"), (64, units, 10), 1, dtype=torch.float64)
    w = model[0].weight.detach().clone().requires_grad_()
    a = (model[2].weight.detach() * units**0.5).requires_grad_()  # of unit variance

    def loss(some=slice(None)):
        return ((model[1](x @ w[some].T) @ a[:, some].T / len(w[some])) - y).square().mean()

    for _ in range(3):
        of_w, of_a = torch.autograd.grad(loss(), (w, a))
        with torch.no_grad():
            w -= 0.05 * units / 64 * of_w
            a -= 0.05 * units * of_a
    assert found["loss"] == pytest.approx(float(loss().detach()), rel=1e-6)
    half = slice(max(1, round(units / 2)))
    change = abs(float(loss(half).detach()) - float(loss().detach()))
    assert found["change"] == pytest.approx(change, rel=1e-6)


def test_the_line_between_two_trained_networks():
    experiment = replace(SURROUNDINGS, kind="connectivity", measurements=0, epochs=3)
    found = experiments.run(experiment)["results"]
    data = inputs.load("digits", None, 3, seed=1)
    x, y, trained_twice = data.train_x, data.train_y, []
    for seed in (1, 1001):
        model = fully_connected(activation_of("tanh"), (64, 5, 5, 10), seed, dtype=torch.float64)
        for _ in range(3):
            loss = losses_of("mse", model(x), y).mean()
            parameters = list(model.parameters())
            for p, g in zip(parameters, torch.autograd.grad(loss, parameters)):
                p.data -= 0.05 * g
        trained_twice.append(model)
    one, other = trained_twice
    assert found["loss"] == pytest.approx(
        float(losses_of("mse", one(x), y).mean().detach()), rel=1e-6
    )
    assert found["other_loss"] == pytest.approx(
        float(losses_of("mse", other(x), y).mean().detach())
    )
    assert found["path"][0] == pytest.approx(found["loss"])
    assert found["path"][-1] == pytest.approx(found["other_loss"], rel=1e-5)
    with torch.no_grad():
        for p, q in zip(one.parameters(), other.parameters()):
            p.copy_((p + q) / 2)
    middle = float(losses_of("mse", one(x), y).mean().detach())
    assert found["path"][10] == pytest.approx(middle, rel=1e-6)
    worst = max(found["path"]) - max(found["path"][0], found["path"][-1])
    assert found["barrier"] == pytest.approx(worst, abs=1e-6)


# --- helpers of the training ----------------------------------------------------------------------


def test_largest_eigenpair_where_another_has_overtaken():
    A = torch.diag(torch.tensor([1.0, 2.0, 2.9, 3.0, 0.5], dtype=torch.float64))
    start = torch.tensor([1e-3, 1e-3, 1.0, 1e-3, 1e-3], dtype=torch.float64)  # of the 2.9
    value, vector = largest_eigenpair(lambda v: A @ v, start, 5)
    assert value == pytest.approx(3)
    torch.testing.assert_close(vector.abs(), torch.eye(5, dtype=torch.float64)[3])
    value, _ = largest_eigenpair(lambda v: 2 * v, start, 5)  # the first vector spans it all
    assert value == pytest.approx(2)


def test_coordinates_in_the_span_keep_all_inner_products():
    generator = torch.Generator().manual_seed(0)
    x, test_x = (torch.randn(n, 50, generator=generator, dtype=torch.float64) for n in (4, 6))
    a, b = training._in_their_span(x, test_x)
    assert a.shape == (4, 10)
    torch.testing.assert_close(a @ b.T, x @ test_x.T)
    torch.testing.assert_close(b @ b.T, test_x @ test_x.T)


@pytest.mark.parametrize(
    ("epochs", "count", "expected"),
    [(100, 5, [0, 6, 25, 56, 100]), (3, 9, [0, 1, 2, 3]), (7, 1, [0, 7])],
)
def test_measured_epochs(epochs, count, expected):
    assert training.measured_epochs(epochs, count) == expected


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
