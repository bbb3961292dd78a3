r"""The weak Polyak-Łojasiewicz condition, which convex losses have, and cross-entropy.

A function is *weakly* $\mu$-PL (Definition 13 of the thesis) if for some minimiser $\theta^*$

$$
\|\nabla h(\theta)\|\, \|\theta - \theta^*\| \ge \sqrt{\mu}\, (h(\theta) - h^*) .
$$

Every convex function is, with $\mu = 1$. Then $h - h^*$ falls like $1/k$ under gradient descent,
not geometrically (`weak_predicted_decrease`).

Source: D. Csiba, P. Richtárik, *Global convergence of arbitrary-block gradient methods for
generalized Polyak-Łojasiewicz functions*, 2017; D. Balboni, PhD thesis, SNS 2025, appendix B.1.2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adler.diagnostics.polyak import Gradients, squared_norm
from adler.diagnostics.scalars import Numbers, excess, numbers, scalar
from adler.losses.base import wide

__all__ = [
    "cross_entropy_gradient_bound",
    "cross_entropy_gradient_constant",
    "distance_estimate",
    "proxy_pl_coefficient",
    "weak_pl_coefficient",
    "weak_predicted_decrease",
]


def weak_pl_coefficient(
    loss: float | Tensor,
    gradients: Gradients,
    distance: float | Tensor,
    optimum: float | Tensor = 0.0,
) -> Tensor:
    r"""The largest $\mu$ for which the weak PL inequality holds at one point.

    $$
    \mu(\theta) = \left(\frac{\|\nabla h(\theta)\|\, \|\theta - \theta^*\|}
        {h(\theta) - h^*}\right)^2 ;
    $$

    infinite at the optimum, at least 1 for a convex function.

    Args:
        loss: ``h``.
        gradients: See `adler.diagnostics.polyak.pl_coefficient`.
        distance: $\|\theta - \theta^*\|$, not negative.
        optimum: ``h*``.

    Returns:
        0-dim, float32 or wider.

    Raises:
        ValueError: As `adler.diagnostics.polyak.pl_coefficient`; or if the distance is negative.

    Source:
        Definition 13 of D. Balboni, PhD thesis, SNS 2025, appendix B.1.2.

    Examples:
        >>> float(weak_pl_coefficient(4.0, torch.tensor([4.0]), 2.0))  # θ² at 2
        4.0
    """
    squared = squared_norm(gradients)
    gap = excess("loss", loss, optimum, squared)
    away = scalar("distance", distance, squared)
    if away < 0:
        raise ValueError(f"distance={float(away)!r}: expected a number of at least 0")
    return torch.where(gap == 0, torch.full_like(gap, math.inf), squared * (away / gap).square())


def proxy_pl_coefficient(
    gradients: Gradients,
    proxy: float | Tensor,
    offset: float | Tensor = 0.0,
    exponent: float = 2.0,
) -> Tensor:
    r"""The largest $\mu$ for which the proxy-PL inequality holds at one point.

    $$
    \|\nabla h(\theta)\|^\alpha \ge \mu\, (g(\theta) - \xi) ,
    $$

    with another function ``g``, the proxy, that one wants small. With $g = h$, $\xi = h^*$ and
    $\alpha = 2$ it is twice `adler.diagnostics.polyak.pl_coefficient`: there is no ½ here.

    Args:
        gradients: Of ``h``; see `adler.diagnostics.polyak.pl_coefficient`.
        proxy: ``g`` at the point.
        offset: ``ξ``, at most the proxy.
        exponent: ``α``, positive.

    Returns:
        0-dim, float32 or wider; infinite where the proxy is its offset.

    Raises:
        ValueError: If the proxy is below the offset, or the exponent is not positive.

    Source:
        S. Frei, Q. Gu, *Proxy convexity: a unified framework for the analysis of neural networks
        trained by gradient descent*, NeurIPS 2021.

    Examples:
        >>> float(proxy_pl_coefficient(torch.tensor([3.0, 4.0]), proxy=10.0, exponent=1.0))
        0.5
    """
    if not exponent > 0:
        raise ValueError(f"exponent={exponent!r}: expected a positive number")
    squared = squared_norm(gradients)
    gap = excess("proxy", proxy, offset, squared)
    power = squared ** (exponent / 2)
    return torch.where(gap == 0, torch.full_like(gap, math.inf), power / gap)


def distance_estimate(gap: Numbers, lipschitz: Numbers) -> Tensor:
    r"""The thesis's estimate of the distance to a minimiser, $2 (h - h^*) / G$.

    The distance at which a function of constant slope ``G`` would reach $h^*$, doubled, which makes
    it exact for $\|\theta\|^2$. Where ``G`` bounds the slope on the way to the minimiser, half of
    the estimate is a lower bound of the distance; the estimate itself is none.

    Args:
        gap: $h - h^*$, not negative; numbers or tensors, elementwise.
        lipschitz: ``G``, positive.

    Raises:
        ValueError: If an argument is out of range.

    Source:
        D. Balboni, PhD thesis, SNS 2025, section 6.3, on cross-entropy.

    Examples:
        >>> float(distance_estimate(4.0, 4.0))  # θ² at 2
        2.0
    """
    xi = numbers(gap)
    G = numbers(lipschitz, xi)
    if not bool((xi >= 0).all()):
        raise ValueError(f"gap: the least is {float(xi.min())!r}; expected none below 0")
    if not bool((G > 0).all()):
        raise ValueError(f"lipschitz: the least is {float(G.min())!r}; expected positive numbers")
    return 2 * xi / G


def weak_predicted_decrease(
    gap: Numbers, smoothness: Numbers, distance: Numbers, pl: Numbers = 1.0
) -> Tensor:
    r"""The factor by which $h - h^*$ shrinks at least in a step of rate $1/L$.

    $$
    1 - \frac{\mu\, (h_k - h^*)}{2 L \|\theta_k - \theta^*\|^2} .
    $$

    Proof: $h_{k+1} \le h_k - \|\nabla h_k\|^2 / 2L$, and the weak PL inequality bounds the
    gradient. It is attained by $\tfrac12 L \theta^2$, whose weak coefficient is 4. With the weak
    coefficient of the point itself it is the factor $1 - \mu(\theta_k)/L$ of
    `adler.diagnostics.descent.predicted_decrease`. With $\mu = 1$ and `distance_estimate` it is $1
    - G^2 / (8 L (h_k - h^*))$, and with $G = \|\nabla h_k\|$ in that, $1 - \mu(\theta_k) / 4L$.

    Args:
        gap: $h_k - h^*$, not negative; numbers or tensors, elementwise.
        smoothness: ``L``, positive.
        distance: $\|\theta_k - \theta^*\|$, positive.
        pl: The weak coefficient ``μ``, not negative. Default: that of convex functions.

    Raises:
        ValueError: If an argument is out of range.

    Source:
        Lemma 22 of D. Balboni, PhD thesis, SNS 2025, appendix B.1.2.

    Examples:
        >>> float(weak_predicted_decrease(4.0, 2.0, 2.0, pl=4.0))  # θ² from 2 to 0
        0.0
        >>> float(weak_predicted_decrease(4.0, 2.0, 2.0))
        0.75
    """
    xi = numbers(gap)
    L, away, mu = (numbers(value, xi) for value in (smoothness, distance, pl))
    for name, values in (("gap", xi), ("pl", mu)):
        if not bool((values >= 0).all()):
            raise ValueError(f"{name}: the least is {float(values.min())!r}; expected none below 0")
    for name, values in (("smoothness", L), ("distance", away)):
        if not bool((values > 0).all()):
            raise ValueError(
                f"{name}: the least is {float(values.min())!r}; expected positive numbers"
            )
    return 1 - mu * xi / (2 * L * away.square())


# --- what cross-entropy has ----------------------------------------------------------------------


def cross_entropy_gradient_bound(losses: Tensor, classes: int, reduction: str = "mean") -> Tensor:
    r"""A lower bound of $\|\nabla L\|^2$ for cross-entropy, from the examples' losses.

    $$
    \|\nabla L\|^2 \ge \frac{C}{C - 1} \sum_i \omega^2 (1 - e^{-\ell_i})^2 ,
    $$

    with $\omega = 1/b$ for the mean, 1 for the sum. Per example the gradient is $p - e_y$ with
    $p_y = e^{-\ell}$. Its entry at ``y`` has modulus $1 - p_y$, the others sum to as much, so by
    Cauchy-Schwarz their squares sum to at least $(1 - p_y)^2 / (C - 1)$; equality where they agree.

    The gradient vanishes as the loss does, only faster: no PL inequality, but this one. Then
    $\|\nabla h\|^2 \ge \lambda_{\min}(K) \|\nabla L\|^2$. As $\nabla L$ has mean zero over the
    classes of each example, the smallest eigenvalue of ``K`` on such vectors is enough.

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
        >>> # p = ½: the gradient is (-½, ½)
        >>> bound = cross_entropy_gradient_bound(torch.tensor([2.0]).log(), classes=2)
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


