"""Part (c): a decoder on English prose, byte by byte."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.gpu import data
from benchmarks.gpu.presets import Gpt
from benchmarks.gpu.session import Session
from benchmarks.gpu.training import Batches, Workload, choices, run_key, train
from benchmarks.networks import Decoder

__all__ = ["run", "workload"]

_BYTES, _HEAD_WIDTH = 256, 64


def run(session: Session, preset: Gpt, root: Path | None) -> None:
    """Every method, first what matters most.

    Raises:
        OutOfTimeError: If not all runs fit.
        FileNotFoundError: If the text is missing.
    """
    wanted = [(run_key(*choice, 0), *choice) for choice in choices(preset)]
    if all(session.find(key) is not None for key, *_ in wanted):
        return
    made = workload(preset, *data.text(root, session.device), session.device)
    for key, name, rate in wanted:
        work = functools.partial(train, session, made, name, rate, seed=0)
        session.attempt(key, work, session.expected(name))


def workload(preset: Gpt, text: Tensor, held_out: Tensor, device: str) -> Workload:
    """The decoder and its text: windows at random places, the same for every method of a seed."""
    heads = max(1, preset.width // _HEAD_WIDTH)
    offsets = torch.arange(preset.length + 1, device=device)

    def network(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        decoder = Decoder(preset.width, preset.depth, heads, preset.length, _BYTES, tied=False)
        return decoder.to(device)

    def windows(source: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        chosen = source[starts[:, None] + offsets].long()
        return chosen[:, :-1], chosen[:, 1:].flatten()

    def batches(seed: int) -> Batches:
        draw = torch.Generator(device).manual_seed(seed)
        while True:
            last = len(text) - preset.length
            starts = torch.randint(last, (preset.batch,), generator=draw, device=device)
            yield windows(text, starts)

    def test(model: nn.Module) -> dict[str, float]:
        wanted = preset.test_batches * preset.batch
        places = torch.linspace(0, len(held_out) - preset.length - 1, wanted, device=device).long()
        criterion, total = nn.CrossEntropyLoss(), torch.zeros((), device=device)
        for starts in torch.split(places, preset.batch):
            x, y = windows(held_out, starts)
            total += criterion(model(x), y) * len(starts)
        return {"test_loss": float(total) / wanted}

    epoch = len(text) // (preset.batch * preset.length)
    return Workload(
        network,
        batches,
        preset.steps,
        max(1, epoch),
        test,
        preset.evaluations,
        bfloat16=preset.bfloat16,
    )
