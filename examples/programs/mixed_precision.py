"""Mixed precision, gradient accumulation and clipping in one loop.

python -m examples.programs.mixed_precision --dtype float16
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import adler
from examples.programs.loop import blobs, network


def main(dtype: torch.dtype, steps: int, accumulate: int = 2) -> tuple[float, float]:
    """Trains; the loss of the first and of the last step."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, criterion = network().to(device), nn.CrossEntropyLoss()
    x, y = (part.to(device) for part in blobs(512, seed=1))

    optimizer = adler.Adler(model.parameters(), model, criterion)
    # bfloat16 has the range of float32 and needs no scaler.
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        total = 0.0
        shuffled = torch.randperm(len(x), device=device)[: 64 * accumulate]
        for rows in torch.split(shuffled, 64):
            with torch.autocast(device, dtype=dtype):
                loss = criterion(model(x[rows]), y[rows]) / accumulate
            scaler.scale(loss).backward()
            total += float(loss.detach())
        scaler.unscale_(optimizer)  # clipping needs the true gradients
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(total)
    print(f"{dtype}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses[0], losses[-1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args()
    main(getattr(torch, arguments.dtype), arguments.steps)
