"""One thread a process: several test processes, each with all cores, would wait for each other."""

import torch

torch.set_num_threads(1)
