"""SGD that measures its own learning rate.

`Adler` takes the place of ``torch.optim.SGD``, `AdlerAdam` that of ``torch.optim.AdamW``;
`GaussNewton` is the baseline that ADLER is compared with.
`losses` holds the loss Hessians, `curvature` the pure functions beneath.
"""

from adler import curvature, losses
from adler.adam import AdlerAdam
from adler.measured import StepRecord
from adler.optimizer import Adler, GaussNewton

__all__ = ["Adler", "AdlerAdam", "GaussNewton", "StepRecord", "curvature", "losses"]
__version__ = "0.1.0"
