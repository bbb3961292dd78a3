"""Forward passes that differentiate, hook, branch on gradients or hide from one engine."""

import copy
import threading
import warnings

import pytest
import torch
from support.right import DOUBLE, body, check, measured, right
from torch import nn
from torch.nn import functional as F

from adler import Adler, Measure

ENGINES = ("forward", "finite_difference", "double_backward")
every_engine = pytest.mark.parametrize("jvp", ENGINES)
ce, mse = nn.CrossEntropyLoss(), nn.MSELoss()


def data(n=12):
    torch.manual_seed(1)
    return torch.randn(n, 6, dtype=DOUBLE), torch.randint(3, (n,))


X, Y = data()


class Net(nn.Module):
    """Two layers, and something between them that a case says."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)
        self.to(DOUBLE)

    def between(self, h):
        return h

    def forward(self, x):
        return self.b(self.between(self.a(x).tanh()))


def between(function):
    return type("Kind", (Net,), {"between": lambda self, h: function(self, h)})


def agrees(make, jvp="forward", x=X, engine=None, loss=None, rel=1e-5):
    torch.manual_seed(0)
    model = make().to(DOUBLE)
    twin = copy.deepcopy(model)
    loss = (lambda f: ce(f, Y)) if loss is None else loss
    rng = torch.get_rng_state()
    expected = right([twin(x)], loss, twin.parameters())
    torch.set_rng_state(rng)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        criterion = Function(loss)
        optimizer = measured(model, criterion, lambda m, c: c(m(x)), jvp=jvp, quiet=False)
    check(optimizer, expected, rel)
    said = [str(w.message) for w in said if issubclass(w.category, RuntimeWarning)]
    if engine is not None:
        assert optimizer.measure.jvp == engine
    assert len(said) == (optimizer.measure.jvp != jvp)
    return optimizer


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, f):
        return self.function(f)


# --- forward passes that differentiate ------------------------------------------------------------


class Residual(nn.Module):
    """u' + u of a network u: what a physics-informed network returns."""

    def __init__(self):
        super().__init__()
        self.u = body(1, 1)

    def forward(self, t):
        t = t if t.requires_grad else t.detach().requires_grad_()
        u = self.u(t)
        (du,) = torch.autograd.grad(u.sum(), t, create_graph=True)
        return du + u


class Given(Residual):
    """Of an input that the loop wants a gradient by."""

    def forward(self, t):
        assert t.requires_grad
        return super().forward(t)


class Forces(nn.Module):
    def __init__(self):
        super().__init__()
        self.e = body(6, 1)

    def forward(self, x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self.e(x).sum(), x, create_graph=True)[0]


class Adapted(nn.Module):
    """A step of gradient descent inside the forward pass, by `torch.func.grad`."""

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(6, 3)

    def forward(self, x):
        def inner(w):
            return F.linear(x, w, self.l.bias).square().mean()

        w = self.l.weight
        return F.linear(x, w - 0.1 * torch.func.grad(inner)(w), self.l.bias)


@every_engine
@pytest.mark.parametrize(("kind", "leaf"), [(Residual, True), (Residual, False), (Given, True)])
def test_a_physics_informed_network(jvp, kind, leaf):
    t = torch.linspace(0, 1, 20, dtype=DOUBLE)[:, None].requires_grad_(leaf)
    agrees(kind, jvp, t, engine=jvp, loss=lambda f: f.square().mean())


@every_engine
def test_forces(jvp):
    agrees(Forces, jvp, engine=jvp, loss=lambda f: (f - X).square().mean())


@every_engine
def test_a_gradient_by_a_function_transform(jvp):
    agrees(Adapted, jvp)


# --- hooks ----------------------------------------------------------------------------------------


def halved(self, h):
    if h.requires_grad:
        h.register_hook(lambda g: g * 0.5)
    return h


def kept(self, h):
    h.retain_grad()
    self.seen = h
    return h * 2


