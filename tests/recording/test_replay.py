from dataclasses import replace

import pytest
import torch
from support.loops import unchanged
from torch import nn

from adler._recording.replay import Call, RandomState, is_replaying, replaying
from adler._unwrap import unwrap


def noisy():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))


def test_a_replay_draws_the_recorded_dropout_mask():
    model, x = noisy(), torch.randn(6, 4)
    state = RandomState.now()
    outputs = model(x)
    torch.randn(100)  # the generator moves on
    call = Call(model, (x,), random_state=state)
    torch.testing.assert_close(call(dict(model.named_parameters())), outputs)


def test_a_replay_without_a_recorded_state_repeats_itself():
    model, x = noisy(), torch.randn(6, 4)
    call, params = Call.of(model, x), dict(model.named_parameters())
    torch.testing.assert_close(call(params), call(params))


@pytest.mark.parametrize("training", [True, False])
def test_a_replay_leaves_no_trace(training):
    model, x = noisy().train(training), torch.randn(6, 4)
    model(x).sum().backward()
    with unchanged(model):
        Call.of(model, x)(dict(model.named_parameters()))


def test_a_replay_that_fails_leaves_no_trace():
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = noisy()

        def forward(self, x):
            self.inner(x)
            raise KeyboardInterrupt

    model, x = Failing(), torch.randn(6, 4)
    parameters = [p.clone() for p in model.parameters()]
    with unchanged(model), pytest.raises(KeyboardInterrupt):
        Call.of(model, x)({})
    assert all(p.equal(q) for p, q in zip(model.parameters(), parameters))
    assert not is_replaying()


def test_given_parameters_replace_the_models_own():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    assert Call.of(model, x)(zeros).abs().max() == 0


def test_tied_weights_are_replaced_together():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode = nn.Linear(3, 3, bias=False)
            self.decode = nn.Linear(3, 3, bias=False)
            self.decode.weight = self.encode.weight

        def forward(self, x):
            return self.decode(self.encode(x))

    model, x = Tied(), torch.randn(4, 3)
    doubled = {name: 2 * p for name, p in model.named_parameters()}
    assert len(doubled) == 1
    torch.testing.assert_close(Call.of(model, x)(doubled), 4 * model(x))


@pytest.mark.parametrize(
    "inputs", [(torch.ones(2), torch.ones(2)), {"a": torch.ones(2), "b": torch.ones(2)}]
)
def test_inputs_are_positional_or_by_keyword(inputs):
    class Sum(nn.Module):
        def forward(self, a, b):
            return a + b

    torch.testing.assert_close(Call.of(Sum(), inputs)({}), torch.full((2,), 2.0))


def test_autocast_is_that_of_the_call():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = Call.of(model, x)
    outside = Call.of(model, x)
    params = dict(model.named_parameters())
    assert inside(params).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert outside(params).dtype == torch.float32


def test_autocast_does_not_reuse_weights_that_it_has_cast_before():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = model(x)  # fills the cache
        call = Call.of(model, x)
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        assert before.abs().max() > 0
        assert call({}).abs().max() == 0


def test_output_fn_picks_the_tensor():
    class Dict(nn.Module):
        def forward(self, x):
            return {"logits": x + 1}

    x = torch.zeros(2)
    assert Call.of(Dict(), x, lambda out: out["logits"])({}).equal(torch.ones(2))
    with pytest.raises(TypeError, match="output_fn="):
        Call.of(Dict(), x)({})
    with pytest.raises(TypeError, match="output_fn returned dict"):
        Call.of(Dict(), x, lambda out: out)({})


def test_fewer_tensors_than_in_training_are_named():
    x = torch.randn(2, 3)
    call = replace(Call.of(nn.Identity(), x), leaves=(0, 1))
    with pytest.raises(RuntimeError, match="returned 1 tensors, not as many as in training"):
        call({})


def test_the_attention_fastpath_is_not_taken():
    # In eval mode without gradients PyTorch switches kernels; a replay must not.
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval().double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    outputs = layer(x)
    with torch.no_grad():
        assert Call.of(layer, x)({}).equal(outputs)
    assert torch.backends.mha.get_fastpath_enabled()


def test_replaying_is_marked_inside_only():
    assert not is_replaying()
    with replaying():
        assert is_replaying()
    assert not is_replaying()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, importing its compiler
def test_unwrap_finds_the_module_beneath_a_compiled_one():
    model = nn.Linear(2, 2)
    assert unwrap(torch.compile(model)) is model
    assert unwrap(model) is model
