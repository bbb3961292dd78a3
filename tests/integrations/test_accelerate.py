"""Hugging Face Accelerate: the prepared loop steps as the plain one."""

from __future__ import annotations

import copy

import pytest
import torch
from support.cases import flat
from support.loops import numbers
from torch import nn

from adler import Adler, AdlerAdam

accelerate = pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def _fresh_state():
    """Accelerate keeps one state a process."""
    reset = accelerate.state.AcceleratorState._reset_state
    reset(reset_partial_state=True)
    yield
    reset(reset_partial_state=True)


def setting(dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 3)
    ).to(dtype)
    data = torch.utils.data.TensorDataset(torch.randn(40, 6, dtype=dtype), torch.randint(3, (40,)))
    return model, nn.CrossEntropyLoss(), torch.utils.data.DataLoader(data, batch_size=8)


def prepared(make, accelerator, model, criterion, loader, clip=None, epochs=2):
    """The loop of Accelerate's documentation."""
    optimizer = make(model.parameters(), model, criterion)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    network, stepper, loader, schedule = accelerator.prepare(model, optimizer, loader, scheduler)
    torch.manual_seed(1)
    for _ in range(epochs):
        for x, y in loader:
            with accelerator.accumulate(network):
                loss = criterion(network(x), y)
                accelerator.backward(loss)
                if clip is not None and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(network.parameters(), clip)
                stepper.step()
                schedule.step()
                stepper.zero_grad()
    return optimizer


def plain(make, model, criterion, loader, accumulated=1, clip=None, epochs=2, autocast=False):
    optimizer = make(model.parameters(), model, criterion)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    torch.manual_seed(1)
    for _ in range(epochs):
        batches = list(loader)
        for number, (x, y) in enumerate(batches, 1):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                outputs = model(x)
            (criterion(outputs, y) / accumulated).backward()
            if number % accumulated and number < len(batches):
                continue
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return optimizer


@pytest.mark.row("Accelerate", versions=["accelerate"])
@pytest.mark.parametrize("make", [Adler, AdlerAdam])
@pytest.mark.parametrize(("accumulated", "clip"), [(1, None), (2, None), (1, 0.5), (2, 0.5)])
def test_the_prepared_loop_steps_as_the_plain_one(make, accumulated, clip):
    model, criterion, loader = setting()
    twin = copy.deepcopy(model)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulated)
    optimizer = prepared(make, accelerator, model, criterion, loader, clip)
    expected = plain(make, twin, criterion, loader, accumulated, clip)
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-12, atol=1e-12)
    assert all(a.equal(b) for a, b in zip(model.buffers(), twin.buffers()))
    assert numbers(optimizer) == pytest.approx(numbers(expected), rel=1e-9)


@pytest.mark.row("Accelerate", versions=["accelerate"])
def test_mixed_precision():
    model, criterion, loader = setting(torch.float32)
    twin = copy.deepcopy(model)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    optimizer = prepared(Adler, accelerator, model, criterion, loader)

    class InFloat32(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = twin

        def forward(self, x):
            return self.body(x).float()  # as Accelerate does

    expected = plain(Adler, InFloat32(), criterion, loader, autocast=True)
    torch.testing.assert_close(flat(model), flat(twin))
    assert numbers(optimizer) == pytest.approx(numbers(expected), rel=1e-5)
    assert int(optimizer.last_step.skipped_total) == 0


@pytest.mark.row("Accelerate", versions=["accelerate"])
def test_a_saved_state_resumes_bit_for_bit(tmp_path):
    def run(first, last):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = accelerate.Accelerator(cpu=True)
        model, criterion, loader = setting()
        optimizer = AdlerAdam(model.parameters(), model, criterion)
        network, stepper = accelerator.prepare(model, optimizer)
        batches = list(loader)
        if first:
            accelerator.load_state(tmp_path / str(first))
        for number in range(first, last):
            x, y = batches[number % len(batches)]
            stepper.zero_grad()
            accelerator.backward(criterion(network(x), y))
            stepper.step()
            if number == 6:
                accelerator.save_state(tmp_path / "7")
        return flat(model), optimizer.state_dict()

    parameters, state = run(0, 15)
    resumed, resumed_state = run(7, 15)
    assert resumed.equal(parameters)
    assert str(resumed_state) == str(state)
