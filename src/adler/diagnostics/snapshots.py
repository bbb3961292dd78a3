"""What one minibatch says of a network."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from adler.curvature import TangentKernel, learning_rate
from adler.curvature.objective import Objective
from adler.diagnostics.descent import predicted_decrease
from adler.diagnostics.ggn import ggn_largest_eigenvalue
from adler.diagnostics.hessian import hessian_split
from adler.diagnostics.polyak import pl_coefficient

__all__ = ["Snapshot", "snapshot"]

# Where along the gradient the loss is looked at, in minibatch rates.
_FRACTIONS = tuple(i / 4 for i in range(11))


class Snapshot(NamedTuple):
    r"""What one minibatch says of the network; plain numbers and lists.

    Attributes:
        step: When it was taken: the number of the minibatch.
        examples: In the minibatch.
        loss: ``h``.
        squared_norm: $\|\nabla h\|^2$.
        pl: $\mu = \|\nabla h\|^2 / (2 h)$, with the infimum taken as 0.
        smoothness: ``L``, the largest eigenvalue of the generalized Gauss-Newton matrix (GGN).
        minibatch_lr: ADLER's $\eta_k$ along the gradient.
        decrease: $1 - \mu/L$, the predicted factor of the loss in a step of length ``1/L``.
        measured_decrease: The factor measured in that step.
        trust_gradient: $|c| / (|c| + |r|)$ of the GGN part ``c`` and the rest ``r`` of the second
            derivative along the gradient: 1 where the GGN is the Hessian.
        trust_random: The same along a random direction.
        curve: Losses measured at $\theta - s\, \eta_k g$, with ``s`` from 0 to 2.5 by quarters.
        model: What the GGN's parabola says there.
        spectrum: Eigenvalues of the tangent kernel, ascending, of the first examples that fit.
    """

    step: int
    examples: int
    loss: float
    squared_norm: float
    pl: float
    smoothness: float
    minibatch_lr: float
    decrease: float
    measured_decrease: float
    trust_gradient: float
    trust_random: float
    curve: list[float]
    model: list[float]
    spectrum: list[float]

    @property
    def condition_number(self) -> float:
        """Of the tangent kernel; infinite where its smallest eigenvalue is not positive."""
        low, high = self.spectrum[0], self.spectrum[-1]
        return high / low if low > 0 else math.inf


def snapshot(
    objective: Objective, *, step: int = 0, max_bytes: int = 2**28, seed: int = 0
) -> Snapshot:
    """What one minibatch says of the network. Parameters, gradients and buffers stay as they are.

    Args:
        objective: The loss of the minibatch.
        step: Kept in the result.
        max_bytes: The largest temporary beyond a forward and a backward pass. The tangent kernel
            takes as many of the first examples as fit, at most a thousand outputs.
        seed: Of the random direction.

    Raises:
        ValueError: If the loss or a parameter is not finite, or the criterion does not reduce.

    Examples:
        >>> model, x, y = torch.nn.Linear(4, 3), torch.randn(8, 4), torch.randint(3, (8,))
        >>> found = snapshot(Objective(model, x, y, torch.nn.CrossEntropyLoss()))
        >>> found.examples, len(found.spectrum), round(found.trust_gradient, 3)  # linear
        (8, 24, 1.0)
    """
    loss, gradient = objective.loss_and_gradient()
    if not torch.isfinite(loss):
        raise ValueError(f"the loss of this minibatch is {float(loss)}, not finite")
    squared_norm = torch.stack([g.double().square().sum() for g in gradient.values()]).sum()
    curvature = objective.quadratic_form(gradient).double()
    smoothness = ggn_largest_eigenvalue(objective, max_bytes=max_bytes)
    rate = learning_rate(squared_norm, curvature, squared_norm)
    pl = pl_coefficient(loss.clamp(min=0), gradient)
    generator = torch.Generator().manual_seed(seed)
    params = objective.params
    random = {n: torch.randn(p.shape, generator=generator).to(p) for n, p in params.items()}

    @torch.no_grad()
    def loss_at(length: float) -> float:
        """At so long a step along the negative gradient."""
        return float(objective.loss({n: p - length * gradient[n] for n, p in params.items()}))

    with torch.no_grad():
        outputs = objective.outputs()
    lengths = [float(s * rate) for s in _FRACTIONS]
    return Snapshot(
        step=step,
        examples=len(outputs),
        loss=float(loss),
        squared_norm=float(squared_norm),
        pl=float(pl),
        smoothness=smoothness,
        minibatch_lr=float(rate),
        decrease=float(predicted_decrease(pl, smoothness)) if smoothness > 0 else math.nan,
        measured_decrease=(
            loss_at(1 / smoothness) / float(loss) if smoothness > 0 and loss > 0 else math.nan
        ),
        trust_gradient=float(hessian_split(objective, gradient).trust),
        trust_random=float(hessian_split(objective, random).trust),
        curve=[loss_at(length) for length in lengths],
        model=[float(loss - t * squared_norm + t * t * curvature / 2) for t in lengths],
        spectrum=_spectrum(objective, outputs, max_bytes),
    )


def _spectrum(objective: Objective, outputs: Tensor, max_bytes: int) -> list[float]:
    """Of the tangent kernel of the first examples that fit."""
    b = len(outputs)
    most = min(1000, math.isqrt(max_bytes // 8))
    kept = max(1, min(b, most // max(1, outputs.numel() // b)))
    few = pytree.tree_map_only(
        Tensor, lambda t: t[:kept] if t.ndim and t.shape[0] == b else t, objective.inputs
    )
    kernel = TangentKernel(
        objective.model,
        few,
        objective.params,
        output_fn=objective.output_fn,
        max_bytes=max_bytes,
    )
    values: list[float] = kernel.eigenvalues().tolist()
    return values
