"""The tangent kernel against a dense Jacobian, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import CRITERIA, NETWORKS, Square, batches, network
from support.loops import unchanged
from support.reference import Dense, jacobian_of
from torch import nn

from adler.curvature import Objective, TangentKernel
from adler.diagnostics.ggn import ggn_largest_eigenvalue


class Residual(nn.Module):
    """A linear layer that is called twice, and a tied one."""

    def __init__(self):
        super().__init__()
        self.twice, self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.alone = nn.Linear(4, 3, bias=False)

    def forward(self, x):
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        return self.alone(self.second(torch.tanh(self.first(x))))


class Mixing(nn.Module):
    """Examples see each other, and no module says so."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x):
        y = self.inner(x)
        return torch.tanh(y - y.mean(0))


def dropout():
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))


def in_place():
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))


OTHERS = {"residual": Residual, "mixing": Mixing, "dropout": dropout, "in place": in_place}
# Those whose kernel cannot be had layer by layer.
COLUMNS = ["batchnorm", "mixing"]


def setting(name):
    if name in NETWORKS:
        model = network(name)
        ((x, _),) = batches(name, CRITERIA["ce-mean"](), 1)
        return model, x
    torch.manual_seed(0)
    return OTHERS[name]().double(), torch.randn(6, 4, dtype=torch.float64)


every_network = pytest.mark.parametrize("name", [*NETWORKS, *OTHERS])


@every_network
def test_the_kernel_is_the_jacobian_times_its_transpose(name):
    model, x = setting(name)
    J = jacobian_of(model, x)
    if name not in ("batchnorm", "dropout"):  # whose forward has effects
        dense = Dense(model, nn.MSELoss())
        torch.testing.assert_close(J, dense.jacobian(dense.flat(), x), rtol=1e-10, atol=1e-12)
    model, x = setting(name)  # the same generator, the same buffers
    with unchanged(model):
        kernel = TangentKernel(model, x)
        K = kernel.to_dense()
        v = torch.randn(18, 2, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
        products = kernel.matvec(v)
        layers = kernel.layers()
    close = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(K, J @ J.T, **close)
    torch.testing.assert_close(products, K @ v, **close)
    torch.testing.assert_close(kernel.matvec(v[:, 0]), products[:, 0], **close)
    torch.testing.assert_close(sum(layers.values()), K, **close)
    assert K.equal(K.T)
    assert not K.requires_grad
    assert kernel.shape == (18, 18)


@every_network
def test_layers_are_the_kernels_of_their_own_parameters(name):
    model, x = setting(name)
    modules = dict(model.named_modules())
    for layer, part in TangentKernel(model, x).layers().items():
        own = list(modules[layer].parameters(recurse=False))
        if name == "residual" and layer == "second":
            own = [modules[layer].bias]  # the weight goes by its first name
        alone = TangentKernel(setting(name)[0] and model, x, own)
        torch.testing.assert_close(part, alone.to_dense(), rtol=1e-9, atol=1e-11)
        assert torch.linalg.eigvalsh(part)[0] > -1e-10


@every_network
def test_the_fast_way_is_taken_where_examples_are_independent(name, monkeypatch):
    model, x = setting(name)
    taken = []
    columns = TangentKernel._columns
    monkeypatch.setattr(
        TangentKernel, "_columns", lambda self, i: taken.append(name) or columns(self, i)
    )
    TangentKernel(model, x).to_dense()
    assert bool(taken) == (name in COLUMNS)


@pytest.mark.parametrize("name", ["mlp-tanh", "batchnorm", "transformer"])
def test_every_method_finds_the_same_ends(name):
    model, x = setting(name)
    kernel = TangentKernel(model, x)
    exact = torch.linalg.eigvalsh(jacobian_of(model, x) @ jacobian_of(model, x).T)
    torch.testing.assert_close(kernel.eigenvalues(), exact, rtol=1e-8, atol=1e-10)
    for method in ("auto", "dense", "lanczos", "power"):
        assert kernel.largest_eigenvalue(method) == pytest.approx(float(exact[-1]), rel=1e-6)
    for method in ("auto", "dense", "lanczos"):
        assert kernel.smallest_eigenvalue(method) == pytest.approx(float(exact[0]), abs=1e-9)
    assert kernel.condition_number() == pytest.approx(float(exact[-1] / exact[0]), rel=1e-6)


@given(seed=st.integers(0, 10**6), name=st.sampled_from([*NETWORKS, *OTHERS]))
@settings(deadline=None, max_examples=20)
def test_products_are_linear_and_symmetric(seed, name):
    model, x = setting(name)
    kernel = TangentKernel(model, x)
    generator = torch.Generator().manual_seed(seed)
    u, v = torch.randn(2, 18, generator=generator, dtype=x.dtype)
    Ku, Kv = kernel.matvec(u), kernel.matvec(v)
    torch.testing.assert_close(kernel.matvec(2 * u - 3 * v), 2 * Ku - 3 * Kv)
    torch.testing.assert_close(u @ Kv, v @ Ku)
    assert v @ Kv >= -1e-10


def test_power_iteration_starts_warm():
    model, x = setting("mlp-tanh")
    cold = TangentKernel(model, x).power_iteration(tolerance=1e-8)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.001)
    warm = TangentKernel(model, x).power_iteration(cold.vector, tolerance=1e-2)
    assert warm.iterations == 1 < cold.iterations
    exact = TangentKernel(model, x).largest_eigenvalue("dense")
    assert float(warm.value) == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("scipy", [True, False])
