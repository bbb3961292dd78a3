"""A measurement of something else than the training pass is not used, and one warning says why."""

import copy
import itertools
import warnings
from typing import ClassVar

import pytest
import torch
from support.right import DOUBLE, body, check, measured, right
from torch import nn
from torch.nn import functional as F

from adler import Adler, AdlerAdam, AdlerScheduleFree, Measure
from adler.curvature import trust

ce, mse = nn.CrossEntropyLoss(), nn.MSELoss()
ENGINES = ("forward", "finite_difference", "double_backward")
torch.manual_seed(1)
X, Y = torch.randn(12, 6, dtype=DOUBLE), torch.randint(3, (12,))


class Drifts(nn.Module):
    """Reads what no replay can put back."""

    clock = itertools.count(1)

    def __init__(self):
        super().__init__()
        self.body = body()

    def forward(self, x):
        return self.body(x) * next(Drifts.clock)


def rollout(model, criterion):
    h = X
    for _ in range(3):
        h = model(h)
    return criterion(h, torch.ones_like(h))


def unrolled(model, criterion):
    h, loss = X, 0
    for _ in range(3):
        h = model(h)
        loss = loss + criterion(h, torch.ones_like(h))
    return loss


def embedded(model, criterion):
    f = model(X @ model[0].weight.T[:, :6])
    return criterion(f, torch.ones_like(f))


def plain(model, criterion):
    return criterion(model(X), Y)


def penalised(model, criterion):
    return criterion(model(X), Y) + sum(p.square().sum() for p in model.parameters())


def second_loss(model, criterion):
    f = model(X)
    return criterion(f, Y) + F.mse_loss(f, torch.ones_like(f))


def edited(model, criterion):
    f = model(X)
    f.data.mul_(3)
    return criterion(f, Y)


CASES = {
    "a forward pass that does not repeat itself": (Drifts, ce, lambda m, c: c(m(X), Y), "repeat"),
    "a penalty on the weights": (body, ce, penalised, "penalty"),
    "a second loss of the same outputs": (body, ce, second_loss, "second loss"),
    "a rollout": (lambda: body(6, 6), mse, rollout, "inputs of the next"),
    "a loss at each step of a rollout": (lambda: body(6, 6), mse, unrolled, "inputs of the next"),
    "a part called before": (lambda: body(6, 6), mse, embedded, "part of the model is called"),
}
every_case = pytest.mark.parametrize(
    ("make", "criterion", "loop", "why"), CASES.values(), ids=CASES
)


@every_case
@pytest.mark.parametrize("jvp", ENGINES)
def test_it_is_not_used_and_said_once(make, criterion, loop, why, jvp):
    model = make()
    optimizer = Adler(model.parameters(), model, criterion, measure=Measure.every_step(jvp))
    before = copy.deepcopy(model.state_dict())
    said = []
    for _ in range(3):
        optimizer.zero_grad()
        loop(model, criterion).backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        said += [
            str(w.message) for w in caught if "contradicts the training pass" in str(w.message)
        ]
        assert not bool(optimizer.last_step.trusted)
    assert any(why in message for message in said)
    assert len(said) == len(set(said)) <= 2
    assert optimizer.measure.jvp == jvp
    # There was nothing to go by, so nothing moved.
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())


@every_case
@pytest.mark.filterwarnings("ignore::RuntimeWarning", "error:the last 10 steps were skipped")
@pytest.mark.parametrize("kind", [Adler, AdlerAdam, AdlerScheduleFree])
def test_a_run_of_which_no_step_can_be_measured_is_an_error(make, criterion, loop, why, kind):
    model = make()
    optimizer = kind(model.parameters(), model, criterion)

    def run():
        for _ in range(20):
            optimizer.zero_grad()
            loop(model, criterion).backward()
            optimizer.step()

    with pytest.raises(RuntimeError, match=f"could be measured.*{why}"):
        run()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_earlier_measurements_carry_a_step_that_is_not_trusted():
    model = body()
    optimizer = Adler(model.parameters(), model, ce, measure=Measure.every_step())

    def step(loop):
        optimizer.zero_grad()
        loop(model, ce).backward()
        optimizer.step()
        return optimizer.last_step

    good = step(lambda m, c: c(m(X), Y))
    before = [p.detach().clone() for p in model.parameters()]
    bad = step(second_loss)
    assert not bool(bad.trusted)
    assert bool(bad.clipped)
    assert 0 < float(bad.effective_lr) <= float(good.effective_lr) * (1 + 1e-9)
    assert any(not p.equal(q) for p, q in zip(model.parameters(), before))
    state = optimizer.param_groups[0]["rate_weight"]
    again = step(lambda m, c: c(m(X), Y))
    assert bool(again.trusted)
    assert optimizer.param_groups[0]["rate_weight"] > state  # which the bad one had left alone


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_second_loss_is_seen_though_the_gradient_was_clipped():
    model = body()
    optimizer = Adler(model.parameters(), model, ce, measure=Measure.every_step())
    second_loss(model, ce).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    assert not bool(optimizer.last_step.trusted)


