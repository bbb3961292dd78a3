"""Whatever the loop does between model, criterion and backward is measured as it was done."""

import copy
import dataclasses
import gc
import warnings
import weakref

import pytest
import torch
from support.right import DOUBLE, body, check, measured, right
from torch import nn
from torch.nn import functional as F

from adler import Adler, AdlerAdam, AdlerMuon, AdlerScheduleFree, Guard, Measure

ce, mse = nn.CrossEntropyLoss(), nn.MSELoss()


def data(n=12):
    torch.manual_seed(1)
    return torch.randn(n, 6, dtype=DOUBLE), torch.randint(3, (n,))


X, Y = data()
T = torch.randn(12, 3, dtype=DOUBLE)


def in_place(f, operation):
    operation(f)
    return f


# What a loop does with the outputs: from them to what the criterion receives.
ON_THE_WAY = {
    "temperature in place": lambda f: in_place(f, lambda g: g.div_(0.25)),
    "division in place": lambda f: in_place(f, lambda g: g.__itruediv__(0.25)),
    "mask in place": lambda f: in_place(f, lambda g: g.masked_fill_(T > 1, -5.0)),
    "temperature": lambda f: f / 0.25,
    "slice": lambda f: f[:, :3],
    "twice": lambda f: (f * 2).tanh() + f,
    "double then back": lambda f: f.float().double(),
    "reshaped": lambda f: f.reshape(-1, 3),
}


@pytest.mark.parametrize("way", ON_THE_WAY.values(), ids=ON_THE_WAY)
@pytest.mark.parametrize("jvp", ["forward", "finite_difference", "double_backward"])
def test_outputs_changed_on_the_way(way, jvp):
    model = body()
    twin = copy.deepcopy(model)
    optimizer = measured(model, ce, lambda m, c: c(way(m(X)), Y), jvp=jvp)
    # The criterion's Hessian at what it received, as with output_fn.
    expected = right([way(twin(X) * 1)], lambda f: ce(f, Y), twin.parameters())
    check(optimizer, expected, 1e-5)


def test_a_view_changed_in_place_is_refused():
    class Views(nn.Sequential):
        def forward(self, x):
            return super().forward(x)[:, 0]

    model = Views(*body())
    optimizer = Adler(model.parameters(), model, mse, measure=Measure.every_step())
    f = model(X)
    f /= 2
    mse(f, T[:, 0]).backward()
    with pytest.raises(RuntimeError, match="changed in place as a view"):
        optimizer.step()


def test_a_loss_divided_in_place():
    def run(divide):
        model = body()
        torch.manual_seed(0)
        with torch.no_grad():
            for p in model.parameters():
                p.normal_()

        optimizer = Adler(model.parameters(), model, mse, measure=Measure.every_step())
        for a, b in zip(X.chunk(4), T.chunk(4)):
            divide(mse(model(a), b)).backward()
        optimizer.step()
        return optimizer.scalars()

    assert run(lambda h: h / 4) == run(lambda h: in_place(h, lambda g: g.div_(4)))


def test_a_loss_divided_in_place_is_known_undivided():
    """The scale of the bound on predictions is read off the value that the criterion returned."""

    def run(divide):
        torch.manual_seed(0)
        model, guard = body(), Guard(max_kl=1e-4)
        optimizer = Adler(model.parameters(), model, mse, guard=guard, measure=Measure.every_step())
        divide(mse(model(X), T)).backward()
        optimizer.step()
        assert bool(optimizer.last_step.clipped)
        return float(optimizer.last_step.effective_lr)

    assert run(lambda h: in_place(h, lambda g: g.div_(4))) == run(lambda h: h / 4)


@pytest.mark.parametrize("jvp", ["forward", "finite_difference", "double_backward"])
def test_outputs_overwritten_after_the_loss(jvp):
    """As for a log of probabilities: the loss was computed from what was there before."""
    model = body()
    twin = copy.deepcopy(model)

    def loop(m, c):
        f = m(X)
        loss = c(f, Y)
        f.detach().mul_(5)
        return loss

    optimizer = measured(model, ce, loop, jvp=jvp)
    check(optimizer, right([twin(X)], lambda f: ce(f, Y), twin.parameters()), 1e-5)


