"""Losses of log-probabilities that are linear, or nearly so, in what they receive."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adler.losses.base import LossHessian, wide, widen

__all__ = ["CTCHessian", "KLDivHessian"]


class KLDivHessian(LossHessian):
    r"""Of `torch.nn.KLDivLoss` on log-probabilities.

    The loss is linear in its inputs, so its own Hessian vanishes. What curves is the log-softmax
    before it, as for `NLLHessian`: for $F = \log p$ and target distributions $t_i$,

    $$
    c = \sum_i \omega_i \Big(\sum_c t_{ic}\Big) \sum_c p_{ic} (v_{ic} - \bar v_i)^2 ,
    $$

    which equals the cross-entropy's form on the logits that made the log-probabilities. Classes are
    the last dimension, or the second where $p$ sums to one there and not in the last. Where it does
    in neither, the inputs are no log-probabilities and the form is zero, as the loss is linear.

    Examples:
        >>> logits, t = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.5, 0.5]])
        >>> hessian = KLDivHessian(torch.nn.KLDivLoss(reduction="batchmean"))
        >>> float(hessian.quadratic_form(logits.log_softmax(1), t, torch.tensor([[1.0, -1.0]])))
        1.0
    """

    def __init__(self, criterion: nn.KLDivLoss | None = None) -> None:
        super().__init__(nn.KLDivLoss(reduction="batchmean") if criterion is None else criterion)

    def quadratic_form(self, outputs: Tensor, targets: Any, tangents: Tensor) -> Tensor:
        """See the class; targets are probabilities, or their logarithms with ``log_target``."""
        F, t, v = widen((outputs, targets, tangents))
        t = self._probabilities(t)
        form, normalised = _form(F, t, v, -1)
        if F.ndim > 2:
            second, others = _form(F, t, v, 1)
            form = torch.where(normalised, form, second)
            normalised = normalised | others
        return torch.where(normalised, form * self._factor(outputs), torch.zeros_like(form))

    def loss_per_nat(self, outputs: Tensor, targets: Any, value: Tensor) -> Tensor:
        """``Σ_i ω_i Σ_c t_ic``: 1 for ``reduction="batchmean"`` and two dimensions."""
        return self._probabilities(widen(targets)).sum() * self._factor(outputs)

    def example_weights(self, outputs: Tensor, targets: Any) -> Tensor:
        """``ω`` of each entry of the first dimension."""
        count = outputs.shape[0] if outputs.ndim else 1
        factor = self._factor(outputs)
        return torch.full((count,), factor, dtype=wide(outputs.dtype), device=outputs.device)

    def _probabilities(self, targets: Tensor) -> Tensor:
        return targets.exp() if getattr(self.criterion, "log_target", False) else targets

    def _factor(self, outputs: Tensor) -> float:
        reduction = getattr(self.criterion, "reduction", "mean")
        if reduction == "sum":
            return 1.0
        if reduction == "batchmean":
            return 1.0 / max(outputs.shape[0] if outputs.ndim else 1, 1)
        return 1.0 / max(outputs.numel(), 1)


def _form(F: Tensor, t: Tensor, v: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """The form with classes on an axis, and whether probabilities sum to one there."""
    p = F.exp()
    v = torch.where(p > 0, v, 0)
    mean = (p * v).sum(axis, keepdim=True)
    q = (p * (v - mean).square()).sum(axis)
    normalised = ((p.sum(axis) - 1).abs() < 1e-2).all()
    return (t.sum(axis) * q).sum(), normalised


class CTCHessian(LossHessian):
    r"""Of `torch.nn.CTCLoss` on log-probabilities.

    Over the logits of frame ``t`` the loss of a sequence is $-\log \sum_\pi \prod_t p_t(\pi_t)$,
    whose Hessian is that of the softmaxes less the covariance of the alignments, which is not
    negative. So the form of the softmaxes alone bounds it from above, and is exact where the
    alignment is certain:

    $$
    c = \sum_i \omega_i \sum_{t \le T_i} \sum_c p_{itc} (v_{itc} - \bar v_{it})^2 ,
    $$

    with $\omega_i = 1 / (b\, \max(1, S_i))$ for the mean over ``b`` sequences of $S_i$ targets, 1
    for the sum.

    Examples:
        >>> F, v = torch.zeros(1, 1, 2).log_softmax(-1), torch.tensor([[[1.0, -1.0]]])
        >>> one = torch.tensor([1])
        >>> hessian = CTCHessian(torch.nn.CTCLoss())
        >>> float(hessian.quadratic_form(F, (torch.tensor([[1]]), one, one), v))
        1.0
    """

    curved = True

    def __init__(self, criterion: nn.CTCLoss | None = None) -> None:
        super().__init__(nn.CTCLoss() if criterion is None else criterion)

    def quadratic_form(self, outputs: Tensor, targets: Any, tangents: Tensor) -> Tensor:
        """See the class; outputs are ``(T, b, C)`` or ``(T, C)``, targets all other arguments."""
        F, v = widen((outputs, tangents))
        _, lengths, counts = (torch.as_tensor(t, device=F.device) for t in targets[:3])
        if F.ndim == 2:
            F, v = F.unsqueeze(1), v.unsqueeze(1)
        lengths, counts = lengths.reshape(-1), counts.reshape(-1)
        p = F.exp()
        v = torch.where(p > 0, v, 0)
        mean = (p * v).sum(-1, keepdim=True)
        q = (p * (v - mean).square()).sum(-1)
        frames = torch.arange(F.shape[0], device=F.device).unsqueeze(1) < lengths.unsqueeze(0)
        weights = torch.ones_like(counts, dtype=q.dtype)
        if getattr(self.criterion, "reduction", "mean") == "mean":
            weights = 1 / (counts.clamp(min=1).to(q) * F.shape[1])
        return (torch.where(frames, q, 0) * weights).sum()
