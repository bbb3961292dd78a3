"""`benchmarks/suite`: the methods that are compared, and how each makes its steps."""

import copy
import dataclasses
import inspect
import itertools
import math

import pytest
import torch
from support.needs import needing
from torch import nn

import adler
from benchmarks.suite import methods, steppers
from benchmarks.suite.methods import METHODS, method
from benchmarks.suite.muon import MuonAdamW
from benchmarks.suite.nadamw import NAdamW
from benchmarks.suite.schedulefree_plus import ScheduleFreePlus
from benchmarks.suite.steppers import Setting, Stepper
from examples.cifar.presets import GRID
from examples.shared import networks
from examples.shared.networks import CNN, ViT

# --- methods -------------------------------------------------------------------------------------


def setting(model=None, steps=80, rate=math.nan):
    """A small problem that every method can learn, seen whole at each step."""
    torch.manual_seed(0)
    model = networks.mlp(5, (16,), 3, "tanh") if model is None else model
    x = torch.randn(48, 5)
    y = (x @ torch.randn(5, 3)).argmax(1)
    made = Setting(model, nn.CrossEntropyLoss(), rate, steps, 10, lambda: itertools.repeat((x, y)))
    return made, x, y


def train(stepper, x, y, steps):
    stepper.train()
    model, criterion = stepper.setting.model, stepper.setting.criterion
    for _ in range(steps):
        stepper.optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        stepper.after_backward(loss)


@pytest.mark.parametrize(
    "name", [*METHODS, "adler@lr=0.5", "adler-adam@max_kl=None,beta=0.9,every=4"]
)
def test_a_method_lowers_the_loss(name):
    chosen = needing(name)
    made, x, y = setting(rate=chosen.grid[-2] if chosen.grid else math.nan)
    with torch.no_grad():
        before = made.criterion(made.model(x), y).item()
    stepper = chosen.make(made)
    train(stepper, x, y, made.steps)
    with torch.no_grad():
        model = stepper.evaluate()
        after = made.criterion(model(x), y).item()
    assert not model.training
    assert after < before
    rate = stepper.rate()
    assert rate >= 0 or name.startswith("momo")
    counted = stepper.counts()
    assert (counted["skipped"] is not None) == (name.startswith(("adler", "gauss")))
    stepper.train()
    assert made.model.training


def test_what_is_tuned_and_what_is_not():
    assert METHODS["sgd"].grid == GRID
    tuned = [n for n, m in METHODS.items() if m.grid]
    assert tuned == [
        "sgd", "adamw-cosine-tuned", "sgd-momentum-cosine-tuned", "muon-cosine-tuned",
        "normuon-cosine-tuned", "soap-cosine-tuned",
    ]  # fmt: skip
    for name in tuned[1:]:
        grid = METHODS[name].grid
        assert len(grid) == 5
        assert grid[-1] / grid[0] == pytest.approx(100)


@pytest.mark.parametrize("name", METHODS)
def test_who_needs_the_number_of_steps_steps_otherwise_without_it(name):
    chosen = needing(name)
    ends = []
    for steps in (40, 400):
        made, x, y = setting(steps=steps, rate=chosen.grid[2] if chosen.grid else math.nan)
        stepper = chosen.make(made)
        torch.manual_seed(1)
        train(stepper, x, y, 40)
        ends.append(torch.cat([p.detach().flatten() for p in made.model.parameters()]))
    assert torch.equal(*ends) != chosen.needs_steps


