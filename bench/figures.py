"""What report.py, charts.py and compare.py share: reading figures, choosing among them, and numbers as text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from onepass.cli import bench
from onepass.cli.timing import Result

ROOT = Path(__file__).parents[1]
OURS, LIMIT = "onepass", "limit"
TORCH = tuple(bench.PEERS)  # torch's own peers: default, foreach, fused
ELEMENTWISE = [subject.name for subject in bench.SUBJECTS]
QUESTIONS = {  # in the order in which they are told
    "large": "Large tensors",
    "small": "Small tensors",
    "sharded": "DTensors",
    "scaling": "Sizes, threads, instruction sets",
    "formats": "Storage formats",
    "tail": "What ends a training step",
    "training": "Whole training steps",
    "frameworks": "In other frameworks",
    "surroundings": "What surrounds a step",
    "kernels": "Kernels alone",
}


def load(path: Path | str) -> tuple[dict[str, Any], list[Result]]:
    """What a file tells beside its results, and its results."""
    return bench.from_json((ROOT / path).read_text())


def question(result: Result) -> str:
    """What a result answers. `python -m onepass bench` does not say: there the workload's first word tells."""
    words = re.findall(r"\w+", result.workload.lower()) or ["others"]
    return result.question or {"mlp": "small", "fresh": "small"}.get(words[0], words[0])


def peers(result: Result) -> dict[str, float]:
    """The ratios of those that ours competes with: the limit is a bound and no peer."""
    return {name: ratio for name, ratio in result.ratios().items() if name not in (OURS, LIMIT)}


def strongest(result: Result, beyond: tuple[str, ...] = ()) -> tuple[str, float] | None:
    """The fastest peer and its ratio, but for those named in `beyond`; None if there is none."""
    ratios = {name: ratio for name, ratio in peers(result).items() if name not in beyond}
    return min(ratios.items(), key=lambda item: item[1]) if ratios else None


def bandwidth(result: Result, name: str | None = None) -> float:
    """GB/s that a contender moves of what a step has to move; 0 where memory is not the question."""
    return result.moved / result.seconds(name) / 1e9


def all_classes(results: list[Result], workload: str, fresh: bool = False) -> dict[str, Result]:
    """The element-wise classes on the first such workload that has most of them, by name and in their usual order.

    Args:
        results: All there are.
        workload: What its name starts with.
        fresh: Whether the gradients are new at every step.
    """
    found: dict[str, dict[str, Result]] = {}
    for r in results:
        if r.workload.startswith(workload) and ("fresh" in r.workload) is fresh and r.first == OURS:
            found.setdefault(r.workload, {}).setdefault(r.optimizer, r)
    best = max(found.values(), key=len, default={})
    return {name: best[name] for name in ELEMENTWISE if name in best}


def grid(results: Iterable[Result], fresh: bool = False) -> list[Result]:
    """AdamW's results on few and many tensors of one size."""
    of_its_kind = re.compile(r"fresh: \d+ x \d+" if fresh else r"small: \d+ x \d+")
    return [
        r
        for r in results
        if r.optimizer == "AdamW" and r.first == OURS and r.tensors and of_its_kind.fullmatch(r.workload)
    ]


def size(found: dict[str, Result]) -> str:
    """How much these results are of."""
    result = next(iter(found.values()))
    return f"{count(result.elements)} elements in {count(result.tensors)} tensors"


def machine(told: dict[str, Any]) -> str:
    """The machine, in a few words."""
    known = told.get("machine", {})
    parts = [known.get("processor"), known.get("chosen"), known.get("threads", "").split(" ")[0] + " threads"]
    return ", ".join(part for part in parts if part and part != " threads")


def versions(told: dict[str, Any]) -> str:
    """What ran: onepass, torch, Python, and the peers beyond torch."""
    known = told.get("machine", {})
    names = {"onepass": "onepass", "torch": "torch", "python": "Python"}
    found = [f"{name} {known[key]}" for key, name in names.items() if key in known]
    return ", ".join(found + [f"{name} {version}" for name, version in told.get("peers", {}).items()])


def when(told: dict[str, Any]) -> str:
    """The date, and of how many rounds the figures are medians."""
    date, rounds = told.get("machine", {}).get("date"), told.get("rounds")
    return ", ".join(text for text in (date, rounds and f"medians of {rounds} rounds") if text)


def number(x: float) -> str:
    """Three digits, and all of those before the point."""
    digits = 2 - math.floor(math.log10(abs(x))) if x else 0
    return f"{x:.{max(0, min(digits, 6))}f}"


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    units = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
    unit = next((name for name, size in units.items() if seconds >= size), "ns")
    return f"{number(seconds / units[unit])} {unit}"


def count(n: int) -> str:
    """A number of things: 1,000, 65.5k, 67.1M."""
    for letter, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if n >= max(size, 10_000):
            return f"{n / size:.3g}{letter}"
    return f"{n:,}"


def times(ratio: float) -> str:
    """A ratio: two digits behind the point where 1 is near, and never 1.00 for what is not quite 1."""
    if 0.995 <= ratio < 1:
        return f"{ratio:.3f}x"
    return f"{ratio:.{2 if ratio < 2 else 1 if ratio < 20 else 0}f}x"
