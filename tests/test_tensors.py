import math

import pytest
import torch
from support.loops import NoSynchronisation

from adler._tensors import (
    decay_,
    descend_,
    descend_each_,
    dot,
    lengths,
    lerp_,
    shifted,
    squared_norm,
    squared_norm_and_lengths,
    stacked,
)

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def mixed(seed=0, dtypes=DTYPES):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 4), (5,), (), (2, 1, 3)]
    return [torch.randn(s, generator=generator).to(t) for t in dtypes for s in shapes]


def test_squared_norm_of_mixed_dtypes():
    tensors = mixed()
    expected = sum(float(t.double().square().sum()) for t in tensors)
    assert float(squared_norm(tensors)) == pytest.approx(expected, rel=1e-6)
    assert squared_norm(tensors).dtype == torch.float64


def test_squared_norm_is_exact_in_float64():
    tensors = mixed(dtypes=[torch.float64])
    expected = math.fsum(float(x) ** 2 for t in tensors for x in t.flatten())
    assert float(squared_norm(tensors)) == pytest.approx(expected, rel=1e-14)


def test_squared_norm_of_half_precision_does_not_overflow():
    assert float(squared_norm([torch.full((4,), 6e4, dtype=torch.float16)])) == pytest.approx(
        1.44e10, rel=1e-2
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_squared_norm_shows_bad_entries(bad):
    tensors = mixed(dtypes=[torch.float32])
    tensors[0][1, 2] = bad
    assert not math.isfinite(float(squared_norm(tensors)))


@pytest.mark.parametrize("dtypes", [[t] for t in DTYPES] + [DTYPES], ids=str)
@pytest.mark.parametrize("on_host", [True, False])
def test_dot_is_the_sum_of_products_of_either_sign(on_host, dtypes, monkeypatch):
    if not on_host:  # there the products are summed by their absolute values
        monkeypatch.setattr("adler._tensors._HOST_DEVICES", ())
    a, b = mixed(0, dtypes), mixed(1, dtypes)
    products = [x * y for s, t in zip(a, b) for x, y in zip(s.double().flatten(), t.flatten())]
    assert min(products) < 0 < max(products)
    exact, size = math.fsum(products), math.fsum(map(abs, products))
    rounding = max(1e-6 * (torch.float64 not in dtypes or len(dtypes) > 1), 1e-14)
    assert float(dot(a, b)) == pytest.approx(exact, abs=rounding * size)
    assert dot(a, b).dtype == torch.float64


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("small", [0, 20, 1000])
def test_dot_is_the_same_however_many_tensors_are_small(small, order, monkeypatch):
    monkeypatch.setattr("adler._tensors._SMALL", small)
    torch.manual_seed(0)
    shapes = [(), (7,), (3, 7), (2, 3, 2, 2), (2, 3, 5, 5)]
    a, b = ([torch.randn(shape, dtype=torch.float64) for shape in shapes] for _ in range(2))
    a = [t.contiguous(memory_format=order) if t.dim() == 4 else t for t in a]
    exact = math.fsum(float(x * y) for s, t in zip(a, b) for x, y in zip(s.flatten(), t.flatten()))
    assert float(dot(a, b)) == pytest.approx(exact, rel=1e-13)


@pytest.mark.parametrize("dtypes", [DTYPES, [torch.float64]], ids=["mixed", "float64"])
def test_shifted_tensors_are_new_and_that_far_away(dtypes):
    params, directions = mixed(0, dtypes), mixed(1, dtypes)
    before = [p.clone() for p in params]
    found = shifted(params, directions, torch.tensor(0.3, dtype=torch.float64))
    assert all(p.equal(b) for p, b in zip(params, before))
    for f, p, d in zip(found, params, directions):
        rounding = 4 * torch.finfo(p.dtype).eps
        expected = p.double() + 0.3 * d.double()
        assert f.dtype == p.dtype
        torch.testing.assert_close(f.double(), expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("dtypes", [[t] for t in DTYPES] + [DTYPES], ids=str)
def test_one_look_finds_the_squared_norm_and_the_norm_of_each(dtypes):
    tensors = mixed(0, dtypes)
    squared, norms = squared_norm_and_lengths(tensors)
    assert float(squared) == float(squared_norm(tensors))
    assert all(n.equal(m) for n, m in zip(norms, lengths(tensors)))
    for t, norm in zip(tensors, norms):
        rel = 1e-14 if t.dtype == torch.float64 else 1e-6
        assert float(norm) == pytest.approx(float(t.double().norm()), rel=rel)


@pytest.mark.parametrize("dtypes", [DTYPES, [torch.float32]], ids=["mixed", "float32"])
def test_scalars_of_several_dtypes_are_stacked_in_order(dtypes):
    scalars = [torch.tensor(1.5 * k, dtype=dtype) for k, dtype in enumerate(dtypes)]
    found = stacked(scalars, torch.zeros((), dtype=torch.float64))
    assert found.dtype == torch.float64
    assert found.tolist() == [1.5 * k for k in range(len(dtypes))]


@pytest.mark.parametrize("dtype", DTYPES)
def test_descend_subtracts_the_scaled_direction(dtype):
    params, directions = mixed(0, [dtype]), mixed(1, [dtype])
    expected = [p.double() - 0.3 * d.double() for p, d in zip(params, directions)]
    untouched = [d.clone() for d in directions]
    descend_(params, directions, torch.tensor(0.3, dtype=torch.float64), torch.tensor(False))
    rounding = 4 * torch.finfo(dtype).eps  # of entries of size one, and their cancellation
    for p, e in zip(params, expected):
        torch.testing.assert_close(p.double(), e, rtol=rounding, atol=rounding)
    assert all(d.equal(u) for d, u in zip(directions, untouched))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("on_host", [True, False])
def test_averages_move_by_the_weight_or_not_at_all(dtype, on_host, monkeypatch):
    if not on_host:
        monkeypatch.setattr("adler._tensors._HOST_DEVICES", ())
    averages = mixed(0, [dtype])
    exact = [m.double().clone() for m in averages]
    for t in (1, 2, 3):
        values = mixed(t, [dtype])
        before = [m.clone() for m in averages]
        lerp_(averages, [x * math.nan for x in values], 0.2, torch.tensor(True))
        assert all(m.equal(b) for m, b in zip(averages, before))
        lerp_(averages, values, 0.2, torch.tensor(False))
        exact = [0.8 * m + 0.2 * x.double() for m, x in zip(exact, values)]
    rounding = 16 * torch.finfo(dtype).eps  # three steps of entries of size one
    for found, expected in zip(averages, exact):
        torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("equal", [True, False])
def test_each_tensor_has_a_rate_of_its_own_unless_all_are_equal(dtype, equal):
    params, directions = mixed(0, [dtype]), mixed(1, [dtype])
    own = torch.linspace(0.1, 0.7, len(params), dtype=torch.float64)
    rates = own[:1] if equal else own
    before = [p.clone() for p in params]
    bad = [d * math.nan for d in directions]
    descend_each_(params, bad, rates, torch.tensor(True), equal)
    assert all(p.equal(b) for p, b in zip(params, before))
    descend_each_(params, directions, rates, torch.tensor(False), equal)
    expected = [
        p.double() - rate * d.double()
        for p, d, rate in zip(before, directions, own[:1].expand(len(own)) if equal else own)
    ]
    rounding = 4 * torch.finfo(dtype).eps  # of entries of size one, and their cancellation
    for found, e in zip(params, expected):
        torch.testing.assert_close(found.double(), e, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("dtype", DTYPES)
def test_descend_with_skip_leaves_every_bit(dtype):
    params = mixed(0, [dtype])
    before = [p.clone() for p in params]
    directions = [torch.full_like(p, math.nan) for p in params]
    descend_(params, directions, torch.tensor(0.3, dtype=torch.float64), torch.tensor(True))
    assert all(p.equal(b) for p, b in zip(params, before))


DEVICES = {"fused": ("cpu",), "plain": ()}


@pytest.mark.parametrize("fused_devices", DEVICES.values(), ids=DEVICES)
def test_other_devices_kernels_equal_the_hosts(monkeypatch, fused_devices):
    host, other = mixed(0), mixed(0)
    rate = torch.tensor(0.3, dtype=torch.float64)
    descend_(host, mixed(1), rate, torch.tensor(False))
    monkeypatch.setattr("adler._tensors._HOST_DEVICES", ())
    monkeypatch.setattr("adler._tensors._FUSED_DEVICES", fused_devices)
    descend_(other, mixed(1), rate, torch.tensor(False))
    for a, b in zip(host, other):
        rounding = 4 * torch.finfo(a.dtype).eps  # of entries of size one, and their cancellation
        torch.testing.assert_close(a, b, rtol=rounding, atol=rounding)
    before = [p.clone() for p in other]
    descend_(other, [p * math.nan for p in other], rate, torch.tensor(True))
    assert all(p.equal(b) for p, b in zip(other, before))


def test_decay_shrinks_and_never_flips_a_sign():
    (param,) = mixed(0, [torch.float32])[:1]
    start = param.clone()
    decay_([param], torch.tensor(0.25, dtype=torch.float64))
    torch.testing.assert_close(param, 0.75 * start)
    decay_([param], torch.tensor(7.0, dtype=torch.float64))
    assert param.abs().max() == 0


def test_nothing_waits_for_the_device():
    params, directions = mixed(0), mixed(1)
    with NoSynchronisation():
        size = squared_norm(directions)
        stacked(squared_norm_and_lengths(directions)[1], size)
        decay_(params, size * 1e-3)
        dot(params, directions)
        shifted(params, directions, size)
        lerp_(params, directions, 0.1, size > 1)
        descend_(params, directions, size, size > 1)
