"""Optimizers that `wrap` is given: those that it knows, and some that it does not."""

import copy
import warnings

import pytest
import torch
from torch import nn, optim

from adler import Wrapped
from support.cases import batches, network

CRITERION = nn.CrossEntropyLoss()
BASES = {
    "sgd": (optim.SGD, {}),
    "sgd momentum": (optim.SGD, {"momentum": 0.9}),
    "sgd dampening": (optim.SGD, {"momentum": 0.9, "dampening": 0.3}),
    "sgd nesterov": (optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "adam": (optim.Adam, {}),
    "adam amsgrad": (optim.Adam, {"amsgrad": True}),
    "adamw": (optim.AdamW, {}),
    "nadam": (optim.NAdam, {}),
    "radam": (optim.RAdam, {}),
    "adamax": (optim.Adamax, {}),
    "rmsprop": (optim.RMSprop, {}),
    "rmsprop all": (optim.RMSprop, {"momentum": 0.8, "centered": True}),
    "adagrad": (optim.Adagrad, {"lr_decay": 0.1}),
}
every_base = pytest.mark.parametrize(("kind", "options"), BASES.values(), ids=BASES)


class Foreign(optim.Adam):
    """Nobody knows how it steps."""


class Lion(optim.Optimizer):
    """Signs of an average (X. Chen et al., arXiv 2302.06675); its step does not know its size."""

    def __init__(self, params):
        super().__init__(params, {"lr": 1e-4, "calls": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["calls"] += 1
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                p.grad.mul_(0.1).add_(mean, alpha=0.9)  # as some do
                p.sub_(group["lr"] * p.grad.sign())
                mean.mul_(0.99).add_(p.grad - 0.9 * mean, alpha=0.1)


needs_muon = pytest.mark.skipif(not hasattr(optim, "Muon"), reason="of PyTorch 2.9")


def muon(params, kind=None, **options):
    kind = optim.Muon if kind is None else kind
    return kind([p for p in params if p.ndim == 2], **options)


def foreign_muon(params, **options):
    """Nobody knows how it steps."""
    return muon(params, type("ForeignMuon", (optim.Muon,), {}), **options)


class Normalised(optim.Optimizer):
    """Adam whose step is as long as the parameter, as that of LAMB (Y. You et al., 1904.00962)."""

    def __init__(self, params, decay=0.0):
        super().__init__(params, {"lr": 1e-3, "decay": decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                mean = state.setdefault("mean", torch.zeros_like(p)).lerp_(p.grad, 0.1)
                square = state.setdefault("square", torch.zeros_like(p)).lerp_(p.grad**2, 0.01)
                step = mean / (square.sqrt() + 1e-12)
                step = step * p.norm() / step.norm().clamp(min=1e-12) + group["decay"] * p
                p.sub_(group["lr"] * step)


class Late(optim.Adam):
    """Does nothing with its first gradient but to count it, as SOAP does."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if "seen" not in self.state[p]:
                    self.state[p].update(seen=torch.ones(()), step=torch.ones(()))
                    self.state[p].update(exp_avg=torch.zeros_like(p))
                    self.state[p].update(exp_avg_sq=torch.zeros_like(p))
                    p.grad = None
        super().step()


class Cautious(optim.SGD):
    """Does nothing where the gradient disagrees (K. Liang et al., 2411.16085)."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p)).lerp_(p.grad, 0.1)
                p.sub_(group["lr"] * mean * (mean * p.grad > 0))


class OwnDecay(optim.SGD):
    """Momentum, and a decay of which its groups say nothing."""

    def __init__(self, params):
        super().__init__(params, momentum=0.9)

    @torch.no_grad()
    def step(self, closure=None):
        for p in (p for group in self.param_groups for p in group["params"]):
            p.mul_(1 - 0.1 * self.param_groups[0]["lr"])
        super().step()


class SignsAndAdam(Lion):
    """Signs for matrices, Adam for the rest."""

    def __init__(self, params):
        params = list(params)
        super().__init__([p for p in params if p.ndim == 2])
        self.other = optim.Adam([p for p in params if p.ndim != 2], lr=1e-4)
        self.add_param_group({"params": self.other.param_groups[0]["params"]})

    def step(self, closure=None):
        matrices, rest = self.param_groups
        self.param_groups = [matrices]
        super().step()
        self.param_groups = [matrices, rest]
        self.other.state, self.other.param_groups[0]["lr"] = self.state, rest["lr"]
        self.other.step()


UNKNOWN = {"foreign": Foreign, "lion": Lion, "normalised": Normalised, "late": Late}
if hasattr(optim, "Muon"):
    UNKNOWN |= {"muon": muon, "foreign muon": foreign_muon}


def wrapped(base, *arguments, kind=Wrapped, **options):
    """Without the warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "wrap: ", RuntimeWarning)
        return kind(base, *arguments, **options)


def setting(make=optim.AdamW, name="mlp-tanh", steps=10, dtype=torch.float64, **options):
    model = network(name).to(dtype)
    optimizer = wrapped(make(model.parameters()), model, CRITERION, **options)
    data = [(x.to(dtype), y) for x, y in batches(name, CRITERION, steps)]
    return model, optimizer, data


def values(optimizer):
    return copy.deepcopy(optimizer.state_dict())
