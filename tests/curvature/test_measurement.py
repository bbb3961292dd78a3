"""The cheap modes against the exact one; what guards them; what a step may not do."""

import copy
import functools
import math
import random
import warnings
from collections import Counter
from dataclasses import replace

import pytest
import torch
from support.cases import CRITERIA, KINDS, NETWORKS, batches, flat, network
from support.loops import NoSynchronisation, train, unchanged
from support.options import EXACT, MODES, measuring
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from adler import Adler, AdlerAdam, Guard, Measure, curvature
from adler import _tensors as update

ENGINES = ["forward", "finite_difference", "double_backward"]


def setting(name="mlp-tanh", kind=Adler, criterion=None, **options):
    model, criterion = network(name), criterion or nn.CrossEntropyLoss()
    options = {**EXACT, **options}
    return model, criterion, kind(model.parameters(), model, criterion, **options)


# --- accuracy of the curvature --------------------------------------------------------------------


def images(dtype=torch.float32):
    """A convolutional network with BatchNorm, in float32, and three batches."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)
    )
    data = [(torch.randn(64, 3, 8, 8), torch.randint(10, (64,))) for _ in range(3)]
    return model.to(dtype), [(x.to(dtype), y) for x, y in data]


def curvature_beside_exact(jvp, autocast=False, cast=lambda outputs: outputs):
    """Curvatures of three steps, and those along the same directions in float64."""
    model, data = images()
    criterion, found, exact = nn.CrossEntropyLoss(), [], []
    options = {**measuring(jvp), "output_fn": cast}
    optimizer = Adler(model.parameters(), model, criterion, **options)
    for x, y in data:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = criterion(cast(model(x)), y)
        loss.backward()
        twin, direction = (
            copy.deepcopy(model).double(),
            [p.grad.double() for p in model.parameters()],
        )
        c = curvature.quadratic_form(twin, twin.parameters(), x.double(), y, criterion, direction)
        exact.append(float(c))
        optimizer.step()
        found.append(float(optimizer.last_step.curvature))
    return found, exact


@pytest.mark.parametrize(
    ("jvp", "autocast", "rel"),
    [
        ("forward", False, 3e-6),
        ("double_backward", False, 3e-6),
        ("finite_difference", False, 1e-2),
        ("finite_difference", True, 5e-2),
    ],
)
def test_curvature_is_as_exact_as_promised(jvp, autocast, rel):
    found, exact = curvature_beside_exact(jvp, autocast)
    assert found == pytest.approx(exact, rel=rel)


def test_outputs_cast_to_float32_keep_the_step_of_autocast():
    """The rounding is bfloat16's, whatever the dtype that the loss sees."""
    found, exact = curvature_beside_exact("finite_difference", True, torch.Tensor.float)
    assert found == pytest.approx(exact, rel=5e-2)


# --- nothing is touched, whatever happens ---------------------------------------------------------


class Trap(nn.Module):
    """Passes its input on until it is armed, and then only half of the forward pass happens."""

    def __init__(self):
        super().__init__()
        Trap.error = None

    def forward(self, x):
        if Trap.error is not None:  # what a module holds is put back for the replay
            raise Trap.error
        return x


@pytest.mark.parametrize("error", [ValueError("half way"), KeyboardInterrupt()], ids=type)
@pytest.mark.parametrize("options", [{}, {"fraction": 0.5}], ids=["whole", "part"])
@pytest.mark.parametrize("jvp", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_error_in_the_replay_leaves_every_bit(kind, jvp, options, error):
    torch.manual_seed(0)
    layers = [nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), Trap(), nn.Linear(8, 3)]
    model, criterion = nn.Sequential(*layers), nn.CrossEntropyLoss()
    x, y = torch.randn(16, 4), torch.randint(3, (16,))
    options = measuring(jvp, **options)
    optimizer = KINDS[kind](model.parameters(), model, criterion, **options)
    train(model, criterion, optimizer, [(x, y)])
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    before, groups = flat(model), copy.deepcopy(optimizer.state_dict()["param_groups"])
    Trap.error = error
    expected = RuntimeError if isinstance(error, ValueError) else type(error)
    if kind == "spectral":
        expected = type(error)
    with unchanged(model), pytest.raises(expected, match=r"half way|^$"):
        optimizer.step()
    assert flat(model).equal(before)
    for key, value in groups[0].items():
        now = optimizer.param_groups[0][key]
        assert key == "params" or (now.equal(value) if torch.is_tensor(value) else now == value)
    Trap.error = None
    optimizer.step()  # the record is still there
    assert not flat(model).equal(before)


