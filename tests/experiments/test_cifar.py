"""`examples/cifar`: archives, networks, runs that are killed, and what is made of the records."""

import hashlib
import itertools
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import tarfile
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.figures import assert_same_figures
from support.launch import ROOT
from torch import nn

import adler
from examples.cifar import data, models, plots, records, table, thesis
from examples.cifar import train as training
from examples.cifar.config import Run
from examples.cifar.presets import _USUAL, GRID, PRESETS, Preset
from examples.cifar.train import minibatches, train
from examples.shared import jobs
from examples.shared.networks import ACTIVATIONS, parameter_count
from examples.shared.records import append

CIFAR10 = data.ARCHIVES["cifar10"]
RUN = Run("cifar10", "cnn", "relu", "none", 4, 2, "adler", None, 32, 2, 160, 100, 0)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    data.synthetic(directory)
    return directory


# --- archives ------------------------------------------------------------------------------------


def packed(folder, target):
    """The folder as an archive, and the archive's description with the right checksum."""
    path = target / CIFAR10.name
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, CIFAR10.folder)
    return path, replace(CIFAR10, md5=hashlib.md5(path.read_bytes()).hexdigest())


def written_by_python_2(pixels, labels):
    """The bytes that Python 2's cPickle makes of a batch, as the official archives hold them."""

    def string(value):
        return pickle.BINSTRING + struct.pack("<i", len(value)) + value

    def number(value):
        return pickle.BININT + struct.pack("<i", value)

    dtype = (
        b"cnumpy\ndtype\n" + string(b"u1") + number(0) + number(1) + pickle.TUPLE3 + pickle.REDUCE
    )
    dtype += pickle.MARK + number(3) + string(b"|") + 3 * pickle.NONE + number(-1) + number(-1)
    dtype += number(0) + pickle.TUPLE + pickle.BUILD
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + number(0) + pickle.TUPLE1
    array += string(b"b") + pickle.TUPLE3 + pickle.REDUCE + pickle.MARK + number(1)
    array += b"".join(map(number, pixels.shape)) + pickle.TUPLE2 + dtype + pickle.NEWFALSE
    array += string(pixels.tobytes()) + pickle.TUPLE + pickle.BUILD
    listed = pickle.EMPTY_LIST + pickle.MARK + b"".join(map(number, labels)) + pickle.APPENDS
    entries = string(b"data") + array + string(b"labels") + listed
    opened = pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + pickle.MARK
    return opened + entries + pickle.SETITEMS + pickle.STOP


def test_folder_and_archive_hold_the_same(root, tmp_path):
    path, archive = packed(root / CIFAR10.folder, tmp_path)
    assert data.locate(archive, tmp_path) == path
    for from_folder, from_archive in zip(
        data.read(CIFAR10, root / CIFAR10.folder), data.read(archive, path)
    ):
        np.testing.assert_array_equal(from_folder, from_archive)


def test_reads_what_python_2_wrote(tmp_path):
    folder = tmp_path / CIFAR10.folder
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index, name in enumerate(CIFAR10.train + CIFAR10.test):
        pixels = rng.integers(256, size=(2, 3072), dtype=np.uint8)
        (folder / name).write_bytes(written_by_python_2(pixels, [index, 9]))
    train_pixels, train_labels, test_pixels, test_labels = data.read(CIFAR10, folder)
    assert train_labels.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
    assert test_labels.tolist() == [5, 9]
    assert train_pixels.shape == (10, 3072)
    np.testing.assert_array_equal(test_pixels, pixels)


