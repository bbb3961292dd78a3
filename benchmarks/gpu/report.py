"""The records as tables in Markdown: a pure function of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import step_cost
from benchmarks.gpu.training import last
from benchmarks.suite.methods import method
from benchmarks.suite.tables import head, row
from examples.shared.records import Record

__all__ = ["markdown"]

_AGAINST = "AdamW"


_TITLES = {"full": "On one GPU", "two-cores": "On two CPU cores", "smoke": "Whether it runs"}


def markdown(parts: Mapping[str, Sequence[Record]], preset: str) -> str:
    """All tables, each between the marks by which pages include it.

    Args:
        parts: By the letter of each part that the preset has, its records, failures among them.
        preset: Its name.
    """
    shown: dict[str, tuple[str, Callable[[Sequence[Record]], list[str]]]] = {
        "a": ("The tests that need a GPU", _tests),
        "b": ("Time and memory of a step", _cost),
        "c": ("A decoder on English prose", _gpt),
        "d": ("A residual network on CIFAR-10", _pictures),
        "e": ("Table 7.1 at full size", _cells),
    }
    lines = [f"# {_TITLES[preset]}", ""]
    for letter, found in parts.items():
        title, show = shown[letter]
        done = [r for r in found if "failed" not in r]
        finished = {r["key"] for r in done}
        table = show(done) if done else ["It has not run."]
        lines += [f"## {title}", "", f"<!-- --8<-- [start:{letter}] -->", "", *table, ""]
        lines += [f"<!-- --8<-- [end:{letter}] -->", ""]
        for record in found:
            if "failed" in record and record["key"] not in finished:
                lines += [f"Failed: {record['key']}: `{_last_line(record['failed'])}`", ""]
    if everything := [r for found in parts.values() for r in found]:
        devices = ", ".join(sorted({r["device"] for r in everything}))
        versions = sorted(
            {", ".join(f"{k} {v}" for k, v in r["versions"].items()) for r in everything}
        )
        lines += [
            f"{devices}; {'; '.join(versions)}. Written by "
            f"`python -m benchmarks.gpu --preset {preset}`."
        ]
    return "\n".join(lines) + "\n"


def _last_line(told: str) -> str:
    return told.splitlines()[-1][:200] if told else ""


def _tests(done: Sequence[Record]) -> list[str]:
    lines = []
    for r in done:
        counts = f"{r['passed']} passed, {len(r['failures'])} failed, {r['skipped']} skipped"
        lines += [f"`{r['key']}`: {counts}.", ""]
        lines += [f"- {name}: `{_first(told)}`" for name, told in r["failures"].items()]
    return lines


def _first(told: str) -> str:
    wrong = [line[2:].strip() for line in told.splitlines() if line.startswith("E ")]
    return (wrong or told.splitlines() or [""])[0][:160]


def _cost(done: Sequence[Record]) -> list[str]:
    by_variant: dict[str, dict[str, Record]] = {}
    for record in done:
        variant, _, network = record["key"].partition(": ")
        by_variant.setdefault(variant, {})[network] = record
    lines: list[str] = []
    for variant, networks in by_variant.items():
        names = list(dict.fromkeys(n for r in networks.values() for n in r["seconds"]))
        lines += head(f"{variant}: step over {_AGAINST}'s", *networks)
        for name in names:
            lines.append(row(name, *(_ratio(r, name) for r in networks.values())))
        lines.append("")
    lines += head(f"Peak memory over {_AGAINST}'s, bfloat16", *by_variant.get(_MEMORY, {}))
    for name in _measured(by_variant.get(_MEMORY, {})):
        lines.append(row(name, *(_peak(r, name) for r in by_variant[_MEMORY].values())))
    failures = [
        f"- {record['key']}: {name}: {told}"
        for record in done
        for name, told in record["failures"].items()
    ]
    return [
        *lines,
        "",
        "Time: median of the ratio in the same rounds (quartiles); of AdamW the time and memory "
        "themselves. Adler's methods as after their first hundred steps.",
        "",
        *failures,
    ]


_MEMORY = "bfloat16, eager"


def _measured(networks: Mapping[str, Record]) -> list[str]:
    return list(dict.fromkeys(name for r in networks.values() for name in r["bytes"]))


def _ratio(record: Record, name: str) -> str:
    times = record["seconds"]
    if name not in times or _AGAINST not in times:
        return "–"
    base = step_cost.blocks(times[_AGAINST])
    if name == _AGAINST:
        return f"{1000 * np.median(base) / step_cost.BLOCK:.1f} ms"
    low, middle, high = np.percentile(step_cost.blocks(times[name]) / base, [25, 50, 75])
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def _peak(record: Record, name: str) -> str:
    peaks = record["bytes"]
    if name not in peaks or _AGAINST not in peaks:
        return "–"
    if name == _AGAINST:
        return f"{peaks[name] / 2**30:.2f} GiB"
    return f"{peaks[name] / peaks[_AGAINST]:.2f}"


def _gpt(done: Sequence[Record]) -> list[str]:
    lines = head("Method", "Rate", "Test loss, nats a byte", "Steps / s", "Seconds")
    for r in sorted(done, key=lambda r: last(r, "test_loss")):
        rate = "its own" if r["lr"] is None else f"{r['lr']:g}"
        loss = "diverged" if r["diverged"] else f"{last(r, 'test_loss'):.4f}"
        pace = r["steps"] / r["seconds"]
        lines.append(
            row(method(r["method"]).label, rate, loss, f"{pace:.1f}", f"{r['seconds']:.0f}")
        )
    first = done[0]
    return [
        *lines,
        "",
        f"{first['parameters'] / 1e6:.2g} M parameters, at most {max(r['steps'] for r in done):,} "
        f"steps; one seed. {_seconds(first)}",
    ]


def _pictures(done: Sequence[Record]) -> list[str]:
    target = done[0]["target"]
    heads = ("Method", "Rate", "Seeds", "Test accuracy", f"Seeds at {target:.0%}", "To it: s")
    lines = head(*heads, "To it: steps", "Seconds")
    groups: dict[tuple[str, float | None], list[Record]] = {}
    for r in done:
        groups.setdefault((r["method"], r["lr"]), []).append(r)
    for (name, lr), mine in sorted(groups.items(), key=lambda item: -_accuracy(item[1])):
        accuracies = _accuracies(mine)
        spread = statistics.stdev(accuracies) if len(accuracies) > 1 else math.nan
        shown = f"{_accuracy(mine):.4f}" + ("" if math.isnan(spread) else f" ± {spread:.4f}")
        times = [_first_at(r, target, "seconds") for r in mine]
        steps = [_first_at(r, target, "step") for r in mine]
        lines.append(
            row(
                method(name).label,
                "its own" if lr is None else f"{lr:g}",
                len(mine),
                shown,
                sum(map(math.isfinite, times)),
                _shown(statistics.median(times)),
                _shown(statistics.median(steps)),
                f"{statistics.median(r['seconds'] for r in mine):.0f}",
            )
        )
    return [
        *lines,
        "",
        "Mean ± standard deviation over seeds; a run that diverged counts as accuracy 0. To the "
        f"target: median over seeds. {done[0]['data']}; {done[0]['parameters'] / 1e6:.2g} M "
        "parameters. Rates of the grids by the first seed's final test accuracy. "
        + _seconds(done[0]),
    ]


def _seconds(record: Record) -> str:
    of_process = "" if record["on_gpu"] else " of the process"
    precision = "bfloat16" if record["bfloat16"] else "float32"
    return f"Seconds{of_process} in training, without evaluation; {precision}."


def _accuracy(mine: Sequence[Record]) -> float:
    return statistics.fmean(_accuracies(mine))


def _accuracies(mine: Sequence[Record]) -> list[float]:
    return [0.0 if r["diverged"] else 1 - last(r, "test_error") for r in mine]


def _first_at(record: Record, target: float, unit: str) -> float:
    curves: Any = record["curves"]
    for error, where in zip(curves["test_error"], curves[unit], strict=True):
        if error is not None and 1 - error >= target:
            return float(where)
    return math.inf


def _shown(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0") if math.isfinite(value) else "–"


def _cells(done: Sequence[Record]) -> list[str]:
    return [
        f"All {done[-1]['runs']} runs are recorded in `e-runs.jsonl`; `examples.cifar.table` makes "
        "the table of them."
    ]
