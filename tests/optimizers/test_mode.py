"""Evaluation mode brings the average at once: for other methods, parts and surroundings too."""

import copy
import gc
import io
import types

import pytest
import torch
from support.right import DOUBLE, body, untouched
from torch import nn

from adler import Adler, AdlerScheduleFree

KINDS = {"schedule-free": AdlerScheduleFree, "adler": Adler}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
ce, mse = nn.CrossEntropyLoss(), nn.MSELoss()
torch.manual_seed(1)
X, Y = torch.randn(32, 6, dtype=DOUBLE), torch.randint(3, (32,))


class Coder(nn.Module):
    """Samples by another method than forward."""

    def __init__(self):
        super().__init__()
        self.e, self.d = nn.Linear(6, 2).to(DOUBLE), nn.Linear(2, 6).to(DOUBLE)

    def forward(self, x):
        return self.sample(self.e(x))

    def sample(self, z):
        return self.d(z)


class Around(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, x):
        return self.inner.forward(x)  # past the hooks


def trained(model, kind=AdlerScheduleFree, within=None, steps=10, target=None, **options):
    """An optimizer of the parameters of a part, given the whole."""
    part = model if within is None else within
    optimizer = kind(part.parameters(), model, mse, **options)
    learn(model, optimizer, steps)
    return optimizer


def learn(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        f = model(X)
        mse(f, torch.ones_like(f)).backward()
        optimizer.step()


def points(optimizer, model):
    """The weights of training and the average, by `eval` and `train` themselves."""
    y = weights(model)
    optimizer.eval()
    x = weights(model)
    optimizer.train()
    assert equal(weights(model), y)
    assert not equal(x, y)
    return x, y


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def equal(a, b):
    return all(p.equal(q) for p, q in zip(a, b, strict=True))


@every_kind
def test_other_methods_and_parts_see_the_average(kind):
    model = Coder()
    optimizer = trained(model, kind)
    (x, y), z = points(optimizer, model), torch.randn(5, 2, dtype=DOUBLE)
    model.eval()
    with torch.no_grad():
        sampled, coded = model.sample(z), model.e(X)
    assert equal(weights(model), x)
    torch.testing.assert_close(sampled, nn.functional.linear(z, x[2], x[3]))
    torch.testing.assert_close(coded, nn.functional.linear(X, x[0], x[1]))
    model.train()
    model(X)
    assert equal(weights(model), y)


@every_kind
def test_a_module_around_the_model_and_one_within_it_bring_the_average(kind):
    inner = body(6, 6)
    model = nn.Sequential(inner, nn.Linear(6, 2).to(DOUBLE).requires_grad_(False))
    optimizer = trained(model, kind, within=inner)
    x, y = points(optimizer, model)
    for seen in (Around(model), model, inner):
        seen.eval()
        assert equal(weights(model), x)
        assert not any(m.training for m in seen.modules())
        seen.train()
        assert all(m.training for m in seen.modules())
        model.train()
        model(X)
        assert equal(weights(model), y)
    inner[0].eval()  # a frozen part says nothing
    assert equal(weights(model), y)


@every_kind
@pytest.mark.filterwarnings("ignore:the model was called in evaluation mode with gradients")
def test_training_on_frozen_statistics_is_training(kind):
    model = Coder()
    optimizer = trained(model, kind, steps=3)
    for _ in range(3):
        model.eval()
        learn(model, optimizer, 2)
    twin = Coder()
    twin.load_state_dict({k: v.clone() for k, v in Coder().state_dict().items()})
    assert optimizer.param_groups[0]["steps"] == 9
    x, y = points(optimizer, model)
    model.eval()  # nor does the mode say anything then
    assert equal(weights(model), y)
    with torch.no_grad():
        model(X)
    assert equal(weights(model), x)


@every_kind
def test_a_test_with_gradients_is_at_the_training_weights_and_says_so_once(kind):
    model = Coder()
    optimizer = trained(model, kind)
    x, y = points(optimizer, model)
    model.eval()
    with pytest.warns(RuntimeWarning, match=r"optimizer\.eval\(\) after model\.eval\(\)"):
        model(X)
    assert equal(weights(model), y)
    model.train()
    model.eval()
    model(X)  # a second warning would be an error
    model.train()
    model.eval()
    optimizer.eval()  # as the warning says
    model(X)
    assert equal(weights(model), x)


@every_kind
def test_the_average_that_was_asked_for_stays_with_gradients_too(kind):
    model = Coder()
    optimizer = trained(model, kind)
    x, _ = points(optimizer, model)
    model.eval()
    with torch.no_grad():
        model(X)
    model(X)
    assert equal(weights(model), x)
    with pytest.raises(RuntimeError, match=r"call optimizer\.train\(\)"):
        learn(model, optimizer, 1)


@every_kind
def test_statistics_made_anew_stay_at_the_average(kind):
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 6)).to(DOUBLE)
    optimizer = trained(model, kind)
    x, _ = points(optimizer, model)
    model.eval()
    torch.optim.swa_utils.update_bn([X], model)
    assert equal(weights(model), x)
    with torch.no_grad():
        model(X)
    model.train()
    torch.optim.swa_utils.update_bn([X], model)
    assert equal(weights(model), x)


