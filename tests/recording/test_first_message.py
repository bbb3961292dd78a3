"""The first error of a loop that has to say more leads to what works."""

import copy
import re
import textwrap

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import adler
from adler import AdlerScheduleFree

ce = nn.CrossEntropyLoss()


class Bigram(nn.Module):
    """Returns scores and, where it is given targets, its loss."""

    def __init__(self, wrapped=lambda scores, loss: (scores, loss)):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.wrapped = nn.Embedding(11, 11), wrapped

    def forward(self, idx, targets=None):
        scores = self.table(idx)
        loss = None if targets is None else F.cross_entropy(scores.mT, targets)
        return self.wrapped(scores, loss)


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 2)

    def forward(self, x, goal):
        out = self.body(x)
        return {"out": out, "cost": F.mse_loss(out, goal)}


def tokens(seed=0):
    drawn = torch.randint(11, (6, 9), generator=torch.Generator().manual_seed(seed))
    return drawn[:, :-1], drawn[:, 1:]


def written(message):
    """What the message says to write."""
    return re.search(r"^    (adler\.ModelLoss\(.*\))$", message, re.MULTILINE)[1]


@pytest.mark.parametrize("tried", [{}, {"output_fn": lambda result: result[0].flatten(0, 1)}])
@pytest.mark.parametrize("by_name", [False, True])
def test_the_first_message_holds_the_line_to_write(tried, by_name):
    model = Bigram()
    idx, targets = tokens()
    call = (lambda m: m(idx=idx, targets=targets)) if by_name else (lambda m: m(idx, targets))
    optimizer = AdlerScheduleFree(model.parameters(), model, ce, **tried)
    call(model)[1].backward()
    with pytest.raises(RuntimeError, match="ModelLoss") as caught:
        optimizer.step()
    described = eval(written(str(caught.value)), {"adler": adler, "criterion": ce})
    model = Bigram()
    optimizer = AdlerScheduleFree(model.parameters(), model, described)
    call(model)[1].backward()
    optimizer.step()
    assert optimizer.last_step.curvature > 0
    assert not optimizer.last_step.skipped


def test_of_dictionaries_and_other_losses_too():
    model, criterion = Regression(), nn.MSELoss()
    x, goal = torch.randn(8, 4), torch.randn(8, 2)
    optimizer = AdlerScheduleFree(model.parameters(), model, criterion)
    model(x, goal)["cost"].backward()
    with pytest.raises(RuntimeError) as caught:
        optimizer.step()
    line = written(str(caught.value))
    assert "targets=lambda x, goal: goal," in line
    described = eval(line, {"adler": adler, "criterion": criterion})
    other = Regression()
    optimizer = AdlerScheduleFree(other.parameters(), other, described)
    other(x, goal)["cost"].backward()
    optimizer.step()
    assert not optimizer.last_step.skipped


def test_a_model_that_returns_its_loss_alone():
    model = Bigram(lambda scores, loss: loss)
    optimizer = AdlerScheduleFree(model.parameters(), model, ce)
    model(*tokens()).backward()
    with pytest.raises(RuntimeError, match=r"return both.*ModelLoss"):
        optimizer.step()


def test_a_model_that_returns_no_loss_is_sent_elsewhere():
    model = Bigram(lambda scores, loss: (scores, scores.detach()))
    optimizer = AdlerScheduleFree(model.parameters(), model, ce)
    scores, _ = model(tokens()[0])
    F.cross_entropy(scores.mT, tokens()[1]).backward()
    with pytest.raises(RuntimeError, match="output_fn") as caught:
        optimizer.step()
    assert "ModelLoss" not in str(caught.value)


def test_a_function_of_several_outputs_is_sent_to_a_module():
    """As the loss of a variational autoencoder is."""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean, self.spread = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            return self.mean(x), self.spread(x)

    def loss_of_both(mean, goal, spread):
        return (mean - goal).square().mean() + (spread.exp() - spread).mean()

    model, x, goal = Pair(), torch.randn(8, 4), torch.randn(8, 2)
    optimizer = AdlerScheduleFree(model.parameters(), model, loss_of_both)
    mean, spread = model(x)
    loss_of_both(mean, goal, spread).backward()
    with pytest.raises(RuntimeError) as caught:
        optimizer.step()
    code = re.search(r"^    class Criterion.*?\n\n", str(caught.value), re.DOTALL | re.MULTILINE)[0]
    scope = {"nn": nn, "loss_of_both": loss_of_both}
    exec(textwrap.dedent(code), scope)
    criterion = scope["Criterion"]()
    optimizer = AdlerScheduleFree(model.parameters(), model, criterion)
    optimizer.zero_grad()
    mean, spread = model(x)
    criterion(mean, goal, spread).backward()
    optimizer.step()
    assert optimizer.last_step.trusted
    assert optimizer.last_step.curvature > 0


