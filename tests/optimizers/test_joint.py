"""Rate and momentum at once: the minimiser over the plane of the gradient and the last step."""

import math

import pytest
import torch
from adler._optimizers.joint import Plane, plane_minimiser
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import batches, draw, flat, network
from support.loops import train
from support.reference import Dense
from torch import nn

from adler import Adler, GaussNewton

settings.register_profile("joint", deadline=None, max_examples=50, derandomize=True)
examples = settings(settings.get_profile("joint"))
seeds = st.integers(0, 10**6)
EXACT = {"beta": 0.0, "eps": 0.0, "trust_region": None, "momentum": "joint"}


def plane_of(g, delta, G):
    return Plane(g @ g, g @ delta, g @ G @ g, g @ G @ delta, delta @ G @ delta)


@examples
@given(seeds, st.integers(2, 6), st.floats(-3, 3).map(lambda exponent: 10**exponent))
def test_the_minimiser_is_that_of_a_dense_solve(seed, size, length):
    factor = draw(size, size, seed=seed)
    G = factor @ factor.T + 0.1 * torch.eye(size).double()
    g, delta = draw(size, seed=seed + 1), length * draw(size, seed=seed + 2)
    rate, momentum = plane_minimiser(plane_of(g, delta, G))
    # min over s of g·(Bs) + ½ (Bs)ᵀG(Bs), with the step Bs = −η g + μ δ.
    B = torch.stack([-g, delta], 1)
    expected = torch.linalg.solve(B.T @ G @ B, -B.T @ g)
    torch.testing.assert_close(torch.stack([rate, momentum]), expected, rtol=1e-7, atol=0)

    def model(eta, mu):
        step = -eta * g + mu * delta
        return float(g @ step + step @ G @ step / 2)

    least = model(rate, momentum)
    along = float(g @ g / (g @ G @ g))
    assert least <= model(along, 0.0) + 1e-12 * abs(least)
    assert all(model(rate * a, momentum * b) >= least for a in (0.99, 1.01) for b in (0.99, 1.01))


DEGENERATE = {
    "along the gradient": lambda g: -0.3 * g,
    "no last step": lambda g: torch.zeros_like(g),
    "not finite": lambda g: g * math.nan,
    "no curvature": lambda g: torch.tensor([0.0, 0.0, 1.0]).double(),
}


@pytest.mark.parametrize("last", DEGENERATE.values(), ids=DEGENERATE)
def test_where_the_plane_is_a_line_the_gradient_remains(last):
    g, G = (
        torch.tensor([1.0, 2.0, 0.5]).double(),
        torch.diag(torch.tensor([1.0, 3.0, 0.0])).double(),
    )
    rate, momentum = plane_minimiser(plane_of(g, last(g), G), tolerance=1e-10)
    assert float(momentum) == 0
    assert float(rate) == pytest.approx(float(g @ g / (g @ G @ g)))


def conjugate_gradients(H, b, x, steps):
    r = b - H @ x
    p, iterates = r, []
    for _ in range(steps):
        alpha = (r @ r) / (p @ H @ p)
        x, after = x + alpha * p, r - alpha * H @ p
        p, r = after + (after @ after) / (r @ r) * p, after
        iterates.append(x)
    return iterates


