"""`examples/pl_theory`: what is measured in training and around networks, against matrices."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.reference import jacobian_of
from torch import nn
from torch.nn import functional as F

from examples.pl_theory import experiments, inputs, training
from examples.pl_theory import figures_training as trained
from examples.pl_theory.config import Experiment
from examples.pl_theory.networks import activation_of, fully_connected
from examples.pl_theory.spectrum import largest_eigenpair

TRAINING = Experiment(
    "training", "digits", "tanh", width=12, depth=3, examples=(6,), loss="mse", rate=0.05, epochs=6,
    measurements=3, test_examples=20,
)  # fmt: skip


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
            J = jacobian_of(nn.Sequential(model, head), x)
            Q = torch.eye(N * 10, dtype=J.dtype) * 2 / (10 * N)
            if loss == "cross-entropy":
                p = logits.detach().softmax(1)
                Q = torch.block_diag(*(row.diag() - row.outer(row) for row in p)) / N
            L = float(torch.linalg.eigvalsh(J.T @ Q @ J)[-1])
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
        table, low = layers[str(i + 1)], float(torch.linalg.eigvalsh(G0)[0])
        away = float((W - W0).norm())
        change = slope * (change * (norm(W0) + away) + norm(entering) * away)
        expected = {
            "smallest": float(torch.linalg.eigvalsh(G)[0]),
            "largest": float(torch.linalg.eigvalsh(G)[-1]),
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
        return torch.linalg.eigvalsh(J @ J.T)

    before = kernel(start)
    bends = []
    for i in range(3):
        dense = torch.autograd.functional.hessian(lambda t: outputs(t)[i], start)  # noqa: B023
        bends.append(float(torch.linalg.eigvalsh(dense).abs().max()))
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
