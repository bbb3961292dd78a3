import copy
import itertools

import pytest
import torch
from support.cases import NETWORKS, network
from support.loops import unchanged
from torch import nn

from adler._recording.replay import is_replaying
from adler.diagnostics import features

SEQUENTIAL = ["mlp-tanh", "mlp-relu", "cnn", "batchnorm"]


def inputs(name, count=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *NETWORKS[name][1], generator=generator, dtype=torch.float64)


def naive(outputs):
    """Entry by entry."""
    b = len(outputs)
    G = torch.empty(b, b, dtype=outputs.dtype)
    for i, j in itertools.product(range(b), repeat=2):
        G[i, j] = (outputs[i] * outputs[j]).sum()
    return G


def hooks(model):
    return sum(len(m._forward_hooks) for m in model.modules())


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_every_layer_agrees_with_running_the_layers_by_hand(name):
    model, x = network(name), inputs(name)
    twin, h, expected = copy.deepcopy(model), x, {"input": naive(x)}
    with torch.no_grad():
        for layer, module in enumerate(twin):
            h = module(h)
            expected[str(layer)] = naive(h)
    for _ in range(2):  # twice: no hidden state
        with unchanged(model):
            found = features.feature_grams(model, x, include_input=True)
        assert list(found) == list(expected)
        for key, G in found.items():
            torch.testing.assert_close(G, expected[key], rtol=1e-12, atol=1e-12)
            assert G.equal(G.T)
            assert not G.requires_grad
    assert hooks(model) == 0


def test_the_order_is_that_of_the_calls_and_the_output_has_the_empty_name():
    model, x = network("transformer"), inputs("transformer")
    assert list(features.feature_grams(model, x)) == ["norm", "qkv", "mix", "head"]
    found = features.feature_grams(model, x, modules=["", "head", "norm"])
    assert list(found) == ["norm", "head", ""]
    torch.testing.assert_close(found[""], naive(model(x).detach()), rtol=1e-12, atol=1e-12)


def test_a_model_that_is_one_module_is_its_own_output():
    model, x = nn.Linear(4, 3).double(), inputs("linear")
    assert list(features.feature_grams(model, x)) == [""]


class Repeats(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.shared(self.shared(x).relu())


def test_each_call_of_a_module_has_an_entry():
    model, x = Repeats().double(), inputs("linear")
    found = features.feature_grams(model, x)
    assert list(found) == ["shared", "shared#2"]
    first = model.shared(x).detach()
    torch.testing.assert_close(found["shared"], naive(first))
    torch.testing.assert_close(found["shared#2"], naive(model.shared(first.relu()).detach()))
    with pytest.raises(ValueError, match=r"\['unused'\] did not run"):
        features.feature_grams(model, x, modules=["shared", "unused"])


def test_features_are_taken_before_an_activation_overwrites_them():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True)).double()
    x = inputs("linear")
    found = features.feature_grams(model, x)
    torch.testing.assert_close(found["0"], naive(model[0](x).detach()))
    assert not torch.allclose(found["0"], found["1"])


class Odd(nn.Module):
    """Modules whose outputs are not features of every example."""

    def __init__(self):
        super().__init__()
        self.lstm, self.pool, self.ids = nn.LSTM(4, 4, batch_first=True), Sum(), nn.Identity()
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        self.pool(x)
        self.ids(torch.arange(len(x)))
        return {"logits": self.head(self.lstm(x[:, None])[0][:, 0])}


class Sum(nn.Module):
    def forward(self, x):
        return x.sum(0)


def test_other_outputs_are_left_out_unless_asked_for():
    model, x = Odd().double(), inputs("linear")
    assert list(features.feature_grams(model, x)) == ["head"]
    assert list(features.feature_grams(model, {"x": x})) == ["head"]
    for name, kind in (("lstm", "tuple"), ("pool", r"shape \(4,\)"), ("ids", "torch.int64")):
        with pytest.raises(ValueError, match=f"'{name}' returned .*{kind}.* with 6 rows"):
            features.feature_grams(model, x, modules=[name])
        assert hooks(model) == 0


def test_the_output_of_a_model_that_returns_a_dict_needs_an_output_fn():
    model, x = Odd().double(), inputs("linear")
    with pytest.raises(TypeError, match="pass output_fn="):
        features.feature_grams(model, x, modules=[""])
    found = features.feature_grams(model, x, modules=[""], output_fn=lambda out: out["logits"])
    torch.testing.assert_close(found[""], naive(model(x)["logits"].detach()))


def test_nothing_is_left_behind_by_an_exception():
    class Fails(nn.Module):
        def forward(self, x):
            assert is_replaying()
            raise KeyboardInterrupt

    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(), Fails()).double()
    with unchanged(model), pytest.raises(KeyboardInterrupt):
        features.feature_grams(model, inputs("linear"))
    assert hooks(model) == 0


def test_dropout_draws_the_mask_that_it_would_draw_next():
    model, x = nn.Sequential(nn.Linear(4, 50), nn.Dropout()).double(), inputs("linear")
    with unchanged(model):
        found = features.feature_grams(model, x)
    torch.testing.assert_close(found["1"], naive(model(x).detach()))


def test_half_precision_features_are_summed_in_single_precision():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 300)), torch.randn(5, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, outputs = features.feature_grams(model, x)["0"], model(x).detach()
    assert outputs.dtype == torch.bfloat16
    assert found.dtype == torch.float32
    # float32 sums of 300 products; sums in bfloat16 would be off by 4e-3
    torch.testing.assert_close(found.double(), naive(outputs.double()), rtol=1e-5, atol=1e-4)


def test_bad_calls_are_named():
    model, x = network("mlp-tanh"), inputs("mlp-tanh")
    with pytest.raises(ValueError, match=r"no modules \['7'\]"):
        features.feature_grams(model, x, modules=["0", "7"])
    with pytest.raises(ValueError, match=r"modules='0': pass a list"):
        features.feature_grams(model, x, modules="0")
    with pytest.raises(ValueError, match="inputs: no tensor with examples"):
        features.feature_grams(model, x[:0])
    with pytest.raises(TypeError, match=r"include_input=True: the inputs \(tuple\)"):
        features.feature_grams(model, (x, x), include_input=True)
    named = nn.Sequential()
    named.add_module("input", nn.Linear(4, 3).double())
    with pytest.raises(ValueError, match="a module of the name 'input'"):
        features.feature_grams(named, x, include_input=True)
