"""Step throughput on a GPU against torch.optim: ``python bench/gpu.py [--json FILE]``.

It takes some minutes and up to 30 GB of the GPU's memory. A missed target is printed; it is not an error.

In every workload all contenders first make the same steps from the same start with the same gradients, and every
element is compared; ours must have been stepped by kernels. Then they are timed in turn, round after round, in changing
order. Times are medians, each with half the interquartile range; ratios are medians of the ratios within each round.
Each step has two times:

- device: between two events around many steps. Large copies before the first step keep the device busy while the host
  launches the steps. So the host's time counts only for contenders with so many launches (torch's loop over the
  tensors) that the device's queue is full.
- wall: many steps and a synchronisation. It includes the host's time, which dominates for small models.

A device-to-device copy of 1 GiB is timed in the same rounds. For steps that are limited by memory, its rate is the
limit: the table has the fraction of it, with each array counted once for every time that it must be read or written. If
everything that a step uses would fit the L2 cache, several replicas with their own parameters, gradients and states are
stepped in turn.

The file has the samples of both clocks as two results, which ``bench/report.py`` and ``bench/compare.py`` read.

``--device cpu --quick`` is a dry run of this script without a GPU.
"""

from __future__ import annotations

import argparse
import functools
import gc
import inspect
import itertools
import math
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import onepass
import torch
from onepass.cli import bench, limit, timing
from onepass.cli.info import facts
from onepass.cli.limit import LIMIT
from onepass.cli.timing import Result, Run, Samples
from onepass.training.catalog import class_name
from onepass.training.table import table_line, text_table
from torch import Tensor
from torch.optim import Optimizer

Make = Callable[..., Optimizer]  # its argument: parameters or groups

CHECKED_STEPS = 7  # before results are compared; RAdam rectifies from the sixth step on
SAMPLE = 0.02  # approximate seconds per sample
AHEAD = 0.004  # seconds in which the host launches a sample's steps: a device's queue holds 1,024 launches

SUBJECTS = {subject.name: subject for subject in bench.SUBJECTS}
CAPTURABLE = [name for name in SUBJECTS if "capturable" in inspect.signature(SUBJECTS[name].ours).parameters]
WITHOUT_FUSED = ["RMSprop", "NAdam", "RAdam", "Adadelta", "Adamax", "Lion"]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is stepped: a number of tensors of one length."""

    name: str
    tensors: int
    length: int
    optimizers: list[str] = field(default_factory=lambda: list(SUBJECTS))
    dtype: torch.dtype = torch.float32
    own: dict[str, Any] = field(default_factory=dict)  # arguments that torch's classes do not have
    tolerance: float = 1e-6  # of parameters, in addition to 8 roundings: 0.02 % of CHECKED_STEPS updates
    grouped: bool = False  # one group per tensor
    capturable: bool = False
    graph: bool = False  # captured once and replayed

    def reduced(self) -> Workload:
        """Return this workload with sizes for a dry run."""
        changed = {"tensors": max(2, self.tensors // 100), "length": min(self.length, 1 << 16)}
        return Workload(**{**self.__dict__, **changed})

    def params(self, make_grads: Callable[[int], list[Tensor]], replica: int) -> list[Tensor]:
        """Return new parameters, with the same values at every call and the scale of a model's weights."""
        grads = make_grads(replica)
        params: list[Tensor] = []
        for start, grad in zip(normal(self, grads[0].device, seed=replica), grads, strict=True):
            p = torch.nn.Parameter(0.02 * start)
            p.grad = grad
            params.append(p)
        return params

    def gradients(self, device: torch.device, replica: int) -> list[Tensor]:
        """Return random gradients away from zero, where torch's arithmetic in half precision would underflow."""
        return [torch.copysign(x.abs() + 0.5, x) for x in normal(self, device, seed=1000 + replica)]


LARGE_MODEL, SMALL_MODEL = "large: 200 x 1M", "small: 1000 x 1,000"
LARGE: dict[str, Any] = {"tensors": 200, "length": 1 << 20}
SMALL: dict[str, Any] = {"tensors": 1000, "length": 1000}
FORMATS: dict[str, Any] = {**LARGE, "optimizers": ["AdamW", "SGD"], "tolerance": 2e-3}

