"""What a step computes: against the dense reference, by hand, and what it leaves alone."""

import copy
import math
import warnings

import pytest
import torch
from support import loops
from support.cases import CRITERIA, MAKERS, NETWORKS, batches, classification, flat, network
from support.loops import NoSynchronisation, train, unchanged
from support.options import EXACT, GUARDS, LAST_ITERATE, MODES, TRUST_REGION, UNGUARDED
from support.reference import run
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from adler import Adler, GaussNewton, Guard, Measure
from adler._optimizers.sgd import _corrections

KINDS = {"adler": Adler, "gauss_newton": GaussNewton}
STEPS = 20
BETA = 0.9999  # the default
ENGINES = ("forward", "finite_difference", "double_backward")
MEASURES = {f"every step, {jvp}": Measure.every_step(jvp) for jvp in ENGINES}
MEASURES |= {f"default, {jvp}": Measure(jvp) for jvp in ENGINES}

# A part of a batch says nothing of another part of it: what is added up is measured as a whole.
EITHER = {"default": {}, "exact": EXACT}
either_measure = pytest.mark.parametrize("mode", EITHER)
with_and_without_the_average = pytest.mark.parametrize("interpolation", [None, 0.9])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("criterion_name", CRITERIA)
@pytest.mark.parametrize("name", NETWORKS)
def test_published_trajectories_equal_the_dense_reference(name, criterion_name, kind):
    model, criterion = network(name), CRITERIA[criterion_name]()
    data = batches(name, criterion, STEPS)
    expected = run(model, criterion, data, kind=kind)
    optimizer = KINDS[kind].as_published(model.parameters(), model, criterion)
    for k, (x, y) in enumerate(data):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
        torch.testing.assert_close(flat(model), expected.parameters[k], rtol=1e-9, atol=1e-12)
        last = optimizer.last_step
        assert float(last.minibatch_lr) == pytest.approx(expected.minibatch_lrs[k], rel=1e-9)
        assert float(last.effective_lr) == pytest.approx(expected.effective_lrs[k], rel=1e-9)