def test_pictures_are_channels_first_and_normalised(root):
    loaded = data.load("cifar10", root, train_examples=100, test_examples=50)
    assert loaded.train_x.shape == (100, 3, 32, 32)
    torch.testing.assert_close(loaded.train_x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(loaded.train_x.std((0, 2, 3), correction=0), torch.ones(3))
    pixels, labels, *_ = data.read(CIFAR10, root / CIFAR10.folder)
    first = np.random.default_rng(0).permutation(500)[0]
    green = torch.from_numpy(pixels[first, 1024:2048].reshape(32, 32)).double()
    mine = loaded.train_x[0, 1].double()
    torch.testing.assert_close(
        (mine - mine.mean()) / mine.std(), (green - green.mean()) / green.std()
    )
    assert loaded.train_y[0] == labels[first]


def test_a_smaller_subset_is_part_of_a_larger_one(root):
    small, large = (data.load("cifar10", root, train_examples=n, test_examples=9) for n in (20, 60))
    assert torch.equal(small.train_y, large.train_y[:20])
    assert torch.equal(small.test_y, large.test_y)


def test_wrong_checksum(root, tmp_path):
    path, _ = packed(root / CIFAR10.folder, tmp_path)
    with pytest.raises(ValueError, match=rf"{path}: its MD5 .* delete it"):
        data.load("cifar10", tmp_path)


def test_truncated_archive(root, tmp_path):
    path, archive = packed(root / CIFAR10.folder, tmp_path)
    path.write_bytes(path.read_bytes()[:-100_000])
    with pytest.raises(ValueError, match="truncated or altered"):
        data.locate(archive, tmp_path)
    with pytest.raises(ValueError, match=rf"{path}: not a complete archive .* download"):
        data.read(archive, path)


def test_missing_file(root, tmp_path):
    folder = data.synthetic(tmp_path)
    (folder / "data_batch_3").unlink()
    with pytest.raises(FileNotFoundError, match=r"data_batch_3: missing: delete .* download"):
        data.load("cifar10", tmp_path)
    path, archive = packed(folder, tmp_path)
    with pytest.raises(ValueError, match="data_batch_3"):
        data.read(archive, path)


class Malicious:
    def __init__(self, call, argument):
        self.call, self.argument = call, argument

    def __reduce__(self):
        return self.call, (self.argument,)


@pytest.mark.parametrize("call", [os.mkdir, eval, np.load])
def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path, call):
    folder = data.synthetic(tmp_path)
    trap = tmp_path / "trap"
    argument = f"__import__('os').mkdir({str(trap)!r})" if call is eval else str(trap)
    content = pickle.dumps({b"data": Malicious(call, argument), b"labels": []}, protocol=2)
    (folder / "test_batch").write_bytes(content)
    with pytest.raises(ValueError, match=r"test_batch: a pickle that asks for .* download"):
        data.load("cifar10", tmp_path)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([], "not a dictionary"),
        ({b"data": np.zeros((2, 3072), np.uint8)}, "b'labels'"),
        ({b"data": np.zeros((2, 3072)), b"labels": [0, 1]}, "an array of .*f8"),
        ({b"data": np.zeros((2, 3000), np.uint8), b"labels": [0, 1]}, "3072 columns"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}, "list of 2 integers"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 10]}, "below 10"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, "1"]}, "list of 2 integers"),
    ],
)
def test_a_malformed_batch_is_named(tmp_path, batch, message):
    folder = data.synthetic(tmp_path)
    (folder / "data_batch_2").write_bytes(pickle.dumps(batch, protocol=2))
    with pytest.raises(ValueError, match=rf"data_batch_2: .*{message}.* download"):
        data.load("cifar10", tmp_path)


def test_a_truncated_pickle_is_named(tmp_path):
    path = data.synthetic(tmp_path) / "test_batch"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="test_batch: not a complete pickle"):
        data.load("cifar10", tmp_path)


