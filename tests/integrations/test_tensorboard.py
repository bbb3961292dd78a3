"""One call logs what a step did."""

from __future__ import annotations

import csv

import pytest
import torch
from torch import nn

from adler import Adler


def trained(log, steps=4):
    torch.manual_seed(0)
    model, criterion = nn.Linear(4, 3), nn.CrossEntropyLoss()
    optimizer = Adler(model.parameters(), model, criterion)
    records = []
    for step in range(steps):
        x = torch.randn(8, 4)
        optimizer.zero_grad()
        criterion(model(x), torch.randint(3, (8,))).backward()
        if step == 2:
            for p in model.parameters():
                p.grad.fill_(torch.nan)  # a guard event
        optimizer.step()
        log(optimizer, step)
        records.append(optimizer.last_step)
    return records


@pytest.mark.row("TensorBoard", versions=["tensorboard"])
def test_what_tensorboard_reads_back_is_the_record(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:

        def log(optimizer, step):
            writer.add_scalars("adler", optimizer.scalars(), step)

        records = trained(log)
    for name in records[0]._fields:
        events = EventAccumulator(str(tmp_path / f"adler_{name}")).Reload().Scalars("adler")
        assert [event.step for event in events] == [0, 1, 2, 3]
        written = torch.tensor([event.value for event in events])
        expected = torch.tensor([float(getattr(record, name)) for record in records])
        torch.testing.assert_close(written, expected, equal_nan=True)
    skips = EventAccumulator(str(tmp_path / "adler_skipped")).Reload().Scalars("adler")
    assert [event.value for event in skips] == [0, 0, 1, 0]


@pytest.mark.row("Any logger", versions=["tensorboard"])
def test_a_logger_of_ones_own(tmp_path):
    path = tmp_path / "steps.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)

        def log(optimizer, step):
            numbers = optimizer.scalars()
            if step == 0:
                writer.writerow(["step", *numbers])
            writer.writerow([step, *numbers.values()])

        records = trained(log)
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [float(row["effective_lr"]) for row in rows] == [
        float(record.effective_lr) for record in records
    ]
    assert [float(row["skipped_total"]) for row in rows] == [0, 0, 1, 1]
