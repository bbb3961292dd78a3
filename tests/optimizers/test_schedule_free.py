"""The average of the iterates: `AdlerScheduleFree`, and `Adler` along the gradient."""

import copy
import functools

import pytest
import torch
from support.cases import batches, flat, network
from support.loops import NoSynchronisation, train
from support.options import EXACT, UNGUARDED
from torch import nn

from adler import Adler, AdlerAdam, AdlerScheduleFree, Guard, curvature
from adler import _tensors as update

KINDS = {"schedule-free": AdlerScheduleFree, "adler": Adler}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def setting(name="mlp-tanh", steps=12, kind=AdlerScheduleFree, **options):
    model, criterion = network(name), nn.CrossEntropyLoss()
    optimizer = kind(model.parameters(), model, criterion, **options)
    return model, criterion, optimizer, batches(name, criterion, steps)


def reference(model, criterion, data, rates, betas=(0.9, 0.999), decay=0.0):
    """The paper's three sequences, with the average kept as a plain mean of all z.

    The rates are those at which ``y`` moves; a step of ``z`` is longer, by the share of it that
    arrives at ``y``.
    """
    z = [p.detach().clone() for p in model.parameters()]
    squares, history = [torch.zeros_like(p) for p in z], []
    for k, ((inputs, targets), rate) in enumerate(zip(data, rates), start=1):
        y = [p.detach().clone() for p in model.parameters()]
        gradients = torch.autograd.grad(criterion(model(inputs), targets), model.parameters())
        squares = [betas[1] * v + (1 - betas[1]) * g * g for v, g in zip(squares, gradients)]
        for index, g in enumerate(gradients):
            d = g / ((squares[index] / (1 - betas[1] ** k)).sqrt() + 1e-8)
            share = 1 - betas[0] * (1 - 1 / k)
            z[index] = z[index] - rate / share * (d + decay * y[index])
        history.append([p.clone() for p in z])
        x = [torch.stack(iterates).mean(0) for iterates in zip(*history)]
        with torch.no_grad():
            for p, fast, average in zip(model.parameters(), z, x):
                p.copy_((1 - betas[0]) * fast + betas[0] * average)
    return torch.cat([average.flatten() for average in x])


@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.1}, {"betas": (0.5, 0.9)}, {"betas": (0.9, 0.0)}]
)
@pytest.mark.parametrize("name", ["mlp-relu", "transformer"])
def test_with_its_rates_the_three_sequences_follow(name, options):
    free = Guard(max_relative_change=None)
    model, criterion, optimizer, data = setting(name, guard=free, **options)
    twin, rates = copy.deepcopy(model), []
    for batch in data:
        train(model, criterion, optimizer, [batch])
        rates.append(float(optimizer.param_groups[0]["effective_lr"]))
    renamed = {"decay" if key == "weight_decay" else key: v for key, v in options.items()}
    average = reference(twin, criterion, data, rates, **renamed)
    # The bias of attention's keys has a gradient of rounding errors, which Adam makes large.
    close = {"rtol": 1e-4, "atol": 1e-5} if name == "transformer" else {"rtol": 1e-7, "atol": 1e-9}
    torch.testing.assert_close(flat(model), flat(twin), **close)
    optimizer.eval()
    torch.testing.assert_close(flat(model), average, **close)
    assert (flat(model) - flat(twin)).norm() > 1e-4  # the average is another point


@every_kind
def test_the_rate_is_how_far_the_parameters_move(kind):
    """Along the direction, beside what the average of the past adds: ``y + (z - y) / t``."""
    free = Guard(max_relative_change=None)
    model, criterion, optimizer, data = setting(kind=kind, guard=free)
    for t, (x, y) in enumerate(data, start=1):
        before = flat(model)
        fast = [optimizer.state[p].get("z", p).detach().flatten() for p in model.parameters()]
        apart = torch.cat(fast) - before
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        g = torch.cat([p.grad.flatten() for p in model.parameters()])
        optimizer.step()
        d = g
        if kind is AdlerScheduleFree:
            squares = [optimizer.state[p]["exp_avg_sq"].flatten() for p in model.parameters()]
            d = g / ((torch.cat(squares) / (1 - 0.999**t)).sqrt() + 1e-8)
        rate = float(optimizer.last_step.effective_lr)
        expected = before + apart / t - rate * d
        torch.testing.assert_close(flat(model), expected, rtol=1e-9, atol=1e-12)


@every_kind
def test_parameters_that_miss_steps_have_averages_of_their_own(kind, monkeypatch):
    """The last layer alone has a gradient in every third step; with and without the host's help."""
    found = []
    for host in (True, False):
        model, criterion, optimizer, data = setting(steps=9, kind=kind)
        if not host:
            monkeypatch.setattr(update, "_HOST_DEVICES", ())
        for number, (x, y) in enumerate(data):
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            if number % 3 == 0:
                for p in list(model.parameters())[:-2]:
                    p.grad = None
            optimizer.step()
        counts = {int(state["step"]) for state in optimizer.state.values()}
        assert counts == {6, 9}
        optimizer.eval()
        found.append(flat(model))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


