"""`examples/shared`: records, jobs and networks of all experiments."""

import json
import math

import pytest

from examples.shared import jobs, records


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
