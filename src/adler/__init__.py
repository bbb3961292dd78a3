"""SGD that measures its own learning rate.

`Adler` takes the place of ``torch.optim.SGD``, `AdlerAdam` that of ``torch.optim.AdamW``, and
`wrap` takes the direction of any other optimizer;
`GaussNewton` is the baseline that ADLER is compared with, and `SpectralSGD` takes the rate that is
safe in every direction.
`losses` holds the loss Hessians, `curvature` the pure functions beneath.
"""

from adler import curvature, diagnostics, losses
from adler.adam import AdlerAdam
from adler.model_loss import ModelLoss
from adler.optimizer import Adler, GaussNewton
from adler.record import StepRecord
from adler.schedule_free import AdlerScheduleFree
from adler.spectral import SpectralSGD
from adler.wrapper import Wrapped, wrap

__all__ = [
    "Adler",
    "AdlerAdam",
    "AdlerScheduleFree",
    "GaussNewton",
    "ModelLoss",
    "SpectralSGD",
    "StepRecord",
    "Wrapped",
    "curvature",
    "diagnostics",
    "losses",
    "wrap",
]
__version__ = "0.1.0"
