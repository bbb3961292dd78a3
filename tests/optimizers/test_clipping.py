"""What clipping does to the rate, where the direction depends on the gradient's scale or not."""

import copy

import pytest
import torch
from support.cases import classification as setting
from support.options import EXACT
from torch import nn

from adler import Adler, AdlerAdam, AdlerMuon, AdlerScheduleFree, wrap
from adler._optimizers.clipping import GradientScale


def wrapped(base):
    return lambda params, model, criterion, **options: wrap(
        base(params, lr=1.0), model, criterion, **options
    )


SCALE_FREE = {
    "AdlerAdam": AdlerAdam,
    "AdlerScheduleFree": AdlerScheduleFree,
    "AdlerMuon": AdlerMuon,
    "wrapped AdamW": wrapped(torch.optim.AdamW),
}


def run(make, change, steps=12, **options):
    """A few steps whose gradients the loop changes; the parameters, and all minibatch rates."""
    model, criterion, x, y = setting()
    optimizer = make(model.parameters(), model, criterion, **EXACT, **options)
    rates = []
    for _ in range(steps):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        change(model)
        optimizer.step()
        rates.append(float(optimizer.last_step.minibatch_lr))
    return [p.detach().clone() for p in model.parameters()], rates


def multiplied(factor):
    def change(model):
        for p in model.parameters():
            p.grad.mul_(factor)

    return change


@pytest.mark.parametrize("make", SCALE_FREE.values(), ids=SCALE_FREE)
def test_a_constant_factor_changes_nothing_where_the_scale_drops_out(make):
    small = {} if make in (SCALE_FREE["wrapped AdamW"],) else {"adam_eps": 1e-12}
    plain, rates = run(make, lambda model: None, **small)
    clipped, theirs = run(make, multiplied(0.125), **small)
    assert theirs == pytest.approx(rates, rel=1e-4)
    for p, q in zip(plain, clipped, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-3, atol=1e-5)


def test_the_plain_gradients_rate_stays_and_the_step_is_shorter():
    _, rates = run(Adler, lambda model: None, 1, interpolation=None)
    _, theirs = run(Adler, multiplied(0.125), 1, interpolation=None)
    assert theirs == pytest.approx(rates, rel=1e-9)


def test_clipping_by_value_is_no_factor():
    def by_value(model):
        nn.utils.clip_grad_value_(model.parameters(), 0.01)

    _, rates = run(AdlerAdam, lambda model: None, 1)
    _, theirs = run(AdlerAdam, by_value, 1)
    assert theirs[0] != pytest.approx(rates[0], rel=1e-3)
    scale = GradientScale(ps := [torch.tensor([1.0, 2.0], requires_grad=True)])
    (ps[0] * torch.tensor([1.0, 5.0])).sum().backward()
    nn.utils.clip_grad_value_(ps, 2.0)
    assert torch.isnan(scale.factor())


@pytest.mark.parametrize("unscales", [True, False])
def test_a_scaler_of_the_loss_is_no_clipping(unscales):
    """The scale is the scaler's, whoever takes it off; clipping beside it is seen."""

    def rates(clip, scaled):
        model, criterion, x, y = setting()
        model = model.float()
        x = x.float()
        optimizer = AdlerAdam(model.parameters(), model, criterion, **EXACT, adam_eps=1e-12)
        scaler = torch.amp.GradScaler("cpu", 2.0**10, enabled=scaled)
        found = []
        for _ in range(4):
            optimizer.zero_grad()
            scaler.scale(criterion(model(x), y)).backward()
            if unscales:
                scaler.unscale_(optimizer)
                if clip:
                    nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            scaler.step(optimizer)
            scaler.update()
            found.append(float(optimizer.last_step.minibatch_lr))
        return found

    plain = rates(False, False)
    assert rates(False, True) == pytest.approx(plain, rel=1e-3)
    if unscales:
        clipped = rates(True, True)
        assert clipped == pytest.approx(rates(True, False), rel=1e-3)
        assert clipped[0] == pytest.approx(plain[0], rel=1e-3)


def test_accumulated_gradients_are_watched_as_they_add_up():
    p = torch.ones(3, requires_grad=True)
    scale = GradientScale([p])
    for _ in range(3):
        (p * torch.arange(3.0)).sum().backward()
    assert scale.factor() is None
    p.grad.mul_(0.5)
    assert float(scale.factor()) == 0.5
    p.grad = None
    assert scale.factor() is None


def test_hooks_go_with_the_optimizer_and_copies_have_their_own():
    model, criterion, x, y = setting()
    optimizer = AdlerAdam(model.parameters(), model, criterion)
    twin_model, twin = copy.deepcopy((model, optimizer))
    criterion(twin_model(x), y).backward()
    assert twin._gradient_scale._made
    assert not optimizer._gradient_scale._made
    del optimizer
    criterion(model(x), y).backward()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
