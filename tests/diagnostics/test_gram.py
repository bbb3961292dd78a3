import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import symmetric
from torch import nn

from adler.diagnostics.gram import (
    conditioning,
    correlation,
    degradation_bound,
    eigenvalue_perturbation,
    gram,
)

examples = settings(deadline=None, max_examples=50, derandomize=True)
seeds = st.integers(0, 10**6)


# --- conditioning ---------------------------------------------------------------------------------


@examples
@given(n=st.integers(1, 7), d=st.integers(1, 9), seed=seeds)
def test_conditioning_agrees_with_the_singular_values_of_the_features(n, d, seed):
    generator = torch.Generator().manual_seed(seed)
    F = torch.randn(n, d, generator=generator, dtype=torch.float64)
    found = conditioning(F @ F.T)
    singular = torch.linalg.svdvals(F)
    assert found.largest == pytest.approx(float(singular[0] ** 2), rel=1e-12)
    if d < n:
        assert found.smallest == pytest.approx(0, abs=1e-13 * found.largest)
        assert found.log_condition == math.inf
    else:
        # eigenvalues are exact to rounding of the largest
        rounding = 1e-14 * found.largest
        assert found.smallest == pytest.approx(float(singular[-1] ** 2), abs=rounding)
        expected = 2 * math.log(float(singular[0] / singular[-1]))
        assert found.log_condition == pytest.approx(expected, abs=2 * rounding / found.smallest)


@examples
@given(n=st.integers(1, 7), seed=seeds)
def test_gershgorin_brackets_every_spectrum(n, seed):
    matrix = symmetric(n, seed)
    found = conditioning(matrix)
    rounding = 1e-12 * (1 + found.upper - found.lower)
    assert found.lower <= found.smallest + rounding
    assert found.largest <= found.upper + rounding
    rows = [[abs(float(matrix[i, j])) for j in range(n) if j != i] for i in range(n)]
    assert found.max_row_sum == pytest.approx(max(sum(row) for row in rows))
    assert found.max_off_diagonal == pytest.approx(max(max(row, default=0.0) for row in rows))
    assert found.min_diagonal == float(matrix.diagonal().min())


@pytest.mark.parametrize("n", [2, 3, 5])
def test_gershgorin_is_attained(n):
    ones, eye = torch.ones(n, n, dtype=torch.float64), torch.eye(n, dtype=torch.float64)
    above = conditioning(eye + 0.5 * (ones - eye))
    assert above.upper == pytest.approx(above.largest, rel=1e-12)
    below = conditioning(eye - 0.5 / (n - 1) * (ones - eye))
    assert below.lower == pytest.approx(below.smallest, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_means_to_the_precision_of_the_dtype(dtype):
    F = torch.randn(40, 7, generator=torch.Generator().manual_seed(0), dtype=dtype)
    assert conditioning(gram(F)).log_condition == math.inf
    scales = torch.logspace(0, -5, 7, dtype=dtype)
    resolved = conditioning(gram(torch.diag(scales))).log_condition
    if dtype == torch.float64:
        assert resolved == pytest.approx(10 * math.log(10), rel=1e-10)
    else:
        assert resolved == math.inf  # 1e-10 of the largest is beyond single precision


def test_conditioning_refuses_what_is_no_gram_matrix():
    for matrix, message in [
        (torch.ones(2, 3), r"gram: shape \(2, 3\); pass a square"),
        (torch.ones(0, 0), r"gram: shape \(0, 0\); pass a square"),
        (torch.tensor([[1.0, 2.0], [3.0, 1.0]]), "gram: differs from its transpose by up to 1"),
        (torch.tensor([[1.0, math.nan], [math.nan, 1.0]]), "gram: has entries that are not finite"),
        (torch.ones(2, 2, dtype=torch.int64), "gram: dtype torch.int64"),
    ]:
        for function in (conditioning, correlation):
            with pytest.raises(ValueError, match=message):
                function(matrix)


# --- correlation, change --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_correlation_is_the_cosine(dtype):
    F = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=dtype)
    F[4] = -1e-6 * F[0]  # opposite, and of another scale
    found = correlation(gram(F))
    expected = nn.functional.cosine_similarity(F[:, None].double(), F.double(), dim=-1, eps=1e-30)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps)
    assert found.diagonal().equal(torch.ones(5, dtype=dtype))
    assert float(found.abs().max()) == 1


