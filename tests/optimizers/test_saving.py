"""What a model saves is the average, whoever asks and when; resuming goes on bit for bit."""

import copy
import gc
import io
import pickle
import warnings

import pytest
import torch
from support.right import DOUBLE, body
from torch import nn

from adler import Adler, AdlerAdam, AdlerMuon, AdlerScheduleFree

ce = nn.CrossEntropyLoss()
torch.manual_seed(1)
X, Y = torch.randn(64, 6, dtype=DOUBLE), torch.randint(3, (64,))
KINDS = [Adler, AdlerMuon, AdlerScheduleFree]


def normed():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()


def steps(model, optimizer, count, start=0, criterion=ce):
    model.train()
    for k in range(start, start + count):
        rows = torch.arange(16) + k % 40
        optimizer.zero_grad()
        criterion(model(X[rows]), Y[rows]).backward()
        optimizer.step()


def equal(a, b):
    return a.keys() == b.keys() and all(a[key].equal(b[key]) for key in a)


def at_the_average(model):
    model.eval()
    with torch.no_grad():
        model(X)
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_in_memory_stays_what_it_was_when_the_average_is_tested(kind):
    model = body()
    optimizer = kind(model.parameters(), model, ce)
    steps(model, optimizer, 20)
    saved = optimizer.state_dict()["state"]
    held = copy.deepcopy(saved)
    at_the_average(model)
    assert all(equal(saved[number], held[number]) for number in held)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_made_while_the_average_is_tested_trains_on_from_where_training_was(kind, copied):
    model, criterion = body(), nn.CrossEntropyLoss()
    optimizer = kind(model.parameters(), model, criterion)
    steps(model, optimizer, 20, criterion=criterion)
    trained = {name: p.clone() for name, p in model.named_parameters()}
    at_the_average(model)
    twin, its_criterion, its_optimizer = copied((model, criterion, optimizer))
    assert not equal(dict(twin.named_parameters()), trained)
    for each in (model, twin):
        each.train()
        each(X)
        assert equal(dict(each.named_parameters()), trained)
    steps(model, optimizer, 5, start=20, criterion=criterion)
    steps(twin, its_optimizer, 5, start=20, criterion=its_criterion)
    assert equal(dict(model.named_parameters()), dict(twin.named_parameters()))


@pytest.mark.parametrize("kind", KINDS)
def test_train_puts_back_what_was_put_into_the_state_by_hand(kind):
    model = body()
    optimizer = kind(model.parameters(), model, ce)
    steps(model, optimizer, 5)
    trained = {name: p.clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        optimizer.state[p]["y"] = p.detach().clone()
    ce(model(X), Y).backward()
    with pytest.raises(RuntimeError, match=r"call optimizer.train\(\)"):
        optimizer.step()
    optimizer.train()
    assert equal(dict(model.named_parameters()), trained)
    steps(model, optimizer, 1)


@pytest.mark.parametrize("build", [body, normed])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_in_training_saves_what_is_tested(kind, build):
    model = build()
    optimizer = kind(model.parameters(), model, ce)
    steps(model, optimizer, 20)
    held = {
        key: value.clone() for key, value in [*model.named_parameters(), *model.named_buffers()]
    }
    saved = copy.deepcopy(model.state_dict())
    now = dict([*model.named_parameters(), *model.named_buffers()])
    assert equal(now, held)  # nothing has moved
    found = at_the_average(model)
    assert equal(saved, found)
    assert not equal(saved, held)
    assert equal(copy.deepcopy(model.state_dict()), found)  # in eval mode the same


@pytest.mark.parametrize("build", [body, normed])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_resuming_goes_on_bit_for_bit(kind, mode, build):
    model = build()
    optimizer = kind(model.parameters(), model, ce)
    steps(model, optimizer, 12)
    if mode == "eval":
        at_the_average(model)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    steps(model, optimizer, 20, start=12)  # running statistics are of the last 16 batches
    other = build()
    again = kind(other.parameters(), other, ce)
    other.load_state_dict(weights)
    again.load_state_dict(state)
    steps(other, again, 20, start=12)
    own = dict([*model.named_parameters(), *model.named_buffers()])
    theirs = dict([*other.named_parameters(), *other.named_buffers()])
    assert equal(own, theirs)
    assert equal(dict(model.state_dict()), dict(other.state_dict()))


def test_parts_wrappers_and_tied_weights_save_the_average_too():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.embed(x))

    torch.manual_seed(0)
    model = Tied()
    optimizer = AdlerScheduleFree(model.parameters(), model, ce)
    for _ in range(5):
        optimizer.zero_grad()
        tokens = torch.randint(6, (32,))
        ce(model(tokens), (tokens + 1) % 6).backward()
        optimizer.step()
    saved = model.state_dict()
    assert saved["embed.weight"].data_ptr() == saved["head.weight"].data_ptr()
    assert not saved["embed.weight"].equal(model.embed.weight)
    assert model.embed.state_dict()["weight"].equal(saved["embed.weight"])
    assert nn.Sequential(model).state_dict()["0.head.weight"].equal(saved["embed.weight"])
    assert (
        torch.compile(model, backend="eager")
        .state_dict()["_orig_mod.head.weight"]
        .equal(saved["embed.weight"])
    )
    assert model.state_dict(keep_vars=True)["embed.weight"] is model.embed.weight


