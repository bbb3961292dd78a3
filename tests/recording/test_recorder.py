"""What the hooks see, which call they link to which loss, and that they leave nothing behind."""

import copy
import gc
import io
import pickle
import threading
import weakref
from typing import ClassVar

import pytest
import torch
from support.cases import classification, flat
from support.loops import train
from support.options import EXACT, measuring
from support.right import check, right
from torch import nn
from torch.nn import functional as F

from adler import Adler


def setting():
    return classification(n=12)


def hooks(module):
    return len(module._forward_hooks) + len(module._forward_pre_hooks)


def plain_step():
    """Parameters after one step of the ordinary loop."""
    model, criterion, x, y = setting()
    train(model, criterion, Adler(model.parameters(), model, criterion, **EXACT), [(x, y)])
    return flat(model)


# --- loops that hooks cannot see ------------------------------------------------------------------


def test_a_functional_loss_with_explicit_targets():
    model, criterion, x, y = setting()
    optimizer = Adler(model.parameters(), model, criterion, **EXACT)
    F.cross_entropy(model(x), y).backward()
    optimizer.step(targets=y)
    torch.testing.assert_close(flat(model), plain_step(), rtol=1e-12, atol=1e-12)


def test_a_criterion_that_is_a_function():
    model, _, x, y = setting()
    optimizer = Adler(model.parameters(), model, F.cross_entropy, **EXACT)
    F.cross_entropy(model(x), y).backward()
    optimizer.step(targets=y)
    torch.testing.assert_close(flat(model), plain_step(), rtol=1e-9, atol=1e-12)


def test_explicit_inputs_and_targets_without_any_hook():
    model, criterion, x, y = setting()
    optimizer = Adler(model.parameters(), model, criterion, **EXACT)
    optimizer.remove_hooks()
    criterion(model(x), y).backward()
    optimizer.step(inputs=x, targets=y)
    torch.testing.assert_close(flat(model), plain_step(), rtol=1e-12, atol=1e-12)
    assert hooks(model) == hooks(criterion) == 0


def test_a_loss_computed_inside_the_model():
    class WithLoss(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body = body

        def forward(self, x, labels=None):
            logits = self.body(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    body, criterion, x, y = setting()
    model = WithLoss(body)
    optimizer = Adler(
        model.parameters(), model, criterion, output_fn=lambda output: output["logits"], **EXACT
    )
    model(x, labels=y)["loss"].backward()
    optimizer.step(targets=y)
    torch.testing.assert_close(flat(model), plain_step(), rtol=1e-12, atol=1e-12)


def test_outputs_reshaped_before_the_loss():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7)).double()
    twin, criterion = copy.deepcopy(model), nn.CrossEntropyLoss()
    tokens = torch.randint(7, (5, 6))
    shift = lambda out: out[:, :-1].reshape(-1, 7)  # noqa: E731
    optimizer = Adler(model.parameters(), model, criterion, output_fn=shift, **EXACT)
    criterion(shift(model(tokens)), tokens[:, 1:].reshape(-1)).backward()
    optimizer.step()
    criterion(twin(tokens)[:, :-1].transpose(1, 2), tokens[:, 1:]).backward()
    expected = Adler(
        twin.parameters(),
        twin,
        criterion,
        output_fn=lambda out: out[:, :-1].transpose(1, 2),
        **EXACT,
    )
    expected.step(inputs=tokens, targets=tokens[:, 1:])
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-12, atol=1e-12)


