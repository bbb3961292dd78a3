"""Weights are never lost: optimizers that go, loaded weights, other optimizers, other states."""

import copy
import gc
import io
import warnings

import pytest
import torch
from support.right import DOUBLE, body
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

from adler import Adler, AdlerAdam, AdlerScheduleFree, Measure
from adler._optimizers.edits import Edits

ce = nn.CrossEntropyLoss()
torch.manual_seed(1)
X, Y = torch.randn(64, 6, dtype=DOUBLE), torch.randint(3, (64,))
KINDS = [Adler, AdlerScheduleFree]


def steps(model, optimizer, count):
    model.train()
    for k in range(count):
        rows = torch.arange(16) + k % 40
        optimizer.zero_grad()
        ce(model(X[rows]), Y[rows]).backward()
        optimizer.step()


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def at_the_average(model):
    model.eval()
    with torch.no_grad():
        model(X)
    return weights(model)


def equal(a, b):
    return all(x.equal(y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_whose_optimizer_is_gone_holds_the_average(kind):
    model = body()
    optimizer = kind(model.parameters(), model, ce)
    steps(model, optimizer, 20)
    y = weights(model)
    optimizer.eval()
    x = weights(model)
    optimizer.train()
    assert equal(weights(model), y)
    assert not equal(x, y)
    del optimizer
    gc.collect()
    assert equal(weights(model), x)
    assert equal(at_the_average(model), x)


@pytest.mark.parametrize("kind", KINDS)
def test_who_places_the_weights_finds_them_where_they_were(kind):
    model = body()
    optimizer = kind(model.parameters(), model, ce, follow_mode=False)
    steps(model, optimizer, 20)
    y = weights(model)
    del optimizer
    gc.collect()
    assert equal(weights(model), y)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_loaded_last_are_those_that_stay(kind):
    model = body()
    optimizer = kind(model.parameters(), model, ce)
    steps(model, optimizer, 10)
    best = copy.deepcopy(model.state_dict())
    steps(model, optimizer, 10)
    model.load_state_dict(best)
    del optimizer
    gc.collect()
    assert equal(weights(model), best.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_loaded_weights_are_tested_and_trained_on(kind, mode):
    model = body()
    optimizer = kind(model.parameters(), model, ce)
    steps(model, optimizer, 10)
    best = dict(zip(model.state_dict(), at_the_average(model)))
    steps(model, optimizer, 20)
    if mode == "eval":
        at_the_average(model)
    model.load_state_dict(best)
    assert equal(at_the_average(model), best.values())
    model.train()
    model(X)
    assert equal(weights(model), best.values())
    optimizer.zero_grad()
    steps(model, optimizer, 1)
    assert not equal(weights(model), best.values())


@pytest.mark.parametrize("kind", KINDS)
def test_weights_edited_between_steps_are_those_that_move(kind):
    model = body()
    optimizer = kind(model.parameters(), model, ce)
    for _ in range(10):
        steps(model, optimizer, 1)
        with torch.no_grad():
            for p in model.parameters():
                p.clamp_(-0.05, 0.05)
    assert all(float(p.abs().max()) <= 0.05 for p in at_the_average(model))


# --- written through .data, of which PyTorch keeps no trace ---------------------------------------

WRITTEN = r"of 4 parameters were written to through \.data"


def clamp(model):
    for p in model.parameters():
        p.data.clamp_(-0.05, 0.05)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", [0, 70])
def test_a_loop_that_clamps_through_data_is_noticed(kind, before):
    model = body()
    optimizer = kind(model.parameters(), model, ce)
    steps(model, optimizer, before)

    def clamped():
        for _ in range(64):
            steps(model, optimizer, 1)
            clamp(model)

    with pytest.warns(RuntimeWarning, match=WRITTEN) as said:
        clamped()
    assert len(said) == 1
    assert all(float(p.abs().max()) <= 0.05 for p in at_the_average(model))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_through_data_once_is_written_once(kind):
    """The average begins anew there, as after any other write, and not again."""

    def run(write):
        torch.manual_seed(0)
        model = body()
        optimizer = kind(model.parameters(), model, ce)
        steps(model, optimizer, 2)
        write(model)
        steps(model, optimizer, 10)
        return [*weights(model), *at_the_average(model)]

    with pytest.warns(RuntimeWarning, match=WRITTEN):
        found = run(clamp)
    assert equal(
        found, run(torch.no_grad()(lambda m: [p.clamp_(-0.05, 0.05) for p in m.parameters()]))
    )


@pytest.mark.parametrize("kind", KINDS)
def test_weights_loaded_through_data_while_tested_are_those_that_stay(kind):
    model = body()
    optimizer = kind(model.parameters(), model, ce)
    steps(model, optimizer, 10)
    best = at_the_average(model)
    steps(model, optimizer, 20)
    at_the_average(model)
    for p, kept in zip(model.parameters(), best, strict=True):
        p.data.copy_(kept)
    assert equal(at_the_average(model), best)
    model.train()
    model(X)
    assert equal(weights(model), best)
    optimizer.zero_grad()
    steps(model, optimizer, 1)
    assert not equal(weights(model), best)


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_weight_of_what_was_tested(kind):
    model = body()
    optimizer = kind(model.parameters(), model, ce)
    steps(model, optimizer, 10)
    y = weights(model)
    at_the_average(model)
    next(model.parameters()).data[0, 0] += 1e-9
    edited = weights(model)
    model.train()
    model(X)
    assert equal(weights(model), [edited[0], *y[1:]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE, torch.bfloat16])
def test_weights_that_nobody_wrote_to_are_put_back(kind, dtype):
    """However many, and in whatever order in memory they are."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 37, 3), nn.ReLU(), nn.Flatten(), nn.Linear(37 * 36, 3))
    model.to(dtype, memory_format=torch.channels_last)
    model[3].weight = nn.Parameter(torch.randn(37 * 36, 3, dtype=dtype).mul_(0.03).T)
    optimizer = kind(model.parameters(), model, ce)
    for _ in range(5):
        optimizer.zero_grad()
        ce(model(torch.randn(8, 3, 8, 8, dtype=dtype)), Y[:8]).backward()
        optimizer.step()
    y = weights(model)
    model.eval()
    with torch.no_grad():
        model(torch.randn(8, 3, 8, 8, dtype=dtype))
    assert not equal(weights(model), y)
    model.train()
    model(torch.randn(8, 3, 8, 8, dtype=dtype))
    assert equal(weights(model), y)


def test_weights_that_are_no_numbers_are_not_taken_for_written_to():
    """Where the host does not wait to know that a step was skipped, it is noted like others."""
    p, edits = torch.full((2,), torch.nan), Edits()
    edits.note_step([p], {p: {"z": p}})
    edits.look([p])
    assert edits.known(p)


def test_a_model_that_is_tested_in_half_precision_trains_on_from_where_it_was():
    model = body().float()
    optimizer = AdlerScheduleFree(model.parameters(), model, ce)
    for _ in range(5):
        optimizer.zero_grad()
        ce(model(X.float()), Y).backward()
        optimizer.step()
    y = weights(model)
    model.eval()
    model.half().float()
    model.train()
    model(X.float())
    assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(weights(model), y))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, DOUBLE])
def test_a_model_that_is_converted_is_tested_and_saved_at_the_average(kind, dtype):
    model = body().float()
    optimizer = kind(model.parameters(), model, ce)
    for _ in range(2):
        optimizer.zero_grad()
        ce(model(X.float()), Y).backward()
        optimizer.step()
    x = [value.to(dtype) for value in model.state_dict().values()]
    model.to(dtype)
    saved = model.state_dict().values()
    model.eval()
    for found in (saved, weights(model)):
        rounding = 2 * torch.finfo(dtype).eps  # of weights below one: where they were, and of x
        assert all(torch.allclose(a, b, rtol=0, atol=rounding) for a, b in zip(found, x))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_loaded_through_data_into_a_converted_model_are_those_that_stay(kind):
    model = body().float()
    optimizer = kind(model.parameters(), model, ce)
    for _ in range(5):
        optimizer.zero_grad()
        ce(model(X.float()), Y).backward()
        optimizer.step()
    model.eval()
    model.half()
    for p in model.parameters():
        p.data.mul_(2)
    loaded = weights(model)
    model.train()
    assert equal(weights(model), loaded)


# --- who comes after ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_old_optimizer_leaves_the_next_phase_alone(kind):
    model = body()
    old = kind(model.parameters(), model, ce)
    steps(model, old, 20)
    x = at_the_average(model)
    steps(model, torch.optim.SGD(model.parameters(), lr=0.0), 1)
    assert equal(weights(model), x)
    steps(model, torch.optim.SGD(model.parameters(), lr=0.1), 20)
    trained = weights(model)
    assert not equal(trained, x)
    assert equal(at_the_average(model), trained)
    assert old.last_step is not None


@pytest.mark.parametrize("kind", KINDS)
def test_the_hooks_that_pytorch_goes_through_at_each_step_stay_as_they_are(kind):
    """It goes through them while other threads make optimizers, and lose them."""
    hooks = _global_optimizer_pre_hooks
    model = body()
    optimizers = [kind(model.parameters(), model, ce)]
    before = dict(hooks)
    optimizers.append(kind(model.parameters(), model, ce))
    assert dict(hooks) == before
    del optimizers
    gc.collect()
    assert dict(hooks) == before


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_goes_on_bit_for_bit(kind):
    model = body()
    optimizer = kind(model.parameters(), model, ce)
    steps(model, optimizer, 12)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    steps(model, optimizer, 5)
    other = body()
    again = kind(other.parameters(), other, ce, measure=Measure())
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    steps(other, again, 5)
    assert equal(weights(other), weights(model))
    assert equal(at_the_average(other), at_the_average(model))


@pytest.mark.parametrize("kind", [Adler, AdlerAdam, AdlerScheduleFree])
@pytest.mark.parametrize("theirs", [torch.optim.AdamW, torch.optim.SGD])
def test_a_state_of_another_optimizer_is_refused(kind, theirs):
    model = body()
    old = theirs(model.parameters(), lr=1e-3)
    steps(model, old, 1)
    new = kind(model.parameters(), model, ce)
    before = copy.deepcopy(new.state_dict())
    with pytest.raises(ValueError, match=r"not that of an optimizer of adler.*0\.001"):
        new.load_state_dict(old.state_dict())
    assert str(new.state_dict()) == str(before)


@pytest.mark.parametrize("kind", KINDS)
def test_without_its_hooks_a_model_is_saved_without_a_name_of_this_library(kind):
    model = body()
    optimizer = kind(model.parameters(), model, ce)
    steps(model, optimizer, 5)
    x = at_the_average(model)
    optimizer.remove_hooks()
    file = io.BytesIO()
    torch.save(model, file)
    assert b"adler" not in file.getvalue()
    assert equal(weights(model), x)


# --- written to, and saved, loaded or converted ---------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_whose_weights_are_clamped_goes_on_from_a_checkpoint_bit_for_bit(kind):
    def clamp(model):
        with torch.no_grad():
            for p in model.parameters():
                p.clamp_(-0.2, 0.2)

    runs = []
    for _ in range(2):
        model = body()
        runs.append((model, kind(model.parameters(), model, ce)))
    (model, optimizer), (other, resumed) = runs
    for _ in range(6):
        steps(model, optimizer, 1)
        clamp(model)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(saved[0])
        resumed.load_state_dict(saved[1])
        for one, its in runs:
            steps(one, its, 3)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(other)))
    assert all(torch.equal(a, b) for a, b in zip(at_the_average(model), at_the_average(other)))


def test_weights_written_to_after_the_model_left_half_precision_stay_so():
    model = body().bfloat16()
    optimizer = AdlerScheduleFree(model.parameters(), model, ce)
    for _ in range(4):
        optimizer.zero_grad()
        ce(model(X.bfloat16()), Y).backward()
        optimizer.step()
    model.float()
    optimizer.zero_grad()
    ce(model(X.float()), Y).backward()
    optimizer.step()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.5)
    optimizer.eval()
    assert all(torch.equal(p, torch.full_like(p, 0.5)) for p in model.parameters())
    assert all("precise_y" not in optimizer.state[p] for p in model.parameters())


def test_an_average_in_place_is_taken_away_though_the_interpolation_was_changed():
    model = body()
    optimizer = AdlerScheduleFree(model.parameters(), model, ce)
    steps(model, optimizer, 5)
    y, z = weights(model), [optimizer.state[p]["z"].clone() for p in model.parameters()]
    optimizer.eval()
    for group in optimizer.param_groups:
        group["betas"] = (0.8, 0.999)
    optimizer.train()
    assert all(torch.equal(a, b) for a, b in zip(weights(model), y))
    assert all(torch.equal(optimizer.state[p]["z"], a) for p, a in zip(model.parameters(), z))


@pytest.mark.parametrize("half", [None, torch.bfloat16, torch.half])
def test_one_weight_that_is_written_to_after_loading_is_seen(half):
    model = body()
    optimizer = AdlerScheduleFree(model.parameters(), model, ce)
    steps(model, optimizer, 5)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    if half is not None:
        saved = ({name: value.to(half) for name, value in saved[0].items()}, saved[1])

    def load():
        other = body()
        resumed = AdlerScheduleFree(other.parameters(), other, ce)
        other.load_state_dict(saved[0])
        resumed.load_state_dict(copy.deepcopy(saved[1]))
        return other, resumed

    other, resumed = load()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.train()
        steps(other, resumed, 1)
    other, resumed = load()
    with torch.no_grad():
        first = next(other.parameters())
        first[0, 0] += 0.02 * first.abs().max()
    written = first.detach().clone()
    with pytest.warns(RuntimeWarning, match="1 of 4 parameters are not those of the checkpoint"):
        resumed.train()
    assert torch.equal(first, written)
