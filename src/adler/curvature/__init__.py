"""Curvature of a loss along a direction in parameter space: pure functions, no optimizer."""

from adler.curvature.functions import (
    ggn_product,
    jvp,
    learning_rate,
    named_direction,
    named_parameters,
    quadratic_form,
)
from adler.curvature.jacobian import (
    ENGINES,
    ForwardModeUnsupportedError,
    directional_derivative,
    double_backward,
    finite_difference,
    forward,
    transpose,
)

__all__ = [
    "ENGINES",
    "ForwardModeUnsupportedError",
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
