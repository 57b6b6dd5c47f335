"""The kernels without Python: ``python bench/kernels.py [--quick] [--rounds N] [--filter REGEX] [--json FILE]``.

Builds the C++ program bench/kernels.cpp in build/bench, runs its benchmarks in random order, round after round, and
prints medians. The comment in kernels.cpp describes what is measured, how bytes are counted, and how results are
checked before they are timed. For large arrays the rate is also given as a fraction of the limit: the rate at which the
same number of threads reads and updates the same number of float32 arrays with additions only. ``--quick`` uses smaller
arrays, which may fit the last cache, and so little time that the results are not reliable.

Needs Google Benchmark (Debian: libbenchmark-dev) and CMake, but neither torch nor an installed onepass.
"""

from __future__ import annotations

import argparse
import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onepass.cli.timing import Result

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "bench"
TARGET = "kernels_bench"

# Loaded by its path, because this file needs no installed onepass.
text_table: Callable[..., str] = runpy.run_path(f"{ROOT}/python/onepass/training/table.py")["text_table"]

Row = dict[str, Any]

QUICK = ("--memory_elements=1048576", "--benchmark_min_time=0.002")
FULL = ("--benchmark_min_time=0.03",)

NAME = re.compile(
    r"(?P<rule>\w+)/(?P<format>\w+)/(?P<isa>\w+)/(?P<elements>\d+)(/updated:\d+)?(/threads:(?P<threads>\d+))?/real_time"
)


class BenchError(Exception):
    """An error with a message for the user."""


def call(command: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True)


def build() -> Path:
    """Build the program if it is missing or older than its sources, and return its path."""
    cmake = shutil.which("cmake")
    if cmake is None:
        raise BenchError(
            "CMake 3.26 or newer is needed: pip install cmake, or Debian's package cmake if it is new enough"
        )
    options = ["-DONEPASS_PYTHON=OFF", "-DONEPASS_BENCH=ON", "-DCMAKE_BUILD_TYPE=Release"]
    if shutil.which("ninja") and not (BUILD / "CMakeCache.txt").exists():
        options += ["-G", "Ninja"]
    configured = call([cmake, "-S", ROOT, "-B", BUILD, *options])
    if "ONEPASS_BENCH needs" in configured.stderr:
        raise BenchError(
            "Google Benchmark is needed: Debian's package libbenchmark-dev (apt-get install libbenchmark-dev)"
        )
    if configured.returncode:
        raise BenchError(f"CMake could not configure {BUILD}:\n{configured.stderr.strip()}")
    built = call([cmake, "--build", BUILD, "--parallel", "--target", TARGET])
    if built.returncode:
        raise BenchError(f"{TARGET} could not be built:\n{built.stdout.strip()}\n{built.stderr.strip()}")
    return BUILD / "bench" / TARGET


def rows_of(report: dict[str, Any]) -> list[Row]:
    """Return Google Benchmark's JSON as a row per benchmark, in the program's order, with the time of each repetition.

    A row also has the number of arrays that are ``updated``. The fastest row of the rule ``traffic`` is the limit of
    the rows that update the same number of arrays. In rows of ``traffic``, ``isa`` is the name of a loop.
    """
    rows: dict[str, Row] = {}
    runs = [run for run in report["benchmarks"] if run["run_type"] == "iteration"]
    for run in sorted(runs, key=lambda run: (run["family_index"], run["repetition_index"])):
        if run.get("error_occurred"):
            raise BenchError(f"{run['run_name']}: {run['error_message']}")
        named = NAME.fullmatch(run["run_name"])
        if named is None:
            raise BenchError(f"{TARGET} reported {run['run_name']}, which is not the name of a benchmark")
        row = rows.setdefault(
            run["run_name"],
            {
                "rule": named["rule"],
                "format": named["format"],
                "isa": named["isa"],
                "elements": int(named["elements"]),
                "threads": int(named["threads"] or 1),
                "updated": int(run["updated"]),
                "ns_per_element": [],
                "bytes_per_second": [],
            },
        )
        row["ns_per_element"].append(1e9 * run["time_per_element"])
        row["bytes_per_second"].append(run["bytes_per_second"])
    return list(rows.values())


