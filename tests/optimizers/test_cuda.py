"""The optimizers on a GPU. Skipped where there is none, as on CI."""

import contextlib
import copy
import warnings
from collections import Counter

import pytest
import torch
from support.cases import MAKERS, NETWORKS, batches, flat, network
from support.loops import train, unchanged
from support.options import MODES, measuring
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from adler import Adler, AdlerScheduleFree, Measure, curvature

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

ALL_MODES = {**MODES, "double backward": measuring("double_backward")}
every_mode = pytest.mark.parametrize("options", ALL_MODES.values(), ids=ALL_MODES)
every_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def on_gpu(data):
    return [(x.cuda(), y.cuda()) for x, y in data]


@contextlib.contextmanager
def no_synchronisation():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def dropout():
    torch.manual_seed(0)
    layers = [nn.Linear(64, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, 10)]
    x, y = torch.randn(32, 64), torch.randint(10, (32,))
    return nn.Sequential(*layers).cuda(), x.cuda(), y.cuda()


@every_mode
@every_maker
@pytest.mark.parametrize("name", NETWORKS)
def test_steps_are_those_of_the_cpu(name, make, options):
    criterion = nn.CrossEntropyLoss()
    data = batches(name, criterion, 5)
    cpu = network(name)
    gpu = copy.deepcopy(cpu).cuda()
    for model, seen in ((cpu, data), (gpu, on_gpu(data))):
        train(model, criterion, make(model.parameters(), model, criterion, **options), seen)
    # A finite difference divides rounding, which differs, by its small step.
    # The GPU's kernel takes the rate in float32.
    measure = options.get("measure", Measure())
    tolerance = 1e-4 if measure.jvp == "finite_difference" else 1e-7
    torch.testing.assert_close(flat(gpu).cpu(), flat(cpu), rtol=tolerance, atol=tolerance)


@every_mode
@every_maker
@pytest.mark.parametrize("name", ["batchnorm", "transformer"])
def test_nothing_waits_for_the_device(name, make, options):
    """PyTorch itself raises where the host would wait; the first three measurements may."""
    model, criterion = network(name).cuda(), nn.CrossEntropyLoss()
    optimizer = make(model.parameters(), model, criterion, **options)
    data = on_gpu(batches(name, criterion, 8))
    train(model, criterion, optimizer, data[:5])  # (of which every second may measure)
    with no_synchronisation():
        train(model, criterion, optimizer, data[5:])


def kernels(make, depth):
    """Kernels that a step which does not measure launches."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(depth)], nn.Linear(6, 3)).cuda()
    criterion = nn.CrossEntropyLoss()
    measure = Measure(every=10**9, warmup=0)
    optimizer = make(model.parameters(), model, criterion, measure=measure)
    x, y = torch.randn(8, 6, device="cuda"), torch.randint(3, (8,), device="cuda")
    train(model, criterion, optimizer, [(x, y)] * 2)
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        optimizer.step()
        torch.cuda.synchronize()
    launched = [e.name for e in profiled.events() if e.device_type == DeviceType.CUDA]
    return Counter(name for name in launched if "step" not in name)  # the optimizer's own label


@pytest.mark.parametrize(
    "kind", ["adler", "last-iterate", "momentum", "adam", "schedule-free", "gauss-newton"]
)
def test_kernels_do_not_grow_with_the_number_of_parameters(kind):
    # Of tensors this small, one many-tensor kernel takes all.
    few, many = (kernels(MAKERS[kind], depth) for depth in (2, 12))
    assert not many - few
    assert 0 < few.total() < 150


@pytest.mark.parametrize("jvp", ["forward", "finite_difference", "double_backward"])
def test_dropout_masks_are_those_of_the_training_pass(jvp):
    model, x, y = dropout()
    criterion = nn.CrossEntropyLoss()
    measure = Measure.every_step(jvp)
    optimizer = Adler(model.parameters(), model, criterion, measure=measure)
    for _ in range(3):
        train(model, criterion, optimizer, [(x, y)])
        error = abs(float(optimizer.last_step.consistency) - 1)
        assert error < (0.05 if jvp == "finite_difference" else 1e-4)


def test_a_step_leaves_the_random_state():
    model, x, y = dropout()
    criterion = nn.CrossEntropyLoss()
    optimizer = Adler(model.parameters(), model, criterion)
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    before = torch.cuda.get_rng_state()
    with unchanged(model):
        optimizer.step()
    assert torch.cuda.get_rng_state().equal(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("jvp", "rel"), [("forward", 0.05), ("finite_difference", 0.15)])
def test_curvature_under_autocast(jvp, rel, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)).cuda()
    criterion, scaler = nn.CrossEntropyLoss(), torch.amp.GradScaler("cuda", init_scale=2.0**10)
    measure = Measure.every_step(jvp)
    optimizer = Adler(model.parameters(), model, criterion, measure=measure)
    for seed in range(4):
        torch.manual_seed(seed)
        x, y = torch.randn(128, 64).cuda(), torch.randint(10, (128,)).cuda()
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=dtype):
            loss = criterion(model(x), y)
        scaler.scale(loss).backward()
        twin = copy.deepcopy(model).double()
        scale = scaler.get_scale()
        along = [p.grad.double() / scale for p in model.parameters()]
        exact = curvature.quadratic_form(twin, twin.parameters(), x.double(), y, criterion, along)
        scaler.step(optimizer)
        scaler.update()
        assert float(optimizer.last_step.curvature) == pytest.approx(float(exact), rel=rel)
        assert not optimizer.last_step.skipped


@every_maker
def test_a_saved_state_of_the_gpu_goes_on_anywhere(make, tmp_path):
    criterion, name = nn.CrossEntropyLoss(), "mlp-tanh"
    data = batches(name, criterion, 6)
    gpu = network(name).cuda()
    optimizer = make(gpu.parameters(), gpu, criterion)
    train(gpu, criterion, optimizer, on_gpu(data[:3]))
    torch.save({"model": gpu.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "s")
    saved = torch.load(tmp_path / "s", map_location="cpu")
    cpu = network(name)
    cpu.load_state_dict(saved["model"])
    resumed = make(cpu.parameters(), cpu, criterion)
    resumed.load_state_dict(saved["optimizer"])
    train(gpu, criterion, optimizer, on_gpu(data[3:]))
    train(cpu, criterion, resumed, data[3:])
    # The GPU's kernel takes the rate in float32.
    torch.testing.assert_close(flat(gpu).cpu(), flat(cpu), rtol=1e-6, atol=1e-7)


# --- CUDA graphs ----------------------------------------------------------------------------------


def warmed_up(model, criterion, x, y):
    """As PyTorch asks for before a capture: some passes on another stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            criterion(model(x), y).backward()
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad(set_to_none=True)


