"""A compiled model's replays are compiled too, and say what the others say."""

import copy
import warnings

import pytest
import torch
from support import loops
from support.cases import batches, flat, network
from support.loops import train
from support.options import EXACT, measuring
from torch import nn

from adler import Adler, AdlerScheduleFree
from adler._recording.compiled import Compiled

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch.compiler.reset()


class Backend:
    """Runs graphs as they are, counts the runs, and can fail or lie from one graph on."""

    def __init__(self, fails_at=None, lies_at=None):
        self.graphs = self.runs = 0
        self.fails_at, self.lies_at = fails_at, lies_at

    def __call__(self, graph, inputs):
        self.graphs += 1
        if self.fails_at is not None and self.graphs >= self.fails_at:
            raise NotImplementedError("no rule for this op")
        lies = self.lies_at is not None and self.graphs >= self.lies_at

        def run(*values):
            self.runs += 1
            found = graph.forward(*values)
            if not lies:
                return found
            return tuple(v * 1.2 if v.is_floating_point() else v for v in found)

        return run


def setting(name, backend, kind=Adler, **options):
    model, criterion = network(name), nn.CrossEntropyLoss()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend=backend)
    optimizer = kind(model.parameters(), compiled, criterion, **options)
    plain = kind(twin.parameters(), twin, criterion, **options)
    return compiled, twin, criterion, optimizer, plain


ENGINES = {
    "forward": (EXACT, 1),
    "finite difference": (measuring("finite_difference"), 1),  # and the training forward's outputs
    "finite difference on a part": (measuring("finite_difference", fraction=0.5), 2),
    "forward on a part": (measuring(fraction=0.5), 1),
    "double backward": (measuring("double_backward"), 0),
}


# What is compiled depends on the engine, what it holds on the network: all of each, not all pairs.
@pytest.mark.parametrize(
    ("name", "engine"),
    [
        *(("batchnorm", engine) for engine in ENGINES),
        *((name, "forward") for name in ("mlp-relu", "transformer", "cnn")),
    ],
)
def test_the_replay_is_compiled_and_the_steps_are_the_same(name, engine):
    options, replays = ENGINES[engine]
    backend = Backend()
    compiled, twin, criterion, optimizer, plain = setting(name, backend, **options)
    data = batches(name, criterion, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        train(compiled, criterion, optimizer, data[:3])
        before = backend.runs
        train(compiled, criterion, optimizer, data[3:])
    assert backend.runs - before == 3 * (1 + replays)
    train(twin, criterion, plain, data)
    torch.testing.assert_close(flat(compiled), flat(twin), rtol=1e-5, atol=1e-9)


def test_other_directions_and_autocast_too():
    compiled, twin, criterion, optimizer, plain = setting(
        "mlp-tanh", Backend(), AdlerScheduleFree, **measuring("finite_difference")
    )
    data = batches("mlp-tanh", criterion, 5)
    for model, one in ((compiled, optimizer), (twin, plain)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            train(model, criterion, one, data)
    torch.testing.assert_close(flat(compiled), flat(twin), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dynamic", [None, True])
def test_batches_of_several_sizes_where_the_first_layer_normalises(dynamic):
    """With symbolic shapes older versions of PyTorch end the process there."""
    model, criterion = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3)).double(), nn.MSELoss()
    compiled = torch.compile(model, backend=Backend(), dynamic=dynamic)
    twin = copy.deepcopy(model)
    optimizer = Adler(model.parameters(), compiled, criterion, **EXACT)
    plain = Adler(twin.parameters(), twin, criterion, **EXACT)
    data = [(torch.randn(n, 4).double(), torch.randn(n, 3).double()) for n in (5, 3, 7, 4)]
    train(compiled, criterion, optimizer, data)
    train(twin, criterion, plain, data)
    torch.testing.assert_close(flat(compiled), flat(twin), rtol=1e-5, atol=1e-9)


def test_an_explicit_batch_is_compiled_too():
    backend = Backend()
    compiled, _, criterion, optimizer, _ = setting("mlp-tanh", backend, **EXACT)
    for x, y in batches("mlp-tanh", criterion, 4):
        optimizer.zero_grad()
        criterion(compiled(x), y).backward()
        before = backend.runs
        optimizer.step(inputs=x, targets=y)
    assert backend.runs == before + 1


@pytest.mark.parametrize("trouble", ["fails_at", "lies_at"])
@pytest.mark.parametrize("engine", ["forward", "finite_difference"])
def test_trouble_is_told_once_and_the_steps_are_the_same(trouble, engine):
    backend = Backend(**{trouble: 2})  # the model's own graph is the first
    compiled, twin, criterion, optimizer, plain = setting("mlp-tanh", backend, **measuring(engine))
    data = batches("mlp-tanh", criterion, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(compiled, criterion, optimizer, data)
    said = [w for w in caught if "is not compiled" in str(w.message)]
    assert [w.filename for w in said] == [loops.__file__]  # where the loop calls step
    why = "no rule for this op" if trouble == "fails_at" else "it differs"
    assert why in str(said[0].message)
    train(twin, criterion, plain, data)
    torch.testing.assert_close(flat(compiled), flat(twin), rtol=1e-6, atol=1e-9)


def test_dropouts_masks_are_the_training_forwards():
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 3)).double()
    criterion, twin = nn.CrossEntropyLoss(), copy.deepcopy(model)
    compiled = torch.compile(model, backend="eager")
    optimizer, plain = (Adler(m.parameters(), m, criterion, **EXACT) for m in (compiled, twin))
    data = batches("mlp-tanh", criterion, 4)
    for network_, one in ((compiled, optimizer), (twin, plain)):
        torch.manual_seed(0)
        train(network_, criterion, one, data)
    torch.testing.assert_close(flat(compiled), flat(twin), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "compiles"),
    [
        ({}, True),
        ({"mode": "reduce-overhead"}, False),
        ({"options": {"triton.cudagraphs": True}}, False),
    ],
)
def test_replays_are_not_compiled_into_graphs_that_write_over_their_outputs(options, compiles):
    compiled = torch.compile(nn.Linear(2, 2), **options)
    assert (Compiled.of(compiled) is not None) == compiles