# --- the free check -------------------------------------------------------------------------------


@pytest.mark.parametrize("jvp", ENGINES)
@pytest.mark.parametrize("kind", ["adler", "adam", "gauss-newton"])
@pytest.mark.parametrize("criterion_name", CRITERIA)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_outputs_move_along_the_direction_as_the_gradient_says(name, criterion_name, kind, jvp):
    criterion = CRITERIA[criterion_name]()
    model, criterion, optimizer = setting(name, KINDS[kind], criterion, **measuring(jvp))
    for batch in batches(name, criterion, 3):
        train(model, criterion, optimizer, [batch])
        error = abs(float(optimizer.last_step.consistency) - 1)
        assert error < (1e-2 if jvp == "finite_difference" else 1e-9)


def accumulated(model, criterion, x, y):
    for rows in (slice(0, 4), slice(4, 12)):
        (criterion(model(x[rows]), y[rows]) / 2).backward()


def mixed(model, criterion, x, y):
    outputs = model(x)
    (0.3 * criterion(outputs, y) + 0.7 * criterion(outputs, y.flip(0))).backward()


def twice(model, criterion, x, y):
    loss = criterion(model(x), y)
    loss.backward(retain_graph=True)
    loss.backward()


def zeroed_in_between(model, criterion, x, y):
    loss = criterion(model(x), y)
    loss.backward(retain_graph=True)
    for p in model.parameters():
        p.grad = None
    model(x)
    (7 * loss).backward()


LOOPS = [accumulated, mixed, twice, zeroed_in_between]


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_the_check_holds_for_every_loop_that_the_records_explain(loop):
    model, criterion, optimizer = setting()
    ((x, y),) = batches("mlp-tanh", criterion, 1, size=12)
    loop(model, criterion, x, y)
    optimizer.step()
    assert float(optimizer.last_step.consistency) == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("call", ["targets", "inputs"])
def test_the_check_holds_for_targets_given_to_the_step(call):
    model, criterion, optimizer = setting()
    ((x, y),) = batches("mlp-tanh", criterion, 1)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step(targets=y, **({"inputs": x} if call == "inputs" else {}))
    assert float(optimizer.last_step.consistency) == pytest.approx(1, rel=1e-9)


def test_the_check_holds_under_output_fn():
    model, criterion, optimizer = setting(output_fn=lambda out: out[:, :2])
    ((x, y),) = batches("mlp-tanh", criterion, 1)
    criterion(model(x)[:, :2], y % 2).backward()
    optimizer.step()
    assert float(optimizer.last_step.consistency) == pytest.approx(1, rel=1e-9)


def test_the_check_holds_under_a_grad_scaler():
    model, criterion, optimizer = setting()
    ((x, y),) = batches("mlp-tanh", criterion, 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(criterion(model(x), y)).backward()
    scaler.step(optimizer)
    assert float(optimizer.last_step.consistency) == pytest.approx(1, rel=1e-9)


def clipped(model, optimizer):
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def replaced(model, optimizer):
    for p in model.parameters():
        p.grad = p.grad / 100


def unscaled(model, optimizer):
    torch.amp.GradScaler("cpu", init_scale=4.0).scale(torch.ones(())).item()
    torch._foreach_mul_([p.grad for p in model.parameters()], 0.25)


@pytest.mark.parametrize("change", [clipped, replaced, unscaled], ids=lambda c: c.__name__)
def test_gradients_that_the_loop_has_changed_are_not_judged(change):
    model, criterion, optimizer = setting(**measuring("finite_difference"))
    ((x, y),) = batches("mlp-tanh", criterion, 1)
    criterion(model(x), y).backward()
    change(model, optimizer)
    optimizer.step()
    assert math.isnan(float(optimizer.last_step.consistency))
    assert not optimizer.last_step.skipped


class UnseenDropout(nn.Module):
    """Draws its mask where no replay can find it."""

    random = random.Random(0)

    def forward(self, x):
        mask = [UnseenDropout.random.random() < 0.5 for _ in range(x.shape[1])]
        return 2 * x * torch.tensor(mask, dtype=x.dtype)


def unrepeatable(jvp, steps):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), UnseenDropout(), nn.Linear(32, 3))
    model, criterion = model.double(), nn.CrossEntropyLoss()
    optimizer = Adler(model.parameters(), model, criterion, **measuring(jvp))
    x, y = torch.randn(16, 4).double(), torch.randint(3, (16,))
    train(model, criterion, optimizer, [(x, y)] * steps)
    return optimizer


