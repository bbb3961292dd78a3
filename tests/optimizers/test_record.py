"""What is said of steps that do not move: why, and what to do."""

import warnings

import pytest
import torch
from support.loops import train
from torch import nn

from adler import Adler, AdlerScheduleFree, wrap

ce = nn.CrossEntropyLoss()
X, Y = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


class Times(nn.Module):
    """The loss in units that are of no use."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, f, y):
        return self.factor * ce(f, y)


# Criterion, dtype of the model, optimizer, what is said.
CASES = {
    "NaN": (Times(float("nan")), torch.float32, Adler, "is not finite. Look for NaN"),
    "no gradient": (Times(0.0), torch.float32, Adler, "the gradient is zero"),
    "float16 that underflows": (Times(1e-9), torch.float16, Adler, "GradScaler"),
    "an Adam in float16": (
        ce,
        torch.float16,
        lambda p, m, c: wrap(torch.optim.AdamW(p), m, c),
        "keep the parameters in float32",
    ),
}
every_case = pytest.mark.parametrize(
    ("criterion", "dtype", "make", "why"), CASES.values(), ids=CASES
)


def run(criterion, dtype, make, steps):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)
    optimizer = make(model.parameters(), model, criterion)
    train(model, criterion, optimizer, [(X.to(dtype), Y)] * steps)
    return optimizer


@every_case
def test_the_warning_says_why_once(criterion, dtype, make, why):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(criterion, dtype, make, 30)
    said = [str(w.message) for w in caught if "steps were skipped" in str(w.message)]
    assert len(said) == 1
    assert why in said[0]


@every_case
@pytest.mark.filterwarnings("ignore:the last 10 steps were skipped")
def test_a_run_that_never_moves_is_an_error(criterion, dtype, make, why):
    with pytest.raises(RuntimeError, match=f"none of the first 100 steps moved.*{why}"):
        run(criterion, dtype, make, 101)


@pytest.mark.filterwarnings("ignore:the last 10 steps were skipped")
def test_a_run_that_has_moved_is_not_ended():
    model = nn.Linear(4, 3)
    optimizer = AdlerScheduleFree(model.parameters(), model, ce)
    bad = (X * float("nan"), Y)
    train(model, ce, optimizer, [(X, Y), *[bad] * 150, (X, Y)])
    assert int(optimizer.last_step.skipped_total) == 150
    assert not bool(optimizer.last_step.skipped)


def test_a_scaler_that_looks_for_its_scale_is_no_error():
    model = nn.Linear(4, 3)
    optimizer = AdlerScheduleFree(model.parameters(), model, ce)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    for _ in range(12):
        optimizer.zero_grad()
        scaler.scale(100 * ce(model(X), Y)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert 0 < int(optimizer.last_step.skipped_total) < 10
    assert not bool(optimizer.last_step.skipped)
