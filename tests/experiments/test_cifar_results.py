"""The committed CIFAR tables are those of the committed records."""

import json

import pytest
from support.launch import ROOT

from examples.cifar import choices, data, rates, records, table, thesis
from examples.cifar.config import Run
from examples.cifar.presets import PRESETS

RESULTS = ROOT / "examples/cifar/results"
COMMITTED = [name for name in PRESETS if list((RESULTS / name).glob("*.jsonl"))]


@pytest.mark.parametrize("name", COMMITTED)
def test_tables_are_rendered_from_the_records(name):
    found = records.read(RESULTS / name)
    wanted = {run.key() for run in PRESETS[name].runs()}
    found = [record for record in found if Run.of(record).key() in wanted]
    assert table.markdown(found, name) == (RESULTS / name / "table.md").read_text()
    if (RESULTS / name / "thesis.md").exists():
        assert thesis.comparison(found) == (RESULTS / name / "thesis.md").read_text()


def test_the_sentence_on_cost_is_rendered_from_the_measured_steps():
    # After `benchmarks.step_cost`: python -m examples.cifar.thesis
    measured = json.loads(thesis.STEP_COST.read_text())
    assert thesis.cost(measured) == (RESULTS / "cost.md").read_text()
    times = {"SGD": [1.0, 2.0, 4.0], "forward": [2.0, 5.0, 9.0]}
    of_one = {"runs": [{"device": "gpu", "compiled": True, "seconds": {"net": times}}]}
    assert "| gpu, compiled | “just twice” | 2.25 |" in thesis.cost(of_one)


def record(
    optimizer, accuracy, rates, lr=None, diverged=False, dataset="cifar100", seed=0, **curves
):
    run = Run(
        dataset=dataset,
        model="vit",
        activation="tanh",
        normalisation="layer",
        width=16,
        depth=1,
        optimizer=optimizer,
        lr=lr,
        batch_size=64,
        epochs=2,
        train_examples=100,
        test_examples=100,
        seed=seed,
    )
    fields = {name: getattr(run, name) for name in run.__dataclass_fields__}
    curves = {
        "learning_rate": rates,
        "test_loss": [4.0, 5.0],
        "test_accuracy": [accuracy - 0.01, accuracy],
        **curves,
    }
    return {**fields, "test_accuracy": accuracy, "diverged": diverged, "curves": curves}


def test_the_thesis_stands_beside_the_records():
    found = [
        record("adler-published", 0.3, [2.0, 0.5]),
        record("gauss-newton-published", 0.009, [1.0, None], diverged=True),
        record("sgd", 0.1, [0.1, 0.1], lr=0.1),
        record("sgd", 0.2, [0.3, 0.3], lr=0.3),
    ]
    text = thesis.comparison(found)
    assert (
        "| ViT | tanh | 0.245 ± 0.024 | 0.300 ± 0.000 | 0.213 ± 0.037 | 0.009 ± 0.000 "
        "| 0.238 ± 0.023 | 0.200 ± 0.000 | +0.007 | +0.100 |"
    ) in text
    assert "| vit, layer | tanh | adler-published | 0 of 1 | 0 of 1 | 2 | 0.5 |" in text
    assert "| vit, layer | tanh | gauss-newton-published | 1 of 1 | 1 of 1 | – | – |" in text
    assert "| CNN+ResNet | relu | 0.399 ± 0.026 | – |" in text


def test_footnote_17_is_computed():
    found = [
        record(name, accuracy, [1.0, 1.0], lr, dataset="cifar10", seed=seed)
        for name, lr, both in (
            ("adler-published", None, (0.50, 0.60)),
            ("sgd", 0.1, (0.54, 0.58)),
        )
        for seed, accuracy in enumerate(both)
    ]
    # Means 0.55 and 0.56; deviations √2/20 and √2/50.
    row = "| ViT | tanh | 0.550 ± 0.071 | 0.560 ± 0.028 | -0.010 | 0.14 | 0.35 | yes |"
    assert row in thesis.comparison(found)
    for shift, said in ((0.04, "of one"), (0.1, "no")):
        moved = [
            {**r, "test_accuracy": r["test_accuracy"] + shift * (r["optimizer"] == "sgd")}
            for r in found
        ]
        assert f"| {said} |" in thesis.comparison(moved)
    assert "footnote 17" not in thesis.comparison(found[::2])  # one seed has no deviation


def test_the_turn_of_the_test_loss_is_found():
    losses = {"test_loss": [4.0, 2.0, 3.0, None], "test_accuracy": [0.1, 0.2, 0.25, 0.3]}
    found = [record("adler-published", 0.3, [1.0] * 4, **losses)]
    assert "| CIFAR-100 | ViT | tanh | 2 of 2 | inf | +0.100 | 1 |" in thesis.comparison(found)
    losses["test_loss"][-1] = 5.0
    found = [record("adler-published", 0.3, [1.0] * 4, **losses)]
    assert "| CIFAR-100 | ViT | tanh | 2 of 2 | 2.50 | +0.100 | 1 |" in thesis.comparison(found)
    dead = [record("adler-published", 0.01, [1.0] * 4, **losses)]
    assert "section 7.8" not in thesis.comparison(dead)


# Ten steps without gradient are worth a warning; here they may come.
@pytest.mark.long
@pytest.mark.filterwarnings("ignore:the last:RuntimeWarning")
def test_rates_are_recorded_and_drawn(tmp_path):
    data.synthetic(tmp_path, "cifar10")
    options = ["--epochs", "1", "--train-examples", "320", "--out", str(tmp_path / "out")]
    rates.main(["--data", str(tmp_path), *options])
    assert (tmp_path / "out/rates.png").stat().st_size > 10_000
    found = json.loads((tmp_path / "out/rates.json").read_text())
    for curves in found.values():
        default = curves["adler-cap"]
        bound = [2 * rate for rate in default["minibatch_lr"]]
        assert len(bound) == 5
        assert all(r <= b * 1.001 for r, b in zip(default["effective_lr"], bound))


def test_the_choices_are_rendered_from_the_records():
    found = choices.read()
    assert list(found) == list(choices.CHOICES)
    assert choices.markdown(found) == (RESULTS / "choices.md").read_text()
    # Every choice meets every optimizer on both networks: no dash.
    assert "–" not in choices.markdown(found)


def test_choices_take_the_best_of_the_grid_and_name_the_normalisation():
    found = {
        "quick": [
            record("sgd", 0.1, [0.1], lr=0.1),
            record("sgd", 0.2, [0.3], lr=0.3),
            record("adler", 0.15, [1.0]),
        ]
    }
    assert (
        "| minibatches of 64, 4 epochs | vit, layer | – | – | 0.200 | 0.150 | – |"
    ) in choices.markdown(found)
