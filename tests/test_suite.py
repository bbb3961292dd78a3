"""`benchmarks/suite`: tasks, methods, trials, and what is made of the records."""

import copy
import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import adler
from benchmarks.suite import __main__ as command
from benchmarks.suite import data, methods, networks, plots, run, standings, steppers, tables
from benchmarks.suite.methods import METHODS, method
from benchmarks.suite.nadamw import NAdamW
from benchmarks.suite.steppers import Setting, Stepper
from benchmarks.suite.tasks import TASKS
from benchmarks.suite.trials import PRESETS, Trial, read
from examples.cifar import data as cifar
from examples.cifar.presets import GRID

CNN = "cifar10/cnn-bn-relu/b64"
DIABETES = "diabetes/mlp-relu/b32"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    for dataset in cifar.ARCHIVES:
        cifar.synthetic(directory, dataset)
    return directory


def need(package):
    if package is not None:
        pytest.importorskip(package, reason=f"{package}: pip install 'torch-adler[benchmarks]'")


def needing(name):
    need(method(name).package)
    return method(name)


# --- data ----------------------------------------------------------------------------------------


def test_characters_predict_the_next_and_the_test_set_is_later_text():
    small, large = data.characters(None, 5, 3), data.characters(None, 50, 3)
    text, vocabulary = data._text()
    assert torch.equal(small.train_x.flatten(), text[: 5 * data.CONTEXT])
    assert torch.equal(small.train_y.flatten(), text[1 : 5 * data.CONTEXT + 1])
    assert torch.equal(large.train_x[:5], small.train_x)
    border = 9 * len(text) // 10
    assert torch.equal(small.test_x.flatten(), text[border : border + 3 * data.CONTEXT])
    assert torch.equal(small.test_y.flatten(), text[border + 1 : border + 3 * data.CONTEXT + 1])
    assert small.outputs == vocabulary == int(text.max()) + 1


@pytest.mark.parametrize("load", [data.diabetes, data.breast_cancer, data.wine])
def test_tables_are_standardised_by_their_training_rows(load):
    few, many = load(None, 50, 40), load(None, 100, 40)
    torch.testing.assert_close(many.train_x.mean(0), torch.zeros(many.train_x.shape[1]))
    torch.testing.assert_close(
        many.train_x.std(0, correction=0), torch.ones(many.train_x.shape[1]), atol=1e-5, rtol=0
    )
    # The same test rows, up to the scale that the training rows set.
    correlation = torch.corrcoef(torch.stack([few.test_x[:, 0], many.test_x[:, 0]]))
    assert correlation[0, 1] > 1 - 1e-5


def test_pixels_are_those_of_the_pictures(root):
    whole = data.pictures("cifar10", root, 40, 20)
    raw = data.pixels("cifar10", root, 40, 20)
    assert 0 <= float(raw.train_x.min()) <= float(raw.train_x.max()) <= 1
    for pictures, flat in ((whole.train_x, raw.train_x), (whole.test_x, raw.test_x)):
        channel = flat.view(-1, 3, 32, 32)[:, 1]
        torch.testing.assert_close(
            (channel - channel.mean()) / channel.std(),
            (pictures[:, 1] - pictures[:, 1].mean()) / pictures[:, 1].std(),
            atol=1e-4,
            rtol=0,
        )
    assert raw.train_y is raw.train_x


@pytest.mark.parametrize(
    ("load", "available"),
    [(data.wine, 178), (data.digits, 1797), (data.diabetes, 442)],
)
def test_more_examples_than_there_are(load, available):
    with pytest.raises(ValueError, match=f"train_examples={available}: "):
        load(None, available, 1)


def test_pictures_need_a_directory():
    with pytest.raises(ValueError, match="cifar10: pass --data"):
        data.pictures("cifar10", None, 10, 10)


def test_guessing_is_the_best_constant():
    x = torch.zeros(6, 1)
    classes = torch.tensor([0, 2, 2, 2, 1, 1])
    named = data.Data(x, classes, x, classes, 3)
    assert named.guessing(nn.CrossEntropyLoss(), accuracy=True) == pytest.approx(1 / 2)
    numbers = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0], [9.0]])
    regression = data.Data(x, numbers, x, numbers, 1)
    assert regression.guessing(nn.MSELoss(), accuracy=False) == pytest.approx(
        float(numbers.var(correction=0))
    )
    shares = torch.tensor([[0.1], [0.2], [0.6]])
    binary = data.Data(x[:3], shares, x[:3], shares, 1)
    entropy = -0.3 * math.log(0.3) - 0.7 * math.log(0.7)
    assert binary.guessing(nn.BCEWithLogitsLoss(), accuracy=False) == pytest.approx(entropy)
    text = torch.tensor([[0, 1, 1, 1]]).repeat(500, 1)
    characters = data.Data(text, text, text, text, 2)
    entropy = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    assert characters.guessing(nn.CrossEntropyLoss(), accuracy=False) == pytest.approx(
        entropy, rel=1e-4
    )