WORKLOADS = [
    Workload(name=LARGE_MODEL, **LARGE),
    Workload(name=SMALL_MODEL, **SMALL),
    Workload(name="small: 10,000 x 100", tensors=10_000, length=100, optimizers=["AdamW"]),
    Workload(name="groups: 500 x 1,000", tensors=500, length=1000, optimizers=["AdamW"], grouped=True),
    Workload(name="bfloat16: 200 x 1M", **FORMATS, dtype=torch.bfloat16),
    Workload(name="float16: 200 x 1M", **FORMATS, dtype=torch.float16),
    Workload(name="bfloat16 states: 200 x 1M", **FORMATS, own={"state_dtype": torch.bfloat16}),
    Workload(name="float64: 200 x 1M", **{**FORMATS, "tolerance": 1e-12}, dtype=torch.float64),
    Workload(name="capturable: 1000 x 1,000", **SMALL, optimizers=CAPTURABLE, capturable=True),
    Workload(name="graph: 1000 x 1,000", **SMALL, optimizers=CAPTURABLE, capturable=True, graph=True),
    Workload(name="graph: 200 x 1M", **LARGE, optimizers=["AdamW"], capturable=True, graph=True),
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

    def of_limit(self, name: str) -> float | None:
        """Return the rate of a contender's traffic relative to the copy's; None if the limit is not measured."""
        if LIMIT not in self.device.samples:
            return None
        both = {name: self.device.samples[name], LIMIT: self.device.samples[LIMIT]}
        return timing.ratios(both)[LIMIT] * self.traffic[name] / self.device.moved


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
    Target(SMALL_MODEL, SUBJECTS, "wall", "fused", 5.0),
    Target(LARGE_MODEL, WITHOUT_FUSED, "device", "foreach", 2.0),
    Target(SMALL_MODEL, WITHOUT_FUSED, "wall", "foreach", 2.0),
]


class ForeachLion(Optimizer):
    """Lion (Chen et al. 2023) in torch's foreach operations, because torch has no Lion."""

    def __init__(
        self, params: Iterable[Tensor], lr: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.99)
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure
        for group in self.param_groups:
            params = group["params"]
            grads = [p.grad for p in params]
            for p in params:
                if p not in self.state:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
            averages = [self.state[p]["exp_avg"] for p in params]
            beta1, beta2 = group["betas"]
            updates = torch._foreach_lerp(averages, grads, 1 - beta1)
            torch._foreach_sign_(updates)
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, updates, alpha=-group["lr"])
            torch._foreach_lerp_(averages, grads, 1 - beta2)


# -- the device ------------------------------------------------------------------------------------------------------


class EventClock(timing.Clock):
    """The device's own clock: two events around the calls.

    Large copies before the first event keep the device busy while the host launches the calls. A sample has no more
    calls than the host can launch ahead.
    """

    def __init__(self, sample: float, copy: Run, copy_seconds: float) -> None:
        super().__init__(sample, torch.cuda.synchronize)
        self.copy = copy
        self.copy_seconds = copy_seconds

    def sampler(self, run: Run) -> Callable[[], float]:
        """Return a function that takes a sample and returns the device's seconds per call."""
        repeats = self.repeats(run)
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        launch = time.perf_counter() - start
        repeats = max(1, min(repeats, round(AHEAD / launch)))
        copies = math.ceil(min(1.5 * repeats * launch, 2 * AHEAD) / self.copy_seconds)
        return lambda: self.busy_seconds(run, repeats, copies)

    def busy_seconds(self, run: Run, repeats: int, copies: int) -> float:
        """Return the device's seconds per call, after a number of copies."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(copies):
            self.copy()
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / 1e3 / repeats


class Device:
    """The device and its clocks. On the CPU, for a dry run, both clocks are the wall clock."""

    def __init__(self, name: str, sample: float) -> None:
        self.torch = torch.device(name)
        self.is_gpu = self.torch.type == "cuda"
        if self.is_gpu:
            torch.cuda.set_device(self.torch)
        self.cache = torch.cuda.get_device_properties(self.torch).L2_cache_size if self.is_gpu else 1 << 20
        self._source = torch.randn((1 << 30 if self.is_gpu else 1 << 20) // 4, device=self.torch)
        self._target = torch.empty_like(self._source)
        self.copied = 2 * self._source.nbytes
        self.copy()
        self.wall = self.clock = timing.Clock(sample, torch.cuda.synchronize if self.is_gpu else None)
        self.copy_seconds = self.wall.seconds(self.copy, 10)
        if self.is_gpu:
            self.clock = EventClock(sample, self.copy, self.copy_seconds)

    def copy(self) -> None:
        """Make the reference copy, of `copied` bytes read and written."""
        self._target.copy_(self._source)

    def kernel_steps(self) -> int:
        """Return the number of tensors that our kernels have stepped."""
        count: int = onepass.stats()["kernel"].get(self.torch.type, 0)
        return count

    def facts(self) -> dict[str, Any]:
        """Return a description of the device."""
        told: dict[str, Any] = {"copy rate, GB/s": round(self.copied / self.copy_seconds / 1e9, 1)}
        if self.is_gpu:
            properties = torch.cuda.get_device_properties(self.torch)
            told["GPU"] = f"{properties.name}, {properties.multi_processor_count} multiprocessors"
            told["L2 cache"] = self.cache
            told["CUDA of torch"] = torch.version.cuda
            told["driver"] = driver()
        return told


def driver() -> str:
    """Return the version of NVIDIA's driver."""
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


