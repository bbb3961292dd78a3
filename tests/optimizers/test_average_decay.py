"""The decoupled decay of an averaged optimizer."""

import pytest
import torch
from support.options import EXACT
from torch import nn

from adler import Adler, AdlerScheduleFree
from adler import _tensors as tensors


@pytest.mark.parametrize("devices", [("cpu",), ()], ids=["host", "device"])
@pytest.mark.parametrize("kind", [Adler, AdlerScheduleFree])
def test_decay_takes_no_more_than_all_of_a_weight(kind, devices, monkeypatch):
    """However long the step: on a flat batch the rate is up to 1 / eps."""
    monkeypatch.setattr(tensors, "_HOST_DEVICES", devices)
    torch.manual_seed(0)
    model, criterion = nn.Linear(4, 3).double(), nn.MSELoss()
    options = {"guard": None, "weight_decay": 0.1, **EXACT}
    optimizer = kind(model.parameters(), model, criterion, **options)
    inputs, targets = torch.zeros(8, 4).double(), torch.zeros(8, 3).double()  # no loss of weights
    y = z = model.weight.detach().clone()
    taken = []
    for t, lr in enumerate((1.0, 1.0, 1e9), 1):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        criterion(model(inputs), targets).backward()
        optimizer.step()
        taken.append(min(1.0, 0.1 * float(optimizer.param_groups[0]["effective_lr"])))
        y, z = y + (z - y) / t - taken[-1] * y, z - taken[-1] / (1 - 0.9 * (1 - 1 / t)) * y
        torch.testing.assert_close(model.weight.detach(), y, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(optimizer.state[model.weight]["z"], z, rtol=1e-12, atol=1e-12)
    assert 0 < taken[0] < 1
    assert taken[-1] == 1
