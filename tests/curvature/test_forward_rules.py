"""Forward-mode rules, beside PyTorch's own and beside the training pass."""

import copy
import itertools
from typing import ClassVar

import pytest
import torch
from support.loops import train
from support.options import EXACT
from torch import nn
from torch.nn import functional as F

from adler import Adler, curvature
from adler.curvature import forward_rules
from adler.curvature.forward_rules import ForwardRules
from adler.curvature.jacobian import (
    ForwardModeUnsupportedError,
    differentiable_attention,
    double_backward,
    forward,
)

# --- rules in place of PyTorch's ------------------------------------------------------------------


def last(x):
    return x.contiguous(memory_format=torch.channels_last)


def attends(*shapes, mask=None, **options):
    """Attention, with shapes of query, key and value."""
    shapes = {"q": (2, 3, 5, 4), "k": (2, 3, 5, 4), "v": (2, 3, 5, 4), **dict(shapes)}

    def f(q, k, v):
        own = mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, own, **options)

    return f, shapes


SEEN = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], *[[1, 1, 1, 0, 1]] * 3]).bool()
SHAPES = {"x": (5, 4), "w": (3, 4), "b": (3,)}
PICTURES = {"x": (4, 6, 3, 2), "w": (6,), "b": (6,)}
# From a function and the shapes of its arguments.
RULED = {
    "linear": (lambda x, w, b: F.linear(x, w, b), SHAPES),
    "linear, without bias": (lambda x, w: F.linear(x, w), {"x": (5, 4), "w": (3, 4)}),
    "linear, one example": (lambda x, w, b: F.linear(x, w, b), {**SHAPES, "x": (4,)}),
    "linear, sequences": (lambda x, w, b: F.linear(x, w, b), {**SHAPES, "x": (2, 3, 4)}),
    "linear, turned": (lambda x, w, b: F.linear(x.transpose(0, 1), w, b), {**SHAPES, "x": (4, 5)}),
    "linear, keywords": (lambda x, w, b: F.linear(input=x, weight=w, bias=b), SHAPES),
    "batch": (
        lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True),
        {"x": (8, 3), "w": (3,), "b": (3,)},
    ),
    "batch, pictures": (
        lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True, eps=0.1),
        PICTURES,
    ),
    "batch, channels last": (
        lambda x, w, b: F.batch_norm(last(x), None, None, w, b, training=True),
        PICTURES,
    ),
    "batch, without bias": (
        lambda x, w: F.batch_norm(x, None, None, w, training=True),
        {"x": (8, 3), "w": (3,)},
    ),
    "batch, without parameters": (
        lambda x: F.batch_norm(x, None, None, training=True),
        {"x": (8, 3)},
    ),
    "layer": (lambda x, w, b: F.layer_norm(x, (4,), w, b), {"x": (2, 5, 4), "w": (4,), "b": (4,)}),
    "layer, two dimensions": (
        lambda x, w, b: F.layer_norm(x.transpose(0, 2), (5, 2), w, b, eps=0.1),
        {"x": (2, 5, 4), "w": (5, 2), "b": (5, 2)},
    ),
    "layer, without bias": (lambda x, w: F.layer_norm(x, (4,), w), {"x": (5, 4), "w": (4,)}),
    "layer, without parameters": (lambda x: F.layer_norm(x, (4,)), {"x": (5, 4)}),
    "group": (lambda x, w, b: F.group_norm(x, 2, w, b, eps=0.1), PICTURES),
    "group, channels last": (lambda x, w, b: F.group_norm(last(x), 2, w, b), PICTURES),
    "group, sequences": (lambda x, w, b: F.group_norm(x, 3, w, b), {**PICTURES, "x": (4, 6, 5)}),
    "group, without bias": (
        lambda x, w: F.group_norm(x, 2, w),
        {"x": (4, 6, 3), "w": (6,)},
    ),
    "group, without parameters": (lambda x: F.group_norm(x, 2), {"x": (4, 6, 3)}),
    "attention": attends(),
    "attention, causal": attends(is_causal=True),
    "attention, scaled": attends(scale=0.3),
    "attention, hidden keys": attends(mask=SEEN),
    "attention, biased": attends(mask=torch.linspace(-1, 1, 25).view(5, 5)),
    "attention, other lengths": attends(("k", (2, 3, 7, 4)), ("v", (2, 3, 7, 6)), is_causal=True),
    "attention, grouped": attends(
        ("k", (2, 1, 5, 4)), ("v", (2, 1, 5, 4)), enable_gqa=True, is_causal=True
    ),
    "attention, one head": attends(("q", (2, 5, 4)), ("k", (2, 5, 4)), ("v", (2, 5, 4))),
}
# What has no rule: PyTorch's remains.
UNRULED = {
    "batch, evaluated": (
        lambda x, w, b: F.batch_norm(x, 0 * b.detach(), 1 + 0 * b.detach(), w, b),
        {"x": (8, 3), "w": (3,), "b": (3,)},
    ),
    "attention, learned bias": (
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m),
        {**dict.fromkeys("qkv", (2, 3, 5, 4)), "m": (5, 5)},
    ),
    "attention, shared keys": attends(("k", (2, 1, 5, 4)), ("v", (2, 1, 5, 4))),
}