# -- a comparison ----------------------------------------------------------------------------------------------------


def normal(workload: Workload, device: torch.device, seed: int) -> Iterator[Tensor]:
    """Return normally distributed numbers."""
    generator = torch.Generator(device).manual_seed(seed)
    for _ in range(workload.tensors):
        yield torch.randn(workload.length, generator=generator, device=device, dtype=workload.dtype)


def makers(workload: Workload, subject: bench.Subject, device: Device) -> dict[str, Make]:
    """Return each contender's constructor by its name, ours first."""
    if workload.capturable:
        subject = subject._replace(arguments={**subject.arguments, "capturable": True})
    found: dict[str, Make] = {}
    for name, make in subject.optimizers().items():
        if name == "onepass":
            found[name] = functools.partial(make, **workload.own)
        elif name == "foreach" or (name == "fused" and takes_fused(make, workload.dtype, device)):
            found[name] = make
        elif name == "default" and not workload.capturable:
            found["for-loop"] = make  # torch's default on a GPU is foreach
    if subject.ours is onepass.Lion:
        found["foreach"] = functools.partial(ForeachLion, **subject.arguments)
    if not workload.grouped:
        return found
    apart = {name: in_groups(make) for name, make in found.items()}
    together = {f"{name}, one group": make for name, make in found.items() if name != "for-loop"}
    return {**apart, **together}


def takes_fused(make: Make, dtype: torch.dtype, device: Device) -> bool:
    """Return whether torch's class has a fused form for such parameters on this device."""
    if not device.is_gpu and dtype in (torch.bfloat16, torch.float16):
        return False  # SGD's skips elements on a CPU: pytorch issue 191763
    p = torch.nn.Parameter(torch.ones(1, device=device.torch, dtype=dtype))
    p.grad = torch.ones_like(p)
    try:
        make([p]).step()
    except RuntimeError:
        return False
    return True


def in_groups(make: Make) -> Make:
    """Return the same constructor with one group per parameter."""
    return lambda params: make([{"params": [p]} for p in params])