def frozen(self, mode=True):
    nn.Module.train(self, mode)
    self.e.eval()
    return self


@every_kind
@pytest.mark.parametrize("where", ["class", "instance", "none"])
def test_what_sets_the_mode_still_does_and_is_left_as_it_was(kind, where):
    model = type("Own", (Coder,), {"train": frozen} if where == "class" else {})()
    if where == "instance":
        model.train = types.MethodType(frozen, model)
    before = type(model), dict(vars(model))
    optimizer = trained(model, kind)
    assert model.__class__ is before[0]
    assert model.train() is model
    assert model.e.training == (where == "none")
    assert model.eval() is model
    assert not model.e.training
    model.train()
    optimizer.remove_hooks()
    assert (type(model), dict(vars(model))) == before
    optimizer = trained(model, kind)
    del optimizer
    gc.collect()
    assert (type(model), dict(vars(model))) == before


@every_kind
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_have_their_mode_to_themselves(kind, how):
    model = nn.Sequential(body(6, 6))
    optimizer = trained(model, kind)
    _, y = points(optimizer, model)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        with torch.serialization.safe_globals([nn.Sequential, nn.Linear, nn.Tanh]):
            twin = torch.load(file, weights_only=True)
    assert type(twin) is nn.Sequential
    assert type(model[:1]) is nn.Sequential
    twin.eval()
    assert not any(m.training for m in twin.modules())
    assert all(m.training for m in model.modules())
    assert equal(weights(model), y)
    again = copy.deepcopy(twin).train()
    assert again[0].training
    assert not twin[0].training
    other = trained(twin.train(), kind)
    x, _ = points(other, twin)
    twin.eval()
    assert equal(weights(twin), x)


def test_a_shallow_copy_has_a_mode_of_its_own():
    model = nn.Linear(6, 6).to(DOUBLE)
    optimizer = trained(model)
    _, y = points(optimizer, model)
    twin = copy.copy(model)
    assert type(twin) is nn.Linear
    twin.eval()
    assert model.training
    assert equal(weights(model), y)


@every_kind
def test_whoever_does_not_follow_is_not_told(kind):
    model = Coder()
    optimizer = trained(model, kind, follow_mode=False)
    _, y = points(optimizer, model)
    model.eval()
    assert equal(weights(model), y)


def test_two_optimizers_of_one_model_both_follow():
    model = Coder()
    first = AdlerScheduleFree(model.e.parameters(), model, mse)
    second = AdlerScheduleFree(model.d.parameters(), model, mse)
    for _ in range(5):
        model.zero_grad()
        mse(model(X), X).backward()
        first.step()
        second.step()
    y = weights(model)
    first.eval()
    second.eval()
    x = weights(model)
    first.train()
    second.train()
    model.eval()
    assert equal(weights(model), x)
    model.train()
    model(X)
    assert equal(weights(model), y)
    first.remove_hooks()
    model.eval()
    assert equal(weights(model)[2:], x[2:])
    assert equal(weights(model)[:2], y[:2])


def test_a_forward_pass_that_changes_the_mode_is_trained_where_it_began():
    class Peeks(Coder):
        def forward(self, x):
            self.eval()
            self.train()
            return super().forward(x)

    model = Peeks()
    optimizer = trained(model)
    held = untouched(model)
    assert bool(optimizer.last_step.trusted)
    assert untouched(model) == held