def test_variants_are_the_class_with_those_options():
    stepper = method("adler@max_kl=0.03,trust_region=None,lr=0.5").make(setting()[0])
    optimizer = stepper.optimizer
    assert type(optimizer) is adler.Adler
    group = optimizer.param_groups[0]
    assert (optimizer.guard.max_kl, optimizer.guard.trust_region, group["lr"]) == (0.03, None, 0.5)
    usual = inspect.signature(adler.Adler).parameters["guard"].default
    assert optimizer.guard.max_relative_change == usual.max_relative_change
    optimizer = method("adler-schedulefree@every=4,jvp='finite_difference'").make(setting()[0])
    expected = dataclasses.replace(adler.Measure(), every=4, jvp="finite_difference")
    assert optimizer.optimizer.measure == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adam", "method 'adam': expected one of sgd"),
        ("adamw@lr=1", "only adler, adler-adam, adler-schedulefree, adler-muon have variants"),
        ("adler@kappa=0.1", "'kappa' is none of lr, momentum"),
        ("adler@guard=None", "'guard' is none of"),
        ("adler@max_kl=-1", "max_kl=-1: expected a positive number"),
        ("adler@output_fn=None", "'output_fn' is none of"),
        ("adler@", "expected adler@option=value"),
        ("adler@0.1", "expected adler@option=value"),
        ("adler@lr=__import__('os')", "literal values"),
        ("adler@lr=1,**{}", "'\\*\\*' is none of"),
        ("adler@lr=1)+(2", "expected adler@option=value"),
    ],
)
def test_a_name_that_is_no_method(name, message):
    with pytest.raises(ValueError, match=message):
        method(name)


def test_a_peer_that_is_not_installed():
    missing = METHODS["adler"]._replace(package="no_such_package")
    assert not missing.installed
    with pytest.raises(ImportError, match="no_such_package is not installed: pip install"):
        methods._peer("no_such_package")


def test_nadamw_by_hand():
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(3, dtype=torch.float64))
    theta, m, v = p.detach().tolist(), [0.0] * 3, [0.0] * 3
    lr, (b1, b2), decay, eps = 0.1, (0.9, 0.8), 0.3, 1e-8
    optimizer = NAdamW([p], lr=lr, betas=(b1, b2), weight_decay=decay)
    for k in range(1, 6):
        p.grad = torch.randn(3, dtype=torch.float64)
        g = p.grad.tolist()
        optimizer.step()
        for i in range(3):
            m[i] = b1 * m[i] + (1 - b1) * g[i]
            v[i] = b2 * v[i] + (1 - b2) * g[i] ** 2
            ahead = (b1 * m[i] + (1 - b1) * g[i]) / (1 - b1**k)
            theta[i] -= lr * decay * theta[i]
            theta[i] -= lr * ahead / (math.sqrt(v[i] / (1 - b2**k)) + eps)
    torch.testing.assert_close(p.detach(), torch.tensor(theta, dtype=torch.float64))


def test_nadamw_without_momentum_is_adamw():
    torch.manual_seed(0)
    mine = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    theirs = nn.Parameter(mine.detach().clone())
    options = {"lr": 0.05, "betas": (0.0, 0.99), "weight_decay": 0.1}
    optimizers = NAdamW([mine], **options), torch.optim.AdamW([theirs], **options)
    for _ in range(5):
        mine.grad = torch.randn(4, 3, dtype=torch.float64)
        theirs.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(mine, theirs)


def test_schedule_free_plus_by_hand():
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(3, dtype=torch.float64))
    x, z, m, v = p.tolist(), p.tolist(), [0.0] * 3, [0.0] * 3
    (b1, b2), beta, eps = (0.9, 0.95), 0.9, 1e-8
    optimizer = ScheduleFreePlus([p], average_warmup=2)
    optimizer.train()
    longest, total = eps, 0.0
    for k in range(1, 8):
        lr = optimizer.param_groups[0]["lr"] = min(1.0, k / 4)
        p.grad = torch.randn(3, dtype=torch.float64)
        g, loss = p.grad.tolist(), float(torch.rand(())) - 0.2
        optimizer.step(loss=torch.tensor(loss))
        bound = loss + beta * sum(a * (b - c) for a, b, c in zip(g, z, x))
        rate = lr * max(0.0, bound) / (math.sqrt(math.pi / 2) * sum(map(abs, g)))
        assert optimizer.param_groups[0]["effective_lr"] == pytest.approx(rate, rel=1e-6)
        longest = max(longest, rate)
        total += longest**2 if k > 2 else 0.0
        share = longest**2 / total if k > 2 else 1.0
        for i in range(3):
            m[i] = b1 * m[i] + (1 - b1) * g[i]
            v[i] = b2 * v[i] + (1 - b2) * g[i] ** 2
            z[i] -= rate * m[i] / (1 - b1**k) / (math.sqrt(v[i] / (1 - b2**k)) + eps)
            x[i] += share * (z[i] - x[i])
        y = [beta * a + (1 - beta) * b for a, b in zip(x, z)]
        torch.testing.assert_close(p.tolist(), y, rtol=1e-6, atol=1e-9)
        if k % 3 == 0:
            optimizer.eval()
            torch.testing.assert_close(p.tolist(), x, rtol=1e-6, atol=1e-9)
            optimizer.train()
    optimizer.eval()
    with pytest.raises(RuntimeError, match=r"call train\(\) before step"):
        optimizer.step(loss=torch.tensor(1.0))


