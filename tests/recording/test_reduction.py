"""How a criterion that does not say so makes one loss of those of its examples."""

import copy
import dataclasses
import math

import pytest
import torch
from support.loops import unchanged
from support.options import measuring
from torch import nn

from adler import Adler, curvature
from adler._recording.records import RecordedLoss
from adler._recording.replay import Call
from adler._recording.subbatch import Reduction

CALLS = []  # on how many rows `Own` was called, replays included


class Own(nn.Module):
    """A loss that does not name how it reduces."""

    def __init__(self, reduce):
        super().__init__()
        self.reduce, self.calls = reduce, 0

    def forward(self, outputs, targets):
        self.calls += 1
        CALLS.append(len(outputs))
        return self.reduce((outputs - targets).square().sum(1) + outputs.exp().sum(1))


class Some(nn.Module):
    """The mean over those that count, which are not equally many in the two halves."""

    def forward(self, outputs, targets):
        counts = targets[:, 0] > -0.5
        return ((outputs - targets).square().sum(1) * counts).sum() / counts.sum()


class Pairs(nn.Module):
    """Each output is to be closer to its target than to the others' of the batch."""

    def forward(self, outputs, targets):
        return nn.functional.cross_entropy(outputs @ targets.T, torch.arange(len(outputs)))


REDUCTIONS = {
    "sum": (lambda: Own(torch.sum), 4.0),
    "mean": (lambda: Own(torch.mean), 1.0),
    "mean of some": (Some, 1.0),
    "root of a mean": (lambda: Own(lambda each: each.mean().sqrt()), 1.0),
    "root of a sum": (lambda: Own(lambda each: each.sum().sqrt()), None),
    "log of a sum": (lambda: Own(lambda each: each.logsumexp(0)), None),
    "maximum": (lambda: Own(torch.max), None),
    "square of a sum": (lambda: Own(lambda each: each.sum().square()), None),
    "pairs": (Pairs, None),
}


@pytest.mark.filterwarnings("ignore:curvature is measured on whole batches")
@pytest.mark.parametrize(("made", "factor"), REDUCTIONS.values(), ids=REDUCTIONS)
def test_a_criterion_that_does_not_name_its_reduction(made, factor):
    torch.manual_seed(0)
    model, criterion = nn.Linear(3, 2).double(), made()
    optimizer = Adler(model.parameters(), model, criterion, **measuring(fraction=0.25))
    count = 12 if factor is None else 3
    for _ in range(3):
        x, y = torch.randn(12, 3).double(), torch.randn(12, 2).double()
        twin = copy.deepcopy(model)
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        gradient = [p.grad.clone() for p in model.parameters()]
        with unchanged(criterion):
            optimizer.step()
        c = curvature.quadratic_form(
            twin, twin.parameters(), x[:count], y[:count], made(), gradient
        )
        expected = (factor or 1.0) * float(c)
        assert float(optimizer.last_step.curvature) == pytest.approx(expected, rel=1e-9)


def test_a_criterion_that_is_neither_sum_nor_mean_is_said_to_be_measured_whole():
    model, criterion = nn.Linear(3, 2), Pairs()
    optimizer = Adler(model.parameters(), model, criterion, **measuring(fraction=0.25))
    criterion(model(torch.randn(12, 3)), torch.randn(12, 2)).backward()
    with pytest.warns(RuntimeWarning, match=r"whole batches.*neither a mean nor a sum.*Measure\("):
        optimizer.step()


def test_a_criterion_is_asked_once():
    model, criterion = nn.Linear(3, 2), Own(torch.sum)
    optimizer = Adler(model.parameters(), model, criterion, **measuring(fraction=0.25))
    asked = []
    for step in range(4):
        optimizer.zero_grad()
        criterion(model(torch.randn(12, 3)), torch.randn(12, 2)).backward()
        CALLS.clear()
        optimizer.step()
        asked.append(CALLS.count(6))
        assert criterion.calls == step + 1  # what it is asked leaves no trace
    assert asked == [2, 0, 0, 0]


