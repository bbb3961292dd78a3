"""`benchmarks.nanogpt`: what is changed of the program, and what its tables say."""

import pickle
import re

import numpy as np
import pytest

from benchmarks import nanogpt
from benchmarks.nanogpt import Run

PROGRAM = """\
torch.manual_seed(1337 + offset)
optimizer = model.configure(decay, rate)
if resume:
    optimizer.load(checkpoint)
"""


def test_of_adamw_only_the_seed_is_changed():
    patched = nanogpt.patched(PROGRAM, Run("AdamW", 1e-3, 10, 2))
    assert patched == PROGRAM.replace("1337", "1339")


def test_another_optimizer_takes_the_groups_of_the_programs_own():
    patched = nanogpt.patched(PROGRAM, Run("AdlerMuon", None, 10, 0))
    assert "adler.AdlerMuon(model.configure(decay, rate), model, adler.ModelLoss(" in patched
    assert "\noptimizer = model" not in patched
    compile(patched, "train.py", "exec")


@pytest.mark.parametrize("without", ["manual_seed", "optimizer = "])
def test_a_program_without_these_lines_is_refused(without):
    with pytest.raises(ValueError, match=r"expected one of each; use commit"):
        nanogpt.patched(PROGRAM.replace(without, ""), Run("AdamW", 1e-3, 10, 0))


def test_the_text_is_split_and_numbered(tmp_path):
    nanogpt.prepare("abracadabra" * 10, tmp_path)
    train, test = (np.fromfile(tmp_path / f"{n}.bin", dtype=np.uint16) for n in ("train", "val"))
    meta = pickle.loads((tmp_path / "meta.pkl").read_bytes())
    assert meta["vocab_size"] == 5
    assert "".join(meta["itos"][i] for i in (*train, *test)) == "abracadabra" * 10
    assert len(train) == 99


def test_a_method_without_a_rate_runs_once_for_all_lengths():
    made = list(nanogpt.runs((10, 20), (0, 1)))
    assert len(made) == len({run.name for run in made}) == 2 * (2 + 2 * len(nanogpt.RATES))
    assert {run.steps for run in made if run.lr is None} == {20}
    assert [run.seed for run in made] == sorted(run.seed for run in made)


def test_a_program_that_fails_says_why(tmp_path):
    (tmp_path / "train.py").write_text(PROGRAM + "raise SystemExit('out of paper')\n")
    with pytest.raises(RuntimeError, match=r"AdamW 0.001 10 0: nanoGPT failed:"):
        nanogpt.train(Run("AdamW", 1e-3, 10, 0), tmp_path, "ab" * 50, 5, 1)


def test_losses_are_read_from_what_the_program_prints(tmp_path):
    (tmp_path / "train.py").write_text(
        "class torch:\n    manual_seed = print\n"
        "torch.manual_seed(1337 + 0)\n"
        "optimizer = None\n"
        "print('step 0: train loss 4.0, val loss 4.1')\n"
        "print('step 10: train loss 2.0, val loss 2.5')\n"
    )
    losses = nanogpt.train(Run("AdamW", 1e-3, 10, 0), tmp_path, "ab" * 50, 5, 1)
    assert losses == {"10": 2.5}


def test_the_rate_of_adamw_is_the_best_in_the_mean_over_seeds():
    records = []
    for seed, best in ((0, 1.5), (1, 1.7)):
        for lr in nanogpt.RATES:
            loss = best if lr == 3.16e-3 else 2.0 + seed
            run = Run("AdamW", lr, 10, seed)
            records.append({**run._asdict(), "losses": {"10": loss}})
        for name in nanogpt.UNTUNED:
            run = Run(name, None, 20, seed)
            records.append({**run._asdict(), "losses": {"10": 1.0 + seed, "20": 0.5}})
    records.append({**Run("AdlerMuon", None, 10, 2)._asdict(), "losses": {"10": 9.0}})
    for record in records:
        record.update(torch="2.13", machine="x")
    text = nanogpt.tables(records)
    (line,) = re.findall(r"^\| 10 .*$", text, re.MULTILINE)
    assert line == (
        "| 10 | 1.500 (1.000 to 2.000) | 1.500 (1.000 to 2.000) | 1.600 (1.500 to 1.700) | 0.00316 "
        "| 2.500 (2.000 to 3.000) | 2 |"
    )
    assert not re.findall(r"^\| 20 ", text, re.MULTILINE)


def test_a_rate_that_diverges_is_not_the_best():
    records = [
        {**Run("AdamW", lr, 10, 0)._asdict(), "losses": {"10": None if lr < 1e-3 else 2.0 + lr}}
        for lr in nanogpt.RATES
    ]
    records += [
        {**Run(name, None, 10, 0)._asdict(), "losses": {"10": 1.0}} for name in nanogpt.UNTUNED
    ]
    for record in records:
        record.update(torch="2.13", machine="x")
    (line,) = re.findall(r"^\| 10 .*$", nanogpt.tables(records), re.MULTILINE)
    assert "| 2.001 | 0.001 |" in line
