"""SGD that measures its own learning rate.

`Adler` takes the place of ``torch.optim.SGD``, `AdlerAdam` that of ``torch.optim.AdamW``, and
`wrap` takes the direction of any other optimizer;
`GaussNewton` is the baseline that ADLER is compared with, and `SpectralSGD` takes the rate that is
safe in every direction.
`losses` holds the loss Hessians, `curvature` the pure functions beneath.
"""

from adler import curvature, diagnostics, losses
from adler._optimizers.adam import AdlerAdam
from adler._optimizers.record import StepRecord
from adler._optimizers.schedule_free import AdlerScheduleFree
from adler._optimizers.sgd import Adler, GaussNewton
from adler._optimizers.spectral import SpectralSGD
from adler._optimizers.wrapped import Wrapped, wrap
from adler._recording.model_loss import ModelLoss

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
