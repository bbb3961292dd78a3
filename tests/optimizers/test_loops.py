"""Loops as people write them: mixed precision, clipping, accumulation, models of many kinds."""

import copy
import math
import re
import warnings
from dataclasses import dataclass

import pytest
import torch
from support.cases import classification as setting
from support.cases import flat
from support.launch import ROOT, torchrun
from support.loops import train
from support.needs import fsdp_on_cpu
from support.options import EXACT, TRUST_REGION
from torch import nn
from torch.utils.checkpoint import checkpoint

from adler import Adler, AdlerAdam, AdlerScheduleFree, Guard
from adler import _distributed as distributed
from adler.curvature import quadratic_form
from examples.programs import loop, mixed_precision


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


# --- mixed precision ------------------------------------------------------------------------------


@pytest.mark.row("Autocast and GradScaler, bf16 and fp16")
@pytest.mark.parametrize("kind", [Adler, AdlerAdam, AdlerScheduleFree])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rates_under_autocast_and_a_scaler_are_those_of_float32(dtype, kind):
    def rates(scale, enabled):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 5))
        criterion, scaler = nn.CrossEntropyLoss(), torch.amp.GradScaler("cpu", scale)
        x, y = torch.randn(256, 16), torch.randint(5, (256,))
        optimizer = kind(model.parameters(), model, criterion)
        found = []
        for _ in range(5):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype, enabled=enabled):
                loss = criterion(model(x), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            found.append(float(optimizer.last_step.effective_lr))
        return found

    assert rates(2.0**10, True) == pytest.approx(rates(1.0, False), rel=0.02)


@pytest.mark.row("Autocast and GradScaler, bf16 and fp16")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_mixed_precision_example(dtype, capsys):
    first, last = mixed_precision.main(dtype, steps=15)
    assert last < 0.5 * first


@pytest.mark.row("Plain loop")
def test_the_plain_example(capsys):
    assert loop.main(epochs=3) > 0.9


def test_the_loop_of_the_examples_goes_on_where_it_was(tmp_path):
    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    loop.main(epochs=3, checkpoint=whole)
    for epochs in (2, 2, 3):  # finished, asked again, and more of it
        loop.main(epochs=epochs, checkpoint=parts)
    a, b = torch.load(whole), torch.load(parts)
    assert a["epochs"] == b["epochs"] == 3
    # (Running statistics come from batches of both runs, which no checkpoint holds.)
    for name, _ in loop.network().named_parameters():
        assert torch.equal(a["model"][name], b["model"][name]), name
    assert min(a["accuracy"], b["accuracy"]) > 0.9


# --- clipping and accumulation --------------------------------------------------------------------


@pytest.mark.row("Gradient clipping, norm and value")
@pytest.mark.parametrize("bounded", [False, True])
def test_clipping_by_norm_shortens_the_step_and_leaves_the_rate(bounded):
    model, criterion, x, y = setting()
    twin = copy.deepcopy(model)
    # The bounds on predictions and weights are on the step itself: they meet a clipped one later.
    options = {
        "eps": 0.0,
        "guard": Guard(max_kl=0.1, max_relative_change=None) if bounded else TRUST_REGION,
    }
    clipped, plain = (Adler(m.parameters(), m, criterion, **options) for m in (model, twin))
    criterion(model(x), y).backward()
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), 0.01))
    factor = 0.01 / (norm + 1e-6)
    start = flat(model)
    clipped.step()
    train(twin, criterion, plain, [(x, y)])
    assert factor < 0.1
    rates = [float(o.last_step.minibatch_lr) for o in (clipped, plain)]
    assert rates[0] == pytest.approx(rates[1], rel=1e-10)
    if bounded:
        assert bool(plain.last_step.clipped)
        ratio = float(clipped.last_step.effective_lr / plain.last_step.effective_lr)
        assert 1 < ratio <= 1 / factor  # nearer to the minimiser, no longer than the plain step
        factor *= ratio
    torch.testing.assert_close(flat(model) - start, factor * (flat(twin) - start))


