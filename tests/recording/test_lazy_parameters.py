"""Parameters made on access: the same outputs, nothing kept, nothing left behind."""

import weakref

import pytest
import torch
from support.cases import NETWORKS, batches, network
from torch import nn
from torch.nn.utils import parametrizations

from adler._recording.lazy_parameters import Lazy
from adler._recording.replay import Call


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(4, 4), nn.Linear(4, 4)
        self.decode.weight = self.encode.weight

    def forward(self, x):
        return self.decode(torch.tanh(self.encode(x)))


class Listed(nn.Module):
    """Iterates over its parameters, and looks them up by name."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ParameterList([torch.randn(4, 4), torch.randn(4, 3)])
        self.offsets = nn.ParameterDict({"last": torch.randn(3)})
        self.register_parameter("nothing", None)

    def forward(self, x):
        penalty = sum(p.square().sum() for p in self.parameters())
        return x @ self.layers[0] @ self.layers[1] + self.offsets["last"] + penalty


class Generated(nn.Module):
    """Puts weights of its own making into a layer, for one call."""

    def __init__(self):
        super().__init__()
        self.scale, self.layer = nn.Parameter(torch.randn(3, 1)), nn.Linear(4, 3)

    def forward(self, x):
        weights = {"weight": self.layer.weight * self.scale}
        return torch.func.functional_call(self.layer, weights, x)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.lstm(x.unsqueeze(1))[0][:, -1])


MODELS = {
    "tied": Tied,
    "listed": Listed,
    "lstm": Recurrent,
    "generated": Generated,
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
    "encoder": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 2)), nn.TransformerEncoderLayer(2, 1, 8, batch_first=True)
    ),
    **{name: lambda name=name: network(name) for name in NETWORKS},
}


def doubled(model):
    """As a dict, and made on access."""
    own = dict(model.named_parameters())
    eager = {name: 2 * p.detach() for name, p in own.items()}
    return eager, Lazy(own, lambda name: 2 * own[name].detach())


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_the_same_parameters_at_once(name):
    torch.manual_seed(0)
    model = MODELS[name]().double()
    shape = NETWORKS[name][1] if name in NETWORKS else (4,)
    call, (eager, lazy) = Call.of(model, torch.randn(6, *shape).double()), doubled(model)
    own = [p.data_ptr() for p in model.parameters()]
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        expected, plain = call(eager), call({})
        assert call(lazy).equal(expected)
        assert not expected.equal(plain)
        assert call({}).equal(plain)
    assert [p.data_ptr() for p in model.parameters()] == own
    assert all(p.equal(b) for p, b in zip(model.parameters(), before))
    assert all(type(module._parameters) is dict for module in model.modules())


def test_parameters_live_no_longer_than_their_module_needs_them():
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(6)])
    own, alive, most = dict(model.named_parameters()), weakref.WeakSet(), 0

    def make(name):
        nonlocal most
        made = own[name].detach().clone()
        alive.add(made)
        most = max(most, len(alive))
        return made

    with torch.no_grad():
        Call.of(model, torch.randn(2, 4))(Lazy(own, make))
    assert most == 2  # weight and bias
    assert not alive


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_anywhere_leaves_the_models_own(error):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    own = dict(model.named_parameters())

    def failing(name):
        if name == "1.bias":
            raise error
        return torch.zeros_like(own[name])

    with pytest.raises(error):
        Call.of(model, torch.randn(2, 4))(Lazy(own, failing))
    assert all(model.get_parameter(name) is p for name, p in own.items())
    assert all(type(module._parameters) is dict for module in model.modules())


def test_parameters_that_are_not_named_stay():
    seen = []

    class Looks(nn.Linear):
        def forward(self, x):
            seen.append(list(self._parameters))
            seen.append(float(self._parameters.get("weight").detach().abs().max()))
            seen.append(self._parameters.get("other", 7))
            return super().forward(x)

    model, x = Looks(4, 3), torch.randn(2, 4)
    found = Call.of(model, x)(Lazy(["weight"], lambda _: torch.zeros(3, 4)))
    assert found.equal(model.bias.expand(2, 3))
    assert seen == [["weight", "bias"], 0.0, 7]


def test_a_lazy_mapping_is_a_mapping():
    squares = Lazy(["1", "2"], lambda name: torch.tensor(float(name) ** 2))
    assert {name: float(value) for name, value in squares.items()} == {"1": 1.0, "2": 4.0}
    assert len(squares) == 2
    with pytest.raises(KeyError, match="3"):
        squares["3"]


def test_buffers_are_as_before():
    model = network("batchnorm")
    ((x, _),) = batches("batchnorm", nn.CrossEntropyLoss(), 1)
    before = {name: b.clone() for name, b in model.named_buffers()}
    Call.of(model, x)(doubled(model)[1])
    assert all(b.equal(before[name]) for name, b in model.named_buffers())


def test_each_parameter_is_made_once():
    model, made = network("mlp-tanh"), []
    params = dict(model.named_parameters())
    lazy = Lazy(params, lambda name: made.append(name) or params[name])
    Call.of(model, torch.randn(2, 4, dtype=torch.float64))(lazy)
    assert sorted(made) == sorted(params)