def drawn(case, dtype=torch.float64):
    torch.manual_seed(0)
    f, shapes = {**RULED, **UNRULED}[case]
    at = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    along = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    return f, at, along


@pytest.fixture
def taken(monkeypatch):
    """Of each call of a rule: whether it had an answer."""
    answers = []

    def watched(rule):
        def call(*args, **kwargs):
            found = rule(*args, **kwargs)
            answers.append(found is not NotImplemented)
            return found

        return call

    for function, rule in list(forward_rules._RULES.items()):
        monkeypatch.setitem(forward_rules._RULES, function, watched(rule))
    return answers


def pushed(f, at, along, *names):
    """By the rules: outputs and tangents along some of the arguments."""
    forward_rules.load()
    rest = {name: at[name] for name in at if name not in names}
    some = tuple({name: tensors[name] for name in names} for tensors in (at, along))
    with ForwardRules(), differentiable_attention(), torch.no_grad():
        return torch.func.jvp(lambda moving: f(**moving, **rest), (some[0],), (some[1],))


@pytest.mark.parametrize("case", [*RULED, *UNRULED])
def test_a_rule_says_what_transposing_twice_says(case, taken):
    f, at, along = drawn(case)
    before = copy.deepcopy((at, along))
    for count in range(1, len(at) + 1):
        for names in itertools.combinations(at, count):
            rest = {name: at[name] for name in at if name not in names}
            outputs, tangents = pushed(f, at, along, *names)
            expected = double_backward(
                lambda moving, rest=rest: f(**moving, **rest),
                {name: at[name] for name in names},
                {name: along[name] for name in names},
            )
            torch.testing.assert_close((outputs, tangents), expected, rtol=1e-9, atol=1e-11)
    assert taken[-1] == (case in RULED)  # with all tangents
    torch.testing.assert_close((at, along), before, rtol=0, atol=0)


@pytest.mark.parametrize("case", RULED)
def test_what_does_not_move_is_left_alone(case, taken):
    f, at, _ = drawn(case)
    constant = f(**at)
    found = pushed(lambda t: t * f(**at), {"t": torch.tensor(2.0)}, {"t": torch.tensor(3.0)}, "t")
    assert taken == [False]
    torch.testing.assert_close(found, (2 * constant, 3 * constant))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [c for c in RULED if c.startswith(("linear", "attention"))])
