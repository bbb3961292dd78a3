"""AlgoPerf's own runner on one submission: a process of its own, begun by `benchmarks.algoperf`.

    python -m benchmarks.algoperf.launch SOURCE SUBMISSIONS --workload=mnist ...

The two directories, AlgoPerf's and its submissions', become importable, as is this repository; all
flags go to AlgoPerf's ``submission_runner``, whose code is what trains, times and evaluates.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

__all__ = ["main"]

_DEVELOPMENT_BATCH = {"cifar": 128, "mnist": 16}


def main() -> None:
    """Runs it.

    Where data was written anew from the arrays, torchvision's checksums of the downloaded files do
    not apply. A baseline that knows no batch size for a development workload gets the workload's.
    """
    source, submissions, *flags = sys.argv[1:]
    sys.path[:0] = [source, submissions]
    from absl import app  # of AlgoPerf's environment

    runner: Any = importlib.import_module("submission_runner")
    if "--workload=cifar" in flags:
        from torchvision.datasets import cifar

        cifar.check_integrity = lambda *_: True
    path = next(flag for flag in flags if flag.startswith("--submission_path="))
    module = runner.workloads.convert_filepath_to_module(path.split("=", 1)[1])
    submission: Any = importlib.import_module(module)
    known = submission.get_batch_size

    def batch_size(workload: str) -> int:
        try:
            found: int = known(workload)
        except ValueError:
            found = _DEVELOPMENT_BATCH[workload]
        return found

    submission.get_batch_size = batch_size
    app.run(runner.main, argv=["submission_runner", *flags])


if __name__ == "__main__":
    main()
