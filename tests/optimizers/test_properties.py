"""What holds of every trajectory: invariances, equivariances, bounds; networks are drawn."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import NETWORKS, batches, flat, network
from support.loops import train
from support.options import EXACT, GUARDS, LAST_ITERATE, TRUST_REGION
from torch import nn

from adler import Adler, GaussNewton, Guard, Measure

settings.register_profile("properties", deadline=None, max_examples=15, derandomize=True)
EXACT_LAST = {**EXACT, **LAST_ITERATE}
# Of the last iterate, by the curvature of the whole batch.
KINDS = {
    "adler": functools.partial(Adler, **EXACT_LAST),
    "as-published": Adler.as_published,
    "gauss-newton": functools.partial(GaussNewton, **EXACT_LAST),
}
# And as they are by default, where that does not matter: on a part, and averaged.
DEFAULT_KINDS = {**KINDS, "adler default": Adler, "gauss-newton default": GaussNewton}
STEPS = 5
# Without the bounds on how far the network is linear: they know a likelihood and weights' sizes.
CAP_ONLY = {"guard": TRUST_REGION}

every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
every_default_kind = pytest.mark.parametrize("make", DEFAULT_KINDS.values(), ids=DEFAULT_KINDS)
examples = settings(settings.get_profile("properties"))
names = st.sampled_from(sorted(NETWORKS))
seeds = st.integers(0, 10**6)
scales = st.floats(-3, 3).map(lambda exponent: 10**exponent)


def trajectory(make, model, criterion, data, params=None, **options):
    """Parameters after every step, and the records of the steps."""
    groups = model.parameters() if params is None else params
    optimizer = make(groups, model, criterion, **options)
    parameters, records = [], []
    for batch in data:
        train(model, criterion, optimizer, [batch])
        parameters.append(flat(model))
        records.append(optimizer.last_step)
    return torch.stack(parameters), records


def setting(name, seed, criterion):
    return network(name, seed), criterion, batches(name, criterion, STEPS, seed=seed)


def is_baseline(make):
    return getattr(make, "func", make) is GaussNewton


def close(found, expected, rtol=1e-9):
    error, size = (found - expected).norm(), expected.norm()
    assert float(error) <= rtol * float(size), f"relative error {float(error / size):.1e}"


class Scaled(nn.Module):
    """A criterion of one's own, a multiple of cross-entropy."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, outputs, targets):
        return self.factor * nn.functional.cross_entropy(outputs, targets)


# --- invariances ----------------------------------------------------------------------------------


# With s·h in place of h, g and v grow by s and Q by s, so η_k shrinks by s: the step stays. The
# baseline has s² in place of Q, so η_k shrinks by s², and the multiplier s makes up for it.
@every_default_kind
@examples
@given(names, seeds, scales)
def test_the_scale_of_the_loss_does_not_matter(make, name, seed, s):
    lr = s if is_baseline(make) else 1.0
    # The multiplier acts after the guards.
    guards = CAP_ONLY if is_baseline(make) else {"guard": GUARDS}
    plain = trajectory(make, *setting(name, seed, Scaled(1.0)), eps=0.0, **guards)
    scaled = trajectory(make, *setting(name, seed, Scaled(s)), eps=0.0, lr=lr, **guards)
    close(scaled[0], plain[0])
    for a, b in zip(scaled[1], plain[1]):
        assert float(lr * a.minibatch_lr * s) == pytest.approx(float(b.minibatch_lr), rel=1e-8)


# The baseline's ω_i is the criterion's, so that it does not see how examples are reduced.
@every_default_kind
@examples
@given(names, seeds)
def test_the_reduction_does_not_matter(make, name, seed):
    options = {"eps": 0.0, "guard": GUARDS}
    mean, summed = (
        trajectory(make, *setting(name, seed, nn.CrossEntropyLoss(reduction=r)), **options)[0]
        for r in ("mean", "sum")
    )
    close(summed, mean)


@every_default_kind
@examples
@given(names, seeds, st.data())
def test_the_division_into_groups_and_their_order_do_not_matter(make, name, seed, data):
    model, criterion, batches_ = setting(name, seed, nn.CrossEntropyLoss())
    params = data.draw(st.permutations(list(model.parameters())))
    cuts = data.draw(st.lists(st.integers(0, len(params)), max_size=3).map(sorted))
    groups = [{"params": params[a:b]} for a, b in zip([0, *cuts], [*cuts, len(params)])]
    found, _ = trajectory(make, model, criterion, batches_, groups)
    expected, _ = trajectory(make, *setting(name, seed, criterion))
    close(found, expected, rtol=1e-11)