# --- backward, and what is not --------------------------------------------------------------------


def test_a_look_at_the_gradient_does_not_count():
    model = body()
    twin = copy.deepcopy(model)

    def loop(m, c):
        loss = c(m(X), Y)
        torch.autograd.grad(loss, m[2].weight, retain_graph=True)
        torch.autograd.grad(loss, list(m.parameters()), retain_graph=True)
        return loss

    expected = right([twin(X)], lambda f: ce(f, Y), twin.parameters())
    check(measured(model, ce, loop), expected)


def test_an_attack_with_the_same_criterion_does_not_count():
    model = body()
    twin = copy.deepcopy(model)
    adversarial = X.clone()

    def loop(m, c):
        nonlocal adversarial
        for p in m.parameters():
            p.grad = torch.zeros_like(p)  # gradients accumulate
        for _ in range(3):
            adversarial = adversarial.detach().requires_grad_()
            (g,) = torch.autograd.grad(c(m(adversarial), Y), adversarial)
            adversarial = adversarial.detach() + 0.1 * g.sign()
        return c(m(adversarial), Y)

    optimizer = measured(model, ce, loop)
    check(optimizer, right([twin(adversarial)], lambda f: ce(f, Y), twin.parameters()))


def test_a_backward_for_some_parameters_counts():
    model = body()
    optimizer = Adler(model.parameters(), model, ce, measure=Measure.every_step())
    twin = copy.deepcopy(model)
    ce(model(X), Y).backward(inputs=[model[2].weight])
    optimizer.step()
    expected = right([twin(X)], lambda f: ce(f, Y), [twin[2].weight])
    assert float(optimizer.last_step.curvature) == pytest.approx(expected)


def test_a_second_backward_adds_its_weight():
    model = body()
    twin = copy.deepcopy(model)

    def loop(m, c):
        loss = c(m(X), Y)
        loss.backward(retain_graph=True)
        return 2 * loss

    optimizer = measured(model, ce, loop)
    check(optimizer, right([twin(X)], lambda f: 3 * ce(f, Y), twin.parameters()))


def test_gradients_zeroed_in_place_by_another_forget_the_batch():
    model = body()
    twin = copy.deepcopy(model)
    optimizer = Adler(model.parameters(), model, ce, measure=Measure.every_step())
    other = torch.optim.SGD(model.parameters(), lr=0.0)
    ce(model(X), Y).backward()
    other.zero_grad(set_to_none=False)
    ce(model(X[:5]), Y[:5]).backward()
    optimizer.step()
    check(optimizer, right([twin(X[:5])], lambda f: ce(f, Y[:5]), twin.parameters()))


def test_zero_grad_in_place_forgets_the_batch():
    model = body()
    twin = copy.deepcopy(model)
    optimizer = Adler(model.parameters(), model, ce, measure=Measure.every_step())
    ce(model(X), Y).backward()
    optimizer.zero_grad(set_to_none=False)
    ce(model(X[:5]), Y[:5]).backward()
    optimizer.step()
    check(optimizer, right([twin(X[:5])], lambda f: ce(f, Y[:5]), twin.parameters()))


@pytest.mark.parametrize("before", [0, 1])
def test_a_forward_pass_between_a_clipped_gradient_and_the_step(before):
    """It looks whether the gradients were zeroed, and they were only changed."""
    model = body()
    twin = copy.deepcopy(model)

    def loop(m, c):
        c(m(X), Y).backward()
        g = torch.nn.utils.clip_grad_norm_(m.parameters(), 1e-2)
        assert g > 1e-2
        (m[2] if before else m)(torch.randn(3, 8 if before else 6, dtype=DOUBLE))

    optimizer = Adler(model.parameters(), model, ce, measure=Measure.every_step())
    loop(model, ce)
    d = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    expected = right([twin(X)], lambda f: ce(f, Y), twin.parameters(), d)
    assert float(optimizer.last_step.curvature) == pytest.approx(expected)


