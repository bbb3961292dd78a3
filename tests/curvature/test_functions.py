import itertools
import math
import threading
import warnings

import pytest
import torch
from support.cases import CRITERIA, NETWORKS, Square, drawn_direction, problem
from support.loops import unchanged
from support.reference import Dense
from torch import nn
from torch.backends import cuda as kernels

from adler import curvature
from adler._recording.replay import Call, _without_attention_fastpath
from adler.curvature import ENGINES, ForwardModeUnsupportedError
from adler.curvature.jacobian import differentiable_attention

EXACT = ["forward", "double_backward"]


def setting(name, criterion_name="ce-mean", seed=0):
    model, criterion, x, y = problem(name, criterion_name, seed)
    return model, criterion, x, y, drawn_direction(model)


def flatten(direction):
    return torch.cat([d.flatten() for d in direction.values()])


@pytest.mark.parametrize("engine", EXACT)
@pytest.mark.parametrize("name", NETWORKS)
def test_exact_engines_equal_the_dense_jacobian(name, engine):
    model, criterion, x, _, direction = setting(name)
    dense = Dense(model, criterion)
    expected = dense.jacobian(dense.flat(), x) @ flatten(direction)
    params = dict(model.named_parameters())
    for _ in range(2):  # twice: no hidden state
        with unchanged(model):
            outputs, tangents = curvature.jvp(model, params, x, direction, engine)
        torch.testing.assert_close(tangents.flatten(), expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(outputs, dense.outputs(dense.flat(), x), rtol=1e-10, atol=1e-12)
        assert not tangents.requires_grad


@pytest.mark.parametrize("name", ["mlp-tanh", "cnn", "batchnorm", "transformer"])
def test_finite_difference_converges_at_first_order(name):
    model, _, x, _, direction = setting(name)
    params = dict(model.named_parameters())
    _, exact = curvature.jvp(model, params, x, direction)
    steps = [2.0**-k for k in range(8, 14)]
    errors = []
    for step in steps:
        with torch.no_grad():
            _, v = curvature.finite_difference(Call.of(model, x), params, direction, step=step)
        errors.append(float((v - exact).norm() / exact.norm()))
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(0.9 < order < 1.1 for order in orders[2:]), (errors, orders)


@pytest.mark.parametrize("engine", EXACT)
@pytest.mark.parametrize("name", ["mlp-tanh", "cnn", "batchnorm", "transformer"])
def test_central_differences_converge_to_the_exact_engines_at_second_order(name, engine):
    model, criterion, x, _, direction = setting(name)
    dense, d = Dense(model, criterion), flatten(direction)
    _, v = curvature.jvp(model, dict(model.named_parameters()), x, direction, engine)
    errors = []
    for step in (2.0**-k for k in range(7, 12)):
        ahead, behind = (dense.outputs(dense.flat() + s * step * d, x) for s in (1, -1))
        errors.append(float(((ahead - behind) / (2 * step) - v).norm() / v.norm()))
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(1.9 < order < 2.1 for order in orders[1:]), (errors, orders)


@pytest.mark.parametrize("name", NETWORKS)
def test_finite_difference_by_default_is_accurate_to_the_square_root_of_precision(name):
    model, _, x, _, direction = setting(name)
    params = dict(model.named_parameters())
    _, exact = curvature.jvp(model, params, x, direction)
    with unchanged(model):
        _, v = curvature.jvp(model, params, x, direction, "finite_difference")
    assert (v - exact).norm() / exact.norm() < 1e-5


def test_finite_difference_touches_no_parameter_even_when_interrupted():
    calls = itertools.count(1)  # what the module itself holds is put back after each pass

    class Interrupted(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 2)

        def forward(self, x):
            if next(calls) == 2:
                raise KeyboardInterrupt
            return self.inner(x)

    model = Interrupted()
    before = [p.clone() for p in model.parameters()]
    direction = [torch.randn_like(p) for p in model.parameters()]
    with pytest.raises(KeyboardInterrupt):
        curvature.jvp(model, model.parameters(), torch.randn(4, 3), direction, "finite_difference")
    assert all(p.equal(b) for p, b in zip(model.parameters(), before))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("criterion_name", CRITERIA)
@pytest.mark.parametrize("name", NETWORKS)
def test_quadratic_form_equals_the_dense_ggn(name, criterion_name, engine):
    model, criterion, x, y, direction = setting(name, criterion_name)
    dense = Dense(model, criterion)
    theta, d = dense.flat(), flatten(direction)
    v = dense.jacobian(theta, x) @ d
    expected = float(v @ dense.loss_hessian(theta, x, y) @ v)
    with unchanged(model):
        c = curvature.quadratic_form(
            model, dict(model.named_parameters()), x, y, criterion, direction, engine
        )
    assert c.ndim == 0
    assert float(c) == pytest.approx(expected, rel=1e-9 if engine in EXACT else 1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_dropout_masks_are_the_same_in_every_engine(engine):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5), nn.Linear(50, 3)).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    direction = [torch.randn_like(p) for p in model.parameters()]
    state = torch.get_rng_state()
    outputs = model(x)
    torch.set_rng_state(state)
    with unchanged(model):
        found, tangents = curvature.jvp(model, model.parameters(), x, direction, engine)
    torch.testing.assert_close(found, outputs)
    _, exact = curvature.jvp(model, model.parameters(), x, direction)
    torch.testing.assert_close(tangents, exact, rtol=1e-5, atol=1e-6)


