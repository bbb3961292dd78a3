"""Muon on a network's hidden matrices, AdamW on everything else, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

import adler

__all__ = ["MuonAdamW"]


class MuonAdamW(Optimizer):
    """PyTorch's Muon and PyTorch's AdamW under one learning rate.

    Muon's step is scaled to the root mean square of AdamW's (``match_rms_adamw``: 0.2 times the
    root of the matrix's larger side), so that one rate and one weight decay serve both; its other
    options, and AdamW's, are PyTorch's defaults. The kernel of a convolution is the matrix
    ``[out, in * height * width]``. Where there is no hidden matrix this is AdamW.

    Whose weights are whose says `adler.hidden_matrices`, as for `adler.AdlerMuon`.

    Args:
        model: Its parameters are trained.
        lr: The rate of both. Of the groups, the first is AdamW's.
        weight_decay: Of both; AdamW's default.

    Raises:
        RuntimeError: For a hidden matrix under a PyTorch older than 2.9, which has no Muon.

    Source: K. Jordan, github.com/KellerJordan/Muon, README, for what is whose; J. Liu et al.,
    arXiv 2502.16982, section 2.2, for the scale.
    """

    def __init__(self, model: nn.Module, *, lr: float, weight_decay: float = 1e-2) -> None:
        named = dict(model.named_parameters())
        matrices = [named[name] for name in adler.hidden_matrices(model)]
        known = {id(weight) for weight in matrices}
        others = [p for p in model.parameters() if id(p) not in known]
        groups = [{"params": part} for part in (others, matrices) if part]
        super().__init__(groups, {"lr": lr})
        options: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        self._parts: list[Optimizer] = [AdamW(others, **options)]
        # Muon takes matrices alone: it is given views of the same numbers.
        self._views = [(weight, nn.Parameter(_matrix(weight.detach()))) for weight in matrices]
        if matrices:
            if not hasattr(torch.optim, "Muon"):
                raise RuntimeError(
                    f"PyTorch {torch.__version__} has no Muon: 2.9 or newer is needed"
                )
            views = [view for _, view in self._views]
            muon = torch.optim.Muon(views, adjust_lr_fn="match_rms_adamw", **options)
            self._parts.append(muon)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes both steps."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for weight, view in self._views:
            view.grad = None if weight.grad is None else _matrix(weight.grad, weight)
        for group, part in zip(self.param_groups, self._parts, strict=True):
            part.param_groups[0]["lr"] = group["lr"]
            part.step()
        for view in (view for _, view in self._views):
            view.grad = None  # else it would outlive `zero_grad`
        return loss


def _matrix(tensor: Tensor, weight: Tensor | None = None) -> Tensor:
    """``[out, everything else]``: a view of a weight, or a gradient in the order of its weight's.

    In `torch.channels_last` the columns come in another order, which orthogonalisation carries
    along.

    Raises:
        ValueError: For a weight in an order of which no matrix is a view.
    """
    order = tensor if weight is None else weight
    if not order.is_contiguous() and order.is_contiguous(memory_format=torch.channels_last):
        tensor = tensor.permute(0, 2, 3, 1)
    made = tensor.flatten(1)
    if weight is None and made.data_ptr() != tensor.data_ptr():
        raise ValueError(f"a weight of shape {list(order.shape)}: strides {order.stride()}")
    return made
