"""One step of a plain loop, whose replay must measure right and leave the model as it was."""

from __future__ import annotations

import copy
import io
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from adler import Adler, Measure
from support.right import DOUBLE, check, right, untouched

__all__ = ["agrees", "ce", "data", "every_engine", "mse"]

ENGINES = ("forward", "finite_difference", "double_backward")
ce, mse = nn.CrossEntropyLoss(), nn.MSELoss()
every_engine = pytest.mark.parametrize("jvp", ENGINES)


def data(n=12, i=6):
    torch.manual_seed(1)
    return torch.randn(n, i, dtype=DOUBLE), torch.randint(3, (n,))


def agrees(make, jvp="forward", criterion=ce, arguments=None, params=None):
    """One step of the plain loop measures right, and leaves the model as the training pass did."""
    x, y = data()
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    model = make().to(DOUBLE)
    twin = copy.deepcopy(model)
    twin_criterion = copy.deepcopy(criterion)
    arguments = (lambda: (x,)) if arguments is None else arguments
    start = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002

    def begin():
        torch.set_rng_state(start[0])
        random.setstate(start[1])
        np.random.set_state(start[2])  # noqa: NPY002

    begin()
    outputs = twin(*arguments())
    twin_criterion(outputs, y if criterion is ce else x)
    after, held = (torch.get_rng_state(), random.getstate()), untouched(twin)
    chosen = (lambda m: m.parameters()) if params is None else params
    fresh = copy.deepcopy(criterion)
    expected = right([outputs], lambda f: fresh(f, y if criterion is ce else x), chosen(twin))
    begin()
    optimizer = Adler(
        list(chosen(model)), model, criterion, lr=0.0, measure=Measure.every_step(jvp)
    )
    loss = criterion(model(*arguments()), y if criterion is ce else x)
    loss.backward()
    with warnings.catch_warnings():
        # A difference sees through no_grad, and another engine takes over.
        if jvp == "finite_difference":
            warnings.simplefilter("ignore", RuntimeWarning)
        optimizer.step()
    assert untouched(model) == held
    assert torch.get_rng_state().equal(after[0])
    assert random.getstate() == after[1]
    check(optimizer, expected, 1e-5 if jvp == "finite_difference" else 1e-9)
    copy.deepcopy(model)
    optimizer.remove_hooks()
    torch.save(model.state_dict(), io.BytesIO())
    return optimizer
