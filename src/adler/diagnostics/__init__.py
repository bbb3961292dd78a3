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
| `polyak` | PL coefficients |
| `descent` | what they and smoothness predict of gradient descent |
| `features` | Gram matrices of a network's features |
| `gram` | the conditioning of a Gram matrix |

`theory` needs no data, or bounds what the instruments find:

| module | what it holds |
|---|---|
| `composition` | Lipschitz and smoothness constants, composed layer by layer |
| `smoothness` | those of a network and of its loss |
| `activations` | activations at a normal input: moments, Hermite coefficients, normalisation |
| `duals` | dual activations: one layer at infinite width |
| `infinite_width` | Gram matrices layer by layer at infinite width |
| `generalisation` | a stability bound of the generalisation gap |

Extreme eigenvalues beyond a thousand outputs need SciPy, the picture needs matplotlib:
``pip install 'torch-adler[diagnostics]'``.
"""

from adler.curvature import TangentKernel, kernel, spectrum
from adler.diagnostics import descent, features, ggn, gram, hessian, polyak
from adler.diagnostics.descent import (
    accumulated_bound,
    measured_smoothness,
    predicted_decrease,
)
from adler.diagnostics.features import feature_grams
from adler.diagnostics.ggn import ggn_largest_eigenvalue
from adler.diagnostics.gram import conditioning, correlation, degradation_bound
from adler.diagnostics.hessian import hessian_split, output_hessian_norm
from adler.diagnostics.polyak import (
    kernel_pl_bound,
    pl_coefficient,
    satisfies_pl_star,
    weak_pl_bound,
    weak_pl_coefficient,
)
from adler.diagnostics.reports import Monitor, Report, report
from adler.diagnostics.snapshots import Snapshot, snapshot
from adler.diagnostics.theory import (
    activations,
    composition,
    duals,
    generalisation,
    infinite_width,
    smoothness,
)
from adler.diagnostics.theory.activations import nonlinearity, normalised_activation
from adler.diagnostics.theory.duals import dual_activation
from adler.diagnostics.theory.generalisation import (
    generalisation_bound,
    pointwise_hypothesis_stability,
)
from adler.diagnostics.theory.infinite_width import (
    eigenvalue_lower_bound,
    iterated_gram,
    maximal_distortion,
)
from adler.diagnostics.theory.smoothness import loss_smoothness, network_bounds

__all__ = [
    "Monitor",
    "Report",
    "Snapshot",
    "TangentKernel",
    "accumulated_bound",
    "activations",
    "composition",
    "conditioning",
    "correlation",
    "degradation_bound",
    "descent",
    "dual_activation",
    "duals",
    "eigenvalue_lower_bound",
    "feature_grams",
    "features",
    "generalisation",
    "generalisation_bound",
    "ggn",
    "ggn_largest_eigenvalue",
    "gram",
    "hessian",
    "hessian_split",
    "infinite_width",
    "iterated_gram",
    "kernel",
    "kernel_pl_bound",
    "loss_smoothness",
    "maximal_distortion",
    "measured_smoothness",
    "network_bounds",
    "nonlinearity",
    "normalised_activation",
    "output_hessian_norm",
    "pl_coefficient",
    "pointwise_hypothesis_stability",
    "polyak",
    "predicted_decrease",
    "report",
    "satisfies_pl_star",
    "smoothness",
    "snapshot",
    "spectrum",
    "weak_pl_bound",
    "weak_pl_coefficient",
]
