"""How far a finite difference steps."""

import math
from dataclasses import replace

import pytest
import torch
from support.cases import batches, network
from support.loops import NoSynchronisation, train
from support.options import measuring
from torch import nn

from adler import Adler, Measure
from adler._recording.records import RecordedLoss
from adler._recording.replay import Call
from adler.curvature import measurement
from adler.curvature.difference import difference_step, loss_value_of


def scalar(value):
    return torch.tensor(float(value), dtype=torch.float64)


def step(rate=None, loss=math.nan, slope=1.0, squared_norm=1.0, dtype=torch.float64, call=None):
    call = Call.of(nn.Identity(), torch.ones(1)) if call is None else call
    numbers = {
        "loss_value": scalar(loss),
        "slope": scalar(slope),
        "squared_norm": scalar(squared_norm),
    }
    with NoSynchronisation():
        found = difference_step(call, dtype, rate=None if rate is None else scalar(rate), **numbers)
    return float(found)


def test_it_is_a_fraction_of_the_shorter_known_length():
    assert step(rate=2.0, loss=30.0, slope=10.0) == pytest.approx(2e-6)
    assert step(rate=2.0, loss=3.0, slope=10.0) == pytest.approx(0.3e-6)
    assert step(rate=2.0) == pytest.approx(2e-6)


def test_before_the_first_rate_it_is_more_careful():
    assert step(loss=8.0, slope=2.0) == pytest.approx(1e-6)
    assert step(rate=math.nan, loss=8.0, slope=2.0) == pytest.approx(1e-6)


@pytest.mark.parametrize("rate", [None, math.nan, 0.0, -1.0, math.inf])
@pytest.mark.parametrize("loss", [math.nan, 0.0, -1.0, math.inf])
def test_with_neither_length_known_the_parameters_move_a_little(rate, loss):
    assert step(rate=rate, loss=loss, squared_norm=16.0) == pytest.approx(1e-3 / 4)


def test_coarser_rounding_takes_longer_steps_whatever_the_outputs_are_cast_to():
    steps = [step(rate=1.0, dtype=t) for t in (torch.float64, torch.float32, torch.float16)]
    steps.append(step(rate=1.0, dtype=torch.bfloat16))
    assert steps == sorted(steps)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        call = Call.of(nn.Identity(), torch.ones(1))
    assert step(rate=1.0, dtype=torch.float32, call=call) == steps[-1]


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="an older PyTorch")
@pytest.mark.parametrize(
    ("device", "layer", "of_products", "of_convolutions", "fraction"),
    [
        ("cuda", nn.Conv1d(1, 1, 1), "none", "tf32", 2e-2),  # PyTorch's default
        ("cuda", nn.Linear(1, 1), "none", "tf32", 2e-3),
        ("cuda", nn.Conv1d(1, 1, 1), "none", "none", 2e-3),
        ("cuda", nn.Linear(1, 1), "tf32", "none", 2e-2),
        ("cpu", nn.Conv1d(1, 1, 1), "tf32", "tf32", 2e-3),
    ],
)
def test_products_that_a_gpu_rounds_take_longer_steps(
    device, layer, of_products, of_convolutions, fraction
):
    backends = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [backend.fp32_precision for backend in backends]
    call = replace(Call.of(layer, torch.ones(1)), devices=(torch.device(device),))
    one = torch.ones(())
    options = {"rate": one, "loss_value": 3 * one, "slope": one, "squared_norm": one}
    try:
        for backend, precision in zip(backends, (of_products, of_convolutions)):
            backend.fp32_precision = precision
        assert float(difference_step(call, torch.float32, **options)) == pytest.approx(fraction)
        assert float(difference_step(call, torch.float64, **options)) == pytest.approx(1e-6)
    finally:
        for backend, precision in zip(backends, before):
            backend.fp32_precision = precision


def test_the_height_is_what_was_backpropagated():
    call = Call.of(nn.Identity(), torch.ones(1))
    first, second = (RecordedLoss(call, (), value=scalar(v)) for v in (2.0, 5.0))
    second.factor = 4.0  # of a part: the value is the whole's
    weights = {first: scalar(0.5), second: scalar(3.0 * 4.0)}
    assert float(loss_value_of([first, second], weights, scalar(0))) == pytest.approx(
        0.5 * 2 + 3 * 5
    )
    second.value = None
    assert math.isnan(float(loss_value_of([first, second], weights, scalar(0))))


