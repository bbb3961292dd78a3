"""The Hessian along a direction and its two parts, against dense second derivatives."""

import math

import pytest
import torch
from support.cases import CRITERIA, NETWORKS, drawn_direction, problem
from support.loops import unchanged
from support.reference import Dense
from torch import nn
from torch.autograd.functional import hessian
from torch.nn.attention import SDPBackend, sdpa_kernel

from adler._recording.replay import is_replaying
from adler.curvature import Objective
from adler.diagnostics.hessian import HessianSplit, hessian_split, output_hessian_norm
from adler.losses import EmpiricalFisher


@pytest.fixture(autouse=True)
def _attention_that_can_be_differentiated_twice():
    # For the dense references; the library sees to it itself.
    with sdpa_kernel(SDPBackend.MATH):
        yield


def setting(name, criterion_name="ce-mean", seed=0):
    model, criterion, x, y = problem(name, criterion_name, seed)
    return model, criterion, x, y, drawn_direction(model)


def flatten(direction):
    return torch.cat([d.flatten() for d in direction.values()])


def dense_hessian(model, criterion, x, y):
    dense = Dense(model, criterion)
    return hessian(lambda theta: criterion(dense.outputs(theta, x), y), dense.flat())


@pytest.mark.parametrize("criterion_name", CRITERIA)
@pytest.mark.parametrize("name", NETWORKS)
def test_both_parts_equal_the_dense_ones(name, criterion_name):
    model, criterion, x, y, direction = setting(name, criterion_name)
    dense, d = Dense(model, criterion), flatten(direction)
    v = dense.jacobian(dense.flat(), x) @ d
    total = float(d @ dense_hessian(model, criterion, x, y) @ d)
    kept = float(v @ dense.loss_hessian(dense.flat(), x, y) @ v)
    for _ in range(2):  # twice: no hidden state
        with unchanged(model):
            split = hessian_split(Objective(model, x, y, criterion), direction)
        assert float(split.gauss_newton) == pytest.approx(kept, rel=1e-9)
        assert float(split.total) == pytest.approx(total, rel=1e-9)
        assert float(split.residual) == pytest.approx(total - kept, rel=1e-9, abs=1e-9 * kept)
        assert all(part.ndim == 0 and not part.requires_grad for part in split)


@pytest.mark.parametrize("criterion_name", CRITERIA)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_product_equals_the_dense_hessian(name, criterion_name):
    model, criterion, x, y, direction = setting(name, criterion_name)
    expected = dense_hessian(model, criterion, x, y) @ flatten(direction)
    h = Objective(model, x, y, criterion)
    for _ in range(2):
        with unchanged(model):
            product = h.hessian(direction)
        assert {n: p.shape for n, p in product.items()} == {
            n: d.shape for n, d in direction.items()
        }
        torch.testing.assert_close(flatten(product), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["mlp-tanh", "cnn", "batchnorm", "transformer"])
def test_the_split_is_the_second_difference_of_the_loss(name):
    model, criterion, x, y, direction = setting(name)
    dense, d = Dense(model, criterion), flatten(direction)
    theta, step = dense.flat(), 1e-4
    ahead, here, behind = (criterion(dense.outputs(theta + s * step * d, x), y) for s in (1, 0, -1))
    split = hessian_split(Objective(model, x, y, criterion), direction)
    # Error step² of the difference, and eps/step² of rounding: both 1e-8 or so.
    found = float((ahead - 2 * here + behind) / step**2)
    assert float(split.total) == pytest.approx(found, rel=1e-5)


@pytest.mark.parametrize("criterion_name", CRITERIA)
def test_a_linear_model_has_no_residual(criterion_name):
    model, criterion, x, y, direction = setting("linear", criterion_name)
    split = hessian_split(Objective(model, x, y, criterion), direction)
    assert abs(float(split.residual)) < 1e-12 * float(split.gauss_newton)
    assert float(split.trust) == pytest.approx(1)
    # The whole Hessian is the GGN, too.
    h = Objective(model, x, y, criterion)
    torch.testing.assert_close(h.hessian(direction), h.ggn(direction))


def test_a_fitted_batch_has_no_residual():
    model, criterion, x, y, direction = setting("mlp-tanh", "mse-mean")
    fitted = model(x).detach()
    along = list(direction.values())
    split = hessian_split(Objective(model, x, fitted, criterion), along)
    assert abs(float(split.residual)) < 1e-12 * float(split.gauss_newton)
    unfitted = hessian_split(Objective(model, x, y, criterion), along)
    assert abs(float(unfitted.residual)) > 1e-3 * float(unfitted.gauss_newton)