def test_the_cheapest_way_is_chosen(scipy, monkeypatch):
    monkeypatch.setattr("adler.curvature.kernel.has_scipy", lambda: scipy)
    for name, way in (("mlp-tanh", "dense"), ("batchnorm", "lanczos" if scipy else "dense")):
        model, x = setting(name)
        kernel = TangentKernel(model, x)
        assert kernel._choose("auto") == way
        exact = float(torch.linalg.eigvalsh(jacobian_of(model, x) @ jacobian_of(model, x).T)[-1])
        assert kernel.largest_eigenvalue() == pytest.approx(exact, rel=1e-6)


@pytest.mark.long
def test_large_kernels_are_never_made_dense():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(600, 6)
    kernel = TangentKernel(model, x, max_bytes=2**20)
    assert kernel.shape == (1200, 1200)
    with pytest.raises(ValueError, match=r"1200 outputs needs 0.011 GiB.*method='lanczos'"):
        kernel.to_dense()
    with pytest.raises(ValueError, match="max_bytes"):
        kernel.layers()
    J = jacobian_of(model, x)
    exact = float(torch.linalg.eigvalsh((J.T @ J).double())[-1])
    assert kernel.largest_eigenvalue() == pytest.approx(exact, rel=1e-4)  # float32
    assert kernel.gershgorin(columns=5).upper > 0


def test_little_memory_gives_the_same_kernel():
    for name in ("cnn", "mlp-tanh", "transformer"):
        model, x = setting(name)
        whole, parts = TangentKernel(model, x), TangentKernel(model, x, max_bytes=18 * 18 * 8)
        torch.testing.assert_close(whole.to_dense(), parts.to_dense(), rtol=1e-9, atol=1e-11)


def test_gershgorin_brackets_the_spectrum_and_samples_lie_within():
    model, x = setting("mlp-tanh")
    kernel = TangentKernel(model, x)
    exact, bounds = kernel.eigenvalues(), kernel.gershgorin()
    assert bounds.lower <= exact[0]
    assert exact[-1] <= bounds.upper
    sample = kernel.gershgorin(columns=7)
    assert bounds.lower - 1e-9 <= sample.lower <= sample.upper <= bounds.upper + 1e-9
    assert sample != bounds
    assert kernel.gershgorin(columns=18) == pytest.approx(bounds)


def test_ops_without_forward_mode_are_transposed_twice():
    class Squared(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, x):
            return Square.apply(self.inner(x))

    torch.manual_seed(0)
    model, x = Squared().double(), torch.randn(6, 4, dtype=torch.float64)
    J = jacobian_of(model, x)
    torch.testing.assert_close(TangentKernel(model, x).to_dense(), J @ J.T)


def test_frozen_parameters_several_inputs_and_output_fn():
    class Bilinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(4, 2)

        def forward(self, x, *, y):
            return {"out": self.a(x) * self.b(y)}

    torch.manual_seed(0)
    model = Bilinear().double()
    model.b.requires_grad_(False)
    x, y = torch.randn(5, 3).double(), torch.randn(5, 4).double()
    kernel = TangentKernel(model, {"x": x, "y": y}, output_fn=lambda out: out["out"])
    assert list(kernel.layers()) == ["a"]
    # J of a: b(y) times (x, 1), output by output.
    expected = torch.einsum("ic,jc,ij->icj", model.b(y), model.b(y), x @ x.T + 1)
    found = kernel.to_dense().view(5, 2, 5, 2)
    for c in range(2):
        torch.testing.assert_close(found[:, c, :, c], expected[:, c])
        assert found[:, c, :, 1 - c].abs().max() == 0


def test_bad_input_is_named():
    model, x = setting("mlp-tanh")
    kernel = TangentKernel(model, x)
    with pytest.raises(ValueError, match=r"v: shape \(3,\); expected \(18,\)"):
        kernel.matvec(torch.ones(3))
    with pytest.raises(ValueError, match="method='fast'"):
        kernel.largest_eigenvalue("fast")
    with pytest.raises(ValueError, match="columns=19: expected 1 to 18"):
        kernel.gershgorin(columns=19)
    with pytest.raises(ValueError, match="params: no parameter"):
        TangentKernel(nn.Tanh(), x)
    with pytest.raises(ValueError, match=r"\(0, 3\): none at all"):
        TangentKernel(model, x[:0])
    with pytest.raises(ValueError, match="outputs are not finite"):
        TangentKernel(model, math.inf * x)
    with torch.no_grad():
        model[0].bias[0] = math.nan
    with pytest.raises(ValueError, match=r"'0.bias' is not finite"):
        TangentKernel(model, x)


@pytest.mark.parametrize("scipy", [True, False])
@pytest.mark.parametrize("criterion_name", CRITERIA)
@pytest.mark.parametrize("name", ["mlp-tanh", "batchnorm"])
def test_the_largest_eigenvalue_of_the_ggn(name, criterion_name, scipy, monkeypatch):
    if not scipy:
        monkeypatch.setattr("adler.diagnostics.ggn.has_scipy", lambda: False)
    model, criterion = network(name), CRITERIA[criterion_name]()
    ((x, y),) = batches(name, criterion, 1)
    dense = Dense(model, criterion)
    theta = dense.flat()
    J, Q = dense.jacobian(theta, x), dense.loss_hessian(theta, x, y)
    exact = float(torch.linalg.eigvalsh(J.T @ Q @ J)[-1])
    with unchanged(model):
        found = ggn_largest_eigenvalue(Objective(model, x, y, criterion), tolerance=1e-8)
    assert found == pytest.approx(exact, rel=1e-6)
