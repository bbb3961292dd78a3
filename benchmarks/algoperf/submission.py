"""`adler.AdlerScheduleFree` as a submission to AlgoPerf's self-tuning ruleset, in PyTorch.

There is nothing to tune and nothing that depends on the workload: the optimizer at its defaults,
which measures its own rate. Copy this file into ``submissions/self_tuning/NAME/submission.py`` of
github.com/mlcommons/submissions_algorithms and name ``torch-adler`` as its requirement. Another
optimizer of this library is one line: the last.

The curvature of a step is measured by replaying the workload's own forward pass on a part of the
batch, within `update_params` and thus on the clock. AlgoPerf v0.6 permits it: a call of
`update_params`, whatever it computes, "will be considered a step", and the fixed functions,
`model_fn` among them, may be called "at any time in [the] submission functions"
(docs/DOCUMENTATION.md, lines 149 and 211); "Inner-loop tuning methods for setting hyperparameters,
e.g. line searches, are allowed" (line 318).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from algoperf import spec
from torch import Tensor, nn

import adler

__all__ = [
    "data_selection",
    "get_batch_size",
    "init_optimizer_state",
    "initialiser",
    "prepare_for_eval",
    "update_params",
]

# As in AlgoPerf's baselines, which this is compared with; of cifar, its development algorithm's.
_BATCH_SIZES = {
    "criteo1tb": 262_144,
    "fastmri": 32,
    "imagenet_resnet": 1024,
    "imagenet_vit": 1024,
    "librispeech_conformer": 256,
    "librispeech_deepspeech": 256,
    "ogbg": 512,
    "wmt": 128,
    "mnist": 16,
    "cifar": 128,
}


class Loss(nn.Module):
    """The workload's loss as a mean over valid examples: a module, so that calls are recorded."""

    def __init__(self, workload: spec.Workload) -> None:
        super().__init__()
        self._workload = workload

    def forward(self, outputs: Any, targets: Any, weights: Tensor | None = None) -> Tensor:
        """The mean, such that its mean over ranks is the mean over all valid examples."""
        found = self._workload.loss_fn(
            label_batch=targets, logits_batch=outputs, mask_batch=weights
        )
        total: Tensor = found["summed"]
        valid = torch.as_tensor(found["n_valid_examples"], dtype=total.dtype, device=total.device)
        if dist.is_initialized():
            valid = valid.detach().clone()
            dist.all_reduce(valid)
            valid = valid / dist.get_world_size()
        return total / valid


def initialiser(make: Callable[..., torch.optim.Optimizer]) -> Callable[..., dict[str, Any]]:
    """`init_optimizer_state` for an optimizer that takes parameters, model and criterion."""

    def init_optimizer_state(
        workload: spec.Workload,
        model_params: Any,
        model_state: Any,
        hyperparameters: Any,
        rng: Any,
    ) -> dict[str, Any]:
        """The optimizer, at its defaults."""
        loss = Loss(workload)
        return {"optimizer": make(model_params.parameters(), model_params, loss), "loss": loss}

    return init_optimizer_state


def update_params(
    workload: spec.Workload,
    current_param_container: Any,
    current_params_types: Any,
    model_state: Any,
    hyperparameters: Any,
    batch: dict[str, Any],
    loss_type: Any,
    optimizer_state: dict[str, Any],
    eval_results: Any,
    global_step: int,
    rng: Any,
    train_state: Any = None,
) -> tuple[dict[str, Any], Any, Any]:
    """One step: forward, backward, and what the optimizer measures."""
    optimizer, model = optimizer_state["optimizer"], current_param_container
    model.train()
    if hasattr(optimizer, "train"):
        optimizer.train()
    optimizer.zero_grad()
    logits, new_state = workload.model_fn(
        params=model,
        augmented_and_preprocessed_input_batch=batch,
        model_state=model_state,
        mode=spec.ForwardPassMode.TRAIN,
        rng=rng,
        update_batch_norm=True,
    )
    loss = optimizer_state["loss"](logits, batch["targets"], batch.get("weights"))
    loss.backward()
    optimizer.step()
    return optimizer_state, current_param_container, new_state


def prepare_for_eval(
    workload: spec.Workload,
    current_param_container: Any,
    current_params_types: Any,
    model_state: Any,
    hyperparameters: Any,
    loss_type: Any,
    optimizer_state: dict[str, Any],
    eval_results: Any,
    global_step: int,
    rng: Any,
) -> tuple[dict[str, Any], Any, Any]:
    """Puts the average in place, where there is one, with running statistics that belong to it.

    These are of PyTorch's normalisation layers; the classes of their own that AlgoPerf's speech
    workloads have keep those of training.
    """
    if hasattr(optimizer_state["optimizer"], "eval"):
        optimizer_state["optimizer"].eval()
    return optimizer_state, current_param_container, model_state


def data_selection(
    workload: spec.Workload,
    input_queue: Iterator[dict[str, Any]],
    optimizer_state: dict[str, Any],
    current_param_container: Any,
    model_state: Any,
    hyperparameters: Any,
    global_step: int,
    rng: Any,
) -> dict[str, Any]:
    """The next batch."""
    return next(input_queue)


def get_batch_size(workload_name: str) -> int:
    """Examples a step, over all devices.

    Raises:
        ValueError: For a workload that is none of AlgoPerf's; the harness then asks for its base.
    """
    if workload_name not in _BATCH_SIZES:
        raise ValueError(f"workload_name={workload_name!r}: expected one of {list(_BATCH_SIZES)}")
    return _BATCH_SIZES[workload_name]


# In place of `AdlerScheduleFree`: any optimizer of this library.
init_optimizer_state = initialiser(adler.AdlerScheduleFree)
