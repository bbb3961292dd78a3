"""`examples/pl_theory`: inputs, networks, and what is measured at initialisation."""

import math

import pytest
import torch
from support.reference import jacobian_of
from torch import nn

from adler.diagnostics.features import feature_grams
from examples.pl_theory import experiments, inputs
from examples.pl_theory.config import Experiment
from examples.pl_theory.networks import Renormalise, activation_of, features, fully_connected

# --- inputs and networks --------------------------------------------------------------------------


@pytest.mark.parametrize(("dataset", "dimension"), [("digits", 0), ("sphere", 30)])
def test_inputs_have_the_norm_of_their_dimension_and_fewer_are_the_first_of_more(
    dataset, dimension
):
    more, fewer = (inputs.load(dataset, None, n, 5, 1, dimension) for n in (40, 10))
    assert more.train_x.shape[0] == 40
    assert more.test_x.shape[0] == 5
    assert more.train_x.dtype == torch.float64
    d = more.train_x.shape[1]
    norms = more.train_x.norm(dim=1)
    torch.testing.assert_close(norms, torch.full((40,), d**0.5, dtype=torch.float64))
    torch.testing.assert_close(more.train_x[:10], fewer.train_x)
    assert int(more.train_y.max()) < more.classes
    other = inputs.load(dataset, None, 10, 5, 2, dimension)  # a random subset, by the seed
    assert not torch.allclose(other.train_x, fewer.train_x)


@pytest.mark.parametrize(
    ("dataset", "n", "message"),
    [
        ("mnist", 5, "dataset='mnist'"),
        ("cifar10", 5, "pass --data"),
        ("digits", 10**6, "train_examples=1000000: digits has 1200"),
    ],
)
def test_data_that_is_not_there(dataset, n, message):
    with pytest.raises(ValueError, match=message):
        inputs.load(dataset, None, n)


@pytest.mark.parametrize("name", ["relu", "tanh"])
def test_layer_by_layer_is_the_whole_network(name):
    x = inputs.load("digits", None, 7).train_x
    activation = activation_of(name)
    model = fully_connected(activation, (64, 30, 30, 30, 3), seed=5, dtype=torch.float64)
    whole = feature_grams(model, x, ["1", "3", "5"])
    # Weights are drawn as normal(0, 1/√d) there, as normal(0, 1)/√d here.
    for f, G in zip(features(x, activation, False, 30, 3, seed=5), whole.values()):
        torch.testing.assert_close(f @ f.T, G)


def test_renormalised_examples_have_the_norm_of_the_width_after_every_layer():
    x = inputs.load("digits", None, 20).train_x
    plain, renormalised = (
        list(features(x, activation_of("relu"), flag, 50, 3, seed=0)) for flag in (False, True)
    )
    for f in renormalised:
        norms = f.norm(dim=1)
        torch.testing.assert_close(norms, torch.full((20,), 50**0.5, dtype=torch.float64))
    first = plain[0] * (50**0.5 / plain[0].norm(dim=1, keepdim=True))
    torch.testing.assert_close(renormalised[0], first)
    assert float((plain[0].norm(dim=1) / 50**0.5 - 1).abs().max()) > 0.02
    zero = Renormalise()(torch.zeros(2, 3))
    assert bool((zero == 0).all())


