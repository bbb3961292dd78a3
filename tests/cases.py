"""Small networks, losses and batches on which every claim is checked, in float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """A transformer block and a head, small enough for a dense Jacobian."""

    def __init__(self, width: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unsqueeze(1).chunk(3, dim=-1)
        attended = nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1)
        return self.head((x + self.mix(attended)).mean(1))


def mlp(activation: type[nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), activation(), nn.Linear(5, 3))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 3)
    )


def batchnorm() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


# name: (network, shape of one example)
NETWORKS = {
    "linear": (lambda: nn.Linear(4, 3), (4,)),
    "mlp-tanh": (lambda: mlp(nn.Tanh), (4,)),
    "mlp-relu": (lambda: mlp(nn.ReLU), (4,)),
    "cnn": (cnn, (1, 6, 6)),
    "batchnorm": (batchnorm, (4,)),
    "transformer": (Attention, (3, 4)),
}

CRITERIA = {
    "mse-mean": lambda: nn.MSELoss(),
    "mse-sum": lambda: nn.MSELoss(reduction="sum"),
    "ce-mean": lambda: nn.CrossEntropyLoss(),
    "ce-sum": lambda: nn.CrossEntropyLoss(reduction="sum"),
}


def network(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return NETWORKS[name][0]().double()


def batches(
    name: str, criterion: nn.Module, count: int, size: int = 6, seed: int = 1
) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shape = NETWORKS[name][1]
    made = []
    for _ in range(count):
        x = torch.randn(size, *shape, generator=generator, dtype=torch.float64)
        if isinstance(criterion, nn.MSELoss):
            y = torch.randn(size, 3, generator=generator, dtype=torch.float64)
        else:
            y = torch.randint(3, (size,), generator=generator)
        made.append((x, y))
    return made


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])