def captured(step: Run) -> Run:
    """Capture a step and return its replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def runnable(optimizer: Optimizer, steps: int, graph: bool) -> Run:
    """Return a function that makes a step, after the first steps (and one more for the capture of a graph)."""
    for _ in range(steps):
        optimizer.step()
    return captured(optimizer.step) if graph else optimizer.step


def in_rotation(runs: list[Run]) -> Run:
    """Return a function that calls the next of them at each call."""
    if len(runs) == 1:
        return runs[0]
    endless = itertools.cycle(runs)
    return lambda: next(endless)()


def compare(workload: Workload, subject: bench.Subject, device: Device, rounds: int) -> Comparison:
    """Check all contenders, then time them."""
    title = f"{workload.name}: {subject.name}"
    gradients = functools.cache(functools.partial(workload.gradients, device.torch))
    runs: dict[str, Run] = {}
    traffic: dict[str, int] = {}
    exceeds_cache = False
    ours: list[Tensor] = []
    for name, make in makers(workload, subject, device).items():
        params = workload.params(gradients, replica=0)
        stepped = -device.kernel_steps()
        optimizer = make(params)
        steps = [runnable(optimizer, CHECKED_STEPS, workload.graph)]
        stepped += device.kernel_steps()
        called = (CHECKED_STEPS + workload.graph) * len(params)
        if name.startswith("onepass") and stepped != called:
            others = onepass.stats()["torch"]
            raise AssertionError(f"{title}: kernels stepped {stepped} of {called} tensors; torch's code: {others}")
        if workload.graph:
            for _ in range(CHECKED_STEPS):
                steps[0]()
        if ours:
            timing.check(f"{title} against {name}", ours, params, subject.ours is onepass.Lion, workload.tolerance)
        else:
            ours = params

        arrays = limit.arrays_of(optimizer.step, params)
        traffic[name] = limit.moved_by(arrays)
        held = sum(array.nbytes for row in arrays for array in row)
        for replica in range(1, 1 + device.cache // held):
            steps.append(runnable(make(workload.params(gradients, replica)), 1, workload.graph))
            steps[-1]()
        if name == "onepass":
            exceeds_cache = len(steps) == 1
        runs[name] = in_rotation(steps)

    def result(question: str, samples: Samples, moved: int = 0) -> Result:
        elements = workload.tensors * workload.length
        return Result(workload.name, subject.name, elements, workload.tensors, samples, moved, question)

    copy: dict[str, Run] = {LIMIT: device.copy} if exceeds_cache else {}
    on_device = timing.time_in_turn(runs | copy, rounds, clock=device.clock)
    by_wall = timing.time_in_turn(runs, rounds, clock=device.wall)
    if copy:
        on_device[LIMIT] = [seconds * traffic["onepass"] / device.copied for seconds in on_device[LIMIT]]
    moved = traffic["onepass"]
    return Comparison(result("device time", on_device, moved), result("wall time", by_wall), traffic)


# -- output ----------------------------------------------------------------------------------------------------------

HEADS = ("workload", "optimizer", "contender", "device, us", "", "wall, us", "", "ratio", "(wall)", "GB/s", "of limit")
COLUMNS = ("<26", "<9", "<18", ">10", ">5", ">10", ">5", ">6", ">6", ">5", ">8")


def lines_of(compared: Comparison) -> Iterator[str]:
    """Return a line per contender; ratios are its time relative to ours."""
    device, wall = compared.device, compared.wall
    ratios, wall_ratios = timing.ratios(device.samples), timing.ratios(wall.samples)
    for name in wall.samples:
        times = [text for r in (device, wall) for text in (f"{r.seconds(name) * 1e6:.1f}", f"{r.spread(name):.1%}")]
        cells = [device.workload, device.optimizer, name, *times, f"{ratios[name]:.2f}", f"{wall_ratios[name]:.2f}"]
        of_limit = compared.of_limit(name)
        rate = f"{compared.traffic[name] / device.seconds(name) / 1e9:.0f}"
        yield table_line([*cells, *([rate, f"{of_limit:.3f}"] if of_limit is not None else ["", ""])], COLUMNS)


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
                yield table_line([verdict, result.workload, result.optimizer, figure], ("<6", "<26", "<9", "<"))


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
    args = parser.parse_args(argv)
    args.rounds = args.rounds or (3 if args.quick else 7)
    if args.rounds < 2:
        parser.error("--rounds must be >= 2")
    return args


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table and the targets, and write the JSON file."""
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

    compared: list[Comparison] = []
    for workload in (w.reduced() if args.quick else w for w in WORKLOADS):
        if not workload.name.startswith(tuple(args.workloads)):
            continue
        if workload.capturable and not device.is_gpu:
            print(f"{workload.name}: left out, because it needs a GPU")
            continue
        for subject in (SUBJECTS[name] for name in workload.optimizers if name in args.optimizers):
            try:
                compared.append(compare(workload, subject, device, args.rounds))
            except AssertionError as error:
                print(f"wrong result, not timed: {error}", file=sys.stderr)
                return 1
            gc.collect()
            print(*lines_of(compared[-1]), sep="\n", flush=True)
            if args.json:  # after each result, so that results are not lost if the run is ended
                results = [result for each in compared for result in (each.device, each.wall)]
                traffic = [{"workload": c.wall.workload, "optimizer": c.wall.optimizer, **c.traffic} for c in compared]
                more = {"device": about, "bytes per step": traffic, "targets": list(judged(compared))}
                args.json.write_text(bench.as_json(results, args.rounds, **more))

    print("\ntargets" + ("" if device.is_gpu and not args.quick else " (of a dry run: not meaningful)"))
    print(*judged(compared), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
