"""The tangent kernel in a ball about initialisation: the bound holds, and less would not."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import draw

from adler.diagnostics.theory.ball import conditioned_radius, kernel_bound_in_ball

examples = settings(deadline=None, max_examples=50, derandomize=True)


def norm(matrix):
    return float(torch.linalg.matrix_norm(matrix, ord=2))


@examples
@given(seed=st.integers(0, 10**6), n=st.integers(1, 4), radius=st.floats(0.0, 0.5))
def test_no_kernel_in_the_ball_is_worse(seed, n, radius):
    # F_i(θ) = a_i·θ + ½ θᵀ B_i θ: the Jacobian is A + (B_i θ)_i, the Hessians constant.
    A, B = draw(n, 6, seed=seed), draw(n, 6, 6, seed=seed + 1)
    B = (B + B.transpose(1, 2)) / 2
    H = max(norm(b) for b in B)
    L = (
        norm(A)
        + radius * float(torch.stack([torch.tensor(norm(b)) for b in B]).square().sum()) ** 0.5
    )
    smallest = max(0.0, float(torch.linalg.eigvalsh(A @ A.T)[0]))
    bound = kernel_bound_in_ball(smallest, L, H, n, radius)
    for i in range(5):
        step = draw(6, seed=seed + 2 + i)
        J = A + B @ (radius * step / step.norm())
        assert float(torch.linalg.eigvalsh(J @ J.T)[0]) >= bound - 1e-12
    if bound >= 0:
        assert conditioned_radius(smallest, bound, L, H, n) == pytest.approx(radius, abs=1e-9)


def test_a_single_parabola_attains_it_to_first_order():
    # F = θ + ½ H θ²: K = (1 + H θ)², least at θ = -R.
    H, R = 0.3, 1e-4
    drop = 1 - (1 - H * R) ** 2
    allowed = 1 - kernel_bound_in_ball(1.0, 1 + H * R, H, 1, R)
    assert 0.999 * allowed < drop <= allowed


def test_equal_turns_attain_the_root_of_the_number():
    # n outputs whose gradients all turn the same way: ‖J - J₀‖ = √n H R, in the direction of all.
    n, H, R = 9, 0.2, 1e-5
    u = torch.ones(n, dtype=torch.float64) / math.sqrt(n)
    J = torch.cat([torch.eye(n, dtype=torch.float64), torch.zeros(n, 1, dtype=torch.float64)], 1)
    moved = J.clone()
    moved[:, :n] -= H * R * math.sqrt(n) * torch.outer(u, u)  # each row by H R in norm
    assert float((moved - J).norm(dim=1).max()) == pytest.approx(H * R)
    drop = 1 - float(torch.linalg.eigvalsh(moved @ moved.T)[0])
    allowed = 1 - kernel_bound_in_ball(1.0, 1.0, H, n, R)
    assert drop == pytest.approx(allowed, rel=1e-4)


def test_linear_networks_and_bad_input():
    assert conditioned_radius(1.0, 0.5, 1.0, 0.0, 4) == math.inf
    with pytest.raises(ValueError, match=r"pl=2.0: expected a number from 0 to 1.0"):
        conditioned_radius(1.0, 2.0, 1.0, 1.0, 4)
    with pytest.raises(ValueError, match=r"radius=-1"):
        kernel_bound_in_ball(1.0, 1.0, 1.0, 1, -1)
    with pytest.raises(ValueError, match=r"hessian_norm=-1.0"):
        kernel_bound_in_ball(1.0, 1.0, -1.0, 1, 1.0)
    with pytest.raises(ValueError, match="outputs=0"):
        kernel_bound_in_ball(1.0, 1.0, 1.0, 0, 1.0)