# --- a scalar beside the outputs: the model's loss, or a term of the loop's -----------------------


class WithTerm(nn.Module):
    """As vit-pytorch's, whose decorrelation loss is added by the loop."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x, mask=None):
        hidden = torch.tanh(self.first(x))
        return self.last(hidden), (hidden.T @ hidden / len(hidden)).square().mean()


class MixtureOfExperts(nn.Module):
    """A language model that is called without targets; its tokens are shaped as they are."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.gate = nn.Embedding(11, 11), nn.Embedding(11, 4)

    def forward(self, idx):
        return self.table(idx), self.gate(idx).softmax(-1).mean((0, 1)).square().sum()


@pytest.mark.parametrize(
    "given",
    [
        F.cross_entropy,
        nn.CrossEntropyLoss(label_smoothing=0.1),
        lambda out, y: F.cross_entropy(out, y, label_smoothing=0.1),
    ],
    ids=["function", "module", "nameless"],
)
@pytest.mark.parametrize("case", ["images", "masked", "tokens"])
def test_a_term_that_the_model_returns_is_not_taken_for_its_loss(given, case):
    if case == "tokens":
        model, call, y = MixtureOfExperts(), (tokens()[0],), tokens()[1].flatten()
    else:
        x, y = torch.randn(16, 6), torch.randint(3, (16,))
        model, call = WithTerm(), (x, torch.ones(16, 6)) if case == "masked" else (x,)
    loss_of = copy.copy(given) if isinstance(given, nn.Module) else given

    optimizer = AdlerScheduleFree(model.parameters(), model, given)
    out, term = model(*call)
    (loss_of(out.flatten(0, -2), y) + 0.1 * term).backward()
    with pytest.raises(RuntimeError) as caught:
        optimizer.step()
    message = str(caught.value)
    assert "..." not in message
    assert "criterion(outputs, targets, weight * result[1])" in message

    code = re.search(r"^    (class|loss_of).*?\n\n(?=\S)", message, re.DOTALL | re.MULTILINE)[0]
    scope = {"nn": nn, "criterion": given}
    exec(textwrap.dedent(code), scope)
    criterion = scope["Criterion"]()
    optimizer = AdlerScheduleFree(model.parameters(), model, criterion)
    optimizer.zero_grad()
    result, weight = model(*call), 0.1
    criterion(result[0].flatten(0, -2), y, weight * result[1]).backward()
    optimizer.step()
    assert optimizer.last_step.trusted
    assert optimizer.scalars()["consistency"] == pytest.approx(1, abs=1e-4)


def test_options_that_the_model_takes_by_any_name_are_in_the_line():
    class Open(Bigram):
        def forward(self, idx, targets, **options):
            return super().forward(idx, targets)

    model, (idx, targets) = Open(), tokens()
    optimizer = AdlerScheduleFree(model.parameters(), model, ce)
    model(idx, targets, cached=False)[1].backward()
    with pytest.raises(RuntimeError, match="If that scalar is only a term") as caught:
        optimizer.step()
    described = eval(written(str(caught.value)), {"adler": adler, "criterion": ce})
    optimizer = AdlerScheduleFree(model.parameters(), model, described)
    optimizer.zero_grad()
    model(idx, targets, cached=False)[1].backward()
    optimizer.step()
    assert not optimizer.last_step.skipped


def test_a_function_of_more_than_outputs_and_targets_keeps_all_its_arguments():
    def loss_of_all(out, goal, term, weight):
        return F.cross_entropy(out, goal) + weight * term

    model, x, y = WithTerm(), torch.randn(16, 6), torch.randint(3, (16,))
    optimizer = AdlerScheduleFree(model.parameters(), model, loss_of_all)
    out, term = model(x)
    loss_of_all(out, y, term, 0.1).backward()
    with pytest.raises(RuntimeError, match=r"return loss_of_all\(\*args, \*\*kwargs\)"):
        optimizer.step()


def test_a_model_that_was_given_targets_of_another_shape_is_told_to_write_a_function():
    class Flat(Bigram):
        def forward(self, idx, targets):
            scores, loss = super().forward(idx, targets)
            return scores.flatten(0, 1), loss

    model, (idx, targets) = Flat(), tokens()
    optimizer = AdlerScheduleFree(model.parameters(), model, ce)
    model(idx, targets)[1].backward()
    with pytest.raises(RuntimeError, match=r"where targets_of\(idx, targets\) is") as caught:
        optimizer.step()
    scope = {"adler": adler, "criterion": ce, "targets_of": lambda idx, targets: targets.flatten()}
    described = eval(written(str(caught.value)), scope)
    optimizer = AdlerScheduleFree(model.parameters(), model, described)
    optimizer.zero_grad()
    model(idx, targets)[1].backward()
    optimizer.step()
    assert not optimizer.last_step.skipped


