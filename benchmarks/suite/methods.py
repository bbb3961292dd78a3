"""The methods that are compared, by name: each at the setting that its authors recommend.

"Untuned" means that one line here serves every task. A peer is its authors' own package, imported
when a run begins: ``pip install -e '.[benchmarks]'``. One entry adds a method.

Variants of this library's optimizers need no entry: ``adler@max_kl=0.03,trust_region=None`` or
``adler-adam@lr=0.5`` name options: see `benchmarks.suite.variants`.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from torch.optim import SGD, AdamW, Optimizer

import adler
from adler import Guard, Measure
from benchmarks.suite.muon import MuonAdamW
from benchmarks.suite.nadamw import NAdamW
from benchmarks.suite.schedulefree_plus import ScheduleFreePlus
from benchmarks.suite.steppers import (
    Averaged,
    Parabola,
    ScheduleFree,
    ScheduleFreeTakesLoss,
    Setting,
    Stepper,
    TakesLoss,
    warmup,
    warmup_cosine,
)
from benchmarks.suite.variants import VARIED, arguments, variant
from examples.cifar.presets import GRID

__all__ = ["METHODS", "Method", "method"]


class Method(NamedTuple):
    """A way to train, with nothing set by hand unless there is a grid.

    Attributes:
        label: In tables and figures.
        grid: Learning rates that are all run, the best of which is reported; None if untuned.
        passes: Forward passes, backward passes and Jacobian-vector products of one step.
        make: Begins a run.
        package: The import name of the peer's package, if it is one.
        needs_steps: Whether it must be told how long the run is: for a cosine, or for a warm-up
            that is a share of it. A run of one that need not be told is, epoch by epoch, also
            every shorter run.
    """

    label: str
    grid: tuple[float, ...] | None
    passes: float
    make: Callable[[Setting], Stepper]
    package: str | None = None
    needs_steps: bool = False

    @property
    def installed(self) -> bool:
        """Whether its package is there."""
        return self.package is None or importlib.util.find_spec(self.package) is not None


def _peer(package: str) -> Any:
    """A peer's module.

    Raises:
        ImportError: If it is not installed. The message says how to install it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{package} is not installed: pip install -e '.[benchmarks]'") from error


# --- this library, and what PyTorch has ----------------------------------------------------------


def _measured(kind: Callable[..., Optimizer], **options: Any) -> Callable[[Setting], Stepper]:
    """An optimizer of this library, which also takes the model and the criterion."""
    return lambda s: Stepper(s, kind(s.model.parameters(), s.model, s.criterion, **options))


def _interpolated(kind: Callable[..., Optimizer], **options: Any) -> Callable[[Setting], Stepper]:
    """One that is tested at an average, which it puts in place of the weights."""
    return lambda s: ScheduleFree(s, kind(s.model.parameters(), s.model, s.criterion, **options))


def _plain(
    kind: Callable[..., Optimizer], tuned: bool = False, rising: float | None = None, **options: Any
) -> Callable[[Setting], Stepper]:
    """An optimizer of the parameters alone, under warm-up and cosine where asked for."""

    def make(s: Setting) -> Stepper:
        rate = {"lr": s.rate} if tuned else {}
        schedule = None if rising is None else warmup_cosine(s.steps, rising)
        return Stepper(s, kind(s.model.parameters(), **rate, **options), schedule)

    return make


def _muon(s: Setting) -> Stepper:
    """Under 5 % of warm-up and a cosine, as tuned AdamW is."""
    return Stepper(s, MuonAdamW(s.model, lr=s.rate), warmup_cosine(s.steps, 0.05))


