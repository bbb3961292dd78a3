r"""One call that says how a network trains on its data, and why: `report`; in a loop, `Monitor`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from adler.curvature.objective import Objective
from adler.diagnostics.snapshots import Snapshot, snapshot

__all__ = ["Monitor", "Report", "report"]


@dataclass(frozen=True)
class Report:
    """Snapshots of several minibatches, or of one network over its training.

    Attributes:
        snapshots: In the order in which they were taken, at least one.
    """

    snapshots: tuple[Snapshot, ...]

    def table(self) -> str:
        """Markdown: each quantity's median, least and largest over the snapshots."""
        lines = ["| quantity | median | from | to |", "|---|---|---|---|"]
        for label, values in self._columns():
            cells = (f"{v:.3g}" for v in (statistics.median(values), min(values), max(values)))
            lines.append(f"| {label} | {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"

    def _columns(self) -> Iterable[tuple[str, list[float]]]:
        s = self.snapshots
        yield "loss h", [x.loss for x in s]
        yield "gradient norm", [math.sqrt(x.squared_norm) for x in s]
        yield "PL coefficient μ", [x.pl for x in s]
        yield "smoothness L (GGN)", [x.smoothness for x in s]
        yield "predicted decrease 1 − μ/L", [x.decrease for x in s]
        yield "measured decrease at 1/L", [x.measured_decrease for x in s]
        yield "ADLER's minibatch rate", [x.minibatch_lr for x in s]
        yield "rate 1/L", [1 / x.smoothness if x.smoothness > 0 else math.inf for x in s]
        yield "GGN trust along the gradient", [x.trust_gradient for x in s]
        yield "GGN trust along a random direction", [x.trust_random for x in s]
        yield "tangent kernel λ_max", [x.spectrum[-1] for x in s]
        yield "tangent kernel λ_min", [x.spectrum[0] for x in s]
        yield "tangent kernel condition number", [x.condition_number for x in s]

    def plot(self) -> Any:
        """A `matplotlib.figure.Figure`: spectrum, μ and L, decrease, trust, and the parabola.

        Raises:
            ImportError: Without matplotlib.
        """
        from adler.diagnostics.picture import draw

        return draw(self.snapshots)


def report(
    model: nn.Module,
    criterion: Callable[..., Tensor],
    loader: Iterable[tuple[Any, Any]],
    *,
    batches: int = 4,
    output_fn: Callable[[Any], Tensor] | None = None,
    max_bytes: int = 2**28,
    progress: bool = False,
    seed: int = 0,
) -> Report:
    """How a network trains on its data, from its first minibatches.

    Args:
        model: The network, in the mode (train or eval) it is in.
        criterion: The loss, reduced to a scalar.
        loader: Of pairs of inputs and targets.
        batches: How many to look at; fewer where the loader ends.
        output_fn: Picks the tensor that the criterion receives from what the model returns.
        max_bytes: See `snapshot`.
        progress: Whether to show a bar; needs tqdm.
        seed: See `snapshot`.

    Raises:
        ValueError: If the loader is empty, or as `snapshot`.

    Examples:
        >>> import torch
        >>> torch.manual_seed(0) and None
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> loader = [(torch.randn(16, 4), torch.randint(3, (16,))) for _ in range(2)]
        >>> found = report(model, nn.CrossEntropyLoss(), loader)
        >>> print(found.table().splitlines()[0])
        | quantity | median | from | to |
        >>> len(found.snapshots), len(found.snapshots[0].spectrum)
        (2, 48)
    """
    if batches < 1:
        raise ValueError(f"batches={batches!r}: expected at least 1")
    pairs = list(_first(loader, batches))
    if not pairs:
        raise ValueError("loader: it is empty")
    found = []
    for step, (inputs, targets) in enumerate(_shown(pairs) if progress else pairs):
        objective = Objective(model, inputs, targets, criterion, output_fn=output_fn)
        found.append(snapshot(objective, step=step, max_bytes=max_bytes, seed=seed))
    return Report(tuple(found))


class Monitor:
    """Takes a `snapshot` every so many minibatches of a training loop.

    Args:
        model: The network.
        criterion: The loss, reduced to a scalar.
        every: Minibatches between snapshots.
        output_fn: Picks the tensor that the criterion receives from what the model returns.
        max_bytes: See `snapshot`.
        seed: See `snapshot`.

    Attributes:
        snapshots: Those taken so far.

    Raises:
        ValueError: If ``every`` is below 1.

    Examples:
        >>> import torch
        >>> model, criterion = nn.Linear(4, 3), nn.CrossEntropyLoss()
        >>> monitor = Monitor(model, criterion, every=2)
        >>> for _ in range(4):
        ...     x, y = torch.randn(8, 4), torch.randint(3, (8,))
        ...     monitor(x, y)  # before or after the step
        >>> [s.step for s in monitor.snapshots]
        [0, 2]
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[..., Tensor],
        every: int = 100,
        *,
        output_fn: Callable[[Any], Tensor] | None = None,
        max_bytes: int = 2**28,
        seed: int = 0,
    ) -> None:
        if every < 1:
            raise ValueError(f"every={every!r}: expected at least 1")
        self.model, self.criterion, self.every = model, criterion, every
        self.output_fn, self.max_bytes, self.seed = output_fn, max_bytes, seed
        self.snapshots: list[Snapshot] = []
        self._seen = 0

    def __call__(self, inputs: Any, targets: Any) -> None:
        """Counts a minibatch, and looks at it when it is its turn."""
        if self._seen % self.every == 0:
            objective = Objective(
                self.model, inputs, targets, self.criterion, output_fn=self.output_fn
            )
            found = snapshot(objective, step=self._seen, max_bytes=self.max_bytes, seed=self.seed)
            self.snapshots.append(found)
        self._seen += 1

    def report(self) -> Report:
        """The snapshots so far.

        Raises:
            ValueError: If there is none yet.
        """
        if not self.snapshots:
            raise ValueError("no snapshot yet: call the monitor with a minibatch first")
        return Report(tuple(self.snapshots))


def _first(loader: Iterable[tuple[Any, Any]], count: int) -> Iterable[tuple[Any, Any]]:
    for number, pair in enumerate(loader):
        yield pair
        if number + 1 == count:
            return


def _shown(pairs: Sequence[tuple[Any, Any]]) -> Iterable[tuple[Any, Any]]:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(
            "progress=True needs tqdm: pip install 'torch-adler[diagnostics]'"
        ) from error
    shown: Iterable[tuple[Any, Any]] = tqdm(pairs, unit="minibatch", desc="diagnostics")
    return shown
