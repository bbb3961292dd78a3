"""SGD that measures its own learning rate.

`Adler` takes the place of ``torch.optim.SGD``; `GaussNewton` is the baseline it is compared with.
`losses` holds the loss Hessians, `curvature` the pure functions beneath.
"""

from adler import curvature, losses
from adler.optimizer import Adler, GaussNewton, StepRecord

__all__ = ["Adler", "GaussNewton", "StepRecord", "curvature", "losses"]
__version__ = "0.1.0"