def test_correlation_refuses_dead_features_and_impossible_angles():
    with pytest.raises(ValueError, match=r"entry \(1, 1\) is 0.0, so example 1 has no angle"):
        correlation(torch.diag(torch.tensor([1.0, 0.0])))
    with pytest.raises(ValueError, match="by a factor of 2"):
        correlation(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))


@examples
@given(n=st.integers(1, 6), seed=seeds, scale=st.floats(-3, 1).map(lambda e: 10**e))
def test_the_smallest_eigenvalue_degrades_no_more_than_the_norm_of_the_change(n, seed, scale):
    A = symmetric(n, seed)
    B = A + scale * symmetric(n, seed + 1)
    lower, upper = degradation_bound(A, B)
    smallest = float(torch.linalg.eigvalsh(B)[0])
    assert lower - 1e-12 <= smallest <= upper + 1e-12
    radius = float(torch.linalg.matrix_norm(A - B, ord=2))
    assert (upper - lower) / 2 == pytest.approx(radius, rel=1e-9)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_degradation_bound_is_attained_along_the_smallest_eigenvector(sign):
    A = symmetric(4, seed=3)
    values, vectors = torch.linalg.eigh(A)
    # upwards no further than to the next eigenvalue
    change = sign * 0.5 * float(values[1] - values[0])
    B = A + change * torch.outer(vectors[:, 0], vectors[:, 0])
    bounds = degradation_bound(A, B)
    smallest = float(torch.linalg.eigvalsh(B)[0])
    assert bounds[(1 + sign) // 2] == pytest.approx(smallest, abs=1e-12)
    assert abs(smallest - float(values[0])) > 0.9 * (bounds[1] - bounds[0]) / 2


@examples
@given(n=st.integers(1, 6), seed=seeds, scale=st.floats(-3, 1).map(lambda e: 10**e))
def test_no_eigenvalue_moves_further_than_either_norm(n, seed, scale):
    A = symmetric(n, seed)
    B = A + scale * symmetric(n, seed + 1)
    operator = eigenvalue_perturbation(A, B)
    frobenius = eigenvalue_perturbation(A, B, "frobenius")
    moved = (torch.linalg.eigvalsh(A) - torch.linalg.eigvalsh(B)).abs().max()
    assert float(moved) <= operator + 1e-12
    assert operator <= frobenius * (1 + 1e-12)
    assert frobenius == pytest.approx(float((A - B).norm()), rel=1e-12)
    assert degradation_bound(A, B, "frobenius")[1] - float(torch.linalg.eigvalsh(A)[0]) == (
        pytest.approx(frobenius, rel=1e-9, abs=1e-12)
    )


def test_the_norms_agree_on_a_change_of_rank_one_and_differ_on_the_identity():
    A = symmetric(4, seed=3)
    u = symmetric(4, seed=4)[0]
    one = A + torch.outer(u, u)
    assert eigenvalue_perturbation(A, one) == pytest.approx(float(u @ u), rel=1e-9)
    assert eigenvalue_perturbation(A, one, "frobenius") == pytest.approx(float(u @ u), rel=1e-9)
    shifted = A + 3 * torch.eye(4, dtype=A.dtype)
    assert eigenvalue_perturbation(A, shifted) == pytest.approx(3.0)  # attained by all eigenvalues
    assert eigenvalue_perturbation(A, shifted, "frobenius") == pytest.approx(6.0)
    with pytest.raises(ValueError, match="norm='nuclear'"):
        eigenvalue_perturbation(A, shifted, "nuclear")


def test_degradation_bound_refuses_different_shapes():
    with pytest.raises(ValueError, match=r"after: shape \(3, 3\) differs .* \(2, 2\)"):
        degradation_bound(torch.eye(2), torch.eye(3))
    with pytest.raises(ValueError, match="before: differs from its transpose"):
        degradation_bound(torch.tensor([[1.0, 1.0], [0.0, 1.0]]), torch.eye(2))


def test_features_without_a_gram_matrix_are_refused():
    with pytest.raises(TypeError, match=r"features: dtype torch.int64"):
        gram(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="features: a 0-dim tensor"):
        gram(torch.tensor(1.0))