def test_each_half_meets_the_state_of_the_training_call():
    class Growing(nn.Module):
        times = 1

        def forward(self, outputs, targets):
            self.times *= 2
            noise = torch.rand(()).double()
            return (outputs - targets).square().sum() * self.times * (1 + noise)

    model, criterion = nn.Linear(3, 2).double(), Growing()
    optimizer = Adler(model.parameters(), model, criterion, **measuring(fraction=0.25))
    x, y = torch.randn(12, 3).double(), torch.randn(12, 2).double()
    criterion(model(x), y).backward()
    with unchanged(criterion):
        optimizer.step()  # (a warning, were it not found to be a sum)
    assert criterion.times == 2
    assert optimizer._reduction._known == "sum"


def on_batch(outputs, criterion, **changes):
    """As a loop's call is recorded."""
    y = torch.zeros_like(outputs)
    call = Call.of(nn.Linear(3, outputs.shape[1]), torch.randn(len(outputs), 3))
    return RecordedLoss(call, (y,), outputs, criterion(outputs, y), **changes)


def test_a_batch_that_says_nothing_leaves_the_question_open():
    criterion = Own(torch.sum)
    reduction = Reduction(criterion)
    known = on_batch(torch.randn(8, 2), criterion)
    written = on_batch(torch.randn(8, 2), criterion, version=-1)
    infinite = on_batch(torch.full((8, 2), math.inf), criterion)
    for loss in (
        RecordedLoss(known.call, known.targets),  # explicit targets
        written,
        infinite,
        on_batch(torch.randn(1, 2), criterion),
        on_batch(torch.tensor([[0.0, 0.0]] * 4 + [[9.0, 9.0]] * 4), criterion),
    ):
        assert not reduction.sums(loss)
    assert reduction.sums(known)
    assert reduction.sums(written)  # and then it is closed


def test_a_criterion_that_refuses_halves_is_a_mean():
    class Refusing(nn.Module):
        def forward(self, outputs, targets):
            assert len(outputs) == 8
            return outputs.sum()

    assert not Reduction(Refusing()).sums(on_batch(torch.rand(8, 2), Refusing()))


def test_a_criterion_that_names_its_reduction_is_not_asked():
    criterion = Own(torch.sum)
    criterion.reduction = "mean"
    assert not Reduction(criterion).sums(on_batch(torch.randn(8, 2), criterion))


def test_of_several_processes_none_decides_alone_to_measure_whole_batches():
    torch.manual_seed(0)
    criterion = Own(lambda each: each.sum().square())
    loss = on_batch(torch.rand(8, 2), criterion)
    assert not Reduction(criterion, alone=False).sums(loss)
    with pytest.raises(ValueError, match="neither a mean nor a sum"):
        Reduction(criterion).sums(loss)


def test_several_processes_ask_at_the_same_batch_only():
    """A criterion may wait for the others, which need not have been left without an answer."""
    criterion = Own(torch.sum)
    reduction = Reduction(criterion, alone=False)
    unclear = on_batch(torch.tensor([[0.0, 0.0]] * 4 + [[9.0, 9.0]] * 4), criterion)
    clear = on_batch(torch.randn(8, 2), criterion)
    assert not reduction.sums(unclear)
    CALLS.clear()
    assert not reduction.sums(clear)
    assert not CALLS


def test_a_criterion_may_be_a_value_without_a_hash():
    @dataclasses.dataclass
    class Scaled:
        factor: float

        def __call__(self, outputs, target):
            return self.factor * nn.functional.mse_loss(outputs, target)

    model, criterion = nn.Linear(3, 2), Scaled(2.0)
    optimizer = Adler(model.parameters(), model, criterion, **measuring(fraction=0.25))
    x, y = torch.randn(12, 3), torch.randn(12, 2)
    criterion(model(x), y).backward()
    optimizer.step(targets=y)
    assert bool(optimizer.last_step.trusted)
