"""Outputs that the loop flattens before the criterion: divided by examples, or measured whole."""

import copy

import pytest
import torch
from support.options import measuring
from torch import nn

from adler import Adler, curvature

RUN = []  # what `Words` ran on, replays included


class Words(nn.Module):
    """Logits of each word of a sentence."""

    def __init__(self, batch_first=True):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 5)
        self.mix = nn.GRU(8, 8, batch_first=batch_first)
        self.seen = []
        self.double()

    def forward(self, x):
        self.seen.append(tuple(x.shape))
        RUN.append(tuple(x.shape))
        return self.head(self.mix(self.embed(x))[0])


def of_the_first_three(twin, x, y, criterion, gradient, output_fn):
    """The curvature of three examples, computed apart."""
    params, targets = twin.parameters(), y[:3].flatten()
    return curvature.quadratic_form(
        twin, params, x[:3], targets, criterion, gradient, output_fn=output_fn
    )


FLATTENINGS = {
    "view": lambda out: out.view(-1, 5),
    "reshape": lambda out: out.reshape(-1, out.shape[-1]),
    "flatten": lambda out: out.flatten(0, 1),
    "contiguous": lambda out: out.contiguous().view(-1, 5),
    "twice": lambda out: out.view(8, 18, 5).view(-1, 5),
}


