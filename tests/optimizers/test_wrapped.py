"""`wrap`: any optimizer's direction at a measured rate."""

import copy
import math
import pickle
import re
import warnings
from collections import defaultdict
from functools import partial

import pytest
import torch
from support.cases import batches, draw, flat, network
from support.loops import NoSynchronisation, same, train, unchanged
from support.options import EXACT, LAST_ITERATE
from torch import nn, optim

from adler import Adler, AdlerAdam, Guard, Measure, Wrapped, curvature, wrap
from adler._averaging import DiscountedMean
from adler._optimizers.wrapped import Displacement

pytestmark = pytest.mark.filterwarnings("ignore:wrap. the step of:RuntimeWarning")

CRITERION = nn.CrossEntropyLoss()
BASES = {
    "sgd": (optim.SGD, {}),
    "sgd momentum": (optim.SGD, {"momentum": 0.9}),
    "sgd dampening": (optim.SGD, {"momentum": 0.9, "dampening": 0.3}),
    "sgd nesterov": (optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "adam": (optim.Adam, {}),
    "adam amsgrad": (optim.Adam, {"amsgrad": True}),
    "adamw": (optim.AdamW, {}),
    "nadam": (optim.NAdam, {}),
    "radam": (optim.RAdam, {}),
    "adamax": (optim.Adamax, {}),
    "rmsprop": (optim.RMSprop, {}),
    "rmsprop all": (optim.RMSprop, {"momentum": 0.8, "centered": True}),
    "adagrad": (optim.Adagrad, {"lr_decay": 0.1}),
}
every_base = pytest.mark.parametrize(("kind", "options"), BASES.values(), ids=BASES)


class Foreign(optim.Adam):
    """Nobody knows how it steps."""


class Lion(optim.Optimizer):
    """Signs of an average (X. Chen et al., arXiv 2302.06675); its step does not know its size."""

    def __init__(self, params):
        super().__init__(params, {"lr": 1e-4, "calls": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["calls"] += 1
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                p.grad.mul_(0.1).add_(mean, alpha=0.9)  # as some do
                p.sub_(group["lr"] * p.grad.sign())
                mean.mul_(0.99).add_(p.grad - 0.9 * mean, alpha=0.1)


needs_muon = pytest.mark.skipif(not hasattr(optim, "Muon"), reason="of PyTorch 2.9")


def muon(params, kind=None, **options):
    kind = optim.Muon if kind is None else kind
    return kind([p for p in params if p.ndim == 2], **options)


def foreign_muon(params, **options):
    """Nobody knows how it steps."""
    return muon(params, type("ForeignMuon", (optim.Muon,), {}), **options)


class Normalised(optim.Optimizer):
    """Adam whose step is as long as the parameter, as that of LAMB (Y. You et al., 1904.00962)."""

    def __init__(self, params, decay=0.0):
        super().__init__(params, {"lr": 1e-3, "decay": decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                mean = state.setdefault("mean", torch.zeros_like(p)).lerp_(p.grad, 0.1)
                square = state.setdefault("square", torch.zeros_like(p)).lerp_(p.grad**2, 0.01)
                step = mean / (square.sqrt() + 1e-12)
                step = step * p.norm() / step.norm().clamp(min=1e-12) + group["decay"] * p
                p.sub_(group["lr"] * step)


class Late(optim.Adam):
    """Does nothing with its first gradient but to count it, as SOAP does."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if "seen" not in self.state[p]:
                    self.state[p].update(seen=torch.ones(()), step=torch.ones(()))
                    self.state[p].update(exp_avg=torch.zeros_like(p))
                    self.state[p].update(exp_avg_sq=torch.zeros_like(p))
                    p.grad = None
        super().step()


class Cautious(optim.SGD):
    """Does nothing where the gradient disagrees (K. Liang et al., 2411.16085)."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p)).lerp_(p.grad, 0.1)
                p.sub_(group["lr"] * mean * (mean * p.grad > 0))


class OwnDecay(optim.SGD):
    """Momentum, and a decay of which its groups say nothing."""

    def __init__(self, params):
        super().__init__(params, momentum=0.9)

    @torch.no_grad()
    def step(self, closure=None):
        for p in (p for group in self.param_groups for p in group["params"]):
            p.mul_(1 - 0.1 * self.param_groups[0]["lr"])
        super().step()


class SignsAndAdam(Lion):
    """Signs for matrices, Adam for the rest."""

    def __init__(self, params):
        params = list(params)
        super().__init__([p for p in params if p.ndim == 2])
        self.other = optim.Adam([p for p in params if p.ndim != 2], lr=1e-4)
        self.add_param_group({"params": self.other.param_groups[0]["params"]})

    def step(self, closure=None):
        matrices, rest = self.param_groups
        self.param_groups = [matrices]
        super().step()
        self.param_groups = [matrices, rest]
        self.other.state, self.other.param_groups[0]["lr"] = self.state, rest["lr"]
        self.other.step()


UNKNOWN = {"foreign": Foreign, "lion": Lion, "normalised": Normalised, "late": Late}
if hasattr(optim, "Muon"):
    UNKNOWN |= {"muon": muon, "foreign muon": foreign_muon}


def wrapped(base, *arguments, kind=Wrapped, **options):
    """Without the warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "wrap: ", RuntimeWarning)
        return kind(base, *arguments, **options)


def setting(make=optim.AdamW, name="mlp-tanh", steps=10, dtype=torch.float64, **options):
    model = network(name).to(dtype)
    optimizer = wrapped(make(model.parameters()), model, CRITERION, **options)
    data = [(x.to(dtype), y) for x, y in batches(name, CRITERION, steps)]
    return model, optimizer, data


def values(optimizer):
    return copy.deepcopy(optimizer.state_dict())


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


# --- bases whose step does not grow with the gradient ---------------------------------------------

ADJUSTMENTS = {
    None: lambda n, m: max(1, n / m) ** 0.5,
    "original": lambda n, m: max(1, n / m) ** 0.5,
    "match_rms_adamw": lambda n, m: 0.2 * max(n, m) ** 0.5,
}
SHAPES = [(6, 6), (5, 9), (9, 4), (1, 7)]


def directed(base, params, gradients, fresh=None, state=None, momenta=None, keep=True):
    """One step's direction."""
    state = defaultdict(dict) if state is None else state
    direction = Displacement(base, params, gradients, state, fresh, momenta)
    direction.finish(torch.tensor(not keep))
    return direction


def newton_schulz(gradient, coefficients, steps):
    """By singular values: each step maps them by the polynomial, and leaves the vectors."""
    u, s, v = torch.linalg.svd(gradient / gradient.norm(), full_matrices=False)
    a, b, c = coefficients
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return u * s @ v


@needs_muon
@pytest.mark.parametrize("make", [muon, foreign_muon], ids=["known", "unknown"])
@pytest.mark.parametrize("adjust", ADJUSTMENTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("steps", "coefficients"), [(5, (3.4445, -4.775, 2.0315)), (2, (1.5, -0.5, 0.0))]
)
def test_of_muon_it_is_newton_schulz_of_this_gradient(make, adjust, shape, steps, coefficients):
    p = nn.Parameter(draw(*shape))
    options = {"adjust_lr_fn": adjust, "ns_steps": steps, "ns_coefficients": coefficients}
    base, state, momenta = make([p], **options), defaultdict(dict), {}
    for seed in range(4):
        g = 0.01 * draw(*shape, seed=seed + 1)
        (found,) = directed(base, [p], [g], state=state, momenta=momenta).along
        wanted = ADJUSTMENTS[adjust](*shape) * newton_schulz(g, coefficients, steps)
        # Muon computes it in bfloat16, whose errors of up to 2⁻⁸ the steps make larger.
        assert (found - wanted).norm() < 0.05 * wanted.norm()


@needs_muon
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("adjust", ADJUSTMENTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_of_muon_without_momentum_it_is_the_step_bit_for_bit(nesterov, adjust, shape, dtype):
    p = nn.Parameter(torch.zeros(shape, dtype=dtype))  # so that the difference is not rounded
    base = muon([p], momentum=0.0, nesterov=nesterov, adjust_lr_fn=adjust)
    for seed in range(3):
        direction = directed(base, [p], [draw(*shape, seed=seed).to(dtype)])
        assert direction.along[0].equal(direction._step[p])
        assert direction.along[0].any()


def kinds(make, steps=5, shapes=((4, 6), (4,))):
    """What is found out about a base, with its last direction and gradients."""
    params = [nn.Parameter(draw(*shape)) for shape in shapes]
    base, state, momenta = make(params), defaultdict(dict), {}
    params = [p for group in base.param_groups for p in group["params"]]
    for seed in range(steps):
        gradients = [0.01 * draw(*p.shape, seed=seed + 1) for p in params]
        last = directed(base, params, gradients, state=state, momenta=momenta)
    names = {3.0: "difference", 4.0: "linear", 5.0: "invariant"}
    names |= {kind + 2.0: f"{name}, drifts" for kind, name in names.items() if kind > 3.0}
    found = [names.get(float(state[p]["kind"]), "open") for p in params]
    return found, last, gradients, base


def signum(params, **options):
    return SignOf(params, momentum=0.9, **options)


class SignOf(optim.SGD):
    """Signs of SGD's step, its decay included (J. Bernstein et al., 1802.04434)."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            before = [p.clone() for p in group["params"]]
            super().step()
            for p, old in zip(group["params"], before):
                p.copy_(old - group["lr"] * (old - p).sign())


KINDS = {
    "adam": (Foreign, "linear"),
    "adam, long memory": (lambda p: Foreign(p, betas=(0.99, 0.999)), "linear"),
    "adam, equal memories": (lambda p: Foreign(p, betas=(0.95, 0.95)), "linear"),
    "adam, decay": (lambda p: Foreign(p, weight_decay=10.0, decoupled_weight_decay=True), "linear"),
    "sgd, momentum": (lambda p: type("S", (optim.SGD,), {})(p, momentum=0.99), "linear"),
    "rmsprop": (type("R", (optim.RMSprop,), {}), "difference"),
    "late": (Late, "linear"),
    "adafactor": (optim.Adafactor, "difference"),
    "cautious": (Cautious, "linear"),
    "own decay": (OwnDecay, "linear, drifts"),
    "lion": (Lion, "invariant"),
    "signum": (signum, "invariant"),
    "signum, coupled decay": (lambda p: signum(p, weight_decay=0.1), "invariant"),
    "normalised": (Normalised, "invariant"),
    "normalised, own decay": (partial(Normalised, decay=0.3), "invariant, drifts"),
}


@pytest.mark.parametrize(("make", "kind"), KINDS.values(), ids=KINDS)
def test_whether_a_step_grows_with_its_gradients_is_found_out(make, kind):
    found, *_ = kinds(make)
    assert found == [kind] * 2


def test_each_parameter_of_a_mixed_base_has_its_own_kind():
    found, last, gradients, _ = kinds(SignsAndAdam)
    assert found == ["invariant", "linear"]
    torch.testing.assert_close(last.along[0], gradients[0].sign())
    # The fraction μ that a base repeats without a gradient is that of its linear steps alone.
    _, alone, *_ = kinds(Foreign, shapes=[(4,)])
    torch.testing.assert_close(last.along[1], alone.along[0], rtol=1e-9, atol=0)


@pytest.mark.parametrize("make", [Lion, signum, lambda p: signum(p, weight_decay=0.5)])
def test_of_a_sign_method_it_is_the_signs_of_this_gradient(make):
    _, last, gradients, _ = kinds(make)
    for part, gradient in zip(last.along, gradients):
        torch.testing.assert_close(part, gradient.sign(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_second_moments_stay_where_averages_of_gradients_are_emptied(decay):
    _, last, gradients, base = kinds(partial(Normalised, decay=decay))
    for p, part, gradient in zip(last._step, last.along, gradients):
        step = gradient / (base.state[p]["square"].sqrt() + 1e-12)
        wanted = step * p.detach().norm() / step.norm()
        torch.testing.assert_close(part, wanted, rtol=1e-9, atol=1e-12)


def test_a_step_that_is_skipped_tells_nothing():
    p, state, momenta = nn.Parameter(draw(4)), defaultdict(dict), {}
    base = Lion([p])
    for seed, keep in enumerate([True, False, True]):
        directed(base, [p], [draw(4, seed=seed)], state=state, momenta=momenta, keep=keep)
        assert float(state[p]["kind"]) == (5.0 if seed == 2 else 0.0)


def test_a_base_that_does_nothing_with_its_first_gradient_goes_on():
    model, optimizer, data = setting(Late)
    train(model, CRITERION, optimizer, data[:3])
    assert int(optimizer.last_step.skipped_total) == 1
    assert float(optimizer.base.state[model[0].weight]["step"]) == 3


def test_a_group_at_rest_stays_where_it_is():
    model, _, data = setting()
    groups = [{"params": layer.parameters()} for layer in (model[0], model[2])]
    for base in (optim.AdamW(groups), Foreign(groups)):
        optimizer = wrapped(base, model, CRITERION)
        optimizer.param_groups[1]["lr"] = 0.0
        first, second = flat(model[0]), flat(model[2])
        train(model, CRITERION, optimizer, data)
        assert flat(model[2]).equal(second)
        assert not flat(model[0]).equal(first)
        assert not int(optimizer.last_step.skipped_total)


def test_one_warning_names_the_parameters_where_a_base_is_scale_invariant():
    model = network("mlp-tanh")
    optimizer = wrapped(SignsAndAdam(model.parameters()), model, CRITERION)
    data = batches("mlp-tanh", CRITERION, 6)
    train(model, CRITERION, optimizer, data[:1])
    with pytest.warns(RuntimeWarning, match=r"scale-invariant.*2 of 4 parameters \(0.w.*2.w"):
        train(model, CRITERION, optimizer, data[1:2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, CRITERION, optimizer, data[2:])


INVARIANT = {"lion": Lion, "signum": signum, "normalised": Normalised, "mixed": SignsAndAdam}
if hasattr(optim, "Muon"):
    INVARIANT |= {"muon": muon, "foreign muon": foreign_muon}


@pytest.mark.parametrize("make", INVARIANT.values(), ids=INVARIANT)
def test_no_step_on_the_whole_batch_is_skipped(make):
    """Where all gradients are nearly alike, the difference of two normalised steps is nothing."""
    model, optimizer, data = setting(make)
    x, y = (torch.cat(parts) for parts in zip(*data))
    before = CRITERION(model(x), y).item()
    for _ in range(200):
        train(model, CRITERION, optimizer, [(x, y)])
        assert not optimizer.last_step.skipped
        (found, step) = ratio(optimizer, model, x, y)
        assert 0.2 < found < 5
        assert step > 0.1
    assert CRITERION(model(x), y).item() < 0.8 * before


@torch.no_grad()
def ratio(optimizer, model, x, y):
    """|D| / |Δ| and the cosine between them, of the step that would come next."""
    optimizer.zero_grad()
    with torch.enable_grad():
        CRITERION(model(x), y).backward()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    direction = optimizer._direction(params, [p.grad for p in params])
    direction.undo()
    both = direction.along, direction._step.values()
    fresh, step = (torch.cat([t.flatten() for t in each]) for each in both)
    return float(fresh.norm() / step.norm()), float(fresh @ step / fresh.norm() / step.norm())


# --- the direction is said ------------------------------------------------------------------------


def test_a_function_says_what_the_fresh_direction_is():
    seen = []

    def fresh(update):
        seen.append(update)
        update.gain = update.gradient.new_tensor(1.0) + (update.gain or 0.0)
        return update.gradient * 2 + 0 * update.parameter

    model, _, data = setting()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = wrap(Foreign(model.parameters()), model, CRITERION, fresh=fresh)
    train(model, CRITERION, optimizer, data[:3])
    squared = sum(p.grad.square().sum() for p in model.parameters())
    assert float(optimizer.last_step.slope) == pytest.approx(2 * float(squared))
    assert [one.started for one in seen] == [False] * 4 + [True] * 8
    assert float(optimizer.state[model[0].weight]["gain"]) == 3.0
    assert copy.deepcopy(optimizer).fresh is fresh


@pytest.mark.parametrize("make", [optim.SGD, Foreign, Lion])
def test_signs_can_be_asked_for(make):
    p, g = nn.Parameter(draw(4)), draw(4, seed=1)
    assert directed(make([p]), [p], [g], "sign").along[0].equal(g.sign())


@pytest.mark.parametrize("rule", [None, "memoryless", "difference"])
def test_a_rule_for_all_parameters_can_be_asked_for(rule):
    p, gradients = nn.Parameter(draw(4)), [draw(4, seed=seed) for seed in range(5)]
    base, state, momenta = Foreign([p]), defaultdict(dict), {}
    for g in gradients:
        before = {key: value.clone() for key, value in base.state[p].items()}
        last = state[p].get("last")
        direction = directed(base, [p], [g], rule, state, momenta)
    assert ("kind" in state[p]) == (rule is None)
    (found,), step = direction.along, direction._step[p]
    square = 0.999 * before["exp_avg_sq"] + 0.001 * g**2
    fresh = 0.1 * g / (1 - 0.9**5) / ((square / (1 - 0.999**5)).sqrt() + 1e-8)
    if rule == "difference":
        square = 0.999 * before["exp_avg_sq"]
        idle = 0.9 * before["exp_avg"] / (1 - 0.9**5)
        fresh = step - idle / ((square / (1 - 0.999**5)).sqrt() + 1e-8)
    memory = 0.0 if rule == "memoryless" else (step - fresh) @ last / (last @ last)
    assert rule == "memoryless" or 0.1 < memory < 0.99
    torch.testing.assert_close(found, fresh / (1 - memory), rtol=1e-9, atol=1e-12)


def test_a_drift_is_no_part_of_the_direction():
    found = {}
    for kind in (OwnDecay, lambda params: type("Momentum", (optim.SGD,), {})(params, momentum=0.9)):
        _, found[kind], *_ = kinds(kind)
    # Nearly: it is a part of the last step, and so of the fraction that is repeated.
    one, other = (torch.cat([part.flatten() for part in each.along]) for each in found.values())
    assert torch.cosine_similarity(one, other, dim=0) > 1 - 1e-9


BAD_FRESH = {
    "name": ("signs", ValueError, "fresh='signs'.*difference, memoryless, sign"),
    "kind": (1.0, TypeError, "fresh: expected a function or a name, got float"),
    "none": (lambda update: None, TypeError, "fresh: expected a tensor, got NoneType"),
    "shape": (lambda update: update.gradient.sum(), ValueError, r"shape \(\) for .* \(5, 4\)"),
}


@pytest.mark.parametrize(("fresh", "error", "match"), BAD_FRESH.values(), ids=BAD_FRESH)
def test_a_bad_fresh_direction_is_named_and_changes_nothing(fresh, error, match):
    with pytest.raises(error, match=match):
        step_with(fresh)


def step_with(fresh):
    model, optimizer, data = setting(fresh=fresh)
    kept, parameters = values(optimizer.base), flat(model)
    try:
        train(model, CRITERION, optimizer, data[:1])
    finally:
        assert same(values(optimizer.base), kept)
        assert flat(model).equal(parameters)


# --- other packages -------------------------------------------------------------------------------

LIONS = {"lion-pytorch": "lion_pytorch", "pytorch_optimizer": "pytorch_optimizer"}


@pytest.mark.parametrize("package", LIONS.values(), ids=LIONS)
def test_lions_of_other_packages_are_known(package):
    kind = pytest.importorskip(package).Lion
    model, _, data = setting()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = wrap(kind(model.parameters(), weight_decay=0.1), model, CRITERION)
    train(model, CRITERION, optimizer, data)
    slope = sum(float(p.grad.abs().sum()) for p in model.parameters())
    assert float(optimizer.last_step.slope) == pytest.approx(slope)


def test_options_that_change_lions_direction_are_noticed():
    kind = pytest.importorskip("pytorch_optimizer").Lion
    model = network("mlp-tanh")
    with pytest.warns(RuntimeWarning, match="Lion is not one of"):
        wrap(kind(model.parameters(), use_gc=True), model, CRITERION)


PEERS = {
    "AdaBelief": "linear",
    "SOAP": "linear",
    "Adan": "linear",
    "ADOPT": "linear",
    "Grams": "linear",
    "SignSGD": "invariant",
    "Tiger": "invariant",
    "SPlus": "invariant",
    "Lamb": "invariant",
}


@pytest.mark.parametrize(("name", "kind"), PEERS.items())
def test_kinds_of_the_optimizers_of_another_package(name, kind):
    package = pytest.importorskip("pytorch_optimizer")
    found, last, gradients, _ = kinds(getattr(package, name), steps=8)
    assert found == [kind] * 2
    assert all((d * g).sum() > 0 for d, g in zip(last.along, gradients))


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
    _mean = DiscountedMean(torch.clone, lambda rate: torch.full_like(rate, 1e-3))


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
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 4])
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
@pytest.mark.parametrize("steps", [0, 5])
def test_resuming_and_copying_continue_bit_for_bit(make, steps, tmp_path):
    # In float64 PyTorch loads NAdam's product of momenta in another dtype than it was made in.
    model, optimizer, data = setting(make, dtype=torch.float32)
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
