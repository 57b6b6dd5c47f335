"""Step throughput on a GPU against torch.optim: ``python bench/gpu.py [--json FILE]``.

It takes two to three minutes and up to 30 GB of the GPU's memory. The first workloads are the most important ones, and
the file is written after each result. A missed target is printed; it is not an error.

The contenders are onepass, and torch's "foreach" and "fused" forms. torch's default on a GPU is its foreach form.

In every workload all contenders first make the same steps from the same start with the same gradients, and every
element is compared; ours must have been stepped by kernels. Then they are timed in turn, round after round, in changing
order. Times are medians, each with half the interquartile range; ratios are medians of the ratios within each round.
Each step has two times:

- device: between two events around many steps. Large copies before the first step keep the device busy while the host
  launches the steps. A time is marked "~" if the device has nevertheless waited for the host: contenders with more
  launches than the device's queue holds, and torch's AveragedModel, which waits in each step.
- wall: many steps and a synchronization. It includes the host's time, which dominates for small models.

A device-to-device copy of 1 GiB is timed in the same rounds. For steps that are limited by memory, its rate is the
limit: the table has the fraction of it, with each array counted once for every time that it must be read or written. If
everything that a step uses would fit the L2 cache, several replicas with their own parameters, gradients and states are
stepped in turn.

Workloads "tail" are clipping by the norm of all gradients, AdamW, and an exponential average of the weights. "graph":
the step is captured once and replayed. "training" is a GPT of 124M parameters; its losses are compared, too.

The file has the samples of both clocks as two results, which ``bench/report.py`` and ``bench/compare.py`` read.

``--device cpu --quick`` is a dry run of this script without a GPU.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import gpu_contenders
import gpu_training
import onepass
import torch
from gpu_contenders import Contender
from gpu_device import Device, captured
from onepass.cli import bench, timing
from onepass.cli.info import facts
from onepass.cli.limit import LIMIT
from onepass.cli.timing import Result, Run, Samples
from onepass.training.catalog import class_name
from onepass.training.table import table_line, text_table
from torch import Tensor

Build = Callable[[list[Tensor]], Contender]

CHECKED_STEPS = 7  # before results are compared; RAdam rectifies from the sixth step on
SAMPLE = 0.02  # approximate seconds per sample

# Those with a foreach form: the others would be compared with a loop of torch operations.
SUBJECTS = {s.name: s for s in bench.SUBJECTS if hasattr(torch.optim, s.name) or s.ours in gpu_contenders.FOREACH}
SOME_CAPTURABLE = ["AdamW", "Adam", "RMSprop", "NAdam", "Adadelta"]
WITHOUT_FUSED = ["RMSprop", "NAdam", "RAdam", "Adadelta", "Adamax", "Lion"]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is stepped: a number of tensors of one length."""

    name: str
    tensors: int
    length: int
    columns: int = 0  # of each tensor, a matrix; 0: it is a vector
    optimizers: list[str] = field(default_factory=lambda: list(SUBJECTS))
    dtype: torch.dtype = torch.float32
    own: dict[str, Any] = field(default_factory=dict)  # arguments that torch's classes do not have
    tolerance: float = 1e-6  # of parameters, in addition to 8 roundings: 0.02 % of CHECKED_STEPS updates
    grouped: bool = False  # one group per tensor
    capturable: bool = False
    graph: bool = False  # captured once and replayed
    tail: bool = False  # with clipping and an average of the weights

    def reduced(self) -> Workload:
        """Return this workload with sizes for a dry run."""
        changed = {"tensors": max(2, self.tensors // 100), "length": min(self.length, 1 << 16)}
        return Workload(**{**self.__dict__, **changed})

    def params(self, make_grads: Callable[[int], list[Tensor]], replica: int) -> list[Tensor]:
        """Return new parameters, with the same values at every call and the scale of a model's weights."""
        grads = make_grads(replica)
        params: list[Tensor] = []
        for start, grad in zip(apart(normal(self, grads[0].device, seed=replica), 0.02), grads, strict=True):
            p = torch.nn.Parameter(start)
            p.grad = grad
            params.append(p)
        return params

    def gradients(self, device: torch.device, replica: int) -> list[Tensor]:
        """Return random gradients away from zero, where torch's arithmetic in half precision would underflow."""
        x = normal(self, device, seed=1000 + replica)
        return apart(torch.copysign(x.abs() + 0.5, x), 1.0)


def normal(workload: Workload, device: torch.device, seed: int) -> Tensor:
    """Return normally distributed numbers, a row for each tensor."""
    generator = torch.Generator(device).manual_seed(seed)
    made = torch.randn((workload.tensors, workload.length), generator=generator, device=device, dtype=workload.dtype)
    return made.view(workload.tensors, -1, workload.columns) if workload.columns else made


def apart(rows: Tensor, factor: float) -> list[Tensor]:
    """Return the rows multiplied by a factor, each in memory of its own."""
    return list(torch._foreach_mul(rows.unbind(), factor))


LARGE_MODEL, SMALL_MODEL = "large: 200 x 1M", "small: 1000 x 1,000"
LARGE_TAIL, SMALL_TAIL = "tail: 200 x 1M", "tail: 1000 x 1,000"
SMALL_GRAPH, SMALL_TAIL_GRAPH = "graph: 1000 x 1,000", "tail, one graph: 1000 x 1,000"
LARGE: dict[str, Any] = {"tensors": 200, "length": 1 << 20}
SMALL: dict[str, Any] = {"tensors": 1000, "length": 1000}
FORMATS: dict[str, Any] = {**LARGE, "optimizers": ["AdamW", "SGD"], "tolerance": 2e-3}
ADAMW: dict[str, Any] = {"optimizers": ["AdamW"]}
EIGHT_BITS: dict[str, Any] = {**LARGE, **ADAMW, "columns": 1024, "tolerance": 4e-3}
GRAPH: dict[str, Any] = {"capturable": True, "graph": True}

# The most important first.
WORKLOADS = [
    Workload(name=LARGE_MODEL, **LARGE),
    Workload(name=SMALL_MODEL, **SMALL),
    Workload(name=LARGE_TAIL, **LARGE, **ADAMW, tail=True),
    Workload(name=SMALL_TAIL, **SMALL, **ADAMW, tail=True),
    Workload(name=SMALL_GRAPH, **SMALL, **GRAPH, optimizers=SOME_CAPTURABLE),
    Workload(name="graph: 200 x 1M", **LARGE, **GRAPH, **ADAMW),
]
MORE_WORKLOADS = [  # after the training
    Workload(name="bfloat16: 200 x 1M", **FORMATS, dtype=torch.bfloat16),
    Workload(name="float16: 200 x 1M", **FORMATS, dtype=torch.float16),
    Workload(name="bfloat16 states: 200 x 1M", **FORMATS, own={"state_dtype": torch.bfloat16}),
    Workload(name="8-bit states: 200 x 1M", **EIGHT_BITS, own={"state_dtype": torch.float8_e4m3fn}),
    Workload(
        name="bfloat16, masters, 8-bit states: 200 x 1M",
        **{**EIGHT_BITS, "tolerance": 2e-2},
        dtype=torch.bfloat16,
        own={"state_dtype": torch.float8_e4m3fn, "master": "split"},
    ),
    Workload(name="float64: 200 x 1M", **{**FORMATS, "tolerance": 1e-12}, dtype=torch.float64),
    Workload(name="capturable: 1000 x 1,000", **SMALL, optimizers=SOME_CAPTURABLE, capturable=True),
    Workload(name="small: 10,000 x 100", tensors=10_000, length=100, **ADAMW),
    Workload(name="groups: 500 x 1,000", tensors=500, length=1000, **ADAMW, grouped=True),
    # Last, because a step that waits for the host invalidates the capture.
    Workload(name=SMALL_TAIL_GRAPH, **SMALL, **ADAMW, **GRAPH, tail=True),
    Workload(name="tail, one graph: 200 x 1M", **LARGE, **ADAMW, **GRAPH, tail=True),
]


@dataclass
class Comparison:
    """The result of one comparison by both clocks, ours first.

    If everything that a step uses exceeds the L2 cache, `device` also has the limit: the time in which the device reads
    and writes as many bytes in a copy as our step has to move.
    """

    device: Result
    wall: Result
    traffic: dict[str, int]  # bytes that each contender's step has to move
    launch_bound: list[str] = field(default_factory=list)  # whose device time includes waiting for the host

    def of_limit(self, name: str) -> float | None:
        """Return the rate of a contender's traffic relative to the copy's; None if the limit is not measured."""
        if LIMIT not in self.device.samples:
            return None
        both = {name: self.device.samples[name], LIMIT: self.device.samples[LIMIT]}
        return timing.ratios(both)[LIMIT] * self.traffic[name] / self.device.moved

    def results(self) -> list[Result]:
        """Return the results for the file."""
        return [self.device, self.wall]

    def lines(self) -> Iterator[str]:
        """Return a line per contender; ratios are its time relative to ours."""
        device, wall = self.device, self.wall
        ratios, wall_ratios = timing.ratios(device.samples), timing.ratios(wall.samples)
        for name in wall.samples:
            times = [text for r in (device, wall) for text in (f"{r.seconds(name) * 1e6:.1f}", f"{r.spread(name):.1%}")]
            if name in self.launch_bound:
                times[0] = f"~{times[0]}"
            cells = [device.workload, device.optimizer, name, *times, f"{ratios[name]:.2f}", f"{wall_ratios[name]:.2f}"]
            of_limit = self.of_limit(name)
            rate = f"{self.traffic[name] / device.seconds(name) / 1e9:.0f}"
            yield table_line([*cells, *([rate, f"{of_limit:.3f}"] if of_limit is not None else ["", ""])], COLUMNS)


Measured = Comparison | gpu_training.Training

HEADS = ("workload", "optimizer", "contender", "device, us", "", "wall, us", "", "ratio", "(wall)", "GB/s", "of limit")
COLUMNS = ("<41", "<9", "<18", ">10", ">5", ">10", ">5", ">6", ">6", ">5", ">8")


class Target(NamedTuple):
    """A target for the ratio of a contender's time to ours."""

    workload: str
    optimizers: Iterable[str]
    clock: str
    peer: str
    at_least: float


TARGETS = [
    Target(LARGE_MODEL, SUBJECTS, "device", LIMIT, 0.92),
    Target(LARGE_MODEL, SUBJECTS, "device", "fused", 1.10),
    Target(LARGE_MODEL, WITHOUT_FUSED, "device", "foreach", 2.0),
    Target(SMALL_MODEL, SUBJECTS, "wall", "fused", 3.0),
    Target(SMALL_MODEL, WITHOUT_FUSED, "wall", "foreach", 2.0),
    Target(SMALL_GRAPH, SUBJECTS, "device", "fused", 3.0),
    Target(LARGE_TAIL, SUBJECTS, "wall", "foreach", 2.0),
    Target(SMALL_TAIL, SUBJECTS, "wall", "foreach", 2.0),
]


# -- a comparison ----------------------------------------------------------------------------------------------------


def makers(workload: Workload, subject: bench.Subject, device: Device) -> dict[str, Build]:
    """Return each contender's constructor by its name, ours first."""
    if workload.capturable:
        subject = subject._replace(arguments={**subject.arguments, "capturable": True})
    found = gpu_contenders.optimizers(subject, workload.dtype, device)
    found["onepass"] = functools.partial(found["onepass"], **workload.own)
    if workload.tail:
        of_torch = gpu_contenders.CapturableTorchTail if workload.graph else gpu_contenders.TorchTail
        kinds = {name: gpu_contenders.OnepassTail if name == "onepass" else of_torch for name in found}
        return {name: functools.partial(kinds[name], make) for name, make in found.items()}
    if workload.grouped:
        together = {f"{name}, one group": make for name, make in found.items()}
        found = {name: gpu_contenders.in_groups(make) for name, make in found.items()} | together
    return {name: functools.partial(Contender, make) for name, make in found.items()}


def prepared(contender: Contender, steps: int, graph: bool) -> Run:
    """Make the first steps, and in a graph one more for the capture and as many replays; return what makes a step."""
    run = contender.run
    for i in range(steps):
        contender.lend(i)
        run()
    if graph:
        run = captured(run)
        for i in range(steps):
            contender.lend(i)
            run()
    return run


def in_rotation(runs: list[Run]) -> Run:
    """Return a function that calls the next of them at each call."""
    if len(runs) == 1:
        return runs[0]
    endless = itertools.cycle(runs)
    return lambda: next(endless)()


def check(title: str, ours: Contender, theirs: Contender, flips: bool, tolerance: float) -> None:
    """Compare every element of two contenders' results.

    Raises:
        AssertionError: They differ.
    """
    for name, found in ours.results().items():
        with torch.no_grad():  # one comparison of all tensors: each operation costs the host some microseconds
            a, b = torch.stack(found), torch.stack(theirs.results()[name])
        timing.check(f"{title}, {name}", [a], [b], flips, tolerance)


def compare(workload: Workload, subject: bench.Subject, device: Device, rounds: int) -> Comparison:
    """Check all contenders, then time them."""
    title = f"{workload.name}: {subject.name}"
    gradients = functools.cache(functools.partial(workload.gradients, device.torch))
    runs: dict[str, Run] = {}
    traffic: dict[str, int] = {}
    exceeds_cache = False
    ours: Contender | None = None
    for name, build in makers(workload, subject, device).items():
        stepped = -device.kernel_steps()
        first = build(workload.params(gradients, replica=0))
        steps = [prepared(first, CHECKED_STEPS, workload.graph)]
        stepped += device.kernel_steps()
        called = (CHECKED_STEPS + workload.graph) * workload.tensors
        if name.startswith("onepass") and stepped != called:
            others = onepass.stats()["torch"]
            raise AssertionError(f"{title}: kernels stepped {stepped} of {called} tensors; torch's code: {others}")
        if ours is None:
            ours = first
        else:
            check(f"{title} against {name}", ours, first, subject.flips, workload.tolerance)

        traffic[name] = first.moved()
        for replica in range(1, 1 + device.cache // first.held()):
            steps.append(prepared(build(workload.params(gradients, replica)), 1, workload.graph))
        if name == "onepass":
            exceeds_cache = len(steps) == 1
        runs[name] = in_rotation(steps)

    def result(question: str, samples: Samples, moved: int = 0) -> Result:
        elements = workload.tensors * workload.length
        return Result(workload.name, subject.name, elements, workload.tensors, samples, moved, question)

    copy: dict[str, Run] = {LIMIT: device.copy} if exceeds_cache else {}
    on_device = timing.time_in_turn(runs | copy, rounds, clock=device.clock)
    late = device.take_launch_bound()
    by_wall = timing.time_in_turn(runs, rounds, clock=device.wall)
    moved = traffic["onepass"]
    if copy:
        on_device[LIMIT] = [seconds * moved / device.copied for seconds in on_device[LIMIT]]
    launch_bound = [name for name, run in runs.items() if run in late]
    return Comparison(result("device time", on_device, moved), result("wall time", by_wall), traffic, launch_bound)


# -- output ----------------------------------------------------------------------------------------------------------


def judged(compared: list[Comparison]) -> Iterator[str]:
    """Yield a line per target that was measured."""
    for target in TARGETS:
        for each in compared:
            result: Result = getattr(each, target.clock)
            if result.workload != target.workload or result.optimizer not in target.optimizers:
                continue
            if (ratio := result.ratios().get(target.peer)) is not None:
                verdict = "met" if ratio >= target.at_least else "MISSED"
                figure = f"{ratio:.3f} x {target.peer} ({target.clock}, at least {target.at_least:.2f})"
                yield table_line([verdict, result.workload, result.optimizer, figure], ("<6", "<30", "<9", "<"))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the parsed arguments of the command."""
    parser = argparse.ArgumentParser(description="Step throughput on a GPU against torch.optim, checked, then timed.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results to this file")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds, to check that it works")
    parser.add_argument("--rounds", type=int, default=None, help="samples of each contender; default: 7 (3 if quick)")
    parser.add_argument("--device", default="cuda:0", help="cuda:0 (default), cuda:1, ...; cpu for a dry run")
    names = list(SUBJECTS)
    parser.add_argument(
        "--optimizers", nargs="+", type=class_name, choices=names, default=names, help="which to measure"
    )
    parser.add_argument("--workloads", nargs="+", metavar="WORD", default=[""], help="prefixes of workloads")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no comparison after so many seconds")
    args = parser.parse_args(argv)
    args.rounds = args.rounds or (3 if args.quick else 7)
    if args.rounds < 2:
        parser.error("--rounds must be >= 2")
    return args


def planned(args: argparse.Namespace, device: Device) -> Iterator[tuple[str, Callable[[], Measured]]]:
    """Yield the title and the measurement of each comparison that was asked for."""

    def of(workloads: list[Workload]) -> Iterator[tuple[str, Callable[[], Measured]]]:
        for workload in (w.reduced() if args.quick else w for w in workloads):
            if not workload.name.startswith(tuple(args.workloads)):
                continue
            if workload.capturable and not device.is_gpu:
                print(f"{workload.name}: left out, because it needs a GPU")
                continue
            for name in workload.optimizers:
                if name in args.optimizers:
                    measure = functools.partial(compare, workload, SUBJECTS[name], device, args.rounds)
                    yield f"{workload.name}: {name}", measure

    yield from of(WORKLOADS)
    if "AdamW" in args.optimizers and gpu_training.NAME.startswith(tuple(args.workloads)):
        size = gpu_training.QUICK if args.quick else gpu_training.FULL
        yield gpu_training.NAME, functools.partial(gpu_training.train, size, device)
    yield from of(MORE_WORKLOADS)


def as_json(measured: dict[str, Measured], rounds: int, **more: Any) -> str:
    """Return everything as JSON: see :func:`onepass.cli.bench.as_json`."""
    results = [result for each in measured.values() for result in each.results()]
    compared = [each for each in measured.values() if isinstance(each, Comparison)]
    keys = [{"workload": each.wall.workload, "optimizer": each.wall.optimizer} for each in compared]
    found = {
        "bytes per step": [{**key, **each.traffic} for key, each in zip(keys, compared, strict=True)],
        "launch-bound": [
            {**key, "contenders": ", ".join(each.launch_bound)}
            for key, each in zip(keys, compared, strict=True)
            if each.launch_bound
        ],
        "losses": next((each.losses for each in measured.values() if isinstance(each, gpu_training.Training)), {}),
        "targets": list(judged(compared)),
    }
    return bench.as_json(results, rounds, **more, **found)


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table and the targets, and write the JSON file. Return 1 if a comparison failed."""
    began = time.monotonic()
    args = parse(argv)
    if args.device != "cpu" and not torch.cuda.is_available():
        print("torch finds no GPU: nothing measured (--device cpu --quick is a dry run)", file=sys.stderr)
        return 1
    # torch warns that capturable=True is slow unless captured, which is measured here.
    warnings.filterwarnings("ignore", message=".*capturable=True")
    device = Device(args.device, SAMPLE / 20 if args.quick else SAMPLE)
    about = device.facts()
    print(text_table([*facts().items(), *about.items()], "<"))
    print("\n" + table_line(HEADS, COLUMNS))

    measured: dict[str, Measured] = {}
    failed: dict[str, str] = {}
    seconds: dict[str, float] = {}
    for title, measure in planned(args, device):
        start = time.monotonic()
        try:
            if start - began > args.seconds:
                raise TimeoutError("out of time")
            measured[title] = measure()
        except TimeoutError as error:
            failed[title] = str(error)
        except AssertionError as error:
            failed[title] = str(error)
            print(f"wrong result, not timed: {error}", file=sys.stderr, flush=True)
        except Exception as error:  # the others may still be measured
            failed[title] = f"{type(error).__name__}: {error}".partition("\n")[0]
            traceback.print_exc()
        else:
            print(*measured[title].lines(), sep="\n", flush=True)
        gc.collect()
        seconds[title] = round(time.monotonic() - start, 2)
        if args.json:  # after each result, so that results are not lost if the run is ended
            args.json.write_text(
                as_json(measured, args.rounds, device=about, seconds=seconds, **{"not measured": failed})
            )

    print("\ntargets" + ("" if device.is_gpu and not args.quick else " (of a dry run: not meaningful)"))
    print(*judged([each for each in measured.values() if isinstance(each, Comparison)]), sep="\n")
    print(f"\n{time.monotonic() - began:.0f} s", *(f"not measured: {t}: {why}" for t, why in failed.items()), sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
