"""Losses that the model computes itself: as good as the plain loop, or an error."""

import copy
import io
import pickle

import pytest
import torch
from support.cases import flat
from support.loops import NoSynchronisation
from support.options import EXACT, measuring
from torch import nn
from torch.nn import functional as F

from adler import Adler, AdlerAdam, GaussNewton, ModelLoss, SpectralSGD
from adler.integrations.transformers import causal_lm, masked_lm, sequence_classification

VOCABULARY = 7


class LanguageModel(nn.Module):
    """Computes its loss in the ways that Hugging Face models do, in the parameters' precision."""

    def __init__(self, shift=1, heeds_items=True, extra=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 6)
        self.head = nn.Linear(6, VOCABULARY)
        self.shift, self.heeds_items, self.extra = shift, heeds_items, extra
        self.double()

    def logits(self, input_ids):
        return self.head(torch.tanh(self.embed(input_ids)).cumsum(1))

    def forward(self, input_ids, labels=None, num_items_in_batch=None):
        logits = self.logits(input_ids)
        if labels is None:
            return {"logits": logits}
        labels = F.pad(labels, (0, self.shift), value=-100)[:, self.shift :]
        if num_items_in_batch is not None and self.heeds_items:
            total = F.cross_entropy(logits.mT, labels, reduction="sum")
            return {"loss": total / num_items_in_batch, "logits": logits}
        return {"loss": F.cross_entropy(logits.mT, labels) + self.extra, "logits": logits}


def sentences(n=4, length=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (n, length), generator=generator)
    labels = tokens.clone()
    labels[0, 3:] = -100
    return tokens, labels


