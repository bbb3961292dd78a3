"""`wrap`: any optimizer's direction at a measured rate."""

import copy
import math
import pickle
import re
from collections import defaultdict
from functools import partial

import pytest
import torch
from support.bases import BASES, CRITERION, UNKNOWN, Foreign, every_base, setting, values, wrapped
from support.cases import batches, draw, flat, network
from support.loops import NoSynchronisation, same, train, unchanged
from support.options import EXACT, LAST_ITERATE
from torch import nn, optim

from adler import Adler, AdlerAdam, Guard, Measure, Wrapped, curvature, wrap
from adler._averaging import DiscountedMean
from adler._optimizers.wrapped import Displacement

pytestmark = pytest.mark.filterwarnings("ignore:wrap. the step of:RuntimeWarning")


# --- what is measured along what ------------------------------------------------------------------


@every_base
def test_under_a_constant_gradient_the_fresh_direction_is_the_step(kind, options):
    p, g = nn.Parameter(draw(4)), draw(4, seed=1)
    options = {"weight_decay": 0.0, **options}
    base, state = kind([p], lr=0.123, **options), defaultdict(dict)
    before = p.detach().clone()
    p.grad = g
    for t in range(30):
        direction = Displacement(base, [p], [g], state)
        (step,) = (direction._step[q] for q in [p])
        torch.testing.assert_close(direction.along[0], step, rtol=1e-6 if t else 1e-12, atol=0)
        direction.finish(torch.tensor(False))
    assert p.equal(before)
    assert base.param_groups[0]["lr"] == 0.123


@every_base
def test_a_base_in_mid_training_is_taken_to_be_in_its_steady_state(kind, options):
    p, g = nn.Parameter(draw(4)), draw(4, seed=1)
    base = kind([p], lr=1e-3, **{"weight_decay": 0.0, **options})
    p.grad = g
    for _ in range(200):
        base.step()
    direction = Displacement(base, [p], [g], defaultdict(dict))
    # RMSprop's gain follows its second moment with a delay.
    torch.testing.assert_close(direction.along[0], direction._step[p], rtol=2e-2, atol=0)


@pytest.mark.parametrize("name", ["mlp-tanh", "cnn"])
@pytest.mark.parametrize("kind", [optim.SGD, optim.RMSprop])
def test_slope_and_curvature_are_those_of_the_fresh_direction(kind, name):
    options = {"guard": None, **EXACT}
    model, optimizer, data = setting(lambda p: kind(p, momentum=0.9), name, **options)
    gains = [0.0 for _ in model.parameters()]
    squares = [torch.zeros_like(p) for p in model.parameters()]
    for x, y in data:
        optimizer.zero_grad()
        CRITERION(model(x), y).backward()
        g = [p.grad.clone() for p in model.parameters()]
        squares = [0.99 * v + 0.01 * t * t for v, t in zip(squares, g)]
        scales = [1.0 if kind is optim.SGD else 1 / (v.sqrt() + 1e-8) for v in squares]
        gains = [0.9 * a + scale for a, scale in zip(gains, scales)]
        d = [a * t for a, t in zip(gains, g)]
        c = curvature.quadratic_form(model, model.parameters(), x, y, CRITERION, d)
        slope = sum((a * b).sum() for a, b in zip(g, d))
        optimizer.step()
        assert float(optimizer.last_step.slope) == pytest.approx(float(slope), rel=1e-9)
        assert float(optimizer.last_step.curvature) == pytest.approx(float(c), rel=1e-9)


class Noisy:
    """A regression with much noise, in batches of eight."""

    def __init__(self, seed):
        torch.manual_seed(seed)
        self.x = torch.randn(400, 10).double() * torch.logspace(0, -1.5, 10).double()
        self.y = self.x @ torch.randn(10, 1).double() + 0.5 * torch.randn(400, 1).double()
        layers = nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 1)
        self.model, self.criterion = nn.Sequential(*layers).double(), nn.MSELoss()

    def train(self, base, steps=150, **options):
        """Logarithms of the loss of all examples, and of the mean of the minibatch rates."""
        model, criterion, rates = self.model, self.criterion, []
        optimizer = wrapped(base(model.parameters()), model, criterion, **options)
        for _ in range(steps):
            rows = torch.randint(400, (8,))
            train(model, criterion, optimizer, [(self.x[rows], self.y[rows])])
            rates.append(float(optimizer.last_step.minibatch_lr))
        with torch.no_grad():
            loss = float(criterion(model(self.x), self.y))
        positive = [math.log(rate) for rate in rates[20:] if rate > 0]
        return math.log(loss), sum(positive) / len(positive)