@pytest.mark.filterwarnings("ignore:measurement contradicts")
@pytest.mark.parametrize("jvp", ENGINES)
def test_a_wrong_mask_is_noticed_and_its_measurement_not_used(jvp):
    optimizer = unrepeatable(jvp, 3)
    last = optimizer.last_step
    assert abs(float(last.consistency) - 1) > 1e-3
    assert not last.trusted
    assert last.skipped  # nothing was ever measured
    assert float(optimizer.param_groups[0]["rate_weight"]) == 0


def test_wrong_masks_for_long_are_an_error():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(RuntimeError, match="none of the first 10 steps could be measured"):
            unrepeatable("finite_difference", 25)
    said = [str(warning.message) for warning in caught]
    assert sum("does not repeat itself" in message for message in said) == 1


@pytest.mark.filterwarnings("ignore:measurement contradicts")
def test_after_a_wrong_measurement_the_average_goes_on_under_the_last_bound():
    model, criterion, optimizer = setting(**measuring("finite_difference"))
    data = batches("mlp-tanh", criterion, 6)
    train(model, criterion, optimizer, data[:5])
    group = optimizer.param_groups[0]
    weight, ratio = group["rate_weight"], group["curvature_total"]
    x, y = data[5]
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    handle = model[0].register_forward_hook(lambda *call: call[2] + 0.1)  # after the training pass
    optimizer.step()
    handle.remove()
    last = optimizer.last_step
    assert not last.trusted
    assert last.clipped
    assert not last.skipped
    assert group["rate_weight"].equal(weight)
    assert group["curvature_total"].equal(ratio)
    assert 0 < float(last.effective_lr) <= 2 / float(ratio) * (1 + 1e-9)


def test_what_the_check_keeps_is_freed_with_the_step():
    model, criterion, optimizer = setting()
    ((x, y),) = batches("mlp-tanh", criterion, 1)
    criterion(model(x), y).backward()
    arrived = optimizer._recorder._backward.arrived
    (kept,) = arrived.values()
    assert kept.shape == (6, 3)
    assert kept.grad_fn is None
    optimizer.step()
    assert not arrived


# --- measuring every so many steps ----------------------------------------------------------------


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("kind", ["adler", "adam", "gauss-newton"])
@pytest.mark.parametrize("name", ["mlp-relu", "cnn", "batchnorm"])
def test_no_step_between_measurements_exceeds_the_guard(name, kind, fraction):
    options = {**measuring(every=4, fraction=fraction), "beta": 0.99}
    options["guard"] = Guard(trust_region=2.0, max_kl=0.01, max_relative_change=None)
    if kind != "adam":
        options["interpolation"] = None
    model, criterion, optimizer = setting(name, KINDS[kind], **options)
    squares, write = [], optimizer._log.write
    optimizer._log.write = lambda found, seen, *more: (
        squares.append(float(seen.squared_norm)),
        write(found, seen, *more),
    )
    bounds = Counter()
    for number, (x, y) in enumerate(batches(name, criterion, 32)):
        # Gradients of very different sizes: a bound of the last measurement would not do.
        scale = 10.0 ** (number % 3 - 1)
        optimizer.zero_grad()
        (scale * criterion(model(x), y)).backward()
        before = flat(model)
        optimizer.step()
        group, last = optimizer.param_groups[0], optimizer.last_step
        rho = float(group["curvature_total"] / group["curvature_weight"])
        if kind != "adam":
            assert squares[-1] == pytest.approx(float(last.slope))
            assert (flat(model) - before).norm() <= float(last.effective_lr) * math.sqrt(
                squares[-1]
            ) * (1 + 1e-9)
        c, rate = rho * squares[-1], float(last.effective_lr)
        kl = math.sqrt(2 * 0.01 * float(group["loss_per_nat"]) / c)
        assert rate <= min(2 * float(last.slope) / c, kl) * (1 + 1e-6)
        bounds["clipped" if last.clipped else "free"] += 1
    assert bounds["clipped"] > 3