def test_schedule_free_plus_stands_where_the_gradient_is_zero():
    p = nn.Parameter(torch.ones(2))
    optimizer = ScheduleFreePlus([p])
    optimizer.train()
    p.grad = torch.zeros(2)
    optimizer.step(loss=torch.tensor(3.0))
    assert p.tolist() == [1.0, 1.0]


def test_schedule_free_plus_is_the_authors_where_their_package_has_it():
    theirs = getattr(pytest.importorskip("schedulefree"), "AdamCScheduleFreePlusPaper", None)
    if theirs is None:
        pytest.skip("no release of schedulefree has the class yet")
    models, optimizers = [], []
    for _ in range(2):
        made, x, y = setting()
        models.append(made.model)
    optimizers = [
        ScheduleFreePlus(models[0].parameters(), average_warmup=4),
        theirs(models[1].parameters(), c_warmup=4),
    ]
    for _ in range(20):
        for model, optimizer in zip(models, optimizers):
            optimizer.train()
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            if optimizer is optimizers[0]:
                optimizer.step(loss=loss.detach())
            else:
                optimizer.step_func(loss.item())
    for p, q in zip(*(model.parameters() for model in models)):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def matrices_of(model):
    named = dict(model.named_parameters())
    return [named[name] for name in adler.hidden_matrices(model)]


def test_hidden_matrices_are_neither_inputs_nor_outputs_nor_vectors():
    shapes = {
        name: [tuple(weight.shape) for weight in matrices_of(model)]
        for name, model in {
            "mlp": networks.mlp(8, (6, 5), 3, "relu"),
            "one layer": networks.mlp(8, (6,), 3, "relu"),
            "transformer": networks.Transformer(11, 32, 1),
            "gru": networks.GRUModel(11, 16),
            "cnn": CNN(7, width=4, depth=2, normalisation="batch"),
            "vit": ViT(7, width=32, depth=1),
        }.items()
    }
    blocks = [(96, 32), (32, 32)]
    assert shapes == {
        "mlp": [(5, 6)],
        "one layer": [],
        "transformer": [*blocks, (128, 32), (32, 128)],
        "gru": [(48, 16), (48, 16)],
        "cnn": [(8, 4, 3, 3), (8, 8, 3, 3)],
        "vit": [*blocks, (64, 32), (32, 64)],
    }


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch has Muon since 2.9")
def test_muon_moves_hidden_matrices_alike_and_adamw_the_rest():
    torch.manual_seed(0)
    model = CNN(7, width=8, depth=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = MuonAdamW(model, lr=0.01, weight_decay=0.0)
    hidden = {id(weight) for weight in matrices_of(model)}
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        move = p.detach() - before[name]
        if id(p) in hidden:
            rows, columns = move.flatten(1).shape
            # The singular values are the rate times the root of the larger side times 0.2, but for
            # five iterations of Newton and Schulz, which leave them between 0.7 and 1.2.
            scale = 0.01 * 0.2 * max(rows, columns) ** 0.5
            values = torch.linalg.svdvals(move.flatten(1)) / scale
            assert 0.5 < float(values.min()) <= float(values.max()) < 1.4
        else:
            torch.testing.assert_close(
                move.abs(), torch.full_like(move, 0.01), rtol=1e-4, atol=1e-7
            )
    # One rate for both, as a scheduler sets it; an empty gradient is no step.
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    after = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), after))
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), after))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch has Muon since 2.9")
def test_muon_moves_the_same_in_another_memory_format():
    ends = []
    for order in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = CNN(7, width=8, depth=2).to(memory_format=order)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = MuonAdamW(model, lr=0.01)
        for p in model.parameters():
            p.grad = torch.randn(p.shape)
        optimizer.step()
        ends.append([p.detach() - q for p, q in zip(model.parameters(), before)])
    for p, q in zip(*ends):
        assert float(p.norm()) > 0
        torch.testing.assert_close(q, p, rtol=0.05, atol=1e-3 * float(p.abs().max()))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch has Muon since 2.9")
