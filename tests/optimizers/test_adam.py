"""`AdlerAdam`: Adam's steps, at the minimiser along the preconditioned gradient."""

import copy
import math

import pytest
import torch
from support.cases import batches, flat, network
from support.loops import NoSynchronisation, train
from support.options import EXACT, UNGUARDED
from torch import nn

from adler import AdlerAdam, Guard, Measure, curvature


def setting(name="mlp-tanh", **options):
    model, criterion = network(name), nn.CrossEntropyLoss()
    optimizer = AdlerAdam(model.parameters(), model, criterion, **options)
    return model, criterion, optimizer, batches(name, criterion, 12)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["mlp-relu", "batchnorm", "transformer"])
def test_with_its_rates_adamw_takes_the_same_steps(name, weight_decay):
    free = Guard(max_relative_change=None)
    model, criterion, optimizer, data = setting(name, weight_decay=weight_decay, guard=free)
    twin = copy.deepcopy(model)
    adamw = torch.optim.AdamW(twin.parameters(), lr=0.0, weight_decay=weight_decay)
    for batch in data:
        train(model, criterion, optimizer, [batch])
        adamw.param_groups[0]["lr"] = float(optimizer.param_groups[0]["effective_lr"])
        train(twin, criterion, adamw, [batch])
        # A bias before BatchNorm, and that of attention's keys, has a gradient of rounding errors,
        # which Adam makes large.
        torch.testing.assert_close(flat(model), flat(twin), rtol=1e-6, atol=1e-8)
    assert not optimizer.last_step.skipped_total


@pytest.mark.parametrize("memory", [0.999, 0.5, 0.0])
@pytest.mark.parametrize("name", ["linear", "mlp-tanh", "cnn"])
def test_the_rate_is_the_minimiser_along_the_preconditioned_gradient(name, memory):
    options = {**UNGUARDED, **EXACT, "betas": (0.9, memory)}
    model, criterion, optimizer, data = setting(name, **options)
    squares = [torch.zeros_like(p) for p in model.parameters()]
    for k, (x, y) in enumerate(data, start=1):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        g = [p.grad.clone() for p in model.parameters()]
        squares = [memory * v + (1 - memory) * t * t for v, t in zip(squares, g)]
        d = [t / ((v / (1 - memory**k)).sqrt() + 1e-8) for t, v in zip(g, squares)]
        c = curvature.quadratic_form(model, model.parameters(), x, y, criterion, d)
        slope = sum((a * b).sum() for a, b in zip(g, d))
        optimizer.step()
        assert float(optimizer.last_step.slope) == pytest.approx(float(slope), rel=1e-9)
        assert float(optimizer.last_step.curvature) == pytest.approx(float(c), rel=1e-9)
        assert float(optimizer.last_step.minibatch_lr) == pytest.approx(float(slope / c), rel=1e-9)


def test_the_first_step_on_least_squares_lands_on_the_line_minimum():
    torch.manual_seed(0)
    model, criterion = nn.Linear(5, 3).double(), nn.MSELoss()
    x, y = torch.randn(20, 5).double(), torch.randn(20, 3).double()
    optimizer = AdlerAdam(model.parameters(), model, criterion, **UNGUARDED, **EXACT)
    before = flat(model)
    train(model, criterion, optimizer, [(x, y)])
    along = flat(model) - before
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    slope = along @ torch.cat([p.grad.flatten() for p in model.parameters()])
    assert abs(float(slope)) < 1e-13


@pytest.mark.parametrize("options", [{}, EXACT, {"measure": Measure(every=4, warmup=2)}])
def test_the_state_continues_bit_for_bit(options):
    model, criterion, optimizer, data = setting(**options)
    train(model, criterion, optimizer, data[:6])
    twin, twin_criterion, other, _ = setting(beta=0.5)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    copied, copied_optimizer = copy.deepcopy((model, optimizer))
    train(model, criterion, optimizer, data[6:])
    train(twin, twin_criterion, other, data[6:])
    train(copied, criterion, copied_optimizer, data[6:])
    assert flat(twin).equal(flat(model))
    assert flat(copied).equal(flat(model))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_poisonous_batch_leaves_parameters_moments_and_average(bad):
    model, criterion, optimizer, data = setting()
    train(model, criterion, optimizer, data[:3])
    before, state = flat(model), copy.deepcopy(optimizer.state_dict())
    x, y = data[3]
    x = x.clone()
    x[0, 0] = bad
    train(model, criterion, optimizer, [(x, y)])
    assert optimizer.last_step.skipped
    assert flat(model).equal(before)
    after = optimizer.state_dict()
    for key in ("rate_total", "rate_weight", "curvature_total", "curvature_weight"):
        assert after["param_groups"][0][key].equal(state["param_groups"][0][key])
    for p, kept in state["state"].items():
        assert all(after["state"][p][key].equal(value) for key, value in kept.items())


