"""Parameters that a forward pass writes to, trained or not, are written to once."""

import copy
import itertools
import warnings

import pytest
import torch
from support.replays import agrees, ce, data, every_engine
from support.right import DOUBLE, check, right, untouched
from torch import nn

from adler import Adler, Measure
from adler._recording import state


class Momentum(nn.Module):
    """A key encoder that follows another inside forward."""

    update = None

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(6, 3), nn.Linear(6, 3).requires_grad_(False)

    def forward(self, x):
        with torch.no_grad():
            for q, k in zip(self.q.parameters(), self.k.parameters()):
                type(self).update(q, k)
            keys = self.k(x)
        return self.q(x) * keys


def assign(q, k):
    k.data = k.data * 0.9 + q.data * 0.1


UPDATES = {
    "data =": assign,
    "in place": lambda q, k: k.mul_(0.9).add_(q, alpha=0.1),
    "data in place": lambda q, k: k.data.mul_(0.9).add_(q.data, alpha=0.1),
    "copy_": lambda q, k: k.copy_(k * 0.9 + q * 0.1),
    "lerp_": lambda q, k: k.data.lerp_(q.data, 0.1),
}


def leaves_all(optimizer, model, x, y):
    """Whether a step of no length leaves everything as the training pass did, used or not."""
    optimizer.zero_grad()
    ce(model(x), y).backward()
    held = untouched(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # that it was not used, or another was
        optimizer.step()
    return untouched(model) == held


@every_engine
@pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES)
def test_a_momentum_encoder_moves_once(update, jvp):
    kind = type("Kind", (Momentum,), {"update": staticmethod(update)})
    agrees(kind, jvp, params=lambda m: m.q.parameters())


@pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES)
def test_a_momentum_encoder_moves_once_at_every_step(update):
    torch.manual_seed(0)
    x, y = data()
    model = type("Kind", (Momentum,), {"update": staticmethod(update)})().to(DOUBLE)
    optimizer = Adler(list(model.q.parameters()), model, ce, measure=Measure.every_step())
    for _ in range(8):
        before = [
            (k * 0.9 + q * 0.1).detach() for q, k in zip(model.q.parameters(), model.k.parameters())
        ]
        optimizer.zero_grad()
        ce(model(x), y).backward()
        optimizer.step()
        for k, expected in zip(model.k.parameters(), before):
            torch.testing.assert_close(k.detach(), expected, rtol=1e-12, atol=1e-12)
        assert bool(optimizer.last_step.trusted)


