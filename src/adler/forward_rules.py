"""What PyTorch's forward-mode rules need, and where they differ from the training pass."""

from __future__ import annotations

import functools
import importlib
import inspect
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

__all__ = ["AsInTraining", "load"]


@functools.cache
def load() -> None:
    """PyTorch loads them at first use, with a deprecation warning that users can't heed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        importlib.import_module("torch._decomp.decompositions_for_jvp")


class AsInTraining(TorchFunctionMode):
    """Puts right what PyTorch's forward rules compute otherwise than the training pass did.

    Under autocast, norms leave a tangent in float32 beside an output in half precision, which a
    convolution then refuses: they are computed in float32, as their kernels do inside. On the CPU,
    dropout draws the mask in the order of the shape, not of the memory: it is drawn by hand.
    """

    _NORMS = frozenset(
        getattr(module, name)
        for module in (torch, functional)
        for name in ("batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm")
        if hasattr(module, name)
    )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self._NORMS and args and args[0].dtype in (torch.float16, torch.bfloat16):
            others = pytree.tree_leaves((args[1:], kwargs))
            if any(isinstance(other, Tensor) and other.dtype == torch.float32 for other in others):
                return func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
        if func in _DROPOUTS and args and args[0].device.type == "cpu":
            call = _DROPOUTS[func].bind(*args, **kwargs)
            call.apply_defaults()
            x, p, training, inplace = call.args
            if training and 0 < p < 1:
                kept = torch.empty_like(x).bernoulli_(1 - p)
                factor, offset = _dropped(kept, p, func is functional.alpha_dropout)
                return x.mul_(factor).add_(offset) if inplace else x * factor + offset
        return func(*args, **kwargs)


_DROPOUTS = {f: inspect.signature(f) for f in (functional.dropout, functional.alpha_dropout)}


def _dropped(kept: Tensor, p: float, alpha: bool) -> tuple[Tensor, Tensor | float]:
    """Factor and offset of dropout, or of alpha dropout (G. Klambauer et al., arXiv 1706.02515).

    Args:
        kept: 1 for what is kept, 0 for what is dropped.
        p: The probability of the latter.
        alpha: Which of the two.
    """
    if not alpha:
        return kept / (1 - p), 0.0
    low = 1.7580993408473766  # minus what SELU is far below zero
    scale = ((low**2 * p + 1) * (1 - p)) ** -0.5
    return kept * scale, (kept - 1) * (low * scale) + low * scale * p
