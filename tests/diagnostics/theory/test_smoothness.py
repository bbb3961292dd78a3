"""Bounds of networks against dense first and second derivatives, and where they are attained."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import SMOOTH_ACTIVATIONS
from support.loops import unchanged
from support.reference import Dense, scalar
from torch import nn
from torch.autograd.functional import hessian

from adler.curvature import Objective
from adler.diagnostics.theory.composition import ActivationConstants
from adler.diagnostics.theory.smoothness import loss_bounds, loss_smoothness, network_bounds

examples = settings(deadline=None, max_examples=20, derandomize=True)
seeds = st.integers(0, 10**6)
# Of rounding in float64.
SLACK = 1 + 1e-9
CRITERIA = {
    "mse-mean": nn.MSELoss(),
    "mse-sum": nn.MSELoss(reduction="sum"),
    "ce-mean": nn.CrossEntropyLoss(),
    "ce-sum": nn.CrossEntropyLoss(reduction="sum"),
    "ce-weighted": nn.CrossEntropyLoss(
        weight=torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64), label_smoothing=0.1
    ),
}


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


def largest_second_derivative(tensor, seed=0):
    """``max ‖T[d, d]‖`` over unit ``d`` of a tensor ``(n, P, P)``, by ascent: from below."""
    generator = torch.Generator().manual_seed(seed)
    best = 0.0
    for _ in range(5):
        d = torch.randn(tensor.shape[1], generator=generator, dtype=tensor.dtype)
        before = -1.0
        for _ in range(30):
            d = d / d.norm()
            u = torch.einsum("npq,p,q->n", tensor, d, d)
            norm = float(u.norm())
            best = max(best, norm)
            if norm <= before * (1 + 1e-12):  # it has stopped growing
                break
            before = norm
            # The best d for this u is an extreme eigenvector.
            values, vectors = torch.linalg.eigh(torch.einsum("npq,n->pq", tensor, u))
            d = vectors[:, values.abs().argmax()]
    return best


def derivatives(dense, theta, x):
    """Norms of the outputs and of their first two derivatives."""
    J = dense.jacobian(theta, x)
    second = torch.func.jacrev(torch.func.jacrev(lambda t: dense.outputs(t, x).flatten()))(theta)
    return (
        float(dense.outputs(theta, x).norm()),
        float(torch.linalg.matrix_norm(J, 2)),
        largest_second_derivative(second),
    )


def small(name, seed, depth=2):
    """A network of ``depth`` hidden layers and a batch, with weights of various sizes."""
    torch.manual_seed(seed)
    widths = [3, *([2] * depth), 3]
    layers = [nn.Flatten()]
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        layers += [nn.Linear(a, b, bias=i % 2 == 0), SMOOTH_ACTIVATIONS[name]]
    model = nn.Sequential(*layers[:-1]).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10 ** (torch.rand(()) - 0.3))
    return model, torch.randn(4, 1, 3, dtype=torch.float64)


def moved(dense, radius):
    """Parameters at most ``radius`` away."""
    theta = dense.flat()
    step = torch.randn_like(theta)
    return theta + radius * torch.rand((), dtype=theta.dtype) * step / step.norm()


# --- networks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMOOTH_ACTIVATIONS)
@settings(examples, max_examples=8)
@given(seed=seeds, depth=st.integers(1, 3), radius=st.sampled_from([0.0, 0.1, 1.0]))
def test_the_bounds_hold_throughout_the_ball(name, seed, depth, radius):
    model, x = small(name, seed, depth)
    bounds, dense = network_bounds(model, x, radius), Dense(model, nn.MSELoss())
    for _ in range(3 if radius else 1):
        found = derivatives(dense, moved(dense, radius), x)
        for norm, bound in zip(found, bounds):
            assert norm <= bound * SLACK + 1e-12


@pytest.mark.parametrize("radius", [0.0, 0.1, 1.0])
def test_the_bounds_hold_in_the_direction_where_they_grow(radius):
    # A network of scalars, moved along its own parameters: here random directions test little.
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    x, dense = float64([2.0]), Dense(model, nn.MSELoss())
    bounds = network_bounds(model, x, radius)
    theta = dense.flat() * (1 + radius / math.sqrt(2))
    found = derivatives(dense, theta, x)
    for norm, bound in zip(found, bounds):
        assert norm <= bound * SLACK
    # At the point itself they are attained.
    if radius == 0:
        assert found == pytest.approx(bounds, rel=1e-9)


def test_saturated_features_leave_the_value_to_the_last_layer():
    # F = v tanh(w x) + b, with tanh(w x) = 1 in float64 throughout the ball.
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Tanh(), nn.Linear(1, 1)).double()
    with torch.no_grad():
        for p, value in zip(model.parameters(), (5.0, 0.0, 0.0)):
            p.fill_(value)
    x, radius = float64([10.0]), 1.0
    largest = math.sqrt(2) * radius  # where v = b = r/√2
    bound = network_bounds(model, x, radius).value
    assert largest <= bound <= math.sqrt(2) * largest * SLACK


def test_inputs_are_not_worked_on_in_place():
    model, x = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(2, 1)).double(), float64([-1.0, 2.0])
    network_bounds(model, x)
    assert x.tolist() == [[-1.0, 2.0]]


def test_one_linear_layer_attains_the_lipschitz_bound_on_any_batch():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2).double(), torch.randn(5, 3, dtype=torch.float64)
    found = derivatives(Dense(model, nn.MSELoss()), Dense(model, None).flat(), x)
    assert network_bounds(model, x) == pytest.approx(found, rel=1e-9)


def test_a_relu_network_keeps_its_lipschitz_constant():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    bounds, dense = network_bounds(model, x), Dense(model, nn.MSELoss())
    norm = float(torch.linalg.matrix_norm(dense.jacobian(dense.flat(), x), 2))
    assert norm <= bounds.lipschitz < 3 * norm
    assert bounds.smoothness == math.inf


def test_bounds_grow_with_the_ball_and_continuously():
    model, x = small("tanh", 0)
    radii = [0.0, 1e-9, 0.1, 1.0]
    found = [network_bounds(model, x, r) for r in radii]
    assert all(a[i] <= b[i] for a, b in itertools.pairwise(found) for i in range(3))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_nested_sequentials_and_activations_of_ones_own():
    class Sine(nn.Module):
        def forward(self, z):
            return z.sin()

    torch.manual_seed(0)
    first, second = nn.Linear(3, 2).double(), nn.Linear(2, 2).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    flat = nn.Sequential(first, Sine(), second)
    nested = nn.Sequential(nn.Sequential(first, nn.Sequential(Sine())), second)
    own = {Sine: ActivationConstants(1.0, 1.0, 0.0, 1.0)}
    bounds = network_bounds(nested, x, activations=own)
    assert bounds == network_bounds(flat, x, activations=own)
    dense = Dense(flat, nn.MSELoss())
    for norm, bound in zip(derivatives(dense, dense.flat(), x), bounds):
        assert norm <= bound * SLACK


# --- losses ---------------------------------------------------------------------------------------


def targets(criterion, seed):
    generator = torch.Generator().manual_seed(seed)
    if isinstance(criterion, nn.MSELoss):
        return torch.randn(4, 3, generator=generator, dtype=torch.float64)
    return torch.randint(3, (4,), generator=generator)


@pytest.mark.parametrize("criterion_name", CRITERIA)
@examples
@given(seed=seeds, radius=st.sampled_from([0.0, 0.1, 1.0]))
def test_the_bounds_of_the_loss_hold_throughout_the_ball(criterion_name, seed, radius):
    criterion = CRITERIA[criterion_name]
    model, x = small("tanh", seed, depth=1)
    y, dense = targets(criterion, seed), Dense(model, criterion)
    with unchanged(model):
        bounds = loss_bounds(Objective(model, x, y, criterion), radius)
    for _ in range(3):
        theta = moved(dense, radius)
        matrix = hessian(lambda t: criterion(dense.outputs(t, x), y), theta)
        found = (
            criterion(dense.outputs(theta, x), y),
            dense.gradient(theta, x, y).norm(),
            torch.linalg.eigvalsh(matrix).abs().max(),
        )
        for norm, bound in zip(found, bounds):
            assert float(norm) <= bound * SLACK
    assert loss_smoothness(Objective(model, x, y, criterion), radius) == bounds.smoothness


@pytest.mark.parametrize("criterion_name", ["mse-mean", "mse-sum"])
def test_linear_regression_attains_the_bound(criterion_name):
    criterion = CRITERIA[criterion_name]
    torch.manual_seed(0)
    model, x = nn.Linear(3, 3).double(), torch.randn(4, 3, dtype=torch.float64)
    y, dense = targets(criterion, 0), Dense(model, criterion)
    matrix = hessian(lambda t: criterion(dense.outputs(t, x), y), dense.flat())
    expected = float(torch.linalg.eigvalsh(matrix)[-1])
    for radius in (0.0, 5.0):
        found = loss_smoothness(Objective(model, x, y, criterion), radius)
        assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("radius", [0.0, 4.0])
def test_logistic_regression_attains_the_bound_where_it_knows_nothing(radius):
    model = nn.Linear(1, 2, bias=False).double()
    x, y, criterion = float64([3.0]), torch.tensor([0]), nn.CrossEntropyLoss()
    with torch.no_grad():  # the ball just reaches the origin, where the softmax is flat
        model.weight.copy_(radius / math.sqrt(2) * float64([1.0], [-1.0]))
    dense = Dense(model, criterion)
    origin = torch.zeros_like(dense.flat())
    matrix = hessian(lambda t: criterion(dense.outputs(t, x), y), origin)
    found = loss_bounds(Objective(model, x, y, criterion), radius)
    assert float(torch.linalg.eigvalsh(matrix)[-1]) == pytest.approx(found.smoothness, rel=1e-9)
    assert found.smoothness == pytest.approx(9 / 2)
    if radius == 0:
        assert found.lipschitz == pytest.approx(float(dense.gradient(origin, x, y).norm()))
        assert found.value == pytest.approx(math.log(2))


@pytest.mark.parametrize("radius", [0.0, 0.5])
def test_one_weight_attains_the_bounds_of_the_squared_error(radius):
    model, x, y = nn.Linear(1, 1, bias=False).double(), float64([3.0]), float64([1.0])
    nn.init.ones_(model.weight)  # h = (3 w - 1)², largest at the upper end
    found = loss_bounds(Objective(model, x, y, nn.MSELoss()), radius)
    end = scalar(lambda t: (3 * t[0] - 1) ** 2, 1.0 + radius)
    assert found == pytest.approx(end, rel=1e-9)


@pytest.mark.parametrize("criterion_name", CRITERIA)
@examples
@given(seed=seeds, share=st.floats(0.1, 2.0))
def test_the_descent_inequality_holds(criterion_name, seed, share):
    criterion = CRITERIA[criterion_name]
    model, x = small("tanh", seed)
    y, dense = targets(criterion, seed), Dense(model, criterion)
    theta = dense.flat()
    g = dense.gradient(theta, x, y)
    # Any ball gives an L; the step has to stay inside its ball.
    lr = share / loss_smoothness(Objective(model, x, y, criterion))
    L = loss_smoothness(Objective(model, x, y, criterion), radius=lr * float(g.norm()))
    before, after = (float(criterion(dense.outputs(t, x), y)) for t in (theta, theta - lr * g))
    assert after <= before - lr * (1 - L * lr / 2) * float(g @ g) + 1e-12 * (1 + before)


def test_the_descent_inequality_is_attained_by_linear_regression():
    torch.manual_seed(0)
    model, x = nn.Linear(1, 1, bias=False).double(), float64([3.0])
    y, criterion = float64([1.0]), nn.MSELoss()
    dense = Dense(model, criterion)
    theta, lr = dense.flat(), 0.02
    g = dense.gradient(theta, x, y)
    L = loss_smoothness(Objective(model, x, y, criterion), radius=lr * float(g.norm()))
    before, after = (float(criterion(dense.outputs(t, x), y)) for t in (theta, theta - lr * g))
    decrease = before - after
    assert decrease == pytest.approx(lr * (1 - L * lr / 2) * float(g @ g), rel=1e-9)
    assert decrease < lr * (1 - 0.9 * L * lr / 2) * float(g @ g)


def test_functions_and_single_precision():
    model, x = small("tanh", 0)
    y = targets(nn.MSELoss(), 0)
    exact = loss_bounds(Objective(model, x, y, nn.MSELoss()), 0.1)
    assert loss_bounds(Objective(model, x, y, nn.functional.mse_loss), 0.1) == exact
    single = loss_bounds(Objective(model.float(), x.float(), y.float(), nn.MSELoss()), 0.1)
    assert single == pytest.approx(exact, rel=1e-5)


# --- bad input ------------------------------------------------------------------------------------


def test_bad_input_is_named():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"module '1\.0' is Conv1d; known are Linear"):
        network_bounds(nn.Sequential(nn.Flatten(), nn.Sequential(nn.Conv1d(1, 1, 1))), x)
    layer = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="weights of '1' are used twice"):
        network_bounds(nn.Sequential(layer, layer), x)
    with pytest.raises(ValueError, match=r"radius=-1"):
        network_bounds(layer, x, -1)
    with pytest.raises(ValueError, match=r"inputs: not finite"):
        network_bounds(layer, x / 0)
    with pytest.raises(ValueError, match=r"inputs: shape \(0, 3\)"):
        network_bounds(layer, x[:0])
    with pytest.raises(TypeError, match="inputs: expected a tensor, got list"):
        network_bounds(layer, [1.0])
    with pytest.raises(ValueError, match=r"criterion=HuberLoss\(\)"):
        loss_bounds(Objective(layer, x, x, nn.HuberLoss()))
    with pytest.raises(ValueError, match=r"criterion=NLLLoss\(\)"):
        loss_bounds(Objective(layer, x, torch.zeros(2).long(), nn.NLLLoss()))
    nn.init.constant_(layer.weight, math.nan)
    with pytest.raises(ValueError, match=r"0\.weight: not finite"):
        network_bounds(nn.Sequential(layer), x)