@every_kind
@examples
@given(names, seeds)
def test_the_order_of_examples_does_not_matter(make, name, seed):
    model, criterion, data = setting(name, seed, nn.CrossEntropyLoss())
    orders = [torch.randperm(len(y)) for _, y in data]
    permuted = [(x[order], y[order]) for (x, y), order in zip(data, orders)]
    found, _ = trajectory(make, model, criterion, permuted)
    expected, _ = trajectory(make, *setting(name, seed, criterion))
    close(found, expected)


# θ' = aθ and x' = x/a make the same outputs of F = xθ. Then g' = g/a and v' = v/a², so that
# η'_k = a² η_k and θ' − η' g' = a (θ − η g): the network moves through the same functions. The
# decay η λ θ does too, with λ/a².
@every_default_kind
@examples
@given(seeds, scales, st.floats(0, 0.1))
def test_a_linear_model_in_other_units_moves_through_the_same_functions(make, seed, a, decay):
    def in_units(a):
        torch.manual_seed(seed)
        model, criterion = nn.Linear(4, 3, bias=False).double(), nn.CrossEntropyLoss()
        model.weight.data *= a
        data = [(x / a, y) for x, y in batches("linear", criterion, STEPS, seed=seed)]
        options = {"eps": 0.0, "weight_decay": decay / a**2, **CAP_ONLY}
        return trajectory(make, model, criterion, data, **options)

    (found, records), (expected, plain) = in_units(a), in_units(1.0)
    close(found / a, expected)
    for other, one in zip(records, plain):
        rate, curvature = float(one.minibatch_lr), float(one.curvature)
        assert float(other.minibatch_lr) == pytest.approx(a**2 * rate, rel=1e-8)
        assert float(other.curvature) == pytest.approx(curvature / a**4, rel=1e-8)


# Rotated inputs x' = xR and weights θ' = θR make the same outputs, and ‖g'‖ = ‖gR‖ = ‖g‖.
@every_default_kind
@examples
@given(seeds)
def test_a_rotation_of_the_inputs_rotates_the_trajectory(make, seed):
    def rotated(R):
        torch.manual_seed(seed)
        model, criterion = nn.Linear(4, 3, bias=False).double(), nn.CrossEntropyLoss()
        model.weight.data @= R
        data = [(x @ R, y) for x, y in batches("linear", criterion, STEPS, seed=seed)]
        return trajectory(make, model, criterion, data)[0]

    generator = torch.Generator().manual_seed(seed)
    R, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator).double())
    identity = torch.eye(4).double()
    close(rotated(R).view(STEPS, 3, 4) @ R.T, rotated(identity).view(STEPS, 3, 4))


# --- rates ----------------------------------------------------------------------------------------

CONVEX = {
    "cross-entropy": (nn.CrossEntropyLoss(), lambda y: y),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.2), lambda y: y),
    "mse": (nn.MSELoss(), lambda y: nn.functional.one_hot(y, 3).double()),
    "huber": (nn.HuberLoss(), lambda y: nn.functional.one_hot(y, 3).double()),
    "bce": (nn.BCEWithLogitsLoss(), lambda y: nn.functional.one_hot(y, 3).double()),
    "poisson": (nn.PoissonNLLLoss(), lambda y: nn.functional.one_hot(y, 3).double()),
}


@pytest.mark.parametrize(("criterion", "targets"), CONVEX.values(), ids=CONVEX)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@examples
@given(names, seeds, st.sampled_from([0.01, 1.0, 30.0]))
def test_convex_losses_have_no_negative_curvature(criterion, targets, dtype, name, seed, scale):
    model = network(name, seed)
    for p in model.parameters():
        p.data *= scale
    model.to(dtype)
    optimizer = Adler(model.parameters(), model, criterion)
    ((x, y),) = batches(name, nn.CrossEntropyLoss(), 1, seed=seed)
    x, y = x.to(dtype), targets(y)
    train(model, criterion, optimizer, [(x, y.to(dtype) if y.is_floating_point() else y)])
    assert not float(optimizer.last_step.curvature) < 0  # NaN where exp overflows
    assert flat(model).isfinite().all()


def discounted(rates, beta, kind):
    """The mean of all rates so far, anew from the list."""
    weights = [beta**age for age in reversed(range(len(rates)))]
    if is_baseline(kind):
        return sum(w * r for w, r in zip(weights, rates)) / sum(weights)
    return math.exp(sum(w * math.log(r) for w, r in zip(weights, rates)) / sum(weights))