def test_the_rate_is_the_minimiser_at_the_interpolated_point():
    model, criterion, optimizer, data = setting("cnn", **UNGUARDED, **EXACT)
    squares = [torch.zeros_like(p) for p in model.parameters()]
    for k, (x, y) in enumerate(data, start=1):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        g = [p.grad.clone() for p in model.parameters()]
        squares = [0.999 * v + 0.001 * t * t for v, t in zip(squares, g)]
        d = [t / ((v / (1 - 0.999**k)).sqrt() + 1e-8) for t, v in zip(g, squares)]
        c = curvature.quadratic_form(model, model.parameters(), x, y, criterion, d)
        slope = sum((a * b).sum() for a, b in zip(g, d))
        optimizer.step()
        assert float(optimizer.last_step.minibatch_lr) == pytest.approx(float(slope / c), rel=1e-9)


@pytest.mark.parametrize(("kind", "other"), [(AdlerScheduleFree, AdlerAdam), (Adler, None)])
def test_the_first_step_is_that_without_the_average(kind, other):
    model, criterion, optimizer, data = setting(kind=kind)
    twin = copy.deepcopy(model)
    other = other or functools.partial(kind, interpolation=None)
    other = other(twin.parameters(), twin, criterion)
    train(model, criterion, optimizer, data[:1])
    train(twin, criterion, other, data[:1])
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-12, atol=1e-12)


@every_kind
def test_eval_and_train_restore_every_bit_and_do_nothing_twice(kind):
    model, criterion, optimizer, data = setting(kind=kind)
    optimizer.eval()  # no average yet
    optimizer.train()
    train(model, criterion, optimizer, data)
    before = flat(model)
    optimizer.eval()
    average = flat(model)
    optimizer.eval()
    assert torch.equal(flat(model), average)
    assert not torch.equal(average, before)
    optimizer.train()
    optimizer.train()
    assert torch.equal(flat(model), before)


def test_without_the_average_nothing_is_held_and_there_is_one_point():
    model, criterion, optimizer, data = setting(kind=Adler, interpolation=None)
    train(model, criterion, optimizer, data)
    before = flat(model)
    optimizer.eval()
    assert torch.equal(flat(model), before)
    found = evaluate(model, data[0][0])
    assert torch.equal(found, model(data[0][0]))
    assert {key for mine in optimizer.state.values() for key in mine} == {"initial_size"}


@every_kind
def test_a_step_at_the_average_is_refused_and_changes_nothing(kind):
    model, criterion, optimizer, data = setting(kind=kind)
    train(model, criterion, optimizer, data[:3])
    optimizer.eval()
    model.eval()  # else the forward pass puts the trained weights back
    before, state = flat(model), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(RuntimeError, match=r"call optimizer\.train\(\)"):
        train(model, criterion, optimizer, data[3:4])
    assert torch.equal(flat(model), before)
    after = optimizer.state_dict()
    assert after["param_groups"][0]["steps"] == state["param_groups"][0]["steps"] == 3
    for number, kept in state["state"].items():
        assert all(torch.equal(after["state"][number][key], t) for key, t in kept.items())


@every_kind
@pytest.mark.parametrize("evaluating", [False, True])
def test_a_checkpoint_continues_bit_for_bit(evaluating, kind, tmp_path):
    model, criterion, optimizer, data = setting(kind=kind)
    train(model, criterion, optimizer, data[:5])
    if evaluating:
        optimizer.eval()
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "file")
    optimizer.train()
    train(model, criterion, optimizer, data[5:])

    twin, same, other, _ = setting(kind=kind)
    weights, state = torch.load(tmp_path / "file", weights_only=True)
    twin.load_state_dict(weights)
    other.load_state_dict(state)
    other.train()
    train(twin, same, other, data[5:])
    assert torch.equal(flat(model), flat(twin))
    for one in (optimizer, other):
        one.eval()
    assert torch.equal(flat(model), flat(twin))


@every_kind
def test_a_skipped_step_leaves_every_bit(kind):
    model, criterion, optimizer, data = setting(kind=kind)
    train(model, criterion, optimizer, data[:3])
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = -0.0
    before, state = flat(model), copy.deepcopy(optimizer.state_dict()["state"])
    x, y = data[3]
    train(model, criterion, optimizer, [(x * float("nan"), y)])
    assert bool(optimizer.last_step.skipped)
    assert torch.equal(flat(model), before)
    assert torch.signbit(next(model.parameters()).view(-1)[0])
    for key, kept in state.items():
        for name, value in kept.items():
            assert torch.equal(value, optimizer.state_dict()["state"][key][name]), name
    train(model, criterion, optimizer, data[4:])
    assert flat(model).isfinite().all()


