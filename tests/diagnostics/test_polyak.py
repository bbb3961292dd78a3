"""PL coefficients: every inequality holds, and a smaller bound would not."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import NETWORKS, Quadratic, Wavy, batches, draw, network
from support.reference import Dense
from torch import nn

from adler.diagnostics.polyak import (
    kernel_pl_bound,
    kernel_upper_pl_bound,
    loss_pl_coefficient,
    loss_upper_pl_coefficient,
    mean_pl_coefficient,
    pl_coefficient,
    satisfies_pl_star,
    satisfies_upper_pl,
)

examples = settings(deadline=None, max_examples=50, derandomize=True)
seeds = st.integers(0, 10**6)
# Of rounding in float64, over a few dozen operations.
SLACK = 1e-10


# --- at one point ---------------------------------------------------------------------------------


@examples
@given(seeds)
def test_the_coefficient_of_a_quadratic_lies_between_its_eigenvalues(seed):
    f = Quadratic(seed)
    x = f.centre + draw(5, seed=seed + 3)
    mu = float(pl_coefficient(f(x), f.gradient(x), f.least))
    assert f.pl * (1 - SLACK) <= mu <= f.smoothness * (1 + SLACK)


def test_the_coefficient_along_an_eigenvector_is_its_eigenvalue():
    f = Quadratic(0)
    values, vectors = torch.linalg.eigh(f.matrix)
    for value, vector in zip(values, vectors.T):
        x = f.centre + vector
        assert float(pl_coefficient(f(x), f.gradient(x), f.least)) == pytest.approx(float(value))


def test_gradients_may_be_parameters_tensors_or_a_mapping():
    model, x = nn.Linear(3, 2).double(), draw(4, 3)
    loss = model(x).square().mean()
    loss.backward()
    expected = float(sum(p.grad.square().sum() for p in model.parameters()) / (2 * loss.detach()))
    listed = [p.grad for p in model.parameters()]
    named = {n: p.grad for n, p in model.named_parameters()}
    flat = torch.cat([g.flatten() for g in listed])
    for gradients in (listed, [None, *listed], iter(listed), named, flat):
        mu = pl_coefficient(loss, gradients)
        assert mu.ndim == 0
        assert not mu.requires_grad
        assert float(mu) == pytest.approx(expected, rel=1e-12)


def test_at_the_optimum_every_coefficient_holds():
    assert float(pl_coefficient(0.5, torch.zeros(3), 0.5)) == math.inf
    assert float(pl_coefficient(0.5, torch.ones(3), 0.5)) == math.inf


def test_half_precision_is_summed_in_single():
    gradients = torch.full((10_000,), 0.01, dtype=torch.float16)  # squares below 6e-5 lose digits
    mu = pl_coefficient(torch.tensor(0.5, dtype=torch.float16), gradients)
    assert torch.finfo(mu.dtype).bits >= 32
    assert float(mu) == pytest.approx(1.0, rel=1e-3)


@examples
@given(seeds)
def test_pl_star_holds_up_to_the_coefficient(seed):
    x = draw(3, seed=seed)
    f = Wavy()
    mu = float(pl_coefficient(f(x), f.gradient(x)))
    assert satisfies_pl_star(f(x), f.gradient(x), mu * (1 - SLACK))
    assert not satisfies_pl_star(f(x), f.gradient(x), mu * (1 + SLACK))


# --- from the tangent kernel ----------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_coefficient_of_the_squared_error_is_exact(reduction):
    criterion = nn.MSELoss(reduction=reduction)
    F, y = draw(4, 3).requires_grad_(), draw(4, 3, seed=1)
    loss = criterion(F, y)
    (gradient,) = torch.autograd.grad(loss, F)
    alpha = loss_pl_coefficient(F, y, criterion)
    assert float(pl_coefficient(loss, gradient)) == pytest.approx(alpha, rel=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", NETWORKS)
def test_the_kernel_bounds_the_coefficient(name, seed, reduction):
    model, criterion = network(name, seed), nn.MSELoss(reduction=reduction)
    ((x, y),) = batches(name, criterion, 1, size=3, seed=seed)
    dense = Dense(model, criterion)
    J = dense.jacobian(dense.flat(), x)
    smallest = torch.linalg.eigvalsh(J @ J.T)[0]
    outputs = dense.outputs(dense.flat(), x)
    bound = kernel_pl_bound(smallest, outputs, y, criterion)
    g = dense.gradient(dense.flat(), x, y)
    assert 0 <= bound <= float(pl_coefficient(criterion(outputs, y), g)) * (1 + SLACK)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_kernel_bound_is_attained_where_the_residual_is_the_last_eigenvector(reduction):
    criterion = nn.MSELoss(reduction=reduction)
    model, ((x, _),) = network("mlp-tanh"), batches("mlp-tanh", criterion, 1, size=3)
    dense = Dense(model, criterion)
    J, outputs = dense.jacobian(dense.flat(), x), dense.outputs(dense.flat(), x).detach()
    values, vectors = torch.linalg.eigh(J @ J.T)
    y = outputs - vectors[:, 0].view_as(outputs)
    mu = pl_coefficient(criterion(outputs, y), dense.gradient(dense.flat(), x, y))
    assert kernel_pl_bound(values[0], outputs, y, criterion) == pytest.approx(float(mu), rel=1e-8)


def test_an_eigenvalue_below_zero_is_rounding():
    assert kernel_pl_bound(-1e-9, torch.zeros(2), torch.ones(2), nn.MSELoss()) == 0


# --- from above -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "criterion", [nn.MSELoss(), nn.MSELoss(reduction="sum"), nn.CrossEntropyLoss()]
)
@pytest.mark.parametrize("name", ["linear", "mlp-tanh", "cnn"])
def test_the_kernel_bounds_the_coefficient_from_above(name, criterion):
    for seed in range(5):
        model = network(name, seed)
        ((x, y),) = batches(name, criterion, 1, size=3, seed=seed)
        dense = Dense(model, criterion)
        J, outputs = dense.jacobian(dense.flat(), x), dense.outputs(dense.flat(), x)
        largest = torch.linalg.eigvalsh(J @ J.T)[-1]
        bound = kernel_upper_pl_bound(largest, outputs, y, criterion)
        g, loss = dense.gradient(dense.flat(), x, y), criterion(outputs, y)
        assert float(pl_coefficient(loss, g)) <= bound * (1 + SLACK)
        assert satisfies_upper_pl(loss, g, bound * (1 + SLACK))


def test_the_upper_kernel_bound_is_attained_where_the_residual_is_the_first_eigenvector():
    criterion = nn.MSELoss()
    model, ((x, _),) = network("mlp-tanh"), batches("mlp-tanh", criterion, 1, size=3)
    dense = Dense(model, criterion)
    J, outputs = dense.jacobian(dense.flat(), x), dense.outputs(dense.flat(), x).detach()
    values, vectors = torch.linalg.eigh(J @ J.T)
    y = outputs - vectors[:, -1].view_as(outputs)
    loss, g = criterion(outputs, y), dense.gradient(dense.flat(), x, y)
    bound = kernel_upper_pl_bound(values[-1], outputs, y, criterion)
    assert bound == pytest.approx(float(pl_coefficient(loss, g)), rel=1e-8)
    assert not satisfies_upper_pl(loss, g, 0.999 * bound)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@examples
@given(seed=seeds, scale=st.floats(0.01, 20))
def test_cross_entropy_has_an_upper_coefficient(reduction, seed, scale):
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    F = (scale * draw(4, 3, seed=seed)).requires_grad_()
    y = torch.randint(3, (4,), generator=torch.Generator().manual_seed(seed))
    loss = criterion(F, y)
    (gradient,) = torch.autograd.grad(loss, F)
    beta = loss_upper_pl_coefficient(F, y, criterion)
    assert float(pl_coefficient(loss, gradient)) <= beta * (1 + SLACK)


def test_a_fifth_less_is_no_upper_coefficient_of_cross_entropy():
    # Two classes at margin 1 the wrong way: ½‖∇ℓ‖² = σ(1)², 0.81 of ½ log(1 + e).
    F = torch.tensor([[0.5, -0.5]], dtype=torch.float64, requires_grad=True)
    loss = nn.functional.cross_entropy(F, torch.tensor([1]))
    (gradient,) = torch.autograd.grad(loss, F)
    beta = loss_upper_pl_coefficient(F, torch.tensor([1]), nn.CrossEntropyLoss())
    assert satisfies_upper_pl(loss, gradient, beta)
    assert not satisfies_upper_pl(loss, gradient, 0.8 * beta)


# --- of the examples' own losses ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "mlp-tanh", "cnn"])
def test_the_mean_coefficient_is_that_of_dense_gradients_and_bounds_the_other(name):
    criterion, model = nn.MSELoss(), network(name)
    ((x, y),) = batches(name, criterion, 1)
    dense = Dense(model, criterion)
    theta = dense.flat()
    losses = torch.stack([criterion(dense.outputs(theta, a[None]), b[None]) for a, b in zip(x, y)])
    squares = torch.stack(
        [dense.gradient(theta, a[None], b[None]).square().sum() for a, b in zip(x, y)]
    )
    found = float(mean_pl_coefficient(losses, squares))
    expected = float(squares.mean() / (2 * losses.mean()))
    assert found == pytest.approx(expected, rel=1e-12)
    whole = pl_coefficient(criterion(dense.outputs(theta, x), y), dense.gradient(theta, x, y))
    assert float(whole) < found
    # One gradient for all: equal.
    one = float(mean_pl_coefficient(losses[:1], squares[:1]))
    alone = pl_coefficient(losses[0], dense.gradient(theta, x[:1], y[:1]))
    assert one == pytest.approx(float(alone), rel=1e-12)


# --- bad input ------------------------------------------------------------------------------------


def test_bad_input_is_named():
    g = torch.ones(2)
    with pytest.raises(ValueError, match="gradients: none at all"):
        pl_coefficient(1.0, [None])
    with pytest.raises(ValueError, match="gradients: their squared norm is nan"):
        pl_coefficient(1.0, torch.tensor([math.nan]))
    with pytest.raises(ValueError, match="loss=nan: expected one finite number"):
        pl_coefficient(math.nan, g)
    with pytest.raises(ValueError, match=r"loss=\[1.0, 1.0\]: expected one finite number"):
        pl_coefficient(torch.ones(2), g)
    with pytest.raises(ValueError, match=r"loss=1.0 is below optimum=2.0"):
        pl_coefficient(1.0, g, 2.0)
    with pytest.raises(ValueError, match=r"coefficient=0.0"):
        satisfies_pl_star(1.0, g, 0.0)
    with pytest.raises(ValueError, match="weak_polyak"):
        loss_pl_coefficient(torch.zeros(2, 3), torch.zeros(2).long(), nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match=r"targets: shape \(4,\) does not broadcast"):
        loss_pl_coefficient(torch.zeros(4, 1), torch.zeros(4), nn.MSELoss())
    with pytest.raises(ValueError, match="smallest_eigenvalue=nan"):
        kernel_pl_bound(math.nan, g, g, nn.MSELoss())
    with pytest.raises(ValueError, match=r"largest_eigenvalue=-1.0"):
        kernel_upper_pl_bound(-1.0, g, g, nn.MSELoss())
    with pytest.raises(ValueError, match=r"criterion=HuberLoss\(\)"):
        loss_upper_pl_coefficient(g, g, nn.HuberLoss())
    with pytest.raises(ValueError, match=r"coefficient=-1.0"):
        satisfies_upper_pl(1.0, g, -1.0)
    with pytest.raises(ValueError, match="losses, squared_norms: shapes"):
        mean_pl_coefficient(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="squared_norms: expected finite"):
        mean_pl_coefficient(torch.zeros(2), torch.tensor([1.0, -1.0]))
