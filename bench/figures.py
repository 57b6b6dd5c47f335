"""Functions shared by report.py, charts.py and compare.py: load and select results, format numbers."""

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
QUESTIONS = {  # in the order of the report
    "large": "Large tensors",
    "small": "Small tensors",
    "sharded": "DTensors",
    "scaling": "Sizes, threads, instruction sets",
    "formats": "Storage formats",
    "tail": "What ends a training step",
    "clip": "Clipping in place",
    "training": "Whole training steps",
    "frameworks": "In other frameworks",
    "surroundings": "What surrounds a step",
    "kernels": "Kernels alone",
}


def load(path: Path | str) -> tuple[dict[str, Any], list[Result]]:
    """Return the metadata and the results of a file."""
    return bench.from_json((ROOT / path).read_text())


def question(result: Result) -> str:
    """Return the question of a result; if it is not recorded, it follows from the workload's first word."""
    words = re.findall(r"\w+", result.workload.lower()) or ["others"]
    return result.question or {"mlp": "small", "fresh": "small"}.get(words[0], words[0])


def peers(result: Result) -> dict[str, float]:
    """Return the ratios of the peers, without the limit, which is a bound."""
    return {name: ratio for name, ratio in result.ratios().items() if name not in (OURS, LIMIT)}


def strongest(result: Result, beyond: tuple[str, ...] = ()) -> tuple[str, float] | None:
    """Return the fastest peer that is not in `beyond`, and its ratio; None if there is none."""
    ratios = {name: ratio for name, ratio in peers(result).items() if name not in beyond}
    return min(ratios.items(), key=lambda item: item[1]) if ratios else None


def bandwidth(result: Result, name: str | None = None) -> float:
    """Return the GB/s of a contender, for the bytes that a step has to move; 0 if they are not known."""
    return result.moved / result.seconds(name) / 1e9


def all_classes(results: list[Result], workload: str, fresh: bool = False) -> dict[str, Result]:
    """Return the results of the element-wise classes, by name, on the first such workload that has the most of them.

    Args:
        results: All results.
        workload: Prefix of the workload's name.
        fresh: Whether the gradients are new at every step.
    """
    found: dict[str, dict[str, Result]] = {}
    for r in results:
        if r.workload.startswith(workload) and ("fresh" in r.workload) is fresh and r.first == OURS:
            found.setdefault(r.workload, {}).setdefault(r.optimizer, r)
    best = max(found.values(), key=len, default={})
    return {name: best[name] for name in ELEMENTWISE if name in best}


def grid(results: Iterable[Result], fresh: bool = False) -> list[Result]:
    """Return AdamW's results on different numbers of tensors of one size."""
    of_its_kind = re.compile(r"fresh: \d+ x \d+" if fresh else r"small: \d+ x \d+")
    return [
        r
        for r in results
        if r.optimizer == "AdamW" and r.first == OURS and r.tensors and of_its_kind.fullmatch(r.workload)
    ]


def size(found: dict[str, Result]) -> str:
    """Return the numbers of elements and tensors of these results as text."""
    result = next(iter(found.values()))
    return f"{count(result.elements)} elements in {count(result.tensors)} tensors"


def machine(metadata: dict[str, Any]) -> str:
    """Return a short description of the machine."""
    known = metadata.get("machine", {})
    parts = [known.get("processor"), known.get("chosen"), known.get("threads", "").split(" ")[0] + " threads"]
    return ", ".join(part for part in parts if part and part != " threads")


def versions(metadata: dict[str, Any]) -> str:
    """Return the versions of onepass, torch, Python and the peers other than torch."""
    known = metadata.get("machine", {})
    names = {"onepass": "onepass", "torch": "torch", "python": "Python"}
    found = [f"{name} {known[key]}" for key, name in names.items() if key in known]
    return ", ".join(found + [f"{name} {version}" for name, version in metadata.get("peers", {}).items()])


def when(metadata: dict[str, Any]) -> str:
    """Return the date and the number of rounds."""
    date, rounds = metadata.get("machine", {}).get("date"), metadata.get("rounds")
    return ", ".join(text for text in (date, rounds and f"medians of {rounds} rounds") if text)


def number(x: float) -> str:
    """Return a number with three significant digits, and all digits before the point."""
    digits = 2 - math.floor(math.log10(abs(x))) if x else 0
    return f"{x:.{max(0, min(digits, 6))}f}"


def duration(seconds: float) -> str:
    """Return a time with a suitable unit."""
    units = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
    unit = next((name for name, size in units.items() if seconds >= size), "ns")
    return f"{number(seconds / units[unit])} {unit}"


def count(n: int) -> str:
    """Return a count as text: 1,000, 65.5k, 67.1M."""
    for letter, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if n >= max(size, 10_000):
            return f"{n / size:.3g}{letter}"
    return f"{n:,}"


def times(ratio: float) -> str:
    """Return a ratio as text, with two decimals below 2; a ratio just below 1 has three, so that it is not 1.00."""
    if 0.995 <= ratio < 1:
        return f"{ratio:.3f}x"
    return f"{ratio:.{2 if ratio < 2 else 1 if ratio < 20 else 0}f}x"


def cell(ratio: float | None, result: Result, name: str = "") -> str:
    """Return a ratio as text, in bold where onepass is not ahead of a peer."""
    if ratio is None:
        return ""
    behind = ratio < 1 and result.first == OURS and name != LIMIT
    return f"**{times(ratio)}**" if behind else times(ratio)
