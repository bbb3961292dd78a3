"""What a criterion receives of a model with several outputs, or called several times."""

import copy
import dataclasses
import warnings

import pytest
import torch
from support.right import DOUBLE, body, check, measured, right
from torch import nn
from torch.nn import functional as F

from adler import Adler, AdlerAdam, AdlerMuon, AdlerScheduleFree

ce, mse = nn.CrossEntropyLoss(), nn.MSELoss()

torch.manual_seed(1)
X, Y = torch.randn(12, 6, dtype=DOUBLE), torch.randint(3, (12,))


class Heads(nn.Module):
    def __init__(self, kind=tuple):
        super().__init__()
        self.body, self.main, self.aux = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)
        self.kind = kind
        self.to(DOUBLE)

    def forward(self, x):
        h = self.body(x).tanh()
        a, b = self.main(h), self.aux(h)
        return {"a": a, "b": b} if self.kind is dict else (a, b)


@pytest.mark.parametrize("jvp", ["forward", "finite_difference", "double_backward"])
@pytest.mark.parametrize("output_fn", [None, lambda out: out[0]], ids=["alone", "output_fn"])
def test_two_heads_through_one_criterion(output_fn, jvp):
    model = Heads()
    twin = copy.deepcopy(model)

    def loop(m, c):
        a, b = m(X)
        return c(a, Y) + 0.4 * c(b, Y)

    optimizer = measured(model, ce, loop, jvp=jvp, output_fn=output_fn)
    expected = right(twin(X), lambda a, b: ce(a, Y) + 0.4 * ce(b, Y), twin.parameters())
    check(optimizer, expected, 1e-5)


@pytest.mark.parametrize("kind", [tuple, dict])
def test_one_of_several_outputs(kind):
    model = Heads(kind)
    twin = copy.deepcopy(model)
    key = "b" if kind is dict else 1
    optimizer = measured(model, ce, lambda m, c: c(m(X)[key], Y))
    check(optimizer, right([twin(X)[key]], lambda f: ce(f, Y), twin.parameters()))


def test_heads_joined_by_the_loop():
    model = Heads()
    twin = copy.deepcopy(model)
    target = torch.randn(12, 6, dtype=DOUBLE)
    optimizer = measured(model, mse, lambda m, c: c(torch.cat(m(X), 1), target))
    expected = right(twin(X), lambda *f: mse(torch.cat(f, 1), target), twin.parameters())
    check(optimizer, expected)


class OfAll(nn.Module):
    """Receives all that the model returns, in one argument."""

    def forward(self, out, y):
        a, b = out.values() if isinstance(out, dict) else out
        return ce(a, y) + 0.4 * (b * a.detach().cosh()).square().mean()


@pytest.mark.parametrize("jvp", ["forward", "finite_difference", "double_backward"])
@pytest.mark.parametrize("kind", [tuple, dict])
def test_a_criterion_of_all_that_the_model_returns(kind, jvp):
    model = Heads(kind)
    twin = copy.deepcopy(model)
    expected = right(
        list(twin(X).values() if kind is dict else twin(X)),
        lambda a, b: OfAll()((a, b), Y),
        twin.parameters(),
    )
    check(measured(model, OfAll(), lambda m, c: c(m(X), Y), jvp=jvp), expected, 1e-5)


@pytest.mark.parametrize("optimizer_of", [Adler, AdlerAdam, AdlerScheduleFree])
def test_a_criterion_of_all_that_the_model_returns_by_default(optimizer_of):
    """Measured as the same loss of two arguments is."""

    class OfTwo(OfAll):
        def forward(self, a, b, y):
            return super().forward((a, b), y)

    seen = []
    for criterion in (OfAll(), OfTwo()):
        torch.manual_seed(0)
        model = Heads()
        optimizer = optimizer_of(model.parameters(), model, criterion)
        for _ in range(3):
            optimizer.zero_grad()
            out = model(X)
            loss = criterion(out, Y) if type(criterion) is OfAll else criterion(*out, Y)
            loss.backward()
            with torch.no_grad():
                for f in out:
                    f.zero_()  # after the loss: not what it was computed at
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                optimizer.step()
        assert bool(optimizer.last_step.trusted)
        seen.append([float(getattr(optimizer.last_step, n)) for n in ("curvature", "effective_lr")])
    assert seen[0] == pytest.approx(seen[1], rel=1e-12)


