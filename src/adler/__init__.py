"""Optimizers that measure their own learning rate.

`AdlerScheduleFree` is the one to begin with. `AdlerMuon` goes along Muon's direction in hidden
matrices, `Adler` along the plain gradient, `AdlerAdam` along Adam's momentum without an average of
the iterates, and `wrap` along that of any other optimizer. `GaussNewton` is the baseline that ADLER
is compared with, and `SpectralSGD` takes the rate that is safe in every direction. `Guard` bounds a
step, `Measure` says how curvature is measured, `ModelLoss` describes a loss that the model computes
itself; `losses` holds the loss Hessians, `curvature` the pure functions beneath, `diagnostics`
looks at a network.
"""

from adler import curvature, diagnostics, losses
from adler._optimizers.adam import AdlerAdam
from adler._optimizers.muon import AdlerMuon, hidden_matrices
from adler._optimizers.record import StepRecord
from adler._optimizers.schedule_free import AdlerScheduleFree
from adler._optimizers.sgd import Adler, GaussNewton
from adler._optimizers.spectral import SpectralSGD
from adler._optimizers.wrapped import Wrapped, wrap
from adler._options import Guard, Measure
from adler._recording.model_loss import ModelLoss

__all__ = [
    "Adler",
    "AdlerAdam",
    "AdlerMuon",
    "AdlerScheduleFree",
    "GaussNewton",
    "Guard",
    "Measure",
    "ModelLoss",
    "SpectralSGD",
    "StepRecord",
    "Wrapped",
    "curvature",
    "diagnostics",
    "hidden_matrices",
    "losses",
    "wrap",
]
__version__ = "0.1.0"
