"""Muon's two blocks: the model's form of each pair, and the table."""

import pytest
import torch
from torch import nn

from adler import AdlerMuon
from adler.curvature import quadratic_form
from benchmarks.muon_blocks import _blocks, _look, _markdown


def test_the_form_of_both_blocks_adds_up_to_that_of_the_whole_direction():
    torch.manual_seed(0)
    layers = [part for n, m in ((5, 8), (8, 8), (8, 3)) for part in (nn.Linear(n, m), nn.Tanh())]
    model, criterion = nn.Sequential(*layers[:-1]).double(), nn.CrossEntropyLoss()
    optimizer = AdlerMuon(_blocks(model, (1.0, 0.5)), model, criterion)
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.5]
    x, y = torch.randn(6, 5).double(), torch.randint(3, (6,))
    criterion(model(x), y).backward()
    a, b = _look(optimizer, criterion, x, y)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    direction = optimizer._direction(params, [p.grad for p in params])
    slope, *_ = direction.look([p.grad for p in params], torch.device("cpu"), measured=True)
    whole = quadratic_form(model, params, x, y, criterion, direction.along)
    # The blocks' numbers were rounded to float32 on their way.
    assert float(a.sum()) == pytest.approx(float(whole), rel=1e-5)
    assert float(b.sum()) == pytest.approx(float(slope), rel=1e-5)
    assert float(a[0, 1]) == pytest.approx(float(a[1, 0]), rel=1e-5)


def test_the_table_shows_what_there_is():
    record = {"task": "t", "matrices": 1.0, "rest": 1.0, "test_loss": 1.25}
    looked = {"rates_over_the_common_one": [2.0, 0.5], "without_cross_terms": [3.0, 1.0]}
    text = _markdown([{**record, **looked, "cross_term": 0.75}, {**record, "rest": 4.0}])
    assert "| t | 1.250 |  |  |  |  |  | 1.250 |" in text
    assert "| t | 2.00 | 0.50 | 3.00 | 1.00 | 0.75 |" in text