@pytest.mark.row("Gradient clipping, norm and value")
def test_clipping_by_value_measures_along_what_is_left():
    """η = d·d / c(d), which is no more than the minimiser g·d / c(d) along d."""
    model, criterion, x, y = setting()
    optimizer = Adler(model.parameters(), model, criterion, eps=0.0, **EXACT)
    criterion(model(x), y).backward()
    before = gradients(model)
    nn.utils.clip_grad_value_(model.parameters(), 0.02)
    d = gradients(model)
    c = float(quadratic_form(model, model.parameters(), x, y, criterion, d))
    optimizer.step()
    size = sum(float((p * p).sum()) for p in d)
    slope = sum(float((g * p).sum()) for g, p in zip(before, d))
    assert float(optimizer.last_step.minibatch_lr) == pytest.approx(size / c, rel=1e-9)
    assert size < 0.9 * slope  # it did clip


@pytest.mark.row("Gradient accumulation")
def test_a_curvature_of_the_last_micro_batch_alone_is_unbiased():
    """c of the whole is the mean of the micro-batches' along the same direction."""
    found, whole = [], None
    for last in range(4):
        model, criterion, x, y = setting()
        optimizer = Adler(model.parameters(), model, criterion, eps=0.0, **EXACT)
        parts = [slice(6 * k, 6 * k + 6) for k in range(4)]
        for rows in parts:
            (criterion(model(x[rows]), y[rows]) / 4).backward()
        with pytest.warns(RuntimeWarning, match="contradicts the training pass"):
            optimizer.step(inputs=x[parts[last]], targets=y[parts[last]])  # one of four: is told
        found.append(optimizer.last_step)
        if whole is None:
            model, criterion, x, y = setting()
            optimizer = Adler(model.parameters(), model, criterion, eps=0.0, **EXACT)
            train(model, criterion, optimizer, [(x, y)])
            whole = optimizer.last_step
    curvatures = [float(record.curvature) for record in found]
    assert sum(curvatures) / 4 == pytest.approx(float(whole.curvature), rel=1e-9)
    for record in found:
        assert float(record.slope) == pytest.approx(float(whole.slope), rel=1e-9)
    assert max(curvatures) / min(curvatures) > 1.05  # and noisy


# --- which record ---------------------------------------------------------------------------------


@pytest.mark.row("Several forwards, teachers, averages of weights")
def test_a_teacher_and_an_average_of_weights_do_not_disturb():
    model, criterion, x, y = setting()
    twin = copy.deepcopy(model)
    optimizer, plain = (Adler(m.parameters(), m, criterion) for m in (model, twin))
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=None)
    for _ in range(3):
        with torch.no_grad():
            average(x)
            model(x[:2])
        train(model, criterion, optimizer, [(x, y)])
        average.update_parameters(model)
        train(twin, criterion, plain, [(x, y)])
    assert flat(model).equal(flat(twin))


# --- compiled, checkpointed, frozen ---------------------------------------------------------------


@pytest.mark.row("Activation checkpointing")
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_takes_the_same_steps(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body = body

        def forward(self, x):
            hidden = checkpoint(self.body[:2], x, use_reentrant=reentrant)
            return self.body[2](hidden)

    body, criterion, x, y = setting()
    twin, model = copy.deepcopy(body), Checkpointed(body)
    x.requires_grad_(reentrant)  # reentrant checkpointing drops gradients without it
    optimizer, plain = (Adler(m.parameters(), m, criterion) for m in (model, twin))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, criterion, optimizer, [(x, y)] * 4)
    train(twin, criterion, plain, [(x.detach(), y)] * 4)
    said = [str(w.message) for w in caught if "finite difference" in str(w.message)]
    assert not said  # tangents pass through either
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-5, atol=1e-8)