def test_explicit_inputs_that_were_recorded_bring_their_dropout_mask():
    def step(explicit):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.8), nn.Linear(50, 3)).double()
        criterion = nn.CrossEntropyLoss()
        x, y = torch.randn(6, 4).double(), torch.randint(3, (6,))
        optimizer = Adler(model.parameters(), model, criterion, **EXACT)
        criterion(model(x), y).backward()
        torch.randn(100)
        optimizer.step(**({"inputs": x, "targets": y} if explicit else {}))
        return flat(model)

    torch.testing.assert_close(step(True), step(False), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("other", [lambda x: x[:4], lambda x: x.T], ids=["a part", "transposed"])
def test_explicit_inputs_that_share_memory_with_recorded_ones(other):
    model, criterion = nn.Linear(6, 3).double(), nn.CrossEntropyLoss()
    x, y = torch.randn(6, 6).double(), torch.randint(3, (6,))
    expected = right([model(x)], lambda f: criterion(f, y), model.parameters())
    optimizer = Adler(model.parameters(), model, criterion, **EXACT)
    F.cross_entropy(model(x), y).backward()
    model(other(x))
    optimizer.step(inputs=x, targets=y)
    check(optimizer, expected)


def test_several_inputs_targets_and_keyword_criterion():
    class Bilinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()

        def forward(self, a, *, b):
            return self.left(a) * self.right(b)

    torch.manual_seed(0)
    model, criterion = Bilinear(), nn.GaussianNLLLoss()
    a, b = torch.randn(2, 5, 3).double()
    y, var = torch.randn(5, 2).double(), torch.rand(5, 2).double()
    twin = copy.deepcopy(model)
    optimizer = Adler(model.parameters(), model, criterion, **EXACT)
    criterion(target=y, input=model(a, b=b), var=var).backward()
    optimizer.step()
    other = Adler(twin.parameters(), twin, criterion, **EXACT)
    criterion(twin(a, b=b), y, var).backward()
    other.step()
    assert flat(model).equal(flat(twin))
    assert float(optimizer.last_step.curvature) == float(other.last_step.curvature)


# --- which record --------------------------------------------------------------------------------


def test_two_networks_in_one_loop():
    """A GAN: two optimizers, a shared criterion, one network inside the other's loss."""
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    critic = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    both, criterion = nn.Sequential(generator, critic), nn.BCEWithLogitsLoss()
    for_critic = Adler(critic.parameters(), critic, criterion, **EXACT)
    for_generator = Adler(generator.parameters(), both, criterion, **EXACT)
    one, zero = torch.ones(16, 1).double(), torch.zeros(16, 1).double()
    for _ in range(5):
        real, noise = torch.randn(16, 2).double() + 3, torch.randn(16, 2).double()
        for_critic.zero_grad()
        loss = criterion(critic(real), one) + criterion(critic(generator(noise).detach()), zero)
        loss.backward()
        size = sum(p.grad.square().sum() for p in critic.parameters())
        before = flat(generator)
        for_critic.step()
        assert float(for_critic.last_step.slope) == pytest.approx(float(size))
        assert flat(generator).equal(before)

        for_generator.zero_grad()
        criterion(both(noise), one).backward()
        before = flat(critic)
        for_generator.step()
        assert flat(critic).equal(before)
        assert not for_generator.last_step.skipped
    assert for_critic.last_step.skipped_total == for_generator.last_step.skipped_total == 0


class Meeting(nn.Linear):
    """Calls of two threads, of which the first to begin is the first to end."""

    turns: ClassVar = {}  # which is no state of a model

    def forward(self, x):
        begun, until = Meeting.turns.pop(threading.get_ident(), (None, None))
        if begun is not None:
            begun.set()
            assert until.wait(60)
        return super().forward(x)


def test_calls_of_one_model_in_two_threads():
    model, criterion = Meeting(6, 3).double(), nn.CrossEntropyLoss()
    x, y = torch.randn(12, 6).double(), torch.randint(3, (12,))
    parts, outputs = [(x[:4], y[:4]), (x[4:], y[4:])], {}
    loss = lambda a, b: criterion(a, y[:4]) + criterion(b, y[4:])  # noqa: E731
    expected = right([model(part) for part, _ in parts], loss, model.parameters())
    optimizer = Adler(model.parameters(), model, criterion, **EXACT)
    begun, ended = [threading.Event(), threading.Event()], threading.Event()

    def call(k):
        Meeting.turns[threading.get_ident()] = begun[k], (begun[1], ended)[k]
        outputs[k] = model(parts[k][0])
        ended.set()

    threads = [threading.Thread(target=call, args=(k,)) for k in (0, 1)]
    threads[0].start()
    assert begun[0].wait(60)
    threads[1].start()
    for thread in threads:
        thread.join()
    loss(outputs[0], outputs[1]).backward()
    optimizer.step()
    check(optimizer, expected)


def test_two_optimizers_on_one_model():
    model, criterion, x, y = setting()
    first = Adler(model[0].parameters(), model, criterion, **EXACT)
    second = Adler(model[2].parameters(), model, criterion, **EXACT)
    for _ in range(3):
        first.zero_grad()
        second.zero_grad()
        criterion(model(x), y).backward()
        before = flat(model[2])
        first.step()
        assert flat(model[2]).equal(before)
        second.step()
        assert not flat(model[2]).equal(before)
    assert not first.last_step.skipped
    assert not second.last_step.skipped


def test_a_retained_graph_counts_twice_and_after_the_step_anew():
    model, criterion, x, y = setting()
    twin, _, _, _ = setting()
    optimizer, other = (Adler(m.parameters(), m, criterion, **EXACT) for m in (model, twin))
    loss = criterion(model(x), y)
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    optimizer.step()
    (2 * criterion(twin(x), y)).backward()
    other.step()
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-12, atol=1e-12)