def test_saving_between_forward_and_backward_disturbs_neither():
    model, twin = normed(), normed()
    optimizer, plain = (AdlerScheduleFree(m.parameters(), m, ce) for m in (model, twin))
    for m, o in ((model, optimizer), (twin, plain)):
        for k in range(6):
            rows = torch.arange(16) + k
            o.zero_grad()
            loss = ce(m(X[rows]), Y[rows])
            if m is model:
                m.state_dict()
                o.state_dict()
            loss.backward()
            o.step()
    assert equal(dict(model.named_parameters()), dict(twin.named_parameters()))
    assert equal(dict(model.named_buffers()), dict(twin.named_buffers()))


def test_without_following_a_model_saves_what_it_holds():
    model = body()
    optimizer = AdlerScheduleFree(model.parameters(), model, ce, follow_mode=False)
    steps(model, optimizer, 5)
    assert equal(dict(model.state_dict()), dict(model.named_parameters()))
    assert all("y" not in mine for mine in optimizer.state_dict()["state"].values())


def test_groups_added_later_and_optimizers_that_are_gone():
    model = body()
    first, *rest = model.parameters()
    optimizer = AdlerScheduleFree([first], model, ce)
    optimizer.add_param_group({"params": rest})
    steps(model, optimizer, 10)
    assert not model.state_dict()[list(model.state_dict())[-1]].equal(rest[-1])
    x = copy.deepcopy(model.state_dict())
    del optimizer
    gc.collect()
    assert equal(dict(model.state_dict()), dict(x))
    assert not any(module._state_dict_hooks for module in model.modules())


def test_a_state_loaded_into_a_loop_that_keeps_its_weights():
    """Tools load an optimizer's own state into it, and no weights."""
    model = body()
    twin = copy.deepcopy(model)
    optimizer, plain = (AdlerScheduleFree(m.parameters(), m, ce) for m in (model, twin))
    steps(model, optimizer, 8)
    steps(twin, plain, 8)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert equal(copy.deepcopy(at_the_average(model)), at_the_average(twin))
    steps(model, optimizer, 4, start=8)
    steps(twin, plain, 4, start=8)
    assert equal(dict(model.named_parameters()), dict(twin.named_parameters()))


def test_a_state_loaded_beside_other_weights_says_so_and_keeps_them():
    model, other = body(), body()
    optimizer = AdlerScheduleFree(model.parameters(), model, ce)
    steps(model, optimizer, 8)
    again = AdlerScheduleFree(other.parameters(), other, ce)
    torch.manual_seed(9)
    for p in other.parameters():
        nn.init.normal_(p)
    kept = copy.deepcopy(dict(other.named_parameters()))
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with pytest.warns(RuntimeWarning, match="not those of the checkpoint"):
        found = at_the_average(other)
    assert equal(found, kept)