def test_a_sequence_and_a_mapping_say_the_same():
    model, _, x, _, direction = setting("mlp-tanh")
    _, a = curvature.jvp(model, dict(model.named_parameters()), x, direction)
    _, b = curvature.jvp(model, model.parameters(), x, list(direction.values()))
    assert a.equal(b)


def test_parameters_left_out_are_constants():
    model, _, x, _, direction = setting("mlp-tanh")
    part = {"0.weight": direction["0.weight"]}
    zeros = {**{n: torch.zeros_like(d) for n, d in direction.items()}, **part}
    params = dict(model.named_parameters())
    _, a = curvature.jvp(model, {n: params[n] for n in part}, x, part)
    _, b = curvature.jvp(model, params, x, zeros)
    torch.testing.assert_close(a, b)


def test_several_and_keyword_inputs_and_an_output_fn():
    class Bilinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3))

        def forward(self, a, *, b):
            return {"out": self.w * a * b}

    model, a, b, d = Bilinear(), torch.randn(2, 3), torch.randn(2, 3), torch.randn(3)
    _, v = curvature.jvp(
        model, model.parameters(), {"a": a, "b": b}, [d], output_fn=lambda out: out["out"]
    )
    torch.testing.assert_close(v, d * a * b)


# --- where forward mode cannot go -----------------------------------------------------------------


class SetupSquare(torch.autograd.Function):
    generate_vmap_rule = False

    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class Then(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.linear, self.function = nn.Linear(3, 3).double(), function

    def forward(self, x):
        return self.function(self.linear(x))


class LSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 3)

    def forward(self, x):
        return self.lstm(x.float())[0]


def reentrant(x):
    return torch.utils.checkpoint.checkpoint(torch.tanh, x, use_reentrant=True)


def group_norm_in_channels_last(x):
    pictures = x.reshape(2, 2, 1, 3).contiguous(memory_format=torch.channels_last)
    # (The function of `torch.nn.functional` has a rule of this library.)
    return torch.group_norm(pictures, 1).flatten(1)


UNSUPPORTED = {
    "custom function": (lambda: Then(Square.apply), "custom autograd.Function"),
    "custom function with a context": (
        lambda: Then(SetupSquare.apply),
        "custom autograd.Function",
    ),
    "weight norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)).double(),
        "_weight_norm_interface",
    ),
    "reentrant checkpoint": (lambda: Then(reentrant), "custom autograd.Function|tangent"),
    "group norm in channels_last": (lambda: Then(group_norm_in_channels_last), "channels_last"),
}


# Checkpointing warns of every forward without a reverse graph.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("case", UNSUPPORTED)
def test_one_warning_names_the_op_and_the_finite_difference_takes_over(case):
    torch.manual_seed(0)
    make, op = UNSUPPORTED[case]
    model, x = make(), torch.randn(4, 3, dtype=torch.float64)
    direction = [torch.randn_like(p) for p in model.parameters()]
    with pytest.warns(RuntimeWarning, match=op) as caught:
        _, tangents = curvature.jvp(model, model.parameters(), x, direction)
    assert [w.filename for w in caught if "forward-mode AD" in str(w.message)] == [__file__]
    _, expected = curvature.jvp(model, model.parameters(), x, direction, "finite_difference")
    assert tangents.equal(expected)
    assert tangents.abs().max() > 0


def test_an_lstm_in_single_precision_is_differentiated_forwards():
    """By another kernel than in training, on the CPU."""
    torch.manual_seed(0)
    model, x = LSTM(), torch.randn(4, 3, dtype=torch.float64)
    direction = [torch.randn_like(p) for p in model.parameters()]
    before = torch.backends.mkldnn.enabled
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("error")
        _, tangents = curvature.jvp(model, model.parameters(), x, direction)
    assert torch.backends.mkldnn.enabled == before
    twin = LSTM().double()
    twin.load_state_dict(model.state_dict())
    twin.lstm.register_forward_pre_hook(lambda module, given: (given[0].double(),))
    wide = [d.double() for d in direction]
    _, expected = curvature.jvp(twin, twin.parameters(), x, wide, "double_backward")
    torch.testing.assert_close(tangents.double(), expected, rtol=1e-5, atol=1e-6)