def test_layers_keep_the_scale_and_activations_are_normalised():
    x = inputs.load("digits", None, 20).train_x
    u = torch.randn(10**6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for name in ("relu", "tanh"):
        *_, f = features(x, activation_of(name), False, 1000, 3, seed=0)
        assert float(f.square().mean()) == pytest.approx(1, abs=0.25)
        normalised = activation_of(name)(u)
        assert float(normalised.mean()) == pytest.approx(0, abs=5e-3)  # five standard errors
        assert float(normalised.square().mean()) == pytest.approx(1, abs=1e-2)


# --- the experiments at initialisation ------------------------------------------------------------


@pytest.mark.parametrize("renormalised", [False, True])
def test_initialisation_against_singular_values(renormalised):
    experiment = Experiment("initialisation", "digits", "relu", renormalised, 80, 3, (5, 9))
    found = experiments.run(experiment)["results"]["layers"]
    f, generator = inputs.load("digits", None, 9).train_x, torch.Generator().manual_seed(0)
    mean, scale = 1 / math.sqrt(2 * math.pi), math.sqrt(1 / 2 - 1 / (2 * math.pi))
    for layer in range(4):
        if layer:
            weight = torch.randn(80, f.shape[1], generator=generator).double()
            f = ((f @ weight.T / math.sqrt(f.shape[1])).relu() - mean) / scale
            if renormalised:
                f = math.sqrt(80) * f / f.norm(dim=1, keepdim=True)
        for n in (5, 9):
            values = torch.linalg.svdvals(f[:n]) ** 2 / f.shape[1]
            table = found[str(n)]
            # There in float32.
            assert table["largest"][layer] == pytest.approx(float(values[0]), rel=1e-4)
            assert table["smallest"][layer] == pytest.approx(float(values[-1]), rel=1e-3)
            condition = math.log(float(values[0] / values[-1]))
            assert table["log_condition"][layer] == pytest.approx(condition, abs=2e-3)


def test_infinite_width_against_the_arc_cosine_kernel():
    experiment = Experiment("infinite-width", "digits", "relu", False, 0, 2, (4, 8))
    found = experiments.run(experiment)["results"]["layers"]
    x = inputs.load("digits", None, 8).train_x
    G = x @ x.T / 64
    for layer in range(3):
        for n in (4, 8):
            smallest = float(torch.linalg.eigvalsh(G[:n, :n])[0])
            table = found[str(n)]
            assert table["smallest"][layer] == pytest.approx(smallest, rel=1e-6)
            assert table["lemma_24"][layer] <= table["combined"][layer] + 1e-12
            assert table["combined"][layer] <= smallest * (1 + 1e-9)
        rho = G.clamp(-1, 1)
        plain = ((1 - rho**2).sqrt() + rho * (math.pi - rho.arccos())) / (2 * math.pi)
        G = (plain - 1 / (2 * math.pi)) / (1 / 2 - 1 / (2 * math.pi))


def test_wide_networks_approach_infinite_width():
    limit = experiments.run(Experiment("infinite-width", "digits", "relu", False, 0, 1, (6,)))
    line = limit["results"]["layers"]["6"]["smallest"][1]
    errors = []
    for width in (50, 20000):
        wide = experiments.run(
            Experiment("initialisation", "digits", "relu", False, width, 1, (6,))
        )
        errors.append(abs(wide["results"]["layers"]["6"]["smallest"][1] / line - 1))
    # Fluctuations fall like 1/√width, to a twentieth.
    assert errors[1] < 0.05 < errors[0]


def test_tangent_kernel_against_the_dense_jacobian():
    experiment = Experiment(
        "tangent-kernel", "sphere", width=5, depth=3, examples=(4,), dimension=7, seed=1
    )
    found = experiments.run(experiment)["results"]
    x = inputs.load("sphere", None, 4, seed=1, dimension=7).train_x
    model = fully_connected(nn.ReLU(), (7, 32, 5, 1), seed=1, dtype=torch.float64)
    for weight in model.parameters():  # variance 2 over the width of what enters
        weight.data *= math.sqrt(2)
    J = jacobian_of(model, x)
    assert found["smallest"] == pytest.approx(float(torch.linalg.eigvalsh(J @ J.T)[0]), rel=1e-8)
    part = J[:, 7 * 32 : 7 * 32 + 32 * 5]
    assert found["parts"]["2"] == pytest.approx(
        float(torch.linalg.eigvalsh(part @ part.T)[0]), rel=1e-8
    )
