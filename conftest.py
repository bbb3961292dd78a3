"""What holds for every test, and for every example in a docstring."""

import random

import numpy as np
import pytest
import torch

# Several test processes, each with all cores, would wait for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """A test draws the same numbers alone as after any other."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
