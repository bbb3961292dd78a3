import math

import pytest
import torch
from support.loops import NoSynchronisation

from adler._tensors import decay_, descend_, momentum_, squared_norm, squared_norm_and_reach

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


def reach(params, directions):
    return squared_norm_and_reach(params, directions)[1]


@pytest.mark.parametrize("dtypes", [DTYPES, [torch.float64]], ids=["mixed", "float64"])
def test_one_look_finds_the_same_squared_norm(dtypes):
    params, directions = mixed(0, dtypes), mixed(1, dtypes)
    found, _ = squared_norm_and_reach(params, directions)
    assert float(found) == float(squared_norm(directions))


@pytest.mark.parametrize("dtype", DTYPES)
def test_reach_is_the_least_ratio_of_norms_over_matrices(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (5,), (2, 1, 3)]
    params = [3 * torch.randn(s, generator=generator).to(dtype) for s in shapes]
    directions = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
    directions[1] *= 1000  # a vector: does not count
    ratios = [float(p.double().norm() / d.double().norm()) for p, d in zip(params, directions)]
    assert float(reach(params, directions)) == pytest.approx(min(ratios[0], ratios[2]), rel=1e-3)


def test_reach_lets_weights_leave_zero():
    linear = torch.nn.Linear(50, 300)  # PyTorch's default initialisation is at the floor
    direction = torch.randn(300, 50)
    default = float(reach([linear.weight.detach()], [direction]))
    from_zero = float(reach([torch.zeros(300, 50)], [direction]))
    assert from_zero == pytest.approx(default, rel=0.02)


def test_reach_without_matrices_is_infinite():
    assert float(reach([torch.ones(3)], [torch.ones(3)])) == math.inf


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
def test_momentum_steps_along_the_corrected_average(dtype):
    params, rate = mixed(0, [dtype]), torch.tensor(0.3, dtype=torch.float64)
    averages = [torch.zeros_like(p) for p in params]
    steps = [torch.zeros(()) for _ in params]
    exact, means = (
        [p.double().clone() for p in params],
        [torch.zeros_like(p).double() for p in params],
    )
    for t in (1, 2, 3):
        gradients = mixed(t, [dtype])
        bad = [g * math.nan for g in gradients]
        momentum_(params, bad, averages, steps, rate, torch.tensor(True), momentum=0.8)
        momentum_(params, gradients, averages, steps, rate, torch.tensor(False), momentum=0.8)
        means = [0.8 * m + 0.2 * g.double() for m, g in zip(means, gradients)]
        exact = [p - 0.3 * m / (1 - 0.8**t) for p, m in zip(exact, means)]
    assert all(float(count) == 3 for count in steps)
    # Three steps of entries of size one; a mean's rounding is divided by 1 - 0.8.
    rounding = 16 * torch.finfo(dtype).eps
    for found, expected in zip([*params, *averages], [*exact, *means]):
        torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=rounding)


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
        squared_norm_and_reach(params, directions)
        decay_(params, size * 1e-3)
        descend_(params, directions, size, size > 1)