@pytest.mark.parametrize("size", [1e19, 2e19, 1e20, 5e20, 1e21, 1e25, 1e38])
def test_a_gradient_whose_square_overflows_is_skipped(size):
    """It is finite itself; in the second moment it would be infinite for ever."""
    model, criterion = nn.Linear(3, 2), nn.CrossEntropyLoss()
    optimizer = AdlerAdam(model.parameters(), model, criterion)
    x, y = torch.randn(6, 3), torch.randint(2, (6,))
    train(model, criterion, optimizer, [(x, y)])
    before, state = flat(model), copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    model.weight.grad[0, 0] = size
    optimizer.step()
    assert all(t.isfinite().all() for kept in optimizer.state.values() for t in kept.values())
    assert flat(model).isfinite().all()
    if size < 1e21:
        return
    assert optimizer.last_step.skipped
    assert flat(model).equal(before)
    for p, kept in state.items():
        after = optimizer.state_dict()["state"][p]
        assert all(after[key].equal(value) for key, value in kept.items())


def test_decay_never_flips_a_sign():
    model, criterion = nn.Linear(3, 2, bias=False), nn.MSELoss()
    options = {"lr": 1e6, "weight_decay": 1e6, "guard": Guard(max_relative_change=None)}
    optimizer = AdlerAdam(model.parameters(), model, criterion, **options)
    x = torch.randn(6, 3)
    before = model.weight.detach().clone()
    train(model, criterion, optimizer, [(x, model(x).detach() + 1e-3)])
    moments = optimizer.state[model.weight]
    corrected = moments["exp_avg"] / 0.1 / ((moments["exp_avg_sq"] / 1e-3).sqrt() + 1e-8)
    # All of the weight is gone, and no more: what is left is Adam's step.
    expected = -float(optimizer.param_groups[0]["effective_lr"]) * corrected
    torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-3, atol=0)
    assert not optimizer.last_step.skipped
    assert before.abs().max() < expected.abs().max()


@pytest.mark.parametrize("options", [{}, EXACT], ids=["default", "exact"])
def test_the_default_guards_hold(options):
    model, criterion, optimizer, data = setting("mlp-relu", **options)
    bounds = [
        0.02 * max(float(p.norm()), (len(p) / 3) ** 0.5)
        for p in (q.detach() for q in model.parameters())
    ]
    held = 0
    for batch in data:
        before = [p.detach().clone() for p in model.parameters()]
        train(model, criterion, optimizer, [batch])
        last = optimizer.last_step
        if optimizer.measure.fraction == 1:  # else the bound is by a mean over parts
            assert float(last.effective_lr) <= 2 * float(last.minibatch_lr) * (1 + 1e-12)
        moves = [float((a - b.detach()).norm()) for a, b in zip(before, model.parameters())]
        assert all(move <= bound * (1 + 1e-9) for move, bound in zip(moves, bounds))
        held += sum(move > bound * (1 - 1e-6) for move, bound in zip(moves, bounds))
    assert held


def test_predictions_move_by_no_more_than_max_kl():
    guard = Guard(max_kl=0.01, max_relative_change=None)
    model, criterion, optimizer, data = setting("mlp-relu", guard=guard, **EXACT)
    bounded = 0
    for batch in data:
        train(model, criterion, optimizer, [batch])
        last = optimizer.last_step
        moved = float(last.effective_lr) ** 2 * float(last.curvature) / 2
        assert moved <= 0.01 * (1 + 1e-12)
        bounded += moved == pytest.approx(0.01)
    assert bounded


def test_groups_may_differ_in_betas_and_frozen_parameters_stay():
    model, criterion, _, data = setting()
    model[0].bias.requires_grad_(False)
    frozen = model[0].bias.clone()
    groups = [
        {"params": model[0].parameters(), "betas": (0.8, 0.99)},
        {"params": model[2].parameters(), "lr": 0.5},
    ]
    optimizer = AdlerAdam(groups, model, criterion)
    train(model, criterion, optimizer, data)
    first, second = (float(g["effective_lr"]) for g in optimizer.param_groups)
    assert second == pytest.approx(0.5 * first)
    assert model[0].bias.equal(frozen)


def test_nothing_waits_for_the_device():
    model, criterion, optimizer, data = setting()
    for x, y in data:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        with NoSynchronisation():
            optimizer.step()


@pytest.mark.parametrize(
    "options", [{"betas": (1.0, 0.9)}, {"betas": (0.9,)}, {"betas": 0.9}, {"adam_eps": 0.0}]
)
def test_bad_options_are_named(options):
    ((name, _),) = options.items()
    with pytest.raises(ValueError, match=f"{name}="):
        setting(**options)


def test_nothing_was_published():
    assert not hasattr(AdlerAdam, "as_published")
