r"""What the PL inequality and smoothness predict of gradient descent.

Where a loss ``h`` is $\mu$-PL (`adler.diagnostics.polyak`), the descent inequality of an
``L``-smooth loss makes gradient descent at rate $1/L$ shrink $h - h^*$ by $1 - \mu/L$ a step.

| function | what it gives |
|---|---|
| `predicted_decrease`, `accumulated_bound` | one step's factor, and the loss's bound over many |
| `measured_smoothness` | the ``L`` of a step that was taken |

Source: H. Karimi, J. Nutini, M. Schmidt, *Linear convergence of gradient and proximal-gradient
methods under the Polyak-Łojasiewicz condition*, ECML 2016; D. Balboni, PhD thesis, SNS 2025, ch. 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adler.diagnostics.scalars import Numbers, excess, numbers, scalar

__all__ = ["accumulated_bound", "measured_smoothness", "predicted_decrease"]


def predicted_decrease(pl: Numbers, smoothness: Numbers, lr: Numbers | None = None) -> Tensor:
    r"""The factor by which $h - h^*$ shrinks at least in one step $\theta - \eta \nabla h$.

    $$
    1 - 2 \mu \eta \left(1 - \tfrac12 L \eta\right), \qquad
    1 - \mu / L \ \text{ at its minimiser } \eta = 1/L .
    $$

    The descent inequality $h_{k+1} \le h_k - \eta (1 - L\eta/2) \|\nabla h_k\|^2$ needs ``L`` only
    along the step. Beyond $\eta = 2/L$ the factor exceeds 1 and holds only where $\mu$ is
    `pl_coefficient` itself, not a lower bound of it. A negative factor says that the inequality
    does not hold with this ``L``, since no step leads below $h^*$.

    Args:
        pl: ``μ``; numbers or tensors, elementwise.
        smoothness: ``L``; positive if no rate is given.
        lr: ``η``, not negative. Default: ``1/L``.

    Returns:
        Of the shape of the arguments.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> float(predicted_decrease(1.0, 4.0))
        0.75
        >>> float(predicted_decrease(1.0, 4.0, lr=0.1))
        0.84
    """
    mu = numbers(pl)
    L = numbers(smoothness, mu)
    if not bool((mu >= 0).all()):
        raise ValueError(f"pl: the least is {float(mu.min())!r}; expected none below 0")
    if lr is None:
        if not bool((L > 0).all()):
            raise ValueError(
                f"smoothness: the least is {float(L.min())!r}; expected positive numbers, or lr="
            )
        return 1 - mu / L
    eta = numbers(lr, mu)
    if not bool((eta >= 0).all()):
        raise ValueError(f"lr: the least is {float(eta.min())!r}; expected none below 0")
    return 1 - 2 * mu * eta * (1 - L * eta / 2)


def accumulated_bound(
    initial: float | Tensor,
    pls: Numbers,
    smoothnesses: Numbers,
    optimum: float | Tensor = 0.0,
    lrs: Numbers | None = None,
) -> Tensor:
    r"""A bound of the loss after each of ``T`` steps of gradient descent.

    $$
    h_t \le h^* + (h_0 - h^*) \prod_{s < t} \left(1 - \mu_s / L_s\right),
    $$

    with the factors of `predicted_decrease` at other rates than $1/L$. A negative factor counts as
    0, which says no more than $h \ge h^*$. In the role of Lemma 11 of the thesis; the proof is that
    of `predicted_decrease`, step by step.

    Args:
        initial: ``h_0``, at least ``h*``.
        pls: ``μ_0, …, μ_{T-1}``.
        smoothnesses: ``L_0, …, L_{T-1}``, or one for all steps.
        optimum: ``h*``.
        lrs: Rates, or one for all steps. Default: ``1/L_t``.

    Returns:
        Shape ``(T + 1,)``: bounds of ``h_0, …, h_T``.

    Raises:
        ValueError: As `predicted_decrease`; if the initial loss is below the optimum, or lengths
            differ.

    Examples:
        >>> accumulated_bound(8.0, [1.0, 2.0], 4.0).tolist()
        [8.0, 6.0, 3.0]
    """
    mu = numbers(pls)
    if mu.ndim != 1:
        raise ValueError(f"pls: shape {tuple(mu.shape)}; expected one number a step")
    for name, given in (("smoothnesses", smoothnesses), ("lrs", lrs)):
        if given is not None:
            shape = numbers(given).shape
            if shape not in ((), mu.shape):
                raise ValueError(f"{name}: shape {tuple(shape)} for {len(mu)} steps")
    factors = predicted_decrease(mu, smoothnesses, lrs).clamp(min=0)
    gap = excess("initial", initial, optimum, factors)
    return torch.cat([gap.new_ones(1), factors.cumprod(0)]) * gap + scalar("optimum", optimum, gap)


def measured_smoothness(
    loss_before: float | Tensor,
    loss_after: float | Tensor,
    squared_norm: float | Tensor,
    lr: float | Tensor,
) -> Tensor:
    r"""The ``L`` for which the descent inequality is an equality on a step that was taken.

    $$
    L = \frac{2\,(h_{k+1} - h_k + \eta \|\nabla h_k\|^2)}{\eta^2 \|\nabla h_k\|^2} .
    $$

    A mean of the curvature along the step, weighted towards its start; negative where the loss is
    concave. The terms of the numerator cancel, so a short step needs losses in float64.

    Args:
        loss_before: ``h_k``.
        loss_after: ``h_{k+1}``, of the same batch.
        squared_norm: ``‖∇h_k‖²``, positive.
        lr: ``η`` of the step ``-η ∇h_k``, positive.

    Raises:
        ValueError: If an argument is out of range or not a single number.

    Examples:
        >>> float(measured_smoothness(1.0, 0.0, squared_norm=4.0, lr=0.5))  # θ² from 1 to 0
        2.0
    """
    squared = scalar("squared_norm", squared_norm)
    eta = scalar("lr", lr, squared)
    for name, number in (("squared_norm", squared), ("lr", eta)):
        if not number > 0:
            raise ValueError(f"{name}={float(number)!r}: expected a positive number")
    before = scalar("loss_before", loss_before, squared)
    after = scalar("loss_after", loss_after, squared)
    return 2 * (after - before + eta * squared) / (eta.square() * squared)