class AlongTheStep(Wrapped):
    """The naive rule: what the base does is what is measured along."""

    def _direction(self, params, gradients):
        direction = Displacement(self.base, params, gradients, self.state)
        direction.along = [direction._step[p] for p in params]
        return direction


NAIVE = {
    # The base, and how many times larger the naive rates are at least.
    "adam": (optim.Adam, 1.7),
    "foreign": (Foreign, 1.7),
}


# A step that is normalised after averaging is as long as that of one gradient: not larger there.
# Along an average the slope is often negative, so that there is no step.
@pytest.mark.long
@pytest.mark.filterwarnings("ignore:the last .* steps were skipped")
@pytest.mark.parametrize(("base", "factor"), NAIVE.values(), ids=NAIVE)
def test_along_an_averaged_step_rates_are_too_large_and_training_is_worse(base, factor):
    def run(kind):
        options = {"kind": kind, "guard": Guard(max_relative_change=None), "beta": 0.99, **EXACT}
        return torch.tensor([Noisy(seed).train(base, **options) for seed in (0, 1, 2)]).mean(0)

    (safe_loss, safe_rate), (naive_loss, naive_rate) = run(Wrapped), run(AlongTheStep)
    assert naive_rate - safe_rate > math.log(factor)
    assert naive_loss > safe_loss + 0.1
    assert safe_loss < math.log(0.32)  # the noise alone is 0.25


@pytest.mark.parametrize(("kind", "options"), [(optim.SGD, {"momentum": 0.9}), (optim.Adam, {})])
def test_what_is_measured_of_an_unknown_base_is_close_to_what_is_known(kind, options):
    """The same steps, by a subclass of the base, which is not known."""
    unknown = type("Unknown", (kind,), {})
    known, found = (Noisy(0).train(partial(which, **options)) for which in (kind, unknown))
    assert found == pytest.approx(known, abs=0.2)


def test_one_warning_names_an_unknown_base_and_says_what_is_done():
    model = network("mlp-tanh")
    with pytest.warns(RuntimeWarning, match="Foreign is not one of.*stepping twice") as caught:
        optimizer = wrap(Foreign(model.parameters()), model, CRITERION)
    assert [entry.filename for entry in caught] == [__file__]
    train(model, CRITERION, optimizer, batches("mlp-tanh", CRITERION, 3))
    assert int(optimizer.base.state[model[0].weight]["step"]) == 3


@pytest.mark.row("Any base optimizer: Prodigy", versions=["prodigyopt"])
def test_a_third_party_optimizer_trains():
    prodigyopt = pytest.importorskip("prodigyopt")
    loss, _ = Noisy(0).train(prodigyopt.Prodigy)
    assert loss < math.log(0.4)  # 1.9 at the start, the noise alone is 0.25


# --- equivalences ---------------------------------------------------------------------------------


