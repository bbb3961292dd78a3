r"""Loss Hessians: the quadratic form of a loss at the network outputs.

For outputs $F$ and tangents $v$ of the same shape, a `LossHessian` computes

$$
c = v^\top \nabla^2 L(F)\, v
$$

without ever forming a matrix. PyTorch's losses have closed forms, written as sums of squares where
the loss is convex, so that rounding cannot make them negative. Any other criterion is
differentiated twice in output space (`AutogradHessian`), cheap because the network is not involved.

`loss_hessian` finds the provider of a criterion, `register` adds one.

Half-precision outputs, targets and class weights are promoted to float32 first.
"""

from adler.losses.base import LossHessian
from adler.losses.classification import CrossEntropyHessian, NLLHessian
from adler.losses.entrywise import (
    BCEWithLogitsHessian,
    GaussianNLLHessian,
    HuberHessian,
    MSEHessian,
    PoissonNLLHessian,
    SmoothL1Hessian,
)
from adler.losses.fisher import EmpiricalFisher
from adler.losses.generic import AutogradHessian
from adler.losses.registry import loss_hessian, register
from adler.losses.sequences import CTCHessian, KLDivHessian

__all__ = [
    "AutogradHessian",
    "BCEWithLogitsHessian",
    "CTCHessian",
    "CrossEntropyHessian",
    "EmpiricalFisher",
    "GaussianNLLHessian",
    "HuberHessian",
    "KLDivHessian",
    "LossHessian",
    "MSEHessian",
    "NLLHessian",
    "PoissonNLLHessian",
    "SmoothL1Hessian",
    "loss_hessian",
    "register",
]
