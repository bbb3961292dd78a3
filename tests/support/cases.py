"""Small networks, losses, batches and functions on which claims are checked, in float64."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adler import (
    Adler,
    AdlerAdam,
    AdlerMuon,
    AdlerScheduleFree,
    GaussNewton,
    SpectralSGD,
)
from adler.diagnostics.theory.activations import normalised_activation


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

KINDS = {
    "adler": Adler,
    "adam": AdlerAdam,
    "schedule-free": AdlerScheduleFree,
    "gauss-newton": GaussNewton,
    "spectral": SpectralSGD,
}


def muon(params, model, criterion, **options):
    """All matrices are orthogonalised: these small networks have hardly a hidden one."""
    return AdlerMuon(params, model, criterion, **{"matrices": ["*weight*"], **options})


# As a user may make them: each with its defaults, and `Adler` with and without the average of its
# iterates, and with momentum beside it.
MAKERS = {
    **KINDS,
    "last-iterate": functools.partial(Adler, interpolation=None),
    "momentum": functools.partial(Adler, momentum=0.9),
    "muon": muon,
    "as-published": Adler.as_published,
}

# Odd, even and neither; with a mean and without; with a kink and without.
ACTIVATIONS = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "hardtanh": F.hardtanh,
    "cos": torch.cos,
    "sigmoid": torch.sigmoid,
    "normalised relu": normalised_activation(torch.relu),
    "normalised gelu": normalised_activation(F.gelu),
    "square": lambda x: x**2,
}
# Their slopes are Lipschitz.
SMOOTH_ACTIVATIONS = {
    "elu": nn.ELU(),
    "gelu": nn.GELU(),
    "gelu-tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
    "sigmoid": nn.Sigmoid(),
    "softplus": nn.Softplus(),
    "softplus-2": nn.Softplus(beta=2.0),
    "tanh": nn.Tanh(),
    "identity": nn.Identity(),
    "normalised": normalised_activation(nn.Tanh()),
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


def problem(
    name: str, criterion_name: str = "ce-mean", seed: int = 0
) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """A network, a criterion and a batch."""
    model, criterion = network(name, seed), CRITERIA[criterion_name]()
    ((x, y),) = batches(name, criterion, 1)
    return model, criterion, x, y


def classification(n: int = 24, seed: int = 0) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """As `problem`, of as many examples as are wanted."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    return model, nn.CrossEntropyLoss(), torch.randn(n, 4).double(), torch.randint(3, (n,))


def drawn_direction(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for name, p in model.named_parameters()
    }


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def symmetric(n: int, seed: int, positive: bool = False) -> Tensor:
    matrix = draw(n, n, seed=seed)
    return matrix @ matrix.T / n if positive else (matrix + matrix.T) / 2


class Square(torch.autograd.Function):
    """Has no forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


class Quadratic:
    """½ (x - c)ᵀ A (x - c) + least: L and μ are the extreme eigenvalues of A."""

    def __init__(self, seed: int, size: int = 5) -> None:
        factor = draw(size, size, seed=seed)
        self.matrix = factor @ factor.T + 0.1 * torch.eye(size, dtype=torch.float64)
        self.centre, self.least = draw(size, seed=seed + 1), float(draw(1, seed=seed + 2))
        eigenvalues = torch.linalg.eigvalsh(self.matrix)
        self.pl, self.smoothness = float(eigenvalues[0]), float(eigenvalues[-1])

    def __call__(self, x: Tensor) -> float:
        return float((x - self.centre) @ self.matrix @ (x - self.centre) / 2) + self.least

    def gradient(self, x: Tensor) -> Tensor:
        return self.matrix @ (x - self.centre)


class Wavy:
    """x² + 3 sin² x: not convex, PL, smooth with L = 8; its minimum is 0."""

    smoothness, least = 8.0, 0.0

    def __call__(self, x: Tensor) -> float:
        return float((x**2 + 3 * x.sin() ** 2).sum())

    def gradient(self, x: Tensor) -> Tensor:
        return 2 * x + 3 * (2 * x).sin()
