"""Modules and loops built at random out of what people write: right or flagged, and untouched."""

import copy
import random
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.right import DOUBLE, right, untouched
from torch import nn

from adler import Adler, Measure

ce = nn.CrossEntropyLoss()


class Habits(nn.Module):
    """Each habit reads and writes in forward; outputs depend on what is read."""

    def __init__(self, names, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.names = tuple(names)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head, self.aux = nn.Linear(6, 3), nn.Linear(6, 3)
        self.key = nn.Linear(6, 6).requires_grad_(False)
        self.register_buffer("scale", torch.ones(6))
        self.h, self.calls, self.queue, self.cache = torch.zeros(6), 0, [1.0], {"x": torch.ones(6)}
        self.own = torch.Generator().manual_seed(seed)
        self.rng = random.Random(seed)
        self.drop = nn.Dropout(0.3)
        self.to(DOUBLE)
        self.h, self.cache = self.h.double(), {"x": self.cache["x"].double()}

    def forward(self, x):
        for habit in self.names:
            x = getattr(self, habit)(x)
        return self.head(torch.tanh(x)), self.aux(x)

    def hidden(self, x):
        y = self.layers[0](x) + self.h
        self.h = y.detach().mean(0)
        return y

    def buffer(self, x):
        y = self.layers[1](x) * self.scale.clone()
        with torch.no_grad():
            self.scale.mul_(0.9).add_(y.std(0), alpha=0.1)
        return y

    def counter(self, x):
        self.calls += 1
        return x * (1 + 0.1 * self.calls)

    def listed(self, x):
        y = x * len(self.queue)
        self.queue.append(float(x.detach().mean()))
        return y

    def cached(self, x):
        y = x + self.cache["x"].clone()
        self.cache["x"].add_(1.0)
        self.cache = {**self.cache, "y": x.detach()}
        return y

    def generator(self, x):
        return x * (torch.rand(6, generator=self.own, dtype=DOUBLE) + 0.5)

    def branch(self, x):
        return self.layers[2](x).tanh() if self.rng.random() < 0.5 else x * 1.5

    def global_branch(self, x):
        return x + self.layers[2](x) if random.random() < 0.5 else x

    def dropout(self, x):
        return self.drop(x)

    def in_place(self, x):
        return x.clone().mul_(0.5).add_(1)

    def writes_input(self, x):
        with torch.no_grad():
            return x if x.requires_grad else x.sub_(0.25)

    def momentum(self, x):
        with torch.no_grad():
            for k, q in zip(self.key.parameters(), self.layers[0].parameters()):
                k.data = k.data * 0.9 + q.data * 0.1
            keys = self.key(x)
        return x + keys

    def stopped(self, x):
        with torch.no_grad():
            scale = self.layers[0](x).abs().mean()
        return x / (scale + 1)

    def differentiates(self, x):
        with torch.enable_grad():
            t = x.detach().requires_grad_()
            e = self.layers[1](t).tanh().sum()
            (force,) = torch.autograd.grad(e, t, create_graph=True)
        return x + force


HABITS = [
    name
    for name, value in vars(Habits).items()
    if callable(value) and name[0] != "_" and name != "forward"
]
# What the loop makes of the outputs, as a function of the two heads and the parameters.
LOOPS = {
    "plain": lambda c, a, b, y, ps: c(a, y),
    "temperature in place": lambda c, a, b, y, ps: c(a.div_(0.5), y),
    "two heads": lambda c, a, b, y, ps: c(a, y) + 0.3 * c(b, y),
    "divided": lambda c, a, b, y, ps: c(a, y).div_(4),
    "concatenated": lambda c, a, b, y, ps: c(torch.cat([a, b]), torch.cat([y, y])),
    "functional beside": lambda c, a, b, y, ps: c(a, y) + a.square().mean(),
    "penalty": lambda c, a, b, y, ps: c(a, y) + 0.1 * sum(p.square().sum() for p in ps),
}
WRONG = {"functional beside", "penalty"}
profile = settings(deadline=None, max_examples=25, derandomize=True)


@pytest.mark.parametrize("jvp", ["forward", "finite_difference", "double_backward"])
@profile
@given(
    st.lists(st.sampled_from(HABITS), min_size=1, max_size=5),
    st.sampled_from(sorted(LOOPS)),
    st.integers(0, 1000),
    st.integers(1, 2),
)
def test_a_step_measures_right_or_says_so_and_changes_nothing(jvp, names, loop, seed, parts):
    model = Habits(names, seed)
    torch.manual_seed(seed)
    random.seed(seed)
    x, y = torch.randn(8, 6, dtype=DOUBLE), torch.randint(3, (8,))
    twin, again = copy.deepcopy(model), x.clone()
    start = torch.get_rng_state(), random.getstate()

    # The training passes on their own graph.
    passes = [twin(part.clone()) for part in again.chunk(parts)]
    heads = [h for pair in passes for h in pair]
    params = list(twin.parameters())
    held, after = untouched(twin), (torch.get_rng_state(), random.getstate())

    def total(*outputs):
        pairs = zip(outputs[::2], outputs[1::2])
        losses = [
            LOOPS[loop](ce, a * 1, b * 1, labels, [])
            for (a, b), labels in zip(pairs, y.chunk(parts))
        ]
        return sum(losses) / parts

    trained = [p for p in params if p.requires_grad]
    expected = right(heads, total, trained)

    torch.set_rng_state(start[0])
    random.setstate(start[1])
    optimizer = Adler(
        [p for p in model.parameters() if p.requires_grad],
        model,
        ce,
        lr=0.0,
        measure=Measure.every_step(jvp),
    )
    mine = [p for p in model.parameters() if p.requires_grad]
    inputs = [part.clone() for part in x.chunk(parts)]
    for part, labels in zip(inputs, y.chunk(parts)):
        (LOOPS[loop](ce, *model(part), labels, mine) / parts).backward()
    given = [part.clone() for part in inputs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        optimizer.step()
    last = optimizer.last_step
    assert untouched(model) == held
    assert torch.get_rng_state().equal(after[0])
    assert random.getstate() == after[1]
    assert all(a.equal(b) for a, b in zip(inputs, given))
    copy.deepcopy(model)
    if loop in WRONG:
        assert not bool(last.trusted)
    else:
        assert bool(last.trusted)
        tolerance = 1e-3 if optimizer.measure.jvp == "finite_difference" else 1e-6
        assert float(last.curvature) == pytest.approx(expected, rel=tolerance, abs=1e-12)
