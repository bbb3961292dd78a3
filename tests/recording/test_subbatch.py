"""Curvature on a part of the batch: of the same function, on its first examples."""

import copy
import functools
import math

import pytest
import torch
from support.cases import CRITERIA, NETWORKS, batches, flat, network
from support.loops import train, unchanged
from support.options import EXACT, measuring
from torch import nn

from adler import Adler, AdlerAdam, GaussNewton, curvature
from adler._recording.records import RecordedLoss
from adler._recording.replay import Call
from adler._recording.subbatch import Reduction, first_half, take_first


def first_step(model, criterion, x, y, kind=Adler, **options):
    """The gradient and the record of one step."""
    optimizer = kind(model.parameters(), model, criterion, **options)
    criterion(model(x), y).backward()
    gradient = [p.grad.clone() for p in model.parameters()]
    with unchanged(model):
        optimizer.step()
    return gradient, optimizer.last_step


def form(criterion, outputs, tangents, targets):
    """``vᵀ ∇²L v``, by differentiating the loss twice."""
    at = outputs.detach().clone()
    loss = functools.partial(criterion, target=targets)
    return (torch.autograd.functional.hvp(loss, at, tangents)[1] * tangents).sum()


@pytest.mark.parametrize("jvp", ["forward", "finite_difference", "double_backward"])
@pytest.mark.parametrize("criterion_name", CRITERIA)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_curvature_is_that_of_the_first_examples_along_the_whole_gradient(
    name, criterion_name, jvp
):
    model, twin, criterion = network(name), network(name), CRITERIA[criterion_name]()
    ((x, y),) = batches(name, criterion, 1, size=10)
    gradient, last = first_step(model, criterion, x, y, **measuring(jvp, fraction=0.25))
    c = curvature.quadratic_form(twin, twin.parameters(), x[:3], y[:3], criterion, gradient)
    factor = 10 / 3 if criterion.reduction == "sum" else 1.0
    exact = jvp != "finite_difference"
    assert float(last.curvature) == pytest.approx(factor * float(c), rel=1e-9 if exact else 1e-3)
    size = sum(float(g.square().sum()) for g in gradient)
    assert float(last.slope) == pytest.approx(size)
    # The first of the three examples, and the other two, are two samples of their curvature.
    outputs, tangents = curvature.jvp(twin, twin.parameters(), x[:3], gradient)
    of_one = float(form(criterion, outputs[:1], tangents[:1], y[:1]))
    of_one *= 3.0 if criterion.reduction == "sum" else 1.0
    variance = (of_one / float(c) - 1) ** 2 * (1 / 2) * (1 - 3 / 10)
    expected = size / float(last.curvature) / math.exp(min(variance, 1) / 2)
    assert float(last.minibatch_lr) == pytest.approx(expected, rel=1e-6 if exact else 1e-2)
    assert float(last.consistency) == pytest.approx(1, abs=1e-3)  # of a look at the whole batch


@pytest.mark.parametrize("criterion_name", CRITERIA)
@pytest.mark.parametrize("kind", [Adler, GaussNewton])
def test_parts_that_make_up_the_batch_average_to_its_curvature(kind, criterion_name):
    criterion = CRITERIA[criterion_name]()
    ((x, y),) = batches("mlp-tanh", criterion, 1, size=12)

    def measured(shift, fraction):
        rolled = x.roll(shift, 0), y.roll(shift, 0)
        options = {"kind": kind, **measuring(fraction=fraction)}
        return float(first_step(network("mlp-tanh"), criterion, *rolled, **options)[1].curvature)

    parts = [measured(shift, 0.25) for shift in (0, 3, 6, 9)]
    assert sum(parts) / 4 == pytest.approx(measured(0, 1.0), rel=1e-9)
    assert max(parts) > 1.01 * min(parts)


def test_both_forwards_of_a_finite_difference_draw_the_same_mask():
    criterion = nn.CrossEntropyLoss()

    def measured(jvp):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 32), nn.Dropout(0.5), nn.Tanh(), nn.Linear(32, 3))
        x, y = torch.randn(16, 4).double(), torch.randint(3, (16,))
        options = measuring(jvp, fraction=0.5)
        return float(first_step(model.double(), criterion, x, y, **options)[1].curvature)

    assert measured("finite_difference") == pytest.approx(measured("forward"), rel=1e-3)


def test_flattened_outputs_keep_each_examples_rows_together():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 5)

        def forward(self, tokens):
            return self.head(torch.tanh(self.embed(tokens)))

    torch.manual_seed(0)
    model, criterion = Tagger().double(), nn.CrossEntropyLoss(ignore_index=0)
    tokens, tags = torch.randint(11, (6, 7)), torch.randint(5, (6, 7))
    options = {"output_fn": lambda out: out.flatten(0, 1), **measuring(fraction=0.5)}
    optimizer = Adler(model.parameters(), model, criterion, **options)
    criterion(model(tokens).flatten(0, 1), tags.flatten()).backward()
    gradient = [p.grad.clone() for p in model.parameters()]
    reference = curvature.quadratic_form(
        model,
        model.parameters(),
        tokens[:3],
        tags[:3].flatten(),
        criterion,
        gradient,
        output_fn=options["output_fn"],
    )
    optimizer.step()
    assert float(optimizer.last_step.curvature) == pytest.approx(float(reference), rel=1e-9)


