"""A replay changes nothing, and sees everything as it was when the training call began."""

import collections
import copy
import itertools
import random
import types
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from support.replays import agrees, ce, data, every_engine
from support.right import DOUBLE, body, check, measured, right, untouched
from torch import nn
from torch.nn import functional as F

from adler import Adler, Measure

# --- attributes -----------------------------------------------------------------------------------


class Stateful(nn.Module):
    """Reads and writes one attribute; what it holds and how is a case's."""

    start = staticmethod(lambda: torch.full((3,), 0.5, dtype=DOUBLE))
    read = staticmethod(lambda self: self.held)
    write = None

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.held = type(self).start()

    def forward(self, x):
        out = self.b(torch.tanh(self.a(x))) * type(self).read(self)
        type(self).write(self, out)
        return out


@dataclass
class Memory:
    value: torch.Tensor
    seen: list = field(default_factory=list)


class Slotted:
    __slots__ = ("value",)

    def __init__(self):
        self.value = 2.0


def half():
    return torch.full((3,), 0.5, dtype=DOUBLE)


HABITS = {
    "hidden state": (half, lambda s: s.held, lambda s, o: setattr(s, "held", o.detach().mean(0))),
    "tensor in place": (half, lambda s: s.held.clone(), lambda s, o: s.held.mul_(0.5)),
    "tensor's data": (half, lambda s: s.held.clone(), lambda s, o: s.held.data.add_(1.0)),
    "counter": (lambda: 1, lambda s: s.held, lambda s, o: setattr(s, "held", s.held + 1)),
    "list": (lambda: [half()], lambda s: len(s.held), lambda s, o: s.held.append(o.detach())),
    "queue": (
        lambda: collections.deque([1.0, 2.0], maxlen=2),
        lambda s: s.held[0],
        lambda s, o: s.held.append(float(o.detach().mean())),
    ),
    "dictionary": (
        lambda: {"scale": 2.0},
        lambda s: s.held["scale"],
        lambda s, o: s.held.update(scale=s.held["scale"] * 3),
    ),
    "nested": (
        lambda: {"a": [{"b": half()}]},
        lambda s: s.held["a"][0]["b"].clone(),
        lambda s, o: s.held["a"][0]["b"].mul_(2),
    ),
    "object": (
        lambda: Memory(half()),
        lambda s: s.held.value,
        lambda s, o: (setattr(s.held, "value", o.detach()[0]), s.held.seen.append(1)),
    ),
    "slots": (Slotted, lambda s: s.held.value, lambda s, o: setattr(s.held, "value", 5.0)),
    "namespace": (
        lambda: types.SimpleNamespace(t=2.0),
        lambda s: s.held.t,
        lambda s, o: setattr(s.held, "t", 3.0),
    ),
    "array": (
        lambda: np.full(3, 2.0),
        lambda s: torch.from_numpy(s.held.copy()),
        lambda s, o: s.held.__imul__(2),
    ),
    "set": (lambda: {1, 2}, lambda s: len(s.held), lambda s, o: s.held.add(len(s.held) + 1)),
    "hidden module": (
        lambda: [nn.BatchNorm1d(3).to(DOUBLE).eval()],
        lambda s: s.held[0].running_mean + 2,
        lambda s, o: s.held[0].running_mean.add_(1),
    ),
    "mode": (lambda: 1, lambda s: 1.0 if s.training else 2.0, lambda s, o: s.train(not s.training)),
    "generator": (
        lambda: torch.Generator().manual_seed(3),
        lambda s: torch.rand(3, generator=s.held, dtype=DOUBLE) + 0.5,
        lambda s, o: None,
    ),
    "iterator": (lambda: iter([2.0, 3.0, 4.0, 5.0]), lambda s: next(s.held), lambda s, o: None),
    "count": (lambda: itertools.count(2), lambda s: next(s.held), lambda s, o: None),
    "python generator": (
        lambda: random.Random(3),
        lambda s: s.held.random() + 0.5,
        lambda s, o: None,
    ),
    "numpy generator": (
        lambda: np.random.default_rng(3),
        lambda s: s.held.random() + 0.5,
        lambda s, o: None,
    ),
    "generators in a list": (
        lambda: [torch.Generator().manual_seed(3), (random.Random(3),)],
        lambda s: torch.rand(3, generator=s.held[0], dtype=DOUBLE) + s.held[1][0].random(),
        lambda s, o: None,
    ),
    "a generator in a dictionary": (
        lambda: {"own": np.random.default_rng(3)},
        lambda s: s.held["own"].random() + 0.5,
        lambda s, o: None,
    ),
    "a generator by two names": (
        lambda: types.SimpleNamespace(one=(own := random.Random(3)), other=own),
        lambda s: s.held.one.random() + s.held.other.random(),
        lambda s, o: None,
    ),
}