# --- tasks ---------------------------------------------------------------------------------------


def test_the_suite_is_large_enough_and_a_third_is_held_back():
    full, development, held_back = (
        {t.name for t in PRESETS[name].tasks()} for name in ("full", "development", "held-back")
    )
    assert full == TASKS.keys() == development | held_back
    assert not development & held_back
    assert len(full) * len(PRESETS["full"].seeds) >= 100
    assert 0.25 < len(held_back) / len(full) < 0.4
    smoke = {t.name for t in PRESETS["smoke"].tasks()}
    assert len(smoke) == 3
    assert smoke <= development


@pytest.mark.parametrize("name", TASKS)
def test_a_task_builds_and_takes_two_steps(name, root):
    task = TASKS[name]
    examples = task.load(root, 40, 20)
    model, again = (task.build(3, examples) for _ in range(2))
    for p, q in zip(model.parameters(), again.parameters()):
        assert torch.equal(p, q)
    before = [p.detach().clone() for p in model.parameters()]
    other = task.build(4, examples)
    assert any(not torch.equal(p, q) for p, q in zip(before, other.parameters()))

    criterion = task.criterion()
    x, y = examples.train_x[:6], examples.train_y[:6]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        losses.append(loss.item())
        if len(losses) < 3:
            optimizer.step()
    assert losses[2] < losses[0]
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
    chance = task.chance(examples)
    assert (chance is None) == (not task.has_chance)
    tested = run.evaluate(task, model.eval(), examples)
    assert math.isfinite(tested["test_loss"])
    assert task.score == "loss" or 0 <= tested["test_accuracy"] <= 1


def test_steps_are_neither_few_nor_many():
    for task in TASKS.values():
        steps = task.epochs * (task.train_examples // task.batch_size)
        assert 60 <= steps <= 400, task.name


def test_initialisations():
    model = networks.mlp(8, (6,), 3, "relu")
    usual = [p.detach().clone() for p in model.parameters()]
    networks.INITIALISATIONS["default"](model)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), usual))
    networks.INITIALISATIONS["large"](model)
    for p, q in zip(model.parameters(), usual):
        torch.testing.assert_close(p, 3 * q if p.dim() > 1 else q)
    networks.INITIALISATIONS["orthogonal"](model)
    weight = model[1].weight
    torch.testing.assert_close(weight @ weight.T, torch.eye(6), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "model", [networks.Transformer(11, 32, 2), networks.GRUModel(11, 16)], ids=["decoder", "gru"]
)
def test_language_models_do_not_see_the_future(model):
    x = torch.randint(11, (2, data.CONTEXT))
    changed = x.clone()
    changed[:, 40:] = (changed[:, 40:] + 1) % 11
    before, after = model(x), model(changed)
    assert before.shape == (2, 11, data.CONTEXT)
    torch.testing.assert_close(before[..., :40], after[..., :40])
    assert not torch.allclose(before[..., 40:], after[..., 40:])


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


@pytest.mark.parametrize("name", [*METHODS, "adler@lr=0.5", "adler-adam@max_kl=None,beta=0.9"])
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
    assert len(METHODS["adamw-cosine-tuned"].grid) == 5
    assert [n for n, m in METHODS.items() if m.grid] == ["sgd", "adamw-cosine-tuned"]