def test_one_tensor_of_a_tuple_that_depends_on_the_parameters():
    class WithMask(nn.Module):
        def forward(self, out, y):
            return F.cross_entropy(out[0] * out[1], y)

    mask = torch.rand(12, 3, dtype=DOUBLE)
    model = body()
    twin = copy.deepcopy(model)
    optimizer = measured(model, WithMask(), lambda m, c: c((m(X), mask), Y))
    check(optimizer, right([twin(X)], lambda f: ce(f * mask, Y), twin.parameters()))


class OfAttributes(nn.Module):
    def forward(self, out, y):
        return OfAll()((out.a, out.b), y)


def test_a_criterion_of_an_object():
    """Refused by name, unless PyTorch knows how to take it apart."""

    @dataclasses.dataclass
    class Out:
        a: torch.Tensor
        b: torch.Tensor

    class Named(Heads):
        def forward(self, x):
            return Out(*super().forward(x))

    twin, criterion = Named(), OfAttributes()
    with pytest.raises(RuntimeError, match=r"received Out, .*register_dataclass\(Out\)"):
        measured(copy.deepcopy(twin), criterion, lambda m, c: c(m(X), Y))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch 2.6's, of its own code
        torch.export.register_dataclass(Out)
    out = twin(X)
    expected = right([out.a, out.b], lambda a, b: OfAll()((a, b), Y), twin.parameters())
    check(measured(copy.deepcopy(twin), criterion, lambda m, c: c(m(X), Y)), expected)


class Chained(nn.Module):
    """Its second output is made of the first, the third of both, as a VAE's reconstruction is."""

    def __init__(self):
        super().__init__()
        self.body, self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(3, 3)
        self.to(DOUBLE)

    def forward(self, x):
        a = self.a(self.body(x).tanh())
        b = self.b(a.tanh())
        return a, b, a * b.exp()


class Combined(nn.Module):
    def forward(self, a, b, c):
        return (a.square() * b.cosh()).mean() + F.cross_entropy(c, Y)


