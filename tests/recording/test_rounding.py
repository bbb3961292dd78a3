"""Autocast inside the model: neither its call nor its outputs tell how coarse they are."""

import copy

import pytest
import torch
from torch import nn

from adler import Adler, Measure
from adler._recording.replay import Call
from adler._recording.rounding import autocast_inside
from adler.curvature import quadratic_form
from adler.curvature.difference import coarsest_dtype


class Inside(nn.Module):
    """As Accelerate wraps a model."""

    def __init__(self, enabled=True):
        super().__init__()
        torch.manual_seed(0)
        layers = (part for _ in range(4) for part in (nn.Linear(32, 32), nn.GELU()))
        self.body, self.enabled = nn.Sequential(*layers, nn.Linear(32, 5)), enabled

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
            return self.body(x).float()


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 32, generator=generator)
    return x, torch.randint(5, (64,), generator=generator)


class Widened(nn.Linear):
    """Weights in half precision, outputs that do not show it."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype)).double()


def test_checks_are_as_coarse_as_the_weights():
    model, criterion = Widened(32, 5).bfloat16(), nn.CrossEntropyLoss()
    optimizer = Adler(model.parameters(), model, criterion, measure=Measure.every_step())
    x, y = batch(0)
    criterion(model(x), y).backward()
    optimizer.step()  # which would warn
    assert bool(optimizer.last_step.trusted)


@pytest.mark.parametrize(("enabled", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_replay_tells_how_coarse_the_model_is(enabled, dtype):
    model = Inside(enabled)
    call = Call.of(model, batch(0)[0])
    outputs = call(dict(model.named_parameters()))
    assert outputs.dtype == torch.float32
    assert coarsest_dtype(call, outputs.dtype) == dtype
    assert autocast_inside(copy.deepcopy(model)) == frozenset()


@pytest.mark.parametrize("jvp", ["forward", "finite_difference"])
def test_curvature_is_that_of_wide_numbers_but_for_its_rounding(jvp):
    """Once the first replay has told; a difference over the step of float32 would be rounding."""
    model, criterion = Inside(), nn.CrossEntropyLoss()
    optimizer = Adler(
        model.parameters(), model, criterion, measure=Measure.every_step(jvp), interpolation=None
    )
    for step in range(4):
        x, y = batch(step)
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        twin = Inside(enabled=False)
        twin.load_state_dict(model.state_dict())
        twin.forward = lambda x, twin=twin: twin.body(x)
        twin.double()
        direction = [p.grad.double() for p in model.parameters()]
        known = float(quadratic_form(twin, twin.parameters(), x.double(), y, criterion, direction))
        optimizer.step()
        if step:
            assert float(optimizer.last_step.curvature) == pytest.approx(known, rel=0.3)
            assert not bool(optimizer.last_step.clipped)
    assert optimizer.measure.jvp == jvp