def test_outputs_that_are_asked_to_require_gradients_keep_their_tangent():
    """As Hugging Face's activation checkpointing does in a hook on the embedding."""
    torch.manual_seed(0)
    model = Then(lambda x: torch.tanh(x).requires_grad_())
    x = torch.randn(4, 3, dtype=torch.float64)
    direction = [torch.randn_like(p) for p in model.parameters()]
    _, tangents = curvature.jvp(model, model.parameters(), x, direction)
    _, expected = curvature.jvp(model, model.parameters(), x, direction, "double_backward")
    torch.testing.assert_close(tangents, expected, rtol=1e-12, atol=1e-12)


def test_the_forward_engine_itself_refuses():
    model, x = Then(Square.apply), torch.randn(4, 3, dtype=torch.float64)
    params = dict(model.named_parameters())
    with pytest.raises(ForwardModeUnsupportedError) as caught:
        curvature.forward(Call.of(model, x), params, params)
    assert "custom autograd.Function" in caught.value.op


def test_a_lost_tangent_is_never_taken_for_zero():
    model, x = Then(torch.detach), torch.randn(4, 3, dtype=torch.float64)
    params = dict(model.named_parameters())
    with pytest.raises(ForwardModeUnsupportedError, match="drops the tangent"):
        curvature.forward(Call.of(model, x), params, params)
    with pytest.raises(RuntimeError, match="do not depend on the parameters"):
        curvature.double_backward(Call.of(model, x), params, params)


def test_other_errors_are_not_swallowed():
    model = nn.Linear(3, 2)
    direction = [torch.zeros_like(p) for p in model.parameters()]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        curvature.jvp(model, model.parameters(), torch.randn(4, 5), direction)


# --- bad input ------------------------------------------------------------------------------------


def test_bad_input_is_named():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    params = dict(model.named_parameters())
    good = {n: torch.zeros_like(p) for n, p in params.items()}
    with pytest.raises(ValueError, match="jvp='backwards'"):
        curvature.jvp(model, params, x, good, "backwards")
    with pytest.raises(ValueError, match=r"direction: its names differ .*bias"):
        curvature.jvp(model, params, x, {"weight": good["weight"]})
    with pytest.raises(ValueError, match=r"direction: 1 tensors for 2 parameters"):
        curvature.jvp(model, params, x, [good["weight"]])
    with pytest.raises(ValueError, match=r"'weight' has shape \(2, 2\)"):
        curvature.jvp(model, params, x, {**good, "weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=r"params: entries \[1\] are not parameters"):
        curvature.jvp(model, [model.weight, torch.zeros(2)], x, [model.weight, torch.zeros(2)])
    with pytest.raises(ValueError, match="reduction='none'"):
        curvature.quadratic_form(model, params, x, x, nn.CrossEntropyLoss(reduction="none"), good)


def test_learning_rate_minimises_the_model():
    slope, c = torch.tensor(3.0), torch.tensor(4.0)
    rate = curvature.learning_rate(slope, c, torch.tensor(5.0), eps=0.0)
    grid = torch.linspace(0, 2, 2001)
    model = -slope * grid + c * grid**2 / 2
    assert float(rate) == pytest.approx(float(grid[model.argmin()]), abs=1e-3)


# --- what is set for the whole process -----------------------------------------------------------


def attention_kernels():
    return [
        kernels.flash_sdp_enabled(),
        kernels.math_sdp_enabled(),
        kernels.mem_efficient_sdp_enabled(),
    ]


def fastpath():
    return [torch.backends.mha.get_fastpath_enabled()]


SETTINGS = {
    "attention kernels": (differentiable_attention, attention_kernels, [False, True, False]),
    "fast path": (_without_attention_fastpath.wanted, fastpath, [False]),
}


@pytest.mark.parametrize(("changed", "now", "wanted"), SETTINGS.values(), ids=SETTINGS)
def test_threads_that_measure_at_once_leave_pytorch_as_it_was(changed, now, wanted):
    before = now()
    assert before != wanted
    second_is_in, first_is_out = threading.Event(), threading.Event()
    seen = []

    def second():
        with changed():
            second_is_in.set()
            first_is_out.wait(10)
            seen.append(now())  # still needed here
        seen.append(now())

    other = threading.Thread(target=second)
    with changed():
        other.start()
        assert second_is_in.wait(10)
    first_is_out.set()
    other.join()
    assert seen == [wanted, before]
    assert now() == before


@pytest.mark.parametrize(("changed", "now", "wanted"), SETTINGS.values(), ids=SETTINGS)
def test_an_error_leaves_pytorch_as_it_was(changed, now, wanted):
    before, inside = now(), []

    def fails():
        with changed():
            inside.append(now())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert inside == [wanted]
    assert now() == before


def test_a_difference_of_half_outputs_is_divided_by_a_step_that_half_does_not_have():
    at, along = {"w": torch.ones(1).double()}, {"w": torch.full((1,), 2.0**15).double()}
    _, v = curvature.finite_difference(lambda p: p["w"].half(), at, along, step=2.0**-26)
    assert float(v) == 2.0**15
