"""Losses of class distributions: every position is an example."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adler.losses.base import LossHessian, class_axis, wide, widen

__all__ = ["CrossEntropyHessian", "NLLHessian"]


class CrossEntropyHessian(LossHessian):
    r"""Of `torch.nn.CrossEntropyLoss`, with all its options.

    With $p = \mathrm{softmax}(F)$ and $\bar v_i = \sum_c p_{ic} v_{ic}$,

    $$
    c = \sum_i \omega_i \sum_c p_{ic} (v_{ic} - \bar v_i)^2 .
    $$

    The weights hold reduction and targets: $1/b$ for the plain mean, 1 for the sum; with
    class weights $w$, $\omega_i = \sum_c t_{ic} w_c / W$, where $t_i$ is the
    smoothed target distribution and $W$ what PyTorch divides by ($\sum_i w_{y_i}$, or
    ``b`` for probability targets); 0 where the target is ``ignore_index``.

    Examples:
        >>> hessian = CrossEntropyHessian(torch.nn.CrossEntropyLoss())
        >>> outputs, tangents = torch.zeros(1, 2), torch.tensor([[1.0, -1.0]])
        >>> float(hessian.quadratic_form(outputs, torch.tensor([0]), tangents))
        1.0
    """

    curved = True

    def __init__(self, criterion: nn.CrossEntropyLoss | nn.NLLLoss | None = None) -> None:
        super().__init__(nn.CrossEntropyLoss() if criterion is None else criterion)

    def quadratic_form(self, outputs: Tensor, targets: Any, tangents: Tensor) -> Tensor:
        """See the class; targets are class indices ``(b, *D)`` or probabilities ``(b, C, *D)``."""
        F, v = widen((outputs, tangents))
        axis = class_axis(F)
        p = F.softmax(axis)
        v = torch.where(p > 0, v, 0)  # a class masked by -inf has no tangent to speak of
        mean = (p * v).sum(axis, keepdim=True)
        q = (p * (v - mean).square()).sum(axis)
        weights = self.example_weights(outputs, targets)
        # An ignored example counts as nothing even where its outputs are not finite.
        return torch.where(weights == 0, 0, weights * q).sum()

    def spectral_norm(self, outputs: Tensor, targets: Any) -> Tensor:
        r"""Exact: $\max_i \omega_i\, \lambda_{\max}(\mathrm{diag}(p_i) - p_i p_i^\top)$.

        At most $\max_i \omega_i / 2$, which two equal probabilities attain.
        """
        p = outputs.to(wide(outputs.dtype)).softmax(class_axis(outputs))
        largest = _largest_eigenvalue(p, class_axis(outputs))
        weights = self.example_weights(outputs, targets)
        return torch.where(weights == 0, 0, weights * largest).max()

    def mean_eigenvalue(self, outputs: Tensor, targets: Any) -> Tensor:
        r"""Exact: $\frac{1}{bC} \sum_i \omega_i \sum_c p_{ic} (1 - p_{ic})$."""
        axis = class_axis(outputs)
        p = outputs.to(wide(outputs.dtype)).softmax(axis)
        weights = self.example_weights(outputs, targets)
        traces = (p * (1 - p)).sum(axis)
        return torch.where(weights == 0, 0, weights * traces).sum() / max(outputs.numel(), 1)

    def loss_per_nat(self, outputs: Tensor, targets: Any, value: Tensor) -> Tensor:
        """``Σ_i ω_i``: 1 for the plain mean."""
        return self.example_weights(outputs, targets).sum()

    def example_weights(self, outputs: Tensor, targets: Any) -> Tensor:
        """``ω``, of the shape of the outputs without their class dimension."""
        criterion: Any = self.criterion
        axis, dtype = class_axis(outputs), wide(outputs.dtype)
        classes = outputs.shape[axis]
        smoothing = getattr(criterion, "label_smoothing", 0.0)
        w = None if criterion.weight is None else criterion.weight.to(outputs.device, dtype)
        if targets.is_floating_point():
            t = targets.to(dtype)
            t = t * (1 - smoothing) + smoothing / classes
            weights = t.sum(axis) if w is None else torch.tensordot(t, w, dims=([axis], [0]))
            total = torch.full_like(weights, 1.0).sum()
        else:
            kept = targets != criterion.ignore_index
            if w is None:  # and smoothing leaves a sum of one
                weights = kept.to(dtype)
                total = weights.sum()
            else:
                # `take`: indexing waits for the host where y is 0-dim, and takes uint8 for a mask.
                y = torch.where(kept, targets, 0).long()
                of_class = torch.where(kept, w.take(y), 0)
                total = of_class.sum()
                weights = (1 - smoothing) * of_class
                weights = weights + kept.to(dtype) * (smoothing / classes * w.sum())
        normalised: Tensor = weights if criterion.reduction == "sum" else weights / total
        return normalised


class NLLHessian(CrossEntropyHessian):
    r"""Of `torch.nn.NLLLoss` on log-probabilities.

    The loss is linear in its inputs, so its own Hessian vanishes. What curves is the log-softmax
    before it: the Fisher information of the class distribution, for $F = \log p$,
    $c = \sum_i \omega_i \sum_c p_{ic} (v_{ic} - \bar v_i)^2$. It equals the cross-entropy's
    form on the logits that made the log-probabilities.

    Examples:
        >>> logits, v = torch.tensor([[0.3, -1.0]]), torch.tensor([[1.0, 2.0]])
        >>> y = torch.tensor([1])
        >>> outputs = logits.log_softmax(1)
        >>> tangents = v - (outputs.exp() * v).sum(1, keepdim=True)
        >>> a = NLLHessian(torch.nn.NLLLoss()).quadratic_form(outputs, y, tangents)
        >>> torch.testing.assert_close(a, CrossEntropyHessian().quadratic_form(logits, y, v))
    """

    def __init__(self, criterion: nn.NLLLoss | None = None) -> None:
        super().__init__(nn.NLLLoss() if criterion is None else criterion)


def _largest_eigenvalue(p: Tensor, axis: int) -> Tensor:
    r"""$\lambda_{\max}(\mathrm{diag}(p) - p p^\top)$ of the distributions along an axis.

    The eigenvalues interlace with the entries of ``p``: the largest lies between the two largest
    entries, and is the root there of the secular equation $\sum_c p_c^2 / (p_c - \lambda) = 1$,
    whose left side grows. Bisection keeps the upper end, so that the result bounds the root.
    """
    if p.shape[axis] == 1:
        return torch.zeros_like(p.sum(axis))
    top = p.topk(2, dim=axis).values
    high, low = (top.select(axis, i).unsqueeze(axis) for i in (0, 1))
    for _ in range(24 if p.dtype == torch.float32 else 52):
        middle = (low + high) / 2
        # At a pole the terms are infinite of both signs, or 0/0: no root below it is lost.
        above = (p.square() / (p - middle)).sum(axis, keepdim=True) > 1
        high = torch.where(above, middle, high)
        low = torch.where(above, low, middle)
    return high.squeeze(axis)
