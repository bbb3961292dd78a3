"""A small GPT-2 in the Hugging Face Trainer: ``python -m examples.programs.hf_trainer``.

The network, made from its config, computes its own loss, with labels shifted and padding ignored;
`causal_lm` says so to the optimizer. Nothing is downloaded: the text is Python's documentation.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

import adler
from adler.integrations.transformers import causal_lm
from examples.programs.char_lm import corpus

__all__ = ["main"]

LENGTH = 64


class Windows(Dataset[dict[str, torch.Tensor]]):
    """Windows of the text, with themselves as labels."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.windows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)

    def __len__(self) -> int:
        """How many windows."""
        return len(self.windows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        """What the model is called with."""
        return {"input_ids": self.windows[i], "labels": self.windows[i]}


def main() -> None:
    """Trains, and prints what the Trainer logged."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    set_seed(0)
    tokens, alphabet = corpus()
    config = GPT2Config(
        vocab_size=len(alphabet),
        n_positions=LENGTH,
        n_embd=64,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    optimizer = adler.AdlerScheduleFree(model.parameters(), model, causal_lm())

    class LogStep(TrainerCallback):
        """Adds what the optimizer did to the Trainer's log."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if control.should_log:
                trainer.log(optimizer.scalars("adler/"))
                control.should_log = True  # which log() takes down

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                lr_scheduler_type="constant",
                max_steps=options.steps,
                per_device_train_batch_size=16,
                logging_steps=max(1, options.steps // 10),
                disable_tqdm=True,
            ),
            train_dataset=Windows(tokens),
            optimizers=(optimizer, None),
            callbacks=[LogStep()],
        )
        trainer.train()


if __name__ == "__main__":
    main()