def test_weights_saved_in_half_precision_are_known_again():
    model, other = body(), body()
    optimizer = AdlerScheduleFree(model.parameters(), model, ce)
    steps(model, optimizer, 8)
    state = copy.deepcopy(optimizer.state_dict())
    other.load_state_dict({k: v.bfloat16() for k, v in model.state_dict().items()})
    again = AdlerScheduleFree(other.parameters(), other, ce)
    again.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(other, again, 1, start=8)
    steps(model, optimizer, 1, start=8)
    assert equal(dict(model.named_parameters()), dict(other.named_parameters()))


def test_a_state_of_an_older_version_is_at_the_weights_of_training():
    model, other = body(), body()
    optimizer = AdlerScheduleFree(model.parameters(), model, ce)
    steps(model, optimizer, 8)
    state = copy.deepcopy(optimizer.state_dict())
    for mine in state["state"].values():
        del mine["y"]
    other.load_state_dict(dict(model.named_parameters()))
    again = AdlerScheduleFree(other.parameters(), other, ce)
    again.load_state_dict(state)
    steps(model, optimizer, 3, start=8)
    steps(other, again, 3, start=8)
    assert equal(dict(model.named_parameters()), dict(other.named_parameters()))


@pytest.mark.parametrize("kind", [Adler, AdlerAdam, AdlerScheduleFree])
def test_a_whole_model_is_saved_and_loaded_with_its_hooks(kind, tmp_path):
    model = normed()
    optimizer = kind(model.parameters(), model, ce)
    steps(model, optimizer, 5)
    at_the_average(model)
    torch.save(model, tmp_path / "model")
    with torch.serialization.safe_globals([nn.Sequential, nn.Linear, nn.Tanh, nn.BatchNorm1d]):
        loaded = torch.load(tmp_path / "model")  # of this library nothing need be named
    assert equal(loaded.state_dict(), model.state_dict())
    again = kind(loaded.parameters(), loaded, ce)
    steps(loaded, again, 3)
    assert not again.last_step.skipped
    assert len(loaded.state_dict()) == len(model.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_model_is_saved_as_it_is(kind):
    """In training what the optimizer's state belongs to, at a test the average."""
    model = normed()
    optimizer = kind(model.parameters(), model, ce)
    steps(model, optimizer, 20)
    held = [t.clone() for t in (*model.parameters(), *model.buffers())]

    def saved():
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        assert type(loaded) is nn.Sequential
        return loaded

    for twin in (saved(), copy.deepcopy(model)):
        own = [*twin.parameters(), *twin.buffers()]
        assert all(a.equal(b) for a, b in zip(own, held, strict=True))
    average = at_the_average(model)
    assert equal(saved().state_dict(), average)
    assert equal(copy.deepcopy(model).state_dict(), average)
    pair = pickle.loads(pickle.dumps((model, optimizer)))
    for m, o in ((model, optimizer), pair):
        steps(m, o, 3, start=20, criterion=o.criterion)
    assert equal(dict(model.named_parameters()), dict(pair[0].named_parameters()))


@pytest.mark.parametrize("build", [body, normed])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_at_a_test_stays_when_training_goes_on(kind, build):
    model = build()
    optimizer = kind(model.parameters(), model, ce)
    steps(model, optimizer, 20)
    model.eval()
    saved = {k: v for k, v in model.state_dict().items() if "tracked" not in k}
    kept = {key: value.clone() for key, value in saved.items()}
    steps(model, optimizer, 3, start=20)
    assert equal(saved, kept)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_of_a_scripted_part_it_is_said_and_the_average_is_saved_where_it_stands():
    torch.manual_seed(0)
    parts = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
    model, criterion = nn.Sequential(*map(torch.jit.script, parts)), nn.CrossEntropyLoss()
    with pytest.warns(RuntimeWarning, match=r"scripted .* call optimizer.eval\(\)") as said:
        optimizer = AdlerScheduleFree(model.parameters(), model, criterion)
    assert len(said) == 1
    for _ in range(5):
        optimizer.zero_grad()
        criterion(model(torch.randn(6, 4)), torch.randint(3, (6,))).backward()
        optimizer.step()
    training = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer.eval()
    saved = model.state_dict()
    for name, p in model.named_parameters():
        z, y = optimizer.state[p]["z"], training[name]
        torch.testing.assert_close(saved[name], y + (y - z) / 9, rtol=1e-5, atol=1e-6)
        assert not saved[name].equal(y)
