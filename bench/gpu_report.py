"""Tables of a file of gpu.py, for report.py."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import figures
from figures import LIMIT, OURS, cell, number
from onepass.cli.timing import Result
from onepass.training.table import markdown_table as table

TORCH = ("foreach", "fused")
CLOCKS = ("device time", "wall time")
LARGE, SMALL = "200 x 1M", "1000 x 1,000"
TAIL = "clipping by norm, AdamW, average of the weights"


class Both(NamedTuple):
    """The results of one comparison by both clocks."""

    device: Result
    wall: Result

    @property
    def workload(self) -> str:
        return self.device.workload

    @property
    def optimizer(self) -> str:
        return self.device.optimizer


def is_of_gpu(metadata: dict[str, Any]) -> bool:
    """Return whether a file of results is one of gpu.py."""
    return "device" in metadata


def compared(results: Iterable[Result]) -> list[Both]:
    """Return the comparisons that have both clocks."""
    found: dict[tuple[str, str], dict[str, Result]] = {}
    for r in results:
        found.setdefault((r.workload, r.optimizer), {})[r.question] = r
    return [Both(*(of[clock] for clock in CLOCKS)) for of in found.values() if set(of) == set(CLOCKS)]


def of_limit(result: Result) -> str:
    """Return our rate relative to that of a copy."""
    ratio = result.ratios().get(LIMIT)
    return "" if ratio is None else f"{ratio:.0%}"


def ratios(result: Result) -> list[str]:
    """Return the ratios of torch's forms."""
    return [cell(result.ratios().get(name), result) for name in TORCH]


def of_workload(found: Iterable[Both], pattern: str) -> list[Both]:
    """Return the comparisons on these workloads: a regular expression for the whole name."""
    return [both for both in found if re.fullmatch(pattern, both.workload)]


def parts_of_training(results: Iterable[Result]) -> dict[str, Result]:
    """Return the whole training step and the optimizer's part."""
    return {r.workload.rpartition(", ")[2]: r for r in results if r.workload.startswith("training: ")}


# The tables of docs/benchmarks.md.


def device_table(found: Iterable[Both], first: str) -> str:
    """Return the table of device times of large tensors. ``first``: "optimizer", or "workload" for both."""
    rows = []
    for both in found:
        r = both.device
        name = r.optimizer if first == "optimizer" else f"{r.optimizer}, {r.workload.partition(':')[0]}"
        rows.append([name, figures.duration(r.seconds()), of_limit(r), number(figures.bandwidth(r)), *ratios(r)])
    return table(["", "a step", "of a copy's rate", "GB/s", *TORCH], rows) if rows else ""


def small_table(plain: Iterable[Both], graphs: Iterable[Both]) -> str:
    """Return the table of small tensors: steps by the wall clock, and replayed graphs by the device's."""
    replayed = {both.optimizer: both.device for both in graphs}
    rows = []
    for both in plain:
        graph = replayed.get(both.optimizer)
        cells = [figures.duration(graph.seconds()), *ratios(graph)] if graph else [""] * 3
        rows.append([both.optimizer, figures.duration(both.wall.seconds()), *ratios(both.wall), *cells])
    return table(["", "a step", *TORCH, "a replay", *TORCH], rows) if rows else ""


def tail_table(found: Iterable[Both]) -> str:
    """Return the table of the tail of a step."""
    rows = []
    for both in found:
        name, _, size = both.workload.partition(": ")
        r = both.device if "graph" in name else both.wall
        what = f"{size}, a replayed graph" if "graph" in name else size
        rows.append([what, figures.duration(r.seconds()), of_limit(both.device), *ratios(r)])
    return table(["", "a step", "of a copy's rate", *TORCH], rows) if rows else ""


def rest_table(found: Iterable[Both]) -> str:
    """Return the table of other workloads of small tensors."""
    rows = []
    for both in found:
        others = ", ".join(
            f"{name} {figures.times(ratio) if name.startswith(OURS) else cell(ratio, both.wall)}"
            for name, ratio in both.wall.ratios().items()
        )
        rows.append([f"{both.optimizer}, {both.workload}", figures.duration(both.wall.seconds()), others])
    return table(["", "a step", "others"], rows) if rows else ""


def training_table(results: Iterable[Result]) -> str:
    """Return the table of training a GPT."""
    found = parts_of_training(results)
    if set(found) != {"whole step", "optimizer's part"}:
        return ""
    rows = []
    for what, r in found.items():
        rows.append([what, figures.duration(r.seconds()), *ratios(r)])
    whole, part = found["whole step"], found["optimizer's part"]
    shares = [f"{part.seconds(name) / whole.seconds(name):.1%}" for name in (OURS, *TORCH)]
    return table(["", OURS, *TORCH], [*rows, ["optimizer's share", *shares]])