@pytest.mark.parametrize("jvp", ["forward", "double_backward"])
@pytest.mark.parametrize("size", [2, 5, 8])
def test_on_least_squares_with_full_batches_it_is_conjugate_gradients(size, jvp):
    x, y = draw(30, size, seed=1), draw(30, 1, seed=2)
    model, criterion = nn.Linear(size, 1, bias=False).double(), nn.MSELoss()
    H, b = 2 * x.T @ x / 30, 2 * x.T @ y[:, 0] / 30
    expected = conjugate_gradients(H, b, flat(model), size)
    optimizer = Adler(model.parameters(), model, criterion, jvp=jvp, **EXACT)
    for iterate in expected:
        train(model, criterion, optimizer, [(x, y)])
        torch.testing.assert_close(flat(model), iterate, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(flat(model), torch.linalg.solve(H, b), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", [Adler, GaussNewton])
@pytest.mark.parametrize("name", ["mlp-tanh", "batchnorm", "transformer"])
def test_without_averages_every_step_is_the_dense_minimiser(name, kind):
    model, criterion = network(name), nn.CrossEntropyLoss()
    dense = Dense(model, criterion)
    matrix = dense.loss_hessian if kind is Adler else dense.output_outer_products
    optimizer = kind(model.parameters(), model, criterion, **{**EXACT, "lr": 0.1})
    theta, last = flat(model), None
    for x, y in batches(name, criterion, 8):
        g, J = dense.gradient(theta, x, y), dense.jacobian(theta, x)
        G = J.T @ matrix(theta, x, y) @ J
        step = -g * (g @ g) / (g @ G @ g)
        if last is not None:
            B = torch.stack([-g, last], 1)
            solved = torch.linalg.solve(B.T @ G @ B, -B.T @ g)
            descends = g @ (B @ solved) < 0 < solved[0]
            assert descends, "the case is one for the fallback"
            step = B @ solved
        train(model, criterion, optimizer, [(x, y)])
        c = step @ G @ step / float(optimizer.last_step.effective_lr) ** 2
        assert float(optimizer.last_step.curvature) == pytest.approx(float(c), rel=1e-7)
        last = 0.1 * step
        torch.testing.assert_close(flat(model), theta + last, rtol=1e-8, atol=1e-10)
        theta = flat(model)


def test_accumulated_batches_are_one_batch():
    runs = []
    for parts in (1, 3):
        model, criterion = network("mlp-tanh"), nn.CrossEntropyLoss()
        optimizer = Adler(model.parameters(), model, criterion, momentum="joint")
        for x, y in batches("mlp-tanh", criterion, 6):
            optimizer.zero_grad()
            for part_x, part_y in zip(x.chunk(parts), y.chunk(parts)):
                (criterion(model(part_x), part_y) / parts).backward()
            optimizer.step()
        runs.append(flat(model))
    torch.testing.assert_close(*runs, rtol=1e-9, atol=1e-11)


def test_finite_differences_agree():
    runs = []
    for jvp in ("forward", "finite_difference"):
        model, criterion = network("mlp-tanh"), nn.CrossEntropyLoss()
        optimizer = Adler(model.parameters(), model, criterion, momentum="joint", jvp=jvp)
        train(model, criterion, optimizer, batches("mlp-tanh", criterion, 8))
        runs.append(flat(model))
    torch.testing.assert_close(*runs, rtol=1e-3, atol=1e-4)


def test_the_guards_hold_for_the_whole_step():
    model, criterion = network("mlp-relu"), nn.CrossEntropyLoss()
    guards = {"max_kl": 0.01, "max_relative_change": 0.02}
    optimizer = Adler(model.parameters(), model, criterion, momentum="joint", **guards)
    clipped = 0
    for batch in batches("mlp-relu", criterion, 12):
        weights = [p.detach().clone() for p in model.parameters() if p.ndim > 1]
        train(model, criterion, optimizer, [batch])
        last = optimizer.last_step
        rate, c = float(last.effective_lr), float(last.curvature)
        assert rate <= 2 * float(last.minibatch_lr) * (1 + 1e-12)
        assert rate**2 * c / 2 <= 0.01 * (1 + 1e-12)
        moved = [p.detach() for p in model.parameters() if p.ndim > 1]
        floors = [math.sqrt(len(w) / 3) for w in weights]
        for before, after, floor in zip(weights, moved, floors):
            assert (after - before).norm() <= 0.02 * before.norm().clamp(min=floor) * (1 + 1e-9)
        clipped += bool(last.clipped)
    assert clipped


def test_a_loss_without_curvature_is_skipped_as_without_momentum():
    model, criterion = nn.Linear(3, 1).double(), nn.L1Loss()
    optimizer = Adler(model.parameters(), model, criterion, momentum="joint")
    before = flat(model)
    train(model, criterion, optimizer, [(draw(5, 3), draw(5, 1, seed=k)) for k in range(3)])
    assert flat(model).equal(before)