def test_a_relu_network_keeps_the_products_of_weights():
    # F = w₂ relu(w₁ x): D²F[d, d] = 2 d₁ d₂ x where w₁ x > 0.
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
    model.double()
    with torch.no_grad():
        model[0].weight.fill_(2.0)
        model[2].weight.fill_(3.0)
    x, y = torch.tensor([[5.0]], dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    d = [torch.full((1, 1), 0.1, dtype=torch.float64), torch.full((1, 1), 0.2, dtype=torch.float64)]
    split = hessian_split(Objective(model, x, y, nn.MSELoss()), d)
    v = 5 * (0.1 * 3 + 2 * 0.2)
    assert float(split.gauss_newton) == pytest.approx(2 * v**2)
    assert float(split.residual) == pytest.approx(2 * 30 * 2 * 0.1 * 0.2 * 5)


def test_trust():
    def trust(kept, dropped):
        kept, dropped = torch.tensor(kept), torch.tensor(dropped)
        return float(HessianSplit(kept, dropped, kept + dropped).trust)

    assert trust(3.0, 0.0) == 1
    assert trust(0.0, 0.0) == 1
    assert trust(3.0, -1.0) == trust(3.0, 1.0) == 0.75
    assert trust(0.0, 2.0) == 0


# --- losses whose GGN is not their Hessian --------------------------------------------------------


def test_log_probabilities_split_as_their_logits():
    model, criterion, x, y, direction = setting("mlp-tanh")
    logits = hessian_split(Objective(model, x, y, criterion), direction)
    twin = nn.Sequential(model, nn.LogSoftmax(1))
    found = hessian_split(Objective(twin, x, y, nn.NLLLoss()), direction.values())
    for a, b in zip(found, logits):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_total_does_not_depend_on_what_stands_in_for_the_loss_hessian():
    model, criterion, x, y, direction = setting("mlp-tanh")
    a, b = (
        hessian_split(Objective(model, x, y, c), direction)
        for c in (criterion, EmpiricalFisher(criterion))
    )
    torch.testing.assert_close(a.total, b.total)
    assert float(a.gauss_newton) != pytest.approx(float(b.gauss_newton), rel=0.01)


# --- calls ----------------------------------------------------------------------------------------


def test_parameters_left_out_are_constants():
    model, criterion, x, y, direction = setting("mlp-tanh")
    part = {"2.weight": direction["2.weight"]}
    params = dict(model.named_parameters())
    zeros = {**{n: torch.zeros_like(d) for n, d in direction.items()}, **part}
    a = hessian_split(Objective(model, x, y, criterion, {n: params[n] for n in part}), part)
    b = hessian_split(Objective(model, x, y, criterion), zeros)
    torch.testing.assert_close(a, b)


def test_dropout_draws_one_mask_for_every_derivative():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 20), nn.Tanh(), nn.Dropout(0.5), nn.Linear(20, 3)).double()
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.randint(3, (5,))
    direction = [torch.randn_like(p) for p in model.parameters()]
    state = torch.get_rng_state()
    # One forward draws what the next replay draws.
    loss = nn.functional.cross_entropy(model(x), y)
    params = list(model.parameters())
    slopes = torch.autograd.grad(loss, params, create_graph=True)
    slope = sum((g * d).sum() for g, d in zip(slopes, direction))
    expected = torch.autograd.grad(slope, params)
    torch.set_rng_state(state)
    h = Objective(model, x, y, nn.CrossEntropyLoss())
    with unchanged(model):
        split, product = hessian_split(h, direction), h.hessian(direction)
    total = float(sum((e * d).sum() for e, d in zip(expected, direction)))
    assert float(split.total) == pytest.approx(total, rel=1e-10)
    torch.testing.assert_close(list(product.values()), list(expected))


def test_constant_outputs_are_refused():
    model, x = nn.Linear(3, 2).double(), torch.randn(4, 3, dtype=torch.float64)
    y = torch.zeros(4, 2).double()
    h = Objective(model, x, y, nn.MSELoss(), output_fn=torch.detach)
    for measure in (hessian_split, Objective.hessian, Objective.ggn):
        with pytest.raises(RuntimeError, match="depend on"):
            measure(h, h.params)
    with pytest.raises(RuntimeError, match="depend on"):
        h.gradient()


def test_a_context_without_gradients_changes_nothing():
    model, criterion, x, y, direction = setting("mlp-tanh")
    h = Objective(model, x, y, criterion)
    split, product, slope = hessian_split(h, direction), h.hessian(direction), h.gradient()
    norm = output_hessian_norm(model, x)
    with torch.no_grad():
        torch.testing.assert_close(hessian_split(h, direction), split)
        torch.testing.assert_close(h.hessian(direction), product)
        torch.testing.assert_close(h.gradient(), slope)
        assert output_hessian_norm(model, x) == norm


def test_an_output_fn_picks_the_outputs():
    model, criterion, x, y, direction = setting("mlp-tanh")
    wrapped = Objective(Named(model), x, y, criterion, output_fn=lambda out: out["logits"])
    found = hessian_split(wrapped, direction.values())
    torch.testing.assert_close(found, hessian_split(Objective(model, x, y, criterion), direction))


