r"""What the PL inequality and smoothness predict of gradient descent.

Where a loss ``h`` is $\mu$-PL (`adler.diagnostics.polyak`), the descent inequality of an
``L``-smooth loss makes gradient descent at rate $1/L$ shrink $h - h^*$ by $1 - \mu/L$ a step.

| function | what it gives |
|---|---|
| `predicted_decrease`, `accumulated_bound` | one step's factor, and the loss's bound over many |
| `predicted_contraction` | a step's factor of the squared distance, under PL⁺ and PL |
| `convergence_radius` | how far from its start gradient descent can end |
| `measured_smoothness` | the ``L`` of a step that was taken |

Source: H. Karimi, J. Nutini, M. Schmidt, *Linear convergence of gradient and proximal-gradient
methods under the Polyak-Łojasiewicz condition*, ECML 2016; D. Balboni, PhD thesis, SNS 2025,
sections 4.1, 6.2 and 7.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adler.diagnostics.scalars import Numbers, excess, numbers, scalar

__all__ = [
    "accumulated_bound",
    "convergence_radius",
    "measured_smoothness",
    "predicted_contraction",
    "predicted_decrease",
]


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
    0, which says no more than $h \ge h^*$. It is Lemma 11 of the thesis (section 6.2); the proof is
    that of `predicted_decrease`, step by step.

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


def convergence_radius(
    gap: float | Tensor, pl: float | Tensor, smoothness: float | Tensor
) -> Tensor:
    r"""How far from its start gradient descent at rate $1/L$ can ever be.

    $$
    \|\theta_k - \theta_0\| \le \sqrt{\frac{2 (h_0 - h^*)}{L}}\;
        \frac{1}{1 - \sqrt{1 - \mu/L}} .
    $$

    Proof: smoothness gives $\|\nabla h_k\|^2 \le 2 L (h_k - h^*)$, so a step is at most $\sqrt{2
    (h_k - h^*) / L}$ long, and PL makes these lengths a geometric series. Attained in one step by
    $\tfrac12 L \theta^2$. It is (4.4) of the thesis, Lemma 1, without the factor $1/L$ before the
    distance there, which is a slip: from $\theta_0 = 1$ with $L = \mu = 0.01$ that quadratic moves
    by 1, where the printed formula allows 0.01.

    Args:
        gap: $h_0 - h^*$, not negative.
        pl: ``μ``, positive, at most ``L``.
        smoothness: ``L``.

    Raises:
        ValueError: If an argument is out of range or not a single number.

    Source:
        Lemma 1 of D. Balboni, PhD thesis, SNS 2025, section 4.1.

    Examples:
        >>> float(convergence_radius(gap=2.0, pl=4.0, smoothness=4.0))  # 2 θ² from 1
        1.0
    """
    xi = scalar("gap", gap)
    mu, L = scalar("pl", pl, xi), scalar("smoothness", smoothness, xi)
    if xi < 0:
        raise ValueError(f"gap={float(xi)!r}: expected a number of at least 0")
    if not 0 < mu <= L:
        raise ValueError(
            f"pl={float(mu)!r}, smoothness={float(L)!r}: expected positive numbers, pl no larger"
        )
    return (2 * xi / L).sqrt() / (1 - (1 - mu / L).sqrt())


def predicted_contraction(pl: Numbers, upper_pl: Numbers, lr: Numbers | None = None) -> Tensor:
    r"""The factor by which $\|\theta - \theta^*\|^2$ shrinks at least in a step, under PL⁺ and PL.

    $$
    1 - \mu \eta (1 - L \eta), \qquad 1 - \frac{\mu}{4 L} \ \text{ at its minimiser } \eta = 1/2L ,
    $$

    for a loss that is $\mathrm{PL}^-(\mu)$ and $\mathrm{PL}^+(L)$, $\mu (h - h^*) \le \tfrac12
    \|\nabla h\|^2 \le L (h - h^*)$, and star-convex about $\theta^*$, the nearest minimiser; it
    need not be smooth. Proof: $\|\theta - \eta \nabla h - \theta^*\|^2 = \|\theta - \theta^*\|^2 -
    2 \eta \langle \nabla h, \theta - \theta^* \rangle + \eta^2 \|\nabla h\|^2$; star-convexity
    bounds the second term by $-2 \eta (h - h^*)$, PL⁺ the third by $2 L \eta^2 (h - h^*)$, and $h -
    h^* \ge \tfrac{\mu}{2} \|\theta - \theta^*\|^2$, which PL⁻ implies.

    Args:
        pl: ``μ``, not negative; numbers or tensors, elementwise.
        upper_pl: ``L``, positive.
        lr: ``η``, between 0 and ``1/L``. Default: ``1/2L``.

    Returns:
        Of the shape of the arguments.

    Raises:
        ValueError: If an argument is out of range.

    Source:
        C. Guille-Escuret, M. Girotti, B. Goujaud, I. Mitliagkas, *A study of condition numbers for
        first-order optimization*, AISTATS 2021, table 2; D. Balboni, PhD thesis, SNS 2025, section
        7.3.

    Examples:
        >>> float(predicted_contraction(1.0, 4.0))
        0.9375
    """
    mu = numbers(pl)
    L = numbers(upper_pl, mu)
    if not bool((mu >= 0).all()):
        raise ValueError(f"pl: the least is {float(mu.min())!r}; expected none below 0")
    if not bool((L > 0).all()):
        raise ValueError(f"upper_pl: the least is {float(L.min())!r}; expected positive numbers")
    eta = 1 / (2 * L) if lr is None else numbers(lr, mu)
    if not bool(((eta >= 0) & (eta * L <= 1)).all()):
        raise ValueError("lr: expected numbers between 0 and 1/L")
    return 1 - mu * eta * (1 - L * eta)


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
