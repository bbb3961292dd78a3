"""A learning rate of another optimizer is not taken for a multiplier without a word."""

import math
import warnings

import pytest
import torch
from support.cases import batches, network
from support.loops import train
from torch import nn
from torch.optim import lr_scheduler

from adler import Adler, AdlerAdam, AdlerScheduleFree
from adler._optimizers.multiplier import MultiplierCheck

KINDS = [Adler, AdlerAdam, AdlerScheduleFree]
STEPS = 300


def said(rate, steps=STEPS, kind=Adler, start=0):
    """Messages of a run in which the loop writes ``rate(k)`` into every group."""
    model, criterion = nn.Linear(4, 3).double(), nn.CrossEntropyLoss()
    optimizer = kind(model.parameters(), model, criterion)
    data = batches("linear", criterion, 1) * steps
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for k, batch in enumerate(data[start:], start=start):
            for group in optimizer.param_groups:
                group["lr"] = rate(k)
            train(model, criterion, optimizer, [batch])
    return [str(w.message) for w in caught if "multiplies the measured" in str(w.message)]


def warm_up(most, over):
    return lambda k: most * min(1.0, (k + 1) / over)


@pytest.mark.parametrize("kind", KINDS)
def test_a_foreign_rate_is_said_once_within_the_first_steps(kind):
    (message,) = said(lambda k: 6e-4, steps=10, kind=kind)
    assert "lr=0.0006" in message
    assert "1667 times" in message
    assert "delete it" in message


@pytest.mark.parametrize(
    "rate",
    [warm_up(6e-4, 100), warm_up(1e-3, 5), lambda k: 0.01 * 0.99**k, lambda k: 0.1],
    ids=["warm-up", "short warm-up", "decay", "SGD's usual rate"],
)
def test_foreign_schedules_are_said_when_they_no_longer_rise(rate):
    assert len(said(rate)) == 1


@pytest.mark.parametrize(
    "rate",
    [
        lambda k: 1.0,
        lambda k: (1 + math.cos(math.pi * k / STEPS)) / 2,
        warm_up(1.0, 250),
        warm_up(1.0, 10_000),
        lambda k: 0.2,
        lambda k: 0.0,
    ],
    ids=["one", "cosine", "warm-up", "long warm-up", "a fifth", "frozen"],
)
def test_legitimate_multipliers_are_quiet(rate):
    assert not said(rate)


def test_a_run_resumed_at_the_end_of_its_schedule_is_quiet():
    model, criterion = network("mlp-tanh"), nn.CrossEntropyLoss()
    optimizer = Adler(model.parameters(), model, criterion)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 20)
    data = batches("mlp-tanh", criterion, 30)
    for batch in data[:18]:
        train(model, criterion, optimizer, [batch])
        scheduler.step()
    other = Adler(model.parameters(), model, criterion)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] < 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, criterion, other, data[18:])


def test_one_group_at_its_default_keeps_it_quiet():
    """Others may be slowed down on purpose."""
    model, criterion = network("mlp-tanh"), nn.CrossEntropyLoss()
    groups = [{"params": model[0].parameters(), "lr": 1e-3}, {"params": model[2].parameters()}]
    optimizer = Adler(groups, model, criterion)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, criterion, optimizer, batches("mlp-tanh", criterion, 12))
    assert torch.is_tensor(optimizer.param_groups[0]["effective_lr"])


# --- warm-ups, of a rate and of the multiplier ----------------------------------------------------

LONG = 20_000


def said_at(rates):
    """The step, counted from 1, at which the check speaks; None: not within ``LONG`` steps."""
    check = MultiplierCheck()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for k, groups in enumerate(rates):
            check.observe(groups, k)
            if caught:
                return k + 1
            if groups[0]["lr"] >= 0.5:  # a multiplier, without doubt
                return None
    return None


def written(rate):
    """Groups as a loop leaves them that writes ``rate(k)`` at step ``k``."""
    return ([{"lr": rate(k)}] for k in range(LONG))


