"""How large everything is: for one GPU, for two CPU cores, and for a look at whether it runs."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PRESETS", "Cells", "Cost", "Gpt", "Pictures", "Preset"]


@dataclass(frozen=True)
class Cost:
    """Part (b).

    Attributes:
        networks: Beginnings of names in `benchmarks.networks.TASKS`, or of `QUICK`.
        rounds: Timed steps, a multiple of `benchmarks.step_cost.BLOCK`.
        variants: Of precision, and whether compiled: names in `benchmarks.gpu.cost.VARIANTS`.
        quick: Whether the networks are of `QUICK`.
    """

    networks: tuple[str, ...]
    rounds: int
    variants: tuple[str, ...] = ("bfloat16, eager", "float32, eager", "bfloat16, compiled")
    quick: bool = False


@dataclass(frozen=True)
class Gpt:
    """Part (c): a decoder over bytes; a step sees ``batch · length`` of them.

    With ``bfloat16`` the networks of this part, and of the next, run under autocast. A GPU gains by
    it; the CPUs at hand take twice as long.
    """

    width: int
    depth: int
    length: int
    batch: int
    steps: int
    evaluations: int
    test_batches: int
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    muon_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    bfloat16: bool = True


@dataclass(frozen=True)
class Pictures:
    """Part (d): a residual network, whose rates are chosen by the first seed."""

    widths: tuple[int, ...]
    epochs: int
    batch: int
    seeds: tuple[int, ...]
    target: float
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    muon_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    bfloat16: bool = True


@dataclass(frozen=True)
class Cells:
    """Part (e): a preset of `examples.cifar.presets`, run by run.

    Attributes:
        preset: Its name.
        jobs: Processes side by side.
        seconds: How long a run may last, before any has told.
        most: Of the preset's runs the first so many; None: all.
    """

    preset: str
    jobs: int
    seconds: float
    most: int | None = None


@dataclass(frozen=True)
class Preset:
    """The parts.

    Attributes:
        shares: Of the time left when it begins, what each part may use, by its letter. A part that
            does not end within it goes on in the next call. A letter that is missing is no part.
        device: What it is for.
        results: Directory of its records, unless another is named.
        synthetic: Whether data are made, where none are named.
    """

    gpt: Gpt
    pictures: Pictures
    shares: dict[str, float]
    cost: Cost | None = None
    cells: Cells | None = None
    device: str = "cuda"
    results: str = "benchmarks/results/gpu"
    synthetic: bool = False


PRESETS = {
    # The decoder has 10.8 M parameters, and a step sees 32,768 bytes. The pictures' network has
    # 4.9 M, and is trained for 16 epochs of 97 steps.
    "full": Preset(
        cost=Cost(("MLP", "ResNet-18", "ViT, 21 M", "GPT-style decoder, 30 M"), rounds=40),
        gpt=Gpt(384, 6, length=512, batch=64, steps=2000, evaluations=10, test_batches=40),
        pictures=Pictures(
            (64, 128, 256, 512), epochs=16, batch=512, seeds=(0, 1, 2, 3, 4), target=0.92
        ),
        cells=Cells("full", jobs=6, seconds=240),
        shares={"a": 0.25, "b": 0.3, "c": 0.7, "d": 0.7, "e": 1.0},
    ),
    # The largest that fits a night, or a few hours of two cores: 1.9 M parameters and 3.1 million
    # bytes; 78 thousand parameters, and three times all pictures, which is too little for the
    # accuracy that the other preset asks for. Small networks want other rates.
    "two-cores": Preset(
        gpt=Gpt(
            192,
            4,
            length=128,
            batch=16,
            steps=1500,
            evaluations=6,
            test_batches=40,
            rates=(3e-4, 1e-3, 3e-3),
            muon_rates=(3e-3, 1e-2, 3e-2),
            bfloat16=False,
        ),
        pictures=Pictures(
            (16, 32, 64),
            epochs=3,
            batch=128,
            seeds=(0, 1, 2, 3, 4),
            target=0.65,
            rates=(3e-3, 1e-2, 3e-2),
            muon_rates=(3e-3, 1e-2, 3e-2),
            bfloat16=False,
        ),
        shares={"c": 0.5, "d": 1.0},
        device="cpu",
        results="benchmarks/results/two-cores",
    ),
    "smoke": Preset(
        cost=Cost(("MLP",), rounds=8, variants=("bfloat16, eager",), quick=True),
        gpt=Gpt(32, 1, length=16, batch=4, steps=8, evaluations=2, test_batches=2),
        pictures=Pictures((4, 8), epochs=2, batch=32, seeds=(0, 1), target=0.3),
        cells=Cells("smoke", jobs=1, seconds=5, most=2),
        shares={"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0, "e": 1.0},
        device="cpu",
        results="runs/gpu-smoke",
        synthetic=True,
    ),
}