def test_a_download_that_fails_says_what_to_do(tmp_path, monkeypatch):
    def unreachable(*args, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr("pooch.retrieve", unreachable)
    with pytest.raises(FileNotFoundError, match=r"cifar-100-python.tar.gz.*no route.*by hand"):
        data.load("cifar100", tmp_path)


def test_an_absent_archive_is_downloaded_with_its_checksum(root, tmp_path, monkeypatch):
    asked = []

    def retrieve(url, known_hash, fname, path, progressbar):
        asked.append((url.rsplit("/", 1)[1], known_hash, progressbar))
        (path / fname).write_bytes(b"not it")

    monkeypatch.setattr("pooch.retrieve", retrieve)
    with pytest.raises(ValueError, match="its MD5 is"):  # checked again after the download
        data.load("cifar10", tmp_path)
    name, checksum = "cifar-10-python.tar.gz", "md5:c58f30108f718f92721af3b95e74349a"
    assert asked == [(name, checksum, True)]


def test_an_unknown_data_set(tmp_path):
    with pytest.raises(ValueError, match="dataset='mnist': expected one of cifar"):
        data.load("mnist", tmp_path)


def test_more_examples_than_there_are(root):
    with pytest.raises(ValueError, match="train_examples=501: the data set has 500"):
        data.load("cifar10", root, train_examples=501)


# --- networks and runs ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "normalisation", "width", "depth", "parameters"),
    [
        # first 3·4·9+4, blocks 4·8·9+8 and 8·8·9+8, head 8·10+10
        ("cnn", "none", 4, 2, 112 + 296 + 584 + 90),
        # a scale and a shift for each channel take the place of the bias
        ("cnn", "batch", 4, 2, 116 + 304 + 592 + 90),
        # one block of two convolutions, its shortcut 4·8
        ("resnet", "none", 4, 1, 112 + 296 + 584 + 32 + 90),
        ("resnet", "batch", 4, 1, 116 + 304 + 592 + 32 + 90),
        # patches 48·16+16, positions 64·16; qkv, mix, MLP; head
        ("vit", "none", 16, 1, 784 + 1024 + (816 + 272 + 544 + 528) + 170),
        ("vit", "layer", 16, 1, 784 + 1024 + (816 + 272 + 544 + 528) + 170 + 3 * 32),
    ],
)
@pytest.mark.parametrize("activation", ["relu", "sigmoid", "tanh"])
def test_networks(model, normalisation, width, depth, parameters, activation):
    torch.manual_seed(0)
    run = replace(
        RUN, model=model, normalisation=normalisation, width=width, depth=depth,
        activation=activation,
    )  # fmt: skip
    network = models.build(run, classes=10)
    assert parameter_count(network) == parameters
    assert any(isinstance(m, ACTIVATIONS[activation]) for m in network.modules())
    x, y = torch.randn(6, 3, 32, 32), torch.arange(6)
    criterion = nn.CrossEntropyLoss()
    before = [p.detach().clone() for p in network.parameters()]
    optimizer = adler.Adler(network.parameters(), network, criterion)
    outputs = network(x)
    assert outputs.shape == (6, 10)
    criterion(outputs, y).backward()
    optimizer.step()
    assert optimizer.measure.jvp == "forward"
    assert not optimizer.last_step.skipped
    moved = [not torch.equal(p, q) for p, q in zip(network.parameters(), before)]
    assert all(moved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "mlp"}, "model='mlp'"),
        ({"normalisation": "layer"}, "normalisation='layer'"),
        ({"optimizer": "adam"}, "optimizer='adam'"),
        ({"optimizer": "sgd"}, "lr=None: sgd needs"),
        ({"lr": 0.1}, "leave lr out"),
        ({"epochs": 0}, "epochs=0"),
        ({"batch_size": 161}, "larger than train_examples"),
    ],
)
def test_a_run_that_makes_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(RUN, **changes)


def test_minibatches_depend_on_seed_and_epoch_alone():
    def order(run, epoch):
        return torch.stack(list(minibatches(run, epoch)))

    sgd = replace(RUN, optimizer="sgd", lr=0.1, model="resnet")
    assert torch.equal(order(RUN, 3), order(sgd, 3))
    assert not torch.equal(order(RUN, 3), order(RUN, 4))
    assert not torch.equal(order(RUN, 3), order(replace(RUN, seed=1), 3))
    assert sorted(order(RUN, 0).flatten().tolist()) == list(range(160))
    assert {len(b) for b in minibatches(replace(RUN, batch_size=50), 0)} == {50}


def load(run, root):
    return data.load(run.dataset, root, "cpu", run.train_examples, run.test_examples)


def test_a_run_learns_and_says_what_it_did(root):
    run = replace(RUN, model="resnet", normalisation="batch", activation="tanh", epochs=6)
    record = train(run, load(run, root))
    assert Run.of(record) == run
    assert record["test_accuracy"] == record["curves"]["test_accuracy"][-1]
    assert record["best_test_accuracy"] == max(record["curves"]["test_accuracy"]) > 0.3
    assert {len(curve) for curve in record["curves"].values()} == {6}
    assert record["curves"]["train_loss"][-1] < record["curves"]["train_loss"][0]
    assert record["clipped"] + record["skipped"] <= 30
    assert record["peak_memory_mb"] > 10
    assert record["device"] == "cpu"
    assert not record["diverged"]
    json.dumps(record, allow_nan=False)


