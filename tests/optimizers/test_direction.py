"""`Adler` with momentum, and steps at a rate that is pinned."""

import copy
import math
from collections import defaultdict

import pytest
import torch
from support.cases import batches, flat, network
from support.loops import NoSynchronisation, train
from support.options import EXACT, LAST_ITERATE, UNGUARDED
from support.reference import Dense
from torch import nn

from adler import Adler, AdlerAdam, GaussNewton, Guard, Measure
from adler._averaging import DiscountedMean
from adler._optimizers.sgd import Momentum

CRITERION = nn.CrossEntropyLoss()
PINNED = DiscountedMean(torch.clone, lambda rate: torch.full_like(rate, 1e-3), torch.ones_like)


# With the average of the iterates, as by default, and without.
AVERAGED = {"averaged": {}, "last iterate": LAST_ITERATE}
with_and_without_the_average = pytest.mark.parametrize("own", AVERAGED.values(), ids=AVERAGED)


def setting(name="mlp-tanh", make=Adler, steps=10, **options):
    model = network(name)
    optimizer = make(model.parameters(), model, CRITERION, **options)
    return model, optimizer, batches(name, CRITERION, steps)


@pytest.mark.parametrize("momentum", [0.5, 0.9])
@pytest.mark.parametrize("name", ["mlp-relu", "cnn"])
def test_the_step_goes_along_the_average_at_the_rate_along_the_gradient(name, momentum):
    options = {"weight_decay": 0.1, "beta": 0.9, **UNGUARDED, **EXACT, **LAST_ITERATE}
    model, optimizer, data = setting(name, momentum=momentum, **options)
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


@with_and_without_the_average
def test_without_momentum_every_bit_is_as_before_and_nothing_is_held(own):
    model, optimizer, data = setting(momentum=0.0, **own)
    twin, plain, _ = setting(**own)
    train(model, CRITERION, optimizer, data)
    train(twin, CRITERION, plain, data)
    assert flat(model).equal(flat(twin))
    held = {key for state in optimizer.state.values() for key in state}
    assert held == ({"initial_size"} if own else {"initial_size", "step", "z"})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_momentum_steps_along_the_corrected_average_in_every_precision(dtype):
    """The direction by itself: of any dtype, and with steps between that are skipped."""
    generator, shapes = torch.Generator().manual_seed(0), [(3, 4), (5,), (), (2, 1, 3)]
    draws = [[torch.randn(s, generator=generator).to(dtype) for s in shapes] for _ in range(4)]
    params, rate = [p.requires_grad_() for p in draws[0]], torch.tensor(0.3, dtype=torch.float64)
    group, state = {"params": params, "momentum": 0.8, "weight_decay": 0.0}, defaultdict(dict)
    exact = [p.detach().double().clone() for p in params]
    means = [torch.zeros_like(p) for p in exact]
    for t, gradients in enumerate(draws[1:], start=1):
        for skipped in (True, False):
            for p, g in zip(params, gradients):
                p.grad = g * math.nan if skipped else g
            direction = Momentum([p.grad for p in params], state, {id(group): True})
            with torch.no_grad():
                direction.descend(group, params, rate, torch.tensor(skipped))
        means = [0.8 * m + 0.2 * g.double() for m, g in zip(means, gradients)]
        exact = [p - 0.3 * m / (1 - 0.8**t) for p, m in zip(exact, means)]
    assert all(float(state[p]["step"]) == 3 for p in params)
    # Three steps of entries of size one; a mean's rounding is divided by 1 - 0.8.
    rounding = 16 * torch.finfo(dtype).eps
    averages = [state[p]["exp_avg"] for p in params]
    for found, expected in zip([*params, *averages], [*exact, *means]):
        found = found.detach().double()
        torch.testing.assert_close(found, expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("equal", [True, False])
def test_what_an_iterate_moves_along_is_what_the_parameters_would(equal):
    """`advance` and `descend`, of the same gradients: one for an average, one without."""
    moved = []
    for average in (False, True):
        params = [p.requires_grad_() for p in (torch.ones(3).double(), torch.ones(2, 2).double())]
        group, state = {"params": params, "momentum": 0.8, "weight_decay": 0.0}, defaultdict(dict)
        for t in range(3):
            for k, p in enumerate(params):
                p.grad = torch.full_like(p, 1.0 + t + k).requires_grad_(False)
            direction = Momentum([p.grad for p in params], state, {id(group): equal})
            with torch.no_grad():
                if not average:
                    direction.descend(group, params, torch.tensor(0.3), torch.tensor(False))
                    continue
                for p in params:
                    count = state[p].setdefault("step", torch.zeros(()))
                    count += 1
                along = direction.advance(group, params, torch.tensor(False))
                for p, d in zip(params, along):
                    p -= 0.3 * d
        moved.append(torch.cat([p.detach().flatten() for p in params]))
    torch.testing.assert_close(*moved, rtol=1e-7, atol=1e-7)


def test_the_published_algorithms_have_no_momentum():
    for kind in (Adler, GaussNewton):
        _, optimizer, _ = setting(make=kind.as_published)
        assert optimizer.param_groups[0]["momentum"] == 0


@with_and_without_the_average
@pytest.mark.parametrize("fused", [("cpu",), ()])
def test_the_kernels_of_other_devices_equal_those_of_the_host(own, fused, monkeypatch):
    model, optimizer, data = setting(momentum=0.9, **own)
    train(model, CRITERION, optimizer, data)
    twin, other, _ = setting(momentum=0.9, **own)
    monkeypatch.setattr("adler._tensors._HOST_DEVICES", ())
    monkeypatch.setattr("adler._tensors._FUSED_DEVICES", fused)
    bad = (data[0][0] * math.nan, data[0][1])
    train(twin, CRITERION, other, [*data[:3], bad, *data[3:]])
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-12, atol=1e-13)


