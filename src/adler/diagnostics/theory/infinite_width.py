r"""What a network of infinite width does to the angles between examples.

One layer takes a correlation to its dual (`adler.diagnostics.theory.duals`). Iterated, the dual
gives the Gram matrices of a deep network (`iterated_gram`), and bounds their smallest
eigenvalues from below (`eigenvalue_lower_bound`).

Source: N. Agarwal, P. Awasthi, S. Kale, arXiv 2002.01523 (how depth improves the conditioning of
Gram matrices).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from adler.diagnostics.gram import conditioning, correlation
from adler.diagnostics.theory.activations import Activation
from adler.diagnostics.theory.duals import DualActivation, dual_activation

__all__ = [
    "CorrelationChange",
    "eigenvalue_lower_bound",
    "iterated_gram",
    "largest_correlation_change",
    "maximal_distortion",
]


# --- Gram matrices over depth ---------------------------------------------------------------------


def iterated_gram(gram: Tensor, activation: Activation | DualActivation, depth: int) -> Tensor:
    r"""Gram matrices of the features of an infinitely wide network, layer by layer.

    $$
    G^0 = G, \qquad G^{m+1} = \hat\varphi(G^m) / \hat\varphi(1) \quad \text{entrywise}.
    $$

    It is the limit of $\langle f^m(x_i), f^m(x_j) \rangle$ for layers $f^{m+1} = \varphi(W f^m)
    / \sqrt{d\, \hat\varphi(1)}$ of width $d \to \infty$ without bias, entries of $W$ independent
    and standard normal: the variance that keeps the norm of the features at 1.

    Args:
        gram: Gram matrix of normalised inputs, shape ``(n, n)``, with ones on the diagonal.
        activation: See `dual_activation`.
        depth: Number of layers, not negative.

    Returns:
        ``(depth + 1, n, n)``, from ``gram`` itself to that of the last layer; dtype and device of
        ``gram``.

    Raises:
        ValueError: If ``gram`` is no Gram matrix or its diagonal is not 1; if ``depth`` is
            negative; or see `dual_activation`.
        TypeError: See `dual_activation`.

    Examples:
        >>> grams = iterated_gram(torch.tensor([[1.0, -0.5], [-0.5, 1.0]]), torch.relu, depth=3)
        >>> grams[:, 0, 1]
        tensor([-0.5000,  0.1090,  0.3747,  0.5283])
    """
    dual = dual_activation(activation)
    _require_depth(depth)
    grams = [_unit_gram(gram)]
    dual.shares()  # refuses an activation that is zero
    one = float(dual(1.0))
    for _ in range(depth):
        after = dual(grams[-1]) / one
        grams.append(after + torch.diag_embed(1 - after.diagonal()))
    return torch.stack(grams)


def eigenvalue_lower_bound(
    gram: Tensor,
    activation: Activation | DualActivation,
    depth: int,
    *,
    method: Literal["combined", "lemma-24"] = "combined",
) -> Tensor:
    r"""A lower bound of the smallest eigenvalue of every iterated Gram matrix.

    ``"lemma-24"`` is Lemma 24 of D. Balboni's thesis (appendix B.1.3) from layer to layer: for a
    matrix $H \succeq \delta I$ with ones on its diagonal and a function $f$ whose power series has
    no negative coefficient, $f[H] \succeq (f(1) - f(1 - \delta)) I$. With $\lambda_0 =
    \lambda_{\min}(G^0)$,

    $$
    \lambda_{m+1} = \frac{\hat\varphi(1) - \hat\varphi(1 - \lambda_m)}{\hat\varphi(1)}
        = \sum_{k \ge 1} c_k \left(1 - (1 - \lambda_m)^k\right), \qquad
    c_k = a_k^2 / \hat\varphi(1) .
    $$

    ``"combined"`` takes for each power the larger one of this and of Gershgorin's bound, with
    $r_0 = \max_{i \ne j} |G^0_{ij}|$, and is never below it:

    $$
    \lambda_{m+1} = \sum_{k \ge 1} c_k \max\left(1 - (1 - \lambda_m)^k,\ 1 - (n - 1) r_m^k\right),
    \qquad r_{m+1} = \hat\varphi(r_m) / \hat\varphi(1) .
    $$

    Proof. $G^{m+1} = \sum_k c_k (G^m)^{\circ k}$ with entrywise powers. Write $G^m = \lambda I + (1
    - \lambda) H'$ with $\lambda = \lambda_m$: $H'$ is positive semi-definite with ones on its
    diagonal, and off the diagonal $(G^m)^{\circ k} = (1 - \lambda)^k H'^{\circ k}$, so that
    $(G^m)^{\circ k} = (1 - (1 - \lambda)^k) I + (1 - \lambda)^k H'^{\circ k}$, whose last term is
    positive semi-definite by Schur's product theorem. Gershgorin's theorem gives the other bound,
    as no entry off the diagonal exceeds $r_m$ in modulus: the $c_k$ are not negative, so
    $|\hat\varphi(\rho)| \le \hat\varphi(|\rho|)$. The power $k = 0$ is the matrix of ones: its
    smallest eigenvalue is 0 for $n \ge 2$, and a mean $a_0 \ne 0$ is share lost (see
    `normalised_activation`). Both bounds grow with $k$, so the sum beyond the last coefficient
    known is at least its total share times the bound there. Two examples with $\rho \ge 0$ attain
    both.

    Args:
        gram: See `iterated_gram`.
        activation: See `dual_activation`.
        depth: Number of layers, not negative.
        method: ``"combined"`` or ``"lemma-24"``.

    Returns:
        ``(depth + 1,)``, not negative; dtype and device of ``gram``. The computation is in float64.

    Raises:
        ValueError: See `iterated_gram`; or if ``gram`` has a negative eigenvalue, or the method is
            another.
        TypeError: See `dual_activation`.

    Examples:
        >>> from adler.diagnostics.theory.activations import normalised_activation
        >>> gram = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
        >>> eigenvalue_lower_bound(gram, normalised_activation(torch.relu), depth=3)
        tensor([0.5000, 0.5736, 0.6441, 0.7091])
    """
    if method not in ("combined", "lemma-24"):
        raise ValueError(f"method={method!r}: expected 'combined' or 'lemma-24'")
    dual = dual_activation(activation)
    _require_depth(depth)
    shares, tail = dual.shares()
    unit = _unit_gram(gram)
    found, n, one = conditioning(unit), len(unit), dual(1.0)
    if found.smallest < -(torch.finfo(unit.dtype).eps ** 0.5) * n:
        raise ValueError(
            f"gram: has the negative eigenvalue {found.smallest:.3g}, so it is no Gram matrix"
        )
    constant = float(shares[0]) if n == 1 else 0.0
    weights = torch.cat([shares[1:], shares.new_tensor([tail])])
    powers = torch.arange(1, len(weights) + 1, dtype=torch.float64)
    bounds, r = [min(1.0, max(0.0, found.smallest))], found.max_off_diagonal
    for _ in range(depth):
        of_powers = 1 - (1 - bounds[-1]) ** powers
        if method == "combined":
            of_powers = torch.maximum(of_powers, 1 - (n - 1) * r**powers)
        bounds.append(min(1.0, constant + float(weights @ of_powers)))
        r = dual(min(1.0, r)) / one
    return torch.tensor(bounds, dtype=gram.dtype, device=gram.device)


# --- distortion -----------------------------------------------------------------------------------


class CorrelationChange(NamedTuple):
    """Where, and how far, one layer moves a correlation most.

    Attributes:
        correlation: ``ρ`` before the layer.
        value: ``|ρ' - ρ|``, with ``ρ'`` the correlation after it.
    """

    correlation: float
    value: float


def maximal_distortion(activation: Activation | DualActivation, delta: float) -> float:
    r"""The distortion of a dual activation at level $\delta$.

    $$
    M_\delta = \sup \{\hat\varphi(\rho) : |\rho| \le 1 - \delta\} = \hat\varphi(1 - \delta),
    $$

    since the power series of $\hat\varphi$ has no negative coefficient. For a normalised
    activation, $\hat\varphi(1) = 1$, it is how large a correlation of at most $1 - \delta$ in
    modulus can be after one layer of infinite width.

    Args:
        activation: See `dual_activation`.
        delta: ``δ``, in [0, 1].

    Raises:
        ValueError: See `dual_activation`; or if ``delta`` is out of range.
        TypeError: See `dual_activation`.

    Source:
        Definition 15 of D. Balboni, PhD thesis, SNS 2025, appendix B.1.3; N. Agarwal, P. Awasthi,
        S. Kale, arXiv 2002.01523.

    Examples:
        >>> from adler.diagnostics.theory.activations import normalised_activation
        >>> relu = normalised_activation(torch.relu)
        >>> [round(maximal_distortion(relu, delta), 3) for delta in (0.1, 0.5, 0.9)]
        [0.867, 0.426, 0.076]
    """
    if not 0 <= delta <= 1:
        raise ValueError(f"delta={delta!r}: expected a number between 0 and 1")
    return float(dual_activation(activation)(1.0 - delta))


def largest_correlation_change(activation: Activation | DualActivation) -> CorrelationChange:
    r"""The largest change of a correlation by one layer of infinite width.

    $$
    \max_{\rho \in [-1, 1]} \left| \frac{\hat\varphi(\rho)}{\hat\varphi(1)} - \rho \right| .
    $$

    Args:
        activation: See `dual_activation`.

    Returns:
        The maximum and where it is attained: of several maxima, the one of the largest ``ρ``.

    Raises:
        ValueError: See `dual_activation`; or if the activation is zero.
        TypeError: See `dual_activation`.

    Examples:
        >>> largest_correlation_change(torch.relu)
        CorrelationChange(correlation=-1.0, value=1.0)
    """
    dual = dual_activation(activation)
    dual.shares()
    one = dual(1.0)
    low, high = 0.0, math.pi
    for _ in range(3):  # each time on the two cells around the best of 257 angles
        angles = torch.linspace(low, high, 257, dtype=torch.float64)
        rho = angles.cos()
        moved = (dual(rho) / one - rho).abs()
        # Rounding must not choose between equal maxima.
        best = int((moved >= moved.max() - 1e-14).nonzero()[0])
        low, high = float(angles[max(best - 1, 0)]), float(angles[min(best + 1, 256)])
    return CorrelationChange(float(rho[best]), float(moved[best]))


# --- helpers --------------------------------------------------------------------------------------


def _require_depth(depth: int) -> None:
    if not isinstance(depth, int) or isinstance(depth, bool) or depth < 0:
        raise ValueError(f"depth={depth!r}: expected a whole number of at least 0")


def _unit_gram(gram: Tensor) -> Tensor:
    """The Gram matrix with a diagonal of exactly 1, which it must have up to rounding."""
    unit = correlation(gram)
    off = float((gram.diagonal() - 1).abs().max())
    if off > torch.finfo(gram.dtype).eps ** 0.5:
        raise ValueError(
            f"gram: its diagonal differs from 1 by up to {off:.3g}: normalise the inputs, or pass "
            "correlation(gram)"
        )
    return unit
