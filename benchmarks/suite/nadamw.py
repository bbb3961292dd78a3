"""Adam with Nesterov momentum and decoupled weight decay, as AlgoPerf's baseline has it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

__all__ = ["NAdamW"]


class NAdamW(Optimizer):
    r"""Adam that looks one step of its momentum ahead.

    $$
    m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad v \leftarrow \beta_2 v + (1 - \beta_2) g^2,
    \quad
    \theta \leftarrow (1 - \eta\lambda)\, \theta
    - \frac{\eta}{1 - \beta_1^k}\,
    \frac{\beta_1 m + (1 - \beta_1) g}{\sqrt{v / (1 - \beta_2^k)} + \epsilon}.
    $$

    ``torch.optim.NAdam`` follows another schedule of $\beta_1$.

    Args:
        params: Of one group.
        lr: ``η``.
        betas: ``β_1``, ``β_2``.
        eps: ``ε``.
        weight_decay: ``λ``.

    Source: D. Choi et al., arXiv 1910.05446, table 1.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        eps: float = 1e-8,
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes the step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            rate, (beta1, beta2) = group["lr"], group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(step=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
                state["step"] += 1
                m, v, k = state["m"], state["v"], state["step"]
                m.lerp_(p.grad, 1 - beta1)
                v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                ahead = torch.lerp(m, p.grad, 1 - beta1)
                root = (v / (1 - beta2**k)).sqrt_().add_(group["eps"])
                p.mul_(1 - rate * group["weight_decay"])
                p.addcdiv_(ahead, root, value=-rate / (1 - beta1**k))
        return loss