@every_maker
def test_a_step_beside_a_captured_graph_is_the_step_without(make):
    """Forward and backward are captured; the step gets the batch, and stays outside."""
    criterion = nn.CrossEntropyLoss()
    plain = network("mlp-tanh").cuda()
    graphed = copy.deepcopy(plain)
    data = on_gpu(batches("mlp-tanh", criterion, 4))
    train(plain, criterion, make(plain.parameters(), plain, criterion), data)
    optimizer = make(graphed.parameters(), graphed, criterion)
    x, y = (t.clone() for t in data[0])
    warmed_up(graphed, criterion, x, y)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        criterion(graphed(x), y).backward()
    for batch in data:
        for static, given in zip((x, y), batch):
            static.copy_(given)
        graph.replay()
        optimizer.step(inputs=x, targets=y)
    torch.testing.assert_close(flat(graphed), flat(plain), rtol=1e-9, atol=1e-9)


def test_a_step_inside_a_captured_graph_is_refused_and_nothing_moves():
    model, criterion = network("mlp-tanh").cuda(), nn.CrossEntropyLoss()
    optimizer = Adler(model.parameters(), model, criterion)
    ((x, y),) = on_gpu(batches("mlp-tanh", criterion, 1))
    warmed_up(model, criterion, x, y)
    before = flat(model)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        criterion(model(x), y).backward()
        with pytest.raises(RuntimeError, match="outside the graph"):
            optimizer.step()
    assert flat(model).equal(before)


# --- torch.compile --------------------------------------------------------------------------------


# Inductor's own; a fallback of this library is a RuntimeWarning.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("how", ["default", "exact", "difference", "part"])
def test_a_compiled_model_takes_the_steps_of_the_plain_one(how, mode):
    torch.manual_seed(0)
    torch._dynamo.reset()
    plain = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 10)).cuda()
    model, criterion = copy.deepcopy(plain), nn.CrossEntropyLoss()
    data = [(torch.randn(16, 32).cuda(), torch.randint(10, (16,)).cuda()) for _ in range(5)]
    options = MODES[how]
    optimizer = AdlerScheduleFree(plain.parameters(), plain, criterion, **options)
    train(plain, criterion, optimizer, data)
    compiled = torch.compile(model, mode=mode)
    optimizer = AdlerScheduleFree(compiled.parameters(), compiled, criterion, **options)
    train(compiled, criterion, optimizer, data)  # a warning would be an error here
    torch.testing.assert_close(flat(model), flat(plain), rtol=1e-2, atol=1e-3)