# --- several heads, calls, arguments --------------------------------------------------------------


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

    x, y = data()
    with pytest.raises(RuntimeError, match="term= by keyword only"):
        measured(body(), WithTerm(), lambda m, c: c(m(x), y, term=0.1 * m(x).square().mean()))
    other = nn.Linear(6, 1).to(DOUBLE)
    model = body()
    expected = right([model(x)], lambda f: ce(f, y), model.parameters())
    check(measured(model, WithTerm(), lambda m, c: c(m(x), y, term=other(x).mean())), expected)


def test_a_forgotten_squeeze_is_followed():
    model = body(6, 1)
    twin, bce = copy.deepcopy(model), nn.BCEWithLogitsLoss()
    y = (Y > 0).double()
    optimizer = measured(model, bce, lambda m, c: c(m(X).squeeze(-1), y), output_fn=lambda out: out)
    expected = right([twin(X)], lambda f: bce(f.squeeze(-1), y), twin.parameters())
    check(optimizer, expected)


def test_a_scaler_that_the_loop_has_unscaled_keeps_the_weights():
    def run(unscale):
        torch.manual_seed(0)
        model = nn.Linear(6, 3)
        optimizer = Adler(model.parameters(), model, ce, measure=Measure.every_step())
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        f = model(X.float())
        scaler.scale(ce(f, Y) + 2 * ce(f, Y.flip(0))).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        return float(optimizer.last_step.curvature)

    assert run(True) == pytest.approx(run(False), rel=1e-5)


def test_a_group_whose_rate_is_zero_does_not_enter():
    model = body()
    twin = copy.deepcopy(model)
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters()}]
    optimizer = Adler(groups, model, ce, measure=Measure.every_step())
    before = copy.deepcopy(model[0].state_dict())
    ce(model(X), Y).backward()
    optimizer.step()
    check(optimizer, right([twin(X)], lambda f: ce(f, Y), twin[2].parameters()))
    assert all(v.equal(before[k]) for k, v in model[0].state_dict().items())


@pytest.mark.parametrize("kind", [Adler, AdlerAdam])
def test_a_layer_frozen_half_way_does_not_enter(kind):
    model = body()
    optimizer = kind(model.parameters(), model, ce, measure=Measure.every_step())
    for _ in range(2):
        optimizer.zero_grad()
        ce(model(X), Y).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    model[0].requires_grad_(False)  # its old gradients stay
    before = copy.deepcopy(model[0].state_dict())
    ce(model(X), Y).backward()
    slope = sum(float((p.grad * p.grad).sum()) for p in model[2].parameters())
    optimizer.step()
    if kind is Adler:
        assert float(optimizer.last_step.slope) == pytest.approx(slope)
    assert bool(optimizer.last_step.trusted)
    assert all(v.equal(before[k]) for k, v in model[0].state_dict().items())


def test_warm_up_from_zero_measures():
    model = body()
    optimizer = Adler(model.parameters(), model, ce, lr=0.0, measure=Measure.every_step())
    before = copy.deepcopy(model.state_dict())
    ce(model(X), Y).backward()
    optimizer.step()
    assert float(optimizer.last_step.effective_lr) > 0
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("output_fn", [None, lambda out: out, lambda out: out[:, :2]])
def test_the_call_that_made_the_loss_is_found_among_several(output_fn):
    model = body()
    twin = copy.deepcopy(model)

    def loop(m, c):
        first, _ = m(X), m(X[:3])
        return c(first, Y)

    optimizer = measured(model, ce, loop, output_fn=output_fn)
    check(optimizer, right([twin(X)], lambda f: ce(f, Y), twin.parameters()))


# --- nothing is kept ------------------------------------------------------------------------------


def test_a_forward_that_nobody_differentiates_is_freed():
    model = body()
    optimizer = Adler(model.parameters(), model, ce, measure=Measure.every_step())
    x = X.clone()
    loss = ce(model(x) / 2, Y)
    node = weakref.ref(loss)
    del loss
    gc.collect()
    assert node() is None
    assert optimizer.last_step is None


def test_steps_between_measurements_keep_nothing():
    model = body()
    optimizer = Adler(model.parameters(), model, ce, measure=Measure(every=4, warmup=1))
    for step in range(6):
        optimizer.zero_grad()
        outputs = model(X)
        marked = any(outputs.grad_fn.metadata)
        ce(outputs, Y).backward()
        optimizer.step()
        assert marked == (step in (0, 4))