# PyTorch's own, where a compiled function meets a hook between two of its parts.
@pytest.mark.row("torch.compile, model and step")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_train_step_takes_the_same_steps():
    """The forward and backward in one compiled function; step() stays outside."""
    torch.compiler.reset()
    model, criterion, x, y = setting()
    twin = copy.deepcopy(model)
    optimizer, plain = (Adler(m.parameters(), m, criterion) for m in (model, twin))

    @torch.compile(backend="eager")
    def loss_of(x, y):
        return criterion(model(x), y)

    for _ in range(3):
        optimizer.zero_grad()
        loss_of(x, y).backward()
        optimizer.step()
    train(twin, criterion, plain, [(x, y)] * 3)
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-10, atol=1e-12)


@pytest.mark.row("Frozen base with low-rank adapters")
def test_a_frozen_base_with_low_rank_adapters():
    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(4, 3).requires_grad_(False)
            self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 3, bias=False)
            nn.init.zeros_(self.up.weight)

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    _, criterion, x, y = setting()
    model = Adapted().double()
    base, before = model.base.weight.clone(), criterion(model(x), y).item()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = Adler(trained, model, criterion)
    train(model, criterion, optimizer, [(x, y)] * 10)
    assert model.base.weight.equal(base)
    assert criterion(model(x), y).item() < before
    assert int(optimizer.last_step.skipped_total) == 0


@pytest.mark.row("nn.DataParallel: refused")
def test_data_parallel_is_refused():
    model, criterion, _, _ = setting()
    with pytest.raises(TypeError, match=r"DataParallel.*use .*DistributedDataParallel"):
        Adler(model.parameters(), nn.DataParallel(model), criterion)


# --- models and data of many kinds ----------------------------------------------------------------


@dataclass
class Output:
    logits: torch.Tensor


class Segmenter(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(2, 3, 3, padding=1)

    def forward(self, x):
        return self.body(x)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.body, self.head = kind(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.body(x)[0][:, -1])


class Graph(nn.Module):
    """Mean over the neighbours, then over the nodes of each graph; any number of both."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, nodes, edges, graph, *, count):
        source, target = edges
        messages = torch.zeros_like(nodes).index_add(0, target, nodes[source])
        hidden = torch.tanh(self.body(nodes + messages))
        pooled = hidden.new_zeros(count, 6).index_add(0, graph, hidden)
        return self.head(pooled)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, a, *, b):
        return Output(self.left(a) * torch.tanh(self.right(b)))


def checked_step(model, criterion, call, targets, output_fn=None, **options):
    """One step, its curvature against a second difference of outputs and the loss's Hessian."""
    options = {"output_fn": output_fn, **EXACT, **options}
    optimizer = Adler(model.parameters(), model, criterion, **options)
    pick = output_fn or (lambda outputs: outputs)
    outputs = pick(call())
    criterion(outputs, targets).backward()
    start = [p.detach().clone() for p in model.parameters()]
    d = gradients(model)

    def at(amount):
        with torch.no_grad():
            for p, s, g in zip(model.parameters(), start, d):
                p.copy_(s + amount * g)
            return pick(call())

    v = (at(1e-5) - at(-1e-5)) / 2e-5
    at(0.0)
    other = copy.deepcopy(criterion)  # whose calls are not recorded
    _, expected = torch.autograd.functional.vhp(lambda o: other(o, targets), outputs.detach(), v)
    optimizer.step()
    assert float(optimizer.last_step.curvature) == pytest.approx(
        float((v * expected).sum()), rel=1e-5
    )
    assert not optimizer.last_step.skipped
    return optimizer


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.row("Segmentation")
def test_segmentation():
    torch.manual_seed(0)
    x, y = double(2, 2, 5, 5), torch.randint(3, (2, 5, 5))
    model = Segmenter().double()
    checked_step(model, nn.CrossEntropyLoss(), lambda: model(x), y)


@pytest.mark.row("Language models with padding")
def test_a_language_model_ignores_padding():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Tanh(), nn.Linear(4, 9)).double()
    tokens = torch.randint(9, (3, 7))
    targets = tokens[:, 1:].clone()
    targets[0, 3:] = -100
    records = []
    for padding in (0, 5):
        twin, padded = copy.deepcopy(model), tokens.clone()
        padded[0, 4:] = padding  # what stands where nothing is to be predicted
        optimizer = checked_step(
            twin,
            nn.CrossEntropyLoss(ignore_index=-100),
            lambda twin=twin, padded=padded: twin(padded),
            targets.flatten(),
            output_fn=lambda out: out[:, :-1].flatten(0, 1),
        )
        records.append(float(optimizer.last_step.minibatch_lr))
    assert records[0] == pytest.approx(records[1], rel=1e-9)