@pytest.mark.parametrize("jvp", ["double_backward", "finite_difference"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_other_engines_follow_the_same_trajectory(name, jvp):
    model, criterion = network(name), nn.CrossEntropyLoss()
    data = batches(name, criterion, STEPS)
    expected = run(model, criterion, data, beta=BETA, guard=GUARDS)
    options = {"measure": Measure.every_step(jvp), "guard": GUARDS, **LAST_ITERATE}
    optimizer = Adler(model.parameters(), model, criterion, **options)
    train(model, criterion, optimizer, data)
    error = (flat(model) - expected.parameters[-1]).norm() / expected.parameters[-1].norm()
    assert error < (1e-9 if jvp == "double_backward" else 1e-4)  # first order in a step of 1e-6 η


@pytest.mark.parametrize("guard", [Guard(), GUARDS, TRUST_REGION])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("criterion_name", CRITERIA)
@pytest.mark.parametrize("name", ["mlp-relu", "cnn"])
def test_guarded_trajectories_equal_the_guarded_reference(name, criterion_name, kind, guard):
    model, criterion = network(name), CRITERIA[criterion_name]()
    data = batches(name, criterion, STEPS)
    expected = run(model, criterion, data, kind=kind, beta=BETA, guard=guard)
    options = {"guard": guard, **EXACT, **LAST_ITERATE}
    optimizer = KINDS[kind](model.parameters(), model, criterion, **options)
    train(model, criterion, optimizer, data)
    torch.testing.assert_close(flat(model), expected.parameters[-1], rtol=1e-9, atol=1e-12)
    assert int(optimizer.last_step.clipped_total) == sum(expected.clipped)


@with_and_without_the_average
def test_one_step_on_a_linear_model_lands_on_the_line_minimum(interpolation):
    torch.manual_seed(0)
    model, criterion = nn.Linear(5, 3).double(), nn.MSELoss()
    x, y = torch.randn(20, 5).double(), torch.randn(20, 3).double()
    options = {"interpolation": interpolation, **UNGUARDED, **EXACT}
    optimizer = Adler(model.parameters(), model, criterion, **options)
    criterion(model(x), y).backward()
    before = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    slope = sum((p.grad * g).sum() for p, g in zip(model.parameters(), before))
    size = sum((g * g).sum() for g in before)
    assert abs(float(slope / size)) < 1e-13


@with_and_without_the_average
def test_a_step_equals_sgd_with_the_same_rate(interpolation):
    torch.manual_seed(0)
    model, criterion = nn.Linear(5, 3).double(), nn.CrossEntropyLoss()
    x, y = torch.randn(20, 5).double(), torch.randint(3, (20,))
    options = {"interpolation": interpolation, "guard": TRUST_REGION}
    optimizer = Adler(model.parameters(), model, criterion, **options)
    criterion(model(x), y).backward()
    before = [(p.detach().clone(), p.grad.clone()) for p in model.parameters()]
    optimizer.step()
    rate = float(optimizer.param_groups[0]["effective_lr"])
    by_hand = nn.Linear(5, 3)
    by_hand.weight.data, by_hand.bias.data = (p - rate * g for p, g in before)
    torch.testing.assert_close(model(x), by_hand(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_a_step_moves_nothing_but_the_parameters(measure):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)
    )
    criterion = nn.CrossEntropyLoss()
    x, y = torch.randn(16, 4), torch.randint(3, (16,))
    optimizer = Adler(model.parameters(), model, criterion, measure=measure)
    for _ in range(3):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        with unchanged(model):
            optimizer.step()
    assert optimizer.measure == measure  # no fallback


def test_dropout_is_measured_with_the_mask_of_the_gradient():
    # One example whose hidden units are mostly dropped: a fresh mask would see other weights.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 200, bias=False), nn.Dropout(0.9), nn.Linear(200, 3))
    model, criterion = model.double(), nn.MSELoss()
    x, y = torch.randn(6, 4).double(), torch.randn(6, 3).double()
    optimizer = Adler(model.parameters(), model, criterion, guard=TRUST_REGION, **EXACT)
    state = torch.get_rng_state()
    outputs = model(x)
    criterion(outputs, y).backward()
    torch.randn(1000)
    grads = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    rate = float(optimizer.last_step.effective_lr)
    # v by central difference under the very same mask
    alpha, shifted = 1e-6, []
    for sign in (1, -1):
        for p, g in zip(model.parameters(), grads):
            p.data += (rate + sign * alpha) * g
        torch.set_rng_state(state)
        shifted.append(model(x).detach())
        for p, g in zip(model.parameters(), grads):
            p.data -= (rate + sign * alpha) * g
    v = (shifted[0] - shifted[1]) / (2 * alpha)
    assert float(optimizer.last_step.curvature) == pytest.approx(
        float(2 * v.square().mean()), rel=1e-6
    )


@pytest.mark.parametrize("options", [{}, LAST_ITERATE, {"momentum": 0.9}, {"weight_decay": 0.1}])
@pytest.mark.parametrize("mode", MODES)
def test_nothing_in_a_step_waits_for_the_device(mode, options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    criterion = nn.CrossEntropyLoss()
    x, y = torch.randn(16, 4), torch.randint(3, (16,))
    optimizer = Adler(model.parameters(), model, criterion, **MODES[mode], **options)
    for _ in range(4):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        with NoSynchronisation():
            optimizer.step()


# --- several losses in one gradient ---------------------------------------------------------------


def measured(backward, mode="exact", **options):
    """The record of one step after ``backward(model, criterion, x, y)``."""
    model, criterion, x, y = classification()
    optimizer = Adler(model.parameters(), model, criterion, **EITHER[mode], **options)
    backward(model, criterion, x, y)
    optimizer.step()
    return optimizer.last_step, flat(model)


def whole_batch(model, criterion, x, y):
    criterion(model(x), y).backward()


def test_accumulated_micro_batches_equal_the_whole_batch():
    def accumulated(model, criterion, x, y):
        for part in range(4):
            rows = slice(6 * part, 6 * part + 6)
            (criterion(model(x[rows]), y[rows]) / 4).backward()

    a, b = measured(whole_batch), measured(accumulated)
    torch.testing.assert_close(torch.stack(a[0][:4]), torch.stack(b[0][:4]), rtol=1e-10, atol=0)
    torch.testing.assert_close(a[1], b[1], rtol=1e-10, atol=1e-12)


def test_losses_added_before_one_backward_equal_the_whole_batch():
    def added(model, criterion, x, y):
        outputs = [model(part) for part in (x[:12], x[12:])]
        first, second = (criterion(o, t) for o, t in zip(outputs, (y[:12], y[12:])))
        (first / 2 + second / 2).backward()

    torch.testing.assert_close(measured(whole_batch)[1], measured(added)[1], rtol=1e-10, atol=1e-12)


def test_a_mixture_of_losses_of_one_output():
    def mixup(model, criterion, x, y):
        outputs = model(x)
        (0.3 * criterion(outputs, y) + 0.7 * criterion(outputs, y.flip(0))).backward()

    found, _ = measured(mixup)
    reference, _ = measured(whole_batch)  # cross-entropy's Hessian does not see the targets
    model, criterion, x, y = classification()
    mixup(model, criterion, x, y)
    size = sum(float(p.grad.square().sum()) for p in model.parameters())
    assert float(found.slope) == pytest.approx(size)
    assert float(found.curvature) != pytest.approx(float(reference.curvature))  # another gradient


@either_measure
@pytest.mark.parametrize("factor", [1e-3, 7.0])
def test_a_loss_scaled_before_backward_takes_the_same_step(factor, mode):
    def scaled(model, criterion, x, y):
        (factor * criterion(model(x), y)).backward()

    expected, found = (measured(run, mode, eps=0.0)[1] for run in (whole_batch, scaled))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@either_measure
def test_forwards_that_are_not_differentiated_do_not_count(mode):
    def distracted(model, criterion, x, y):
        with torch.no_grad():
            criterion(model(x[:3]), y[:3])
        loss = criterion(model(x), y)
        criterion(model(x[:5]), y[:5])  # with a graph, never backpropagated
        loss.backward()

    assert measured(whole_batch, mode)[1].equal(measured(distracted, mode)[1])


@either_measure
@pytest.mark.parametrize("forget", ["optimizer", "model"])
def test_a_step_that_never_came_is_forgotten_with_its_gradients(forget, mode):
    model, criterion, x, y = classification()
    optimizer = Adler(model.parameters(), model, criterion, **EITHER[mode])
    criterion(model(x[:7]), y[:7]).backward()
    (optimizer if forget == "optimizer" else model).zero_grad()
    criterion(model(x), y).backward()
    optimizer.step()
    assert flat(model).equal(measured(whole_batch, mode)[1])


@pytest.mark.parametrize("set_to_none", [True, False])
def test_what_zero_grad_takes_away_is_not_measured_though_the_next_pass_has_begun(set_to_none):
    model, criterion, x, y = classification()
    twin = copy.deepcopy(model)
    optimizer, other = (Adler(m.parameters(), m, criterion, **EXACT) for m in (model, twin))
    criterion(model(x[:7]), y[:7]).backward()
    loss = criterion(model(x), y)
    optimizer.zero_grad(set_to_none)
    loss.backward()
    optimizer.step()
    criterion(twin(x), y).backward()
    other.step()
    assert optimizer.last_step.curvature.equal(other.last_step.curvature)


@either_measure
def test_zero_grad_between_forward_and_backward(mode):
    def late(model, criterion, x, y):
        loss = criterion(model(x), y)
        for p in model.parameters():
            p.grad = None
        loss.backward()

    assert measured(whole_batch, mode)[1].equal(measured(late, mode)[1])


# --- guards ---------------------------------------------------------------------------------------


def test_a_constant_loss_skips_and_a_run_of_them_warns_once():
    model, criterion, x, y = classification()
    optimizer = Adler(model.parameters(), model, criterion)
    before = flat(model)
    constant = lambda outputs, targets: 0 * criterion(outputs, targets)  # noqa: E731
    with pytest.warns(RuntimeWarning, match="steps were skipped") as caught:
        train(model, constant, optimizer, [(x, y)] * 25)
    assert [w.filename for w in caught] == [loops.__file__]  # where the loop calls step
    assert flat(model).equal(before)
    assert bool(optimizer.last_step.skipped)
    assert int(optimizer.last_step.skipped_total) == 25
    assert float(optimizer.param_groups[0]["effective_lr"]) == 0.0


def same_but_counted(after, before):
    """A step that was skipped has left the averages and the state of every parameter."""
    for key in ("rate_total", "rate_weight", "curvature_total", "curvature_weight"):
        assert after["param_groups"][0][key].equal(before["param_groups"][0][key])
    assert after["state"].keys() == before["state"].keys()
    for number, kept in before["state"].items():
        assert all(after["state"][number][key].equal(value) for key, value in kept.items())


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_poisonous_batch_changes_nothing(kind, bad):
    model, criterion, x, y = classification()
    optimizer = MAKERS[kind](model.parameters(), model, criterion)
    train(model, criterion, optimizer, [(x, y)] * 3)
    before, state = flat(model), copy.deepcopy(optimizer.state_dict())
    poisoned = x.clone()
    poisoned[0, 0] = bad
    train(model, criterion, optimizer, [(poisoned, y)])
    assert flat(model).equal(before)
    assert bool(optimizer.last_step.skipped)
    same_but_counted(optimizer.state_dict(), state)
    train(model, criterion, optimizer, [(x, y)])  # and it goes on
    assert not flat(model).equal(before)
    assert flat(model).isfinite().all()


def test_an_infinite_loss_with_finite_gradients_is_skipped():
    class Barrier(nn.Module):
        def forward(self, outputs, targets):
            return (outputs - targets).square().mean() + math.inf

    model, _, x, _ = classification()
    criterion = Barrier()
    optimizer = Adler(model.parameters(), model, criterion)
    criterion(model(x), torch.zeros(24, 3).double()).backward()
    before = flat(model)
    optimizer.step()
    assert flat(model).equal(before)


def test_a_loss_without_curvature_never_steps_at_one_over_eps():
    model, _, x, _ = classification()
    criterion = nn.L1Loss()  # linear: c = 0 wherever it has a gradient
    optimizer = Adler(model.parameters(), model, criterion)
    before = flat(model)
    train(model, criterion, optimizer, [(x, torch.zeros(24, 3).double())])
    assert not flat(model).equal(before)  # by the empirical Fisher matrix of the outputs
    assert float(optimizer.last_step.curvature) > 0
    assert float(optimizer.last_step.minibatch_lr) < 1e3
    assert not bool(optimizer.last_step.skipped)


def test_subtracted_losses_never_write_nonsense_into_the_parameters():
    """Their curvature may be positive where the scale of their likelihoods is negative."""
    curved = 0
    for i in range(24):
        model, criterion, x, y = classification()
        model[2].weight.data *= 10  # a saturated example hardly curves
        optimizer = Adler(model.parameters(), model, criterion, guard=GUARDS, **EXACT)
        (criterion(model(x), y) - 1.1 * criterion(model(x[[i]]), y[[i]])).backward()
        optimizer.step()
        curved += float(optimizer.last_step.curvature) > 0
        assert flat(model).isfinite().all()
    assert curved


def test_a_loss_that_curves_down_is_measured_by_the_fisher_matrix_of_its_outputs():
    class Welsch(nn.Module):
        def forward(self, outputs, targets):
            return (1 - torch.exp(-(outputs - targets).square())).sum()

    model, criterion = nn.Linear(1, 1, bias=False).double(), Welsch()
    x = torch.ones(1, 1).double()
    options = {"guard": TRUST_REGION, **EXACT, **LAST_ITERATE}
    optimizer = Adler(model.parameters(), model, criterion, **options)
    model.weight.data.fill_(0.1)  # convex here
    train(model, criterion, optimizer, [(x, torch.zeros(1, 1).double())])
    convex = float(optimizer.last_step.curvature)
    model.weight.data.fill_(1.5)  # and curved down here
    train(model, criterion, optimizer, [(x, torch.zeros(1, 1).double())])
    slope = 2 * 1.5 * math.exp(-(1.5**2))  # of the output, and of the weight
    assert convex > 0
    assert float(optimizer.last_step.curvature) == pytest.approx(slope**4)
    assert not bool(optimizer.last_step.skipped)


# --- options --------------------------------------------------------------------------------------


def test_curvature_is_measured_every_so_many_steps_and_costs_no_replay_between(tmp_path):
    model, criterion, x, y = classification()
    calls = tmp_path / "calls"  # what a hook holds in Python is put back after a replay

    def count(*_):
        with calls.open("a") as file:
            file.write(".")

    model.register_forward_hook(count)
    measure = Measure(every=3, fraction=1.0, warmup=0)
    optimizer = Adler(model.parameters(), model, criterion, measure=measure)
    curvatures = []
    for _ in range(7):
        train(model, criterion, optimizer, [(x, y)])
        curvatures.append(math.isnan(float(optimizer.last_step.curvature)))
        assert float(optimizer.last_step.effective_lr) > 0
    assert curvatures == [False, True, True, False, True, True, False]
    assert len(calls.read_text()) == 7 + 3


@with_and_without_the_average
def test_weight_decay_is_decoupled_and_leaves_gradients_alone(interpolation):
    model, criterion, x, y = classification()
    start = flat(model)
    options = {"interpolation": interpolation, "weight_decay": 0.01, "guard": TRUST_REGION}
    options |= EXACT
    optimizer = Adler(model.parameters(), model, criterion, **options)
    criterion(model(x), y).backward()
    grads = torch.cat([p.grad.flatten() for p in model.parameters()])
    optimizer.step()
    rate = float(optimizer.last_step.effective_lr)
    torch.testing.assert_close(flat(model), start * (1 - 0.01 * rate) - rate * grads)
    assert grads.equal(torch.cat([p.grad.flatten() for p in model.parameters()]))
    plain, _ = measured(whole_batch)
    assert float(plain.curvature) == float(optimizer.last_step.curvature)


@with_and_without_the_average
def test_groups_have_their_own_multiplier_and_decay(interpolation):
    model, criterion, x, y = classification()
    start = flat(model)
    groups = [
        {"params": [model[0].weight, model[0].bias], "lr": 0.5},
        {"params": list(model[2].parameters()), "weight_decay": 0.1},
    ]
    options = {"interpolation": interpolation, "guard": TRUST_REGION}
    optimizer = Adler(groups, model, criterion, **options)
    criterion(model(x), y).backward()
    grads = torch.cat([p.grad.flatten() for p in model.parameters()])
    optimizer.step()
    rate = float(optimizer.last_step.effective_lr)
    first, second = (float(g["effective_lr"]) for g in optimizer.param_groups)
    assert first == pytest.approx(0.5 * rate)
    assert second == pytest.approx(rate)
    expected = start - rate * grads
    expected[:40] = start[:40] - 0.5 * rate * grads[:40]
    expected[40:] -= 0.1 * rate * start[40:]
    torch.testing.assert_close(flat(model), expected)


def test_frozen_unused_and_late_parameters():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()
            self.unused = nn.Linear(2, 2).double()
            self.body.weight.requires_grad_(False)

        def forward(self, x):
            return self.head(torch.tanh(self.body(x)))

    model, (_, criterion, x, y) = Net(), classification()
    frozen, unused = model.body.weight.clone(), model.unused.weight.clone()
    optimizer = Adler(model.head.parameters(), model, criterion)
    train(model, criterion, optimizer, [(x, y)])
    optimizer.add_param_group({"params": [model.body.weight, model.body.bias]})
    optimizer.add_param_group({"params": model.unused.parameters(), "lr": 0.1})
    bias = model.body.bias.clone()
    train(model, criterion, optimizer, [(x, y)])
    assert model.body.weight.equal(frozen)
    assert model.unused.weight.equal(unused)
    assert not model.body.bias.equal(bias)
    model.body.weight.requires_grad_(True)
    train(model, criterion, optimizer, [(x, y)])
    assert not model.body.weight.equal(frozen)


def test_tied_weights_follow_the_reference():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode, self.decode = nn.Linear(4, 4), nn.Linear(4, 4)
            self.decode.weight = self.encode.weight
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return self.head(torch.tanh(self.decode(torch.tanh(self.encode(x)))))

    torch.manual_seed(0)
    model, (_, criterion, x, y) = Tied().double(), classification()
    expected = run(model, criterion, [(x, y)] * 5)
    optimizer = Adler.as_published(model.parameters(), model, criterion)
    train(model, criterion, optimizer, [(x, y)] * 5)
    torch.testing.assert_close(flat(model), expected.parameters[-1], rtol=1e-9, atol=1e-12)


def test_parameters_of_several_dtypes():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3).double()

        def forward(self, x):
            return self.head(torch.tanh(self.body(x)).double())

    torch.manual_seed(0)
    model, (_, criterion, x, y) = Mixed(), classification()
    optimizer = Adler(model.parameters(), model, criterion)
    before = criterion(model(x.float()), y).item()
    train(model, criterion, optimizer, [(x.float(), y)] * 5)
    assert criterion(model(x.float()), y).item() < before
    assert model.body.weight.dtype == torch.float32


def test_a_fallback_warns_once_and_is_remembered():
    model = nn.Sequential(nn.EmbeddingBag(10, 4), nn.Linear(4, 3))
    criterion = nn.CrossEntropyLoss()
    optimizer = Adler(model.parameters(), model, criterion)
    x, y = torch.randint(10, (8, 3)), torch.randint(3, (8,))
    with pytest.warns(RuntimeWarning, match="_embedding_bag") as caught:
        train(model, criterion, optimizer, [(x, y)] * 4)
    assert [w.filename for w in caught] == [loops.__file__]
    assert optimizer.measure == Measure("finite_difference")
    assert optimizer.state_dict()["search"]["measure"]["jvp"] == "finite_difference"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("jvp", ["forward", "finite_difference"])
def test_autocast_rates_are_near_those_of_float32(dtype, jvp):
    def rates(enabled, jvp):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 5))
        criterion = nn.CrossEntropyLoss()
        x, y = torch.randn(256, 16), torch.randint(5, (256,))
        measure = Measure.every_step(jvp)
        optimizer = Adler(model.parameters(), model, criterion, measure=measure)
        found = []
        for _ in range(5):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype, enabled=enabled):
                loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            found.append(float(optimizer.last_step.minibatch_lr))
        return found

    # The forward engine sees bf16 tangents; the difference divides bf16 noise by a tenth of a step.
    rel = 0.02 if jvp == "forward" else 0.1
    assert rates(True, jvp) == pytest.approx(rates(False, "forward"), rel=rel)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_changes_no_rate_and_a_vetoed_step_changes_nothing(unscale, kind):
    model, criterion, x, y = classification()
    twin, _, _, _ = classification()
    optimizer = MAKERS[kind](model.parameters(), model, criterion)
    plain = MAKERS[kind](twin.parameters(), twin, criterion)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def scaled_step(x):
        optimizer.zero_grad()
        scaler.scale(criterion(model(x), y)).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()

    for _ in range(3):
        scaled_step(x)
        train(twin, criterion, plain, [(x, y)])
        torch.testing.assert_close(flat(model), flat(twin), rtol=1e-10, atol=1e-12)
    state, before = copy.deepcopy(optimizer.state_dict()), flat(model)
    scaled_step(x * math.inf)
    assert scaler.get_scale() < 1024.0
    assert flat(model).equal(before)
    same_but_counted(optimizer.state_dict(), state)
    scaled_step(x)
    train(twin, criterion, plain, [(x, y)])
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-10, atol=1e-12)


