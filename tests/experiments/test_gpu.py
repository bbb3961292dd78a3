"""`benchmarks/gpu`: one command for one GPU, here on the CPU and with a clock that is told."""

import contextlib
import functools
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import data, gpt, pictures, report, tests, training
from benchmarks.gpu.presets import PRESETS
from benchmarks.gpu.session import OutOfTimeError, Session
from benchmarks.suite.methods import METHODS
from examples.cifar import data as cifar

SMOKE, FULL = PRESETS["smoke"], PRESETS["full"]


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def session(tmp_path, clock):
    return Session(tmp_path, "cpu", minutes=2, clock=clock)


# --- the whole -----------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_smoke_runs_all_parts_and_a_second_call_nothing(tmp_path, capsys, monkeypatch):
    arguments = ["--preset", "smoke", "--minutes", "30", "--results", str(tmp_path)]
    command.main(arguments)
    # A peer that is not installed fails, is said, and holds up nothing.
    missing = tuple(name for name in METHODS if not METHODS[name].installed)
    failed, whole = [], []
    for letter in "abcde":
        found = json.loads((tmp_path / f"{letter}.json").read_text())
        assert found
        failed += [r for r in found if "failed" in r]
        if not any("failed" in r for r in found):
            whole.append(f"{letter}.json")
    assert whole
    assert all(r.get("key", "").startswith(missing) for r in failed)
    text = (tmp_path / "tables.md").read_text()
    assert "It has not run" not in text
    assert ("Failed" in text) == bool(failed)
    before = {name: (tmp_path / name).read_bytes() for name in whole}  # what failed is tried again
    monkeypatch.setattr(training, "train", None)
    command.main(arguments)
    assert {name: (tmp_path / name).read_bytes() for name in whole} == before
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "--data"),
        (["--preset", "smoke", "--parts", "az"], "no part z"),
        (["prepare", "--root", ".", "--data", "."], "missing"),
    ],
)
def test_bad_commands(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        command.main(arguments)


def test_methods_are_the_suites():
    assert set(training.UNTUNED) | set(training.TUNED) <= set(METHODS)
    found = training.choices(FULL.gpt)
    assert found[0] == ("adler-schedulefree", None)
    assert len(found) == len(set(found)) == len(training.UNTUNED) + 6
    assert {rate for name, rate in found if name == "adamw-cosine-tuned"} == {3e-4, 1e-3, 3e-3}


def test_a_preset_has_the_parts_it_names(tmp_path, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(command.gpt, "run", lambda session, *_: ran.append(("c", session.device)))
    monkeypatch.setattr(command.pictures, "run", lambda session, *_: ran.append(("d", 0)))
    arguments = ["--preset", "two-cores", "--results", str(tmp_path), "--data", str(tmp_path)]
    command.main(arguments)
    assert ran == [("c", "cpu"), ("d", 0)]
    with pytest.raises(SystemExit, match="no part b"):
        command.main([*arguments, "--parts", "bc"])
    for preset in PRESETS.values():
        assert ("b" in preset.shares, "e" in preset.shares) == (
            preset.cost is not None,
            preset.cells is not None,
        )
    capsys.readouterr()


# --- time and failures ---------------------------------------------------------------------------


def test_what_is_recorded_is_not_run_again(session):
    with session.part("x", 1.0):
        done = [session.attempt("one", lambda: {"value": 1.0})]
        done.append(session.attempt("one", lambda: 1 / 0))
        found = session.records()
    assert done == [True, True]
    assert [r["value"] for r in found] == [1.0]


def test_a_failure_is_recorded_and_tried_again(session):
    with session.part("x", 1.0):
        done = [session.attempt("one", lambda: 1 / 0), session.records()]
        done.append(session.attempt("one", lambda: {"value": 2.0}))
    assert done == [False, [], True]
    found = json.loads((session.results / "x.json").read_text())
    assert [r.get("value") for r in found] == [2.0]
    lines = (session.results / "x.jsonl").read_text()
    assert "ZeroDivisionError" in lines


def test_a_failed_part_does_not_stop_the_next(session):
    with session.part("x", 1.0):
        raise FileNotFoundError("no data")
    with session.part("y", 1.0):
        session.attempt("one", dict)
    [failed] = json.loads((session.results / "x.json").read_text())
    assert "no data" in failed["failed"]
    assert (session.results / "y.json").exists()


def test_no_run_begins_that_could_not_end(session, clock):
    reached = []
    with session.part("x", 1.0):
        clock.now = 100.0
        session.attempt("short", dict, seconds=10)
        session.attempt("long", lambda: reached.append(1) or {}, seconds=30)
    assert not reached
    assert "long" not in (session.results / "x.jsonl").read_text()


def test_a_part_has_a_share_of_what_is_left(session, clock):
    with session.part("x", 0.25):
        left = [session.left]
        clock.now = 20.0
        left.append(session.left)
    with session.part("y", 1.0):
        left.append(session.left)
    assert left == [30, 10, 100]


def test_what_has_lasted_long_is_expected_to(session, clock):
    def work():
        clock.now += 7
        return {}

    with session.part("x", 1.0):
        session.attempt("adamw@1/s0", work)
        expected = session.expected("adamw"), session.expected("muon")
    assert expected == (7, 0)


def test_a_run_that_overstays_is_interrupted(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.gpu.session._GRACE", -1e9)
    session = Session(tmp_path, "cpu", minutes=1)
    forever = functools.partial(next, iter(int, 1))  # no result, and no end
    with session.part("x", 1.0):
        session.attempt("endless", lambda: [forever() for _ in iter(int, 1)])
    with session.part("x", 1.0):
        found = session.find("endless")
    assert found is None


# --- data ----------------------------------------------------------------------------------------


def test_what_travels_comes_back(tmp_path):
    root, files = tmp_path / "root", tmp_path / "files"
    cifar.synthetic(root)
    text = "It was the best of times. " * 400
    (root / "novels.txt").write_text(text)
    written = data.prepare(root, files, ["cifar10"], quality=100)
    assert all(path.stat().st_size < data.LARGEST for path in written)
    train, held_out = data.text(files, "cpu")
    assert bytes(torch.cat([train, held_out]).tolist()) == text.encode()
    assert data.unpack_pictures(files, "cifar100") is None
    assert data.unpack_pictures(files, "cifar10") == "cifar10, as JPEG"
    assert data.unpack_pictures(files, "cifar10") == "cifar10, as JPEG"
    assert data.unpack_pictures(root, "cifar10") == "cifar10"
    archive = cifar.ARCHIVES["cifar10"]
    here, there = (cifar.read(archive, cifar.locate(archive, d)) for d in (root, files))
    for index in (1, 3):
        assert (here[index] == there[index]).all()
    for index in (0, 2):
        error = np.abs(here[index].astype(int) - there[index].astype(int))
        assert error.mean() < 1.0


def test_too_large_a_file_is_refused(tmp_path, monkeypatch):
    cifar.synthetic(tmp_path)
    (tmp_path / "novels.txt").write_text("words " * 1000)
    monkeypatch.setattr(data, "LARGEST", 2**10)
    with pytest.raises(ValueError, match="--quality"):
        data.prepare(tmp_path, tmp_path / "files", ["cifar10"])


# --- what is trained -----------------------------------------------------------------------------


def test_the_decoder_is_asked_for_the_next_byte():
    train, held_out = data.text(None, "cpu")
    made = gpt.workload(SMOKE.gpt, train, held_out, "cpu")
    first, again, other = (next(made.batches(seed)) for seed in (0, 0, 1))
    for a, b in zip(first, again):
        torch.testing.assert_close(a, b)
    assert not torch.equal(first[0], other[0])
    x, y = first
    torch.testing.assert_close(x[:, 1:], y.view(x.shape)[:, :-1])
    whole = bytes(train.tolist())
    assert bytes([*x[0].tolist(), int(y.view(x.shape)[0, -1])]) in whole


def test_the_decoders_test_loss_is_that_of_a_uniform_guess_at_the_beginning():
    train, held_out = data.text(None, "cpu")
    made = gpt.workload(SMOKE.gpt, train, held_out, "cpu")
    model = made.network(0)
    with torch.no_grad():
        model.head.weight.zero_()
        assert made.test(model)["test_loss"] == pytest.approx(math.log(256), rel=1e-5)


def test_the_full_sizes():
    with torch.device("meta"):
        decoder = gpt.Decoder(FULL.gpt.width, FULL.gpt.depth, 6, FULL.gpt.length, 256, tied=False)
    assert 10e6 < sum(p.numel() for p in decoder.parameters()) < 30e6
    assert FULL.gpt.batch * FULL.gpt.length >= 32_768
    assert 2000 <= FULL.gpt.steps <= 4000
    assert len(FULL.pictures.seeds) >= 5


def synthetic_pictures(root):
    cifar.synthetic(root)
    return cifar.load("cifar10", root)


def test_the_pictures_test_error(tmp_path):
    examples = synthetic_pictures(tmp_path)
    made = pictures.workload(SMOKE.pictures, examples, "cpu")

    class Right(nn.Module):
        def forward(self, x):
            same = (x[:, None] == examples.test_x[None]).flatten(2).all(2).float()
            return same @ nn.functional.one_hot(examples.test_y, 10).float()

    assert made.test(Right())["test_error"] == 0
    assert made.epoch_steps == 500 // 32
    x, y = next(made.batches(0))
    assert x.shape == (32, 3, 32, 32)
    assert y.shape == (32,)


@pytest.mark.long
def test_rates_are_chosen_by_the_first_seed(tmp_path, session, monkeypatch):
    cifar.synthetic(tmp_path)
    calls = []

    def train(session, made, name, rate, seed):
        calls.append((name, rate, seed))
        error = 0.5 if rate is None else abs(math.log(rate / 3e-3)) / 10
        curves = {"test_error": [error], "seconds": [1.0], "step": [1]}
        return {"method": name, "lr": rate, "seed": seed, "diverged": False, "curves": curves}

    monkeypatch.setattr(pictures, "train", train)
    with session.part("d", 1.0):
        pictures.run(session, SMOKE.pictures, tmp_path)
    later = {(name, rate) for name, rate, seed in calls if seed == 1}
    assert later == {
        *((name, None) for name in training.UNTUNED),
        ("adamw-cosine-tuned", 3e-3),
        ("muon-cosine-tuned", 3e-3),
    }
    assert len([c for c in calls if c[2] == 0]) == len(training.UNTUNED) + 6


# --- training ------------------------------------------------------------------------------------


class Slow(nn.Linear):
    """Each training step lasts a second and each test a hundred, by the clock."""

    clock: Clock

    def forward(self, x):
        self.clock.now += 1 if self.training else 100
        return super().forward(x)


def tiny(clock, steps=60, scale=1.0):
    def network(seed):
        torch.manual_seed(seed)
        model = Slow(3, 2)
        model.clock = clock
        return model

    def batches(seed):
        draw = torch.Generator().manual_seed(seed)
        while True:
            yield scale * torch.randn(8, 3, generator=draw), torch.arange(8) % 2

    def test(model):
        return {"test_loss": float(model(torch.ones(1, 3)).sum())}

    return training.Workload(network, batches, steps, steps, test, evaluations=3, bfloat16=True)


def test_seconds_are_without_evaluation(session, clock, monkeypatch):
    monkeypatch.setattr(training.time, "process_time", clock)
    session._end = session._part_end = math.inf
    found = training.train(session, tiny(clock), "adamw", None, seed=0)
    assert found["curves"]["seconds"] == [20, 40, 60]
    assert found["curves"]["step"] == [20, 40, 60]
    assert found["seconds"] == 60
    assert len(found["curves"]["test_loss"]) == 3
    assert not found["diverged"]


@pytest.mark.parametrize("wanted", [True, False])
def test_precision_is_the_workloads(session, clock, wanted):
    session._end = session._part_end = math.inf
    tiny_one, found = tiny(clock, steps=6), set()

    def network(seed):
        model = tiny_one.network(seed)
        model.register_forward_hook(lambda module, args, output: found.add(output.dtype))
        return model

    made = tiny_one._replace(network=network, bfloat16=wanted)
    record = training.train(session, made, "adamw", None, 0)
    assert found == {torch.bfloat16 if wanted else torch.float32}
    assert record["bfloat16"] is wanted


def test_a_run_that_will_not_end_in_time_is_left_early(session, clock, monkeypatch):
    monkeypatch.setattr(training.time, "process_time", clock)
    monkeypatch.setattr(training.time, "monotonic", clock)
    with pytest.raises(OutOfTimeError, match="600 steps"):
        training.train(session, tiny(clock, steps=600), "adamw", None, seed=0)
    assert clock.now < 130


def test_a_run_that_diverges_ends(session, clock, monkeypatch):
    monkeypatch.setattr(training.time, "process_time", clock)
    session._end = session._part_end = math.inf
    found = training.train(session, tiny(clock, scale=math.inf), "adamw", None, seed=0)
    assert found["diverged"]
    assert found["steps"] == 20
    assert training.last(found, "test_loss") == math.inf


def test_every_method_sees_the_same_batches(session, clock):
    session._end = session._part_end = math.inf
    seen = {}

    def spied(name):
        made = tiny(clock, steps=6)

        def batches(seed):
            for x, y in made.batches(seed):
                seen.setdefault(name, []).append(x)
                yield x, y

        training.train(session, made._replace(batches=batches), name, None, 0)

    for name in training.UNTUNED:
        with contextlib.suppress(ImportError):
            spied(name)
    first, *others = seen.values()
    assert others
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other))


# --- reports -------------------------------------------------------------------------------------

XML = """<testsuites><testsuite>
<testcase classname="t" name="passes"/>
<testcase classname="t" name="skipped"><skipped message="no GPU"/></testcase>
<testcase classname="t" name="fails"><failure>
    assert 1 == 2
E   AssertionError: 1 is not 2
</failure></testcase>
<testcase classname="t" name="breaks"><error>E   RuntimeError: in a fixture</error></testcase>
</testsuite></testsuites>"""


def test_what_failed_is_told():
    found = tests.report(XML)
    assert (found["passed"], found["skipped"]) == (1, 1)
    assert set(found["failures"]) == {"t::fails", "t::breaks"}
    record = {"key": "file", "device": "d", "versions": {"torch": "1"}, **found}
    text = report.markdown({"a": [record]}, "full")
    assert "1 passed, 2 failed, 1 skipped" in text
    assert "1 is not 2" in text
    assert "in a fixture" in text


def run_record(name, lr, loss, error=None, seed=0, diverged=False):
    curves = {"step": [5, 10], "seconds": [1.0, 2.0], "test_loss": [9.0, loss]}
    if error is not None:
        curves["test_error"] = [0.5, error]
    return {
        "key": training.run_key(name, lr, seed),
        "method": name,
        "lr": lr,
        "seed": seed,
        "steps": 10,
        "seconds": 2.0,
        "parameters": 10**7,
        "diverged": diverged,
        "on_gpu": False,
        "bfloat16": False,
        "curves": curves,
        "target": 0.92,
        "data": "cifar10",
        "device": "d",
        "versions": {"torch": "1"},
    }


def test_tables_say_what_the_records_say():
    c = [run_record("adler-schedulefree", None, 1.25), run_record("adamw-cosine-tuned", 1e-3, 1.5)]
    d = [run_record("adler-schedulefree", None, 0.2, e, s) for s, e in enumerate((0.06, 0.10))]
    d.append(run_record("adamw-cosine-tuned", 1e-3, 0.3, 0.2, diverged=True))
    failed = {"key": "muon", "failed": "Traceback\nValueError: no", "device": "d", "versions": {}}
    text = report.markdown({"a": [], "c": [*c, failed], "d": d}, "two-cores")
    assert text.index("AdlerScheduleFree | its own | 1.2500") < text.index("0.001 | 1.5000")
    assert "Failed: muon: `ValueError: no`" in text
    assert "| AdlerScheduleFree | its own | 2 | 0.9200 ± 0.0283 | 1 |" in text
    assert "| 1 | 0.0000 | 0 | – | – |" in text
    assert text.count("It has not run") == 1
    assert text.startswith("# On two CPU cores")
    assert "{" not in text
    assert "Seconds of the process in training, without evaluation; float32." in text
    assert "--preset two-cores`" in text


def test_the_committed_tables_are_those_of_the_committed_records():
    folder = command._PROJECT / PRESETS["two-cores"].results
    found = {letter: command._read(folder, letter) for letter in PRESETS["two-cores"].shares}
    assert all(found.values())
    assert report.markdown(found, "two-cores") == (folder / "tables.md").read_text()
