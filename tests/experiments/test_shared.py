"""`examples/shared`: records, jobs, networks and figures of all experiments."""

import json
import math

import pytest
import torch

from benchmarks.networks import TASKS
from examples.shared import jobs, networks, plots, records


def key(record):
    return f"{record['name']}"


def test_records_are_read_by_key_from_files_and_folders(tmp_path):
    (tmp_path / "folder").mkdir()
    records.append(tmp_path / "folder" / "b.jsonl", {"name": "y", "value": 2.0})
    records.append(tmp_path / "folder" / "a.jsonl", {"name": "x", "value": 1 / 3})
    records.append(tmp_path / "single.jsonl", {"name": "x", "value": 9.0})
    (tmp_path / "folder" / "notes.txt").write_text("no record")
    paths = [tmp_path / "folder", tmp_path / "single.jsonl", tmp_path / "absent"]
    found = [{"name": "x", "value": 0.333333}, {"name": "y", "value": 2.0}]
    assert records.read(paths, key) == found
    assert records.read(paths[::-1], key)[0]["value"] == 9.0  # of several the first


def test_a_line_that_was_cut_is_not_read_and_is_repaired(tmp_path):
    path = tmp_path / "a.jsonl"
    records.append(path, {"name": "x"})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"name":"y"}')
    assert [r["name"] for r in records.read([path], key)] == ["x"]
    records.repair(path)
    assert path.read_bytes() == whole
    records.repair(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("line", ["{}", "[", "3"])
def test_a_line_that_is_no_record_is_named(line, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"name":"x"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: not a record .* its run is repeated"):
        records.read([tmp_path], key)


def test_what_json_cannot_hold_is_refused_or_null(tmp_path):
    with pytest.raises(ValueError, match="Out of range"):
        records.append(tmp_path / "a.jsonl", {"value": math.inf})
    value = records.finite({"a": [1.0, math.inf], "b": math.nan, "c": "x", "d": True})
    assert value == {"a": [1.0, None], "b": None, "c": "x", "d": True}
    json.dumps(value, allow_nan=False)


class Run:
    def __init__(self, number):
        self.number = number

    def key(self):
        return f"run {self.number}"


def work(run):
    if run.number == 1:
        raise ArithmeticError("a crash")
    return {"name": run.key()}


@pytest.mark.long
def test_what_finished_is_recorded_and_what_crashed_is_counted(tmp_path, capsys):
    path = tmp_path / "new" / "a.jsonl"
    assert jobs.record_all([Run(n) for n in range(3)], 5, work, path, jobs=2, unit="sum") == 1
    assert [r["name"] for r in records.read([path], key)] == ["run 0", "run 2"]
    told = capsys.readouterr().err
    assert "crashed: run 1: " in told
    assert "sums (5 done before)" in told


def test_no_run_starts_after_the_limit(tmp_path):
    assert jobs.record_all([Run(0)], 0, work, tmp_path / "a.jsonl", jobs=1, minutes=0.0) == 0
    assert not (tmp_path / "a.jsonl").exists()


# --- networks ------------------------------------------------------------------------------------


def test_attention_is_a_softmax_over_the_tokens_of_each_head():
    torch.manual_seed(0)
    qkv = torch.randn(2, 5, 3 * 8, dtype=torch.float64)
    for causal in (False, True):
        expected = []
        for head in range(2):
            q, k, v = (qkv[..., part * 8 + head * 4 : part * 8 + head * 4 + 4] for part in range(3))
            scores = q @ k.mT / 4**0.5
            if causal:
                scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
            expected.append(scores.softmax(-1) @ v)
        torch.testing.assert_close(networks.attend(qkv, 4, causal), torch.cat(expected, -1))


def test_a_vision_transformer_of_other_heads_and_widths():
    model = networks.ViT(7, width=48, depth=2, activation="gelu", head_width=24, expansion=3)
    assert model.blocks[0].mlp[0].out_features == 144
    assert isinstance(model.blocks[0].mlp[1], torch.nn.GELU)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    with pytest.raises(ValueError, match="width=48: must be a multiple of 32"):
        networks.ViT(7, width=48, depth=1, head_width=32)


@pytest.mark.parametrize(("name", "parameters"), [("ViT, 0.8 M", 809_098), ("ResNet-14", 175_066)])
def test_the_networks_of_the_cost_benchmark_have_their_sizes(name, parameters):
    (task,) = [task for label, task in TASKS["cpu"].items() if label.startswith(name)]
    assert networks.parameter_count(task.network()) == parameters


# --- figures -------------------------------------------------------------------------------------


def test_no_colour_is_used_for_two_methods():
    ours = ["adler", "adler-adam", "adler-schedulefree", "adler-muon"]
    names = ["dog", "sgd", "prodigy", "adamw", *ours]
    colours = plots.colours_of([*names, "dog"])
    assert list(colours) == names
    assert len(set(colours.values())) == len(plots.COLOURS) == 8
    assert {n: c for n, c in colours.items() if n in plots.METHODS} == plots.METHODS
    with pytest.raises(ValueError, match="9 methods: a figure has colours for 8"):
        plots.colours_of([*names, "ldog"])


def drawn():
    with plots.style():
        figure, grid = plots.panels(1, 2)
        for axis, labels in zip(grid[0], (("a", "b"), ("b", "c"))):
            for label in labels:
                axis.plot([1, 2], [1, 9], label=label)
        grid[0, 0].set_yscale("log")
        return plots.finish(figure, "A title"), grid


def test_one_legend_for_all_panels_and_one_look(tmp_path):
    figure, grid = drawn()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "c"]
    assert [line.get_color() for line in grid[0, 0].lines] == list(plots.COLOURS[:2])
    assert not grid[0, 0].spines["top"].get_visible()
    written = plots.save(figure, tmp_path / "new", "name")
    assert [path.name for path in written] == ["name.png", "name.svg"]
    again = plots.save(drawn()[0], tmp_path / "again", "name")
    assert again[1].read_bytes() == written[1].read_bytes()
