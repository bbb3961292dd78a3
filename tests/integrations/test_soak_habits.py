"""Thousands of steps with all habits at once: untouched, measured right, and nothing piles up.

Their number is ``--soak-steps``.
"""

from __future__ import annotations

import copy
import functools
import gc
import io
import random
import warnings

import pytest
import torch
from support.habits import BESIDE, LOOPS, Habits, Judging, expected, habits, training_passes
from support.right import DOUBLE, untouched

from adler import Adler, AdlerAdam, AdlerMuon, AdlerScheduleFree, Measure, wrap

exact = Measure.every_step()
KINDS = {
    "schedule-free": AdlerScheduleFree,
    "adler": functools.partial(Adler, measure=exact),
    "last iterate": functools.partial(Adler, interpolation=None, measure=exact),
    "difference": functools.partial(
        Adler, interpolation=None, measure=Measure.every_step("finite_difference")
    ),
    "adam": functools.partial(AdlerAdam, measure=exact),
    "muon": functools.partial(AdlerMuon, measure=exact),
    "wrapped": lambda params, *rest: wrap(
        torch.optim.SGD(params, lr=1.0, momentum=0.9), *rest, measure=exact
    ),
}
# A penalty is flagged wherever the whole batch is measured. What is looked for now and then only is
# not in this loop.
RIGHT = sorted(LOOPS.keys() - {"penalty", "functional beside"})


class Run:
    """One model that has every habit, a few at each step; and its optimizer."""

    def __init__(self, kind: str) -> None:
        self.chance = random.Random(0)
        self.model, self.criterion = Habits(habits(Habits), 0), Judging(habits(Judging), 0)
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = KINDS[kind](self.params, self.model, self.criterion)
        # (A difference is exact to its step, and the gradient is the direction.)
        self.exact = kind in ("adler", "last iterate")
        self.penalties = 0.02 if kind != "schedule-free" else 0.0
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(64, 6, generator=generator, dtype=DOUBLE)
        self.y = (self.x @ torch.randn(6, 3, generator=generator, dtype=DOUBLE)).argmax(1)

    def step(self, number: int) -> bool:
        """One step; whether a penalty was in it, which must have been noticed."""
        draw = self.chance
        self.model.names = tuple(draw.choices(habits(Habits), k=4))
        self.criterion.names = tuple(draw.sample(habits(Judging), k=2))
        loop = "penalty" if draw.random() < self.penalties else draw.choice(RIGHT)
        beside, parts = draw.choice(sorted(BESIDE)), draw.choice([1, 1, 2])
        rows = torch.tensor(draw.sample(range(64), 8))
        inputs, labels = (list(t[rows].chunk(parts)) for t in (self.x, self.y))
        self.optimizer.zero_grad()
        wanted = None
        if self.exact and number % 10 == 0 and loop != "penalty":
            state = torch.get_rng_state(), random.getstate()
            twins = copy.deepcopy((self.model, self.criterion))
            wanted = expected(*twins, loop, beside, [x.clone() for x in inputs], labels)
            torch.set_rng_state(state[0])
            random.setstate(state[1])
        for _, loss, _ in training_passes(
            self.model, self.criterion, loop, beside, inputs, labels, self.params
        ):
            (loss / parts).backward()
        with torch.no_grad():
            before = self.held()
        self.optimizer.step()
        assert self.held() == before
        last = self.optimizer.last_step
        assert bool(last.trusted) == (loop != "penalty"), (number, loop, beside, self.model.names)
        if wanted is not None:
            assert float(last.curvature) == pytest.approx(wanted, rel=1e-6, abs=1e-12)
        return loop == "penalty"

    def held(self) -> list[object]:
        """All that a step must leave alone: what it is to move is not in it."""
        found: list[object] = [torch.get_rng_state().tolist(), random.getstate()]
        for module in untouched(self.model, self.criterion):
            own = {k: v for k, v in module.items() if k != "_parameters"}
            found.append(own)
        found.append([p.tolist() for p in self.model.key.parameters()])
        return found

    def look(self) -> None:
        """Between epochs: a test, a copy, a checkpoint that the run goes on from."""
        self.model.eval()
        with torch.no_grad():
            self.criterion(self.model(self.x.clone())[0], self.y)
        self.model.train()
        copy.deepcopy((self.model, self.criterion))
        file = io.BytesIO()
        torch.save([self.model.state_dict(), self.optimizer.state_dict()], file)
        file.seek(0)
        weights, state = torch.load(file, weights_only=False)
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(state)
        if hasattr(self.optimizer, "train"):  # where gradients are taken, and not at the average
            self.optimizer.train()


def live() -> dict[str, int]:
    gc.collect()
    objects = gc.get_objects()
    return {"objects": len(objects), "tensors": sum(type(o) is torch.Tensor for o in objects)}


@pytest.mark.row("Soak")
@pytest.mark.parametrize("kind", KINDS)
def test_all_habits(kind: str, request: pytest.FixtureRequest) -> None:
    steps = request.config.getoption("--soak-steps")
    torch.manual_seed(0)
    random.seed(0)
    run, warm, penalties = Run(kind), None, 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(steps):
            penalties += run.step(number)
            if number % 100 == 99:
                run.look()
                assert all(torch.isfinite(p).all() for p in run.params), number
            if number == steps // 2:
                run.optimizer.zero_grad()
                warm = live()
    end = live()
    # Warnings are kept by the list above.
    assert end["tensors"] <= warm["tensors"] + 10
    assert end["objects"] <= warm["objects"] + 500 + 20 * len(caught)
    assert int(run.optimizer.last_step.skipped_total) < 0.02 * steps
    said = {str(w.message).partition(":")[0] for w in caught if w.category is RuntimeWarning}
    assert len(said) <= 4, said
    assert (penalties > 0) == (run.penalties > 0) or steps < 300