@every_kind
@pytest.mark.parametrize("radius", [None, 0.5, 2.0])
@examples
@given(names, seeds, st.floats(0, 1), st.lists(scales, min_size=2, max_size=6))
def test_a_rate_is_the_mean_or_the_bound(make, radius, name, seed, beta, sizes):
    """Batches of very different size, so that rates jump and the bound is met."""
    criterion = nn.MSELoss()
    model, data = network("linear", seed), batches("linear", criterion, len(sizes), seed=seed)
    data = [(x * size, y) for (x, y), size in zip(data, sizes)]
    before = flat(model)
    guard = None if radius is None else Guard(radius, max_relative_change=None)
    parameters, records = trajectory(make, model, criterion, data, beta=beta, lr=0.01, guard=guard)
    rates = []
    for record, after in zip(records, parameters):
        rates.append(float(record.minibatch_lr))
        assert rates[-1] == pytest.approx(float(record.slope / record.curvature), rel=1e-6)
        mean = discounted(rates, beta, make)
        bound = math.inf if radius is None else radius * rates[-1]
        assert float(record.effective_lr) == pytest.approx(min(mean, bound), rel=1e-9)
        assert float(record.effective_lr) <= bound
        if not math.isclose(mean, bound, rel_tol=1e-9):
            assert bool(record.clipped) == (mean > bound)
        # and that far it went: ‖Δθ‖ = lr · rate · ‖g‖
        length = 0.01 * float(record.effective_lr) * math.sqrt(float(record.slope))
        assert float((after - before).norm()) == pytest.approx(length, rel=1e-6, abs=1e-12)
        before = after


# On F = xW + b with the squared error, h(θ − ηg) = h − η ‖g‖² + ½ η² gᵀHg exactly, and H is the
# GGN matrix: one step along g lands on the minimum of the line, where the gradient is normal to it.
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("jvp", ["forward", "double_backward"])
@pytest.mark.parametrize("interpolation", [None, 0.9])
@examples
@given(st.integers(1, 7), st.integers(1, 5), st.integers(1, 9), st.booleans(), seeds)
def test_one_step_minimises_least_squares_along_the_gradient(
    reduction, jvp, interpolation, inputs, outputs, size, bias, seed
):
    torch.manual_seed(seed)
    model = nn.Linear(inputs, outputs, bias=bias).double()
    criterion = nn.MSELoss(reduction=reduction)
    x, y = torch.randn(size, inputs).double(), torch.randn(size, outputs).double()
    options = {"interpolation": interpolation, "measure": Measure.every_step(jvp)}
    optimizer = Adler(model.parameters(), model, criterion, eps=0.0, **CAP_ONLY, **options)
    criterion(model(x), y).backward()
    g = torch.cat([p.grad.flatten() for p in model.parameters()])
    optimizer.step()
    design = torch.cat([x, torch.ones(size, 1).double()], 1) if bias else x
    block = torch.cat([p.grad.view(outputs, -1) for p in model.parameters()], 1)
    factor = 2.0 if reduction == "sum" else 2.0 / (size * outputs)
    curvature = factor * (design @ block.T).square().sum()
    assert float(optimizer.last_step.curvature) == pytest.approx(float(curvature), rel=1e-10)
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    after = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert abs(float(after @ g)) <= 1e-11 * float(g @ g)


@every_default_kind
@examples
@given(names, seeds, scales, scales)
def test_a_multiplier_makes_the_step_that_many_times_as_long(make, name, seed, m, n):
    def free(*args, **options):
        return make(*args, **{**options, "guard": Guard(max_relative_change=None)})

    def moved(*multipliers):
        model, criterion, data = setting(name, seed, nn.CrossEntropyLoss())
        start = flat(model)
        params = list(model.parameters())
        groups = [{"params": p, "lr": lr} for p, lr in zip((params[:1], params[1:]), multipliers)]
        parameters, records = trajectory(free, model, criterion, data[:1], groups)
        first = params[0].numel()
        return *(parameters[0] - start).split([first, len(start) - first]), records[0]

    (first, second, measured), (plain, rest, expected) = moved(m, n), moved(1.0, 1.0)
    assert float(measured.effective_lr) == float(expected.effective_lr)
    torch.testing.assert_close(first, m * plain, rtol=1e-9, atol=1e-14 * max(m, 1))
    torch.testing.assert_close(second, n * rest, rtol=1e-9, atol=1e-14 * max(n, 1))
