"""What a base's step is measured along: known by its kind, found by steps, or said."""

import copy
import warnings
from collections import defaultdict
from functools import partial

import pytest
import torch
from support.bases import (
    CRITERION,
    Cautious,
    Foreign,
    Late,
    Lion,
    Normalised,
    OwnDecay,
    SignsAndAdam,
    foreign_muon,
    muon,
    needs_muon,
    setting,
    values,
    wrapped,
)
from support.cases import batches, draw, flat, network
from support.loops import same, train
from torch import nn, optim

from adler import wrap
from adler._optimizers.wrapped import Displacement

pytestmark = pytest.mark.filterwarnings("ignore:wrap. the step of:RuntimeWarning")


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
    "adam, decay": (lambda p: type("W", (optim.AdamW,), {})(p, weight_decay=10.0), "linear"),
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


@pytest.mark.long
@pytest.mark.parametrize("make", INVARIANT.values(), ids=INVARIANT)
def test_no_step_on_the_whole_batch_is_skipped(make):
    """Where all gradients are nearly alike, the difference of two normalised steps is nothing."""
    model, optimizer, data = setting(make)
    x, y = (torch.cat(parts) for parts in zip(*data))
    before = CRITERION(model(x), y).item()
    for number in range(200):
        train(model, CRITERION, optimizer, [(x, y)])
        assert not optimizer.last_step.skipped
        if number % 5 == 0:  # it steps the base as often as a step does
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