class Logits(nn.Module):
    """The model without its loss."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, tokens):
        return self.body.logits(tokens).mT


def plain_step(make, batches, heeds_items, options=EXACT):
    """Parameters and record after a step of the ordinary loop over micro-batches."""
    network, criterion = Logits(LanguageModel()), nn.CrossEntropyLoss()
    optimizer = make(network.parameters(), network, criterion, **options)
    labels = [F.pad(labels[:, 1:], (0, 1), value=-100) for _, labels in batches]
    counts = [int((of != -100).sum()) for of in labels]
    for (tokens, _), targets, count in zip(batches, labels, counts):
        share = count / sum(counts) if heeds_items else 1.0
        (share * criterion(network(tokens), targets)).backward()
    optimizer.step()
    return flat(network), optimizer.last_step


OPTIMIZERS = [Adler, AdlerAdam, GaussNewton, SpectralSGD]


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_a_model_with_its_loss_steps_as_the_plain_loop(make):
    model = LanguageModel()
    optimizer = make(model.parameters(), model, causal_lm(), **EXACT)
    tokens, labels = sentences()
    model(tokens, labels=labels)["loss"].backward()
    optimizer.step()
    expected, record = plain_step(make, [(tokens, labels)], True)
    torch.testing.assert_close(flat(model), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(optimizer.last_step.curvature, record.curvature)


@pytest.mark.parametrize("heeds_items", [True, False])
@pytest.mark.parametrize("make", OPTIMIZERS)
def test_micro_batches_are_weighted_by_their_items_if_the_model_heeds_them(make, heeds_items):
    batches = [sentences(4, 9, 0), sentences(1, 5, 1), sentences(3, 6, 2)]
    items = torch.stack([(labels[:, 1:] != -100).sum() for _, labels in batches]).sum()
    model = LanguageModel(heeds_items=heeds_items)
    optimizer = make(model.parameters(), model, causal_lm(), **EXACT)
    for tokens, labels in batches:
        model(tokens, labels=labels, num_items_in_batch=items)["loss"].backward()
    optimizer.step()
    expected, record = plain_step(make, batches, heeds_items)
    torch.testing.assert_close(flat(model), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(optimizer.last_step.curvature, record.curvature)


@pytest.mark.parametrize("options", [EXACT, measuring(fraction=0.5)], ids=["whole", "part"])
@pytest.mark.parametrize("make", OPTIMIZERS)
def test_a_micro_batch_without_targets_adds_nothing(make, options):
    batches = [sentences(4, 9, 0), (torch.zeros(2, 4).long(), torch.full((2, 4), -100))]
    items = (batches[0][1][:, 1:] != -100).sum()
    model = LanguageModel()
    optimizer = make(model.parameters(), model, causal_lm(), **options)
    for tokens, labels in batches:
        model(tokens, labels=labels, num_items_in_batch=items)["loss"].backward()
    optimizer.step()
    expected, _ = plain_step(make, batches[:1], True, options)
    assert not optimizer.last_step.skipped
    torch.testing.assert_close(flat(model), expected, rtol=1e-10, atol=1e-12)


def test_a_batch_without_targets_is_skipped():
    model = LanguageModel()
    optimizer = Adler(model.parameters(), model, causal_lm(), **EXACT)
    before = flat(model)
    labels = torch.full((2, 4), -100)
    model(torch.zeros(2, 4).long(), labels=labels)["loss"].backward()
    optimizer.step()
    assert optimizer.last_step.skipped
    assert flat(model).equal(before)


def test_a_loss_scaled_by_the_loop_in_place():
    def curvature(scale):
        model = LanguageModel()
        optimizer = Adler(model.parameters(), model, causal_lm(), **EXACT)
        tokens, labels = sentences()
        loss = model(tokens, labels=labels)["loss"]
        loss *= scale
        loss.backward()
        optimizer.step()
        record = optimizer.last_step
        return float(record.curvature), float(record.minibatch_lr)

    (one, rate), (three, rate_of_three) = curvature(1.0), curvature(3.0)
    assert three == pytest.approx(27 * one, rel=1e-12)  # c is quadratic in d = 3 g, Q is 3 Q
    assert rate_of_three == pytest.approx(rate / 3, rel=1e-9)


@pytest.mark.parametrize("unscales", [True, False])
def test_under_a_gradient_scaler_with_micro_batches(unscales):
    batches = [sentences(4, 9, 0), sentences(1, 5, 1)]
    items = torch.stack([(labels[:, 1:] != -100).sum() for _, labels in batches]).sum()
    model, scaler = LanguageModel(), torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = Adler(model.parameters(), model, causal_lm(), **EXACT)
    for tokens, labels in batches:
        loss = model(tokens, labels=labels, num_items_in_batch=items)["loss"]
        scaler.scale(loss).backward()
    if unscales:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    expected, _ = plain_step(Adler, batches, True)
    torch.testing.assert_close(flat(model), expected, rtol=1e-9, atol=1e-12)


def test_a_criterion_that_the_model_calls_is_not_counted_twice():
    class Classifier(nn.Module):
        def __init__(self, criterion):
            super().__init__()
            torch.manual_seed(0)
            self.body, self.criterion = nn.Linear(4, 3).double(), criterion

        def forward(self, x, y):
            scores = self.body(x)
            return self.criterion(scores, y), scores

    torch.manual_seed(1)
    x, y = torch.randn(8, 4).double(), torch.randint(3, (8,))
    criterion = nn.CrossEntropyLoss()
    model = Classifier(criterion)
    described = ModelLoss(
        criterion,
        outputs=lambda result: result[1],
        targets=lambda x, y: (y,),
        loss=lambda result: result[0],
    )
    optimizer = Adler(model.parameters(), model, described, **EXACT)
    model(x, y)[0].backward()
    optimizer.step()
    body = Classifier(criterion).body
    expected = Adler(body.parameters(), body, criterion, **EXACT)
    criterion(body(x), y).backward()
    expected.step()
    torch.testing.assert_close(flat(model), flat(body), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("model", "described"),
    [
        (LanguageModel(), masked_lm()),
        (LanguageModel(shift=2), causal_lm()),
        (LanguageModel(shift=0), causal_lm()),
        (LanguageModel(extra=0.01), causal_lm()),
    ],
    ids=["not shifted", "shifted once", "shifted", "an extra term"],
)
def test_a_wrong_description_is_an_error_and_changes_nothing(model, described):
    optimizer = Adler(model.parameters(), model, described, **EXACT)
    before, state = flat(model), copy.deepcopy(optimizer.state_dict())
    tokens, labels = sentences()
    model(tokens, labels=labels)["loss"].backward()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="describes another loss"):
            optimizer.step()
    assert flat(model).equal(before)
    assert str(optimizer.state_dict()) == str(state)


class IgnoresMinusOne(nn.Module):
    """As minGPT's and nanoGPT's models do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)

    def forward(self, tokens, targets):
        logits = self.head(self.embed(tokens))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def described_by(criterion, outputs=lambda result: result[0].flatten(0, -2)):
    return ModelLoss(
        criterion,
        outputs=outputs,
        targets=lambda tokens, targets: targets.flatten(),
        loss=lambda result: result[1],
    )


def test_a_criterion_that_raises_on_the_models_targets_says_what_it_was_called_with():
    tokens, _ = sentences()
    targets = tokens.roll(-1, 1)
    targets[:, :3] = -1
    model = IgnoresMinusOne()
    optimizer = Adler(model.parameters(), model, described_by(nn.CrossEntropyLoss()))
    before = flat(model)
    model(tokens, targets)[1].backward()
    with pytest.raises(RuntimeError, match=r"ignore_index=-1\)") as caught:
        optimizer.step()
    message = str(caught.value)
    assert "CrossEntropyLoss(outputs, targets)" in message
    assert "raised IndexError: Target -1 is out of bounds. " in message
    assert "float32 of shape (36, 7)" in message
    assert "int64 of shape (36,) from -1 to 6" in message
    assert isinstance(caught.value.__cause__, IndexError)
    assert flat(model).equal(before)

    optimizer = Adler(model.parameters(), model, described_by(nn.CrossEntropyLoss(ignore_index=-1)))
    optimizer.zero_grad()
    model(tokens, targets)[1].backward()
    optimizer.step()
    assert not optimizer.last_step.skipped


