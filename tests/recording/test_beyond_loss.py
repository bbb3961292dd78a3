"""What the loop makes of losses before it calls backward(): weighted sums are measured, the rest is
refused by name.
"""

import gc
import threading
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.right import DOUBLE, body, check, measured, right
from torch import nn
from torch.nn import functional as F

from adler import Adler, Measure, ModelLoss
from adler._recording.beyond_loss import Marks, not_linear


def data(n=12):
    torch.manual_seed(3)
    return torch.randn(n, 6, dtype=DOUBLE), torch.randn(n, 3, dtype=DOUBLE)


def half(value):
    value /= 2
    return value


LINEAR = {
    "divided": lambda a, b: a / 4,
    "divided by a tensor": lambda a, b: a / torch.tensor(4.0),
    "divided in place": lambda a, b: half(a),
    "scaled": lambda a, b: a * torch.tensor(3.0),
    "scaled by itself, detached": lambda a, b: a / b.detach() + b * a.detach(),
    "summed": lambda a, b: sum([a, b]),
    "subtracted": lambda a, b: 2 - (3 - a) + 0.5 * b,
    "stacked": lambda a, b: torch.stack([a, b]).mean(),
    "weighted": lambda a, b: torch.stack([a, b]) @ torch.tensor([0.3, 0.7], dtype=DOUBLE),
    "mixed": lambda a, b: torch.lerp(a, b, 0.2),
    "mixed by a tensor": lambda a, b: torch.lerp(a, b, torch.tensor(0.2, dtype=DOUBLE)),
    "reshaped": lambda a, b: torch.cat([a.view(1), b[None]]).reshape(2, 1).T.sum(),
    "copied": lambda a, b: a.clone().to(torch.float64).contiguous(),
    "flooded": lambda a, b: (a - 0.01).abs() + 0.01,
    "clamped": lambda a, b: a.clamp(max=1e6),
    "the worst": lambda a, b: torch.maximum(a, b) + torch.stack([a, b]).max(),
    "the worst of several": lambda a, b: torch.stack([a, b]).topk(1)[0].sum(),
    "chosen": lambda a, b: torch.where(torch.tensor(True), a, b),
    "beside a penalty of nothing": lambda a, b: a + torch.zeros((), requires_grad=True).exp(),
}
CURVED = {
    "SqrtBackward": lambda a, b: a.sqrt(),
    "PowBackward": lambda a, b: b + a**2 / 2,
    "ExpBackward": lambda a, b: a.exp(),
    "LogBackward": lambda a, b: (a + 1).log(),
    "MulBackward": lambda a, b: a * b,
    "DivBackward": lambda a, b: a / (b + 1),
    "LogsumexpBackward": lambda a, b: torch.stack([a, b]).logsumexp(0),
    "LinalgVectorNormBackward": lambda a, b: torch.stack([a, b]).norm(),
    "DotBackward": lambda a, b: torch.stack([a, b]) @ torch.stack([b, a]),
    "SoftplusBackward": lambda a, b: F.softplus(a - 1),
}


def two_losses(way):
    """A loop with two calls of the criterion, one of them of a part of the batch."""
    x, y = data()
    return lambda m, c: way(c(m(x), y), c(m(x[:5]) * 2, y[:5]))


def wanted(model, way):
    x, y = data()

    def loss(outputs, part):
        return way(F.mse_loss(outputs, y), F.mse_loss(part * 2, y[:5]))

    return right([model(x), model(x[:5])], loss, model.parameters())


@pytest.mark.parametrize("way", LINEAR.values(), ids=LINEAR)
def test_a_weighted_sum_of_losses_is_measured(way):
    model = body()
    expected = wanted(model, way)
    check(measured(model, nn.MSELoss(), two_losses(way)), expected)


@pytest.mark.parametrize("name", CURVED)
def test_another_function_of_losses_is_refused_by_name(name):
    with pytest.raises(RuntimeError, match=f"{name} is applied to them"):
        measured(body(), nn.MSELoss(), two_losses(CURVED[name]))


def test_the_remedy_measures_what_was_refused():
    class Criterion(nn.Module):
        def forward(self, outputs, targets):
            return F.mse_loss(outputs, targets).sqrt()

    model, (x, y) = body(), data()
    expected = right([model(x)], lambda o: F.mse_loss(o, y).sqrt(), model.parameters())
    check(measured(model, Criterion(), lambda m, c: c(m(x), y)), expected)


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def test_an_operation_that_nothing_is_known_of_is_refused():
    with pytest.raises(RuntimeError, match="OwnBackward is applied to them"):
        measured(body(), nn.MSELoss(), two_losses(lambda a, b: Own.apply(a)))


# Ways to make a number out of two, with what nothing is known of to the test: it differentiates.
_STEPS = [
    lambda a, b: a + 2 * b,
    lambda a, b: a - b / 3,
    lambda a, b: torch.stack([b, a]).mean(),
    lambda a, b: a.view(1).expand(3).sum() + b,
    lambda a, b: a * 0.7,
    lambda a, b: a * b,
    lambda a, b: a / (b.detach().abs() + 1),
    lambda a, b: a / (b.abs() + 1),
    lambda a, b: (a * a + 1).sqrt(),
    lambda a, b: a.tanh() + b,
    lambda a, b: a * 0 + b,
]