def benchmarks_block(metadata: dict[str, Any], results: list[Result]) -> str:
    """Return the tables of docs/benchmarks.md."""
    found = compared(results)
    large, small = of_workload(found, f"large: {LARGE}"), of_workload(found, f"small: {SMALL}")
    formats = of_workload(found, f"(b?float[0-9]+|bfloat16 states): {LARGE}")
    tails = of_workload(found, "tail.*")
    rest = [*of_workload(found, f"capturable: {SMALL}"), *of_workload(found, "small: 10,000.*|groups:.*")]
    training = parts_of_training(results).get("whole step")
    size = f", {figures.count(training.elements)} parameters in {training.tensors} tensors" if training else ""
    parts = ["## On a GPU", about(metadata)]
    for title, text in (
        (f"**Large tensors**{size_of(large)}, times on the device:", device_table(large, "optimizer")),
        ("**Formats**, of the same number of elements:", device_table(formats, "workload")),
        (
            f"**Small tensors**{size_of(small)}. A step: the host's time counts. A replay: the time on the device of a "
            "step that was captured in a CUDA graph:",
            small_table(small, of_workload(found, f"graph: {SMALL}")),
        ),
        (f"**The tail of a training step**: {TAIL}. The host's time counts, except in a graph:", tail_table(tails)),
        (f"**Training a GPT**{size}, with AdamW in bfloat16 autocast:", training_table(results)),
        ("**Others**, the host's time counts:", rest_table(rest)),
    ):
        parts += [title, text] if text else []
    return "\n\n".join([*parts, *waited(metadata)])


def waited(metadata: dict[str, Any]) -> Iterator[str]:
    """Yield a line of the device times in the tables that include waiting for the host."""
    shown = (f"large: {LARGE}", "graph: ", "tail, one graph: ", "bfloat16", "float")
    rows = [row for row in metadata.get("launch-bound", []) if row["workload"].startswith(shown)]
    if rows:
        texts = (f"{row['optimizer']}, {row['workload']} ({row['contenders']})" for row in rows)
        yield f"Times on the device that include waiting for the host: {'; '.join(texts)}."


def size_of(found: list[Both]) -> str:
    return f", {figures.size({'': found[0].device})}" if found else ""


def about(metadata: dict[str, Any]) -> str:
    """Return a line that describes the GPU, versions and date."""
    device = metadata["device"]
    gpu = ", ".join(
        text
        for text in (
            device.get("GPU", "a dry run without a GPU"),
            device.get("CUDA of torch") and f"CUDA {device['CUDA of torch']}",
            device.get("driver") and f"driver {device['driver']}",
            f"a copy of 1 GiB at {device['copy rate, GB/s']:,.0f} GB/s",
        )
        if text
    )
    host = metadata.get("machine", {}).get("processor", "")
    versions, when = figures.versions(metadata), figures.when(metadata)
    return "; ".join(filter(None, [gpu, host and f"host: {host}", versions, when])) + "."


# The table of README.md, with these optimizers on large tensors.
IN_README = ("SGD", "AdamW", "Lion", "RMSprop", "RAdam")


def short_rows(results: list[Result]) -> Iterator[list[str]]:
    """Yield the rows of the short table."""
    found = compared(results)

    def row(name: str, r: Result, limit: str = "") -> list[str]:
        return [name, figures.duration(r.seconds()), *ratios(r), limit]

    for both in of_workload(found, f"large: {LARGE}"):
        if both.optimizer in IN_README:
            yield row(f"{both.optimizer}, {LARGE}", both.device, of_limit(both.device))
    for both in of_workload(found, f"tail: {LARGE}"):
        yield row(f"{TAIL}, {LARGE}, with the host's time", both.wall, of_limit(both.device))
    for both in of_workload(found, f"small: {SMALL}"):
        if both.optimizer == "AdamW":
            yield row(f"AdamW, {SMALL}, with the host's time", both.wall)
    for both in of_workload(found, f"graph: {SMALL}"):
        if both.optimizer == "AdamW":
            yield row(f"AdamW, {SMALL}, replayed CUDA graph", both.device)
    for what, r in parts_of_training(results).items():
        yield row(f"GPT, {figures.count(r.elements)} parameters, AdamW: {what}", r)


def readme_block(metadata: dict[str, Any], results: list[Result]) -> str:
    """Return the table of README.md.

    Raises:
        ValueError: The file has none of the results of the table.
    """
    head, rows = ["", "a step", *TORCH, "of a copy's rate"], list(short_rows(results))
    if not rows:
        raise ValueError("the file has no results of a GPU for README.md: large, tail, small, graph or training")
    return f"On a GPU; times are the device's if nothing else is said. {about(metadata)}\n\n{table(head, rows)}"