def test_under_autocast_a_rule_returns_what_the_training_pass_returns(case, dtype, taken):
    f, at, along = drawn(case, torch.float32)
    _, exact = double_backward(
        lambda moving: f(**moving),
        {name: tensor.double() for name, tensor in at.items()},
        {name: tensor.double() for name, tensor in along.items()},
    )
    with torch.autocast("cpu", dtype=dtype):
        outputs, tangents = pushed(f, at, along, *at)
        trained = f(**at)
    assert taken[0]
    assert outputs.dtype == tangents.dtype == trained.dtype
    close = 4 * torch.finfo(dtype).eps
    assert (outputs - trained).norm() <= close * trained.norm()
    assert (tangents.double() - exact).norm() <= close * exact.norm()


@pytest.mark.parametrize("case", [c for c in RULED if not c.startswith(("linear", "attention"))])
def test_norms_of_halves_are_differentiated_in_float32(case, taken):
    f, at, along = drawn(case, torch.bfloat16)
    outputs, tangents = pushed(f, at, along, *at)
    _, exact = double_backward(
        lambda moving: f(**moving),
        {name: tensor.double() for name, tensor in at.items()},
        {name: tensor.double() for name, tensor in along.items()},
    )
    assert taken[0]
    assert outputs.dtype == tangents.dtype == torch.bfloat16
    assert (tangents.double() - exact).norm() <= 0.003 * exact.norm()  # rounded once


def test_inside_another_transform_the_rules_are_pytorchs(taken):
    f, at, along = drawn("layer")
    several = {name: torch.stack([tensor, -2 * tensor]) for name, tensor in along.items()}
    found = torch.func.vmap(lambda direction: forward(lambda moving: f(**moving), at, direction)[1])
    once = forward(lambda moving: f(**moving), at, along)[1]
    assert taken == [True]
    torch.testing.assert_close(found(several), torch.stack([once, -2 * once]))
    assert taken == [True]


def test_where_a_device_lacks_a_kernel_the_rules_are_pytorchs(monkeypatch):
    def lacking(*args, **kwargs):
        raise NotImplementedError("aten::native_layer_norm_backward")

    f, at, along = drawn("layer")
    expected = pushed(f, at, along, *at)
    monkeypatch.setitem(forward_rules._RULES, F.layer_norm, lacking)
    torch.testing.assert_close(pushed(f, at, along, *at), expected)


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("asks", [True, False])
def test_what_multi_head_attention_calls_has_rules(asks, weights, taken, monkeypatch):
    if asks:  # as a PyTorch might whose function looks otherwise
        monkeypatch.setattr(forward_rules, "_multi_head_attention", F.multi_head_attention_forward)
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).double()
    x = torch.randn(3, 5, 8).double()

    def f(**params):
        return torch.func.functional_call(
            attention, params, (x, x, 2 * x), {"need_weights": weights}
        )[0]

    at = dict(attention.named_parameters())
    along = {name: torch.randn_like(p) for name, p in at.items()}
    found = pushed(f, at, along, *at)
    expected = double_backward(lambda params: f(**params), at, along)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert bool(taken) != asks


class Marked(torch.Tensor):
    asked: ClassVar = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.asked.append(func)
        return super().__torch_function__(func, types, args, kwargs)


def test_subclasses_of_tensors_have_rules_of_their_own(taken):
    x, w = torch.ones(2, 3), torch.ones(4, 3)
    with ForwardRules():
        assert type(F.linear(x.as_subclass(Marked), w)) is Marked
        nn.MultiheadAttention(3, 1)(*[x.as_subclass(Marked)] * 3)
    assert F.multi_head_attention_forward in Marked.asked
    assert taken == []


def test_the_exact_engine_is_exact_where_a_norm_is_far_from_zero():
    # A mean of a thousand deviations: nothing may be subtracted that is not small.
    torch.manual_seed(0)
    layers = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3)
    model, x = nn.Sequential(*layers), torch.randn(64, 4)
    with torch.no_grad():
        layers[0].bias.fill_(1e3)
        layers[2].bias.fill_(1e3)
    along = [torch.randn_like(p) for p in model.parameters()]
    twin = copy.deepcopy(model).double()
    wide = [d.double() for d in along]
    _, exact = curvature.jvp(twin, twin.parameters(), x.double(), wide)
    with torch.no_grad():
        reference = torch.func.jvp(
            lambda p: torch.func.functional_call(
                model, {**{k: b.clone() for k, b in model.named_buffers()}, **p}, (x,)
            ),
            (dict(model.named_parameters()),),
            (dict(zip(dict(model.named_parameters()), along, strict=True)),),
        )[1]
    _, found = curvature.jvp(model, model.parameters(), x, along)
    assert (found - exact).norm() <= 1.5 * (reference - exact).norm()