def test_a_criterion_that_raises_on_the_shapes_names_them():
    tokens, _ = sentences()
    model = IgnoresMinusOne()
    described = described_by(F.cross_entropy, lambda result: result[0])
    optimizer = Adler(model.parameters(), model, described)
    model(tokens, tokens)[1].backward()
    with pytest.raises(RuntimeError, match=r"\(4, 9, 7\).*\(36,\) from 0") as caught:
        optimizer.step()
    assert "cross_entropy(outputs, targets)" in str(caught.value)
    assert "so must outputs= and targets=" in str(caught.value)
    assert caught.value.__cause__ is not None


def test_what_is_no_tensor_is_named_by_its_type():
    model = IgnoresMinusOne()
    described = ModelLoss(
        F.cross_entropy,
        outputs=lambda result: result[0],
        targets=lambda *args: ...,
        loss=lambda result: result[1],
    )
    optimizer = Adler(model.parameters(), model, described)
    model(sentences()[0], sentences()[0])[1].backward()
    with pytest.raises(RuntimeError, match=r"raised TypeError.*its targets= ellipsis"):
        optimizer.step()


def test_the_check_waits_for_a_finite_loss_and_then_is_over():
    model = LanguageModel(shift=2)
    optimizer = Adler(model.parameters(), model, causal_lm(), **EXACT)
    tokens, labels = sentences()
    model(tokens, labels=torch.full_like(labels, -100))["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()
    model(tokens, labels=labels)["loss"].backward()
    with pytest.raises(RuntimeError, match="describes another loss"):
        optimizer.step()
    model.shift = 1
    optimizer.zero_grad()
    model(tokens, labels=labels)["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()
    items = (labels[:, 1:] != -100).sum()
    model(tokens, labels=labels, num_items_in_batch=items)["loss"].backward()
    with NoSynchronisation():
        optimizer.step()
    assert not optimizer.last_step.skipped


def test_a_call_without_labels_is_an_error_that_says_so():
    model = LanguageModel()
    optimizer = Adler(model.parameters(), model, causal_lm(), **EXACT)
    model(sentences()[0])["logits"].sum().backward()
    with pytest.raises(RuntimeError, match=r"labels=\.\.\."):
        optimizer.step()
    with pytest.raises(RuntimeError, match="takes the targets from the call"):
        optimizer.step(targets=sentences()[1])


def test_bad_arguments_are_named():
    model = LanguageModel()
    with pytest.raises(ValueError, match="output_fn"):
        Adler(model.parameters(), model, causal_lm(), output_fn=lambda out: out)
    with pytest.raises(TypeError, match="targets: expected a function, got int"):
        ModelLoss(nn.CrossEntropyLoss(), outputs=lambda out: out, targets=3)
    with pytest.raises(ValueError, match="problem_type='ranking'"):
        sequence_classification("ranking")


@pytest.mark.parametrize("copies", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_and_pickles_train_on_alike(copies):
    model = LanguageModel()
    optimizer = AdlerAdam(model.parameters(), model, causal_lm(), **EXACT)
    tokens, labels = sentences()
    model(tokens, labels=labels)["loss"].backward()
    optimizer.step()
    pair = model, optimizer
    twins = copies(pair)
    for network, stepper in (pair, twins):
        stepper.zero_grad()
        network(tokens, labels=labels)["loss"].backward()
        stepper.step()
    assert flat(pair[0]).equal(flat(twins[0]))
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)


# --- one call for a logger ------------------------------------------------------------------------


def test_scalars_hold_the_record_and_each_groups_rate():
    torch.manual_seed(0)
    model, criterion = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), nn.CrossEntropyLoss()
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters(), "lr": 0.25}]
    optimizer = Adler(groups, model, criterion, **EXACT)
    assert optimizer.scalars() == {}
    criterion(model(torch.randn(8, 4)), torch.randint(3, (8,))).backward()
    optimizer.step()
    numbers, record = optimizer.scalars("adler/"), optimizer.last_step
    assert {type(value) for value in numbers.values()} == {float}
    for name, value in record._asdict().items():
        assert numbers.pop(f"adler/{name}") == float(value)
    rate = float(record.effective_lr)
    assert numbers == {"adler/applied_lr/0": rate, "adler/applied_lr/1": 0.25 * rate}