@every_engine
@pytest.mark.parametrize(("start", "read", "write"), HABITS.values(), ids=HABITS)
def test_what_a_model_holds_is_read_as_it_was_and_not_written(start, read, write, jvp):
    own = {"start": staticmethod(start), "read": staticmethod(read), "write": staticmethod(write)}
    agrees(type("Kind", (Stateful,), own), jvp)


@every_engine
def test_what_a_function_that_a_model_holds_closes_over(jvp):
    calls = [1.0]

    def scale():
        calls[0] += 1
        return calls[0]

    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.scale = nn.Linear(6, 3), scale

        def forward(self, x):
            return self.a(x) * self.scale()

    x, y = data()
    model = Calls().to(DOUBLE)
    expected = right([model(x)], lambda f: ce(f, y), model.parameters())
    calls[0] = 1.0
    optimizer = measured(model, ce, lambda m, c: c(m(x), y), jvp=jvp)
    check(optimizer, expected, 1e-5)
    assert calls == [2.0]


@every_engine
@pytest.mark.parametrize("calls", [1, 2])
def test_an_attribute_that_the_first_call_makes(calls, jvp):
    class Makes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 3)

        def forward(self, x):
            out = self.a(x) * getattr(self, "scale", 1.0)
            self.scale = getattr(self, "scale", 1.0) + 1.0
            return out

    x, y = data()
    model = Makes().to(DOUBLE)
    with torch.no_grad():
        for _ in range(calls - 1):
            model(x)
    twin = copy.deepcopy(model)
    optimizer = measured(model, ce, lambda m, c: c(m(x), y), jvp=jvp)
    check(optimizer, right([twin(x)], lambda f: ce(f, y), twin.parameters()), 1e-5)
    assert model.scale == twin.scale == calls + 1.0


@every_engine
def test_buffers_advanced_in_forward(jvp):
    class Running(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
            self.register_buffer("var", torch.tensor(9.0))
            self.register_buffer("steps", torch.tensor(0))

        def forward(self, x):
            h = self.a(x)
            out = self.b(torch.tanh(h / self.var.sqrt()) + self.steps)
            with torch.no_grad():
                self.var.lerp_(h.var(), 0.5)
                self.steps += 1
            self.var = self.var * 1.0  # rebound as well
            return out

    agrees(Running, jvp)


@every_engine
def test_spectral_norm(jvp):
    spectral = torch.nn.utils.parametrizations.spectral_norm
    agrees(lambda: nn.Sequential(spectral(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 3)), jvp)


def test_the_list_that_a_users_hook_fills_is_not_filled_again():
    x, y = data()
    model, seen = body(), []

    def hook(module, inputs, output):
        seen.append(output.detach())

    model[0].register_forward_hook(hook)
    measured(model, ce, lambda m, c: c(m(x), y))
    assert len(seen) == 1


# --- generators and branches ----------------------------------------------------------------------


class Branches(nn.Module):
    draw = None

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = self.a(x).tanh()
        for _ in range(5):
            if type(self).draw() < 0.5:
                h = h + self.b(h).tanh()
        return self.c(h)


@every_engine
@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: float(torch.rand(()))])
def test_branches_are_those_of_the_training_pass(draw, jvp):
    agrees(type("Kind", (Branches,), {"draw": staticmethod(draw)}), jvp)


class Reads(nn.BatchNorm1d):
    def forward(self, x):
        before = self.running_mean.clone()
        return super().forward(x) + before


@every_engine
def test_a_norm_that_reads_its_running_statistics_in_training(jvp):
    agrees(lambda: nn.Sequential(nn.Linear(6, 3), Reads(3)), jvp)


def test_the_second_of_a_pair_of_normal_numbers():
    """NumPy draws two at once, and then says the other without a draw."""

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = body()

        def forward(self, x):
            return self.body(x) * np.random.randn()  # noqa: NPY002

    (x, y), model = data(), Noisy()
    twin = copy.deepcopy(model)
    np.random.randn()  # noqa: NPY002
    start = np.random.get_state()  # noqa: NPY002
    expected = right([twin(x)], lambda f: ce(f, y), twin.parameters())
    after = np.random.randn()  # noqa: NPY002
    np.random.set_state(start)  # noqa: NPY002
    check(measured(model, ce, lambda m, c: c(m(x), y)), expected)
    assert np.random.randn() == after  # noqa: NPY002