@every_engine
@pytest.mark.parametrize(
    ("hook", "engine"),
    [
        (lambda self, h: (h.register_hook(lambda g: g * 0.5), h)[1], "double_backward"),
        (halved, "double_backward"),
        (lambda self, h: (h.register_hook(lambda g: None), h)[1], None),
    ],
    ids=["half a gradient", "where it requires one", "one that looks"],
)
def test_hooks_on_activations(hook, engine, jvp):
    agrees(between(hook), jvp, engine=engine)


def test_retained_gradients_are_those_of_training():
    model = between(kept)()
    optimizer = measured(model, ce, lambda m, c: c(m(X), Y))
    assert optimizer.last_step.trusted
    assert model.seen.grad is not None
    assert model.seen.grad_fn is not None  # the training pass's own


# --- what one engine does not see -----------------------------------------------------------------


@torch.library.custom_op("adler_tests::square", mutates_args=())
def square(x: torch.Tensor) -> torch.Tensor:
    return x * x


def _save(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])


square.register_autograd(lambda ctx, g: 2 * g * ctx.saved_tensors[0], setup_context=_save)


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -g


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, g):
        return g


@pytest.mark.parametrize("jvp", ["forward", "double_backward"])
def test_a_custom_op_whose_forward_derivative_is_zero(jvp):
    agrees(between(lambda self, h: square(h)), jvp, engine="double_backward")


@pytest.mark.filterwarnings("ignore:forward-mode AD is not available")
@pytest.mark.parametrize("function", [Reversed, Sign])
def test_gradients_that_are_not_the_functions_own(function):
    torch.manual_seed(0)
    model = between(lambda self, h: function.apply(h))()
    twin = copy.deepcopy(model)
    expected = right([twin(X)], lambda f: ce(f, Y), twin.parameters())
    optimizer = measured(model, ce, lambda m, c: c(m(X), Y))
    check(optimizer, expected)
    assert optimizer.measure.jvp == "double_backward"


def heads(h):
    return h.view(3, 4, 2, 4).transpose(1, 2)


def dropped_attention(self, h):
    q = heads(h)
    attended = F.dropout(F.scaled_dot_product_attention(q, q, q), 0.3)
    return attended.transpose(1, 2).reshape(12, 8)


def memory_matters():
    """Whether dropout draws in the order of memory, and not of the numbers."""
    masks = []
    for ones in (torch.ones(3, 2, 4, 4), torch.ones(3, 4, 2, 4).transpose(1, 2)):
        torch.manual_seed(0)
        masks.append(F.dropout(ones, 0.5))
    return not masks[0].equal(masks[1])


FALLBACKS = {  # what is between the layers, and what is wrong with the engine that measured last
    "custom op": (lambda self, h: square(h), "jvp='forward' contradicts the gradient"),
    "straight through": (
        lambda self, h: Sign.apply(h),
        "jvp='finite_difference' contradicts the gradient",
    ),
    "hook": (
        lambda self, h: (h.register_hook(lambda g: g * 0.5), h)[1],
        "jvp='forward' raises an error on this model (RuntimeError: cannot register a hook",
    ),
    "another order of random numbers": (
        dropped_attention,
        "jvp='forward' does not make the outputs of the training pass once more",
    ),
}


@pytest.mark.parametrize(("something", "cause"), FALLBACKS.values(), ids=FALLBACKS)
def test_a_fallback_says_what_was_wrong_with_the_engine_it_replaces(something, cause):
    torch.manual_seed(0)
    if something is dropped_attention and not memory_matters():
        pytest.skip("this PyTorch's dropout does not depend on the order of memory")
    model = between(something)()
    optimizer = Adler(model.parameters(), model, ce, measure=Measure.every_step())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ce(model(X), Y).backward()
        optimizer.step()
    assert optimizer.last_step.trusted
    (said,) = [str(w.message) for w in caught if "agrees with it" in str(w.message)]
    assert said.startswith(cause)


def no_grad_block(self, h):
    with torch.no_grad():
        k = h * 3
    return h * k + self.c.weight.sum()


@torch.no_grad()
def _scale(h):
    return 5 * h.abs().amax()


def enabled_again(self, h):
    with torch.no_grad():
        s = h.exp()
        with torch.enable_grad():
            t = h.sin()
        u = h.cos()
    return s * t + u


