r"""How far from its start a network keeps a well-conditioned tangent kernel.

If $\lambda_{\min}(K(\theta_0)) = \lambda_0$, and in the ball of radius $R$ about $\theta_0$ the
Jacobian has $\|J\| \le L_F$ and every output's Hessian $\|\nabla^2 F_i\| \le H$, then throughout
the ball

$$
\lambda_{\min}(K(\theta)) \ge \lambda_0 - 2 L_F \sqrt{n}\, H R ,
$$

with ``n`` outputs in all. Proof: $\|J(\theta) - J(\theta_0)\| \le \sqrt n \max_i \|\nabla
F_i(\theta) - \nabla F_i(\theta_0)\| \le \sqrt n H R$ and $K - K_0 = (J - J_0) J^\top + J_0 (J -
J_0)^\top$. The half sum of squares of the residuals is then $\mu$-PL* there for every $\mu$ up to
that bound.

Source: C. Liu, L. Zhu, M. Belkin, *Loss landscapes and optimization in over-parameterized
non-linear systems and neural networks*, arXiv 2003.00307.
"""

from __future__ import annotations

import math

__all__ = ["conditioned_radius", "kernel_bound_in_ball"]


def kernel_bound_in_ball(
    smallest_eigenvalue: float,
    lipschitz: float,
    hessian_norm: float,
    outputs: int,
    radius: float,
) -> float:
    r"""A lower bound of $\lambda_{\min}(K)$ throughout a ball; 0 or less says nothing.

    Args:
        smallest_eigenvalue: $\lambda_0$, at the centre.
        lipschitz: $L_F$, of the outputs of the whole batch, in the ball; such as the ``lipschitz``
            of `adler.diagnostics.theory.smoothness.network_bounds`.
        hessian_norm: ``H``, of each output, in the ball; at its centre
            `adler.diagnostics.hessian.output_hessian_norm`.
        outputs: ``n``, examples times outputs.
        radius: ``R``.

    Raises:
        ValueError: If a number is negative or there is no output.

    Examples:
        >>> kernel_bound_in_ball(4.0, lipschitz=2.0, hessian_norm=0.1, outputs=25, radius=1.0)
        2.0
    """
    _check(smallest_eigenvalue, lipschitz, hessian_norm, outputs)
    if not radius >= 0:
        raise ValueError(f"radius={radius!r}: expected a number of at least 0")
    return smallest_eigenvalue - 2 * lipschitz * math.sqrt(outputs) * hessian_norm * radius


def conditioned_radius(
    smallest_eigenvalue: float, pl: float, lipschitz: float, hessian_norm: float, outputs: int
) -> float:
    r"""The largest radius at which `kernel_bound_in_ball` is ``μ``.

    $$
    R = \frac{\lambda_0 - \mu}{2 L_F \sqrt{n}\, H} ,
    $$

    infinite where the network is linear in its parameters. With ``lipschitz`` and ``hessian_norm``
    from a larger ball, the result holds up to that one's radius.

    Args:
        smallest_eigenvalue: See `kernel_bound_in_ball`.
        pl: ``μ``, not negative, at most $\lambda_0$.
        lipschitz: See `kernel_bound_in_ball`.
        hessian_norm: See `kernel_bound_in_ball`.
        outputs: See `kernel_bound_in_ball`.

    Raises:
        ValueError: As `kernel_bound_in_ball`; or if ``pl`` is out of range.

    Examples:
        >>> conditioned_radius(4.0, 2.0, lipschitz=2.0, hessian_norm=0.1, outputs=25)
        1.0
    """
    _check(smallest_eigenvalue, lipschitz, hessian_norm, outputs)
    if not 0 <= pl <= smallest_eigenvalue:
        raise ValueError(f"pl={pl!r}: expected a number from 0 to {smallest_eigenvalue!r}")
    slope = 2 * lipschitz * math.sqrt(outputs) * hessian_norm
    return (smallest_eigenvalue - pl) / slope if slope > 0 else math.inf


def _check(smallest: float, lipschitz: float, hessian_norm: float, outputs: int) -> None:
    for name, value in (
        ("smallest_eigenvalue", smallest),
        ("lipschitz", lipschitz),
        ("hessian_norm", hessian_norm),
    ):
        if not value >= 0:
            raise ValueError(f"{name}={value!r}: expected a number of at least 0")
    if outputs < 1:
        raise ValueError(f"outputs={outputs!r}: expected at least 1")
