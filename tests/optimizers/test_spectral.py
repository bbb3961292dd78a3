"""`SpectralSGD` against dense kernels, in float64."""

import copy
import itertools

import pytest
import torch
from support.cases import CRITERIA, NETWORKS, batches, flat, network
from support.loops import NoSynchronisation, train
from support.options import EXACT, LAST_ITERATE
from support.reference import Dense
from torch import nn

from adler import Adler, SpectralSGD, losses

# The first measurement takes thirty times as many as the others: 120 are enough to begin with.
FEW, MANY = {"power_iterations": 4}, 40
# The rate is that of the last minibatch.
UNGUARDED = {"guard": None, "eps": 0.0, "beta": 0.0}


def setting(name="mlp-tanh", criterion_name="ce-mean", **options):
    model, criterion = network(name), CRITERIA[criterion_name]()
    optimizer = SpectralSGD(model.parameters(), model, criterion, **options)
    return model, criterion, optimizer, batches(name, criterion, 12)


def dense_rate(model, criterion, x, y, mean=False):
    """``1 / (2 λ_max(J Jᵀ) ‖Q‖)`` with the bound on ``‖Q‖`` that the provider states."""
    dense = Dense(model, criterion)
    theta = dense.flat()
    J = dense.jacobian(theta, x)
    if mean:
        Q = dense.loss_hessian(theta, x, y)
        return float(len(Q) / (2 * torch.linalg.eigvalsh(J @ J.T)[-1] * Q.trace()))
    norm = losses.loss_hessian(criterion).spectral_norm(dense.outputs(theta, x), y)
    return float(1 / (2 * torch.linalg.eigvalsh(J @ J.T)[-1] * norm))


@pytest.mark.parametrize("criterion_name", CRITERIA)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_rate_is_that_of_the_dense_kernel(name, criterion_name):
    options = {**UNGUARDED, **FEW}
    model, criterion, optimizer, data = setting(name, criterion_name, **options)
    for x, y in data[:2]:
        expected = dense_rate(copy.deepcopy(model), criterion, x, y)
        train(model, criterion, optimizer, [(x, y)])
        optimizer.power_iterations = MANY
        assert float(optimizer.param_groups[0]["effective_lr"]) == pytest.approx(expected, rel=1e-3)
        assert float(optimizer.last_step.minibatch_lr) >= expected * (1 - 1e-9)  # from below


@pytest.mark.parametrize("own", [FEW, {"gershgorin_columns": 18}])
@pytest.mark.parametrize("criterion_name", CRITERIA)
@pytest.mark.parametrize("name", ["mlp-tanh", "batchnorm", "transformer"])
def test_the_rate_of_the_mean_curvature_is_that_of_the_dense_trace(name, criterion_name, own):
    both = []
    for mean in (True, False):
        options = {**UNGUARDED, **own, "mean_curvature": mean}
        model, criterion, optimizer, data = setting(name, criterion_name, **options)
        expected = dense_rate(copy.deepcopy(model), criterion, *data[0], mean=True)
        train(model, criterion, optimizer, data[:1])
        both.append(float(optimizer.last_step.minibatch_lr))
    if "power_iterations" in own:
        assert both[0] == pytest.approx(expected, rel=1e-3)
    else:
        assert both[0] <= expected  # columns bound the kernel
    # The mean is no more than the norm; all eigenvalues of the squared error are equal.
    assert both[0] >= both[1] * (1 - 1e-9)
    assert (both[0] > both[1] * (1 + 1e-3)) == ("mse" not in criterion_name)


def test_one_warm_iteration_follows_the_kernel():
    errors = {}
    for iterations in (1, 40):
        options = {**UNGUARDED, "power_iterations": iterations}
        model, criterion, optimizer, _ = setting(**options)
        (batch,) = batches("mlp-tanh", criterion, 1, size=40)
        found = []
        for _ in range(10):  # the same batch, a moving network
            expected = dense_rate(copy.deepcopy(model), criterion, *batch)
            train(model, criterion, optimizer, [batch])
            found.append(float(optimizer.last_step.minibatch_lr) / expected)
        errors[iterations] = max(found) - 1, found[-1] - 1
    assert errors[40][0] < 1e-6
    assert errors[1][0] < 0.1
    assert errors[1][1] < 0.005


@pytest.mark.parametrize("name", ["mlp-tanh", "batchnorm", "transformer"])
def test_gershgorins_columns_bound_the_kernel(name):
    options = {**UNGUARDED, "gershgorin_columns": 18}
    model, criterion, optimizer, data = setting(name, **options)
    for x, y in data[:3]:
        twin = copy.deepcopy(model)
        exact = dense_rate(twin, criterion, x, y)
        dense = Dense(twin, criterion)
        J = dense.jacobian(dense.flat(), x)
        K = J @ J.T
        norm = losses.loss_hessian(criterion).spectral_norm(dense.outputs(dense.flat(), x), y)
        train(model, criterion, optimizer, [(x, y)])
        rate = float(optimizer.last_step.minibatch_lr)
        assert rate == pytest.approx(float(1 / (2 * K.abs().sum(0).max() * norm)), rel=1e-9)
        assert rate <= exact


