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
| `mean_pl_coefficient` | that of the examples' own losses |
| `kernel_pl_bound`, `kernel_upper_pl_bound` | bounds of it from the tangent kernel |

Cross-entropy has no PL coefficient, but a weak one: `adler.diagnostics.weak_polyak`.

Source: H. Karimi, J. Nutini, M. Schmidt, *Linear convergence of gradient and proximal-gradient
methods under the Polyak-Łojasiewicz condition*, ECML 2016; C. Liu, L. Zhu, M. Belkin, arXiv
2003.00307; D. Balboni, PhD thesis, SNS 2025, sections
4.1, 4.3, 4.4, 6.2, 7.3 and 7.4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from adler.diagnostics.scalars import excess
from adler.losses import CrossEntropyHessian, LossHessian, MSEHessian, loss_hessian
from adler.losses.base import wide

__all__ = [
    "Gradients",
    "kernel_pl_bound",
    "kernel_upper_pl_bound",
    "loss_pl_coefficient",
    "loss_upper_pl_coefficient",
    "mean_pl_coefficient",
    "pl_coefficient",
    "satisfies_pl_star",
    "satisfies_upper_pl",
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
    squared = squared_norm(gradients)
    gap = excess("loss", loss, optimum, squared)
    return torch.where(gap == 0, torch.full_like(gap, math.inf), squared / (2 * gap))


def mean_pl_coefficient(losses: Tensor, squared_norms: Tensor) -> Tensor:
    r"""The PL coefficient of the examples' own losses, on average.

    $$
    \bar\mu(\theta) = \frac{\sum_i \|\nabla \ell_i(\theta)\|^2}{2 \sum_i \ell_i(\theta)} .
    $$

    It is (6.3) of the thesis (section 6.2), which takes it for the coefficient of the mean loss,
    (6.2) there and `pl_coefficient` here. It is not: $\|\sum_i \nabla \ell_i\|^2 / b^2$ is at most
    $\sum_i \|\nabla \ell_i\|^2 / b$, so that ``pl_coefficient <= mean_pl_coefficient``, and the two
    agree only where all examples have one gradient.

    Args:
        losses: $\ell_i$, shape ``(b,)``, not negative, with infimum 0.
        squared_norms: $\|\nabla \ell_i\|^2$, likewise.

    Returns:
        0-dim, float32 or wider; infinite where all losses are 0.

    Raises:
        ValueError: If the shapes differ or are empty, or a number is negative or not finite.

    Examples:
        >>> float(mean_pl_coefficient(torch.tensor([1.0, 3.0]), torch.tensor([4.0, 4.0])))
        1.0
    """
    if losses.shape != squared_norms.shape or losses.numel() == 0:
        raise ValueError(
            f"losses, squared_norms: shapes {tuple(losses.shape)} and "
            f"{tuple(squared_norms.shape)}; expected one number an example each"
        )
    h, squared = (t.detach().to(wide(t.dtype)).sum() for t in (losses, squared_norms))
    for name, several in (("losses", losses), ("squared_norms", squared_norms)):
        if not bool(((several >= 0) & torch.isfinite(several)).all()):
            raise ValueError(f"{name}: expected finite numbers, none below 0")
    return torch.where(h == 0, torch.full_like(h, math.inf), squared / (2 * h))


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
    squared = squared_norm(gradients)
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
            "cross-entropy has none, adler.diagnostics.weak_polyak has what holds in its place"
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


# --- from above ----------------------------------------------------------------------------------


def satisfies_upper_pl(
    loss: float | Tensor, gradients: Gradients, coefficient: float | Tensor
) -> bool:
    r"""Whether $\tfrac12 \|\nabla h\|^2 \le L h$ at one point: the condition PL⁺, with infimum 0.

    `pl_coefficient` is the least such ``L`` there. An ``L``-smooth loss has it everywhere, but
    PL⁺ does not make a loss smooth.

    Args:
        loss: ``h``, not negative.
        gradients: See `pl_coefficient`.
        coefficient: ``L``, positive.

    Raises:
        ValueError: As `satisfies_pl_star`.

    Source:
        Definition 9 of D. Balboni, PhD thesis, SNS 2025, section 7.3; C. Guille-Escuret, M.
        Girotti, B. Goujaud, I. Mitliagkas, *A study of condition numbers for first-order
        optimization*, 2021.

    Examples:
        >>> satisfies_upper_pl(4.0, torch.tensor([4.0]), 2.0)  # θ² at 2
        True
        >>> satisfies_upper_pl(4.0, torch.tensor([4.0]), 1.9)
        False
    """
    if not coefficient > 0:
        raise ValueError(f"coefficient={float(coefficient)!r}: expected a positive number")
    squared = squared_norm(gradients)
    return bool(squared / 2 <= float(coefficient) * excess("loss", loss, 0.0, squared))


def loss_upper_pl_coefficient(
    outputs: Tensor, targets: Any, criterion: Callable[..., Tensor] | LossHessian
) -> float:
    r"""A PL⁺ coefficient $\beta$ of a loss as a function of the outputs.

    That is, $\tfrac12 \|\nabla L\|^2 \le \beta L$. A convex loss that is $\beta$-smooth everywhere
    has it. For the mean squared error over ``n`` entries $\beta = 2/n$, with equality; for the sum,
    2. For cross-entropy with weights $\omega_i$, $\beta = \tfrac12 \max_i \omega_i$, as in
    `adler.diagnostics.theory.smoothness.loss_bounds`.

    Args:
        outputs: ``F``.
        targets: What the criterion receives after them.
        criterion: `torch.nn.MSELoss` or `torch.nn.CrossEntropyLoss`, or their functions.

    Raises:
        ValueError: If the criterion is another one.

    Examples:
        >>> F, y = torch.zeros(4, 3), torch.zeros(4).long()
        >>> loss_upper_pl_coefficient(F, y, torch.nn.CrossEntropyLoss())
        0.125
    """
    hessian = loss_hessian(criterion)
    if isinstance(hessian, MSEHessian):
        return loss_pl_coefficient(outputs, targets, hessian)
    if type(hessian) is CrossEntropyHessian:
        return float(hessian.example_weights(outputs, targets).max()) / 2
    raise ValueError(
        f"criterion={criterion!r}: known for MSELoss and CrossEntropyLoss; for a convex loss that "
        "is β-smooth everywhere, β itself"
    )


def kernel_upper_pl_bound(
    largest_eigenvalue: float | Tensor,
    outputs: Tensor,
    targets: Any,
    criterion: Callable[..., Tensor] | LossHessian,
) -> float:
    r"""A PL⁺ coefficient of the network's loss: $\beta\, \lambda_{\max}(K(\theta))$.

    Because $\|\nabla h\|^2 = \nabla L^\top K\, \nabla L \le \lambda_{\max}(K) \|\nabla L\|^2$: the
    upper half of Lemma 12 of the thesis (section 7.4). It bounds `pl_coefficient` with
    ``optimum=0`` from above.

    Args:
        largest_eigenvalue: Of the tangent kernel of all outputs of the batch.
        outputs: See `loss_upper_pl_coefficient`.
        targets: See `loss_upper_pl_coefficient`.
        criterion: See `loss_upper_pl_coefficient`.

    Raises:
        ValueError: As `loss_upper_pl_coefficient`; or if the eigenvalue is negative or not finite.

    Examples:
        >>> F, y = torch.zeros(2), torch.ones(2)
        >>> kernel_upper_pl_bound(3.0, F, y, torch.nn.MSELoss(reduction="sum"))
        6.0
    """
    eigenvalue = float(largest_eigenvalue)
    if not 0 <= eigenvalue < math.inf:
        raise ValueError(f"largest_eigenvalue={eigenvalue!r}: expected a finite number, at least 0")
    return loss_upper_pl_coefficient(outputs, targets, criterion) * eigenvalue


# --- helpers -------------------------------------------------------------------------------------


def squared_norm(gradients: Gradients) -> Tensor:
    """``‖∇h‖²``, 0-dim, float32 or wider; gradients as for `pl_coefficient`."""
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
