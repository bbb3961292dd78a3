"""`benchmarks/algoperf`: the submission on a stand-in of AlgoPerf's interface, and its records.

AlgoPerf itself needs JAX and TensorFlow. What stands in for its workloads here has the signatures
of ``spec.Workload`` in v0.6; that the real runner drives the real submission is in the records.
"""

import copy
import csv
import enum
import gzip
import importlib
import inspect
import math
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

import adler
from benchmarks.algoperf import __main__ as command
from benchmarks.algoperf import data, report
from examples.shared import records


class ForwardPassMode(enum.Enum):
    TRAIN = 0
    EVAL = 1


@pytest.fixture
def submission(monkeypatch):
    spec = types.SimpleNamespace(ForwardPassMode=ForwardPassMode, Workload=object)
    package = types.ModuleType("algoperf")
    package.spec = spec
    monkeypatch.setitem(sys.modules, "algoperf", package)
    monkeypatch.delitem(sys.modules, "benchmarks.algoperf.submission", raising=False)
    yield importlib.import_module("benchmarks.algoperf.submission")
    sys.modules.pop("benchmarks.algoperf.submission", None)


class Workload:
    """As ``mnist_pytorch`` and ``cifar_pytorch`` do it."""

    model_params_types = None
    loss_type = None

    def model_fn(
        self,
        params,
        augmented_and_preprocessed_input_batch,
        model_state,
        mode,
        rng,
        update_batch_norm,
        dropout_rate=0.0,
    ):
        params.train(mode == ForwardPassMode.TRAIN)
        for module in params.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.momentum = 0.1 if update_batch_norm else 0.0
        with torch.set_grad_enabled(torch.is_grad_enabled() and mode == ForwardPassMode.TRAIN):
            return params(augmented_and_preprocessed_input_batch["inputs"]), None

    def loss_fn(self, label_batch, logits_batch, mask_batch=None, label_smoothing=0.0):
        each = nn.functional.cross_entropy(logits_batch, label_batch, reduction="none")
        valid = len(each)
        if mask_batch is not None:
            each *= mask_batch
            valid = mask_batch.sum()
        return {
            "summed": each.sum(),
            "n_valid_examples": torch.as_tensor(valid),
            "per_example": each,
        }


def network(batch_norm=False):
    torch.manual_seed(0)
    middle = [nn.BatchNorm1d(16)] if batch_norm else []
    return nn.Sequential(nn.Linear(6, 16), *middle, nn.Tanh(), nn.Linear(16, 3))


def batches(count, masked=False):
    draw = torch.Generator().manual_seed(1)
    for _ in range(count):
        batch = {
            "inputs": torch.randn(8, 6, generator=draw),
            "targets": torch.randint(3, (8,), generator=draw),
        }
        if masked:
            batch["weights"] = torch.arange(8) < 6
        yield batch


def step(module, workload, model, state, batch, number):
    return module.update_params(
        workload=workload,
        current_param_container=model,
        current_params_types=None,
        model_state=None,
        hyperparameters=None,
        batch=batch,
        loss_type=None,
        optimizer_state=state,
        eval_results=[],
        global_step=number,
        rng=None,
        train_state={},
    )


def prepare(module, workload, model, state):
    return module.prepare_for_eval(
        workload=workload,
        current_param_container=model,
        current_params_types=None,
        model_state=None,
        hyperparameters=None,
        loss_type=None,
        optimizer_state=state,
        eval_results=[],
        global_step=0,
        rng=None,
    )


def train(module, model, steps, masked=False, workload=None):
    workload = workload or Workload()
    state = module.init_optimizer_state(workload, model, None, None, None)
    queue = batches(steps, masked)
    for number in range(steps):
        batch = module.data_selection(workload, queue, state, model, None, None, number, None)
        state, same, _ = step(module, workload, model, state, batch, number)
        assert same is model
    return workload, state


def test_it_is_the_plain_loop(submission):
    model, plain = network(), network()
    _, state = train(submission, model, 12)
    criterion = nn.CrossEntropyLoss()
    optimizer = adler.AdlerScheduleFree(plain.parameters(), plain, criterion)
    for batch in batches(12):
        optimizer.zero_grad()
        criterion(plain(batch["inputs"]), batch["targets"]).backward()
        optimizer.step()
    for mine, theirs in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    ours, usual = (o.last_step for o in (state["optimizer"], optimizer))
    torch.testing.assert_close(ours.curvature, usual.curvature, rtol=1e-4, atol=1e-8)
    assert int(ours.skipped_total) == 0


def test_examples_that_are_masked_do_not_count(submission):
    whole, part = network(), network()
    criterion = nn.CrossEntropyLoss()
    optimizer = adler.AdlerScheduleFree(
        part.parameters(), part, criterion, measure=adler.Measure.every_step()
    )
    submission.init_optimizer_state = submission.initialiser(
        lambda *given: adler.AdlerScheduleFree(*given, measure=adler.Measure.every_step())
    )
    _, kept = train(submission, whole, 6, masked=True)  # without it, the average is left behind
    for batch in batches(6):
        optimizer.zero_grad()
        criterion(part(batch["inputs"][:6]), batch["targets"][:6]).backward()
        optimizer.step()
    assert kept
    for mine, theirs in zip(whole.parameters(), part.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_the_average_is_tested_and_training_goes_on(submission):
    model, through = network(), network()
    workload, state = train(submission, model, 5)
    before = [p.detach().clone() for p in model.parameters()]
    state, same, _ = prepare(submission, workload, model, state)
    assert same is model
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters()))
    last = list(batches(6))[5]
    step(submission, workload, model, state, last, 5)
    _, kept = train(submission, through, 6)
    assert kept
    for mine, theirs in zip(model.parameters(), through.parameters()):
        torch.testing.assert_close(mine, theirs)