@pytest.mark.row("Any base optimizer: SGD, AdamW")
@pytest.mark.parametrize("measure", [Measure(), Measure.every_step(), Measure(every=3, warmup=0)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["mlp-relu", "transformer"])
def test_with_adamw_it_is_adler_adam(name, weight_decay, measure):
    base = partial(optim.AdamW, weight_decay=weight_decay)
    free = Guard(max_relative_change=None)  # of the base's step its decay is a part
    model, optimizer, data = setting(base, name, measure=measure, guard=free)
    twin, options = network(name), {"measure": measure, "guard": free}
    options["weight_decay"] = weight_decay
    other = AdlerAdam(twin.parameters(), twin, CRITERION, **options)
    train(model, CRITERION, optimizer, data)
    train(twin, CRITERION, other, data)
    # The bias of attention's keys has a gradient of rounding errors, which Adam makes large.
    close = {"rtol": 1e-6, "atol": 1e-7} if name == "transformer" else {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(flat(model), flat(twin), **close)


@pytest.mark.row("Any base optimizer: SGD, AdamW")
@pytest.mark.parametrize("lr", [1e-3, 7.0, torch.tensor(0.3)], ids=["small", "large", "tensor"])
def test_with_sgd_it_is_adler(lr):
    model, optimizer, data = setting(lambda p: optim.SGD(p, lr=lr))
    twin = network("mlp-tanh")
    train(model, CRITERION, optimizer, data)
    train(twin, CRITERION, Adler(twin.parameters(), twin, CRITERION, **LAST_ITERATE), data)
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-12, atol=1e-14)


class Pinned(Wrapped):
    _mean = DiscountedMean(torch.clone, lambda rate: torch.full_like(rate, 1e-3), torch.ones_like)


@every_base
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_at_a_pinned_rate_it_is_the_base(kind, options, weight_decay):
    model, twin = network("mlp-tanh"), network("mlp-tanh")
    options = {**options, "weight_decay": weight_decay}
    with torch.random.fork_rng():
        base = kind(model.parameters(), **options)
        optimizer = Pinned(base, model, CRITERION, guard=None)
        plain = kind(twin.parameters(), **{**options, "lr": 1e-3})
        data = batches("mlp-tanh", CRITERION, 10)
        train(model, CRITERION, optimizer, data)
        train(twin, CRITERION, plain, data)
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-11, atol=1e-13)


# --- the base's state -----------------------------------------------------------------------------

ALL = {name: lambda p, k=kind, o=options: k(p, **o) for name, (kind, options) in BASES.items()}
ALL |= UNKNOWN
any_base = pytest.mark.parametrize("make", ALL.values(), ids=ALL)


@any_base
@pytest.mark.parametrize(("bad", "at"), [(math.nan, 0), (math.inf, 4)])
def test_a_skipped_step_leaves_the_base_as_it_was(make, bad, at):
    model, optimizer, data = setting(make)
    train(model, CRITERION, optimizer, data[:at])
    kept, parameters = values(optimizer.base), flat(model)
    train(model, CRITERION, optimizer, [(torch.full_like(data[0][0], bad), data[0][1])])
    assert optimizer.last_step.skipped
    assert same(values(optimizer.base), kept)
    assert flat(model).equal(parameters)
    twin, other, _ = setting(make)
    train(twin, CRITERION, other, data)
    train(model, CRITERION, optimizer, data[at:])
    assert flat(model).equal(flat(twin))


class Overflowing(nn.Module):
    """May be infinite, at a gradient that is not."""

    offset = 0.0

    def forward(self, outputs, targets):
        return nn.functional.cross_entropy(outputs, targets) + self.offset


@pytest.mark.parametrize("make", [optim.Adam, Foreign], ids=["known", "unknown"])
def test_a_loss_that_is_not_finite_is_noticed_after_the_base_has_stepped(make):
    model, criterion = network("mlp-tanh"), Overflowing()
    optimizer = wrapped(make(model.parameters()), model, criterion)
    data = batches("mlp-tanh", CRITERION, 4)
    train(model, criterion, optimizer, data[:3])
    kept, parameters = values(optimizer.base), flat(model)
    criterion.offset = math.inf
    train(model, criterion, optimizer, data[3:])
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert optimizer.last_step.skipped
    assert same(values(optimizer.base), kept)
    assert flat(model).equal(parameters)


# Of the whole batch the criterion complains, once the base has stepped; a part is not even taken.
ERRORS = {"part": ({}, "refuses outputs"), "whole": (EXACT, "refuses outputs")}


@any_base
@pytest.mark.parametrize(("options", "match"), ERRORS.values(), ids=ERRORS)
def test_an_error_in_the_measurement_leaves_the_base_as_it_was(make, options, match):
    model, optimizer, data = setting(make, **options)
    train(model, CRITERION, optimizer, data[:2])
    kept, parameters = values(optimizer), flat(model)
    CRITERION(model(data[2][0]), data[2][1]).backward()
    with pytest.raises(ValueError, match=match):
        optimizer.step(inputs=data[2][0], targets=torch.zeros(5, dtype=torch.long))
    assert same(values(optimizer), kept)
    assert flat(model).equal(parameters)


