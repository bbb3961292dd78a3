"""`benchmarks.algoperf.submission` with `adler.AdlerMuon`: the same functions but one."""

import adler
from benchmarks.algoperf.submission import (
    data_selection,
    get_batch_size,
    initialiser,
    prepare_for_eval,
    update_params,
)

__all__ = [
    "data_selection",
    "get_batch_size",
    "init_optimizer_state",
    "prepare_for_eval",
    "update_params",
]

init_optimizer_state = initialiser(adler.AdlerMuon)
