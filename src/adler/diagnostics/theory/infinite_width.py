r"""What a network of infinite width does to the angles between examples.

One layer takes a correlation to its dual (`adler.diagnostics.theory.duals`). Iterated, the dual
gives the Gram matrices of a deep network (`iterated_gram`), and bounds their smallest
eigenvalues from below (`eigenvalue_lower_bound`).

Source: N. Agarwal, P. Awasthi, S. Kale, arXiv 2002.01523 (how depth improves the conditioning of
Gram matrices).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from adler.diagnostics.gram import conditioning, correlation
from adler.diagnostics.theory.activations import Activation
from adler.diagnostics.theory.duals import DualActivation, dual_activation

__all__ = ["Distortion", "eigenvalue_lower_bound", "iterated_gram", "maximal_distortion"]


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
    gram: Tensor, activation: Activation | DualActivation, depth: int
) -> Tensor:
    r"""A lower bound of the smallest eigenvalue of every iterated Gram matrix.

    In the role of Lemma 24 of D. Balboni's thesis. With $c_k = a_k^2 / \hat\varphi(1)$,
    $\lambda_0 = \lambda_{\min}(G^0)$ and $r_0 = \max_{i \ne j} |G^0_{ij}|$,

    $$
    \lambda_{m+1} = \sum_{k \ge 1} c_k \max(\lambda_m, 1 - (n - 1) r_m^k), \qquad
    r_{m+1} = \hat\varphi(r_m) / \hat\varphi(1) .
    $$

    Proof. $G^{m+1} = \sum_k c_k (G^m)^{\circ k}$ with entrywise powers. For positive semi-definite
    $A$ and $B$, $(A - \lambda_{\min}(A) I) \circ B$ is positive semi-definite by Schur's product
    theorem, so $\lambda_{\min}(A \circ B) \ge \lambda_{\min}(A) \min_i B_{ii}$; with $A = G^m$ and
    $B = (G^m)^{\circ (k-1)}$, whose diagonal is 1, $\lambda_{\min}((G^m)^{\circ k}) \ge
    \lambda_{\min}(G^m)$. Gershgorin's theorem gives the other bound, as no entry off the diagonal
    exceeds $r_m$ in modulus: the $c_k$ are not negative, so $|\hat\varphi(\rho)| \le
    \hat\varphi(|\rho|)$. The power $k = 0$ is the matrix of ones: its smallest eigenvalue is 0 for
    $n \ge 2$, and a mean $a_0 \ne 0$ is share lost (see `normalised_activation`). Both bounds grow
    with $k$, so the sum beyond the last coefficient known is at least its total share times the
    bound there. Two examples with $\rho \ge 0$ attain the bound.

    Args:
        gram: See `iterated_gram`.
        activation: See `dual_activation`.
        depth: Number of layers, not negative.

    Returns:
        ``(depth + 1,)``, not negative; dtype and device of ``gram``. The computation is in float64.

    Raises:
        ValueError: See `iterated_gram`; or if ``gram`` has a negative eigenvalue.
        TypeError: See `dual_activation`.

    Examples:
        >>> from adler.diagnostics.theory.activations import normalised_activation
        >>> gram = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
        >>> eigenvalue_lower_bound(gram, normalised_activation(torch.relu), depth=3)
        tensor([0.5000, 0.5736, 0.6441, 0.7091])
    """
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
    bounds, r = [max(0.0, found.smallest)], found.max_off_diagonal
    for _ in range(depth):
        gershgorin = 1 - (n - 1) * r**powers
        bounds.append(constant + float(weights @ gershgorin.clamp(min=bounds[-1])))
        r = dual(min(1.0, r)) / one
    return torch.tensor(bounds, dtype=gram.dtype, device=gram.device)


# --- distortion -----------------------------------------------------------------------------------


class Distortion(NamedTuple):
    """Where, and how far, one layer moves a correlation most.

    Attributes:
        correlation: ``ρ`` before the layer.
        value: ``|ρ' - ρ|``, with ``ρ'`` the correlation after it.
    """

    correlation: float
    value: float


def maximal_distortion(activation: Activation | DualActivation) -> Distortion:
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
        >>> maximal_distortion(torch.relu)
        Distortion(correlation=-1.0, value=1.0)
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
    return Distortion(float(rho[best]), float(moved[best]))


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
