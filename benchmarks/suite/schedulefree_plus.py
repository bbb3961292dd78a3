"""ScheduleFree+: AdamW between an iterate and its average, as long as Polyak's rule says."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["ScheduleFreePlus"]


class ScheduleFreePlus(Optimizer):
    r"""Schedule-Free AdamW with an inner momentum and a Polyak step length.

    With the gradient $g$ and the loss $f$ at $y$, the bias-corrected moments $\hat m$ and $\hat v$
    of Adam, and a multiplier $\gamma$,

    $$
    \alpha = \gamma\, \frac{\max(0,\; f + \beta \langle g, z - x \rangle)}{\sqrt{\pi/2}\,\|g\|_1},
    \quad
    z \leftarrow z - \alpha\, \frac{\hat m}{\sqrt{\hat v} + \epsilon}, \quad
    x \leftarrow (1 - c)\, x + c\, z, \quad
    y \leftarrow \beta x + (1 - \beta) z.
    $$

    The weights are $y$ after `train`, where gradients are taken, and the average $x$ after `eval`.
    $c$ is 1 in the first ``average_warmup`` steps; then the average weighs each step by the square
    of the largest $\alpha$ until then. The length takes the least possible loss to be zero. Where
    the gradient is zero it is not defined, and is zero here.

    This is the authors' ``AdamCScheduleFreePlusPaper`` at its defaults, which no release of their
    package has (1.4.1 is the newest): without weight decay, without annealing of $\beta$.

    Args:
        params: Of one group.
        lr: ``γ``, which a warm-up may multiply.
        betas: Of Adam's moments.
        interpolation: ``β``.
        eps: ``ε``.
        average_warmup: Steps in which there is no average.

    Source: A. Defazio, arXiv 2605.19095; github.com/facebookresearch/schedule_free,
    ``schedulefree/adamc_schedulefree_plus_paper.py``.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.95),
        interpolation: float = 0.9,
        eps: float = 1e-8,
        average_warmup: int = 0,
    ) -> None:
        options = {"lr": lr, "betas": betas, "interpolation": interpolation, "eps": eps}
        super().__init__(params, {**options, "average_warmup": average_warmup})
        # Numbers of the whole optimizer; `effective_lr` is α, for the record.
        self.param_groups[0].update(step=0, longest=eps, total_weight=0.0, effective_lr=0.0)
        self._averaged = True

    def train(self) -> None:
        """Puts the weights back where gradients are taken."""
        if self._averaged:
            self._exchange()
        self._averaged = False

    def eval(self) -> None:
        """Puts the average in place of the weights."""
        if not self._averaged:
            self._exchange()
        self._averaged = True

    @torch.no_grad()
    def _exchange(self) -> None:
        """Between the weights and what is kept beside them: the other of ``x`` and ``y``."""
        for p in self.param_groups[0]["params"]:
            if p in self.state:
                other = self.state[p]["other"]
                kept = p.clone()
                p.copy_(other)
                other.copy_(kept)

    @torch.no_grad()
    def step(self, closure: None = None, *, loss: Tensor) -> None:  # type: ignore[override]
        """Takes the step.

        Args:
            closure: None.
            loss: Of the minibatch, before the step.

        Raises:
            RuntimeError: After `eval`, or before the first `train`.
        """
        if self._averaged:
            raise RuntimeError("call train() before step(): the weights are the average")
        group = self.param_groups[0]
        beta, (beta1, beta2) = group["interpolation"], group["betas"]
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if not self.state[p]:
                kept = {"z": p.clone(), "other": p.clone()}
                self.state[p].update(kept, m=torch.zeros_like(p), v=torch.zeros_like(p))
        group["step"] += 1
        k = group["step"]
        rate = group["effective_lr"] = max(group["lr"], group["eps"]) * self._length(
            params, float(loss), beta
        )
        group["longest"] = max(rate, group["longest"])
        weight = 1.0
        if k > group["average_warmup"]:
            group["total_weight"] += group["longest"] ** 2
            weight = group["longest"] ** 2 / group["total_weight"]
        for p in params:
            state = self.state[p]
            x, z, m, v = state["other"], state["z"], state["m"], state["v"]
            m.lerp_(p.grad, 1 - beta1)
            v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
            root = (v / (1 - beta2**k)).sqrt_().add_(group["eps"])
            z.addcdiv_(m, root, value=-rate / (1 - beta1**k))
            x.lerp_(z, weight)
            torch.lerp(z, x, beta, out=p)

    def _length(self, params: list[Tensor], loss: float, beta: float) -> float:
        """Polyak's, by the average's bound on the loss."""
        inner: Any = 0.0
        norm: Any = 0.0
        for p in params:
            assert p.grad is not None
            state = self.state[p]
            inner = inner + (p.grad * (state["z"] - state["other"])).sum()
            norm = norm + p.grad.abs().sum()
        scale = math.sqrt(math.pi / 2) * float(norm)
        return max(0.0, loss + beta * float(inner)) / scale if scale else 0.0