def scheduled(make, every=1, start=1.0):
    """Groups as a scheduler leaves them that makes a step after ``every`` steps."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=start)
    scheduler = make(optimizer)
    for k in range(LONG):
        yield optimizer.param_groups
        optimizer.step()
        if (k + 1) % every == 0 and scheduler.last_epoch < getattr(scheduler, "total_steps", LONG):
            scheduler.step()


@pytest.mark.parametrize("start", [0.0, 1 / 3], ids=["from zero", "from a third"])
@pytest.mark.parametrize("over", [0, 100, 500, 2000])
@pytest.mark.parametrize("peak", [3e-4, 6e-4, 1e-3])
def test_a_warm_up_of_a_foreign_rate_is_said_within_tens_of_steps(peak, over, start):
    """nanoGPT's lines: the rate of AdamW, written at every step."""

    def rate(k):
        return peak * min(1.0, start + (1 - start) * (k + 1) / (over + 1))

    assert said_at(written(rate)) <= 16


@pytest.mark.parametrize("over", [5, 10, 20, 50])
def test_a_short_one_is_said_soon_after_its_end(over):
    assert said_at(written(lambda k: 1e-3 * min(1.0, (k + 1) / over))) <= max(16, 4 * over)


def test_a_foreign_rate_of_a_scheduler_is_said():
    """Noam's, an absolute rate beside ``lr=1``; and a linear one beside the rate itself."""

    def noam(k):
        return 512**-0.5 * min((k + 1) ** -0.5, (k + 1) * 4000**-1.5)

    assert said_at(scheduled(lambda o: lr_scheduler.LambdaLR(o, noam))) == 8
    linear = scheduled(lambda o: lr_scheduler.LinearLR(o, 0.01, total_iters=1000), start=6e-4)
    assert said_at(linear) == 8
    falling = scheduled(lambda o: lr_scheduler.CosineAnnealingLR(o, 10), every=100, start=6e-4)
    assert said_at(falling) == 8


@pytest.mark.parametrize("over", [10, 100, 2000, 10_000, 40_000])
@pytest.mark.parametrize("start", [0.0, 1e-4, 0.001, 0.01, 0.1, 1 / 3])
def test_a_linear_warm_up_of_the_multiplier_is_quiet(start, over):
    if start > 0:
        linear = scheduled(lambda o: lr_scheduler.LinearLR(o, start, total_iters=over))
        assert said_at(linear) is None
    assert said_at(written(lambda k: min(1.0, start + (1 - start) * k / over))) is None


@pytest.mark.parametrize("anneal", ["cos", "linear"])
@pytest.mark.parametrize("divided", [25.0, 1e4])
@pytest.mark.parametrize("total", [30, 1000, LONG, 100_000])
def test_one_cycle_to_one_is_quiet(total, divided, anneal):
    def make(optimizer):
        return lr_scheduler.OneCycleLR(
            optimizer, 1.0, total, anneal_strategy=anneal, div_factor=divided, cycle_momentum=False
        )

    assert said_at(scheduled(make)) is None


@pytest.mark.parametrize("every", [1, 7, 400])
def test_a_warm_up_before_a_cosine_is_quiet_by_steps_and_by_epochs(every):
    def make(optimizer):
        warm = lr_scheduler.LinearLR(optimizer, 0.01, total_iters=5)
        fall = lr_scheduler.CosineAnnealingLR(optimizer, 40)
        return lr_scheduler.SequentialLR(optimizer, [warm, fall], [5])

    assert said_at(scheduled(make, every)) is None


@pytest.mark.parametrize("over", [100, 2000, 20_000, 100_000])
@pytest.mark.parametrize(
    "shape",
    [
        lambda s: 1e-4 ** (1 - s),
        lambda s: 1e-6 ** (1 - s),
        lambda s: s**2,
        lambda s: s**0.5,
        lambda s: (1 - math.cos(math.pi * s)) / 2,
        lambda s: 1 - math.exp(-4 * s),
    ],
    ids=["exponential", "from a millionth", "square", "root", "cosine", "saturating"],
)
def test_other_shapes_are_quiet(shape, over):
    rates = written(lambda k: shape(min(1.0, (k + 1) / over)))
    assert said_at(rates) is None
    by_lambda = scheduled(
        lambda o: lr_scheduler.LambdaLR(o, lambda k: shape(min(1.0, (k + 1) / over)))
    )
    assert said_at(by_lambda) is None


def test_rates_held_in_single_precision_are_judged_alike():
    def tensors(most, over):
        return ([{"lr": torch.tensor(warm_up(most, over)(k))}] for k in range(LONG))

    assert said_at(tensors(6e-4, 2000)) == 8
    assert said_at(tensors(1.0, 10_000)) is None