def test_the_average_forgets_by_steps_not_by_measurements():
    weights = {}
    for every in (1, 4):
        model, criterion, optimizer = setting(beta=0.9, **measuring(every=every))
        train(model, criterion, optimizer, batches("mlp-tanh", criterion, 60))
        weights[every] = float(optimizer.param_groups[0]["rate_weight"])
    assert weights[1] == pytest.approx(1 / (1 - 0.9), rel=1e-2)
    assert weights[4] == pytest.approx(4 / (1 - 0.9**4), rel=1e-2)


def test_parts_are_averaged_over_one_batch():
    model, criterion, optimizer = setting(**measuring(fraction=0.25))
    train(model, criterion, optimizer, batches("mlp-tanh", criterion, 56, size=8))
    weight = float(optimizer.param_groups[0]["curvature_weight"])
    assert weight == pytest.approx(4, rel=1e-6)


# --- the preset -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_low_cost_is_a_preset_of_every_optimizer(kind):
    model, criterion = network("mlp-tanh"), nn.CrossEntropyLoss()
    make = KINDS[kind].low_cost
    optimizer = make(model.parameters(), model, criterion, beta=0.5)
    assert type(optimizer) is KINDS[kind]
    assert optimizer.measure == Measure("finite_difference", every=8, fraction=0.25, warmup=100)
    assert optimizer.beta == 0.5
    other = measuring("double_backward")
    assert make(model.parameters(), model, criterion, **other).measure == other["measure"]
    with pytest.raises(TypeError, match="momentun"):
        make(model.parameters(), model, criterion, momentun=0.9)


def test_low_cost_survives_the_plateau_where_a_network_without_normalisation_starts():
    """With a ratio that is eight steps old from the start, every ReLU is dead at the end."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten()]
    layers += [nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10)]
    model, criterion = nn.Sequential(*layers), nn.CrossEntropyLoss()
    optimizer = Adler.low_cost(model.parameters(), model, criterion)
    prototypes = torch.rand(10, 1, 8, 8)
    for _ in range(150):
        y = torch.randint(10, (64,))
        x = prototypes[y] + 0.3 * torch.randn(64, 1, 8, 8)
        train(model, criterion, optimizer, [(x, y)])
    assert criterion(model(x), y).item() < 0.5  # guessing: 2.3


def test_low_cost_runs_two_forwards_on_a_quarter_every_eighth_step():
    model, criterion = network("mlp-tanh"), nn.CrossEntropyLoss()
    measure = replace(Measure.low_cost(), warmup=3)
    optimizer = Adler(model.parameters(), model, criterion, measure=measure)
    rows = []

    class Spy(nn.Module):
        """A replay writes to copies of what modules and their hooks hold, not to globals."""

        def forward(self, x):
            if not torch.is_grad_enabled():
                globals()["_rows"].append(len(x))
            return x

    globals()["_rows"] = rows
    model.append(Spy())
    train(model, criterion, optimizer, batches("mlp-tanh", criterion, 17, size=20))
    # Steps 0, 1, 2, 8 and 16; at the first, the whole batch is looked at too.
    assert rows == [20, *[5, 5] * 5]


@pytest.mark.long
@pytest.mark.parametrize("kind", [Adler, AdlerAdam])
def test_low_cost_learns_as_the_exact_optimizer_does(kind):
    def loss(make):
        total = 0.0
        for seed in range(3):
            torch.manual_seed(seed)
            teacher, model = (
                nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)) for _ in range(2)
            )
            criterion = nn.CrossEntropyLoss()
            optimizer = make(model.parameters(), model, criterion)
            for _ in range(200):
                x = torch.randn(64, 8)
                train(model, criterion, optimizer, [(x, (5 * teacher(x)).argmax(1))])
            x = torch.randn(2000, 8)
            with torch.no_grad():
                total += float(criterion(model(x), (5 * teacher(x)).argmax(1)))
        return total / 3

    exact, cheap = loss(functools.partial(kind, **EXACT)), loss(kind.low_cost)
    assert exact < 0.6  # guessing: 1.39
    assert cheap == pytest.approx(exact, abs=0.1)


def test_what_a_checkpoint_does_not_hold_is_as_before_the_first_step():
    model, criterion, optimizer = setting()
    train(model, criterion, optimizer, batches("mlp-tanh", criterion, 3))
    state = copy.deepcopy(optimizer.state_dict())
    del state["param_groups"][0]["curvature_weight"]
    optimizer.load_state_dict(state)
    group = optimizer.param_groups[0]
    assert float(group["curvature_weight"]) == 0
    assert float(group["rate_weight"]) > 0


# --- what a step may not do -----------------------------------------------------------------------


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_in_a_step_waits_for_the_device(kind, options):
    model, criterion, optimizer = setting("batchnorm", KINDS[kind], **options)
    for x, y in batches("batchnorm", criterion, 4):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        with NoSynchronisation():
            optimizer.step()


class Kernels(TorchDispatchMode):
    """Counts ops, but those of a forward pass, and those that only look at shapes."""

    NONE = (
        torch.ops.aten._has_same_storage_numel.default,
        torch.ops.aten.alias.default,
        torch.ops.aten.is_same_size.default,
        torch.ops.aten.detach.default,
    )

    def __init__(self):
        super().__init__()
        self.count, self.paused = Counter(), False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.paused and func not in self.NONE:
            self.count[str(func)] += 1
        return func(*args, **(kwargs or {}))


def kernels(kind, depth, step, **options):
    """Ops of the step of that number outside the model, as on a device with many-tensor kernels."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(depth)], nn.Linear(6, 3))
    criterion = nn.CrossEntropyLoss()
    optimizer = kind(model.parameters(), model, criterion, **options)
    x, y = torch.randn(8, 6), torch.randint(3, (8,))
    train(model, criterion, optimizer, [(x, y)] * step)
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    mode = Kernels()
    model.register_forward_pre_hook(lambda *_: setattr(mode, "paused", True))
    model.register_forward_hook(lambda *_: setattr(mode, "paused", False))
    with mode:
        optimizer.step()
    return mode.count