@pytest.mark.parametrize("factor", [1e-4, 1e4])
def test_the_measured_curvature_does_not_depend_on_the_scale_of_the_loss(factor):
    def measured(scale):
        model, criterion = network("mlp-relu").float(), nn.CrossEntropyLoss()
        optimizer = Adler(model.parameters(), model, criterion, **measuring("finite_difference"))
        found = []
        for x, y in batches("mlp-relu", criterion, 3, size=32):
            optimizer.zero_grad()
            (scale * criterion(model(x.float()), y)).backward()
            optimizer.step()
            found.append(float(optimizer.last_step.curvature) / scale**3)
        return found

    # c of f·h along f·g is f³ c
    assert measured(factor) == pytest.approx(measured(1.0), rel=1e-2)


class Raised(nn.Module):
    """A loss with a constant in it: its value says nothing, and the first difference is wrong."""

    def forward(self, outputs, targets):
        return nn.functional.cross_entropy(outputs, targets) + 3e8


def skipped_steps_of_a_raised_loss():
    model, raised = network("mlp-tanh"), Raised()
    optimizer = Adler(model.parameters(), model, raised, **measuring("finite_difference"))
    skipped = []
    for x, y in batches("mlp-tanh", raised, 5):
        optimizer.zero_grad()
        raised(model(x), y).backward()
        optimizer.step()
        skipped.append(bool(optimizer.last_step.skipped))
    assert float(optimizer.last_step.consistency) == pytest.approx(1, abs=1e-2)
    return optimizer, skipped


def test_a_first_step_that_was_too_long_is_followed_by_a_shorter_one(monkeypatch):
    monkeypatch.setattr(measurement, "_others", lambda *_: [])  # no other engine takes over
    with pytest.warns(RuntimeWarning, match="contradicts the training pass"):
        optimizer, skipped = skipped_steps_of_a_raised_loss()
    assert skipped[0]
    assert not any(skipped[2:])
    assert optimizer.measure.jvp == "finite_difference"


def test_where_a_difference_is_wrong_an_exact_engine_takes_over():
    with pytest.warns(RuntimeWarning, match="jvp='forward' agrees with it") as caught:
        optimizer, skipped = skipped_steps_of_a_raised_loss()
    assert len(caught) == 1
    assert not any(skipped)
    assert optimizer.measure.jvp == "forward"


@pytest.mark.filterwarnings("ignore:forward-mode AD is not available")
@pytest.mark.parametrize("autocast", [False, True])
def test_where_forward_mode_falls_back_the_first_step_is_a_finite_differences(autocast):
    found = []
    for jvp in ("forward", "finite_difference"):
        torch.manual_seed(0)
        model, criterion = (
            nn.Sequential(nn.EmbeddingBag(10, 4), nn.Linear(4, 3)),
            nn.CrossEntropyLoss(),
        )
        optimizer = Adler(model.parameters(), model, criterion, **measuring(jvp))
        x, y = torch.randint(10, (8, 3)), torch.randint(3, (8,))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        found.append(float(optimizer.last_step.curvature))
    assert found[0] == found[1]


def test_a_difference_that_is_lost_in_rounding_is_said_to_be():
    """A batch that is learnt by heart: large outputs, and hardly a gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 5))
    x, y, criterion = torch.randn(16, 16), torch.randint(5, (16,)), nn.CrossEntropyLoss()
    measure = Measure.every_step("finite_difference")
    optimizer = Adler(model.parameters(), model, criterion, measure=measure)
    with pytest.warns(RuntimeWarning, match=r"lost in the rounding.*jvp='forward' agrees"):
        train(model, criterion, optimizer, [(x, y)] * 100)
    assert float(criterion(model(x), y).detach()) < 1e-5
    assert bool(optimizer.last_step.trusted)
    assert int(optimizer.last_step.skipped_total) == 0
