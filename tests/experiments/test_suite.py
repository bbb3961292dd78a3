"""`benchmarks/suite`: data, tasks, trials and the command."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from support.needs import needing
from torch import nn

from benchmarks.suite import __main__ as command
from benchmarks.suite import data, run, tables
from benchmarks.suite.initialisations import INITIALISATIONS
from benchmarks.suite.methods import METHODS
from benchmarks.suite.tasks import LONG_EPOCH_STEPS, TASKS
from benchmarks.suite.trials import PRESETS, Trial, read
from examples.cifar import data as cifar
from examples.cifar.presets import GRID
from examples.shared import jobs, networks

CNN = "cifar10/cnn-bn-relu/b64"
DIABETES = "diabetes/mlp-relu/b32"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    for dataset in cifar.ARCHIVES:
        cifar.synthetic(directory, dataset)
    text = "".join(f"Chapter {i}. It was the best of times, ‘quoth’ he.\n" for i in range(1000))
    (directory / data.NOVELS).write_text(text, encoding="utf-8")
    return directory


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


def test_novels_are_any_text_in_windows_over_all_of_it(root):
    found = data.novels(root, 300, 20)
    raw = (root / data.NOVELS).read_bytes()
    shown = b"\n" + bytes(range(32, 127))
    assert found.outputs == len(shown) + 1
    assert found.train_x.dtype == found.train_y.dtype == torch.uint8  # in memory, not in use

    def spelled(window):
        return bytes(shown[i - 1] if i else 0 for i in window.tolist())

    known = bytes(byte if byte in shown else 0 for byte in raw)
    border = 95 * len(raw) // 100
    for part, text in (
        ((found.train_x, found.train_y), known[:border]),
        ((found.test_x, found.test_y), known[border:]),
    ):
        places = [text.find(spelled(window)) for window in part[0]]
        assert places[0] == 0
        assert places == sorted(places)
        assert places[-1] > 0.9 * len(text) * (1 - 1 / len(places)) - data.CONTEXT
        for place, after in zip(places, part[1]):
            assert spelled(after) == text[place + 1 : place + 1 + data.CONTEXT]
    assert bool((found.train_x == 0).any())  # the quotation marks


def test_novels_that_are_missing_or_too_short(tmp_path):
    with pytest.raises(ValueError, match=r"novels\.txt: pass --data"):
        data.novels(None, 5, 5)
    with pytest.raises(FileNotFoundError, match=r"novels\.txt: missing: put a long English text"):
        data.novels(tmp_path, 5, 5)
    (tmp_path / data.NOVELS).write_text("a" * 2000)
    with pytest.raises(ValueError, match=r"train_examples=30: .* has 29"):
        data.novels(tmp_path, 30, 1)


def test_a_teacher_knows_all_but_a_tenth():
    found = data.teacher(None, 20_000, 5_000)
    x, y = torch.cat([found.train_x, found.test_x]), torch.cat([found.train_y, found.test_y])
    assert float(y.var()) == pytest.approx(1, abs=0.03)
    # The same network without noise, written again: what it leaves is the noise.
    draw = torch.Generator().manual_seed(0)
    assert torch.equal(torch.randn(25_000, 32, generator=draw), x)
    weights = [
        scale * torch.randn(*shape, generator=draw)
        for shape, scale in (((32, 64), 1.5 / 32**0.5), ((64, 32), 2 / 64**0.5), ((32, 1), 1.0))
    ]
    said = torch.tanh(torch.tanh(x @ weights[0]) @ weights[1]) @ weights[2]
    said = 0.9**0.5 * (said - said.mean()) / said.std()
    noise = y - said
    assert float(noise.square().mean()) == pytest.approx(0.1, abs=0.004)
    assert abs(float(noise.mean())) < 0.01
    assert abs(float(torch.corrcoef(torch.cat([noise, said], 1).T)[0, 1])) < 0.02


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
    full, development, held_back, long, horizons, long_held_back, longer = (
        {t.name for t in PRESETS[name].tasks()}
        for name in (
            "full", "development", "held-back", "long", "horizons", "long-held-back", "longer",
        )
    )  # fmt: skip
    assert full == development | held_back
    assert long == horizons | long_held_back == {n for n, task in TASKS.items() if task.long}
    assert full | long == TASKS.keys()
    assert not full & long | development & held_back | horizons & long_held_back
    assert 0.4 <= len(horizons) / len(long) <= 0.6
    assert len(full) * len(PRESETS["full"].seeds) >= 100
    assert 0.25 < len(held_back) / len(full) < 0.4
    smoke = {t.name for t in PRESETS["smoke"].tasks()}
    assert len(smoke) == 3
    assert smoke <= development
    # Eight times as long: a third, half of it held back, hardly any family left out.
    assert 3 * len(longer) == len(full)
    assert len(longer & held_back) == len(longer & development)
    families = {TASKS[name].family for name in full}
    assert len({TASKS[name].family for name in longer}) >= 0.8 * len(families)
    assert {r for name in longer for r in ("relu", "sigmoid", "tanh") if r in name} == {
        "relu", "sigmoid", "tanh",
    }  # fmt: skip


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
    trial = Trial(name, "adler", None, 0, 1, task.batch_size, 20)
    x, y = next(run.minibatches(trial, replace(task, batch_size=6), examples, 0))
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
        if task.long:
            assert round(steps, -2) == LONG_EPOCH_STEPS, task.name
            assert task.epochs == 1
        else:
            assert 60 <= steps <= 400, task.name
        assert task.train_examples <= (task.pool or task.train_examples)


def test_initialisations():
    model = networks.mlp(8, (6,), 3, "relu")
    usual = [p.detach().clone() for p in model.parameters()]
    INITIALISATIONS["default"](model)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), usual))
    INITIALISATIONS["large"](model)
    for p, q in zip(model.parameters(), usual):
        torch.testing.assert_close(p, 3 * q if p.dim() > 1 else q)
    INITIALISATIONS["orthogonal"](model)
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

    def spied(trial, task, examples, epoch):
        for x, y in minibatches(trial, task, examples, epoch):
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


def test_pictures_are_shifted_and_mirrored_and_nothing_else():
    pictures = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(1)) + 1
    moved = run.shifted_and_mirrored(pictures, torch.Generator().manual_seed(5))
    assert moved.shape == pictures.shape
    found = []
    for picture, after in zip(pictures, moved):
        around = nn.functional.pad(picture, (4, 4, 4, 4))
        for down, right, mirrored in itertools.product(range(9), range(9), (False, True)):
            copy = around[:, down : down + 32, right : right + 32]
            if torch.equal(after, copy.flip(-1) if mirrored else copy):
                found.append((down, right, mirrored))
    assert len(found) == len(pictures)
    for values, all_ in zip(zip(*found), (set(range(9)), set(range(9)), {False, True})):
        assert set(values) == all_


@pytest.mark.parametrize("name", ["long/cifar10/mlp", "long/novels/gru"])
def test_minibatches_of_a_long_task_depend_on_seed_and_epoch_alone(name, root):
    task = replace(TASKS[name], pool=200 if TASKS[name].pool else None)
    examples = task.load(root, task.pool or 128, 20)

    def drawn(method, seed=0, epoch=0, lr=None):
        torch.rand(len(method))  # whatever happened before
        trial = Trial(name, method, lr, seed, 16, 128, 20)
        return list(run.minibatches(trial, task, examples, epoch))

    def equal(these, those):
        return all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(these, those))

    first = drawn("adler")
    assert len(first) == 128 // task.batch_size
    assert equal(first, drawn("sgd", lr=0.1))
    assert not equal(first, drawn("adler", seed=1))
    assert not equal(first, drawn("adler", epoch=1))


def test_an_epoch_draws_from_the_pool_without_repetition(root):
    task = replace(TASKS["long/novels/transformer"], pool=60)
    examples = task.load(root, 60, 20)
    trial = Trial(task.name, "adler", None, 3, 1, 32, 20)
    seen = []
    for epoch in range(8):
        ((x, y),) = run.minibatches(trial, task, examples, epoch)
        assert x.dtype == y.dtype == torch.int64
        windows = {tuple(window) for window in x.tolist()}
        assert len(windows) == 32
        seen.append(windows)
    assert len(set().union(*seen)) > 55


def test_other_numbers_of_examples_are_refused():
    with pytest.raises(ValueError, match=r"100 for training .* train_examples=128"):
        run.run(TRIAL, data.diabetes(None, 100, 60))


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    results = tmp_path_factory.mktemp("suite") / "smoke"
    command.main(["--preset", "smoke", "--results", str(results)])
    return results


@pytest.mark.long
def test_the_smoke_preset_from_end_to_end(smoke):
    keys = [Trial.of(record).key() for record in read([smoke])]
    assert sorted(keys) == sorted(t.key() for t in PRESETS["smoke"].trials())
    text = (smoke / "tables.md").read_text()
    assert text == tables.markdown(read([smoke]), "smoke")
    assert "| AdlerAdam | 3 |" in text
    assert (smoke / "accuracy.svg").stat().st_size > 10_000


@pytest.mark.long
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

    monkeypatch.setattr(jobs, "run_all", run_all)
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
    monkeypatch.setattr(jobs, "run_all", lambda trials, *rest: asked.extend(trials) or iter(()))
    for index in (1, 2, 3):
        arguments = ["--preset", "smoke", "--results", str(tmp_path), "--shard", f"{index}/3"]
        command.main(arguments)
    assert len(asked) == len(list(PRESETS["smoke"].trials()))
    assert {t.key() for t in asked} == {t.key() for t in PRESETS["smoke"].trials()}


def test_full_uses_the_records_of_its_parts(tmp_path, root, monkeypatch):
    record = run.work(replace(TRIAL, epochs=20, train_examples=342, test_examples=100), None, "cpu")
    (tmp_path / "development").mkdir()
    (tmp_path / "development" / "a.jsonl").write_text(json.dumps(record) + "\n")
    asked = []
    monkeypatch.setattr(jobs, "run_all", lambda trials, *rest: asked.extend(trials) or iter(()))
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
    with pytest.raises(SystemExit, match=r"no_such_package: pip install -e '\.\[benchmarks"):
        command.main(["--preset", "smoke", "--methods", "prodigy", "--results", str(tmp_path)])


def test_a_line_that_is_no_record_is_named(tmp_path):
    (tmp_path / "shard-1-of-1.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"shard-1-of-1\.jsonl, line 1: not a record"):
        read([tmp_path])