def test_variants_are_the_class_with_those_options():
    stepper = method("adler@max_kl=0.03,trust_region=None,lr=0.5").make(setting()[0])
    optimizer = stepper.optimizer
    assert type(optimizer) is adler.Adler
    group = optimizer.param_groups[0]
    assert (group["max_kl"], group["trust_region"], group["lr"]) == (0.03, None, 0.5)
    assert group["beta"] == methods.defaults("adler")["beta"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adam", "method 'adam': expected one of sgd"),
        ("adamw@lr=1", "only adler, adler-adam, adler-schedulefree have variants"),
        ("adler@kappa=0.1", "'kappa' is none of lr, beta"),
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


# --- steppers ------------------------------------------------------------------------------------


def test_schedules_multiply_the_rate():
    made, x, y = setting(steps=40, rate=0.5)
    stepper = methods._plain(torch.optim.SGD, tuned=True, warmup=0.1)(made)
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


@pytest.mark.parametrize("name", ["schedulefree-adamw", "schedulefree-sgd"])
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


def test_momo_is_given_the_loss():
    given = []

    class Needs(torch.optim.SGD):
        def step(self, closure=None, loss=None):
            given.append(loss)

    made, x, y = setting()
    stepper = steppers.TakesLoss(made, Needs(made.model.parameters(), lr=0.1))
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


# --- trials --------------------------------------------------------------------------------------

TRIAL = Trial(DIABETES, "adler", None, 0, 2, 128, 60)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "mnist"}, "task='mnist': expected one of cifar10"),
        ({"method": "adam"}, "method 'adam'"),
        ({"method": "sgd"}, "lr=None: sgd needs a positive"),
        ({"lr": 0.1}, "lr=0.1: adler is not tuned"),
        ({"epochs": 0}, "epochs=0: must be at least 1"),
        ({"train_examples": 31}, "train_examples=31: fewer than a minibatch"),
    ],
)
def test_a_trial_that_is_none(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TRIAL, **change)


def test_trials_of_a_preset_are_distinct_and_grouped_by_task():
    trials = list(PRESETS["development"].trials())
    assert len({t.key() for t in trials}) == len(trials)
    groups = [key for key, _ in itertools.groupby(trials, lambda t: (t.seed, t.task))]
    assert len(groups) == len(set(groups)) == 3 * len(PRESETS["development"].tasks())
    assert sum(t.method == "sgd" for t in trials) == 10 * len(groups)
    assert all(Trial.of(t.as_dict()) == t for t in trials[:50])


def test_a_record_says_all_and_is_repeated_exactly(root):
    trial = Trial(CNN, "adler", None, 1, 2, 128, 60)
    first, second = (run.work(trial, root, "cpu") for _ in range(2))
    json.dumps(first, allow_nan=False)
    assert Trial.of(first) == trial
    assert first["steps"] == 4
    assert (first["skipped"], first["diverged"], first["held_back"]) == (0, False, False)
    assert {len(curve) for curve in first["curves"].values()} == {2}
    assert first["test_loss"] == first["curves"]["test_loss"][-1]
    for record in (first, second):
        del record["seconds"], record["curves"]["seconds"]
    assert first == second


def test_there_is_no_accuracy_without_classes():
    record = run.work(TRIAL, None, "cpu")
    assert record["test_accuracy"] is None
    assert record["best_test_accuracy"] is None
    assert record["curves"]["test_accuracy"] == [None, None]


def test_a_run_that_diverges_stops_and_says_so():
    trial = replace(TRIAL, method="sgd", lr=1e30)
    record = run.work(trial, None, "cpu")
    assert record["diverged"]
    assert record["steps"] < 8
    assert record["train_loss"] is None
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize(("lr", "diverged"), [(5.0, False), (100.0, True)])
def test_a_loss_that_explodes_without_being_infinite_is_divergence(lr, diverged):
    # One step, from a loss of 1 to one of 28, or of 8e7.
    trial = replace(TRIAL, method="sgd", lr=lr, epochs=1, train_examples=32)
    record = run.work(trial, None, "cpu")
    assert record["train_loss"] < 2 < 20 < record["test_loss"]
    assert record["diverged"] is diverged


def test_the_curve_of_a_sum_is_that_of_a_mean(root):
    task = "cifar10/mlp-relu/b64"
    mean, total = (
        run.work(Trial(name, "sgd", lr, 0, 1, 128, 60), root, "cpu")
        for name, lr in ((task, 0.0064), (f"{task}/sum", 0.0001))
    )
    for name in ("train_loss", "test_loss"):
        assert total[name] == pytest.approx(mean[name], rel=1e-4)


BATCHED = ["sgd", "adler", "adler-adam", "nadamw-cosine", "gen-adamw", "schedulefree-adamw", "dog"]