def test_gradients_clipped_by_the_loop_are_no_contradiction():
    model = body()
    optimizer = Adler(model.parameters(), model, ce, measure=Measure.every_step())
    for _ in range(3):
        optimizer.zero_grad()
        ce(model(X), Y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
        assert bool(optimizer.last_step.trusted)


# --- parts of a batch -----------------------------------------------------------------------------


class Coupled(nn.Module):
    """Examples depend on each other, and no norm says so."""

    def __init__(self):
        super().__init__()
        self.body = body()

    def forward(self, x):
        return self.body(x) - self.body(x).mean(0)


def test_a_part_of_a_batch_whose_examples_depend_on_each_other_is_not_used():
    model = Coupled()
    optimizer = Adler(model.parameters(), model, ce, lr=0.0, measure=Measure(warmup=0, every=1))
    twin = copy.deepcopy(model)
    expected = right([twin(X)], lambda f: ce(f, Y), twin.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        ce(model(X), Y).backward()
        optimizer.step()
        check(optimizer, expected)  # the whole batch's


def test_a_loss_of_weight_zero_may_have_no_targets_in_the_part():
    model, measure = body(), Measure(fraction=0.5, warmup=0, every=1)
    twin, others = copy.deepcopy(model), Y.clone()
    others[:6] = ce.ignore_index
    optimizer = Adler(model.parameters(), model, ce, measure=measure)
    f = model(X)
    (ce(f, Y) + 0 * ce(f, others)).backward()
    d = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    check(optimizer, right([twin(X[:6])], lambda f: ce(f, Y[:6]), twin.parameters(), d))


class Dropped(nn.Module):
    rows: ClassVar = []  # of each call; of a class, so that a replay is seen

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Dropout(0.3), body(), nn.Dropout(0.3))

    def forward(self, x):
        Dropped.rows.append(len(x))
        return self.body(x)


def test_a_part_that_draws_masks_of_its_own_is_used():
    """It cannot make the outputs of the training pass; the first look at a whole batch does."""
    model, measure = Dropped(), Measure(fraction=0.5, warmup=0, every=1)
    optimizer = Adler(model.parameters(), model, ce, measure=measure)
    Dropped.rows.clear()
    for _ in range(3):
        optimizer.zero_grad()
        ce(model(X), Y).backward()
        optimizer.step()
        assert bool(optimizer.last_step.trusted)
    assert Dropped.rows == [12, 12, 6, 12, 6, 12, 6]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_whole_batch_tells_of_a_part_what_it_cannot():
    """The part's outputs are right, its tangents are not."""

    class Halved(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = body(), nn.Linear(3, 3).to(DOUBLE)

        def forward(self, x):
            h = self.a(x)
            if h.requires_grad:
                h.register_hook(lambda g: g / 2)
            return self.b(h)

    model = Halved()
    optimizer = Adler(model.parameters(), model, ce, measure=Measure(fraction=0.5))
    ce(model(X), Y).backward()
    optimizer.step()
    assert optimizer.measure.jvp == "double_backward"
    assert bool(optimizer.last_step.trusted)


# --- losses without positive curvature ------------------------------------------------------------


def ratio_loss(f, actions, old, advantages):
    ratio = (f.log_softmax(-1).gather(1, actions[:, None]).squeeze(1) - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()


class Ratio(nn.Module):
    def forward(self, f, actions, old, advantages):
        return ratio_loss(f, actions, old, advantages)


class Reinforce(nn.Module):
    def forward(self, f, actions, advantages):
        return -(f.log_softmax(-1).gather(1, actions[:, None]).squeeze(1) * advantages).mean()


class Mean(nn.Module):
    def forward(self, f):
        return f.mean()


ADVANTAGES = torch.linspace(-1, 1.5, 12, dtype=DOUBLE)
OLD = torch.full((12,), -1.1, dtype=DOUBLE)
MOVING = {
    "policy ratio": (body, Ratio(), lambda m, c: c(m(X), Y, OLD, ADVANTAGES)),
    "policy gradient": (body, Reinforce(), lambda m, c: c(m(X), Y, ADVANTAGES)),
    "linear": (lambda: body(6, 1), Mean(), lambda m, c: c(m(X))),
    "margin": (body, nn.MultiMarginLoss(), lambda m, c: c(m(X), Y)),
    "absolute": (body, nn.L1Loss(), lambda m, c: c(m(X), torch.ones(12, 3, dtype=DOUBLE))),
    "far from a huber": (
        body,
        nn.HuberLoss(delta=1e-3),
        lambda m, c: c(m(X), torch.full((12, 3), 9.0, dtype=DOUBLE)),
    ),
    "triplet": (
        body,
        nn.TripletMarginLoss(),
        lambda m, c: c(m(X), m(X.flip(0)), m(X.roll(1, 0))),
    ),
    "cosine": (
        body,
        nn.CosineEmbeddingLoss(),
        lambda m, c: c(m(X), m(X.flip(0)), torch.ones(12, dtype=DOUBLE)),
    ),
    "negated": (body, nn.CrossEntropyLoss(), lambda m, c: -0.1 * c(m(X), Y)),
}


@pytest.mark.parametrize(("make", "criterion", "loop"), MOVING.values(), ids=MOVING)
@pytest.mark.parametrize("kind", [Adler, AdlerAdam, AdlerScheduleFree])
def test_losses_without_positive_curvature_move(kind, make, criterion, loop):
    torch.manual_seed(0)
    model = make()
    optimizer = kind(model.parameters(), model, criterion, measure=Measure.every_step())
    with torch.no_grad():
        first = float(loop(model, criterion))
    for _ in range(20):
        optimizer.zero_grad()
        loop(model, criterion).backward()
        optimizer.step()
        assert bool(optimizer.last_step.trusted)
        assert float(optimizer.last_step.curvature) > 0
    assert int(optimizer.last_step.skipped_total) == 0
    with torch.no_grad():
        assert float(loop(model, criterion)) < first


def test_in_the_place_of_a_form_that_is_not_positive_stands_the_empirical_fisher():
    model = body()
    twin = copy.deepcopy(model)
    optimizer = measured(model, Reinforce(), lambda m, c: c(m(X), Y, ADVANTAGES - 3))
    f = twin(X)
    (delta,) = torch.autograd.grad(Reinforce()(f, Y, ADVANTAGES - 3), f, retain_graph=True)
    u = torch.zeros_like(f, requires_grad=True)
    g = torch.autograd.grad(f, list(twin.parameters()), delta, retain_graph=True)
    pulled = torch.autograd.grad(f, list(twin.parameters()), u, create_graph=True)
    (v,) = torch.autograd.grad(sum((p * d).sum() for p, d in zip(pulled, g)), u)
    fisher = 12 * (delta * v).sum(1).square().sum()
    assert right([twin(X)], lambda f: Reinforce()(f, Y, ADVANTAGES - 3), twin.parameters()) < 0
    check(optimizer, float(fisher))


class Apart(nn.Module):
    def forward(self, a, b):
        return (a - 2 * b).sum(1).mean()


def test_rows_of_two_tensors_are_one_example():
    model = body()
    twin = copy.deepcopy(model)
    params = list(twin.parameters())
    losses = (twin(X) - 2 * twin(X.flip(0))).sum(1)
    d = torch.autograd.grad(losses.mean(), params, retain_graph=True)
    expected = 0.0
    for loss in losses:
        g = torch.autograd.grad(loss, params, retain_graph=True)
        expected += sum(float((a * e).sum()) for a, e in zip(g, d)) ** 2 / len(losses)
    check(measured(model, Apart(), lambda m, c: c(m(X), m(X.flip(0)))), expected)


# --- losses of log-probabilities ------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:reduction")  # PyTorch's, of reduction="mean"
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
@pytest.mark.parametrize("log_target", [False, True])
def test_a_divergence_of_log_probabilities_has_the_curvature_of_the_softmax_beneath(
    reduction, log_target
):
    model, criterion = body(), nn.KLDivLoss(reduction=reduction, log_target=log_target)
    twin = copy.deepcopy(model)
    t = torch.randn(12, 3, dtype=DOUBLE).log_softmax(-1)
    t = t if log_target else t.exp()
    whole = nn.Sequential(model, nn.LogSoftmax(-1))
    optimizer = measured(whole, criterion, lambda m, c: c(m(X), t))
    loss = lambda f: criterion(f.log_softmax(-1), t)  # noqa: E731
    check(optimizer, right([twin(X)], loss, twin.parameters()))


def test_a_divergence_with_classes_in_the_second_dimension():
    conv, criterion = nn.Conv1d(2, 3, 1).to(DOUBLE), nn.KLDivLoss(reduction="batchmean")
    twin, x = copy.deepcopy(conv), torch.randn(5, 2, 4, dtype=DOUBLE)
    t = torch.randn(5, 3, 4, dtype=DOUBLE).softmax(1)
    optimizer = measured(nn.Sequential(conv, nn.LogSoftmax(1)), criterion, lambda m, c: c(m(x), t))
    loss = lambda f: criterion(f.log_softmax(1), t)  # noqa: E731
    check(optimizer, right([twin(x)], loss, twin.parameters()))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_connectionist_temporal_classification_where_the_alignment_is_certain(reduction):
    """As many frames as targets, all different: one alignment, and so cross-entropy's form."""
    torch.manual_seed(0)
    model, criterion = nn.Linear(6, 5).to(DOUBLE), nn.CTCLoss(reduction=reduction)
    twin, x = copy.deepcopy(model), torch.randn(3, 2, 6, dtype=DOUBLE)
    y, frames, counts = (
        torch.tensor([[1, 2, 3], [4, 3, 1]]),
        torch.full((2,), 3),
        torch.full((2,), 3),
    )
    whole = nn.Sequential(model, nn.LogSoftmax(-1))
    optimizer = measured(whole, criterion, lambda m, c: c(m(x), y, frames, counts))
    sums = lambda f: F.cross_entropy(f.flatten(0, 1), y.T.flatten(), reduction="sum")  # noqa: E731
    expected = right([twin(x)], sums, twin.parameters())
    factor = 1.0 if reduction == "sum" else 1 / 6
    # (The direction is the gradient, which has the factor too.)
    check(optimizer, expected * factor**3, 1e-5)


def test_connectionist_temporal_classification_of_a_sequence_without_targets():
    """Its frames are blanks, and the mean divides it by one."""
    torch.manual_seed(0)
    model, criterion = nn.Linear(6, 5).to(DOUBLE), nn.CTCLoss()
    twin, x = copy.deepcopy(model), torch.randn(3, 2, 6, dtype=DOUBLE)
    y, frames, counts = torch.tensor([[1, 2, 3], [0, 0, 0]]), torch.full((2,), 3), (3, 0)
    whole = nn.Sequential(model, nn.LogSoftmax(-1))
    optimizer = measured(whole, criterion, lambda m, c: c(m(x), y, frames, torch.tensor(counts)))

    def loss(f):
        sums = [F.cross_entropy(f[:, i], y[i], reduction="sum") for i in range(2)]
        return (sums[0] / 3 + sums[1]) / 2

    check(optimizer, right([twin(x)], loss, twin.parameters()), 1e-5)


@pytest.mark.filterwarnings("ignore:curvature is measured on whole batches")
def test_connectionist_temporal_classification_trains():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 5), nn.LogSoftmax(-1))
    x, y = torch.randn(12, 4, 3), torch.randint(1, 5, (4, 4))
    criterion, lengths = nn.CTCLoss(), (torch.full((4,), 12), torch.full((4,), 4))
    optimizer = AdlerScheduleFree(model.parameters(), model, criterion)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = criterion(model(x), y, *lengths)
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    assert int(optimizer.last_step.skipped_total) == 0


# --- when it looks, and at what -------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:measurement contradicts")
def test_a_second_loss_that_begins_late_is_noticed_and_forgiven():
    """The loss's own gradient is compared now and then."""
    model = body()
    optimizer = Adler(model.parameters(), model, ce, measure=Measure.every_step())

    def trusted(loop, steps):
        found = []
        for _ in range(steps):
            optimizer.zero_grad()
            loop(model, ce).backward()
            optimizer.step()
            found.append(bool(optimizer.last_step.trusted))
        return found

    assert all(trusted(lambda m, c: c(m(X), Y), 5))
    late = trusted(second_loss, 20)
    assert not any(late[16:])
    assert trusted(lambda m, c: c(m(X), Y), 20)[16:] == [True] * 4


def test_what_is_infinite_agrees_with_what_is_infinite_alone():
    one, inf = torch.ones(()), torch.tensor(torch.inf)
    assert not bool(trust.agree(inf, one, 0.1, one))
    assert bool(trust.agree(inf, inf, 0.1, one))
    found = torch.tensor([torch.inf, 1.0])
    assert bool(trust.outputs_agree(found, found.clone(), 0.1))
    assert not bool(trust.outputs_agree(found, torch.tensor([torch.inf, 2.0]), 0.1))


def test_what_cancellation_leaves_of_a_slope_is_no_contradiction():
    """Of two vectors of length one, whose product is far smaller."""
    found, expected, one = (torch.tensor(number) for number in (1e-6, 2e-6, 1.0))
    assert bool(trust.agree(found, expected, 2e-2, one))
    assert not bool(trust.agree(found, expected, 2e-2, 1e-3 * one))


def test_after_all_engines_have_failed_they_rest_for_longer_and_longer():
    memory, checks = trust.Memory(), {"slope": torch.tensor(False)}
    rested = []
    for _ in range(8):
        memory.give_up()
        rested.append(0)
        while not memory.tries_others(checks):
            rested[-1] += 1
    assert rested == [2, 4, 8, 16, 32, 64, 64, 64]


@pytest.mark.filterwarnings("ignore:measurement contradicts", "ignore:jvp=")
def test_one_engine_that_agrees_ends_the_rests(monkeypatch):
    rests, give_up = [], trust.Memory.give_up
    monkeypatch.setattr(
        trust.Memory, "give_up", lambda memory: (give_up(memory), rests.append(memory.rests))
    )

    class Halved(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.halves = body(), False

        def forward(self, x):
            f = self.body(x)
            if self.halves:
                f.register_hook(lambda g: g / 2)
            return f.tanh()

    model = Halved()
    optimizer = Adler(model.parameters(), model, ce, measure=Measure.every_step())
    for loop, halves in [(penalised, False)] * 3 + [(plain, True), (penalised, False)]:
        model.halves = halves
        optimizer.zero_grad()
        loop(model, ce).backward()
        optimizer.step()
        assert bool(optimizer.last_step.trusted) == halves
    assert rests == [2, 2]


@pytest.mark.filterwarnings("ignore:measurement contradicts")
def test_a_penalty_is_noticed_under_a_scaler():
    """What cancellation may leave is in units of the unscaled gradient."""
    model, scaler = body(), torch.amp.GradScaler("cpu", init_scale=2.0**30)
    optimizer = Adler(model.parameters(), model, ce, measure=Measure.every_step())
    optimizer.zero_grad()
    scaler.scale(penalised(model, ce)).backward()
    scaler.step(optimizer)
    assert not bool(optimizer.last_step.trusted)


@pytest.mark.parametrize("weights", [(1.0, -2.0), (-2.0, 1.0)])
def test_losses_of_both_signs_add_their_outer_products(weights):
    torch.manual_seed(0)
    model = body()
    x, y = torch.randn(8, 6, dtype=DOUBLE), torch.randint(3, (8,))
    twin = copy.deepcopy(model)
    parts = [(twin(a), b) for a, b in zip(x.chunk(2), y.chunk(2))]
    losses = [ce(f, b) for f, b in parts]
    params = list(twin.parameters())
    total = sum(w * h for w, h in zip(weights, losses))
    d = torch.autograd.grad(total, params, retain_graph=True)
    expected = 0.0
    for w, (f, b) in zip(weights, parts):
        for i in range(len(b)):  # of each example alone, the gradient at its outputs and along d
            g = torch.autograd.grad(F.cross_entropy(f[i], b[i]), params, retain_graph=True)
            slope = sum(float((a * e).sum()) for a, e in zip(g, d))
            expected += abs(w) / len(b) * slope**2
    optimizer = Adler(model.parameters(), model, ce, measure=Measure.every_step())
    for w, a, b in zip(weights, x.chunk(2), y.chunk(2)):
        (w * ce(model(a), b)).backward()
    optimizer.step()
    form = sum(
        w * right([f], lambda g, b=b: ce(g, b), params, d) for w, (f, b) in zip(weights, parts)
    )
    assert form < 0
    assert float(optimizer.last_step.curvature) == pytest.approx(expected)
