"""AlgoPerf's development workloads, run by AlgoPerf's own runner: ours beside two baselines.

    python -m benchmarks.algoperf prepare --idx DIR --cifar DIR --data DIR
    python -m benchmarks.algoperf run --source DIR --submissions DIR --data DIR --workload mnist

``--source`` is a checkout of github.com/mlcommons/algorithmic-efficiency that is installed in the
running Python, and ``--submissions`` one of github.com/mlcommons/submissions_algorithms, for the
Schedule-Free AdamW that won the ruleset's v0.5 and was revised for v0.6. Neither is part of this
repository. What is in the records is not run again.

AlgoPerf's PyTorch workload ``cifar`` prefetches on a CUDA stream (``algoperf/data_utils.py``, line
261) and cannot run without a GPU; ``mnist`` can. Results of neither say how good a submission is:
AlgoPerf calls them development workloads, and scores none.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.algoperf import data, report
from examples.shared import records
from examples.shared.records import Record

__all__ = ["SUBMISSIONS", "main"]

_HERE = Path(__file__).parent
_RECORDS, _TABLES = _HERE / "results" / "records.jsonl", _HERE / "results" / "tables.md"

# By name: what the tables call them, and their file in one of the three roots.
SUBMISSIONS = {
    "adler-schedulefree": ("AdlerScheduleFree", "benchmarks/algoperf/submission.py"),
    "adler-muon": ("AdlerMuon", "benchmarks/algoperf/adler_muon.py"),
    "schedule-free": (
        "Schedule-Free AdamW, v0.6",
        "previous_leaderboards/algoperf_v06/submissions/self_tuning/schedule_free_adamw_v2/"
        "submission.py",
    ),
    "nadamw": (
        "NAdamW + cosine",
        "algorithms/baselines/self_tuning/pytorch_nadamw_full_budget.py",
    ),
}
# Validation accuracies to be reached, by the name of the data; AlgoPerf's own are 0.97
# on MNIST and 0.85 on CIFAR-10.
TARGETS: dict[str, tuple[float, ...]] = {
    "MNIST": (0.97,),
    "Fashion-MNIST in MNIST's place": (0.5, 0.55, 0.6),
    "CIFAR-10": (0.85,),
}
_VERSIONS = ("algoperf", "torch", "torch-adler", "tensorflow-cpu")


def _key(record: Record) -> str:
    return "/".join(
        str(record[name]) for name in ("workload", "data", "submission", "seed", "budget")
    )


def _run(options: argparse.Namespace, submission: str, seed: int) -> dict[str, Any]:
    """One run by AlgoPerf, and its record.

    Raises:
        RuntimeError: If AlgoPerf's runner fails; its last lines are in the message.
    """
    flags = {
        "workload": options.workload,
        "framework": "pytorch",
        "submission_path": SUBMISSIONS[submission][1],
        "tuning_ruleset": "self",
        "data_dir": options.data.resolve(),
        "rng_seed": seed + 1,  # 0 would be drawn anew
        "experiment_name": submission,
        "torch_compile": False,
        "save_checkpoints": False,
        "overwrite": True,
    }
    if options.steps:
        flags["max_global_steps"] = options.steps
    with tempfile.TemporaryDirectory() as made:
        flags["experiment_dir"] = made
        command = [sys.executable, "-m", "benchmarks.algoperf.launch"]
        command += [str(root.resolve()) for root in (options.source, options.submissions)]
        command += [f"--{name}={value}" for name, value in flags.items()]
        done = subprocess.run(command, cwd=_HERE.parents[1], capture_output=True, text=True)
        found = sorted(Path(made).rglob("eval_measurements.csv"))
        if done.returncode or not found:
            raise RuntimeError(f"{submission}: {done.stderr[-3000:]}")
        evaluated = report.evaluations(found[0])
    return {**_identity(options, submission, seed), "evaluations": evaluated}


def _identity(options: argparse.Namespace, submission: str, seed: int) -> dict[str, Any]:
    return {
        "workload": options.workload,
        "data": options.name,
        "submission": submission,
        "seed": seed,
        "budget": f"{options.steps:,} steps" if options.steps else "1.5 × the workload's time",
        "machine": f"{platform.machine()}, one CPU thread",
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONS},
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.algoperf")
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="write data as AlgoPerf reads it")
    prepare.add_argument("--idx", type=Path, help="directory of MNIST's four files")
    prepare.add_argument("--cifar", type=Path, help="directory of CIFAR-10's folder or archive")
    run = commands.add_parser("run", help="run what is missing, and write the tables")
    run.add_argument("--source", type=Path, required=True)
    run.add_argument("--submissions", type=Path, required=True)
    run.add_argument("--workload", choices=("mnist", "cifar"), default="mnist")
    run.add_argument("--name", choices=tuple(TARGETS), default="MNIST", help="what the data is")
    run.add_argument("--only", nargs="+", choices=tuple(SUBMISSIONS), default=list(SUBMISSIONS))
    run.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    run.add_argument("--steps", type=int, help="end here, not by AlgoPerf's clock")
    for command in (prepare, run):
        command.add_argument("--data", type=Path, required=True, help="where the data is or goes")
    commands.add_parser("tables", help="write the tables of the records")
    return parser.parse_args()


def main() -> None:
    """The command."""
    options = _arguments()
    if options.command == "prepare":
        if options.idx:
            data.write_mnist(options.idx, options.data)
        if options.cifar:
            data.write_cifar(options.cifar, options.data)
        return
    if options.command == "run":
        finished = {_key(record) for record in records.read([_RECORDS], _key)}
        for seed in options.seeds:
            for submission in options.only:
                if _key(_identity(options, submission, seed)) not in finished:
                    records.append(_RECORDS, _run(options, submission, seed))
    found = records.read([_RECORDS], _key)
    labels = {name: label for name, (label, _) in SUBMISSIONS.items()}
    _TABLES.write_text(report.table(found, labels, TARGETS))
    print(_TABLES.read_text())


if __name__ == "__main__":
    main()
