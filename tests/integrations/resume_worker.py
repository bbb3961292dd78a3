"""Training processes that `test_resume` kills: each goes on from its newest checkpoint.

Every step appends one line to ``steps.txt``: its number and a digest of the parameters' bits.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path

import torch
from torch import nn

from adler import AdlerAdam

__all__ = ["lightning", "plain"]

EVERY = 3  # steps between checkpoints


def digest(model: nn.Module) -> str:
    bits = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    return hashlib.sha256(bits).hexdigest()


def note(folder: Path, step: int, model: nn.Module) -> None:
    with (folder / "steps.txt").open("a") as file:
        file.write(f"{step} {digest(model)}\n")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Dropout(0.2), nn.Linear(12, 3))


def examples() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 6, generator=generator)
    return x, torch.randint(3, (64,), generator=generator)


def plain(folder: Path, steps: int) -> None:
    """The loop of one's own: a file is whole or not there."""
    torch.set_num_threads(1)
    model, criterion, (x, y) = network(), nn.CrossEntropyLoss(), examples()
    optimizer = AdlerAdam(model.parameters(), model, criterion, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    shuffle = torch.Generator().manual_seed(2)
    first, path = 0, folder / "checkpoint.pt"
    if path.exists():
        saved = torch.load(path)
        first = saved["step"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        torch.set_rng_state(saved["random"])
        shuffle.set_state(saved["shuffle"])
    for step in range(first, steps):
        batch = torch.randint(len(x), (8,), generator=shuffle)
        optimizer.zero_grad()
        criterion(model(x[batch]), y[batch]).backward()
        optimizer.step()
        schedule.step()
        note(folder, step + 1, model)
        if (step + 1) % EVERY == 0:
            state = {
                "step": step + 1,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "random": torch.get_rng_state(),
                "shuffle": shuffle.get_state(),
            }
            torch.save(state, path.with_suffix(".new"))
            os.replace(path.with_suffix(".new"), path)


def lightning(folder: Path, steps: int) -> None:
    """The Trainer, with its own checkpoints; an epoch is as long as the time between two."""
    warnings.simplefilter("ignore")
    import lightning.pytorch as L

    torch.set_num_threads(1)
    x, y = examples()

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.criterion = network(), nn.CrossEntropyLoss()

        def on_train_epoch_start(self) -> None:
            torch.manual_seed(self.current_epoch)  # Lightning does not save the random state

        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
            return self.criterion(self.net(batch[0]), batch[1])

        def on_train_batch_end(self, *args: object) -> None:
            note(folder, self.global_step, self.net)

        def configure_optimizers(self) -> dict[str, object]:
            optimizer = AdlerAdam(self.net.parameters(), self.net, self.criterion)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": schedule, "interval": "step"},
            }

    data = torch.utils.data.TensorDataset(x[: 8 * EVERY], y[: 8 * EVERY])
    saver = L.callbacks.ModelCheckpoint(folder, "{step}", save_top_k=-1)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=steps // EVERY,
        logger=False,
        callbacks=[saver],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    found = sorted(folder.glob("step=*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    trainer.fit(
        Module(),
        # A loader without a generator of its own draws from the random state of dropout.
        torch.utils.data.DataLoader(data, batch_size=8, generator=torch.Generator()),
        ckpt_path=str(found[-1]) if found else None,
    )