def test_running_statistics_are_those_of_the_average(submission):
    model = network(batch_norm=True)
    workload, state = train(submission, model, 5)  # few enough that all batches are kept
    at_gradients = model[1].running_mean.clone()
    prepare(submission, workload, model, state)
    assert inspect.signature(adler.AdlerScheduleFree).parameters["bn_batches"].default >= 5
    with torch.no_grad():
        means = [model[0](batch["inputs"]).mean(0) for batch in batches(5)]
    torch.testing.assert_close(model[1].running_mean, torch.stack(means).mean(0))
    assert not torch.allclose(model[1].running_mean, at_gradients)
    assert int(state["optimizer"].last_step.skipped_total) == 0


def test_an_optimizer_without_an_average(submission):
    submission.init_optimizer_state = submission.initialiser(adler.AdlerAdam)
    model = network(batch_norm=True)
    workload, state = train(submission, model, 3)
    before = [p.detach().clone() for p in model.parameters()]
    prepare(submission, workload, model, state)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert float(model[1].running_mean.abs().sum()) > 0


def test_what_is_checkpointed_has_a_state(submission):
    _, state = train(submission, network(), 3)
    for value in state.values():
        restored = copy.deepcopy(value)
        restored.load_state_dict(value.state_dict())


def test_muon_is_the_same_but_for_one_function(submission, monkeypatch):
    monkeypatch.delitem(sys.modules, "benchmarks.algoperf.adler_muon", raising=False)
    muon = importlib.import_module("benchmarks.algoperf.adler_muon")
    assert muon.update_params is submission.update_params
    _, state = train(muon, nn.Sequential(nn.Linear(6, 6), network()), 3)
    assert isinstance(state["optimizer"], adler.AdlerMuon)


def test_batch_sizes(submission):
    assert submission.get_batch_size("mnist") == 16
    with pytest.raises(ValueError, match="workload_name='other'"):
        submission.get_batch_size("other")


# --- data and records ----------------------------------------------------------------------------


def test_files_in_mnists_format(tmp_path):
    path, values = tmp_path / "a.gz", np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    with gzip.open(path, "wb") as file:
        file.write(bytes([0, 0, 8, 3]) + np.array([2, 3, 4], ">u4").tobytes() + values.tobytes())
    assert (data.idx(path) == values).all()
    with gzip.open(path, "wb") as file:
        file.write(b"something else")
    with pytest.raises(ValueError, match=r"a\.gz"):
        data.idx(path)


def measured(path, rows):
    heads = ["global_step", "accumulated_submission_time", "train/loss", "validation/loss"]
    heads += ["validation/accuracy", "test/accuracy"]
    with path.open("w") as file:
        writer = csv.writer(file)
        writer.writerow(heads)
        writer.writerows(rows)


def test_what_the_runner_measured(tmp_path):
    path = tmp_path / "eval_measurements.csv"
    measured(
        path, [[1, 0.5, 2, 2.1, 0.1, 0.2], [50, 3.5, 1, 1.1, 0.8, 0.7], [60, 4, "", "", "", ""]]
    )
    found = report.evaluations(path)
    assert [e["step"] for e in found] == [1, 50]
    run = {"evaluations": found}
    assert report.reached(run, 0.8, "seconds") == 3.5
    assert report.reached(run, 0.05, "step") == 1
    assert report.reached(run, 0.9, "step") == math.inf
    measured(path, [])
    with pytest.raises(ValueError, match="no evaluation"):
        report.evaluations(path)


def by_hand(submission, seed, accuracies):
    rows = [
        {"step": 100 * i, "seconds": 2.0 * i, "validation_accuracy": a}
        for i, a in enumerate(accuracies, start=1)
    ]
    return {
        "workload": "mnist",
        "data": "digits",
        "submission": submission,
        "seed": seed,
        "budget": "300 steps",
        "machine": "m",
        "versions": {"torch": "1"},
        "evaluations": rows,
    }


def test_medians_over_seeds():
    found = [by_hand("a", 0, [0.4, 0.6, 0.95]), by_hand("a", 1, [0.6, 0.7, 0.8])]
    found.append(by_hand("a", 2, [0.6, 0.9, 0.7]))
    text = report.table(found, {"a": "A", "b": "B"}, {"digits": (0.5, 0.9)})
    row = "| A | 3 | 50 (50–50) | 0.9000 (0.8000–0.9500) | 2 (2–4) | 6 (4–∞) | 100 (100–200) |"
    assert row in text
    assert "| B |" not in text
    assert "### mnist: digits; 300 steps" in text


def test_the_committed_tables_are_those_of_the_committed_records():
    found = records.read([command._RECORDS], command._key)
    labels = {name: label for name, (label, _) in command.SUBMISSIONS.items()}
    assert command._TABLES.read_text() == report.table(found, labels, command.TARGETS)
    assert {"adler-schedulefree", "schedule-free", "nadamw"} <= {r["submission"] for r in found}