@settings(deadline=None, max_examples=200, derandomize=True)
@given(
    steps=st.lists(st.sampled_from(range(len(_STEPS))), min_size=1, max_size=4),
    swaps=st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_what_curves_is_refused_and_what_does_not_is_measured(steps, swaps):
    def way(a, b):
        for k, swap in zip(steps, swaps):
            made = _STEPS[k](a, b)
            a, b = (b, made) if swap else (made, a)
        return a

    at = torch.tensor([0.3, 0.5], dtype=DOUBLE)
    second = torch.autograd.functional.hessian(lambda z: way(z[0], z[1]), at)
    model = body()
    if bool(second.abs().sum() > 1e-9):
        with pytest.raises(RuntimeError, match="is applied to them"):
            measured(model, nn.MSELoss(), two_losses(way))
        return
    expected = wanted(model, way)
    try:
        optimizer = measured(model, nn.MSELoss(), two_losses(way))
    except RuntimeError as error:  # flagged without need: of products with what is zero here
        assert "is applied to them" in str(error)  # noqa: PT017
        assert {5, 7, 8, 9} & set(steps)
        return
    if expected > 0:  # (else the empirical Fisher matrix takes its place)
        assert float(optimizer.last_step.curvature) == pytest.approx(expected, rel=1e-6)


def test_the_loss_that_a_model_returns():
    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = body()

        def forward(self, x, y):
            outputs = self.body(x)
            return outputs, F.mse_loss(outputs, y)

    def step(way):
        described = ModelLoss(
            nn.MSELoss(),
            outputs=lambda result: result[0],
            targets=lambda x, y: y,
            loss=lambda result: result[1],
        )
        model = WithLoss()
        optimizer = Adler(model.parameters(), model, described, measure=Measure.every_step())
        way(model(*data())[1]).backward()
        optimizer.step()
        return optimizer

    assert bool(step(lambda loss: loss / 3).last_step.trusted)
    with pytest.raises(RuntimeError, match="ExpBackward is applied to them"):
        step(torch.exp)


def test_gradients_zeroed_between_the_loss_and_backward():
    model, criterion, (x, y) = body(), nn.MSELoss(), data()
    optimizer = Adler(model.parameters(), model, criterion, measure=Measure.every_step())
    root = criterion(model(x), y).sqrt()
    optimizer.zero_grad()
    root.backward()
    with pytest.raises(RuntimeError, match="SqrtBackward"):
        optimizer.step()
    optimizer.zero_grad()  # and the next step is not refused for what the last one did
    criterion(model(x), y).backward()
    optimizer.step()
    assert bool(optimizer.last_step.trusted)


def test_one_of_several_micro_batches():
    model, criterion, (x, y) = body(), nn.MSELoss(), data()
    optimizer = Adler(model.parameters(), model, criterion, measure=Measure.every_step())
    (criterion(model(x[:6]), y[:6]) / 2).backward()
    (criterion(model(x[6:]), y[6:]) / 2).sqrt().backward()
    with pytest.raises(RuntimeError, match="SqrtBackward"):
        optimizer.step()


def test_a_look_at_another_function_does_not_count():
    x, y = data()

    def loop(model, criterion):
        loss = criterion(model(x), y)
        torch.autograd.grad(loss.sqrt(), list(model.parameters()), retain_graph=True)
        return loss

    model = body()
    expected = right([model(x)], lambda o: F.mse_loss(o, y), model.parameters())
    check(measured(model, nn.MSELoss(), loop), expected)


def test_a_look_at_a_loss_that_cannot_be_replayed_does_not_count():
    x, y = data()

    def loop(model, criterion):
        penalised = criterion(model(x) + model[0].weight.sum(), y)
        torch.autograd.grad(penalised, list(model.parameters()))
        return criterion(model(x), y)

    model = body()
    expected = right([model(x)], lambda o: F.mse_loss(o, y), model.parameters())
    check(measured(model, nn.MSELoss(), loop), expected)


def test_what_a_criterion_keeps_beside_the_loss_is_no_loss():
    class Parts(nn.Module):
        def forward(self, outputs, targets):
            parts = (outputs - targets).square().mean(0)[:2].unbind()
            self.kept = parts[1]
            return parts[0]

    x, y = data()
    model, criterion = body(), Parts()
    expected = right([model(x)], lambda o: F.mse_loss(o[:, 0], y[:, 0]), model.parameters())
    loop = lambda m, c: c(m(x), y) + 0 * c.kept.sqrt()  # noqa: E731
    check(measured(model, criterion, loop), expected)


def test_an_operation_between_two_losses():
    x, y = data()
    with pytest.raises(RuntimeError, match="SqrtBackward is applied to them"):
        measured(body(), nn.MSELoss(), lambda m, c: c(m(x), y).sqrt() + c(m(x[:5]), y[:5]))


def test_thousands_of_operations_before_the_loss_hide_nothing_behind_it():
    model, criterion, (x, y) = body(), nn.MSELoss(), data()
    optimizer = Adler(model.parameters(), model, criterion, measure=Measure.every_step())
    criterion(model(x), y).backward()
    optimizer.step()
    other = torch.zeros((), dtype=DOUBLE, requires_grad=True)
    total = other * 1
    for _ in range(20_000):
        total = total + other
    optimizer.zero_grad()
    (criterion(model(x), y).sqrt() + total).backward()
    with pytest.raises(RuntimeError, match="SqrtBackward is applied to them"):
        optimizer.step()


def differentiates_edges():
    """PyTorch 2.6 does not."""
    leaf = torch.ones((), requires_grad=True)
    edge = torch.autograd.graph.get_gradient_edge(leaf * 2)
    try:
        torch.autograd.backward(edge, torch.ones(()))
    except AssertionError:
        return False
    return True


@pytest.mark.skipif(not differentiates_edges(), reason="backward() takes no edge of the graph")
def test_backward_of_an_edge_of_the_graph():
    model, criterion, (x, y) = body(), nn.MSELoss(), data()
    optimizer = Adler(model.parameters(), model, criterion, measure=Measure.every_step())
    root = criterion(model(x), y).sqrt()
    torch.autograd.backward(torch.autograd.graph.get_gradient_edge(root), torch.ones_like(root))
    with pytest.raises(RuntimeError, match="SqrtBackward is applied to them"):
        optimizer.step()


def test_by_autograd_backward_with_other_roots_beside():
    model, criterion, (x, y) = body(), nn.MSELoss(), data()
    optimizer = Adler(model.parameters(), model, criterion, measure=Measure.every_step())
    other = torch.ones((), requires_grad=True)
    torch.autograd.backward([other.exp(), criterion(model(x), y).exp()])
    with pytest.raises(RuntimeError, match="ExpBackward"):
        optimizer.step()


def test_threads_do_not_see_each_others_roots():
    def train(way, say):
        model, criterion, (x, y) = body(), nn.MSELoss(), data()
        optimizer = Adler(model.parameters(), model, criterion, measure=Measure.every_step())
        try:
            for _ in range(20):
                optimizer.zero_grad()
                way(criterion(model(x), y)).backward()
                optimizer.step()
        except RuntimeError as error:
            say.append(str(error))

    said = [[] for _ in range(4)]
    ways = [torch.sqrt, lambda loss: loss / 2] * 2
    threads = [threading.Thread(target=train, args=pair) for pair in zip(ways, said)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ["SqrtBackward" in "".join(s) for s in said] == [True, False, True, False]
    assert not said[1]
    assert not said[3]


@pytest.mark.parametrize("last", [0, 1])
def test_from_a_thread_of_the_engine_the_pass_of_the_losses_is_found(last):
    """A hook for a loss on an accelerator runs there, while other threads differentiate too."""
    marks, leaf = Marks(), torch.ones((), requires_grad=True)
    loss = leaf * 2
    marks.add(loss)
    roots = [loss.sqrt(), torch.ones((), requires_grad=True).exp()]
    inside, done = [threading.Event() for _ in roots], threading.Event()
    for root, event in zip(roots, inside):
        root.register_hook(lambda _, event=event: (event.set(), done.wait(60))[:0] or None)
    threads = [threading.Thread(target=root.backward) for root in roots]
    for k in (1 - last, last):
        threads[k].start()
        assert inside[k].wait(60)
    try:
        assert not_linear(marks) == "SqrtBackward0"
    finally:
        done.set()
        for thread in threads:
            thread.join()


def test_thousands_of_losses_in_a_running_sum():
    model, criterion, (x, y) = body(), nn.MSELoss(), data()
    optimizer = Adler(model.parameters(), model, criterion, measure=Measure.every_step())
    outputs = model(x)
    total = criterion(outputs, y)
    for _ in range(3000):
        total = total + 0.0 * total.detach()
    total.backward()
    optimizer.step()
    assert bool(optimizer.last_step.trusted)


def test_the_marks_keep_no_loss_alive():
    class Token:
        pass

    model, criterion, (x, y) = body(), nn.MSELoss(), data()
    optimizer = Adler(model.parameters(), model, criterion, measure=Measure.every_step())
    loss = criterion(model(x), y)
    token = Token()
    loss.grad_fn.metadata["token"] = token  # which lives as long as the graph
    alive = weakref.ref(token)
    root = loss / 2
    del token, loss
    gc.collect()
    assert alive() is not None
    del root
    gc.collect()
    assert alive() is None
    assert optimizer.last_step is None


def test_a_backward_pass_keeps_no_frame_alive():
    class Token:
        pass

    def train():
        token = Token()  # in the frame that calls backward()
        model, criterion, (x, y) = body(), nn.MSELoss(), data()
        optimizer = Adler(model.parameters(), model, criterion, measure=Measure.every_step())
        (criterion(model(x), y) / 2).backward()
        optimizer.step()
        return weakref.ref(token), weakref.ref(optimizer)

    gc.collect()
    gc.disable()
    try:
        assert [alive() for alive in train()] == [None, None]
    finally:
        gc.enable()
