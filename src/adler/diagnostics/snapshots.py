"""What one minibatch says of a network."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adler._recording.replay import Call, replaying
from adler.curvature import learning_rate, named_parameters, quadratic_form
from adler.curvature.jacobian import Parameters
from adler.diagnostics.descent import predicted_decrease
from adler.diagnostics.ggn import ggn_largest_eigenvalue
from adler.diagnostics.hessian import hessian_split
from adler.diagnostics.kernel import TangentKernel
from adler.diagnostics.polyak import pl_coefficient
from adler.losses import loss_hessian

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
    model: nn.Module,
    criterion: Callable[..., Tensor],
    inputs: Any,
    targets: Any,
    *,
    step: int = 0,
    output_fn: Callable[[Any], Tensor] | None = None,
    max_bytes: int = 2**28,
    seed: int = 0,
) -> Snapshot:
    """What one minibatch says of the network. Parameters, gradients and buffers stay as they are.

    Args:
        model: The network, in the mode (train or eval) it is in.
        criterion: The loss, reduced to a scalar.
        inputs: One argument, a tuple of positional arguments, or a mapping of keyword arguments.
        targets: What the criterion receives after the outputs; a tuple where it receives several.
        step: Kept in the result.
        output_fn: Picks the tensor that the criterion receives from what the model returns.
        max_bytes: The largest temporary beyond a forward and a backward pass. The tangent kernel
            takes as many of the first examples as fit, at most a thousand outputs.
        seed: Of the random direction.

    Raises:
        ValueError: If the loss or a parameter is not finite, or the criterion does not reduce.
    """
    params = named_parameters(model, [p for p in model.parameters() if p.requires_grad])
    loss, gradient, outputs = _loss_and_gradient(
        model, criterion, params, inputs, targets, output_fn
    )
    squared_norm = torch.stack([g.double().square().sum() for g in gradient.values()]).sum()
    shared = (model, params, inputs, targets, criterion)
    curvature = quadratic_form(*shared, gradient, output_fn=output_fn).double()
    smoothness = ggn_largest_eigenvalue(
        model, inputs, targets, criterion, params, output_fn=output_fn, max_bytes=max_bytes
    )
    rate = learning_rate(squared_norm, curvature, squared_norm)
    pl = pl_coefficient(loss.clamp(min=0), gradient)
    generator = torch.Generator().manual_seed(seed)
    random = {n: torch.randn(p.shape, generator=generator).to(p) for n, p in params.items()}
    along_gradient = hessian_split(*shared, gradient, output_fn=output_fn)
    along_random = hessian_split(*shared, random, output_fn=output_fn)

    def height(length: Tensor | float) -> float:
        moved = {n: p.detach() - float(length) * gradient[n] for n, p in params.items()}
        with torch.no_grad():
            return float(_loss(model, criterion, moved, inputs, targets, output_fn)[0])

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
            height(1 / smoothness) / float(loss) if smoothness > 0 and loss > 0 else math.nan
        ),
        trust_gradient=float(along_gradient.trust),
        trust_random=float(along_random.trust),
        curve=[height(length) for length in lengths],
        model=[float(loss - t * squared_norm + t * t * curvature / 2) for t in lengths],
        spectrum=_spectrum(model, params, inputs, outputs, output_fn, max_bytes),
    )


# --- pieces --------------------------------------------------------------------------------------


def _loss(
    model: nn.Module,
    criterion: Callable[..., Tensor],
    params: Parameters,
    inputs: Any,
    targets: Any,
    output_fn: Callable[[Any], Tensor] | None,
) -> tuple[Tensor, Tensor]:
    outputs = Call.of(model, inputs, output_fn)(params)
    several = targets if isinstance(targets, tuple) else (targets,)
    with replaying():
        return criterion(outputs, *several), outputs


def _loss_and_gradient(
    model: nn.Module,
    criterion: Callable[..., Tensor],
    params: Parameters,
    inputs: Any,
    targets: Any,
    output_fn: Callable[[Any], Tensor] | None,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    loss_hessian(criterion)  # refuses reduction="none"
    with torch.enable_grad():
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        loss, outputs = _loss(model, criterion, leaves, inputs, targets, output_fn)
        gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    if not torch.isfinite(loss):
        raise ValueError(f"the loss of this minibatch is {float(loss.detach())}, not finite")
    return loss.detach(), dict(zip(leaves, gradients, strict=True)), outputs.detach()


def _spectrum(
    model: nn.Module,
    params: Parameters,
    inputs: Any,
    outputs: Tensor,
    output_fn: Callable[[Any], Tensor] | None,
    max_bytes: int,
) -> list[float]:
    b = len(outputs)
    most = min(1000, math.isqrt(max_bytes // 8))
    kept = max(1, min(b, most // max(1, outputs.numel() // b)))
    few = pytree.tree_map_only(
        Tensor, lambda t: t[:kept] if t.ndim and t.shape[0] == b else t, inputs
    )
    kernel = TangentKernel(model, few, params, output_fn=output_fn, max_bytes=max_bytes)
    values: list[float] = kernel.eigenvalues().tolist()
    return values