@pytest.mark.parametrize("step", [1, 2], ids=["between", "measured"])  # the first makes state
@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
@pytest.mark.parametrize("kind", ["adler", "momentum", "adam", "schedule-free", "gauss-newton"])
def test_kernels_do_not_grow_with_the_number_of_parameters(kind, options, step, monkeypatch):
    monkeypatch.setattr(update, "_HOST_DEVICES", ())
    made = {**KINDS, "momentum": functools.partial(Adler, momentum=0.9)}[kind]
    # Short steps: after a long one of the baseline a difference in float32 is no longer trusted.
    counts = [kernels(made, depth, step, lr=0.1, **options) for depth in (2, 12)]
    assert counts[0] == counts[1]
    assert sum(counts[0].values()) < 400  # the first measurements look closely


def test_on_the_host_a_step_between_measurements_is_a_pass_over_the_gradients_and_one_more():
    options = {**measuring(every=2), "interpolation": None}
    options["guard"] = Guard(max_kl=0.1, max_relative_change=None)  # its norms are two passes more
    counts = [kernels(Adler, depth, 1, **options) for depth in (2, 12)]
    assert counts[0] == counts[1]
    assert counts[0]["aten._foreach_norm.Scalar"] == counts[0]["aten._foreach_add_.List"] == 1
    assert sum(counts[0].values()) < 57


def test_a_captured_graph_is_refused_and_nothing_moves(monkeypatch):
    model, criterion, optimizer = setting()
    ((x, y),) = batches("mlp-tanh", criterion, 1)
    criterion(model(x), y).backward()
    before = flat(model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="outside the graph"):
        optimizer.step()
    assert flat(model).equal(before)


def test_a_healthy_run_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for make in (Adler, AdlerAdam):
            model, criterion = network("mlp-relu"), nn.CrossEntropyLoss()
            measure = replace(Measure.low_cost(), every=1)
            optimizer = make(model.parameters(), model, criterion, measure=measure)
            train(model, criterion, optimizer, batches("mlp-relu", criterion, 40, size=16))
            assert not optimizer.last_step.skipped_total
