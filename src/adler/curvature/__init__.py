"""Curvature of a loss in parameter space: pure functions, no optimizer.

`Objective` binds a network, a batch and a criterion once and answers any question about them;
`quadratic_form`, `ggn_product` and `jvp` are single questions; `TangentKernel` and `spectrum` look
at whole matrices.
"""

from adler.curvature.functions import ggn_product, jvp, learning_rate, quadratic_form
from adler.curvature.jacobian import (
    ENGINES,
    ForwardModeUnsupportedError,
    directional_derivative,
    double_backward,
    finite_difference,
    forward,
    transpose,
)
from adler.curvature.kernel import TangentKernel
from adler.curvature.objective import Objective
from adler.curvature.parameters import named_direction, named_parameters

__all__ = [
    "ENGINES",
    "ForwardModeUnsupportedError",
    "Objective",
    "TangentKernel",
    "directional_derivative",
    "double_backward",
    "finite_difference",
    "forward",
    "ggn_product",
    "jvp",
    "learning_rate",
    "named_direction",
    "named_parameters",
    "quadratic_form",
    "transpose",
]
