"""Tables and plots of a file of benchmark results.

    python bench/report.py FILE.json                   # tables in Markdown, a section per question
    python bench/report.py FILE.json --docs            # also write the tables of README.md and of docs/
    python bench/report.py FILE.json --pictures DIR    # also plot (charts.py)

The tables of the two pages are those of an Intel CPU; docs/benchmarks.md also has those of an AMD CPU. A file of gpu.py
gives other tables, in a block of their own; so does a file of memory.py, in README.md and docs/8bit_states.md.

A ratio is a contender's time relative to the first contender in the same run: above 1, the first is faster. Where
onepass is first and not faster, the ratio is printed in bold. The limit is a bound and not a peer.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import figures
import gpu_report
from figures import LIMIT, OURS, QUESTIONS, ROOT, TORCH, cell, number, strongest
from onepass.cli.timing import Result
from onepass.training.table import markdown_table as table

README = ROOT / "README.md"
BENCHMARKS = ROOT / "docs" / "benchmarks.md"
STATES = ROOT / "docs" / "8bit_states.md"
CPU_MARK = "bench/report.py"
AMD_MARK, GPU_MARK, STATES_MARK = (f"{CPU_MARK}, {kind}" for kind in ("AMD", "GPU", "states"))
BLOCK = r"<!-- {mark}: (\S+) -->\n(.*?)\n?<!-- end -->"
BEYOND = "strongest other"


def named(found: tuple[str, float] | None, result: Result) -> str:
    """Return a peer's ratio and name."""
    return f"{cell(found[1], result)} {found[0]}" if found else ""


def others(result: Result) -> str:
    """Return all contenders but the first, each with its ratio."""
    return ", ".join(f"{name} {cell(ratio, result, name)}" for name, ratio in result.ratios().items())


def each(result: Result) -> str:
    """Return the first contender's time per parameter or per tensor."""
    of_many = figures.question(result) in ("large", "small", "scaling", "formats")
    if not of_many or result.optimizer not in figures.ELEMENTWISE:
        return ""
    if result.elements >= 1 << 20:
        return f"{number(result.seconds() / result.elements * 1e9)} ns/parameter"
    if result.tensors > 10:
        return f"{number(result.seconds() / result.tensors * 1e6)} us/tensor"
    return ""


def speed(result: Result) -> str:
    return number(figures.bandwidth(result)) if result.moved else ""


# The tables of the full report.


def workload_table(results: Sequence[Result]) -> str:
    """Return the table of one workload with several optimizers: a column per contender."""
    first, names = results[0].first, list(dict.fromkeys(name for r in results for name in r.ratios()))
    rows = []
    for r in results:
        ratios = r.ratios()
        times_of = [figures.duration(r.seconds()), f"{r.spread():.0%}", each(r), speed(r)]
        rows.append([r.optimizer, *times_of, *(cell(ratios.get(name), r, name) for name in names)])
    return table(["", first, "+-", "each", "GB/s", *names], rows)


def mixed_table(results: Iterable[Result]) -> str:
    """Return a table with a row per result."""
    head = ["workload", "optimizer", "first", "its time", "+-", "each", "GB/s", "others"]
    rows = []
    for r in results:
        times_of = [figures.duration(r.seconds()), f"{r.spread():.0%}", each(r), speed(r)]
        rows.append([r.workload, r.optimizer, r.first, *times_of, others(r)])
    return table(head, rows)