@every_kind
def test_the_average_is_quieter_than_the_iterate(kind):
    """Least squares under label noise: after many small batches x is nearer the solution than z."""
    torch.manual_seed(0)
    solution = torch.randn(10, 1).double()
    model, criterion = nn.Linear(10, 1, bias=False).double(), nn.MSELoss()
    optimizer = kind(model.parameters(), model, criterion)
    for _ in range(300):
        x = torch.randn(8, 10).double()
        train(model, criterion, optimizer, [(x, x @ solution + torch.randn(8, 1).double())])
    z = optimizer.state[model.weight]["z"].clone()
    optimizer.eval()
    error = [(w.flatten() - solution.flatten()).norm() for w in (model.weight.detach(), z)]
    assert error[0] < 0.7 * error[1]


@every_kind
def test_the_host_does_not_wait(kind):
    model, criterion, optimizer, data = setting(kind=kind)
    train(model, criterion, optimizer, data[:2])
    x, y = data[2]
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    with NoSynchronisation():
        optimizer.step()


def test_an_average_that_is_never_looked_at_is_refused():
    model, criterion = network("mlp-tanh"), nn.CrossEntropyLoss()
    with pytest.raises(ValueError, match=r"betas=\(0, 0.999\): the first must be above 0"):
        AdlerScheduleFree(model.parameters(), model, criterion, betas=(0, 0.999))
    with pytest.raises(ValueError, match=r"interpolation=0.0: expected a number in \(0, 1\), or"):
        Adler(model.parameters(), model, criterion, interpolation=0.0)


# --- the weights follow the model's mode ---------------------------------------------------------

NO_GRADIENTS = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


def evaluate(model, x, without=torch.no_grad):
    model.eval()
    with without():
        outputs = model(x).clone()
    model.train()
    return outputs


@every_kind
@pytest.mark.parametrize("without", NO_GRADIENTS.values(), ids=NO_GRADIENTS)
def test_a_test_in_eval_mode_is_at_the_average_and_training_never_notices(without, kind):
    model, criterion, optimizer, data = setting("transformer", kind=kind)
    twin, same, other, _ = setting("transformer", kind=kind, follow_mode=False)
    for batch in data:
        found = evaluate(model, data[0][0], without)
        train(model, criterion, optimizer, [batch])
        other.eval()
        expected = evaluate(twin, data[0][0])
        other.train()
        train(twin, same, other, [batch])
        assert torch.equal(found, expected)
    assert torch.equal(flat(model), flat(twin))
    assert not torch.equal(evaluate(model, data[0][0], without), evaluate(twin, data[0][0]))


@every_kind
@pytest.mark.filterwarnings("ignore:the model was called in evaluation mode with gradients")
def test_what_is_neither_training_nor_a_test_changes_nothing(kind):
    model, criterion, optimizer, data = setting(kind=kind)
    train(model, criterion, optimizer, data[:4])
    trained = flat(model)
    with torch.no_grad():
        model(data[0][0])  # as `update_bn` does
    assert torch.equal(flat(model), trained)
    model.eval()  # fine-tuning with frozen statistics
    train(model, criterion, optimizer, data[4:])
    assert not any("y" in state for state in optimizer.state.values())


@every_kind
def test_running_statistics_can_be_made_anew_at_the_average(kind):
    model, criterion, optimizer, data = setting("batchnorm", kind=kind)
    train(model, criterion, optimizer, data)
    evaluate(model, data[0][0])
    average = flat(model)
    torch.optim.swa_utils.update_bn([x for x, _ in data], model)
    assert torch.equal(flat(model), average)


@every_kind
@pytest.mark.parametrize("how", ["removed", "deleted", "switched off", "a copy of the model"])
def test_hooks_that_have_nothing_to_say_keep_quiet(how, kind):
    model, criterion, optimizer, data = setting(kind=kind)
    train(model, criterion, optimizer, data)
    if how == "removed":
        optimizer.remove_hooks()
    elif how == "deleted":
        del optimizer
    elif how == "switched off":
        optimizer.follow_mode = False
    else:
        model = copy.deepcopy(model)
    before = flat(model)
    evaluate(model, data[0][0])
    assert torch.equal(flat(model), before)


@every_kind
def test_a_copy_follows_its_own_model(kind):
    model, criterion, optimizer, data = setting(kind=kind)
    train(model, criterion, optimizer, data)
    twin, _, other = copy.deepcopy((model, criterion, optimizer))
    before = flat(model)
    found = evaluate(twin, data[0][0])
    assert torch.equal(flat(model), before)
    other.train()
    optimizer.follow_mode = False
    assert not torch.equal(found, evaluate(model, data[0][0]))
    assert other.follow_mode