def test_an_error_in_the_base_leaves_everything_as_it_was():
    class Failing(optim.Adam):
        def step(self, closure=None):
            super().step()
            if self.state[self.param_groups[0]["params"][0]]["step"] == 3:
                raise ArithmeticError("no")

    model, optimizer, data = setting(Failing)
    train(model, CRITERION, optimizer, data[:2])
    kept, parameters = values(optimizer), flat(model)
    with pytest.raises(ArithmeticError):
        train(model, CRITERION, optimizer, data[2:3])
    assert same(values(optimizer), kept)
    assert flat(model).equal(parameters)


@any_base
def test_the_base_steps_once_and_leaves_the_gradients(make):
    model, optimizer, data = setting(make)
    for number, (x, y) in enumerate(data[:3], start=1):
        optimizer.zero_grad()
        CRITERION(model(x), y).backward()
        with unchanged(model):
            optimizer.step()
        for state in optimizer.base.state.values():
            assert int(state.get("step", number)) == number
        assert optimizer.base.param_groups[0].get("calls", number) == number


@any_base
@pytest.mark.parametrize("steps", [0, 3])
def test_resuming_and_copying_continue_bit_for_bit(make, steps, tmp_path):
    # In float64 PyTorch loads NAdam's product of momenta in another dtype than it was made in.
    model, optimizer, data = setting(make, steps=6, dtype=torch.float32)
    train(model, CRITERION, optimizer, data[:steps])
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "file")
    copied, copied_optimizer = copy.deepcopy((model, optimizer))
    twin, other, _ = setting(make, dtype=torch.float32, beta=0.5, lr=0.3)
    states = torch.load(tmp_path / "file")
    twin.load_state_dict(states[0])
    other.load_state_dict(states[1])
    for each, its in ((model, optimizer), (copied, copied_optimizer), (twin, other)):
        train(each, CRITERION, its, data[steps:])
    assert flat(copied).equal(flat(model))
    assert flat(twin).equal(flat(model))
    assert same(values(other), values(optimizer))


def test_a_copy_of_the_optimizer_alone_has_its_own_model_and_base():
    model, optimizer, data = setting()
    train(model, CRITERION, optimizer, data[:3])
    before = flat(model)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert twin.base is not optimizer.base
        train(twin.model, twin.criterion, twin, data[3:])
        assert flat(model).equal(before)
        assert not flat(twin.model).equal(before)


def test_a_state_without_a_base_or_of_other_groups_is_refused():
    _, optimizer, _ = setting()
    kept = values(optimizer)
    with pytest.raises(ValueError, match="no 'base'"):
        optimizer.load_state_dict({key: kept[key] for key in ("state", "param_groups")})
    model = network("mlp-tanh")
    groups = [{"params": layer.parameters()} for layer in (model[0], model[2])]
    other = wrap(optim.AdamW(groups), model, CRITERION)
    with pytest.raises(ValueError, match="loaded state dict"):
        optimizer.load_state_dict(other.state_dict())
    assert same(values(optimizer), kept)


# --- groups, schedulers, scalers ------------------------------------------------------------------


def test_groups_are_those_of_the_base_and_a_late_one_goes_to_both():
    model, _, data = setting()
    base = optim.AdamW(model[0].named_parameters(), lr=0.7, weight_decay=0.3)
    optimizer = wrap(base, model, CRITERION, lr=0.5)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    train(model, CRITERION, optimizer, data[:3])
    late = {"params": model[2].named_parameters(), "lr": 0.25, "betas": (0.5, 0.9)}
    optimizer.add_param_group(late)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]
    assert [group["betas"] for group in base.param_groups] == [(0.9, 0.999), (0.5, 0.9)]
    before = flat(model[2])
    train(model, CRITERION, optimizer, data[3:])
    first, second = (float(group["effective_lr"]) for group in optimizer.param_groups)
    assert second == pytest.approx(0.5 * first)
    assert not flat(model[2]).equal(before)