@pytest.mark.parametrize("flat", FLATTENINGS.values(), ids=FLATTENINGS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("jvp", ["forward", "finite_difference", "double_backward"])
def test_outputs_that_the_loop_flattens_are_divided(flat, reduction, jvp):
    model, twin = Words(), Words()
    criterion = nn.CrossEntropyLoss(reduction=reduction, ignore_index=4)
    x, y = torch.randint(11, (12, 12)), torch.randint(5, (12, 12))
    optimizer = Adler(model.parameters(), model, criterion, **measuring(jvp, fraction=0.25))
    criterion(flat(model(x)), y.view(-1)).backward()
    gradient = [p.grad.clone() for p in model.parameters()]
    model.seen.clear()
    optimizer.step()
    assert model.seen == []  # as it was; the replays were of copies
    c = of_the_first_three(twin, x, y, criterion, gradient, lambda out: out.flatten(0, 1))
    factor = 4.0 if reduction == "sum" else 1.0
    rel = 1e-3 if jvp == "finite_difference" else 1e-9
    last = optimizer.last_step
    assert float(last.curvature) == pytest.approx(factor * float(c), rel=rel)
    assert bool(last.trusted)
    assert float(last.consistency) == pytest.approx(1, abs=1e-3)  # of a look at the whole batch


@pytest.mark.parametrize(("fraction", "replayed"), [(0.25, 3), (1.0, 12)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("flat", FLATTENINGS.values(), ids=FLATTENINGS)
def test_of_outputs_that_the_loop_flattens_a_part_is_replayed(flat, reduction, fraction, replayed):
    model, criterion = Words(), nn.CrossEntropyLoss(reduction=reduction, ignore_index=4)
    data = [(torch.randint(11, (12, 12)), torch.randint(5, (12, 12))) for _ in range(3)]
    optimizer = Adler(model.parameters(), model, criterion, **measuring(fraction=fraction))
    for number, (x, y) in enumerate(data):
        optimizer.zero_grad()
        criterion(flat(model(x)), y.view(-1)).backward()
        gradient = [p.grad.clone() for p in model.parameters()]
        twin = copy.deepcopy(model)
        RUN.clear()
        optimizer.step()
        # The first measurement looks at the whole batch, too.
        assert ([(12, 12)] if number == 0 and fraction < 1 else []) + [(replayed, 12)] == RUN
        c = curvature.quadratic_form(
            twin,
            twin.parameters(),
            x[:replayed],
            y[:replayed].flatten(),
            criterion,
            gradient,
            output_fn=flat if fraction == 1 else lambda out: out.flatten(0, 1),
        )
        factor = 12 / replayed if reduction == "sum" else 1.0
        assert float(optimizer.last_step.curvature) == pytest.approx(factor * float(c), rel=1e-9)


class Turned(nn.Module):
    """Takes the batch first and returns time first, or the other way; random to no check's good."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.drop, self.head = nn.Embedding(11, 8), nn.Dropout(0.5), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.drop(torch.tanh(self.embed(x)))).transpose(0, 1).contiguous()


class Cells(nn.Module):
    """Sequence first, with a cell called for one word of all sentences after the other."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.cell, self.head = nn.Embedding(11, 8), nn.GRUCell(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        state, found = torch.zeros(x.shape[1], 8, dtype=self.head.weight.dtype), []
        for words in self.embed(x):
            state = self.cell(words, state)
            found.append(self.head(state))
        return torch.stack(found)


class Attends(nn.Module):
    """PyTorch's own layer as it comes: sequence first."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 5)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)

    def forward(self, x):
        return self.head(self.layer(self.embed(x)))


@pytest.mark.parametrize("kind", [Turned, Cells, Attends])
def test_no_part_is_taken_along_time(kind):
    model, criterion = kind().double(), nn.CrossEntropyLoss()
    x = torch.randint(11, (12, 8))
    y = torch.randint(5, (8, 12) if kind is Turned else (12, 8))
    measured = []
    for fraction in (0.25, 1.0):
        twin = copy.deepcopy(model)
        torch.manual_seed(1)
        optimizer = Adler(twin.parameters(), twin, criterion, **measuring(fraction=fraction))
        criterion(twin(x).view(-1, 5), y.flatten()).backward()
        optimizer.step()
        measured.append(float(optimizer.last_step.curvature))
    assert measured[0] == pytest.approx(measured[1], rel=1e-9)


def test_one_of_several_outputs_that_the_loop_flattens_is_divided():
    class Heads(Words):
        def forward(self, x):
            found = super().forward(x)
            return torch.cat([found, 2 * found], -1).chunk(2, -1)

    model, criterion = Heads(), nn.CrossEntropyLoss()
    x, y = torch.randint(11, (12, 12)), torch.randint(5, (12, 12))
    twin = copy.deepcopy(model)
    optimizer = Adler(model.parameters(), model, criterion, **measuring(fraction=0.25))
    criterion(model(x)[1].reshape(-1, 5), y.flatten()).backward()
    gradient = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    c = of_the_first_three(twin, x, y, criterion, gradient, lambda out: out[1].reshape(-1, 5))
    assert float(optimizer.last_step.curvature) == pytest.approx(float(c), rel=1e-9)
    assert bool(optimizer.last_step.trusted)


WHOLE = {  # what the loop makes of the outputs, of the targets, and whether the batch comes first
    "the batch is the second dimension": (lambda out: out.view(-1, 5), lambda y: y.flatten(), 0),
    "scaled": (lambda out: (out / 2).view(-1, 5), lambda y: y.flatten(), 1),
    "transposed": (lambda out: out.transpose(1, 2), lambda y: y, 1),
    "a part": (lambda out: out[:, 1:].reshape(-1, 5), lambda y: y[:, 1:].flatten(), 1),
    "time first": (lambda out: out.transpose(0, 1).reshape(-1, 5), lambda y: y.T.flatten(), 1),
}


@pytest.mark.parametrize(("made", "targets", "first"), WHOLE.values(), ids=WHOLE)
def test_other_outputs_are_measured_whole(made, targets, first):
    model, criterion = Words(batch_first=bool(first)), nn.CrossEntropyLoss()
    x, y = torch.randint(11, (12, 12)), torch.randint(5, (12, 12))
    expected = copy.deepcopy(model)
    optimizer = Adler(model.parameters(), model, criterion, **measuring(fraction=0.25))
    criterion(made(model(x)), targets(y)).backward()
    gradient = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    c = curvature.quadratic_form(
        expected, expected.parameters(), x, targets(y), criterion, gradient, output_fn=made
    )
    assert float(optimizer.last_step.curvature) == pytest.approx(float(c), rel=1e-9)
