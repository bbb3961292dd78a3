"""What people write in modules, criteria and loops: what reads and moves state, draws, branches."""

from __future__ import annotations

import collections
import copy
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from support.right import DOUBLE, right

__all__ = ["BESIDE", "LOOPS", "WRONG", "Habits", "Judging", "expected", "habits", "training_passes"]

ce = nn.CrossEntropyLoss()


class Habits(nn.Module):
    """Each habit reads and writes in forward; outputs depend on what is read.

    What is held stays within bounds, so that thousands of calls do.
    """

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
        self.h = y.detach().mean(0).tanh()
        return y

    def buffer(self, x):
        y = self.layers[1](x) * self.scale.clone()
        with torch.no_grad():
            self.scale.mul_(0.9).add_(y.std(0).clamp(max=2), alpha=0.1)
        return y

    def counter(self, x):
        self.calls += 1
        return x * (1 + 0.1 * (self.calls % 7))

    def listed(self, x):
        y = x * len(self.queue) / 3
        self.queue.append(float(x.detach().mean()))
        if len(self.queue) > 6:
            del self.queue[1:]
        return y

    def cached(self, x):
        y = x + self.cache["x"].clone()
        self.cache["x"].add_(1.0).remainder_(3)
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


class Judging(nn.Module):
    """Cross-entropy of scaled and shifted scores; scales and shifts are state that calls move."""

    def __init__(self, names, seed):
        super().__init__()
        self.names = tuple(names)
        self.register_buffer("centre", torch.zeros(3, dtype=DOUBLE))
        self.calls, self.queue = 0, collections.deque([1.0], maxlen=3)
        self.cache = {"scores": torch.full((3,), 0.5, dtype=DOUBLE), "seen": [0]}
        self.target = torch.ones(3, dtype=DOUBLE)
        self.own = torch.Generator().manual_seed(seed)

    def forward(self, f, y):
        for name in self.names:
            f = getattr(self, name)(f)
        return ce(f, y)

    def counter(self, f):
        self.calls += 1
        return f * (1 + 0.2 * (self.calls % 5))

    def centred(self, f):
        out = f - self.centre
        with torch.no_grad():
            self.centre.lerp_(f.mean(0).clamp(-3, 3), 0.5)
        return out

    def rebound(self, f):
        out = f * self.target
        self.target = 0.5 * self.target + f.detach().abs().mean(0).clamp(max=1)
        return out

    def queued(self, f):
        out = f * sum(self.queue) / 3
        self.queue.append(min(float(f.detach().std()), 2.0))
        return out

    def cached(self, f):
        out = f + self.cache["scores"].clone()
        self.cache["scores"].mul_(0.5).add_(f.detach().mean(0).tanh())
        self.cache["seen"].append(len(f))
        if len(self.cache["seen"]) > 6:
            del self.cache["seen"][1:]
        return out * len(self.cache["seen"]) / 3

    def generator(self, f):
        return f * (torch.rand(3, generator=self.own, dtype=DOUBLE) + 0.5)

    def drawn(self, f):
        return f * (torch.rand(3, dtype=DOUBLE) + 0.5) + random.random()


def habits(kind):
    return [
        name
        for name, value in vars(kind).items()
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


def gradients(of, at):
    return torch.autograd.grad(of, at, retain_graph=True, allow_unused=True)


def attack(m, c, x, y, loss, params):
    """Inputs by another pass of the same model and criterion, which moves their state too."""
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(c, *m(x), y, params), x, materialize_grads=True)
    return x.detach() + 0.1 * g.sign()


def look(m, c, x, y, loss, params):
    with torch.no_grad():
        loss(c, *m(x.clone()), y, params)
    return x


# What the loop does with gradients beside `backward`: before the pass, and after it.
BESIDE = {
    "nothing": (None, None),
    "a look without gradients": (look, None),
    "an attack on the inputs": (attack, None),
    "the loss's gradient": (None, lambda loss, heads, params: gradients(loss, params)),
    "a part's gradient": (None, lambda loss, heads, params: gradients(loss, params[:1])),
    "at the outputs": (None, lambda loss, heads, params: gradients(loss, heads)),
    "of the outputs": (None, lambda loss, heads, params: gradients(heads[0].sum(), params)),
    "twice": (None, lambda loss, heads, params: [gradients(loss, params) for _ in range(2)]),
}


def training_passes(
    model: nn.Module,
    criterion: nn.Module,
    loop: str,
    beside: str,
    inputs: list[Tensor],
    labels: list[Tensor],
    params: list[Tensor],
) -> Iterator[tuple[list[Tensor], Tensor, Any]]:
    """Of each part: heads, loss, and all that the loss depends on besides, from before it."""
    before, after = BESIDE[beside]
    for x, y in zip(inputs, labels):
        if before is not None:
            x = before(model, criterion, x, y, LOOPS[loop], params)
        heads = model(x)
        held = copy.deepcopy(criterion), torch.get_rng_state(), random.getstate()
        kept = [h * 1 for h in heads]  # the loop may write to what the model returned
        loss = LOOPS[loop](criterion, *heads, y, params)
        if after is not None:
            after(loss, heads, params)
        yield kept, loss, held


def expected(
    model: nn.Module,
    criterion: nn.Module,
    loop: str,
    beside: str,
    inputs: list[Tensor],
    labels: list[Tensor],
) -> float:
    """The right curvature along the gradient, from the passes' own graph; moves what they move."""
    params = [p for p in model.parameters() if p.requires_grad]
    heads, states = [], []
    passes = training_passes(model, criterion, loop, beside, inputs, labels, params)
    for pair, _, held in passes:
        heads.extend(pair)
        states.append(held)
    after = torch.get_rng_state(), random.getstate()

    def total(*outputs: Tensor) -> Tensor:
        losses = []
        for a, b, y, (then, *generators) in zip(outputs[::2], outputs[1::2], labels, states):
            torch.set_rng_state(generators[0])
            random.setstate(generators[1])
            losses.append(LOOPS[loop](copy.deepcopy(then), a * 1, b * 1, y, []))
        return sum(losses) / len(labels)

    found = right(heads, total, params)
    torch.set_rng_state(after[0])
    random.setstate(after[1])
    return found