def test_a_diverged_run_stops(root):
    run = replace(RUN, optimizer="sgd", lr=1e30, epochs=5)
    record = train(run, load(run, root))
    assert record["diverged"]
    assert record["train_loss"] is None
    assert len(record["curves"]["train_loss"]) < 5
    assert 0 <= record["test_accuracy"] <= 1
    json.dumps(record, allow_nan=False)


def test_data_of_another_size_is_refused(root):
    with pytest.raises(ValueError, match="500 training and 200 test examples, but the run"):
        train(RUN, data.load("cifar10", root))


def test_a_checkpoint_of_another_run_is_refused(root, tmp_path):
    train(RUN, load(RUN, root), checkpoint=tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt: of another run"):
        train(replace(RUN, seed=1), load(RUN, root), checkpoint=tmp_path / "a.pt")


# --- killed --------------------------------------------------------------------------------------


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def start_and_kill(command, path, count):
    """Kills the process, not its children, once the file has so many lines."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        while len(lines(path)) < count:
            assert process.poll() is None, "ended before it could be killed"
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return process


@pytest.mark.long
def test_killed_training_resumes_bit_for_bit(root, tmp_path):
    run = replace(RUN, model="resnet", normalisation="batch", activation="tanh", epochs=20)
    log = tmp_path / "log.jsonl"
    flags = {"data": root, "log": log, "threads": 1, "device": "cpu"}
    chosen = {k: v for k, v in {**run.as_dict(), **flags}.items() if v is not None}
    command = [sys.executable, "-m", "examples.cifar.train"]
    command += [f"--{key.replace('_', '-')}={value}" for key, value in chosen.items()]
    start_and_kill(command, log, 3)
    assert len(lines(log)) < run.epochs
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    resumed = json.loads(done.stdout)
    whole = train(run, load(run, root))
    measured = ("seconds", "peak_memory_mb")
    for record in (resumed, whole):
        del record["curves"]["seconds"]
        for name in measured:
            del record[name]
    assert resumed == json.loads(json.dumps(whole))
    logged = [json.loads(line) for line in lines(log)]
    assert [line["epoch"] for line in logged] == list(range(1, 21))
    assert [line["train_loss"] for line in logged] == whole["curves"]["train_loss"]


TINY = Preset(
    shapes={"cnn": ((4, 1),)},
    train_examples=64,
    test_examples=50,
    epochs=1,
    batch_sizes=(32,),
    datasets=("cifar10",),
)
DRIVER = """
from examples.cifar import table
from examples.cifar.presets import Preset
table.PRESETS["smoke"] = {preset!r}
table.main({arguments!r})
"""


def gone(group):
    """Whether all processes of a group have ended, within ten seconds."""
    for _ in range(1000):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.long
def test_a_killed_grid_resumes_to_the_same_table(root, tmp_path):
    results = tmp_path / "results"
    arguments = ["--data", str(root), "--preset", "smoke", "--results", str(results)]
    arguments += ["--device", "cpu"]
    command = [sys.executable, "-c", DRIVER.format(preset=TINY, arguments=arguments)]
    path = results / "shard-1-of-1.jsonl"
    killed = start_and_kill(command, path, 5)
    assert gone(killed.pid)
    before = path.read_text()
    kept = before[: before.rindex("\n") + 1]
    with path.open("a") as file:
        file.write('{"dataset":"cifar10","mod')  # as if the kill had come within a record
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    after = path.read_text()
    assert after.startswith(kept)
    keys = [Run.of(json.loads(line)).key() for line in after.splitlines()]
    assert sorted(keys) == sorted(run.key() for run in TINY.runs())

    whole = tmp_path / "whole.jsonl"
    for run in TINY.runs():
        append(whole, train(run, load(run, root)))
    uninterrupted = table.markdown(records.read(tmp_path), "smoke").partition("## Cost")[0]
    assert (results / "table.md").read_text().partition("## Cost")[0] == uninterrupted


def test_a_run_that_was_cut_off_goes_on_from_its_last_epoch(root, tmp_path, monkeypatch):
    run, evaluated = replace(RUN, epochs=4), []

    def evaluate(model, x, y):
        evaluated.append(len(evaluated))
        if len(evaluated) == 3:
            raise KeyboardInterrupt
        return {"test_loss": 1.0, "test_accuracy": 0.5}

    monkeypatch.setattr(training, "evaluate", evaluate)
    folder = tmp_path / "checkpoints"
    with pytest.raises(KeyboardInterrupt):
        training.work(run, root, "cpu", folder)
    assert len(list(folder.iterdir())) == 1
    record = training.work(run, root, "cpu", folder)
    assert len(evaluated) == 5  # two epochs, the one that was cut off, and two more
    assert len(record["curves"]["train_loss"]) == 4
    assert not list(folder.iterdir())
    whole = training.work(run, root, "cpu")
    assert record["curves"]["train_loss"] == whole["curves"]["train_loss"]


@pytest.mark.parametrize("name", ["variations", "full"])
def test_width_and_depth_are_crossed_with_seeds(name):
    runs = list(PRESETS[name].runs())
    assert len({run.key() for run in runs}) == len(runs)
    cells = {}
    for run in runs:
        cell = cells.setdefault((run.dataset, run.model, run.activation, run.optimizer, run.lr), [])
        cell.append((run.width, run.depth, run.seed))
    for cell in cells.values():
        widths, depths, seeds = (sorted(set(column)) for column in zip(*cell))
        assert sorted(cell) == list(itertools.product(widths, depths, seeds))
        assert (len(widths), len(depths), len(seeds)) == (2, 2, 3)
    for dataset in ("cifar10", "cifar100"):  # "more than one hundred variations"
        assert records.variations(r.as_dict() for r in runs if r.dataset == dataset) == 108
    # A grid that was stopped holds whole comparisons, and of all cells before a second shape.
    assert len({records.setting(run.as_dict()) for run in runs[:14]}) == 1
    first = runs[: 14 * 2 * 3 * 3]
    assert len({(r.dataset, r.model, r.activation) for r in first}) == 18
    assert all(
        len({(r.width, r.depth, r.seed) for r in first if r.model == m}) == 1 for m in _USUAL
    )


def test_half_has_the_thesis_cells_and_pictures():
    runs = list(PRESETS["half"].runs())
    assert {(r.dataset, r.train_examples, r.test_examples, r.epochs) for r in runs} == {
        ("cifar100", 50000, 10000, 15)
    }
    cells = {(records.ROWS[r.model], r.activation) for r in runs}
    assert cells == set(thesis.REPORTED)
    for cell in cells:
        of_it = [r for r in runs if (records.ROWS[r.model], r.activation) == cell]
        for name, rates in (("adler-published", 1), ("gauss-newton-published", 1), ("sgd", 10)):
            same = [r for r in of_it if r.optimizer == name]
            assert sorted({(r.batch_size, r.seed) for r in same}) == [
                (128, 0), (128, 1), (256, 0), (256, 1)
            ]  # fmt: skip
            assert len(same) == 4 * rates


def test_shards_are_the_grid():
    runs = list(PRESETS["quick"].runs())
    assert len({run.key() for run in runs}) == len(runs) == 756
    parts = [table.part(runs, *jobs.shard(text)) for text in ("1/3", "2/3", "3/3")]
    assert [len(part) for part in parts] == [252, 252, 252]
    assert set(itertools.chain(*parts)) == set(runs)


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b"])
def test_a_shard_that_makes_no_sense(text, capsys):
    with pytest.raises(SystemExit):
        table.main(["--data", ".", "--preset", "smoke", "--shard", text])
    assert "expected i/n" in capsys.readouterr().err


def work(run):
    """Crashes for one seed, kills its process for another."""
    if run.seed == 1:
        raise ArithmeticError("a crash")
    if run.seed == 3:
        os._exit(7)
    return {"seed": run.seed}


@pytest.mark.long
def test_a_crash_is_reported_and_loses_no_other_run():
    runs = [replace(RUN, seed=seed) for seed in range(6)]
    outcomes = dict(jobs.run_all(runs, work, jobs=1))
    assert "ArithmeticError: a crash" in outcomes[runs[1]]
    assert "died" in outcomes[runs[3]]
    for seed in (0, 2, 4, 5):
        assert outcomes[runs[seed]] == {"seed": seed}


def test_after_the_deadline_nothing_starts():
    assert list(jobs.run_all([RUN], work, jobs=1, deadline=time.monotonic())) == []


# --- records, table, figures ---------------------------------------------------------------------


def fixed_records():
    """Two data sets, two networks in one row, two seeds, two rates; one run diverged, one dead."""
    optimizers = [
        ("adler-published", None), ("gauss-newton-published", None), ("adler", None),
        ("sgd", GRID[8]), ("sgd", GRID[9]),
    ]  # fmt: skip
    made = []
    for dataset in ("cifar10", "cifar100"):
        for model, activation, normalisation in (
            ("cnn", "relu", "none"), ("resnet", "relu", "batch"), ("vit", "tanh", "layer"),
        ):  # fmt: skip
            for seed in (0, 1):
                for rank, (optimizer, lr) in enumerate(optimizers):
                    run = Run(
                        dataset, model, activation, normalisation, 16, 2 + seed, optimizer, lr,
                        64, 3, 4000, 2000, seed,
                    )  # fmt: skip
                    diverged = (model, optimizer, seed) == ("cnn", "adler-published", 0)
                    dead = (model, optimizer, seed) == ("cnn", "adler", 1)
                    final = 0.01 if diverged or dead else 0.2 + 0.02 * rank + 0.01 * seed
                    made.append(record(run, final, diverged, 20.0 if lr is None else 10.0 - seed))
    return made


def record(run, final, diverged, seconds):
    epochs = 1 if diverged else 3
    rate = (run.lr or 0.5) * np.ones(epochs)
    loss = None if diverged else 1.5
    return {
        **run.as_dict(),
        "parameters": 1000,
        "test_accuracy": final,
        "best_test_accuracy": final,
        "train_loss": loss,
        "diverged": diverged,
        "seconds": seconds,
        "peak_memory_mb": 300.0,
        "versions": {"python": "3.11.7", "torch": "2.13.0", "adler": "0.1.0"},
        "device": "cpu",
        "curves": {
            "train_loss": [None] if diverged else [2.0, 1.7, 1.5],
            "test_loss": [None] if diverged else [2.1, 1.9, 1.8],
            "test_accuracy": np.linspace(0.01, final, epochs).tolist(),
            "learning_rate": rate.tolist(),
            "seconds": [seconds / epochs] * epochs,
        },
    }


TABLE = """\
# CIFAR, preset laptop

12 networks on data, 60 runs; 4000 training and 2000 test examples, 3 epochs, minibatches of 64; python 3.11.7, torch 2.13.0, adler 0.1.0; cpu.

    python -m examples.cifar.table --data DIR --preset laptop

## CIFAR-100: final test accuracy

| Models | Activation | ADLER (published) | GN (published) | SGD grid | Adler (guarded) |
| --- | --- | --- | --- | --- | --- |
| CNN+ResNet | relu | 0.158 ± 0.098 (1 of 4 diverged) | 0.225 ± 0.006 | 0.285 ± 0.006 | 0.185 ± 0.117 (1 of 4 at chance) |
| ViT | tanh | 0.205 ± 0.007 | 0.225 ± 0.007 | 0.285 ± 0.007 | 0.245 ± 0.007 |

## CIFAR-10: final test accuracy

| Models | Activation | ADLER (published) | GN (published) | SGD grid | Adler (guarded) |
| --- | --- | --- | --- | --- | --- |
| CNN+ResNet | relu | 0.158 ± 0.098 (1 of 4 diverged) | 0.225 ± 0.006 | 0.285 ± 0.006 | 0.185 ± 0.117 (1 of 4 at chance) |
| ViT | tanh | 0.205 ± 0.007 | 0.225 ± 0.007 | 0.285 ± 0.007 | 0.245 ± 0.007 |

Mean ± standard deviation over seeds, each with its own width and depth, and over the models of the row. SGD grid: the best of its learning rates for each network and seed. Diverged: the loss was no longer finite; for SGD, of all the grid's runs. At chance: of the runs averaged, those that did not diverge and ended below 1.5 times the accuracy of guessing.

## Cost

| Models | Optimizer | Seconds / one SGD run | Seconds / whole grid | Passes / one SGD run | Passes / whole grid |
| --- | --- | --- | --- | --- | --- |
| CNN+ResNet | ADLER (published) | 2.22 | 1.111 | 1.50 | 0.750 |
| CNN+ResNet | GN (published) | 2.11 | 1.056 | 1.50 | 0.750 |
| CNN+ResNet | Adler (guarded) | 2.11 | 1.056 | 1.50 | 0.750 |
| ViT | ADLER (published) | 2.11 | 1.056 | 1.50 | 0.750 |
| ViT | GN (published) | 2.11 | 1.056 | 1.50 | 0.750 |
| ViT | Adler (guarded) | 2.11 | 1.056 | 1.50 | 0.750 |

Medians over networks and seeds, of training without evaluation; the grid is 2 runs. A forward pass, a backward pass and a Jacobian-vector product count one pass each. Diverged runs, which stop early, enter only the whole grid's seconds.
"""  # noqa: E501


def test_the_table_of_fixed_records(tmp_path):
    path = tmp_path / "shard-1-of-1.jsonl"
    for entry in fixed_records():
        append(path, entry)
    assert table.markdown(records.read(tmp_path), "laptop") == TABLE
    assert table.markdown(fixed_records()[::-1], "laptop") == TABLE


@pytest.mark.long
def test_minibatches_of_two_sizes_have_tables_and_figures_of_their_own(tmp_path):
    found = [r for r in fixed_records() if r["dataset"] == "cifar100"]
    larger = [{**r, "batch_size": 128, "test_accuracy": r["test_accuracy"] + 0.5} for r in found]
    text = table.markdown(found + larger, "half")
    small, large = text.split("## CIFAR-100, minibatches of 128")
    assert "## CIFAR-100, minibatches of 64" in small
    assert "| ViT | tanh | 0.205 ± 0.007 |" in small
    assert "| ViT | tanh | 0.705 ± 0.007 |" in large
    assert text.startswith("# CIFAR, preset half\n\n6 networks on data, 60 runs;")
    names = [path.name for path in plots.draw(found + larger, tmp_path)]
    assert "figure-7-1-cifar100-b64.svg" in names
    assert "figure-7-2-cifar100-b128.svg" in names


def test_the_table_says_what_its_spread_is_over():
    tied = fixed_records()
    assert "over seeds, each with its own width and depth, and" in table.markdown(tied, "quick")
    crossed = tied + [{**r, "seed": 1 - r["seed"]} for r in tied]
    assert "over widths, depths and seeds, each with each" in table.markdown(crossed, "quick")
    alike = [{**r, "depth": 2} for r in tied]
    assert "over seeds, and over the models" in table.markdown(alike, "quick")


def test_of_a_grid_the_best_rate_of_each_network_and_seed():
    best = records.competitors(fixed_records())["sgd"]
    assert len(best) == 12
    assert {r["lr"] for r in best} == {GRID[9]}


def test_a_line_that_is_no_record_is_named(tmp_path):
    (tmp_path / "shard-1-of-1.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"shard-1-of-1\.jsonl, line 1: not a record"):
        records.read(tmp_path)


@pytest.mark.long
def test_figures_are_drawn_and_do_not_change(tmp_path):
    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        made.append(plots.draw(fixed_records(), tmp_path / name))
    assert [path.name for path in made[0]] == [
        f"figure-7-{number}-{dataset}.{suffix}"
        for dataset in ("cifar100", "cifar10")
        for number in (1, 2)
        for suffix in ("png", "svg")
    ]
    assert_same_figures(*made)
    for path in made[0][1::2]:
        assert b"Adler (guarded)" in path.read_bytes() or b"<use" in path.read_bytes()


def test_the_smoke_preset_needs_no_download(tmp_path, capsys):
    arguments = ["--data", str(tmp_path / "data"), "--preset", "smoke", "--limit-minutes", "0"]
    table.main([*arguments, "--results", str(tmp_path / "results")])
    assert data.load("cifar10", tmp_path / "data").classes == 10
    assert "252" in capsys.readouterr().err