@every_engine
@pytest.mark.parametrize(
    ("start", "draw"),
    [
        (lambda: torch.Generator().manual_seed(3), lambda g: torch.rand(1, generator=g).item()),
        (lambda: random.Random(3), lambda g: g.random()),
        (lambda: np.random.default_rng(3), lambda g: g.random()),
        (lambda: np.random.RandomState(3), lambda g: g.rand()),
    ],
    ids=["torch", "python", "numpy", "numpy's legacy"],
)
def test_a_generator_that_the_loop_draws_from_before_the_step(start, draw, jvp):
    """The replay ends where the training pass did, which is not where the generator is by now."""
    own = {
        "start": staticmethod(start),
        "read": staticmethod(lambda self: 0.5 + draw(self.held)),
        "write": staticmethod(lambda self, out: None),
    }
    x, y = data()
    model = type("Kind", (Stateful,), own)().to(DOUBLE)
    twin = copy.deepcopy(model)
    optimizer = Adler(model.parameters(), model, ce, lr=0.0, measure=Measure.every_step(jvp))
    ce(model(x), y).backward()
    expected = right([twin(x)], lambda f: ce(f, y), twin.parameters())
    assert draw(model.held) == draw(twin.held)
    optimizer.step()
    check(optimizer, expected, 1e-5)
    assert draw(model.held) == draw(twin.held)


# --- arguments ------------------------------------------------------------------------------------


class Overwrites(nn.Sequential):
    def forward(self, x):
        return super().forward(x.sub_(0.5).div_(0.25))


class WritesBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, batch):
        batch["x"] = self.enc(batch["x"]).tanh()
        batch["list"].append(1)
        return self.head(batch["x"]) * len(batch["list"])


@every_engine
def test_an_input_written_in_place(jvp):
    agrees(lambda: Overwrites(*body()), jvp, arguments=lambda: (data()[0],))


