"""Newton-Schulz iterations against the polynomial of the singular values, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adler._optimizers.orthogonal import COEFFICIENTS, ITERATIONS, orthogonalized


def by_singular_values(tensor):
    left, values, right = torch.linalg.svd(tensor.flatten(1), full_matrices=False)
    a, b, c = COEFFICIENTS
    values = values / tensor.norm()
    for _ in range(ITERATIONS):
        values = a * values + b * values**3 + c * values**5
    return (left * values @ right).view_as(tensor)


SHAPES = [(3, 5), (5, 3), (4, 4), (1, 6), (6, 1), (4, 2, 3, 3), (20, 2, 3)]


@given(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=6), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_matrices_of_any_shapes_together_are_as_by_their_singular_values(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator).double() for shape in shapes]
    for tensor, found in zip(tensors, orthogonalized(tensors), strict=True):
        torch.testing.assert_close(found, by_singular_values(tensor), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("power", [-30, -3, 0, 3, 30])
def test_it_heeds_the_direction_alone(power):
    matrix = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    (found,), (scaled,) = orthogonalized([matrix]), orthogonalized([matrix * 10.0**power])
    torch.testing.assert_close(scaled, found, rtol=1e-3, atol=1e-4)


def test_singular_values_come_near_one():
    matrix = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    (found,) = orthogonalized([matrix])
    values = torch.linalg.svdvals(found)
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.3


def test_zeros_stay_and_what_is_not_finite_shows():
    zeros, broken = torch.zeros(3, 4), torch.ones(3, 4)
    broken[1, 2] = float("inf")
    still, bad = orthogonalized([zeros, broken])
    assert not still.any()
    assert not torch.isfinite(bad).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_comes_back_is_new_and_of_the_same_kind(dtype):
    tensor = torch.randn(4, 2, 3, 3).to(dtype)
    before = tensor.clone()
    (found,) = orthogonalized([tensor])
    assert (found.dtype, found.shape) == (dtype, tensor.shape)
    assert tensor.equal(before)
    assert found.data_ptr() != tensor.data_ptr()


def test_nothing_of_nothing():
    assert orthogonalized([]) == []