@pytest.mark.parametrize("name", BATCHED)
def test_all_methods_see_the_same_batches_and_begin_alike(name, root, monkeypatch):
    needing(name)
    seen, begun = [], []
    minibatches, build = run.minibatches, type(TASKS[CNN]).build

    def spied(examples, batch_size, seed, epoch):
        for x, y in minibatches(examples, batch_size, seed, epoch):
            if epoch < run._OWN_STREAM:
                seen.append((x.double().sum().item(), y.tolist()))
            yield x, y

    def built(task, seed, examples):
        model = build(task, seed, examples)
        begun.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        return model

    monkeypatch.setattr(run, "minibatches", spied)
    monkeypatch.setattr(type(TASKS[CNN]), "build", built)
    examples = TASKS[CNN].load(root, 256, 60)
    torch.rand(len(name))  # whatever happened before
    run.run(Trial(CNN, name, GRID[5] if name == "sgd" else None, 2, 2, 256, 60), examples)
    expected = [
        (examples.train_x[order].double().sum().item(), examples.train_y[order].tolist())
        for epoch in range(2)
        for order in torch.randperm(
            256, generator=torch.Generator().manual_seed(2_000_006 + epoch)
        ).split(64)
    ]
    assert seen == expected
    torch.manual_seed(2)
    fresh = TASKS[CNN].network(examples)
    assert torch.equal(begun[0], torch.cat([p.detach().flatten() for p in fresh.parameters()]))


def test_other_numbers_of_examples_are_refused():
    with pytest.raises(ValueError, match=r"100 for training .* train_examples=128"):
        run.run(TRIAL, data.diabetes(None, 100, 60))


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    results = tmp_path_factory.mktemp("suite") / "smoke"
    command.main(["--preset", "smoke", "--results", str(results)])
    return results


def test_the_smoke_preset_from_end_to_end(smoke):
    keys = [Trial.of(record).key() for record in read([smoke])]
    assert sorted(keys) == sorted(t.key() for t in PRESETS["smoke"].trials())
    text = (smoke / "tables.md").read_text()
    assert text == tables.markdown(read([smoke]), "smoke")
    assert "| AdlerAdam | 3 |" in text
    assert (smoke / "accuracy.svg").stat().st_size > 10_000


def test_what_is_finished_is_not_repeated_and_what_was_cut_is(smoke, tmp_path, monkeypatch):
    results = tmp_path / "smoke"
    results.mkdir()
    path = results / "shard-1-of-1.jsonl"
    whole = (smoke / path.name).read_text()
    *kept, last = whole.splitlines(keepends=True)
    path.write_text("".join(kept) + last[:40])  # as if the kill had come within a record

    asked = []

    def run_all(trials, work, jobs, deadline):
        asked.extend(trials)
        return ((trial, work(trial)) for trial in trials)

    monkeypatch.setattr(command, "run_all", run_all)
    for _ in range(2):
        command.main(["--preset", "smoke", "--results", str(results)])
    assert [t.key() for t in asked] == [Trial.of(json.loads(last)).key()]
    assert path.read_text().startswith("".join(kept))

    def without_times(text):
        return text.partition("## Against time")[0]

    again, before = (without_times((d / "tables.md").read_text()) for d in (results, smoke))
    assert again == before


