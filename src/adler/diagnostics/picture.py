"""The picture of a report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adler.diagnostics.snapshots import Snapshot

__all__ = ["draw"]

# Okabe and Ito's colours, told apart with any colour vision.
_BLUE, _ORANGE, _GREEN, _RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"


def draw(snapshots: Sequence[Snapshot]) -> Any:
    """Six panels: spectrum, μ and L, rates, decrease, trust, and the loss along the gradient.

    Args:
        snapshots: At least one.

    Returns:
        A `matplotlib.figure.Figure`, on no screen: ``figure.savefig("report.png")``.

    Raises:
        ImportError: Without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "the picture needs matplotlib: pip install 'torch-adler[diagnostics]'"
        ) from error
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    panels = figure.subplots(2, 3)
    _spectra(panels[0, 0], snapshots)
    steps = [s.step for s in snapshots]
    lines = {
        "smoothness $L$": ([s.smoothness for s in snapshots], _BLUE, "o-"),
        r"PL coefficient $\mu$": ([s.pl for s in snapshots], _ORANGE, "s--"),
    }
    _over_steps(panels[0, 1], steps, lines, r"$\mu$ and $L$", log=True)
    lines = {
        r"ADLER's minibatch rate $\eta_k$": ([s.minibatch_lr for s in snapshots], _GREEN, "o-"),
        "$1/L$": ([_inverse(s.smoothness) for s in snapshots], _BLUE, "s--"),
    }
    _over_steps(panels[0, 2], steps, lines, "learning rate", log=True)
    lines = {
        r"predicted, $1 - \mu/L$": ([s.decrease for s in snapshots], _BLUE, "s--"),
        "measured": ([s.measured_decrease for s in snapshots], _ORANGE, "o-"),
    }
    _over_steps(panels[1, 0], steps, lines, "factor of the loss in a step of $1/L$")
    lines = {
        "along the gradient": ([s.trust_gradient for s in snapshots], _BLUE, "o-"),
        "along a random direction": ([s.trust_random for s in snapshots], _ORANGE, "s--"),
    }
    _over_steps(panels[1, 1], steps, lines, "GGN's share of the second derivative")
    panels[1, 1].set_ylim(-0.03, 1.03)
    _curves(panels[1, 2], snapshots)
    return figure


def _inverse(value: float) -> float:
    return 1 / value if value > 0 else math.nan


def _over_steps(
    axes: Any,
    steps: list[int],
    lines: dict[str, tuple[list[float], str, str]],
    label: str,
    *,
    log: bool = False,
) -> None:
    for name, (values, colour, style) in lines.items():
        axes.plot(steps, values, style, color=colour, label=name, markersize=4)
    if log and any(v > 0 for values, _, _ in lines.values() for v in values):
        axes.set_yscale("log")
    axes.set_xlabel("minibatch")
    axes.set_ylabel(label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize="small")


def _spectra(axes: Any, snapshots: Sequence[Snapshot]) -> None:
    first, last = snapshots[0], snapshots[-1]
    shown = [(first, _BLUE)] if first is last else [(first, _BLUE), (last, _RED)]
    for snapshot, colour in shown:
        largest_first = snapshot.spectrum[::-1]
        noise = 1e-7 * max(largest_first[0], 0.0)
        values = [v if v > noise else math.nan for v in largest_first]
        axes.plot(
            range(1, len(values) + 1), values, color=colour, label=f"minibatch {snapshot.step}"
        )
    axes.set_yscale("log")
    axes.set_xlabel("rank")
    axes.set_ylabel("eigenvalue of the tangent kernel")
    axes.legend(fontsize="small")


def _curves(axes: Any, snapshots: Sequence[Snapshot]) -> None:
    last = snapshots[-1]
    lengths = [i / 4 for i in range(len(last.curve))]
    axes.plot(lengths, last.model, "--", color=_BLUE, label="the GGN's parabola")
    axes.plot(lengths, last.curve, "o-", color=_ORANGE, label="measured", markersize=4)
    axes.axvline(1, color="0.6", linewidth=0.8)
    axes.set_xlabel(r"step along $-g$, in minibatch rates $\eta_k$")
    axes.set_ylabel(f"loss of minibatch {last.step}")
    finite = [v for v in last.curve if math.isfinite(v)]
    if finite and max(finite) > 10 * max(last.model[0], 1e-12):
        axes.set_yscale("log")
    axes.legend(fontsize="small")