class Fails(nn.Module):
    """Turns gradients off, and never comes to turn them on again."""

    def forward(self, x):
        torch.set_grad_enabled(False)
        raise RuntimeError("too large for this")


def test_forward_mode_is_on_after_a_forward_pass_that_failed():
    model, x = nn.Linear(4, 3), torch.randn(2, 4)
    with pytest.raises(RuntimeError, match="too large"):
        curvature.jvp(nn.Sequential(model, Fails()), model.parameters(), x, model.parameters())
    _, found = curvature.jvp(model, model.parameters(), x, model.parameters())
    assert found.equal(model(x).detach())


# --- dropout: the mask is that of the training pass, whatever the layout of its input -------------


class Dropped(nn.Module):
    """Two layers, and dropout of what is between them in some layout."""

    def __init__(self, drop):
        super().__init__()
        self.before, self.after, self.drop = nn.Linear(4, 8), nn.Linear(8, 3), drop

    def forward(self, x):
        return self.after(self.drop(self.before(x))[:, -1])


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.5, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.layer(x)[:, -1])


def turned(f):
    return lambda x: f(x.transpose(1, 2)).transpose(1, 2)


def pictures(f):
    """As channels-last pictures, one pixel wide."""
    return lambda x: (
        f(x.transpose(1, 2).unsqueeze(3).contiguous(memory_format=torch.channels_last))
        .squeeze(3)
        .transpose(1, 2)
    )


def attended(x, p=0.3):
    """Drops weights of attention."""
    heads = x.unflatten(2, (2, 4)).transpose(1, 2)
    mixed = F.scaled_dot_product_attention(heads, heads, heads, dropout_p=p)
    return mixed.transpose(1, 2).flatten(2)


LAYOUTS = {
    "plain": nn.Dropout(0.5),
    "turned": turned(nn.Dropout(0.5)),
    "turned, in place": turned(nn.Dropout(0.5, inplace=True)),
    "heads": lambda x: (
        F.dropout(x.unflatten(2, (2, 4)).transpose(1, 2), 0.3).transpose(1, 2).flatten(2)
    ),
    "channels-last": pictures(nn.Dropout(0.5)),
    "channels": pictures(nn.Dropout2d(0.5)),
    "alpha": turned(nn.AlphaDropout(0.3)),
    "none": turned(nn.Dropout(0.0)),
    "attention": attended,
    "attention, all": lambda x: x + attended(x, 1.0),
    "all": lambda x: x + turned(nn.Dropout(1.0))(x),
    "evaluated": turned(nn.Dropout(0.5).eval()),
}


class Attended(nn.Module):
    """Drops weights of attention, among data that no parameter moves, and after."""

    def __init__(self):
        super().__init__()
        self.before, self.after = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        data = torch.cat([x, -x], 2)
        return self.after(attended(self.before(attended(data)[..., :4])))[:, -1]


MODELS = {"encoder": Encoder, "attention of data": Attended}


@pytest.mark.parametrize("layout", [*LAYOUTS, *MODELS])
def test_the_mask_is_that_of_the_training_pass(layout):
    torch.manual_seed(0)
    model = (MODELS[layout]() if layout in MODELS else Dropped(LAYOUTS[layout])).double()
    criterion = nn.CrossEntropyLoss()
    optimizer = Adler(model.parameters(), model, criterion, **EXACT)
    for _ in range(3):
        x, y = torch.randn(6, 5, 4).double(), torch.randint(3, (6,))
        train(model, criterion, optimizer, [(x, y)])
        assert optimizer.measure.jvp == "forward"
        assert float(optimizer.last_step.consistency) == pytest.approx(1, rel=1e-9)


