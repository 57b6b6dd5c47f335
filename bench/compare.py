"""Compare two runs of the benchmarks.

    python bench/compare.py OLD.json NEW.json [--fail-on-slower]

The load of the machine differs between two runs. So the verdict is about the first contender's time relative to the
other contenders in the same round: their geometric mean, over the contenders that both runs have. It is `faster` or
`slower` if the median of this ratio has changed by more than 3 % and the interquartile ranges of the two runs do not
overlap.

The verdict is `machine` in three cases: only the time itself has changed, by the same two criteria; there are no other
contenders; or the others have become slower or faster by more than a quarter, because a change of load that large does
not affect all alike. Runs of less than 3 rounds have no quartiles: the verdict is `too few rounds`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import figures
from onepass.cli.timing import Result
from onepass.training.table import text_table

NOISE = 0.03
MOOD = 1.25
ROUNDS = 3
VERDICTS = ("slower", "faster", "machine", "same", "too few rounds")

Key: TypeAlias = tuple[
    str, str, str, str, int, int
]  # question, workload, optimizer, first contender, elements, tensors


@dataclass
class Change:
    """The change of one result.

    Attributes:
        key: The key of the result.
        raw: Relative change of the first contender's time.
        beside: Relative change of its time relative to the other contenders; None if there are none.
        verdict: One of VERDICTS.
    """

    key: Key
    raw: float
    beside: float | None
    verdict: str


def key(result: Result) -> Key:
    """Return the key of a result; results with equal keys are compared."""
    sizes = result.elements, result.tensors
    return figures.question(result), result.workload, result.optimizer, result.first, *sizes


def around(result: Result, names: Iterable[str]) -> list[float]:
    """Return the geometric mean of these contenders' times in each round; 1 if there are none."""
    columns = [result.samples[name] for name in names]
    rows = zip(*columns, strict=True) if columns else [(1.0,)] * len(result.samples[result.first])
    return [statistics.geometric_mean(row) for row in rows]


def grown(old: list[float], new: list[float]) -> float:
    """Return the relative change of the median."""
    return statistics.median(new) / statistics.median(old) - 1


def differ(old: list[float], new: list[float]) -> bool:
    """Return whether the change exceeds the noise."""
    (old_low, _, old_high), (new_low, _, new_high) = (statistics.quantiles(x, method="inclusive") for x in (old, new))
    return abs(grown(old, new)) > NOISE and (old_high < new_low or new_high < old_low)


def change(old: Result, new: Result) -> Change:
    """Compare two results with the same key."""
    common = [name for name in old.ratios() if name in new.samples]
    raw = old.samples[old.first], new.samples[new.first]
    others = around(old, common), around(new, common)
    relative = over(raw[0], others[0]), over(raw[1], others[1])
    alike = bool(common) and 1 / MOOD <= 1 + grown(*others) <= MOOD
    if min(map(len, raw)) < ROUNDS:
        verdict = "too few rounds"
    elif alike and differ(*relative):
        verdict = "slower" if grown(*relative) > 0 else "faster"
    else:
        verdict = "machine" if differ(*raw) or (not alike and differ(*relative)) else "same"
    return Change(key(old), grown(*raw), grown(*relative) if common else None, verdict)


def over(times: list[float], others: list[float]) -> list[float]:
    """Return the quotients, round by round."""
    return [a / b for a, b in zip(times, others, strict=True)]


def keyed(results: list[Result]) -> dict[Key, Result]:
    """Return the results by their keys; of results with equal keys, the first."""
    found: dict[Key, Result] = {}
    for r in results:
        found.setdefault(key(r), r)
    return found


def compare(old: list[Result], new: list[Result]) -> list[Change]:
    """Compare all results that both runs have, sorted by slowdown."""
    olds, news = keyed(old), keyed(new)
    return sorted((change(r, news[k]) for k, r in olds.items() if k in news), key=lambda c: -(c.beside or 0))


def warnings(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return warnings of differences that make the runs hard to compare."""
    texts = []
    for name in ("processor", "chosen", "threads", "torch"):
        before, after = (told.get("machine", {}).get(name, "unknown") for told in (old, new))
        if before != after:
            texts.append(f"warning: {name} differs: {before} / {after}")
    return texts


def only(name: str, results: list[Result], others: list[Result]) -> list[str]:
    """Return a line per workload that is in one file only."""
    known, found = keyed(others), dict[str, list[str]]()
    for question, workload, optimizer, first, elements, tensors in keyed(results):
        if (question, workload, optimizer, first, elements, tensors) not in known:
            found.setdefault(f"{workload}, {figures.count(elements)} elements", []).append(optimizer)
    return [f"only in {name}: {workload}: {', '.join(who)}" for workload, who in found.items()]


def table(changes: list[Change]) -> str:
    """Return a table with a line per comparison."""
    rows = [["workload", "optimizer", "time", "beside others", "verdict"]]
    for c in changes:
        rows.append([c.key[1], c.key[2], f"{c.raw:+.1%}", "" if c.beside is None else f"{c.beside:+.1%}", c.verdict])
    return text_table(rows, "<<>><")


def summary(changes: list[Change]) -> str:
    """Return the counts of the verdicts as text."""
    counts = Counter(c.verdict for c in changes)
    told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])
    return f"{len(changes)} compared: {told}" if changes else "nothing to compare"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--fail-on-slower", action="store_true", help="exit status 1 if something got slower")
    args = parser.parse_args(arguments)
    (old_told, old), (new_told, new) = figures.load(args.old.resolve()), figures.load(args.new.resolve())
    changes = compare(old, new)
    parts = [
        *warnings(old_told, new_told),
        *([table(changes)] if changes else []),
        *only(args.old.name, old, new),
        *only(args.new.name, new, old),
        summary(changes),
    ]
    print("\n".join(parts))
    return 1 if args.fail_on_slower and any(c.verdict == "slower" for c in changes) else 0


if __name__ == "__main__":
    sys.exit(main())