def _schedule_free_plus(s: Setting) -> Stepper:
    """``lr=1.0`` and its class's defaults, no average in the warm-up: its docstring.

    How long the warm-up is is our choice, the same as for `_schedule_free`.
    """
    steps = max(1, s.steps // 20)
    optimizer = ScheduleFreePlus(s.model.parameters(), average_warmup=steps)
    return ScheduleFreeTakesLoss(s, optimizer, warmup(steps))


# AlgoPerf's rule for unknown workloads: mlcommons/algorithmic-efficiency,
# algorithms/baselines/self_tuning/pytorch_nadamw_full_budget.py. Its dropout of 0.1 has no place in
# networks without dropout.
_ALGOPERF: dict[str, Any] = {
    "lr": 0.0017486387539278373,
    "betas": (1 - 0.06733926164, 0.9955159689799007),
    "weight_decay": 0.08121616522670176,
}

# --- peers ---------------------------------------------------------------------------------------


def _adapted(package: str, name: str, rising: float | None = None) -> Callable[[Setting], Stepper]:
    """Prodigy and D-Adaptation: lr=1 and no weight decay, their READMEs; rate ``d``."""

    def make(s: Setting) -> Stepper:
        optimizer = getattr(_peer(package), name)(s.model.parameters(), lr=1.0)
        schedule = None if rising is None else warmup_cosine(s.steps, rising)
        return Stepper(s, optimizer, schedule, lambda o: _group(o, "lr") * _group(o, "d"))

    return make


def _dog(name: str) -> Callable[[Setting], Stepper]:
    """``reps_rel`` 1e-6, or 1e-4 with BatchNorm, and the averager's defaults: README."""

    def make(s: Setting) -> Stepper:
        dog = _peer("dog")
        reps_rel = 1e-4 if s.has_batch_norm else 1e-6
        optimizer = getattr(dog, name)(s.model.parameters(), reps_rel=reps_rel)
        averager = dog.PolynomialDecayAverager(s.model)

        def rate(o: Optimizer) -> float:
            return math.fsum(map(float, o.param_groups[0]["eta"])) / len(o.param_groups[0]["eta"])

        return Averaged(s, optimizer, averager, rate)

    return make


def _schedule_free(name: str, lr: float) -> Callable[[Setting], Stepper]:
    """The class's default rate; warm-up is recommended (README), over how much is our choice."""

    def make(s: Setting) -> Stepper:
        kind = getattr(_peer("schedulefree"), name)
        optimizer = kind(s.model.parameters(), lr=lr, warmup_steps=max(1, s.steps // 20))
        return ScheduleFree(s, optimizer, rate=lambda o: _group(o, "scheduled_lr"))

    return make


def _momo(name: str, lr: float) -> Callable[[Setting], Stepper]:
    """The README's rate, an upper bound of a step that is not told."""

    def make(s: Setting) -> Stepper:
        optimizer = getattr(_peer("momo"), name)(s.model.parameters(), lr=lr)
        return TakesLoss(s, optimizer, rate=lambda o: math.nan)

    return make


def _gen(kind: Callable[..., Optimizer], **options: Any) -> Callable[[Setting], Stepper]:
    """Initial rate 1e-4, a fit every 4 steps: README, ``examples/cv.py``; momentum: the latter.

    ``scale`` stays 1, the function's default. The linear decay of that script, which fine-tunes,
    keeps a rate so small from ever growing; where both were tried, it trained worse each time.
    """

    def make(s: Setting) -> Stepper:
        optimizer = kind(s.model.parameters(), lr=1e-4, **options)
        return Parabola(s, optimizer, _peer("GeN").lr_parabola, every=4)

    return make


def _mechanic(s: Setting) -> Stepper:
    """``lr=1.0`` and the package's defaults: README."""
    optimizer = _peer("mechanic_pytorch").mechanize(AdamW)(s.model.parameters(), lr=1.0)

    def rate(o: Optimizer) -> float:
        state: Any = o.state
        return _group(o, "lr") * float(state["_mechanic"]["s"].sum())

    return Stepper(s, optimizer, rate=rate)


def _ademamix(s: Setting) -> Stepper:
    """The README's constants, the slow momentum growing over the whole run as there.

    The paper's runs also warm up and follow a cosine; 2 % of warm-up, as for NAdamW, is our choice.
    """
    optimizer = _peer("pytorch_optimizer").AdEMAMix(
        s.model.parameters(),
        lr=1e-3,
        betas=(0.9, 0.999, 0.9999),
        alpha=8.0,
        t_alpha_beta3=s.steps,
        weight_decay=0.1,
        weight_decouple=True,
    )
    return Stepper(s, optimizer, warmup_cosine(s.steps, 0.02))


def _soap(s: Setting) -> Stepper:
    """The class's defaults, which are the authors': betas 0.95, a new basis every ten steps."""
    optimizer = _peer("pytorch_optimizer").SOAP(s.model.parameters(), lr=s.rate)
    return Stepper(s, optimizer, warmup_cosine(s.steps, 0.05))


def _normuon(s: Setting) -> Stepper:
    """The same matrices, scale, decay and AdamW as `MuonAdamW`; else the class's defaults."""
    named = dict(s.model.named_parameters())
    matrices = set(adler.hidden_matrices(s.model))
    common: dict[str, Any] = {"lr": s.rate, "weight_decay": 1e-2}
    of_adamw = {"use_muon": False, "betas": (0.9, 0.999), "eps": 1e-8, **common}
    of_muon = {"use_muon": True, "update_scale": "match_rms", **common}
    groups = [
        {"params": [p for name, p in named.items() if name not in matrices], **of_adamw},
        {"params": [p for name, p in named.items() if name in matrices], **of_muon},
    ]
    optimizer = _peer("pytorch_optimizer").NorMuon([g for g in groups if g["params"]])
    return Stepper(s, optimizer, warmup_cosine(s.steps, 0.05))


def _group(optimizer: Optimizer, name: str) -> float:
    return float(optimizer.param_groups[0][name])


# --- the registry --------------------------------------------------------------------------------


def _rates(lowest: float) -> tuple[float, ...]:
    """Five learning rates over two decades, from ten to this power."""
    return tuple(float(f"{rate:.6g}") for rate in np.logspace(lowest, lowest + 2, 5).tolist())


_CAP_ONLY: dict[str, Any] = {"guard": Guard(max_kl=None, max_relative_change=None)}
# Forward mode on a quarter of the batch at every eighth step, after a hundred at every one.
_RARELY = 2 + 1 / 32

# No momentum, weight decay or schedule but where it says so; PyTorch's defaults unless stated.
METHODS: dict[str, Method] = {
    "sgd": Method("SGD grid", GRID, 2, _plain(SGD, tuned=True)),
    "adamw-cosine-tuned": Method(
        "AdamW + cosine, grid",
        _rates(-3.5),
        2,
        _plain(AdamW, tuned=True, rising=0.05),
        needs_steps=True,
    ),
    "sgd-momentum-cosine-tuned": Method(
        "SGD + momentum + cosine, grid",
        _rates(-2.5),
        2,
        _plain(SGD, tuned=True, rising=0.05, momentum=0.9),
        needs_steps=True,
    ),
    "muon-cosine-tuned": Method(
        "Muon + AdamW + cosine, grid", _rates(-3.5), 2, _muon, needs_steps=True
    ),
    "normuon-cosine-tuned": Method(
        "NorMuon + AdamW + cosine, grid",
        _rates(-3.5),
        2,
        _normuon,
        "pytorch_optimizer",
        needs_steps=True,
    ),
    # Its authors' rate, 3e-3, in the middle.
    "soap-cosine-tuned": Method(
        "SOAP + cosine, grid", _rates(-3.5), 2, _soap, "pytorch_optimizer", needs_steps=True
    ),
    "adler": Method("Adler", None, _RARELY, _interpolated(adler.Adler)),
    "adler-cap": Method(
        "Adler (trust region only)", None, _RARELY, _interpolated(adler.Adler, **_CAP_ONLY)
    ),
    "adler-published": Method("ADLER (published)", None, 3, _measured(adler.Adler.as_published)),
    "adler-adam": Method("AdlerAdam", None, _RARELY, _measured(adler.AdlerAdam)),
    "adler-schedulefree": Method(
        "AdlerScheduleFree", None, _RARELY, _interpolated(adler.AdlerScheduleFree)
    ),
    "adler-muon": Method("AdlerMuon", None, _RARELY, _interpolated(adler.AdlerMuon)),
    "adler-schedulefree-every-step": Method(
        "AdlerScheduleFree, every step",
        None,
        3,
        _interpolated(adler.AdlerScheduleFree, measure=Measure.every_step()),
    ),
    "adler-schedulefree-difference": Method(
        "AdlerScheduleFree, finite difference",
        None,
        3,
        _interpolated(adler.AdlerScheduleFree, measure=Measure.every_step("finite_difference")),
    ),
    # Of its steps after the first hundred: two passes on a quarter of the batch, every eighth.
    "adler-schedulefree-low-cost": Method(
        "AdlerScheduleFree, low_cost", None, 2.0625, _interpolated(adler.AdlerScheduleFree.low_cost)
    ),
    "gauss-newton-published": Method(
        "GN (published)", None, 3, _measured(adler.GaussNewton.as_published)
    ),
    "adamw": Method("AdamW (default)", None, 2, _plain(AdamW)),
    # There is no recommended pair: PyTorch's default rate is 1e-3 without momentum, Keras's 1e-2.
    "sgd-momentum": Method("SGD, momentum", None, 2, _plain(SGD, lr=1e-2, momentum=0.9)),
    "nadamw-cosine": Method(
        "NAdamW + cosine (AlgoPerf)",
        None,
        2,
        _plain(NAdamW, rising=0.02, **_ALGOPERF),
        needs_steps=True,
    ),
    "ademamix-cosine": Method(
        "AdEMAMix + cosine", None, 2, _ademamix, "pytorch_optimizer", needs_steps=True
    ),
    "prodigy": Method("Prodigy", None, 2, _adapted("prodigyopt", "Prodigy"), "prodigyopt"),
    # "Either using no scheduler or using cosine annealing": README.
    "prodigy-cosine": Method(
        "Prodigy + cosine",
        None,
        2,
        _adapted("prodigyopt", "Prodigy", rising=0.0),
        "prodigyopt",
        needs_steps=True,
    ),
    "dadapt-adam": Method(
        "D-Adapt Adam", None, 2, _adapted("dadaptation", "DAdaptAdam"), "dadaptation"
    ),
    "dog": Method("DoG", None, 2, _dog("DoG"), "dog"),
    "ldog": Method("L-DoG", None, 2, _dog("LDoG"), "dog"),
    "schedulefree-adamw": Method(
        "Schedule-Free AdamW",
        None,
        2,
        _schedule_free("AdamWScheduleFree", 2.5e-3),
        "schedulefree",
        needs_steps=True,
    ),
    "schedulefree-sgd": Method(
        "Schedule-Free SGD",
        None,
        2,
        _schedule_free("SGDScheduleFree", 1.0),
        "schedulefree",
        needs_steps=True,
    ),
    "schedulefree-plus": Method("ScheduleFree+", None, 2, _schedule_free_plus, needs_steps=True),
    "momo": Method("MoMo", None, 2, _momo("Momo", 1.0), "momo"),
    "momo-adam": Method("MoMo-Adam", None, 2, _momo("MomoAdam", 1e-2), "momo"),
    # Three forward passes every fourth step.
    "gen-adamw": Method("GeN AdamW", None, 2.75, _gen(AdamW), "GeN"),
    "gen-sgd": Method("GeN SGD", None, 2.75, _gen(SGD, momentum=0.9), "GeN"),
    "mechanic-adamw": Method("Mechanic AdamW", None, 2, _mechanic, "mechanic_pytorch"),
}


def method(name: str) -> Method:
    """A method of the registry, or a variant.

    Raises:
        ValueError: For an unknown name.
    """
    if name in METHODS:
        return METHODS[name]
    if "@" not in name:
        raise ValueError(f"method {name!r}: expected one of {', '.join(METHODS)}, or a variant")
    base, options = variant(name)
    begin = _interpolated if hasattr(VARIED[base], "eval") else _measured
    made = begin(VARIED[base], **arguments(base, options))
    return Method(name, None, METHODS[base].passes, made)