def test_a_retained_graph_counts_anew_once_its_gradients_are_zeroed():
    model, criterion, x, y = setting()
    twin, _, _, _ = setting()
    optimizer, other = (Adler(m.parameters(), m, criterion, **EXACT) for m in (model, twin))
    loss = criterion(model(x), y)
    loss.backward(retain_graph=True)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    criterion(twin(x), y).backward()
    other.step()
    assert optimizer.last_step.curvature.equal(other.last_step.curvature)


def test_a_model_called_by_another_in_grad_mode_does_not_disturb():
    model, criterion, x, y = setting()
    copied = copy.deepcopy(model)
    optimizer = Adler(model.parameters(), model, criterion, **EXACT)
    ema = copy.deepcopy(model)  # carries the hooks' inert copies
    criterion(model(x), y).backward()
    criterion(ema(x), y).backward()
    criterion(copied(x), y).backward()
    optimizer.step()
    assert flat(model).equal(plain_step())


# --- errors that say what to do -------------------------------------------------------------------


def refuses(match, act, error=RuntimeError, **options):
    """``act`` raises, and neither parameters nor state have changed."""
    model, criterion, x, y = setting()
    optimizer = Adler(model.parameters(), model, criterion, **{**EXACT, **options})
    train_options = options.get("output_fn")
    if train_options is None:
        train(model, criterion, optimizer, [(x, y)])
    optimizer.zero_grad()
    before, state = flat(model), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error, match=match):
        act(model, criterion, optimizer, x, y)
    assert flat(model).equal(before)
    assert str(optimizer.state_dict()) == str(state)


def test_step_before_any_forward():
    def act(model, criterion, optimizer, x, y):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()

    refuses("the model was not called with gradients enabled", act)


def test_step_twice():
    def act(model, criterion, optimizer, x, y):
        optimizer.step()

    refuses("no parameter has a gradient", act)


def test_backward_not_called():
    def act(model, criterion, optimizer, x, y):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        loss = criterion(model(x), y)
        optimizer.step()
        del loss

    refuses("backward\\(\\) has not reached the recorded loss", act)


def test_criterion_not_called():
    def act(model, criterion, optimizer, x, y):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    refuses(r"pass step\(targets=...\)", act)


def test_outputs_that_do_not_depend_on_the_parameters():
    def act(model, criterion, optimizer, x, y):
        criterion(model(x).detach().requires_grad_(), y).backward()
        optimizer.step()

    refuses("on a loss that depends on the parameters", act)