def cross_entropy_gradient_constant(largest_loss: float, classes: int, examples: int) -> float:
    r"""The constant $\omega$ of $\|\nabla L\|^2 \ge \omega L^2$ for cross-entropy.

    While no example's loss exceeds ``M``,

    $$
    \omega = \frac1b\, \frac{C}{C - 1} \left(\frac{1 - e^{-M}}{M}\right)^2 ,
    $$

    for the mean and for the sum alike: $1 - e^{-\ell}$ is concave, so at least $\ell\,(1 -
    e^{-M})/M$ on $[0, M]$, and $\sum_i \ell_i^2 \ge (\sum_i \ell_i)^2 / b$; the rest is
    `cross_entropy_gradient_bound`. Equality where all examples have loss ``M`` and equal wrong
    probabilities.

    It plays the part of $\mu / \|F - F^*\|^2$ in Definition 13, which cross-entropy's minimisers,
    at infinity, leave without meaning. Under it the loss falls like $1/k$, not geometrically: with
    rate $1/L$, a step has $h_{k+1} \le h_k - \omega \lambda_{\min}(K)\, h_k^2 / (2L)$.

    Args:
        largest_loss: ``M``, not negative.
        classes: ``C``, at least 2.
        examples: ``b``, at least 1.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> cross_entropy_gradient_constant(0.0, classes=2, examples=4)
        0.5
    """
    if not 0 <= largest_loss < math.inf:
        raise ValueError(f"largest_loss={largest_loss!r}: expected a finite number, at least 0")
    if examples < 1:
        raise ValueError(f"examples={examples!r}: expected at least 1")
    chord = -math.expm1(-largest_loss) / largest_loss if largest_loss > 0 else 1.0
    return _simplex(classes) * chord**2 / examples


# --- helpers -------------------------------------------------------------------------------------


def _simplex(classes: int) -> float:
    if classes < 2:
        raise ValueError(f"classes={classes!r}: expected at least 2")
    return classes / (classes - 1)