def test_muon_refuses_a_weight_of_which_no_matrix_is_a_view():
    model = CNN(7, width=8, depth=2)
    weight = next(p for p in matrices_of(model) if p.dim() == 4)
    weight.data = weight.data.transpose(2, 3)
    with pytest.raises(ValueError, match="strides"):
        MuonAdamW(model, lr=0.01)


def test_without_hidden_matrices_muon_is_adamw():
    ends = []
    for make in (
        lambda model: MuonAdamW(model, lr=0.05),
        lambda model: torch.optim.AdamW(model.parameters(), lr=0.05),
    ):
        made, x, y = setting()
        train(Stepper(made, make(made.model)), x, y, 5)
        ends.append([p.detach().clone() for p in made.model.parameters()])
    for p, q in zip(*ends):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("name", ["normuon-cosine-tuned", "soap-cosine-tuned"])
def test_peers_with_a_grid_have_muons_rates(name):
    assert METHODS[name].grid == METHODS["muon-cosine-tuned"].grid


def test_normuon_moves_the_matrices_that_muon_moves():
    made, _, _ = setting(networks.mlp(5, (16, 16), 3, "tanh"), rate=0.01)
    others, matrices = needing("normuon-cosine-tuned").make(made).optimizer.param_groups
    named = dict(made.model.named_parameters())
    wanted = [named[name] for name in adler.hidden_matrices(made.model)]
    assert [id(p) for p in matrices["params"]] == [id(p) for p in wanted]
    assert len(others["params"]) + len(wanted) == len(named)
    assert (matrices["use_muon"], others["use_muon"]) == (True, False)
    assert matrices["update_scale"] == "match_rms"
    assert matrices["initial_lr"] == others["initial_lr"] == 0.01
    assert matrices["weight_decay"] == others["weight_decay"] == 1e-2


def test_soap_is_set_as_its_authors_set_it():
    made, _, _ = setting(rate=3e-3)
    group = needing("soap-cosine-tuned").make(made).optimizer.param_groups[0]
    assert (group["betas"], group["precondition_frequency"]) == ((0.95, 0.95), 10)
    assert (group["weight_decay"], group["initial_lr"]) == (1e-2, 3e-3)


def test_ademamix_is_set_as_its_authors_set_it():
    made, _, _ = setting(steps=300)
    group = needing("ademamix-cosine").make(made).optimizer.param_groups[0]
    assert group["initial_lr"] == 1e-3
    assert (group["alpha"], group["betas"]) == (8.0, (0.9, 0.999, 0.9999))
    assert group["t_alpha_beta3"] == 300
    assert (group["weight_decay"], group["weight_decouple"]) == (0.1, True)


# --- steppers ------------------------------------------------------------------------------------


def test_schedules_multiply_the_rate():
    made, x, y = setting(steps=40, rate=0.5)
    stepper = methods._plain(torch.optim.SGD, tuned=True, rising=0.1)(made)
    rates = []
    for _ in range(40):
        rates.append(stepper.rate())
        train(stepper, x, y, 1)
    assert rates[:5] == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5])
    assert rates[22] == pytest.approx(0.25)
    assert stepper.rate() == pytest.approx(0, abs=1e-12)


class TwoPoints(torch.optim.SGD):
    """Trains at one point, is tested at the origin."""

    mode = "eval"
    kept = None

    def eval(self):
        if self.mode == "train":
            self.kept = [p.detach().clone() for p in self.param_groups[0]["params"]]
            for p in self.param_groups[0]["params"]:
                p.data.zero_()
        self.mode = "eval"

    def train(self):
        if self.kept is not None:
            for p, q in zip(self.param_groups[0]["params"], self.kept):
                p.data.copy_(q)
        self.mode = "train"


