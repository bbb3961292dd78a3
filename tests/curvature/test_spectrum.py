import math
import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.cases import symmetric

from adler.curvature.spectrum import gershgorin, lanczos, power_iteration

sizes, seeds = st.integers(1, 60), st.integers(0, 10**6)
few = settings(deadline=None, max_examples=25)


@given(n=sizes, seed=seeds)
@example(n=47, seed=219)  # of modulus 8.594 and 8.606, of either sign
@few
def test_lanczos_finds_both_ends(n, seed):
    A = symmetric(n, seed)
    exact, k = torch.linalg.eigvalsh(A), min(2, n)

    def ends(which):
        return lanczos(lambda v: A @ v, n, dtype=A.dtype, which=which, k=k)

    close = {"rtol": 1e-8, "atol": 1e-8}
    torch.testing.assert_close(ends("LA"), exact[n - k :], **close)
    torch.testing.assert_close(ends("SA"), exact[:k], **close)
    largest = exact[exact.abs().argsort(descending=True)[:k]].sort().values
    torch.testing.assert_close(ends("LM"), largest, **close)
    if k == 2:
        torch.testing.assert_close(ends("BE"), exact[[0, -1]], **close)


@given(n=sizes, seed=seeds)
@few
def test_power_iteration_is_within_its_residual_of_an_eigenvalue(n, seed):
    A = symmetric(n, seed, positive=True)
    start = torch.randn(n, generator=torch.Generator().manual_seed(1), dtype=A.dtype)
    exact = torch.linalg.eigvalsh(A)
    for iterations in (1, 3, 300):
        found = power_iteration(lambda v: A @ v, start, iterations=iterations, tolerance=1e-4)
        assert (exact - found.value).abs().min() <= found.residual + 1e-12
        assert found.value <= exact[-1] + 1e-12
        assert float(torch.linalg.vector_norm(found.vector)) == pytest.approx(1.0)
        assert found.iterations <= iterations


def test_power_iteration_stops_when_it_has_arrived_and_starts_warm():
    A = torch.diag(torch.tensor([1.0, 2.0, 10.0], dtype=torch.float64))
    cold = power_iteration(lambda v: A @ v, torch.ones(3, dtype=A.dtype))
    assert float(cold.value) == pytest.approx(10.0, rel=1e-9)
    assert 1 < cold.iterations < 20
    warm = power_iteration(lambda v: 1.01 * A @ v, cold.vector, tolerance=1e-5)
    assert warm.iterations == 1
    assert float(warm.value) == pytest.approx(10.1, rel=1e-9)
    zero = power_iteration(torch.zeros_like, torch.ones(3))
    assert (float(zero.value), zero.iterations) == (0.0, 1)


@given(n=sizes, seed=seeds)
@few
def test_gershgorin_brackets_the_spectrum_and_columns_lie_within(n, seed):
    A = symmetric(n, seed)
    exact, bounds = torch.linalg.eigvalsh(A), gershgorin(A)
    assert bounds.lower <= float(exact[0]) + 1e-9
    assert bounds.upper >= float(exact[-1]) - 1e-9
    columns = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: n // 2 + 1]
    part = gershgorin(A[:, columns], columns)
    assert bounds.lower - 1e-9 <= part.lower
    assert part.upper <= bounds.upper + 1e-9


def test_gershgorin_is_exact_where_the_discs_are():
    assert gershgorin(torch.diag(torch.tensor([3.0, -2.0]))) == (-2.0, 3.0)
    ones = torch.ones(5, 5)
    assert gershgorin(ones).upper == float(torch.linalg.eigvalsh(ones)[-1].round()) == 5.0


def test_bad_input_is_named(monkeypatch):
    with pytest.raises(ValueError, match="iterations=0"):
        power_iteration(torch.clone, torch.ones(2), iterations=0)
    for start in (torch.zeros(2), torch.tensor([math.nan, 1.0])):
        with pytest.raises(ValueError, match="start: its norm is"):
            power_iteration(torch.clone, start)
    with pytest.raises(ValueError, match="k=3: expected 1 to 2"):
        lanczos(torch.clone, 2, dtype=torch.float64, k=3)
    with pytest.raises(ValueError, match=r"matrix: shape \(2, 3\)"):
        gershgorin(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"columns: shape \(2,\)"):
        gershgorin(torch.ones(2, 3), torch.tensor([0, 1]))
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    with pytest.raises(ImportError, match=r"torch-adler\[diagnostics\]"):
        lanczos(torch.clone, 50, dtype=torch.float64)


def test_lanczos_that_does_not_converge_says_what_to_do(monkeypatch):
    from scipy.sparse import linalg

    def hopeless(*_, **__):
        raise linalg.ArpackNoConvergence("no", torch.zeros(1).numpy(), torch.zeros(1).numpy())

    monkeypatch.setattr(linalg, "eigsh", hopeless)
    with pytest.raises(RuntimeError, match=r"1 of 2 eigenvalues .* raise tolerance="):
        lanczos(torch.clone, 50, dtype=torch.float64, k=2)