def grid_table(results: Iterable[Result]) -> str:
    """Return the table of AdamW by number and size of tensors: our time per tensor, and the strongest peer."""
    found = {(r.tensors, r.elements // r.tensors): r for r in figures.grid(results)}
    if len(found) < 4:
        return ""
    columns = sorted({elements for _, elements in found})

    def at(place: tuple[int, int]) -> str:
        r = found.get(place)
        return f"{number(r.seconds() / r.tensors * 1e6)}, {named(strongest(r), r)}" if r else ""

    rows = [[f"{n:,}", *(at((n, m)) for m in columns)] for n in sorted({tensors for tensors, _ in found})]
    head = ["tensors", *(f"of {m:,}" for m in columns)]
    return "AdamW, us/tensor and the strongest peer:\n\n" + table(head, rows)


def wholes_and_parts(results: Iterable[Result], question: str) -> dict[tuple[str, str], dict[str, Result]]:
    """Return the results of whole training steps and of the optimizer's part, by model and optimizer."""
    found: dict[tuple[str, str], dict[str, Result]] = {}
    for r in results:
        if match := re.fullmatch(rf"{question}: (.+), (whole step|optimizer's part)", r.workload):
            found.setdefault((match[1], r.optimizer), {})[match[2]] = r
    return found


def training_table(results: Iterable[Result]) -> str:
    """Return the table of whole training steps and the optimizer's share of them."""
    rows = []
    for (model, optimizer), found in wholes_and_parts(results, "training").items():
        if whole := found.get("whole step"):
            best = strongest(whole)
            shares = [share(found, name) for name in ("default", best[0] if best else "", OURS)]
            ratios = [cell(whole.ratios().get("default"), whole), named(best, whole)]
            rows.append([model, optimizer, figures.duration(whole.seconds()), *ratios, *shares])
    head = ["", "optimizer", "whole step", "default", "strongest"]
    return table([*head, "optimizer's share: default", "strongest", "onepass"], rows) if rows else ""


def frameworks_table(results: Iterable[Result]) -> str:
    """Return the table of the optimizer's step in each framework and its share of the whole training step."""
    rows = []
    for (framework, optimizer), found in wholes_and_parts(results, "frameworks").items():
        if part := found.get("optimizer's part"):
            ratios = [cell(part.ratios().get(name), part) for name in ("default", "fused")]
            shares = [share(found, name) for name in ("default", "fused", OURS)]
            rows.append([framework, optimizer, figures.duration(part.seconds()), *ratios, *shares])
    head = ["", "optimizer", "its step", "default", "fused", "its share: default", "fused", "onepass"]
    return table(head, rows) if rows else ""


def share(found: dict[str, Result], name: str) -> str:
    """Return the fraction of a training step that a contender's optimizer takes."""
    whole, part = found.get("whole step"), found.get("optimizer's part")
    if whole is None or part is None or name not in whole.samples or name not in part.samples:
        return ""
    return f"{part.seconds(name) / whole.seconds(name):.1%}"


def section(results: list[Result]) -> Iterator[str]:
    """Yield the tables of one question."""
    alone = []
    results = sorted(results, key=lambda r: first_of(results, r))  # groups in the order of their first results
    for _, group in groupby(results, key=lambda r: (r.workload, r.first)):
        rows = list(group)
        if len({r.optimizer for r in rows}) > 1:
            yield f"### {rows[0].workload}"
            yield workload_table(rows)
        else:
            alone += rows
    yield from filter(None, [grid_table(results), training_table(results), frameworks_table(results)])
    if alone:
        yield mixed_table(alone)


def first_of(results: list[Result], result: Result) -> int:
    """Return the index of the first result with the same workload and first contender."""
    return next(i for i, r in enumerate(results) if (r.workload, r.first) == (result.workload, result.first))


def report(path: Path | str) -> str:
    """Return all results of a file as Markdown."""
    metadata, results = figures.load(path)
    found = list(dict.fromkeys(map(figures.question, results)))
    asked = [q for q in QUESTIONS if q in found] + [q for q in found if q not in QUESTIONS]
    parts = [about(metadata)]
    for q in asked:
        parts.append(f"## {QUESTIONS.get(q, q.capitalize())}")
        parts += section([r for r in results if figures.question(r) == q])
    return "\n\n".join(filter(None, [*parts, *more(metadata), missing(metadata)]))


def more(metadata: dict[str, Any]) -> Iterator[str]:
    """Yield the sections of a file's other entries."""
    for name, what in metadata.items():
        if name in ("machine", "rounds", "quick", "peers", "missing") or not what:
            continue
        yield f"## {QUESTIONS.get(name, name.capitalize())}"
        if name == "states":
            yield states_table(metadata)
        elif isinstance(what, list) and isinstance(what[0], dict):
            yield table(list(what[0]), ([text_of(row.get(key)) for key in what[0]] for row in what))
        elif isinstance(what, dict):
            yield table(["", "value"], ([key, text_of(value)] for key, value in what.items()))
        elif isinstance(what, list):
            yield "\n".join(f"- {text}" for text in what)
        else:
            yield text_of(what)


def text_of(value: Any) -> str:
    """Return a value as text: a list of samples as its median."""
    if isinstance(value, list) and value and all(isinstance(x, float) for x in value):
        value = statistics.median(value)
    return "" if value is None else number(value) if isinstance(value, float) else str(value)


def about(metadata: dict[str, Any]) -> str:
    """Return a line that describes the machine, versions and date."""
    return (
        "; ".join(filter(None, [figures.machine(metadata), figures.versions(metadata), figures.when(metadata)])) + "."
    )


def missing(metadata: dict[str, Any]) -> str:
    """Return a line of the peers that were not measured, with the reasons."""
    absent = metadata.get("missing") or {}
    texts = [f"{name} ({why})" for name, why in absent.items()] if isinstance(absent, dict) else list(absent)
    return f"Not measured: {', '.join(texts)}." if texts else ""


# The tables of docs/benchmarks.md.


def large_table(results: dict[str, Result]) -> str:
    rows = []
    for name, r in results.items():
        ratios = r.ratios()
        limit = f"{ratios[LIMIT]:.0%}" if LIMIT in ratios else ""
        beyond = named(strongest(r, beyond=TORCH), r)
        of_torch = [cell(ratios.get(peer), r) for peer in TORCH]
        rows.append([name, number(r.seconds() / r.elements * 1e9), limit, speed(r), *of_torch, beyond])
    return table(["", "ns/parameter", "of the limit", "GB/s", *TORCH, BEYOND], rows)


def small_table(hot: dict[str, Result], fresh: dict[str, Result]) -> str:
    """Return a table with two values per cell: with the same gradients at every step, and with new ones."""

    def cells(found: Result | None) -> list[str]:
        if found is None:
            return [""] * (len(TORCH) + 2)
        of_torch = [cell(found.ratios().get(peer), found) for peer in TORCH]
        return [number(found.seconds() / found.tensors * 1e6), *of_torch, named(strongest(found, beyond=TORCH), found)]

    def both(texts: tuple[str, ...]) -> str:
        return " / ".join(text or "-" for text in texts) if any(texts) else ""

    rows = []
    for name in figures.ELEMENTWISE:
        kinds = [cells(kind.get(name)) for kind in (hot, fresh) if kind]
        if name in hot or name in fresh:
            rows.append([name, *map(both, zip(*kinds, strict=True))])
    return table(["", "us/tensor", *TORCH, BEYOND], rows)


def rest_table(results: Iterable[Result], shown: Sequence[Result]) -> str:
    """Return the table of the other workloads; of those with AdamW, only AdamW."""
    left = [r for r in results if r not in shown and figures.question(r) in ("large", "small")]
    with_adamw = {r.workload for r in left if r.optimizer == "AdamW"}
    gridded = figures.grid(left) + figures.grid(left, fresh=True)
    rows = [
        [f"{r.optimizer}, {r.workload}", r.first if r.first != OURS else "", figures.duration(r.seconds()), others(r)]
        for r in left
        if r.optimizer == "AdamW" or r.workload not in with_adamw
        if r not in gridded
    ]
    return table(["", "first", "a step", "others"], rows) if rows else ""


def benchmarks_block(path: Path | str) -> str:
    """Return the tables of docs/benchmarks.md for a file of results."""
    metadata, results = figures.load(path)
    if gpu_report.is_of_gpu(metadata):
        return gpu_report.benchmarks_block(metadata, results)
    large, hot = figures.all_classes(results, "large"), figures.all_classes(results, "small: 1000 x 100")
    fresh = figures.all_classes(results, "small", fresh=True)
    parts = [about(metadata)]
    if large:
        parts += [f"**Large tensors**, {figures.size(large)}:", large_table(large)]
    if hot or fresh:
        kinds = [kind for kind, found in (("the same gradients", hot), ("new gradients", fresh)) if found]
        text = f"**Small tensors**, {figures.size(hot or fresh)}, {' / '.join(kinds)} at every step:"
        parts += [text, small_table(hot, fresh)]
    for title, text in (
        ("**The others**:", rest_table(results, [*large.values(), *hot.values(), *fresh.values()])),
        ("**Whole training steps**, and how much of them is the optimizer's:", training_table(results)),
        ("**In other frameworks**, the optimizer's step within a training step:", frameworks_table(results)),
    ):
        parts += [title, text] if text else []
    return "\n\n".join(filter(None, [*parts, missing_frameworks(metadata), missing(metadata)]))


def missing_frameworks(metadata: dict[str, Any]) -> str:
    """Return why frameworks were not measured."""
    return " ".join(
        f"{why}."
        for question, _, why in (note.partition(": ") for note in metadata.get("notes", []))
        if question == "frameworks"
    )


# The table of the states.


def states_table(metadata: dict[str, Any], optimizer: str | None = None) -> str:
    """Return what memory.py has measured, of all optimizers or of one."""
    shown = [found for found in metadata["states"] if optimizer in (None, found["optimizer"])]
    rows = [
        [
            *([] if optimizer else [found["optimizer"]]),
            found["contender"],
            f"{found['bytes of states']:.2f}",
            f"{found['bytes with parameter']:.2f}",
            number(found["ns/parameter"]),
            f"{statistics.mean(found['losses']):.4f}",
            f"{round(found['loss apart'], 4) + 0.0:+.2%}",  # no -0.00%
            "" if found["largest update"] is None else f"{found['largest update']:.1f}",
        ]
        for found in shown
    ]
    measured = ["bytes of states", "with the parameter", "ns/parameter", "loss", "apart", "largest update"]
    return table([*([] if optimizer else [""]), "implementation, states", *measured], rows)


def states_block(path: Path | str, optimizer: str | None = None) -> str:
    """Return the table of the states, and where it was measured, for a file of results."""
    metadata, _ = figures.load(path)
    return "\n\n".join(filter(None, [about(metadata), states_table(metadata, optimizer), missing(metadata)]))


# The table of README.md.


def short_table(large: dict[str, Result], small: dict[str, Result]) -> str:
    """Return a table with a row per optimizer: times of large and small tensors, and the ratios of torch's forms."""

    def cells(found: Result | None, unit: float, of: str) -> list[str]:
        if found is None:
            return [""] * 3
        each = number(found.seconds() / getattr(found, of) / unit)
        return [each, *(cell(found.ratios().get(name), found) for name in ("default", "fused"))]

    rows = [
        [name, *cells(large.get(name), 1e-9, "elements"), *cells(small.get(name), 1e-6, "tensors")]
        for name in figures.ELEMENTWISE
        if name in large or name in small
    ]
    return table(["", "ns/parameter", "default", "fused", "us/tensor", "default", "fused"], rows)


def readme_block(path: Path | str) -> str:
    """Return the table of README.md for a file of results.

    Raises:
        ValueError: The file has neither large tensors nor small ones.
    """
    metadata, results = figures.load(path)
    if gpu_report.is_of_gpu(metadata):
        return gpu_report.readme_block(metadata, results)
    large, small = figures.all_classes(results, "large"), figures.all_classes(results, "small", fresh=True)
    if not large and not small:
        raise ValueError(f"{path} has neither large tensors nor small ones with new gradients: nothing for README.md")
    measured = [
        text
        for text, found in (
            (f"ns/parameter: {figures.size(large)}" if large else "", large),
            (f"us/tensor: {figures.size(small)}, new gradients at every step" if small else "", small),
        )
        if found
    ]
    where = ", ".join(filter(None, [figures.machine(metadata), figures.when(metadata)]))
    return f"{where}. {'; '.join(measured)}.\n\n{short_table(large, small)}"


def mark_of(metadata: dict[str, Any]) -> str:
    """Return the mark of the blocks that a file of results is shown in."""
    if "states" in metadata:
        return STATES_MARK
    if gpu_report.is_of_gpu(metadata):
        return GPU_MARK
    return AMD_MARK if "AMD" in metadata.get("machine", {}).get("processor", "") else CPU_MARK


def pages(path: Path | str) -> list[tuple[Path, str]]:
    """Return the pages that show a file of results, with their blocks."""
    mark = mark_of(figures.load(path)[0])
    if mark == STATES_MARK:
        return [(README, states_block(path, "AdamW")), (STATES, states_block(path))]
    if mark == AMD_MARK:
        return [(BENCHMARKS, benchmarks_block(path))]
    return [(README, readme_block(path)), (BENCHMARKS, benchmarks_block(path))]


def blocks(page: Path, mark: str) -> list[tuple[str, str]]:
    """Return the blocks of a page with this mark: the file that each names, and its text."""
    return re.findall(BLOCK.format(mark=re.escape(mark)), page.read_text(), re.S)


def write_block(path: Path, page: Path, block: str) -> None:
    """Replace the block between the marks of a page: that of a CPU, of a GPU, or of the states.

    Args:
        path: The file of results, which the first mark names.
        page: The Markdown file.
        block: The new text.

    Raises:
        ValueError: The page does not have exactly one such block.
    """
    mark = mark_of(figures.load(path.resolve())[0])
    name = path.resolve().relative_to(ROOT).as_posix()
    marked = f"<!-- {mark}: {name} -->\n{block}\n<!-- end -->"
    text, found = re.subn(BLOCK.format(mark=re.escape(mark)), lambda _: marked, page.read_text(), flags=re.S)
    if found != 1:
        raise ValueError(f"{page} has {found} blocks <!-- {mark}: ... -->, not one")
    page.write_text(text)


def main(arguments: list[str] | None = None) -> int:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path, help="file written by a benchmark with --json")
    parser.add_argument("--docs", action="store_true", help="write the tables of README.md and of the pages in docs/")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="folder for plots as PNG and SVG")
    args = parser.parse_args(arguments)
    try:
        print(report(args.file.resolve()))
        if args.docs:
            for page, block in pages(args.file.resolve()):
                write_block(args.file, page, block)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if args.pictures:
        import charts  # here, because the tables need no matplotlib

        metadata, results = figures.load(args.file.resolve())
        for path in charts.draw(metadata, results, args.pictures):
            print(f"wrote {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
