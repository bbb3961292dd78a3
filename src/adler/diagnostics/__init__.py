r"""Why a network trains fast or slowly: curvature, conditioning, and what they predict.

One call looks at a network on its data, another at its training:

>>> import torch
>>> from adler import diagnostics
>>> model, criterion = torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss()
>>> loader = [(torch.randn(8, 4), torch.randint(3, (8,)))]
>>> found = diagnostics.report(model, criterion, loader)  # found.table(), found.plot()
>>> monitor = diagnostics.Monitor(model, criterion, every=100)  # monitor(x, y) in the loop

Beneath are pure functions, one module a subject. Those that look at a loss take it as an
`adler.curvature.Objective`, which binds network, batch and criterion once. The instruments look at
a network:

| module | what it holds |
|---|---|
| `adler.curvature.kernel` | the tangent kernel $J J^\top$, matrix-free or dense |
| `adler.curvature.spectrum` | extreme eigenvalues: Lanczos, power iteration, Gershgorin |
| `ggn`, `hessian` | the GGN's largest eigenvalue; how much of the Hessian the GGN is |
| `polyak`, `weak_polyak` | PL coefficients, and the weak ones of convex losses and cross-entropy |
| `descent` | what they and smoothness predict of gradient descent |
| `features` | Gram matrices of a network's features |
| `landscape` | dropout stability and linear paths |
| `gram` | the conditioning of a Gram matrix |

`theory` needs no data, or bounds what the instruments find:

| module | what it holds |
|---|---|
| `composition` | Lipschitz and smoothness constants, composed layer by layer |
| `smoothness` | those of a network and of its loss, in the parameters |
| `input_smoothness` | those of a network in its inputs |
| `ball` | where the tangent kernel stays well conditioned |
| `perturbation` | how far a Gram matrix can move with the weights |
| `activations` | activations at a normal input: moments, Hermite coefficients, normalisation |
| `duals` | dual activations: one layer at infinite width |
| `infinite_width` | Gram matrices layer by layer at infinite width |
| `generalisation` | a stability bound of the generalisation gap |

Extreme eigenvalues beyond a thousand outputs need SciPy, the picture needs matplotlib:
``pip install 'torch-adler[diagnostics]'``.
"""

from adler.curvature import TangentKernel, kernel, spectrum
from adler.diagnostics import (
    descent,
    features,
    ggn,
    gram,
    hessian,
    landscape,
    polyak,
    weak_polyak,
)
from adler.diagnostics.descent import (
    accumulated_bound,
    convergence_radius,
    measured_smoothness,
    predicted_contraction,
    predicted_decrease,
)
from adler.diagnostics.features import feature_grams
from adler.diagnostics.ggn import ggn_largest_eigenvalue
from adler.diagnostics.gram import (
    conditioning,
    correlation,
    degradation_bound,
    eigenvalue_perturbation,
)
from adler.diagnostics.hessian import hessian_split, output_hessian_norm
from adler.diagnostics.landscape import dropout_stability, linear_path, loss_barrier
from adler.diagnostics.polyak import (
    kernel_pl_bound,
    kernel_upper_pl_bound,
    mean_pl_coefficient,
    pl_coefficient,
    satisfies_pl_star,
    satisfies_upper_pl,
)
from adler.diagnostics.reports import Monitor, Report, report
from adler.diagnostics.snapshots import Snapshot, snapshot
from adler.diagnostics.theory import (
    activations,
    ball,
    composition,
    duals,
    generalisation,
    infinite_width,
    input_smoothness,
    perturbation,
    smoothness,
)
from adler.diagnostics.theory.activations import nonlinearity, normalised_activation
from adler.diagnostics.theory.duals import dual_activation
from adler.diagnostics.theory.generalisation import (
    generalisation_bound,
    generalisation_gap,
    pointwise_hypothesis_stability,
)
from adler.diagnostics.theory.infinite_width import (
    eigenvalue_lower_bound,
    iterated_gram,
    maximal_distortion,
)
from adler.diagnostics.theory.input_smoothness import input_bounds
from adler.diagnostics.theory.smoothness import loss_smoothness, network_bounds
from adler.diagnostics.weak_polyak import (
    cross_entropy_gradient_bound,
    distance_estimate,
    weak_pl_coefficient,
    weak_predicted_decrease,
)

__all__ = [
    "Monitor",
    "Report",
    "Snapshot",
    "TangentKernel",
    "accumulated_bound",
    "activations",
    "ball",
    "composition",
    "conditioning",
    "convergence_radius",
    "correlation",
    "cross_entropy_gradient_bound",
    "degradation_bound",
    "descent",
    "distance_estimate",
    "dropout_stability",
    "dual_activation",
    "duals",
    "eigenvalue_lower_bound",
    "eigenvalue_perturbation",
    "feature_grams",
    "features",
    "generalisation",
    "generalisation_bound",
    "generalisation_gap",
    "ggn",
    "ggn_largest_eigenvalue",
    "gram",
    "hessian",
    "hessian_split",
    "infinite_width",
    "input_bounds",
    "input_smoothness",
    "iterated_gram",
    "kernel",
    "kernel_pl_bound",
    "kernel_upper_pl_bound",
    "landscape",
    "linear_path",
    "loss_barrier",
    "loss_smoothness",
    "maximal_distortion",
    "mean_pl_coefficient",
    "measured_smoothness",
    "network_bounds",
    "nonlinearity",
    "normalised_activation",
    "output_hessian_norm",
    "perturbation",
    "pl_coefficient",
    "pointwise_hypothesis_stability",
    "polyak",
    "predicted_contraction",
    "predicted_decrease",
    "report",
    "satisfies_pl_star",
    "satisfies_upper_pl",
    "smoothness",
    "snapshot",
    "spectrum",
    "weak_pl_coefficient",
    "weak_polyak",
    "weak_predicted_decrease",
]