def test_a_sample_of_columns_lies_between_and_repeats_itself():
    rates = {}
    for columns in (2, 18):
        for attempt in range(2):
            model, criterion, optimizer, data = setting(gershgorin_columns=columns, **UNGUARDED)
            torch.manual_seed(attempt)  # the sample is the step's, not the generator's
            train(model, criterion, optimizer, data[:1])
            rates[columns, attempt] = float(optimizer.last_step.minibatch_lr)
    assert rates[2, 0] == rates[2, 1] > rates[18, 0] == rates[18, 1]


def test_the_rate_is_at_most_half_of_adlers():
    for name in NETWORKS:
        model, criterion, optimizer, data = setting(name, **FEW, **UNGUARDED)
        twin = copy.deepcopy(model)
        options = {"beta": 0.0, "eps": 0.0, **LAST_ITERATE, **EXACT}
        adler = Adler(twin.parameters(), twin, criterion, **options)
        for batch in data[:4]:
            twin.load_state_dict(model.state_dict())
            train(twin, criterion, adler, [batch])
            train(model, criterion, optimizer, [batch])
            optimizer.power_iterations = MANY
            ratio = optimizer.last_step.minibatch_lr / adler.last_step.minibatch_lr
            assert float(ratio) <= 0.5 * (1 + 1e-3)


def test_full_batch_descent_never_rises():
    model, criterion, optimizer, data = setting("linear", "mse-mean", power_iterations=10)
    x, y = data[0]
    heights = []
    for _ in range(30):
        heights.append(float(criterion(model(x), y).detach()))
        train(model, criterion, optimizer, [(x, y)])
    assert all(b < a for a, b in itertools.pairwise(heights))


def test_a_batch_that_is_not_finite_spoils_nothing():
    model, criterion, optimizer, data = setting()
    train(model, criterion, optimizer, data[:2])
    before, state = flat(model), copy.deepcopy(optimizer.state_dict()["state"])
    x, y = data[2]
    train(model, criterion, optimizer, [(x * float("nan"), y)])
    assert optimizer.last_step.skipped
    assert flat(model).equal(before)
    after = optimizer.state_dict()["state"]
    assert all(after[i]["eigenvector"].equal(state[i]["eigenvector"]) for i in state)
    train(model, criterion, optimizer, data[3:])
    assert torch.isfinite(flat(model)).all()


def test_two_losses_are_bounded_together():
    model, criterion, optimizer, data = setting(power_iterations=8, **UNGUARDED)
    (x, y), (z, w) = data[:2]
    optimizer.zero_grad()
    (criterion(model(x), y) + 0.5 * criterion(model(z), w)).backward()
    optimizer.step()
    dense = Dense(network("mlp-tanh"), criterion)
    theta, A = dense.flat(), 0
    for weight, a, b in ((1.0, x, y), (0.5, z, w)):
        J = dense.jacobian(theta, a)
        norm = losses.loss_hessian(criterion).spectral_norm(dense.outputs(theta, a), b)
        A = A + weight * norm * J.T @ J
    expected = float(1 / (2 * torch.linalg.eigvalsh(A)[-1]))
    assert float(optimizer.last_step.minibatch_lr) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("columns", [None, 2])
def test_the_host_never_waits(columns, mean):
    model, criterion, optimizer, data = setting(gershgorin_columns=columns, mean_curvature=mean)
    for x, y in data[:3]:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        with NoSynchronisation():
            optimizer.step()


def test_bad_options_are_named():
    model, criterion = nn.Linear(4, 3), nn.CrossEntropyLoss()
    for value in (0, 1.5, True):
        with pytest.raises(ValueError, match=f"power_iterations={value!r}"):
            SpectralSGD(model.parameters(), model, criterion, power_iterations=value)
    with pytest.raises(ValueError, match="gershgorin_columns=0"):
        SpectralSGD(model.parameters(), model, criterion, gershgorin_columns=0)
    with pytest.raises(ValueError, match="mean_curvature='yes'"):
        SpectralSGD(model.parameters(), model, criterion, mean_curvature="yes")
    groups = [{"params": [model.weight]}, {"params": [model.bias], "power_iterations": 2}]
    with pytest.raises(ValueError, match="'power_iterations' is no option of a parameter group"):
        SpectralSGD(groups, model, criterion)


@pytest.mark.parametrize(
    "own", [{"power_iterations": 7}, {"mean_curvature": True, "gershgorin_columns": 2}]
)
def test_a_checkpoint_brings_the_options_of_its_own(own):
    model, criterion, optimizer, data = setting(**own)
    train(model, criterion, optimizer, data[:4])
    twin, same, other, _ = setting()
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    train(model, criterion, optimizer, data[4:])
    train(twin, same, other, data[4:])
    assert flat(model).equal(flat(twin))
    assert {key: getattr(other, key) for key in own} == own