def test_as_published_takes_overrides_and_nothing_else():
    model, criterion, _, _ = classification()
    optimizer = Adler.as_published(model.parameters(), model, criterion, beta=0.5)
    assert (optimizer.beta, optimizer.eps, optimizer.guard) == (0.5, 1e-10, None)
    assert optimizer.measure == Measure.every_step()
    (group,) = optimizer.param_groups
    assert group["interpolation"] is None
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (1.0, 0.0, 0.0)
    with pytest.raises(TypeError, match="momentun"):
        Adler.as_published(model.parameters(), model, criterion, momentun=0.9)
    assert type(GaussNewton.as_published(model.parameters(), model, criterion)) is GaussNewton


def test_the_step_count_survives_no_warning_on_a_healthy_run():
    model, criterion, x, y = classification()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = Adler(model.parameters(), model, criterion)
        train(model, criterion, optimizer, [(x, y)] * 30)
    assert int(optimizer.last_step.skipped_total) == 0


@pytest.mark.parametrize("equal", [True, False])
def test_momentum_is_corrected_on_each_device_of_a_model(equal):
    """Tensors that only claim a device: what is on two of them together is an error."""
    devices = ["cuda:0", "cuda:1", "cpu"]
    with FakeTensorMode():
        averages = [torch.zeros(3, device=device) for device in devices]
        steps = [torch.zeros((), device=device) for device in devices]
        corrected = torch._foreach_div(averages, _corrections(steps, 0.9, equal, averages))
        assert [str(part.device) for part in corrected] == devices


@pytest.mark.parametrize("measures", [True, False])
def test_a_step_is_vetoed_for_a_gradient_that_does_not_move(measures):
    """An infinity is seen in a group whose multiplier is zero; slope and loss are finite."""
    model, criterion, x, y = classification()
    groups = [{"params": [model[0].weight]}, {"params": [model[2].weight], "lr": 0.0}]
    measure = Measure(every=1 if measures else 10**6, fraction=1.0, warmup=1)
    optimizer = Adler(groups, model, criterion, measure=measure)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for veto in (False, True):
        optimizer.zero_grad()
        scaler.scale(criterion(model(x), y)).backward()
        if veto:
            model[2].weight.grad[0, 0] = math.inf
            before, rates = flat(model), optimizer.param_groups[0]["rate_weight"]
        scaler.step(optimizer)
        scaler.update()
        assert bool(optimizer.last_step.skipped) == veto
    assert flat(model).equal(before)
    assert optimizer.param_groups[0]["rate_weight"].equal(rates)