@pytest.mark.row("LSTM, GRU, RNN")
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_networks(kind):
    torch.manual_seed(0)
    model, x, y = Recurrent(kind).double(), double(6, 5, 4), torch.randint(3, (6,))
    criterion = nn.CrossEntropyLoss()
    checked_step(model, criterion, lambda: model(x), y)


@pytest.mark.row("Graphs of several sizes")
def test_graphs_of_several_sizes():
    torch.manual_seed(0)
    model, criterion = Graph().double(), nn.CrossEntropyLoss()
    nodes, graph = double(9, 4), torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2])
    edges = torch.tensor([[0, 1, 2, 4, 6, 7], [1, 2, 3, 5, 7, 8]])
    call = lambda: model(nodes, edges, graph, count=3)  # noqa: E731
    optimizer = checked_step(model, criterion, call, torch.tensor([0, 2, 1]))
    optimizer.zero_grad()  # the next batch has other sizes
    criterion(model(nodes[:6], edges[:, :4], graph[:6], count=2), torch.tensor([1, 0])).backward()
    optimizer.step()
    assert not optimizer.last_step.skipped


@pytest.mark.row("Several inputs, dataclass outputs")
def test_several_inputs_and_a_dataclass():
    torch.manual_seed(0)
    model, a, b = TwoInputs().double(), double(6, 4), double(6, 4)
    y = torch.randint(3, (6,))
    pick = lambda output: output.logits  # noqa: E731
    checked_step(model, nn.CrossEntropyLoss(), lambda: model(a, b=b), y, output_fn=pick)


@pytest.mark.row("Complex parameters: refused")
def test_complex_parameters_are_refused():
    model = nn.Linear(4, 3, dtype=torch.complex64)
    with pytest.raises(TypeError, match="complex parameters are not supported"):
        Adler(model.parameters(), model, nn.MSELoss())


# --- several processes ----------------------------------------------------------------------------


def test_one_process_is_alone():
    model, _, _, _ = setting()
    assert distributed.process_groups(None, list(model.parameters())) == []
    values = [torch.tensor(1.0), torch.tensor(math.nan)]
    assert distributed.mean(values, []) == values
    assert distributed.active() is None
    assert distributed.find_ddp(torch.compile(model, backend="eager")) is None


def test_inputs_go_where_the_wrapper_moves_them():
    class Wrapper(nn.Module):
        device_ids, device_type = [0], "meta"

    there = distributed.moved(Wrapper(), ((torch.ones(2),), {"b": [torch.ones(3), "text"]}))
    assert there[0][0].is_meta
    assert there[1]["b"][0].is_meta
    assert distributed.moved(None, "anything") == "anything"


@pytest.mark.long
@pytest.mark.parametrize("mode", ["ddp", pytest.param("fsdp", marks=fsdp_on_cpu)])
def test_the_distributed_example_gives_both_ranks_the_same_rate(mode, tmp_path):
    options = ["--epochs", "2", "--mode", mode]
    if mode == "fsdp":
        options += ["--checkpoint", str(tmp_path / "checkpoint")]
    said = torchrun(ROOT / "examples/programs/ddp.py", *options)
    # Lines of two processes may run into each other.
    rates = re.findall(r"rank (\d), epoch (\d): loss [\d.]+, rate ([\d.]+(?:e-?\d+)?)", said)
    assert len(rates) == 4
    for epoch in ("0", "1"):
        assert len({rate for _, e, rate in rates if e == epoch}) == 1
