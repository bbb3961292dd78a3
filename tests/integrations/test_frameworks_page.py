"""The page on frameworks: every section runs by itself. The examples run, and learn."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/pages/frameworks.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))
NEEDS = {
    "PyTorch Lightning": "lightning",
    "Hugging Face models": "transformers",
    "Hugging Face Trainer": "transformers",
    "Accelerate": "accelerate",
    "TensorBoard, or any logger": "tensorboard",
}


def snippets(text):
    found = re.findall(r"^( *)```python\n(.*?)^\1```", text, re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(code) for _, code in found]


def test_every_section_has_an_example():
    assert NEEDS.keys() < SECTIONS.keys()
    assert all(snippets(text) for text in SECTIONS.values())


def test_every_section_shows_the_optimizer_to_begin_with():
    assert all("adler.AdlerScheduleFree(" in snippets(text)[0] for text in SECTIONS.values())


@pytest.mark.row("Documented examples")
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported by the model summary")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning:lightning.*")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning:torch.*")
@pytest.mark.parametrize("section", SECTIONS)
def test_the_section_runs(section, tmp_path, monkeypatch, capsys):
    if section in NEEDS:
        pytest.importorskip(NEEDS[section])
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = {"__name__": section}
    for number, code in enumerate(snippets(SECTIONS[section])):
        exec(compile(code, f"{section}[{number}]", "exec"), namespace)
    record = namespace["optimizer"].last_step
    assert record is not None
    assert not record.skipped


def example(name, *arguments):
    command = [sys.executable, "-m", f"examples.programs.{name}", *arguments]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout


@pytest.mark.row("Character language model")
def test_the_character_model_learns():
    """More than the frequencies of single characters, which are worth 4.68 bits."""
    printed = example("char_lm", "--steps", "40", "--every", "40", "--batch", "16")
    assert float(re.search(r"per character ([\d.]+)", printed)[1]) < 4.2
    assert "skipped 0" in printed


@pytest.mark.row("Lightning, automatic optimisation")
def test_the_lightning_example_learns():
    pytest.importorskip("lightning")
    pytest.importorskip("sklearn")
    printed = example("lightning_module", "--epochs", "4")
    assert float(re.search(r"accuracy ([\d.]+)", printed)[1]) > 0.85
    assert "adler/skipped_total 0" in printed


@pytest.mark.row("Hugging Face Trainer")
def test_the_trainer_example_learns():
    pytest.importorskip("transformers")
    printed = example("hf_trainer", "--steps", "30")
    losses = [float(value) for value in re.findall(r"'loss': '?([\d.]+)", printed)]
    assert losses[-1] < losses[0] - 0.2
    assert "adler/slope" in printed
