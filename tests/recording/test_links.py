"""Whatever the loop does between model, criterion and backward is measured as it was done."""

import copy
import gc
import weakref

import pytest
import torch
from support.right import DOUBLE, body, check, measured, right
from torch import nn

from adler import Adler, AdlerAdam, Guard, Measure

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


# --- what else a loop may do ---------------------------------------------------------------------


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