class Named(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return {"logits": self.inner(x)}


def test_nobody_records_the_criterion():
    seen = []

    class Watched(nn.MSELoss):
        def __init__(self):
            super().__init__()
            self.register_forward_hook(lambda *_: seen.append(is_replaying()))

    model, _, x, y, direction = setting("mlp-tanh", "mse-mean")
    h = Objective(model, x, y, Watched())
    hessian_split(h, direction)
    h.hessian(direction)
    h.gradient()
    assert len(seen) > 2
    assert all(seen)


def test_single_precision():
    model, criterion, x, y, direction = setting("mlp-tanh")
    exact = hessian_split(Objective(model, x, y, criterion), direction)
    single = [d.float() for d in direction.values()]
    found = hessian_split(Objective(model.float(), x.float(), y, criterion), single)
    assert found.total.dtype == torch.float32
    torch.testing.assert_close([p.double() for p in found], list(exact), rtol=1e-4, atol=1e-5)


# --- the Hessian of one output --------------------------------------------------------------------


@pytest.mark.parametrize("output", [0, 4])
@pytest.mark.parametrize("name", ["mlp-tanh", "mlp-relu", "cnn", "transformer"])
def test_the_norm_of_an_output_hessian_equals_the_dense_one(name, output):
    model, criterion, x, _, _ = setting(name)
    dense = Dense(model, criterion)
    matrix = hessian(lambda theta: dense.outputs(theta, x[:2]).flatten()[output], dense.flat())
    expected = float(torch.linalg.eigvalsh(matrix).abs().max())
    with unchanged(model):
        found = output_hessian_norm(model, x[:2], output=output)
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_linear_model_has_no_output_hessian():
    for width in (2, 50):  # dense, and Lanczos
        model = nn.Linear(width, 1)
        assert output_hessian_norm(model, torch.randn(1, width)) == 0


class Wide(nn.Module):
    """One hidden tanh layer in the NTK parametrisation: m^{-1/2} Σ v_i tanh(w_i · x)."""

    def __init__(self, width, inputs, generator):
        super().__init__()
        draw = {"generator": generator, "dtype": torch.float64}
        self.w = nn.Parameter(torch.randn(width, inputs, **draw))
        self.v = nn.Parameter(torch.randint(2, (width,), generator=generator) * 2.0 - 1)
        self.v.data = self.v.data.double()

    def forward(self, x):
        return torch.tanh(x @ self.w.T) @ self.v / math.sqrt(len(self.v))


def test_wide_networks_become_linear_at_the_rate_of_the_root_of_the_width():
    generator = torch.Generator().manual_seed(0)
    widths, x = [2**k for k in range(4, 9)], torch.full((1, 2), 0.5**0.5, dtype=torch.float64)
    norms = []
    for width in widths:
        drawn = [Wide(width, 2, generator) for _ in range(10)]
        found = [output_hessian_norm(model, x, tolerance=1e-3) for model in drawn]
        for model, norm in zip(drawn, found):
            # Neurons do not see each other, and a neuron's block acts on (w_i along x, v_i) alone.
            z = (x @ model.w.T).squeeze(0).detach()
            slope = 1 - z.tanh() ** 2
            bend = (-2 * z.tanh() * slope * model.v).detach().abs()
            blocks = (bend + (bend**2 + 4 * slope**2).sqrt()) / 2
            assert norm == pytest.approx(float(blocks.max()) / math.sqrt(width), rel=1e-2)
        norms.append(sum(found) / len(found))
    logs = torch.tensor([widths, norms], dtype=torch.float64).log()
    centred = logs - logs.mean(1, keepdim=True)
    slope = float((centred[0] * centred[1]).sum() / centred[0].square().sum())
    assert slope == pytest.approx(-0.5, abs=0.1), norms


# --- bad input ------------------------------------------------------------------------------------


def test_bad_input_is_named():
    model, criterion, x, y, _ = setting("mlp-tanh")
    with pytest.raises(ValueError, match="direction: its names differ"):
        hessian_split(Objective(model, x, y, criterion), {})
    with pytest.raises(ValueError, match=r"output=18: expected 0 to 17"):
        output_hessian_norm(model, x, output=18)


def test_averaged_over_the_last_layers_signs_the_targets_part_cancels_and_the_outputs_does_not():
    # f = a tanh(w x), loss (f - y)²: along w the residual is 2 (a tanh - y) a tanh'' x².
    x, w, a = 0.7, 0.9, 1.3
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Tanh(), nn.Linear(1, 1, bias=False))
    model.double()
    along_w = [torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)]
    t = math.tanh(w * x)
    bend = -2 * t * (1 - t**2)
    means = {}
    for y in (0.0, 5.0):
        residuals = []
        for sign in (1, -1):
            with torch.no_grad():
                model[0].weight.fill_(w)
                model[2].weight.fill_(sign * a)
            inputs, targets = (torch.tensor([[v]], dtype=torch.float64) for v in (x, y))
            split = hessian_split(Objective(model, inputs, targets, nn.MSELoss()), along_w)
            residuals.append(float(split.residual))
            assert residuals[-1] == pytest.approx(2 * (sign * a * t - y) * sign * a * bend * x**2)
        means[y] = sum(residuals) / 2
    assert means[0.0] == pytest.approx(2 * a**2 * t * bend * x**2)
    assert means[5.0] == pytest.approx(means[0.0])
    assert abs(means[0.0]) > 0.1