def test_schedule_free_is_tested_elsewhere_and_trains_on_where_it_was():
    made, x, y = setting()
    stepper = steppers.ScheduleFree(made, TwoPoints(made.model.parameters(), lr=0.1))
    train(stepper, x, y, 3)
    trained = [p.detach().clone() for p in made.model.parameters()]
    assert not stepper.evaluate().training
    assert not any(bool(p.any()) for p in made.model.parameters())
    stepper.train()
    assert made.model.training
    assert all(torch.equal(p, q) for p, q in zip(made.model.parameters(), trained))


def test_schedule_free_makes_running_statistics_where_it_is_tested():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, momentum=None), nn.Linear(4, 3))
    made, x, y = setting(model)
    stepper = steppers.ScheduleFree(made, TwoPoints(model.parameters(), lr=0.1))
    assert made.has_batch_norm
    train(stepper, x, y, 2)
    model[1].reset_running_stats()
    stepper.evaluate()
    # At the origin the first layer's outputs are zero; a minibatch for each step of an epoch.
    assert int(model[1].num_batches_tracked) == made.epoch_steps
    torch.testing.assert_close(model[1].running_mean, torch.zeros(4))


@pytest.mark.parametrize("name", ["schedulefree-adamw", "schedulefree-sgd", "schedulefree-plus"])
def test_schedule_free_itself_switches_weights(name):
    made, x, y = setting()
    stepper = needing(name).make(made)
    train(stepper, x, y, 10)
    trained = [p.detach().clone() for p in made.model.parameters()]
    tested = [p.detach().clone() for p in stepper.evaluate().parameters()]
    assert all(not torch.equal(p, q) for p, q in zip(trained, tested))
    stepper.train()
    for p, q in zip(made.model.parameters(), trained):
        torch.testing.assert_close(p, q)


class Averager:
    def __init__(self, model):
        self.averaged_model, self.steps = copy.deepcopy(model), 0

    def step(self):
        self.steps += 1


def test_of_dog_the_average_is_tested():
    made, x, y = setting()
    averager = Averager(made.model)
    optimizer = torch.optim.SGD(made.model.parameters(), lr=0.1)
    stepper = steppers.Averaged(made, optimizer, averager)
    train(stepper, x, y, 4)
    assert averager.steps == 4
    assert stepper.evaluate() is averager.averaged_model
    assert not averager.averaged_model.training
    assert made.model.training


@pytest.mark.parametrize("name", ["dog", "ldog"])
def test_dog_itself_averages_and_refuses_nan(name):
    made, x, y = setting()
    stepper = needing(name).make(made)
    train(stepper, x, y, 30)
    averaged = stepper.evaluate()
    assert all(
        not torch.equal(p, q) for p, q in zip(averaged.parameters(), made.model.parameters())
    )
    with pytest.raises(FloatingPointError):
        train(stepper, x * math.nan, y, 1)


@pytest.mark.parametrize("kind", [steppers.TakesLoss, steppers.ScheduleFreeTakesLoss])
def test_momo_and_schedule_free_plus_are_given_the_loss(kind):
    given = []

    class Needs(TwoPoints):
        def step(self, closure=None, loss=None):
            assert self.mode == "train" or kind is steppers.TakesLoss
            given.append(loss)

    made, x, y = setting()
    stepper = kind(made, Needs(made.model.parameters(), lr=0.1))
    train(stepper, x, y, 2)
    assert len(given) == 2
    assert all(loss.dim() == 0 and not loss.requires_grad for loss in given)


def test_gen_fits_on_its_own_batches_every_few_steps():
    calls = []

    def fit(model, optimizer, criterion, *, tr_iter, device, task):
        print("a fit that failed")
        calls.append((next(tr_iter)[0].shape, float(optimizer.param_groups[0]["lr"])))

    made, x, y = setting()
    optimizer = torch.optim.SGD(made.model.parameters(), lr=0.1)
    stepper = steppers.Parabola(made, optimizer, fit, every=4)
    train(stepper, x, y, 11)
    assert calls == [(x.shape, 0.1)] * 2


def test_a_stepper_reads_the_measured_rate():
    made, x, y = setting()
    stepper = Stepper(made, adler.Adler(made.model.parameters(), made.model, made.criterion))
    train(stepper, x, y, 1)
    assert stepper.rate() == float(stepper.optimizer.last_step.effective_lr) != 1.0
