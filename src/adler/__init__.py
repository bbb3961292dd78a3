"""SGD that measures its own learning rate.

`Adler` takes the place of ``torch.optim.SGD``, `AdlerAdam` that of ``torch.optim.AdamW``;
`GaussNewton` is the baseline that ADLER is compared with, and `SpectralSGD` takes the rate that is
safe in every direction.
`losses` holds the loss Hessians, `curvature` the pure functions beneath.
"""

from adler import curvature, diagnostics, losses
from adler.adam import AdlerAdam
from adler.optimizer import Adler, GaussNewton
from adler.record import StepRecord
from adler.spectral import SpectralSGD

__all__ = [
    "Adler",
    "AdlerAdam",
    "GaussNewton",
    "SpectralSGD",
    "StepRecord",
    "curvature",
    "diagnostics",
    "losses",
]
__version__ = "0.1.0"