def test_a_criterion_that_does_not_reduce():
    class Vector(nn.Module):
        def forward(self, outputs, targets):
            return F.cross_entropy(outputs, targets, reduction="none")

    model, _, x, y = setting()
    criterion = Vector()
    optimizer = Adler(model.parameters(), model, criterion, **EXACT)
    criterion(model(x), y).mean().backward()
    with pytest.raises(RuntimeError, match=r"returned shape \(12,\), not a scalar"):
        optimizer.step()


def test_explicit_targets_are_refused_when_it_is_not_certain_which_call():
    def act(model, criterion, optimizer, x, y):
        model(x[:3])
        F.cross_entropy(model(x), y).backward()
        optimizer.step(targets=y)

    refuses("called 2 times.*pass inputs=", act)


@pytest.mark.parametrize("options", [EXACT, measuring(fraction=0.25)], ids=["whole", "part"])
def test_explicit_targets_that_do_not_fit(options):
    def act(model, criterion, optimizer, x, y):
        F.cross_entropy(model(x), y).backward()
        optimizer.step(inputs=x, targets=y[:5])

    match = r"outputs of shape \(12, 3\) with targets of shape \[\(5,\)\]"
    refuses(match, act, ValueError, **options)


@pytest.mark.filterwarnings("ignore:Using a target size")  # PyTorch only warns
def test_explicit_targets_that_would_broadcast():
    torch.manual_seed(0)
    model, criterion = nn.Linear(4, 1), nn.MSELoss()
    x, y = torch.randn(6, 4), torch.randn(6)
    optimizer = Adler(model.parameters(), model, criterion, **EXACT)
    (model(x).squeeze(1) - y).square().mean().backward()
    with pytest.raises(ValueError, match=r"\(6, 1\).*\(6,\)"):
        optimizer.step(targets=y)


def test_inputs_without_targets():
    def act(model, criterion, optimizer, x, y):
        F.cross_entropy(model(x), y).backward()
        optimizer.step(inputs=x)

    refuses("needs targets=", act, ValueError)


# --- nothing left behind --------------------------------------------------------------------------


def test_hooks_go_with_the_optimizer():
    model, criterion, x, y = setting()
    optimizer = Adler(model.parameters(), model, criterion, **EXACT)
    assert hooks(model) == 4  # two record; one follows the mode, one keeps batches for BatchNorm
    assert hooks(criterion) == 2
    train(model, criterion, optimizer, [(x, y)] * 2)
    alive = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert alive() is None
    assert hooks(model) == hooks(criterion) == 0


def test_the_batch_is_freed_after_the_step_and_the_graph_never_held():
    model, criterion, x, y = setting()
    optimizer = Adler(model.parameters(), model, criterion, **EXACT)
    batch, loss = x.clone(), None
    alive = weakref.ref(batch)
    outputs = model(batch)
    node = weakref.ref(outputs.grad_fn) if hasattr(outputs.grad_fn, "__weakref__") else None
    loss = criterion(outputs, y)
    loss.backward()
    optimizer.step()
    del batch, outputs, loss
    gc.collect()
    assert alive() is None
    assert node is None or node() is None


def test_a_forward_that_nobody_differentiates_leaves_nothing():
    model, criterion, x, y = setting()
    optimizer = Adler(model.parameters(), model, criterion, **EXACT)
    seen = []
    for _ in range(5):
        batch = x.clone()
        seen.append(weakref.ref(batch))
        criterion(model(batch), y)
        del batch
    gc.collect()
    assert sum(ref() is not None for ref in seen) <= 1  # the last call, until the next one
    del optimizer


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_models_copy_and_pickle_with_their_hooks_inert(copier):
    model, criterion, x, y = setting()
    optimizer = Adler(model.parameters(), model, criterion, **EXACT)
    twin = copier(model)
    criterion(twin(x), y).backward()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="the model was not called"):
        optimizer.step()


def test_models_save_whole():
    model, criterion, x, _ = setting()
    optimizer = Adler(model.parameters(), model, criterion, **EXACT)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=False)(x).equal(model(x))
    del optimizer
