r"""Polyak-Łojasiewicz coefficients, and lower bounds of them.

A loss ``h`` with infimum $h^*$ is $\mu$-PL on a set where

$$
\tfrac12 \|\nabla h(\theta)\|^2 \ge \mu\, (h(\theta) - h^*),
$$

and $\mu$-PL* where this holds with $h^* = 0$. Sources that leave the ½ out have twice our
coefficient. `adler.diagnostics.descent` predicts gradient descent from it.

| function | what it gives |
|---|---|
| `pl_coefficient` | the largest $\mu$ at one point |
| `kernel_pl_bound` | a lower bound of it from the tangent kernel |
| `weak_pl_bound`, `weak_pl_coefficient` | what cross-entropy has in its place |

Source: H. Karimi, J. Nutini, M. Schmidt, *Linear convergence of gradient and proximal-gradient
methods under the Polyak-Łojasiewicz condition*, ECML 2016; C. Liu, L. Zhu, M. Belkin, arXiv
2003.00307; D. Balboni, PhD thesis, SNS 2025, ch. 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from adler.diagnostics.scalars import excess
from adler.losses import LossHessian, MSEHessian, loss_hessian
from adler.losses.base import wide

__all__ = [
    "kernel_pl_bound",
    "loss_pl_coefficient",
    "pl_coefficient",
    "satisfies_pl_star",
    "weak_pl_bound",
    "weak_pl_coefficient",
]

Gradients = Tensor | Iterable[Tensor | None] | Mapping[str, Tensor | None]


# --- at one point --------------------------------------------------------------------------------


def pl_coefficient(
    loss: float | Tensor, gradients: Gradients, optimum: float | Tensor = 0.0
) -> Tensor:
    r"""The largest $\mu$ for which the PL inequality holds at one point.

    $$
    \mu(\theta) = \frac{\|\nabla h(\theta)\|^2}{2\,(h(\theta) - h^*)}.
    $$

    At the optimum the inequality holds for every $\mu$, and the coefficient is infinite. A loss
    that is ``L``-smooth everywhere has $\mu(\theta) \le L$.

    Args:
        loss: ``h``, a number or 0-dim tensor.
        gradients: Of ``h``: one tensor, an iterable of them such as
            ``[p.grad for p in model.parameters()]``, or a mapping by name. ``None`` counts as zero.
        optimum: ``h*``. Default 0: the coefficient of PL*, for losses that are not negative.

    Returns:
        0-dim, float32 or wider.

    Raises:
        ValueError: If there is no gradient, a number is not finite, or the loss is below the
            optimum.

    Examples:
        >>> theta = torch.tensor([3.0, 4.0])
        >>> float(pl_coefficient(theta.square().sum(), 2 * theta))  # of |θ|²: L = μ = 2
        2.0
    """
    squared = _squared_norm(gradients)
    gap = excess("loss", loss, optimum, squared)
    return torch.where(gap == 0, torch.full_like(gap, math.inf), squared / (2 * gap))


def satisfies_pl_star(
    loss: float | Tensor, gradients: Gradients, coefficient: float | Tensor
) -> bool:
    r"""Whether $\tfrac12 \|\nabla h\|^2 \ge \mu h$ at one point: PL*, with the ½.

    Args:
        loss: ``h``, not negative.
        gradients: See `pl_coefficient`.
        coefficient: ``μ``, positive.

    Raises:
        ValueError: As `pl_coefficient`; or if the coefficient is not positive.

    Examples:
        >>> satisfies_pl_star(4.0, torch.tensor([4.0]), 2.0)  # θ² at 2
        True
        >>> satisfies_pl_star(4.0, torch.tensor([4.0]), 2.1)
        False
    """
    if not coefficient > 0:
        raise ValueError(f"coefficient={float(coefficient)!r}: expected a positive number")
    squared = _squared_norm(gradients)
    return bool(squared / 2 >= float(coefficient) * excess("loss", loss, 0.0, squared))


# --- from the tangent kernel ---------------------------------------------------------------------


def loss_pl_coefficient(
    outputs: Tensor, targets: Any, criterion: Callable[..., Tensor] | LossHessian
) -> float:
    r"""The PL coefficient $\alpha$ of a loss as a function of the outputs.

    For the mean squared error over ``n`` entries, $\|\nabla L\|^2 = 4 \|F - y\|^2 / n^2 = 4 L / n$,
    so $\alpha = 2/n$, with equality everywhere; for the sum, 2.

    Args:
        outputs: ``F``.
        targets: Broadcast to the outputs.
        criterion: `torch.nn.MSELoss` or `torch.nn.functional.mse_loss`.

    Raises:
        ValueError: If the criterion has no such coefficient, or the targets are larger than the
            outputs.

    Examples:
        >>> loss_pl_coefficient(torch.zeros(5, 2), torch.ones(5, 2), torch.nn.MSELoss())
        0.2
    """
    hessian = loss_hessian(criterion)
    if not isinstance(hessian, MSEHessian):
        raise ValueError(
            f"criterion={criterion!r}: no PL coefficient is known that holds for all outputs; "
            "cross-entropy has none, weak_pl_bound holds in its place"
        )
    # Outputs that are repeated to meet larger targets cannot fit them: the infimum is not 0.
    try:
        targets.expand_as(outputs)
    except RuntimeError as error:
        raise ValueError(
            f"targets: shape {tuple(targets.shape)} does not broadcast to that of the outputs, "
            f"{tuple(outputs.shape)}; reshape one of them"
        ) from error
    summed = getattr(hessian.criterion, "reduction", "mean") == "sum"
    return 2.0 if summed else 2.0 / outputs.numel()


def kernel_pl_bound(
    smallest_eigenvalue: float | Tensor,
    outputs: Tensor,
    targets: Any,
    criterion: Callable[..., Tensor] | LossHessian,
) -> float:
    r"""A lower bound of the PL coefficient: $\mu(\theta) \ge \alpha\, \lambda_{\min}(K(\theta))$.

    Because $\|\nabla h\|^2 = \nabla L^\top K\, \nabla L \ge \lambda_{\min}(K) \|\nabla L\|^2$ and
    $\|\nabla L\|^2 \ge 2 \alpha (L - \inf L)$. It bounds `pl_coefficient` with ``optimum=0``, and
    so with any larger optimum.

    Args:
        smallest_eigenvalue: Of the tangent kernel ``K = J Jᵀ`` of all outputs of the batch.
            Rounding may have made it negative: it counts as 0.
        outputs: See `loss_pl_coefficient`.
        targets: See `loss_pl_coefficient`.
        criterion: See `loss_pl_coefficient`.

    Raises:
        ValueError: As `loss_pl_coefficient`; or if the eigenvalue is not finite.

    Examples:
        >>> kernel_pl_bound(3.0, torch.zeros(2), torch.ones(2), torch.nn.MSELoss(reduction="sum"))
        6.0
    """
    eigenvalue = float(smallest_eigenvalue)
    if not math.isfinite(eigenvalue):
        raise ValueError(f"smallest_eigenvalue={eigenvalue!r}: expected a finite number")
    return loss_pl_coefficient(outputs, targets, criterion) * max(eigenvalue, 0.0)


# --- cross-entropy -------------------------------------------------------------------------------


def weak_pl_bound(losses: Tensor, classes: int, reduction: str = "mean") -> Tensor:
    r"""A lower bound of $\|\nabla L\|^2$ for cross-entropy, from the examples' losses.

    $$
    \|\nabla L\|^2 \ge \frac{C}{C - 1} \sum_i \omega^2 (1 - e^{-\ell_i})^2 ,
    $$

    with $\omega = 1/b$ for the mean, 1 for the sum. Per example the gradient is $p - e_y$ with
    $p_y = e^{-\ell}$. Its entry at ``y`` has modulus $1 - p_y$, the others sum to as much, so by
    Cauchy-Schwarz their squares sum to at least $(1 - p_y)^2 / (C - 1)$; equality where they agree.

    The gradient vanishes as the loss does, only faster: no PL inequality, but this one, in the role
    of Lemma 22 of the thesis. Then $\|\nabla h\|^2 \ge \lambda_{\min}(K) \|\nabla L\|^2$. As
    $\nabla L$ has mean zero over the classes of each example, the smallest eigenvalue of ``K`` on
    such vectors is enough.

    Args:
        losses: Cross-entropy of each example, of hard targets, without class weights; ``(b,)`` or
            any shape.
        classes: ``C``.
        reduction: ``"mean"`` or ``"sum"``: how ``L`` combines them.

    Returns:
        0-dim, float32 or wider.

    Raises:
        ValueError: If there is no loss, one is negative or not a number, or another argument is out
            of range.

    Examples:
        >>> bound = weak_pl_bound(torch.tensor([2.0]).log(), classes=2)  # p = ½: (-½, ½)
        >>> round(float(bound), 6)
        0.5
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}: expected 'mean' or 'sum'")
    if losses.numel() == 0:
        raise ValueError(f"losses: shape {tuple(losses.shape)}; expected at least one example")
    if not bool((losses >= 0).all()):
        raise ValueError(f"losses: the least is {float(losses.min())}; expected none below 0")
    errors = -torch.expm1(-losses.detach().to(wide(losses.dtype)))
    bound = _simplex(classes) * errors.square().sum()
    return bound if reduction == "sum" else bound / losses.numel() ** 2