@with_and_without_the_average
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 4])
def test_a_skipped_step_leaves_the_momentum(own, bad, at):
    model, optimizer, data = setting(momentum=0.9, **own)
    twin, other, _ = setting(momentum=0.9, **own)
    poison = (torch.full_like(data[0][0], bad), data[0][1])
    train(model, CRITERION, optimizer, [*data[:at], poison, *data[at:]])
    train(twin, CRITERION, other, data)
    assert int(optimizer.last_step.skipped_total) == 1
    assert flat(model).equal(flat(twin))


@with_and_without_the_average
@pytest.mark.parametrize("steps", [0, 5])
def test_resuming_and_copying_continue_bit_for_bit(own, steps, tmp_path):
    measure = Measure(every=2, warmup=0)
    model, optimizer, data = setting(momentum=0.9, measure=measure, **own)
    train(model, CRITERION, optimizer, data[:steps])
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "file")
    copied, copied_optimizer = copy.deepcopy((model, optimizer))
    twin, other, _ = setting(momentum=0.5, beta=0.5, **own)
    states = torch.load(tmp_path / "file")
    twin.load_state_dict(states[0])
    other.load_state_dict(states[1])
    for each, its in ((model, optimizer), (copied, copied_optimizer), (twin, other)):
        train(each, CRITERION, its, data[steps:])
    assert flat(copied).equal(flat(model))
    assert flat(twin).equal(flat(model))


@with_and_without_the_average
def test_groups_have_their_own_momentum(own):
    model, _, data = setting()
    halves = [
        {"params": model[0].parameters(), "momentum": 0.9},
        {"params": model[2].parameters()},
    ]
    optimizer = Adler(halves, model, CRITERION, **own)
    train(model, CRITERION, optimizer, data)
    with_momentum = {p for p, state in optimizer.state.items() if "exp_avg" in state}
    assert with_momentum == set(model[0].parameters())


@with_and_without_the_average
def test_a_parameter_whose_gradient_comes_late_is_corrected_for_its_own_steps(own):
    free = Guard(max_relative_change=None)
    model, optimizer, data = setting(momentum=0.9, guard=free, **own)
    model[0].bias.requires_grad_(False)
    train(model, CRITERION, optimizer, data[:3])
    model[0].bias.requires_grad_(True)
    before = model[0].bias.detach().clone()
    optimizer.zero_grad()
    CRITERION(model(data[3][0]), data[3][1]).backward()
    optimizer.step()
    step = before - float(optimizer.param_groups[0]["effective_lr"]) * model[0].bias.grad
    torch.testing.assert_close(model[0].bias.detach(), step, rtol=1e-12, atol=1e-14)


@with_and_without_the_average
def test_nothing_waits_for_the_device(own):
    model, optimizer, data = setting(momentum=0.9, **own)
    for x, y in data:
        optimizer.zero_grad()
        CRITERION(model(x), y).backward()
        with NoSynchronisation():
            optimizer.step()


@pytest.mark.parametrize("momentum", [-0.1, 1.0, math.nan, "joint", None, True])
def test_a_bad_momentum_is_named(momentum):
    with pytest.raises(ValueError, match="momentum="):
        setting(momentum=momentum)


# --- a pinned rate: the library's own optimizers --------------------------------------------------


class PinnedAdam(AdlerAdam):
    _mean = PINNED


class PinnedAdler(Adler):
    _mean = PINNED


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_at_a_pinned_rate_adler_adam_is_adamw(weight_decay):
    options = {"guard": None, "weight_decay": weight_decay}
    model, optimizer, data = setting(make=PinnedAdam, **options)
    twin = network("mlp-tanh")
    adamw = torch.optim.AdamW(twin.parameters(), lr=1e-3, weight_decay=weight_decay)
    train(model, CRITERION, optimizer, data)
    train(twin, CRITERION, adamw, data)
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-12, atol=1e-14)


def test_at_a_pinned_rate_momentum_is_that_of_sgd():
    """SGD's buffer is m / (1 − μ), without the correction of the bias."""
    options = {"guard": None, "momentum": 0.9, **LAST_ITERATE}
    model, optimizer, data = setting(make=PinnedAdler, **options)
    twin = network("mlp-tanh")
    sgd = torch.optim.SGD(twin.parameters(), lr=0.0, momentum=0.9)
    for t, batch in enumerate(data, start=1):
        sgd.param_groups[0]["lr"] = 1e-3 * 0.1 / (1 - 0.9**t)
        train(model, CRITERION, optimizer, [batch])
        train(twin, CRITERION, sgd, [batch])
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-12, atol=1e-14)
