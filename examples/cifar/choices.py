"""How the comparison depends on choices that the thesis leaves open.

``python -m examples.cifar.choices`` renders ``results/choices.md`` from the committed records: each
preset below changes one choice of ``quick`` on two of its networks, with one seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from examples.cifar import records
from examples.cifar.optimizers import OPTIMIZERS
from examples.cifar.presets import PRESETS
from examples.shared.records import Record

__all__ = ["CHOICES", "markdown", "read"]

_RESULTS = Path(__file__).parent / "results"
# In words, what each preset changes. The first is what it is changed from.
CHOICES = {
    "quick": "minibatches of 64, 4 epochs",
    "batch-16": "minibatches of 16",
    "batch-256": "minibatches of 256",
    "longer": "12 epochs",
    "normalised": "BatchNorm in the CNN, none in the ResNet",
}


def read(results: Path = _RESULTS) -> dict[str, list[Record]]:
    """The records of every choice, of the networks and the seed that all of them share."""
    varied = PRESETS["batch-16"]
    found = {}
    for name in CHOICES:
        found[name] = [
            record
            for record in records.read(results / name)
            if record["seed"] == 0
            and record["dataset"] in varied.datasets
            and record["activation"] in varied.activations
            and record["model"] in varied.shapes
        ]
    return found


def markdown(found: Mapping[str, Sequence[Record]]) -> str:
    """The table, a pure function of the records.

    Args:
        found: By preset, in the order of the rows; see `read`.
    """
    heads = ["Choice", "Network", *(entry.label for entry in OPTIMIZERS.values())]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for name, group in found.items():
        for model in sorted({record["model"] for record in group}):
            mine = [record for record in group if record["model"] == model]
            best = records.competitors(mine)
            entries = [CHOICES[name], f"{model}, {mine[0]['normalisation']}"]
            for optimizer in OPTIMIZERS:
                runs = best.get(optimizer, [])
                entries.append(f"{runs[0]['test_accuracy']:.3f}" if runs else "–")
            lines.append(f"| {' | '.join(entries)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (_RESULTS / "choices.md").write_text(markdown(read()))
