r"""Two looks at the landscape around trained networks: dropout stability and linear connectivity.

A network is $\epsilon$-*dropout stable* if its loss changes by at most $\epsilon$ when only some
units of each hidden layer are kept and what leaves them is scaled up to make up for the others. Two
networks are connected by a path if the loss along it exceeds that of its ends by little.

Source: A. Shevchenko, M. Mondelli, *Landscape connectivity and dropout stability of SGD solutions
for over-parameterized neural networks*, ICML 2020.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from adler.curvature.jacobian import Parameters
from adler.curvature.objective import Objective

__all__ = ["DropoutStability", "dropout_stability", "linear_path", "loss_barrier"]


class DropoutStability(NamedTuple):
    """A loss with all units and with some of them.

    Attributes:
        loss: With all, ``L_N``.
        thinned: With those kept, ``L_M``.
    """

    loss: float
    thinned: float

    @property
    def change(self) -> float:
        """``|L_N - L_M|``: the least ``ε`` of which the network is dropout stable."""
        return abs(self.loss - self.thinned)


@torch.no_grad()
def dropout_stability(
    objective: Objective, kept: float = 0.5, seed: int | None = None
) -> DropoutStability:
    """How the loss changes when part of the units of every hidden layer is left out.

    Of ``N`` units of a layer ``M = max(1, round(kept * N))`` stay, and the weights that leave them
    are multiplied by ``N/M``. The parameters of the model are not touched.

    Args:
        objective: A loss of a ``Sequential`` of ``Linear`` layers and entrywise modules, all of
            whose weights are among its parameters.
        kept: Which part, above 0 and at most 1.
        seed: Of the choice of units; ``None``: the first ones, which are as good as any others
            where the weights are drawn independently.

    Raises:
        ValueError: If the model is another one, has no hidden layer, or ``kept`` is out of range.

    Examples:
        >>> model = nn.Sequential(nn.Linear(1, 4, bias=False), nn.Linear(4, 1, bias=False))
        >>> _ = [nn.init.ones_(p) for p in model.parameters()]
        >>> h = Objective(model, torch.ones(2, 1), torch.zeros(2, 1), nn.MSELoss())
        >>> dropout_stability(h)  # equal units: any of them stand for all
        DropoutStability(loss=16.0, thinned=16.0)
    """
    if not 0 < kept <= 1:
        raise ValueError(f"kept={kept!r}: expected a number above 0 and at most 1")
    layers = _linear_layers(objective)
    params = dict(objective.params)
    generator = torch.Generator().manual_seed(0 if seed is None else seed)
    for (_, layer), (name, following) in itertools.pairwise(layers):
        units = layer.out_features
        count = max(1, round(kept * units))
        order = torch.arange(units) if seed is None else torch.randperm(units, generator=generator)
        scale = torch.zeros(units, dtype=following.weight.dtype)
        scale[order[:count]] = units / count
        weight = f"{name}.weight" if name else "weight"
        params[weight] = params[weight] * scale.to(following.weight.device)
    return DropoutStability(float(objective.loss()), float(objective.loss(params)))


def _linear_layers(objective: Objective) -> list[tuple[str, nn.Linear]]:
    """In the order in which they run."""
    model = objective.call.model
    if not isinstance(model, nn.Sequential):
        raise ValueError(f"objective: its model is {type(model).__name__}, not a Sequential")
    layers = [(name, m) for name, m in model.named_children() if isinstance(m, nn.Linear)]
    others = [
        (name, m)
        for name, m in model.named_children()
        if not isinstance(m, nn.Linear) and next(m.parameters(), None) is not None
    ]
    if others or len(layers) < 2:
        raise ValueError(
            "objective: its model is no Sequential of at least two Linear layers and modules "
            "without parameters"
        )
    missing = [name for name, _ in layers if f"{name}.weight" not in objective.params]
    if missing:
        raise ValueError(f"objective: the weights of {missing} are not among its parameters")
    return layers


@torch.no_grad()
def linear_path(
    objective: Objective, start: Parameters, end: Parameters, points: int = 21
) -> Tensor:
    r"""Losses along the straight line between two sets of parameters.

    Args:
        objective: The loss; its own parameters' values do not enter.
        start: By name.
        end: The same names and shapes.
        points: How many, both ends among them.

    Returns:
        Shape ``(points,)``, at ``(1 - t) start + t end`` for ``t`` from 0 to 1.

    Raises:
        ValueError: If the names differ from those of the objective, or there are fewer points
            than 2.

    Examples:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> h = Objective(model, torch.ones(1, 1), torch.zeros(1, 1), nn.MSELoss())
        >>> a, b = {"weight": torch.tensor([[-1.0]])}, {"weight": torch.tensor([[1.0]])}
        >>> linear_path(h, a, b, points=3)
        tensor([1., 0., 1.])
    """
    if points < 2:
        raise ValueError(f"points={points!r}: expected at least 2")
    for label, given in (("start", start), ("end", end)):
        if given.keys() != objective.params.keys():
            difference = sorted(given.keys() ^ objective.params.keys())
            raise ValueError(f"{label}: its names differ from the objective's: {difference}")
    losses = []
    for t in torch.linspace(0, 1, points, dtype=torch.float64).tolist():
        between = {name: torch.lerp(start[name], end[name], t) for name in start}
        losses.append(objective.loss(between))
    return torch.stack(losses)


def loss_barrier(losses: Tensor) -> float:
    """How far the loss along a path exceeds the larger of its ends; not negative.

    It is the least ``ε`` with which the path connects its ends.

    Args:
        losses: Along the path, ``(points,)``, as `linear_path` returns them.

    Raises:
        ValueError: If there are fewer than two.

    Examples:
        >>> loss_barrier(torch.tensor([1.0, 3.0, 2.0])), loss_barrier(torch.tensor([2.0, 0.0, 1.0]))
        (1.0, 0.0)
    """
    if losses.ndim != 1 or len(losses) < 2:
        raise ValueError(f"losses: shape {tuple(losses.shape)}; expected at least two along a path")
    return float(losses.max() - torch.maximum(losses[0], losses[-1]))