def test_weights_that_a_forward_pass_projects_stay_projected():
    class Projected(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(6, 3)

        def forward(self, x):
            with torch.no_grad():
                self.l.weight.data.renorm_(2, 0, 0.3)
            return self.l(x)

    agrees(Projected)


WRITES = {
    "in place": lambda w: w.mul_(0.9).add_(0.1),
    "data in place": lambda w: w.data.mul_(0.9).add_(0.1),
    "data =": lambda w: setattr(w, "data", w.data * 0.9 + 0.1),
}


@every_engine
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_trained_weights_that_a_forward_pass_writes_to_are_written_once(write, jvp):
    """The replay begins where the call did: a second write would make other outputs."""

    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            h = self.a(x).tanh()
            with torch.no_grad():
                write(self.b.weight)  # before it is read
            return self.b(h)

    x, y = data()
    model = Writes().to(DOUBLE)
    options = {"lr": 0.0, "interpolation": None, "measure": Measure.every_step(jvp)}
    optimizer = Adler(model.parameters(), model, ce, **options)
    for _ in range(5):  # the first calls alone keep a copy of everything
        optimizer.zero_grad()
        twin = copy.deepcopy(model)
        ce(model(x), y).backward()
        held, out = untouched(model), twin(x)
        optimizer.step()
        assert untouched(model) == held
        check(optimizer, right([out], lambda f: ce(f, y), twin.parameters()), 1e-5)


@every_engine
def test_writes_to_weights_too_large_to_be_copied_are_undone(jvp, monkeypatch):
    """Past their versions, so that nothing but the weights themselves tells."""
    monkeypatch.setattr(state, "_BUDGET", 0)

    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            self.b.weight.data.mul_(0.9)
            return self.b(self.a(x).tanh())

    x, y = data()
    model = Writes().to(DOUBLE)
    options = {"lr": 0.0, "interpolation": None, "measure": Measure.every_step(jvp)}
    optimizer = Adler(model.parameters(), model, ce, **options)
    for _ in range(5):
        assert leaves_all(optimizer, model, x, y)


class EverySecond(nn.Module):
    """Scales its weights past their versions at every second call, which no replay can know."""

    calls = itertools.count()

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        out = self.layer(x)
        if next(EverySecond.calls) % 2:
            self.layer.weight.data.mul_(0.9)
        return out


def test_weights_that_only_replays_write_to_are_not_written_to():
    x, y = data()
    model = EverySecond().to(DOUBLE)
    optimizer = Adler(model.parameters(), model, ce, lr=0.0, measure=Measure.every_step())
    held = untouched(model)
    for _ in range(6):
        optimizer.zero_grad()
        ce(model(x), y).backward()
        optimizer.step()
        assert bool(optimizer.last_step.trusted)
        assert untouched(model) == held


@every_engine
@pytest.mark.parametrize("used", [True, False])
def test_an_encoder_that_begins_late_to_move_past_its_versions(used, jvp):
    """It moves twice until it is noticed: in one step where its outputs are used."""

    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(6, 3), nn.Linear(6, 3).requires_grad_(False)
            self.calls, self.late = 0, 9

        def forward(self, x):
            self.calls += 1
            if self.calls > self.late:
                for k in self.k.parameters():
                    k.data.mul_(0.9)
            return self.q(x) * self.k(x) if used else self.q(x)

    x, y = data()
    model = Late().to(DOUBLE)
    options = {"lr": 0.0, "measure": Measure.every_step(jvp)}
    optimizer = Adler(list(model.q.parameters()), model, ce, **options)
    unnoticed = []
    for number in range(80):
        if not leaves_all(optimizer, model, x, y):
            unnoticed.append(number)
    assert unnoticed == ([9] if used else list(range(9, 64)))


def test_a_gradient_that_is_not_the_losss_is_no_reason_to_watch():
    """A penalty on the weights: every replay repeats the pass, and copies would find nothing."""
    x, y = data()
    model = type("Kind", (Momentum,), {"update": staticmethod(lambda q, k: None)})().to(DOUBLE)
    optimizer = Adler(list(model.q.parameters()), model, ce, measure=Measure.every_step())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # which says so
        for _ in range(9):
            optimizer.zero_grad()
            (ce(model(x), y) + model.q.weight.square().sum()).backward()
            optimizer.step()
    assert not bool(optimizer.last_step.trusted)
    assert not optimizer._recorder._watched.closely


@every_engine
@pytest.mark.parametrize("update", [assign, UPDATES["in place"], UPDATES["copy_"]])
def test_a_momentum_encoder_that_begins_to_move_late(update, jvp):
    """When nothing is copied any more: one measurement is not used, and the next are right."""

    class Late(Momentum):
        def __init__(self):
            super().__init__()
            self.calls = 0

        update = staticmethod(lambda q, k: None)

        def forward(self, x):
            self.calls += 1
            type(self).update = staticmethod(update if self.calls > 6 else lambda q, k: None)
            return super().forward(x)

    x, y = data()
    model = Late().to(DOUBLE)
    measure = Measure.every_step(jvp)
    optimizer = Adler(list(model.q.parameters()), model, ce, lr=0.0, measure=measure)
    for number in range(1, 12):
        optimizer.zero_grad()
        twin = copy.deepcopy(model)
        ce(model(x), y).backward()
        expected = right([twin(x)], lambda f: ce(f, y), twin.q.parameters())
        held = untouched(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            optimizer.step()
        assert untouched(model) == held
        # A difference sees through no_grad. Another engine takes over, not at once.
        if number < 7 or number > (9 if jvp == "finite_difference" else 7):
            check(optimizer, expected, 1e-5)
        else:
            assert not bool(optimizer.last_step.trusted)