BLOCKS = {
    "block": no_grad_block,
    "decorator": lambda self, h: (h / _scale(h)).exp(),
    "set_grad_enabled": lambda self, h: h + (_set(False), h.exp(), _set(True))[1],
    "enabled again": enabled_again,
    "detach": lambda self, h: h * h.detach(),
    "data": lambda self, h: h * h.data,
}


def _set(value):
    torch.set_grad_enabled(value)


@every_engine
@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_what_is_computed_without_gradients_is_a_constant(block, jvp):
    agrees(between(block), jvp)  # a difference moves it, and another engine takes over
    assert torch.is_grad_enabled()
    assert torch._C._is_fwd_grad_enabled()


# --- modules within modules -----------------------------------------------------------------------


class Hyper(nn.Module):
    def __init__(self):
        super().__init__()
        self.make, self.target = nn.Linear(2, 18), nn.Linear(6, 3, bias=False)

    def forward(self, x):
        w = self.target.weight + self.make(x[:, :2].mean(0)).view(3, 6)
        return torch.func.functional_call(self.target, {"weight": w}, (x,))


class Listed(nn.Module):
    """Reaches its parameters through a plain list."""

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(6, 3)
        self.weights = [self.l.weight, self.l.bias]

    def forward(self, x):
        return F.linear(x, *self.weights) + self.l(x).tanh()


class Packed(nn.Module):
    def __init__(self, kind=nn.LSTM):
        super().__init__()
        self.rnn, self.head = kind(2, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        lengths = torch.tensor([3] * 6 + [2] * 3 + [1] * 3)
        x = x.view(12, 3, 2)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        hidden = self.rnn(packed)[1]
        return self.head((hidden[0] if isinstance(hidden, tuple) else hidden)[-1])


class Numpy(Net):
    def forward(self, x):
        h = self.a(x).tanh()
        return self.b(h)[torch.from_numpy(h.detach().numpy()[:, 0].argsort())]


@every_engine
@pytest.mark.parametrize(
    "make",
    [Hyper, Listed, Packed, lambda: Packed(nn.GRU), Numpy],
    ids=["functional_call", "listed", "packed lstm", "packed gru", "numpy"],
)
def test_modules_that_reach_around(make, jvp):
    agrees(make, jvp, engine=jvp)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:a scripted module cannot be made to save")
@every_engine
@pytest.mark.parametrize("script", [torch.jit.script, lambda m: torch.jit.trace(m, X)])
def test_scripted_modules(script, jvp):
    torch.manual_seed(0)
    inner = script(nn.Sequential(nn.Linear(6, 8), nn.Tanh()).to(DOUBLE))
    model = nn.Sequential(inner, nn.Linear(8, 3).to(DOUBLE))
    expected = right([model(X)], lambda f: ce(f, Y), model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = measured(model, ce, lambda m, c: c(m(X), Y), jvp=jvp, lr=0.0)
    check(optimizer, expected, 1e-5)
    assert all(p.equal(q) for p, q in zip(model.parameters(), before))


@every_engine
def test_dropout_on_memory_in_another_order(jvp):
    class Drops(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 4, 3), nn.Linear(64, 3)

        def forward(self, x):
            return self.b(torch.dropout(self.a(x), 0.5, self.training).flatten(1))

    torch.manual_seed(0)
    x = torch.randn(12, 2, 6, 6, dtype=DOUBLE).to(memory_format=torch.channels_last)
    agrees(lambda: Drops().to(memory_format=torch.channels_last), jvp, x, engine=jvp)


# --- threads --------------------------------------------------------------------------------------


def test_threads_measure_as_alone():
    def run():
        model = body()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.linspace(-0.5, 0.5, p.numel()).view_as(p))
        optimizer = Adler(model.parameters(), model, ce, measure=Measure.every_step())
        for _ in range(10):
            optimizer.zero_grad()
            ce(model(X), Y).backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    alone, found = run(), []
    threads = [threading.Thread(target=lambda: found.append(run())) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 4
    assert all(one.equal(alone) for one in found)
