"""`Adler` with momentum, and steps at a rate that is pinned."""

import copy
import math

import pytest
import torch
from support.cases import batches, flat, network
from support.loops import NoSynchronisation, train
from support.reference import Dense
from torch import nn

from adler import Adler, AdlerAdam, GaussNewton
from adler._averaging import DiscountedMean

CRITERION = nn.CrossEntropyLoss()
PINNED = DiscountedMean(torch.clone, lambda rate: torch.full_like(rate, 1e-3))


def setting(name="mlp-tanh", make=Adler, steps=10, **options):
    model = network(name)
    optimizer = make(model.parameters(), model, CRITERION, **options)
    return model, optimizer, batches(name, CRITERION, steps)


@pytest.mark.parametrize("momentum", [0.5, 0.9])
@pytest.mark.parametrize("name", ["mlp-relu", "cnn"])
def test_the_step_goes_along_the_average_at_the_rate_along_the_gradient(name, momentum):
    model, optimizer, data = setting(
        name, momentum=momentum, weight_decay=0.1, eps=0.0, trust_region=None, beta=0.9
    )
    dense = Dense(copy.deepcopy(model), CRITERION)
    theta, average = flat(model), torch.zeros_like(flat(model))
    logs, weight = 0.0, 0.0
    for t, (x, y) in enumerate(data, start=1):
        g, J = dense.gradient(theta, x, y), dense.jacobian(theta, x)
        v = J @ g
        rate = float(g @ g / (v @ dense.loss_hessian(theta, x, y) @ v))
        logs, weight = 0.9 * logs + math.log(rate), 0.9 * weight + 1
        rate = math.exp(logs / weight)
        average = momentum * average + (1 - momentum) * g
        theta = (1 - 0.1 * rate) * theta - rate * average / (1 - momentum**t)
        train(model, CRITERION, optimizer, [(x, y)])
        torch.testing.assert_close(flat(model), theta, rtol=1e-9, atol=1e-11)


def test_without_momentum_every_bit_is_as_before_and_nothing_is_held():
    model, optimizer, data = setting(momentum=0.0)
    twin, plain, _ = setting()
    train(model, CRITERION, optimizer, data)
    train(twin, CRITERION, plain, data)
    assert flat(model).equal(flat(twin))
    assert not optimizer.state


def test_the_published_algorithms_have_no_momentum():
    for kind in (Adler, GaussNewton):
        _, optimizer, _ = setting(make=kind.as_published)
        assert optimizer.param_groups[0]["momentum"] == 0


def test_the_loop_over_other_devices_equals_the_fused_kernel(monkeypatch):
    model, optimizer, data = setting(momentum=0.9)
    train(model, CRITERION, optimizer, data)
    twin, other, _ = setting(momentum=0.9)
    monkeypatch.setattr("adler._tensors._FUSED_DEVICES", ())
    bad = (data[0][0] * math.nan, data[0][1])
    train(twin, CRITERION, other, [*data[:3], bad, *data[3:]])
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("momentum", [0.9, "joint"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 4])
def test_a_skipped_step_leaves_the_momentum(momentum, bad, at):
    model, optimizer, data = setting(momentum=momentum)
    twin, other, _ = setting(momentum=momentum)
    poison = (torch.full_like(data[0][0], bad), data[0][1])
    train(model, CRITERION, optimizer, [*data[:at], poison, *data[at:]])
    train(twin, CRITERION, other, data)
    assert int(optimizer.last_step.skipped_total) == 1
    assert flat(model).equal(flat(twin))


@pytest.mark.parametrize("momentum", [0.9, "joint"])
@pytest.mark.parametrize("steps", [0, 5])
def test_resuming_and_copying_continue_bit_for_bit(momentum, steps, tmp_path):
    model, optimizer, data = setting(momentum=momentum, curvature_every=2)
    train(model, CRITERION, optimizer, data[:steps])
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "file")
    copied, copied_optimizer = copy.deepcopy((model, optimizer))
    twin, other, _ = setting(momentum=0.5, beta=0.5)
    states = torch.load(tmp_path / "file")
    twin.load_state_dict(states[0])
    other.load_state_dict(states[1])
    for each, its in ((model, optimizer), (copied, copied_optimizer), (twin, other)):
        train(each, CRITERION, its, data[steps:])
    assert flat(copied).equal(flat(model))
    assert flat(twin).equal(flat(model))


def test_groups_have_their_own_momentum():
    model, _, data = setting()
    halves = [
        {"params": model[0].parameters(), "momentum": 0.9},
        {"params": model[2].parameters()},
    ]
    optimizer = Adler(halves, model, CRITERION)
    train(model, CRITERION, optimizer, data)
    assert set(optimizer.state) == set(model[0].parameters())


def test_a_parameter_whose_gradient_comes_late_is_corrected_for_its_own_steps():
    model, optimizer, data = setting(momentum=0.9)
    model[0].bias.requires_grad_(False)
    train(model, CRITERION, optimizer, data[:3])
    model[0].bias.requires_grad_(True)
    before = model[0].bias.detach().clone()
    optimizer.zero_grad()
    CRITERION(model(data[3][0]), data[3][1]).backward()
    optimizer.step()
    step = before - float(optimizer.param_groups[0]["effective_lr"]) * model[0].bias.grad
    torch.testing.assert_close(model[0].bias.detach(), step, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("momentum", [0.9, "joint"])
def test_nothing_waits_for_the_device(momentum):
    model, optimizer, data = setting(momentum=momentum)
    for x, y in data:
        optimizer.zero_grad()
        CRITERION(model(x), y).backward()
        with NoSynchronisation():
            optimizer.step()


@pytest.mark.parametrize("momentum", [-0.1, 1.0, math.nan, "both", None, True])
def test_a_bad_momentum_is_named(momentum):
    with pytest.raises(ValueError, match="momentum="):
        setting(momentum=momentum)


def test_joint_is_for_all_groups():
    model, _, _ = setting()
    halves = [{"params": model[0].parameters()}, {"params": model[2].weight, "momentum": "joint"}]
    with pytest.raises(ValueError, match="momentum='joint' in a parameter group"):
        Adler(halves, model, CRITERION)


# --- a pinned rate: the library's own optimizers --------------------------------------------------


class PinnedAdam(AdlerAdam):
    _mean = PINNED


class PinnedAdler(Adler):
    _mean = PINNED


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_at_a_pinned_rate_adler_adam_is_adamw(weight_decay):
    options = {"trust_region": None, "weight_decay": weight_decay}
    model, optimizer, data = setting(make=PinnedAdam, **options)
    twin = network("mlp-tanh")
    adamw = torch.optim.AdamW(twin.parameters(), lr=1e-3, weight_decay=weight_decay)
    train(model, CRITERION, optimizer, data)
    train(twin, CRITERION, adamw, data)
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-12, atol=1e-14)


def test_at_a_pinned_rate_momentum_is_that_of_sgd():
    """SGD's buffer is m / (1 − μ), without the correction of the bias."""
    model, optimizer, data = setting(make=PinnedAdler, trust_region=None, momentum=0.9)
    twin = network("mlp-tanh")
    sgd = torch.optim.SGD(twin.parameters(), lr=0.0, momentum=0.9)
    for t, batch in enumerate(data, start=1):
        sgd.param_groups[0]["lr"] = 1e-3 * 0.1 / (1 - 0.9**t)
        train(model, CRITERION, optimizer, [batch])
        train(twin, CRITERION, sgd, [batch])
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-12, atol=1e-14)
