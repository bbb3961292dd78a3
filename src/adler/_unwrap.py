"""The module that a user wrote, beneath what PyTorch puts around it."""

from __future__ import annotations

from torch import nn

from adler._distributed import find_ddp

__all__ = ["unwrap"]


def unwrap(model: nn.Module) -> nn.Module:
    """The module beneath ``torch.compile`` and `DistributedDataParallel`, in any order.

    Compiled code has no forward-mode derivative, and the wrapper's forward talks to other ranks.
    """
    while True:
        inner = getattr(model, "_orig_mod", model)
        if find_ddp(model) is not None:
            inner = inner.module
        if inner is model or not isinstance(inner, nn.Module):
            return model
        model = inner