def weak_pl_coefficient(largest_loss: float, classes: int, examples: int) -> float:
    r"""The constant $\omega$ of $\|\nabla L\|^2 \ge \omega L^2$ for cross-entropy.

    While no example's loss exceeds ``M``,

    $$
    \omega = \frac1b\, \frac{C}{C - 1} \left(\frac{1 - e^{-M}}{M}\right)^2 ,
    $$

    for the mean and for the sum alike: $1 - e^{-\ell}$ is concave, so at least
    $\ell\,(1 - e^{-M})/M$ on $[0, M]$, and $\sum_i \ell_i^2 \ge (\sum_i \ell_i)^2 / b$; the rest is
    `weak_pl_bound`. Equality where all examples have loss ``M`` and equal wrong probabilities.

    Under it the loss falls like $1/k$, not geometrically: with rate $1/L$, a step has
    $h_{k+1} \le h_k - \omega \lambda_{\min}(K)\, h_k^2 / (2L)$.

    Args:
        largest_loss: ``M``, not negative.
        classes: ``C``, at least 2.
        examples: ``b``, at least 1.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> weak_pl_coefficient(0.0, classes=2, examples=4)
        0.5
    """
    if not 0 <= largest_loss < math.inf:
        raise ValueError(f"largest_loss={largest_loss!r}: expected a finite number, at least 0")
    if examples < 1:
        raise ValueError(f"examples={examples!r}: expected at least 1")
    chord = -math.expm1(-largest_loss) / largest_loss if largest_loss > 0 else 1.0
    return _simplex(classes) * chord**2 / examples


# --- helpers -------------------------------------------------------------------------------------


def _squared_norm(gradients: Gradients) -> Tensor:
    if isinstance(gradients, Tensor):
        gradients = [gradients]
    elif isinstance(gradients, Mapping):
        gradients = gradients.values()
    found = [g.detach() for g in gradients if g is not None]
    if not found:
        raise ValueError("gradients: none at all; call backward() on the loss first")
    terms = [torch.linalg.vector_norm(g, dtype=wide(g.dtype)).square() for g in found]
    squared = torch.stack([term.to(terms[0].device) for term in terms]).sum()
    if not torch.isfinite(squared):
        raise ValueError(
            f"gradients: their squared norm is {float(squared)}; expected a finite one"
        )
    return squared


def _simplex(classes: int) -> float:
    if classes < 2:
        raise ValueError(f"classes={classes!r}: expected at least 2")
    return classes / (classes - 1)