def rows_measured(quick: bool, rounds: int, only: str = ".") -> list[Row]:
    """Build the program, run the benchmarks whose names match the regular expression ``only``, and return their rows.

    Raises:
        BenchError: Something is missing, or a result is wrong.
    """
    flags = [
        *(QUICK if quick else FULL),
        f"--benchmark_filter={only}",
        f"--benchmark_repetitions={rounds}",
        "--benchmark_enable_random_interleaving=true",
        "--benchmark_format=json",
    ]
    ran = call([build(), *flags])
    if not ran.stdout:
        raise BenchError(f"{TARGET} ended with {ran.returncode}: {ran.stderr.strip()}")
    rows = rows_of(json.loads(ran.stdout))
    if ran.returncode:
        raise BenchError(f"{TARGET} ended with {ran.returncode}: {ran.stderr.strip()}")
    return rows


def measure(quick: bool, rounds: int) -> Iterator[Result | str]:
    """Measure for bench/run.py: all arrays that fit a cache, and larger ones in float32 on the best instruction set."""
    from onepass import _core
    from onepass.cli.timing import Result

    try:
        rows = rows_measured(quick, rounds, f"/4096/|^traffic/|/float32/{_core.isa()}/")
    except BenchError as failure:
        yield str(failure)
        return
    seconds = {id(row): [1e-9 * ns * row["elements"] for ns in row["ns_per_element"]] for row in rows}
    limit_of: dict[tuple[int, int, int], list[float]] = {}
    for row in rows:
        if row["rule"] == "traffic":
            key = (row["elements"], row["threads"], row["updated"])
            limit_of[key] = min(limit_of.get(key, seconds[id(row)]), seconds[id(row)], key=median)
    found: dict[tuple[str, str], Result] = {}
    for row in rows:
        if row["rule"] == "traffic":
            continue
        elements, threads = row["elements"], row["threads"]
        workload = f"kernel: {row['format']}, {elements} elements, {threads} thread{'s' if threads > 1 else ''}"
        moved = round(row["bytes_per_second"][0] * seconds[id(row)][0])
        result = found.setdefault((workload, row["rule"]), Result(workload, row["rule"], elements, 1, {}, moved))
        result.samples[row["isa"]] = seconds[id(row)]
        if (limit := limit_of.get((elements, threads, row["updated"]))) is not None:
            result.samples["limit"] = limit
    yield from found.values()


def limits(rows: list[Row]) -> dict[tuple[int, int, int], float]:
    """Return the rates of the fastest loop by numbers of elements, threads and updated arrays."""
    rates: dict[tuple[int, int, int], float] = {}
    for row in rows:
        if row["rule"] == "traffic":
            key = (row["elements"], row["threads"], row["updated"])
            rates[key] = max(rates.get(key, 0.0), median(row["bytes_per_second"]))
    return rates


def table(rows: list[Row]) -> str:
    """Return a table of medians."""
    table_rows = [["rule", "format", "ISA", "elements", "threads", "updated", "ns/element", "GB/s", "of limit"]]
    of = limits(rows)
    for row in rows:
        rate = median(row["bytes_per_second"])
        limit = of.get((row["elements"], row["threads"], row["updated"]))
        names = (row[name] for name in ("rule", "format", "isa", "elements", "threads", "updated"))
        time = f"{median(row['ns_per_element']):.3f}"
        table_rows.append([*names, time, f"{rate / 1e9:.1f}", f"{rate / limit:.0%}" if limit else ""])
    return text_table(table_rows, "<<<>")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure the kernels without Python.")
    parser.add_argument("--quick", action="store_true", help="smaller arrays and very short times")
    parser.add_argument("--rounds", type=int, metavar="N", help="repetitions; default: 5 (2 with --quick)")
    parser.add_argument("--filter", default=".", metavar="REGEX", help="such as '^(adam|traffic)/float32/'")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to this file")
    args = parser.parse_args(argv)
    try:
        rows = rows_measured(args.quick, args.rounds or (2 if args.quick else 5), args.filter)
    except BenchError as failure:
        print(f"bench/kernels.py: {failure}", file=sys.stderr)
        return 1
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