def test_losses_of_one_call_share_their_part():
    model, x = nn.Linear(4, 3), torch.randn(8, 4)
    call, criterion = Call.of(model, {"input": x}), nn.CrossEntropyLoss()
    losses = [RecordedLoss(call, (torch.full((8,), label),)) for label in (0, 1)]
    first, second = take_first(losses, 0.5, Reduction(criterion))
    assert first.call is second.call is not call
    assert first.call.kwargs["input"].equal(x[:4])
    assert take_first(losses, 1.0, Reduction(criterion)) is losses


def test_a_batch_without_examples_is_its_own_part():
    loss = RecordedLoss(Call.of(nn.Linear(4, 3), torch.randn(0, 4)), (torch.zeros(0),))
    assert take_first([loss], 0.5, Reduction(nn.MSELoss())) == [loss]


@pytest.mark.parametrize(("fraction", "rows"), [(1e-9, 2), (0.26, 3), (0.5, 4), (0.99, 8)])
def test_a_part_is_rounded_up_and_never_a_single_example(fraction, rows):
    loss = RecordedLoss(Call.of(nn.Linear(4, 3), torch.randn(8, 4)), (torch.zeros(8),))
    (found,) = take_first([loss], fraction, Reduction(nn.MSELoss()))
    assert len(found.call.args[0]) == len(found.targets[0]) == rows


def test_amp_scale_and_sum_do_not_disturb_each_other():
    def measured(unscale):
        model, criterion = network("mlp-tanh"), nn.CrossEntropyLoss(reduction="sum")
        ((x, y),) = batches("mlp-tanh", criterion, 1, size=8)
        optimizer = Adler(model.parameters(), model, criterion, **measuring(fraction=0.5))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=unscale is not None)
        scaler.scale(criterion(model(x), y)).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        return float(optimizer.last_step.curvature)

    assert measured(False) == pytest.approx(measured(None), rel=1e-9)
    assert measured(True) == pytest.approx(measured(None), rel=1e-9)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x, mask=None, scale=None):
        x = x if mask is None else x * mask
        return self.linear(x if scale is None else x * scale)


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(8, 3))

    def forward(self):
        return self.bias


BAD = {
    "a mask of another size": (Masked(), (torch.randn(8, 4), torch.ones(4)), r"\(4,\).*8 rows"),
    "no batch": (Constant(), (), "no tensor with a batch dimension"),
    "scalars only": (Constant(), {}, "no tensor with a batch dimension"),
    "rows": (nn.Flatten(0, 1), (torch.randn(3, 8, 3).requires_grad_(),), "targets|rows"),
}


@pytest.mark.parametrize(("model", "args", "match"), BAD.values(), ids=BAD)
def test_a_batch_that_cannot_be_divided_is_refused_with_advice(model, args, match):
    targets = (torch.zeros(8, dtype=torch.long),)
    loss = RecordedLoss(Call.of(model, args), targets)
    with pytest.raises(ValueError, match=match) as caught:
        take_first([loss], 0.5, Reduction(nn.CrossEntropyLoss()))
    assert "use measure=Measure(fraction=1.0)" in str(caught.value)


def test_numbers_and_scalars_beside_the_batch_stay():
    loss = RecordedLoss(Call.of(Masked(), (torch.randn(8, 4), None, torch.tensor(2.0))), ())
    (found,) = take_first([loss], 0.5, Reduction(nn.MSELoss()))
    assert found.call.args[1] is None
    assert float(found.call.args[2]) == 2.0


def test_a_batch_that_cannot_be_divided_is_measured_whole():
    model, criterion = Masked(), nn.CrossEntropyLoss()
    optimizer = Adler(model.parameters(), model, criterion, **measuring(fraction=0.5))
    criterion(model(torch.randn(8, 4), torch.ones(4)), torch.randint(3, (8,))).backward()
    with unchanged(model), pytest.warns(RuntimeWarning, match="whole batches.*beside 8 rows"):
        optimizer.step()
    assert bool(optimizer.last_step.trusted)
    assert not bool(optimizer.last_step.skipped)


@pytest.mark.filterwarnings("ignore:curvature is measured on whole batches")
def test_steps_on_batches_that_cannot_be_divided_are_those_of_whole_batches():
    """Curvatures of parts are averaged over as many as make one batch, those of batches are not."""
    x, y = torch.randn(5, 8, 4), torch.randint(3, (5, 8))

    def weights(fraction):
        torch.manual_seed(0)
        model, criterion = Masked(), nn.CrossEntropyLoss()
        optimizer = Adler(model.parameters(), model, criterion, **measuring(fraction=fraction))
        for inputs, labels in zip(x, y):
            optimizer.zero_grad()
            criterion(model(inputs, torch.ones(4)), labels).backward()
            optimizer.step()
        return flat(model)

    assert weights(0.25).equal(weights(1.0))