# --- norms under autocast -------------------------------------------------------------------------

NORMS = {
    "batch": lambda: nn.BatchNorm2d(4),
    "batch, evaluated": lambda: nn.BatchNorm2d(4).eval(),
    "batch, without parameters": lambda: nn.BatchNorm2d(4, affine=False),
    "group": lambda: nn.GroupNorm(2, 4),
    "instance": lambda: nn.InstanceNorm2d(4, affine=True),
    "layer": lambda: nn.LayerNorm([6, 6]),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", NORMS)
def test_a_convolution_may_follow_a_norm_under_autocast(norm, dtype):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), NORMS[norm](), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten()]
    model, criterion = nn.Sequential(*layers, nn.Linear(64, 3)), nn.CrossEntropyLoss()
    optimizer = Adler(model.parameters(), model, criterion, **EXACT)
    for _ in range(3):
        x, y = torch.randn(32, 3, 8, 8), torch.randint(3, (32,))
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = criterion(model(x), y)
        loss.backward()
        twin = copy.deepcopy(model).double()
        along = [p.grad.double() for p in model.parameters()]
        exact = curvature.quadratic_form(twin, twin.parameters(), x.double(), y, criterion, along)
        optimizer.step()
        assert optimizer.measure.jvp == "forward"
        # Three digits of a bfloat16, through six layers.
        assert float(optimizer.last_step.curvature) == pytest.approx(float(exact), rel=0.03)


def test_networks_in_half_precision_throughout_are_left_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)).bfloat16()
    x, criterion = torch.randn(16, 4).bfloat16(), nn.CrossEntropyLoss()
    optimizer = Adler(model.parameters(), model, criterion, **EXACT)
    train(model, criterion, optimizer, [(x, torch.randint(3, (16,)))] * 2)
    assert float(optimizer.last_step.consistency) == pytest.approx(1, rel=0.05)


# PyTorch words the refusal differently for each, and for a convolution on different processors.
CONSUMERS = {
    "convolution": lambda y: F.conv2d(y, torch.ones(1, 4, 2, 2).bfloat16()),
    "batch of matrices": lambda y: y[0].bmm(torch.ones(4, 3, 3).bfloat16()),
    "matrix": lambda y: y[0, 0] @ torch.ones(3, 3).bfloat16(),
}


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_a_tangent_of_another_precision_is_no_error_of_the_loop(consumer):
    def f(params):
        x = torch.linspace(-1, 1, 36).view(1, 4, 3, 3).bfloat16()
        # Its output is in bfloat16, its tangent is not. (The functions of modules are repaired.)
        normalised = torch.native_group_norm(x, params["w"], torch.zeros(4), 1, 4, 9, 2, 1e-5)[0]
        return CONSUMERS[consumer](normalised)

    w = {"w": torch.ones(4)}
    assert f(w).dtype == torch.bfloat16
    with pytest.raises(ForwardModeUnsupportedError, match=r"alone \(.*Float"):
        forward(f, w, w)


def test_an_operand_of_another_precision_is_an_error_of_the_loop():
    def f(params):
        return F.conv2d(torch.ones(1, 1, 3, 3, dtype=torch.bfloat16), params["w"])

    w = {"w": torch.ones(1, 1, 2, 2)}
    with pytest.raises(RuntimeError) as plain:
        f(w)
    with pytest.raises(RuntimeError) as caught:
        forward(f, w, w)
    assert type(caught.value) is type(plain.value)


def test_too_little_memory_for_tangents_is_no_unsupported_op():
    calls = []

    def f(params):
        calls.append(params)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("not enough")
        return params["w"]

    w = {"w": torch.ones(2)}
    with pytest.raises(torch.OutOfMemoryError, match="not enough"):
        forward(f, w, w)