@pytest.mark.parametrize("bad", [{"betas": (2.0, 0.9)}, {"lr": -1.0}, {"maximize": True}])
def test_a_bad_late_group_changes_neither(bad):
    model, _, data = setting()
    optimizer = wrap(optim.AdamW(model[0].parameters()), model, CRITERION)
    kept = values(optimizer)
    if "betas" in bad:  # PyTorch does not look at them
        bad = {"params": [torch.ones(2)]}
    with pytest.raises(ValueError, match=r"lr=-1.0|maximize|not a parameter"):
        optimizer.add_param_group({"params": model[2].parameters(), **bad})
    assert same(values(optimizer), kept)
    train(model, CRITERION, optimizer, data[:2])


def test_a_group_added_behind_its_back_is_noticed():
    model, _, data = setting()
    optimizer = wrap(optim.AdamW(model[0].parameters()), model, CRITERION)
    optimizer.base.add_param_group({"params": model[2].parameters()})
    with pytest.raises(RuntimeError, match="add_param_group of the wrapper"):
        train(model, CRITERION, optimizer, data[:1])


def test_a_scheduler_of_the_wrapper_multiplies_the_measured_rate():
    model, optimizer, data = setting()
    scheduler = optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for k, batch in enumerate(data[:4]):
        train(model, CRITERION, optimizer, [batch])
        measured = float(optimizer.last_step.effective_lr)
        rate = float(optimizer.param_groups[0]["effective_lr"])
        assert rate == pytest.approx(0.5**k * measured)
        scheduler.step()


def test_a_step_that_a_scaler_vetoes_leaves_the_base():
    model, optimizer, data = setting()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for number, (x, y) in enumerate(data[:3]):
        optimizer.zero_grad()
        loss = CRITERION(model(x), y) * (math.inf if number == 1 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert int(optimizer.last_step.skipped_total) == 1
    assert int(optimizer.base.state[model[0].weight]["step"]) == 2


def test_only_the_first_step_of_a_known_base_makes_the_host_wait():
    # PyTorch's own loops read step counts and signs on the host unless they are fused.
    model, optimizer, data = setting(lambda p: optim.AdamW(p, fused=True))
    for number, (x, y) in enumerate(data):
        optimizer.zero_grad()
        CRITERION(model(x), y).backward()
        if number == 0:
            optimizer.step()
            continue
        with NoSynchronisation():
            optimizer.step()


# --- what is refused ------------------------------------------------------------------------------

BAD = {
    "no optimizer": (lambda m: "adam", TypeError, "base: expected a torch.optim.Optimizer"),
    "measures": (lambda m: Adler(m.parameters(), m, CRITERION), TypeError, "Adler measures"),
    "closure": (lambda m: optim.LBFGS(m.parameters()), TypeError, r"LBFGS\.step\(\) needs 'clos"),
    "maximises": (lambda m: optim.Adam(m.parameters(), maximize=True), ValueError, "maximize=True"),
    "foreign": (lambda m: optim.Adam([torch.ones(2)]), ValueError, "not a parameter of the model"),
}


@pytest.mark.parametrize(("make", "error", "match"), BAD.values(), ids=BAD)
def test_a_bad_base_is_named(make, error, match):
    model = network("mlp-tanh")
    base = make(model)
    hooks = len(model._forward_hooks)
    with pytest.raises(error, match=match):
        wrap(base, model, CRITERION)
    assert len(model._forward_hooks) == hooks


@pytest.mark.parametrize("options", [{"eps": -1.0}, {"lr": math.nan}, {"beta": 1.1}])
def test_a_bad_option_is_named(options):
    ((key, value),) = options.items()
    with pytest.raises(ValueError, match=re.escape(f"{key}={value!r}")):
        setting(**options)


def test_an_unknown_option_is_refused():
    with pytest.raises(TypeError, match="weight_decay"):
        setting(weight_decay=0.1)


def test_a_base_that_moves_parameters_without_a_gradient_leaves_them():
    class Shrinks(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            super().step()
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(0.9)

    model, criterion = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)]), nn.CrossEntropyLoss()
    model.forward = lambda x: model[0](x)
    optimizer = wrap(Shrinks(model.parameters(), 1.0), model, criterion, fresh="sign")
    before = copy.deepcopy(model[1].state_dict())
    criterion(model(torch.randn(8, 4)), torch.randint(3, (8,))).backward()
    optimizer.step()
    assert all(value.equal(before[name]) for name, value in model[1].state_dict().items())