def test_a_scalar_that_is_called_loss_is_taken_for_it_whatever_the_model_was_given():
    class OfItself(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 4)

        def forward(self, x):
            out = self.body(x)
            return {"out": out, "loss": F.mse_loss(out, x)}

    model, criterion, x = OfItself(), nn.MSELoss(), torch.randn(8, 4)
    optimizer = AdlerScheduleFree(model.parameters(), model, criterion)
    model(x)["loss"].backward()
    with pytest.raises(RuntimeError) as caught:
        optimizer.step()
    described = eval(written(str(caught.value)), {"adler": adler, "criterion": criterion})
    optimizer = AdlerScheduleFree(model.parameters(), model, described)
    optimizer.zero_grad()
    model(x)["loss"].backward()
    optimizer.step()
    assert not optimizer.last_step.skipped


# --- targets of another batch ---------------------------------------------------------------------


@pytest.mark.parametrize("inside", [True, False], ids=["loss inside", "functional loss"])
def test_targets_of_another_batch_are_refused_and_the_right_ones_taken(inside):
    model = Bigram() if inside else nn.Sequential(nn.Embedding(11, 11), nn.Flatten(0, 1))
    fn = {"output_fn": lambda result: result[0].flatten(0, 1)} if inside else {}
    optimizer = AdlerScheduleFree(model.parameters(), model, ce, **fn)

    idx, targets = tokens()
    loss = model(idx, targets)[1] if inside else F.cross_entropy(model(idx), targets.flatten())
    loss.backward()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="not the targets that the loss was computed from"):
        optimizer.step(targets=tokens(1)[1].flatten())
    assert all(a.equal(b) for a, b in zip(before, model.parameters(), strict=True))
    optimizer.step(targets=targets.flatten())
    assert not optimizer.last_step.skipped


def test_targets_of_which_the_first_step_cannot_tell_are_looked_at_in_the_next():
    model = nn.Sequential(nn.Embedding(11, 11), nn.Flatten(0, 1))
    optimizer = AdlerScheduleFree(model.parameters(), model, ce)
    idx, targets = tokens()
    for written in (True, False):
        optimizer.zero_grad()
        scores = model(idx)
        F.cross_entropy(scores, targets.flatten()).backward()
        if written:
            scores.detach().mul_(2)
            optimizer.step(targets=targets.flatten())
    with pytest.raises(RuntimeError, match="not the targets that the loss was computed from"):
        optimizer.step(targets=tokens(1)[1].flatten())


def test_a_term_beside_the_criterion_is_not_taken_for_other_targets():
    model = nn.Sequential(nn.Embedding(11, 11), nn.Flatten(0, 1))
    optimizer = AdlerScheduleFree(model.parameters(), model, ce)
    idx, targets = tokens()
    scores = model(idx)
    (F.cross_entropy(scores, targets.flatten()) + 1e-3 * scores.square().mean()).backward()
    optimizer.step(targets=targets.flatten())
    assert optimizer.last_step is not None


# --- decay groups of another optimizer ------------------------------------------------------------


@pytest.mark.parametrize("kind", [adler.Adler, adler.AdlerAdam, AdlerScheduleFree])
def test_groups_of_another_optimizer_in_one_line(kind):
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    named = dict(model.named_parameters())
    decayed = [(n, p) for n, p in named.items() if p.ndim > 1]
    others = [(n, p) for n, p in named.items() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=6e-4, betas=(0.8, 0.95))
    optimizer = kind(theirs, model, ce)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
    assert [g["lr"] for g in optimizer.param_groups] == [1.0, 1.0]
    assert optimizer.param_groups[1]["param_names"] == [n for n, _ in others]
    own = [p for g in optimizer.param_groups for p in g["params"]]
    assert all(p is q for p, q in zip(own, [p for _, p in decayed + others], strict=True))
    ce(model(torch.randn(8, 4)), torch.randint(3, (8,))).backward()
    optimizer.step()
    assert not optimizer.last_step.skipped


def test_two_weight_decays_are_refused():
    model = nn.Linear(4, 3)
    theirs = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with pytest.raises(ValueError, match=r"weight_decay=0\.5.*AdamW"):
        AdlerScheduleFree(theirs, model, ce, weight_decay=0.5)
