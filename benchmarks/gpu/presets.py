"""How large everything is: for one GPU, and for a look at whether it runs."""

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
    """Part (c): a decoder over bytes; a step sees ``batch · length`` of them."""

    width: int
    depth: int
    length: int
    batch: int
    steps: int
    evaluations: int
    test_batches: int
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    muon_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)


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
    """All parts.

    Attributes:
        shares: Of the time left when it begins, what each part may use, by its letter. A part that
            does not end within it goes on in the next call.
    """

    cost: Cost
    gpt: Gpt
    pictures: Pictures
    cells: Cells
    shares: dict[str, float]
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
    "smoke": Preset(
        cost=Cost(("MLP",), rounds=8, variants=("bfloat16, eager",), quick=True),
        gpt=Gpt(32, 1, length=16, batch=4, steps=8, evaluations=2, test_batches=2),
        pictures=Pictures((4, 8), epochs=2, batch=32, seeds=(0, 1), target=0.3),
        cells=Cells("smoke", jobs=1, seconds=5, most=2),
        shares={"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0, "e": 1.0},
        synthetic=True,
    ),
}