@pytest.mark.parametrize("jvp", ["forward", "finite_difference", "double_backward"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_outputs_that_are_made_of_each_other(order, jvp):
    def call(c, out):
        return c(*(out[i] for i in order))

    model = Chained()
    twin = copy.deepcopy(model)
    expected = right(twin(X), lambda *f: call(Combined(), f), twin.parameters())
    check(measured(model, Combined(), lambda m, c: call(c, m(X)), jvp=jvp), expected, 1e-5)


@pytest.mark.parametrize("jvp", ["forward", "double_backward"])
def test_outputs_that_are_made_of_each_other_joined_by_the_loop(jvp):
    model, target = Chained(), torch.randn(12, 9, dtype=DOUBLE)
    twin = copy.deepcopy(model)

    def joined(a, b, c):
        return torch.cat([a * b, b / 2, c], 1)

    optimizer = measured(model, mse, lambda m, c: c(joined(*m(X)), target), jvp=jvp)
    # The criterion's Hessian at what it received.
    expected = right([joined(*twin(X))], lambda f: mse(f, target), twin.parameters())
    check(optimizer, expected)


def test_pieces_of_one_tensor_that_are_made_of_each_other():
    class Pieces(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.last = body(6, 6), nn.Linear(3, 3).to(DOUBLE)

        def forward(self, x):
            a, b = self.body(x).chunk(2, 1)
            return a, b, self.last(a * b)

    model = Pieces()
    twin = copy.deepcopy(model)
    expected = right(twin(X), Combined(), twin.parameters())
    check(measured(model, Combined(), lambda m, c: c(*m(X))), expected)


@pytest.mark.parametrize("optimizer_of", [Adler, AdlerAdam, AdlerScheduleFree, AdlerMuon])
def test_a_variational_autoencoder(optimizer_of):
    """By default, in one argument, with noise between its outputs."""

    class Autoencoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode, self.decode = body(6, 4), body(2, 6)

        def forward(self, x):
            mean, log_variance = self.encode(x).chunk(2, 1)
            z = mean + torch.randn_like(mean) * (log_variance / 2).exp()
            return {"x": self.decode(z), "code": [mean, log_variance], "note": None}

    class Bound(nn.Module):
        def forward(self, out, x):
            mean, log_variance = out["code"]
            divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum() / 2
            return ((out["x"] - x).square().sum() / 2 + divergence) / len(x)

    torch.manual_seed(0)
    model, criterion = Autoencoder(), Bound()
    optimizer = optimizer_of(model.parameters(), model, criterion)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = criterion(model(X), X)
        loss.backward()
        optimizer.step()
        assert bool(optimizer.last_step.trusted)
        losses.append(float(loss.detach()))
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert int(optimizer.last_step.skipped_total) == 0


def soft_triplet(a, p, n):
    return F.softplus((a - p).square().sum(1) - (a - n).square().sum(1)).mean()


class SoftTriplet(nn.Module):
    def forward(self, a, p, n):
        return soft_triplet(a, p, n)


class Agreement(nn.Module):
    """Of two views in one tensor; examples depend on each other."""

    def forward(self, f):
        a, b = f.chunk(2)
        return (a - b).square().mean() + (a.mean(0) + b.mean(0)).square().sum()


@pytest.mark.parametrize("jvp", ["forward", "double_backward"])
def test_a_loss_of_three_calls(jvp):
    model = body()
    twin = copy.deepcopy(model)
    views = X, X.flip(0), X.roll(1, 0)
    optimizer = measured(model, SoftTriplet(), lambda m, c: c(*(m(v) for v in views)), jvp=jvp)
    check(optimizer, right([twin(v) for v in views], soft_triplet, twin.parameters()))


def test_views_concatenated_before_a_loss_of_pairs():
    model, criterion = body(), Agreement()
    twin = copy.deepcopy(model)
    views = X, X + 0.1
    optimizer = measured(model, criterion, lambda m, c: c(torch.cat([m(v) for v in views])))
    outputs = [twin(v) for v in views]
    check(optimizer, right(outputs, lambda *f: criterion(torch.cat(f)), twin.parameters()))


def test_targets_that_depend_on_the_parameters():
    model = body()
    twin = copy.deepcopy(model)
    optimizer = measured(model, mse, lambda m, c: c(m(X), m(X.flip(0)).tanh()))
    outputs = twin(X), twin(X.flip(0)).tanh()
    check(optimizer, right(outputs, mse, twin.parameters()))


def test_options_that_a_criterion_receives_by_keyword_only():
    class Scaled(nn.Module):
        def forward(self, f, y, *, scale=1.0):
            return scale * F.cross_entropy(f, y)

    model = body()
    twin = copy.deepcopy(model)
    optimizer = measured(model, Scaled(), lambda m, c: c(m(X), Y, scale=3.0))
    check(optimizer, right([twin(X)], lambda f: 3 * ce(f, Y), twin.parameters()))


@pytest.mark.parametrize("only", [True, False])
def test_an_option_that_depends_on_the_parameters_is_refused(only):
    class WithTerm(nn.Module):
        if only:

            def forward(self, f, y, *, term):
                return ce(f, y) + term

        else:

            def forward(self, *given, **options):
                return ce(*given) + options["term"]

    x, y = X, Y
    with pytest.raises(RuntimeError, match="term= by keyword only"):
        measured(body(), WithTerm(), lambda m, c: c(m(x), y, term=0.1 * m(x).square().mean()))
    other = nn.Linear(6, 1).to(DOUBLE)
    model = body()
    expected = right([model(x)], lambda f: ce(f, y), model.parameters())
    check(measured(model, WithTerm(), lambda m, c: c(m(x), y, term=other(x).mean())), expected)


@pytest.mark.parametrize("output_fn", [None, lambda out: out, lambda out: out[:, :2]])
def test_the_call_that_made_the_loss_is_found_among_several(output_fn):
    model = body()
    twin = copy.deepcopy(model)

    def loop(m, c):
        first, _ = m(X), m(X[:3])
        return c(first, Y)

    optimizer = measured(model, ce, loop, output_fn=output_fn)
    check(optimizer, right([twin(X)], lambda f: ce(f, Y), twin.parameters()))
