r"""How far a Gram matrix of features can have moved, from how far the weights have.

For layers $F^m = \varphi(F^{m-1} W_m^\top)$ with $s = \sup |\varphi'|$, and with $\Delta_m$ a bound
of $\|F^m - F^m_0\|_F$,

$$
\Delta_m = s \left(\Delta_{m-1} (\|W_{m,0}\| + \|W_m - W_{m,0}\|_F)
    + \|F^{m-1}_0\|\, \|W_m - W_{m,0}\|_F \right), \qquad \Delta_0 = 0,
$$

$$
|\lambda_{\min}(G^m) - \lambda_{\min}(G^m_0)| \le \|G^m - G^m_0\|
    \le 2 \|F^m_0\| \Delta_m + \Delta_m^2 .
$$

Proof: $F W^\top - F_0 W_0^\top = (F - F_0) W^\top + F_0 (W - W_0)^\top$; and
$G - G_0 = (F - F_0) F^\top + F_0 (F - F_0)^\top$ with $\|F\| \le \|F_0\| + \Delta$.

This is how (4.11) of D. Balboni's thesis (SNS 2025) is used where the right hand side is "expanded
in terms of distance between weights" (section 4.4; appendix B.1.1). Everything but the distances is
known at initialisation.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["feature_perturbations", "gram_perturbation"]


def feature_perturbations(
    feature_norms: Sequence[float],
    weight_norms: Sequence[float],
    distances: Sequence[float],
    slope: float,
) -> list[float]:
    r"""Bounds $\Delta_m$ of $\|F^m - F^m_0\|_F$, layer by layer.

    Args:
        feature_norms: $\|F^{m-1}_0\|$, operator norms of what enters each layer at initialisation.
        weight_norms: $\|W_{m,0}\|$, operator norms of the initial weights.
        distances: $\|W_m - W_{m,0}\|_F$.
        slope: ``s``, of the activation.

    Returns:
        One bound a layer.

    Raises:
        ValueError: If the lengths differ or a number is negative.

    Examples:
        >>> feature_perturbations([3.0, 2.0], [1.0, 1.0], [0.1, 0.0], slope=1.0)
        [0.30000000000000004, 0.30000000000000004]
    """
    if not len(feature_norms) == len(weight_norms) == len(distances):
        raise ValueError(
            f"feature_norms, weight_norms, distances: lengths {len(feature_norms)}, "
            f"{len(weight_norms)}, {len(distances)}; expected one number a layer"
        )
    if min([slope, *feature_norms, *weight_norms, *distances]) < 0:
        raise ValueError("norms, distances and the slope: expected none below 0")
    found, change = [], 0.0
    for features, weight, distance in zip(feature_norms, weight_norms, distances, strict=True):
        change = slope * (change * (weight + distance) + features * distance)
        found.append(change)
    return found


def gram_perturbation(feature_norm: float, change: float) -> float:
    r"""A bound of $\|G - G_0\|$ where $\|F - F_0\| \le \Delta$: $2 \|F_0\| \Delta + \Delta^2$.

    Args:
        feature_norm: $\|F_0\|$, operator norm.
        change: $\Delta$.

    Raises:
        ValueError: If a number is negative.

    Examples:
        >>> gram_perturbation(1.0, 1.0)  # features that double: a Gram matrix four times as large
        3.0
    """
    if not (feature_norm >= 0 and change >= 0):
        raise ValueError(f"feature_norm={feature_norm!r}, change={change!r}: expected none below 0")
    return 2 * feature_norm * change + change * change