def test_shards_are_the_preset(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(command, "run_all", lambda trials, *rest: asked.extend(trials) or iter(()))
    for index in (1, 2, 3):
        arguments = ["--preset", "smoke", "--results", str(tmp_path), "--shard", f"{index}/3"]
        command.main(arguments)
    assert len(asked) == len(list(PRESETS["smoke"].trials()))
    assert {t.key() for t in asked} == {t.key() for t in PRESETS["smoke"].trials()}


def test_full_uses_the_records_of_its_parts(smoke, tmp_path, root, monkeypatch):
    record = run.work(replace(TRIAL, epochs=20, train_examples=342, test_examples=100), None, "cpu")
    (tmp_path / "development").mkdir()
    (tmp_path / "development" / "a.jsonl").write_text(json.dumps(record) + "\n")
    asked = []
    monkeypatch.setattr(command, "run_all", lambda trials, *rest: asked.extend(trials) or iter(()))
    monkeypatch.setattr(command, "_prepare", lambda *rest: None)
    arguments = ["--preset", "full", "--results", str(tmp_path / "full"), "--data", str(root)]
    command.main([*arguments, "--methods", "adler", "--tasks", "diabetes"])
    assert [t.seed for t in asked] == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "smoke", "--methods", "adam"], "method 'adam'"),
        (["--preset", "smoke", "--tasks", "mnist"], "--tasks mnist"),
        (["--preset", "smoke", "--jobs", "0"], "--jobs 0"),
        (["--preset", "development", "--methods", "adler"], "--data: cifar10"),
    ],
)
def test_a_command_that_cannot_run(arguments, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        command.main([*arguments, "--results", str(tmp_path)])


def test_a_missing_package_is_named_before_anything_runs(tmp_path, monkeypatch):
    absent = METHODS["prodigy"]._replace(package="no_such_package")
    monkeypatch.setitem(METHODS, "prodigy", absent)
    with pytest.raises(SystemExit, match=r"no_such_package: pip install 'torch-adler\[benchmarks"):
        command.main(["--preset", "smoke", "--methods", "prodigy", "--results", str(tmp_path)])


def test_a_line_that_is_no_record_is_named(tmp_path):
    (tmp_path / "shard-1-of-1.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"shard-1-of-1\.jsonl, line 1: not a record"):
        read([tmp_path])


# --- standings -----------------------------------------------------------------------------------


def record(name, accuracy, seed=0, task=CNN, lr=None, seconds=2.0, loss=None, **changes):
    """A hand-made record: of a task with ten equal classes, or of diabetes."""
    classes = TASKS[task].score == "accuracy"
    accuracy = accuracy if classes else None
    diverged = changes.get("diverged", False)
    loss = (1 - accuracy if classes else 0.5) if loss is None else loss
    told = [0.1, accuracy] if classes else [None, None]
    return {
        **Trial(task, name, lr, seed, 2, 1000, 1000).as_dict(),
        "family": TASKS[task].family,
        "held_back": TASKS[task].held_back,
        "score": TASKS[task].score,
        "chance": 0.1 if classes else None,
        "test_accuracy": accuracy,
        "test_loss": None if diverged else loss,
        "train_loss": None if diverged else loss,
        "diverged": diverged,
        "skipped": 0,
        "seconds": seconds,
        "versions": {"python": "3.11.7", "torch": "2.13.0", "adler": "0.1.0"},
        "device": "cpu",
        "curves": {
            "train_loss": [1.0, loss],
            "test_loss": [1.0, loss],
            "test_accuracy": told,
            "learning_rate": [0.1, 0.1],
            "seconds": [seconds / 2, seconds / 2],
        },
        **changes,
    }


def grid(best, seed=0, task=CNN, **options):
    """Ten SGD runs, the eighth of which is the best."""
    return [
        record("sgd", best - 0.01 * abs(i - 7), seed, task, lr, **options)
        for i, lr in enumerate(GRID)
    ]


def met(mine, theirs, **options):
    """The verdict of accuracies seed by seed."""
    return standings.verdict(
        [
            (record("adler", a, seed, **options), record("sgd", b, seed, lr=GRID[0]))
            for seed, (a, b) in enumerate(zip(mine, theirs))
        ]
    )


def test_verdicts_win_tie_and_loss():
    assert met([0.5, 0.52, 0.54], [0.4, 0.42, 0.44]) == "win"
    assert met([0.4, 0.42, 0.44], [0.5, 0.52, 0.54]) == "loss"
    # Differences 0.03, −0.01, 0.01: mean 0.01, standard error 0.02 / √3 = 0.0115.
    assert met([0.53, 0.49, 0.51], [0.5, 0.5, 0.5]) == "tie"
    # The same mean with standard error 0.01 / √3 = 0.0058.
    assert met([0.52, 0.5, 0.51], [0.5, 0.5, 0.5]) == "win"
    assert met([0.5], [0.5]) == "tie"
    assert met([0.501], [0.5]) == "win"


def test_verdicts_of_the_dead_and_the_diverged():
    # Three standard errors above a tenth, of a thousand examples: 0.1285.
    assert met([0.5, 0.128, 0.5], [0.3, 0.3, 0.3]) == "dead"
    assert met([0.128, 0.128], [0.3, 0.3]) == "dead"
    assert met([0.129, 0.129], [0.3, 0.3]) == "loss"
    # Where SGD learns nothing either, nobody is dead.
    assert met([0.11], [0.12]) == "loss"
    assert met([0.12], [0.11]) == "win"
    assert met([0.5, 0.1], [0.3, 0.3], diverged=True) == "diverged"
    both = record("adler", 0.1, diverged=True), record("sgd", 0.1, lr=GRID[0], diverged=True)
    assert standings.verdict([both]) == "tie"
    assert standings.verdict([(record("adler", 0.3), both[1])]) == "win"


def test_at_chance_of_a_loss():
    task = "digits/autoencoder-tanh/b64"
    for loss, dead in ((0.99, True), (0.97, False)):
        assert standings.at_chance(record("adler", None, task=task, loss=loss, chance=1.0)) is dead
    assert not standings.at_chance(record("adler", None, task=DIABETES, loss=7.0))


def test_losses_count_downwards():
    mine = [record("adler", None, seed, DIABETES, loss=0.4) for seed in range(2)]
    theirs = [record("sgd", None, seed, DIABETES, GRID[0], loss=0.5) for seed in range(2)]
    assert standings.verdict(list(zip(mine, theirs))) == "win"
    assert standings.verdict(list(zip(theirs, mine))) == "loss"


def test_of_a_grid_the_best_and_only_of_a_whole_one():
    found = grid(0.4)
    best = standings.contests(found[::-1])[CNN, 0]["sgd"]
    assert (best["lr"], best["test_accuracy"]) == (GRID[7], 0.4)
    assert standings.contests(found[1:]) == {}
    found[2]["test_loss"] = 0.1
    assert standings.contests(found, "test_loss")[CNN, 0]["sgd"]["lr"] == GRID[2]
    found[7].update(diverged=True, test_loss=None)
    assert standings.contests(found)[CNN, 0]["sgd"]["lr"] == GRID[6]


def test_ranks_share_a_place_where_scores_are_equal():
    found = [
        *(record(n, a) for n, a in (("adler", 0.5), ("adamw", 0.5), ("momo", 0.2))),
        *(record(n, a, 1) for n, a in (("adler", 0.5), ("adamw", 0.4), ("momo", 0.6))),
        record("adler", 0.9, 2),
    ]
    ranks, count = standings.mean_ranks(standings.contests(found), ["adler", "adamw", "momo"])
    assert ranks == {"adler": 1.75, "adamw": 2.25, "momo": 2.0}
    assert count == 1
    # A task with one seed weighs as much as one with two.
    found += [record(n, 0, task=DIABETES, loss=x) for n, x in (("adler", 3.0), ("adamw", 2.0))]
    found.append(record("momo", 0, task=DIABETES, loss=1.0))
    ranks, count = standings.mean_ranks(standings.contests(found), ["adler", "adamw", "momo"])
    assert ranks == {"adler": (1.75 + 3) / 2, "adamw": (2.25 + 2) / 2, "momo": 1.5}
    assert count == 2


def test_loss_ratios_are_geometric_and_bounded():
    found = [
        *grid(0.4), record("adler", 0.4, loss=0.3), record("momo", 0.1, diverged=True),
        *grid(0.4, 1), record("adler", 0.4, 1, loss=1.2), record("momo", 0.4, 1, loss=0.6),
    ]  # fmt: skip
    by_loss = standings.contests(found, "test_loss")
    assert standings.loss_ratio(by_loss, "adler") == pytest.approx(1.0)
    assert standings.loss_ratio(by_loss, "momo") == pytest.approx(math.sqrt(10))
    assert standings.loss_ratio(by_loss, "prodigy") is None
    found += [record("gen-sgd", 0.4, train_loss=1e-5)]
    by_train = standings.contests(found, "train_loss")
    assert standings.loss_ratio(by_train, "gen-sgd", which="train_loss") == pytest.approx(0.1)


def test_accuracy_at_a_moment():
    one = record("adler", 0.5, seconds=4.0)
    one["curves"]["test_accuracy"] = [0.3, 0.5]
    for where, expected in ((0, 0.1), (1, 0.2), (2, 0.3), (3, 0.4), (4, 0.5), (9, 0.5)):
        assert standings.value_at(one, where, "seconds") == pytest.approx(expected)
        assert standings.value_at(one, where / 4, "share") == pytest.approx(expected)
    one["diverged"] = True
    assert standings.value_at(one, 4, "seconds") == pytest.approx(0.1)


def test_costs_are_relative_to_one_sgd_run_of_the_same_task():
    found = [
        *grid(0.4, seconds=2.0), record("adler", 0.5, seconds=4.0),
        *grid(0.4, 1, seconds=4.0), record("adler", 0.5, 1, seconds=12.0),
    ]  # fmt: skip
    found[0].update(diverged=True, seconds=0.1)
    seconds = standings.sgd_seconds(found)
    assert seconds == {(CNN, 0): 2.0, (CNN, 1): 4.0}
    assert standings.cost_ratio(standings.contests(found), "adler", seconds) == 2.5


# --- tables and figures --------------------------------------------------------------------------


def fixed_records():
    """Two tasks, two seeds; one method wins, one dies, one diverges, one is a variant."""
    found = []
    for seed in range(2):
        found += grid(0.4 + 0.02 * seed, seed) + grid(0.5, seed, DIABETES)
        for name, accuracy, loss in (
            ("adler", 0.5, 0.3),
            ("adamw", 0.412, 0.5),
            ("momo", 0.1, 0.6),
            ("adler@max_kl=0.03", 0.45, 0.4),
            ("adler@max_kl=0.3", 0.46, 0.4),
            ("adler@max_kl=0.3,lr=0.5", 0.44, 0.4),
        ):
            for task in (CNN, DIABETES):
                told = {"loss": loss, "seconds": 5.0 - seed}
                if name == "adler":
                    told["train_loss"] = loss / 2
                found.append(record(name, accuracy, seed, task, **told))
    found += [record("dog", 0.1, seed, diverged=True) for seed in range(2)]
    return found


OVERALL = """\
| Method | Tasks | Wins | Ties | Losses | Dead | Diverged | Accuracy gained (points) | Mean rank | Test loss, ratio | Training loss, ratio |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
| SGD grid | 2 |  |  |  |  |  | +0.0 | 2.5 | 1.00 | 1.00 |
| Adler | 2 | 2 | 0 | 0 | 0 | 0 | +9.0 | 1.0 | 0.55 | 0.28 |
| AdamW (default) | 2 | 0 | 2 | 0 | 0 | 0 | +0.2 | 2.5 | 0.92 | 0.92 |
| DoG | 1 | 0 | 0 | 0 | 0 | 1 | -31.0 | 5.0 | 10.00 | 10.00 |
| MoMo | 2 | 0 | 0 | 1 | 1 | 0 | -31.0 | 4.0 | 1.10 | 1.10 |
"""  # noqa: E501


UNTUNED = """\
| Method | Mean rank | Best on | Within 5 % on | Furthest behind | where |
| --- | --- | --- | --- | --- | --- |
| Adler | 1.0 | 1 | 1 | 0 % | cifar10/cnn-bn-relu/b64 |
| AdamW (default) | 2.0 | 0 | 0 | 18 % | cifar10/cnn-bn-relu/b64 |
| MoMo | 3.0 | 0 | 0 | 80 % | cifar10/cnn-bn-relu/b64 |
| DoG | 4.0 | 0 | 0 | 80 % | cifar10/cnn-bn-relu/b64 |

On the 1 tasks"""
VARIANTS = """\
| `adler@max_kl=0.03` | 2 | 0 | 0 | 2 | -5.0 | 1.33 |
| `adler@max_kl=0.3` | 2 | 0 | 0 | 2 | -4.0 | 1.33 |
"""


def test_the_tables_of_fixed_records():
    text = tables.markdown(fixed_records(), "development")
    assert text == tables.markdown(fixed_records()[::-1], "development")
    assert "| Adler | 1.0 | 2 / 0 / 0 | 0 | +9.0 |\n" in text
    assert OVERALL in text
    assert UNTUNED in text
    assert VARIANTS in text
    assert "66 runs: 2 tasks (0 held back), 2 seeds; " in text
    assert "| MoMo | cifar10/cnn-bn-relu/b64 | dead |\n" in text
    assert "| DoG | cifar10/cnn-bn-relu/b64 | diverged |\n" in text
    assert "| AdamW (default) | 0.412 ± 0.000 = |\n" in text
    assert "| DoG | NaN ‡ |\n" in text
    assert "| MoMo | 0.600 ± 0.000 − |\n" in text
    # Of 5 and 4 seconds, an SGD run of 2: after 4.4 seconds at 0.404 and at 0.5, SGD at 0.41.
    assert "| Adler | 2.25 | 1.50 | -31.0 | +4.2 |\n" in text


def test_how_far_behind_the_best():
    found = [
        record(name, accuracy, seed, task, loss=loss, diverged=diverged)
        for name, accuracy, loss, diverged in (
            ("adler", 0.50, 0.30, False),
            ("adamw", 0.49, 0.33, False),
            ("momo", 0.20, 0.30, True),
        )
        for task in (CNN, DIABETES)
        for seed in range(2)
    ]
    told, count = standings.behind(standings.contests(found), ["adler", "adamw", "momo"])
    assert count == 2
    assert told["adler"] == (2, 2, 0.0, CNN)
    assert told["adamw"][:2] == (0, 1)
    assert told["adamw"].furthest == pytest.approx(0.1)
    assert told["momo"] == (0, 0, pytest.approx(9.0), DIABETES)
    assert standings.behind(standings.contests(found), ["adler", "dog"]) == ({}, 0)


def test_the_tasks_that_are_lost_are_listed():
    found = [*grid(0.5), *grid(0.5, task=DIABETES)]
    found += [record(tables.EXACT, 0.4), record("adamw", 0.45)]
    found += [record(tables.EXACT, 0, task=DIABETES, loss=0.4), record("adamw", 0, task=DIABETES)]
    text = tables.markdown(found, "development")
    (row,) = [line for line in text.splitlines() if line.endswith("| AdamW (default) |")]
    assert row == f"| {CNN} | 0.400 − | 0.500 | 0.450 | AdamW (default) |"
    found[-2] = record(tables.EXACT, 0, task=DIABETES, loss=0.499)  # above SGD's 0.5
    found.append(record("momo", 0, task=DIABETES, loss=0.4))
    found.append(record("momo", 0.1))
    assert f"| {DIABETES} | 0.499 | 0.500 | 0.400 | MoMo |" in tables.markdown(found, "development")


def test_what_cheaper_measurements_do():
    found = [one for seed in range(2) for one in grid(0.4, seed)]
    for name, accuracy, seconds in (
        (tables.EXACT, 0.5, 5.0),
        *zip(tables.MODES, (0.5, 0.4), (3, 2)),
    ):
        for seed in range(2):
            found.append(record(name, accuracy, seed, seconds=seconds, skipped=seed))
    text = tables.markdown(found, "development")
    assert (
        "| AdlerScheduleFree, finite difference | 1 | 0 | 1 | 0 | +0.0 | 1.00 | 1 | 1.50 |" in text
    )
    assert "| AdlerScheduleFree, low_cost | 1 | 0 | 0 | 1 | -10.0 | 1.20 | 1 | 1.00 |" in text
    assert "They have not run." in tables.markdown(fixed_records(), "development")


def test_tuned_adamw_is_a_reference_of_its_own():
    rates = methods.METHODS[tables.TUNED].grid
    found = [*grid(0.4), record("adler", 0.5), record("adler", 0.5, 1)]
    for seed in range(2):
        for index, lr in enumerate(rates):
            found.append(record(tables.TUNED, 0.41 + 0.01 * index, seed, lr=lr))
    text = tables.markdown(found, "development")
    assert "| Adler | 1 | 1 | 0 | 0 | +5.0 | 0.91 |" in text
    assert "| SGD grid | 1 | 0 | 0 | 1 | -5.0 |" in text
    assert "AdamW + cosine, grid" not in text


def test_one_method_against_another():
    text = tables.markdown(fixed_records(), "development")
    row = next(line for line in text.splitlines() if line.startswith("| 2 Adler"))
    assert row.split(" | ")[1:6] == ["2/0/0", "", "2/0/0", "1/0/0", "2/0/0 |"]


def test_sweeps_vary_one_option():
    names = standings.names(fixed_records())
    found = {(s.option, repr(s.others)): list(s.methods.values()) for s in plots.sweeps(names)}
    assert found == {
        ("max_kl", "{}"): ["adler@max_kl=0.03", "adler", "adler@max_kl=0.3"],
        ("lr", "{'max_kl': 0.3}"): ["adler@max_kl=0.3,lr=0.5", "adler@max_kl=0.3"],
    }


def test_figures_are_drawn_and_do_not_change(tmp_path):
    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        made.append(plots.draw(fixed_records(), tmp_path / name))
    assert [path.name for path in made[0]] == [
        "accuracy.png", "accuracy.svg", "sensitivity.png", "sensitivity.svg",
    ]  # fmt: skip
    for first, second in zip(*made):
        assert first.stat().st_size > 10_000
        if first.suffix == ".svg":
            assert first.read_bytes() == second.read_bytes()


def test_without_what_they_need_there_are_no_figures(tmp_path):
    assert plots.draw([record("adler", None, task=DIABETES)], tmp_path) == []


def test_a_stepper_reads_the_measured_rate():
    made, x, y = setting()
    stepper = Stepper(made, adler.Adler(made.model.parameters(), made.model, made.criterion))
    train(stepper, x, y, 1)
    assert stepper.rate() == float(stepper.optimizer.last_step.effective_lr) != 1.0