@pytest.mark.parametrize("kind", [Adler, AdlerAdam])
def test_parts_lead_to_the_rates_of_the_whole(kind):
    criterion = nn.CrossEntropyLoss()
    data = batches("mlp-tanh", criterion, 60, size=32)

    def rate(fraction):
        model = network("mlp-tanh")
        optimizer = kind(model.parameters(), model, criterion, **measuring(fraction=fraction))
        train(model, criterion, optimizer, data)
        return float(optimizer.last_step.effective_lr)

    assert rate(0.25) == pytest.approx(rate(1.0), rel=0.15)


def test_a_criterion_that_holds_tensors_of_the_batch_is_measured_whole():
    """As a ratio loss holds the probabilities of before: no part of the outputs fits."""

    class Ratio(nn.Module):
        def forward(self, outputs):
            now = outputs.log_softmax(-1).gather(1, self.actions).squeeze(1)
            ratio = (now - self.before).exp()
            clipped = torch.min(ratio * self.gain, ratio.clamp(0.8, 1.2) * self.gain)
            return -clipped.mean()

    torch.manual_seed(0)
    model, criterion = network("mlp-tanh"), Ratio()
    x = torch.randn(12, 4, dtype=torch.float64)
    criterion.actions = torch.randint(3, (12, 1))
    with torch.no_grad():
        criterion.before = model(x).log_softmax(-1).gather(1, criterion.actions).squeeze(1)
    criterion.gain = torch.randn(12, dtype=torch.float64)
    twins = copy.deepcopy((model, criterion))
    found = []
    for (m, c), options in (((model, criterion), measuring(fraction=0.25)), (twins, EXACT)):
        optimizer = Adler(m.parameters(), m, c, **options)
        for _ in range(5):
            optimizer.zero_grad()
            c(m(x)).backward()
            optimizer.step()
        assert int(optimizer.last_step.skipped_total) == 0
        found.append(float(optimizer.last_step.slope))
    assert found[0] == pytest.approx(found[1], rel=0.05)


# --- how far a part may be from the whole ---------------------------------------------------------


def halves_of(size, fraction, reduction="mean", rows=1):
    model, criterion = nn.Linear(3, 2), nn.CrossEntropyLoss(reduction=reduction)
    x, y = torch.randn(size, 3), torch.zeros(size * rows).long()
    outputs = torch.randn(size * rows, 2)
    batch = [RecordedLoss(Call.of(model, x), (y,), outputs)]
    (part,) = take_first(batch, fraction, Reduction(criterion))
    return part, first_half(part)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize(("size", "count"), [(8, 2), (12, 3), (64, 16)])
def test_half_of_a_part(size, count, rows):
    _, half = halves_of(size, 0.25, rows=rows)
    first = count // 2
    assert half.rows == len(half.loss.targets[0]) == first * rows
    assert half.times == 1
    assert half.scale**2 == pytest.approx(first / (count - first) * (1 - count / size))


def test_of_a_sum_half_is_half():
    _, half = halves_of(12, 0.25, reduction="sum")
    assert half.times == 3


def test_a_whole_batch_and_a_single_example_have_no_halves():
    assert halves_of(12, 1.0)[1] is None
    assert halves_of(1, 0.25)[1] is None
    assert halves_of(2, 0.25)[1] is None  # two examples are the least part


def test_halves_estimate_the_variance_of_a_part():
    """About the whole batch's, over all orders of the examples."""
    torch.manual_seed(0)
    each = torch.rand(12).double() ** 3
    orders = torch.stack([each[torch.randperm(12)] for _ in range(20_000)])
    _, half = halves_of(12, 0.4)  # five examples, of which two are the half
    part, of_half = orders[:, :5].mean(1), orders[:, :2].mean(1)
    estimate = (half.scale * (of_half - part)).square().mean()
    assert float(estimate) == pytest.approx(float((part - each.mean()).square().mean()), rel=0.03)


class Times(nn.Module):
    """Sequences whose first dimension is time, flattened by the model or not."""

    def __init__(self, flattens):
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(11, 8), nn.LSTM(8, 8), nn.Linear(8, 11)
        self.flattens = flattens

    def forward(self, x):
        found = self.head(self.mix(self.embed(x))[0])
        return found.flatten(0, 1) if self.flattens else found


@pytest.mark.parametrize("flattens", [True, False])
def test_times_are_not_taken_for_examples(flattens):
    """The first quarter of them may be padding."""
    torch.manual_seed(0)
    x, found = torch.randint(11, (16, 4)), []
    x[:4] = 0
    model = Times(flattens)
    criterion = nn.CrossEntropyLoss() if flattens else nn.MSELoss()
    y = torch.randint(11, (64,)) if flattens else torch.randn(16, 4, 11)
    for fraction in (0.25, 1.0):
        copied = copy.deepcopy(model)
        optimizer = Adler(copied.parameters(), copied, criterion, **measuring(fraction=fraction))
        optimizer.zero_grad()
        criterion(copied(x), y).backward()
        optimizer.step()
        found.append(float(optimizer.last_step.curvature))
    assert found[0] == found[1]
