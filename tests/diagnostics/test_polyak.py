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
    loss_pl_coefficient,
    pl_coefficient,
    satisfies_pl_star,
    weak_pl_bound,
    weak_pl_coefficient,
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


# --- cross-entropy --------------------------------------------------------------------------------


def gradient_and_losses(logits, y, reduction):
    logits = logits.clone().requires_grad_()
    loss = nn.functional.cross_entropy(logits, y, reduction=reduction)
    (gradient,) = torch.autograd.grad(loss, logits)
    losses = nn.functional.cross_entropy(logits, y, reduction="none").detach()
    return float(gradient.square().sum()), losses, float(loss.detach())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@examples
@given(seed=seeds, classes=st.integers(2, 6), size=st.integers(1, 5), scale=st.floats(0.01, 20))
def test_the_weak_bounds_hold(reduction, seed, classes, size, scale):
    logits = scale * draw(size, classes, seed=seed)
    y = torch.randint(classes, (size,), generator=torch.Generator().manual_seed(seed))
    squared, losses, loss = gradient_and_losses(logits, y, reduction)
    bound = float(weak_pl_bound(losses, classes, reduction))
    coefficient = weak_pl_coefficient(float(losses.max()), classes, size)
    assert coefficient * loss**2 <= bound * (1 + SLACK)
    # The gradient p - e_y itself is rounded where p_y is nearly 1.
    assert bound <= squared * (1 + SLACK) + 1e-20


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("margin", [-9.0, -1.0, 0.0, 3.0])
def test_the_weak_bounds_are_attained_where_the_wrong_classes_agree(margin, classes, reduction):
    logits = torch.zeros(4, classes, dtype=torch.float64)
    logits[:, 0] = margin
    y = torch.zeros(4, dtype=torch.long)
    squared, losses, loss = gradient_and_losses(logits, y, reduction)
    assert float(weak_pl_bound(losses, classes, reduction)) == pytest.approx(squared, rel=1e-9)
    coefficient = weak_pl_coefficient(float(losses.max()), classes, 4)
    assert coefficient * loss**2 == pytest.approx(squared, rel=1e-9)


def test_the_weak_coefficient_falls_with_the_largest_loss():
    found = [weak_pl_coefficient(m, 10, 8) for m in (0.0, 1e-12, 0.1, 1.0, 10.0, 1e4)]
    assert found[0] == pytest.approx(10 / 9 / 8)
    assert found == sorted(found, reverse=True)


def test_cross_entropy_has_no_pl_coefficient():
    # Its local coefficient falls like the loss: no constant bounds it from below.
    for margin in (5.0, 10.0, 15.0):
        logits = torch.tensor([[margin, 0.0]], dtype=torch.float64, requires_grad=True)
        loss = nn.functional.cross_entropy(logits, torch.tensor([0]))
        (gradient,) = torch.autograd.grad(loss, logits)
        found = float(pl_coefficient(loss, gradient))
        assert found == pytest.approx(float(loss.detach()), rel=0.01)


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
    with pytest.raises(ValueError, match="weak_pl_bound"):
        loss_pl_coefficient(torch.zeros(2, 3), torch.zeros(2).long(), nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match=r"targets: shape \(4,\) does not broadcast"):
        loss_pl_coefficient(torch.zeros(4, 1), torch.zeros(4), nn.MSELoss())
    with pytest.raises(ValueError, match="smallest_eigenvalue=nan"):
        kernel_pl_bound(math.nan, g, g, nn.MSELoss())
    with pytest.raises(ValueError, match="reduction='none'"):
        weak_pl_bound(g, 2, "none")
    with pytest.raises(ValueError, match=r"losses: shape \(0,\)"):
        weak_pl_bound(torch.zeros(0), 2)
    with pytest.raises(ValueError, match=r"losses: the least is -1.0"):
        weak_pl_bound(-g, 2)
    with pytest.raises(ValueError, match="classes=1"):
        weak_pl_bound(g, 1)
    with pytest.raises(ValueError, match="largest_loss=inf"):
        weak_pl_coefficient(math.inf, 2, 1)
    with pytest.raises(ValueError, match="examples=0"):
        weak_pl_coefficient(1.0, 2, 0)