class Noisy(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.body, self.draw = body(), draw

    def forward(self, x, own):
        return self.body(x) * (self.draw(own) + 0.5)


@every_engine
@pytest.mark.parametrize(
    ("start", "draw"),
    [
        (lambda: torch.Generator().manual_seed(3), lambda g: torch.rand(1, generator=g).item()),
        (lambda: random.Random(3), lambda g: g.random()),
        (lambda: np.random.default_rng(3), lambda g: g.random()),
    ],
    ids=["torch", "python", "numpy"],
)
def test_a_generator_among_the_arguments(start, draw, jvp):
    (x, y), model, own, other = data(), Noisy(draw), start(), start()
    twin = copy.deepcopy(model)
    expected = right([twin(x, other)], lambda f: ce(f, y), twin.parameters())
    check(measured(model, ce, lambda m, c: c(m(x, own), y), jvp=jvp), expected, 1e-5)
    assert draw(own) == draw(other)


@every_engine
def test_a_batch_dictionary_written_to(jvp):
    agrees(WritesBatch, jvp, arguments=lambda: ({"x": data()[0], "list": []},))


@every_engine
def test_a_batch_object_written_to(jvp):
    class Takes(WritesBatch):
        def forward(self, batch):
            batch.value = self.enc(batch.value)
            batch.seen.append(1)
            return self.head(batch.value) * len(batch.seen)

    agrees(Takes, jvp, arguments=lambda: (Memory(data()[0]),))


@every_engine
def test_a_buffer_that_the_next_micro_batch_overwrites(jvp):
    x, y = data()
    torch.manual_seed(0)
    model = body()
    twin = copy.deepcopy(model)
    bx, by = torch.empty(6, 6, dtype=DOUBLE), torch.empty(6, dtype=torch.long)

    def loop(m, c):
        for px, py in zip(x.chunk(2), y.chunk(2)):
            bx.copy_(px)
            by.copy_(py)
            loss = c(m(bx), by) / 2
            if px[0, 0] == x[0, 0]:
                loss.backward()
        return loss

    optimizer = measured(model, ce, loop, jvp=jvp)
    bx.zero_()
    expected = right([twin(x)], lambda f: ce(f, y), twin.parameters())
    check(optimizer, expected, 1e-5)


# --- the criterion --------------------------------------------------------------------------------


class Centred(nn.Module):
    """A centre and a queue that each call moves; the loss depends on them."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(3, dtype=DOUBLE))
        self.queue = [1.0]

    def forward(self, f, teacher):
        soft = (teacher - self.centre).softmax(-1) * len(self.queue)
        loss = -(soft * (f / 0.5).log_softmax(-1)).sum(-1).mean()
        with torch.no_grad():
            self.centre.lerp_(teacher.mean(0), 0.5)
        self.queue.append(2.0)
        return loss


@every_engine
def test_a_criterion_with_state(jvp):
    x, _ = data()
    t = torch.randn(12, 3, dtype=DOUBLE)
    model, criterion = body(), Centred()
    twin, other = copy.deepcopy(model), copy.deepcopy(criterion)
    expected = right([twin(x)], lambda f: copy.deepcopy(other)(f, t), twin.parameters())
    optimizer = measured(model, criterion, lambda m, c: c(m(x), t), jvp=jvp)
    other(twin(x), t)
    assert untouched(criterion) == untouched(other)
    check(optimizer, expected, 1e-5)


# --- errors ---------------------------------------------------------------------------------------


def test_an_error_in_a_replay_leaves_everything_as_it_was():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.seen, self.h = nn.Linear(6, 3), [], torch.zeros(3, dtype=DOUBLE)
            self.register_buffer("count", torch.tensor(0))

        def forward(self, x):
            self.seen.append(1)
            self.h = self.h + 1
            self.count += 1
            out = self.a(x)
            if not isinstance(self.a.weight, nn.Parameter):
                raise OSError("only in a replay")
            return out

    x, y = data()
    model = Fails().to(DOUBLE)
    optimizer = Adler(model.parameters(), model, ce, measure=Measure.every_step())
    ce(model(x), y).backward()
    held, rng = untouched(model), torch.get_rng_state()
    with pytest.raises(RuntimeError, match=r"cannot be run once more.*only in a replay"):
        optimizer.step()
    assert untouched(model) == held
    assert torch.get_rng_state().equal(rng)
    assert all(type(m._parameters) is dict for m in model.modules())
    F.cross_entropy(model(x), y).backward()


# --- parts of a batch -----------------------------------------------------------------------------


def test_a_hidden_state_of_the_whole_batchs_size_is_measured_whole():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.out = nn.RNN(6, 8, batch_first=True), nn.Linear(8, 3)
            self.h = torch.zeros(1, 12, 8, dtype=DOUBLE)

        def forward(self, x):
            r, h = self.rnn(x.unsqueeze(1), self.h)
            self.h = h.detach()
            return self.out(r).flatten(0, 1)

    x, y = data()
    model = Keeps().to(DOUBLE)
    twin = copy.deepcopy(model)
    expected = right([twin(x)], lambda f: ce(f, y), twin.parameters())
    optimizer = Adler(model.parameters(), model, ce, measure=Measure(fraction=0.25))
    ce(model(x), y).backward()
    held = model.h.clone()
    optimizer.step()
    check(optimizer, expected)
    assert model.h.equal(held)


def test_a_criterion_with_state_is_not_moved_by_a_part():
    x, _ = data()
    t = torch.randn(12, 3, dtype=DOUBLE)
    model, criterion = body(), Centred()
    optimizer = Adler(model.parameters(), model, criterion, measure=Measure(fraction=0.25))
    for _ in range(3):
        optimizer.zero_grad()
        criterion(model(x), t).backward()
        held = untouched(criterion)
        optimizer.step()
        assert untouched(criterion) == held


@pytest.mark.parametrize("jvp", ["forward", "finite_difference", "double_backward"])
def test_another_optimizer_of_the_same_model_steps_first(jvp):
    model, criterion = body(), nn.CrossEntropyLoss()
    x, y = torch.randn(12, 6, dtype=DOUBLE), torch.randint(3, (12,))
    measure = Measure.every_step(jvp)
    parts = [Adler(layer.parameters(), model, criterion, measure=measure) for layer in model[::2]]
    for _ in range(6):  # the first calls alone keep a copy of everything
        model.zero_grad()
        for part in parts:
            part.zero_grad()
        criterion(model(x), y).backward()
        twin = copy.deepcopy(model)
        loss = lambda f: nn.functional.cross_entropy(f, y)  # noqa: E731
        wanted = [right([twin(x)], loss, layer.parameters()) for layer in twin[::2]]
        for part, expected in zip(parts, wanted):
            part.step()
            assert bool(part.last_step.trusted)
            assert float(part.last_step.curvature) == pytest.approx(expected, rel=1e-4)
