"""``python -m onepass bench``: compare step times with torch.optim in less than two minutes.

:mod:`onepass.cli.timing` describes how times are measured. The folder ``bench/`` of the source tree has all benchmarks,
with peers other than torch, and uses this code.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..optimizers.adabelief import AdaBelief
from ..optimizers.adadelta import Adadelta
from ..optimizers.adagrad import Adagrad
from ..optimizers.adam import Adam
from ..optimizers.adamax import Adamax
from ..optimizers.adamw import AdamW
from ..optimizers.adan import Adan
from ..optimizers.ademamix import AdEMAMix
from ..optimizers.adopt import ADOPT
from ..optimizers.asgd import ASGD
from ..optimizers.lamb import LAMB
from ..optimizers.laprop import LaProp
from ..optimizers.lars import LARS
from ..optimizers.lion import Lion
from ..optimizers.mars import MARS
from ..optimizers.nadam import NAdam
from ..optimizers.novograd import NovoGrad
from ..optimizers.prodigy import Prodigy
from ..optimizers.radam import RAdam
from ..optimizers.rmsprop import RMSprop
from ..optimizers.rprop import Rprop
from ..optimizers.schedule_free_adamw import ScheduleFreeAdamW
from ..optimizers.schedule_free_radam import ScheduleFreeRAdam
from ..optimizers.schedule_free_sgd import ScheduleFreeSGD
from ..optimizers.sgd import SGD
from ..optimizers.signum import Signum
from ..optimizers.stable_adamw import StableAdamW
from ..training.catalog import class_name
from ..training.table import table_line
from . import limit
from .info import facts
from .timing import Maker, Result, Run, Shapes, check, gradients, parameters, prepare, sample_in_turn, time_in_turn

CHECKED_STEPS = 3
WARM_UP = 3

_TORCHS: dict[str, Any] = dict(vars(torch.optim))  # torch's names may be replaced by ours later


class Subject(NamedTuple):
    """An optimizer that is compared with its peers."""

    ours: type[Optimizer]
    arguments: dict[str, Any]
    tolerance: float = 1e-6  # largest difference of parameters after the checked steps: 0.1 % of an update
    flips: bool = False  # whether one element in a million may differ, because the formula jumps
    measured: tuple[str, ...] = ()  # what a pass before the update reads: "param", "grad" and names of states

    @property
    def name(self) -> str:
        """Name of the class."""
        return self.ours.__name__

    def optimizers(self) -> dict[str, Callable[..., Optimizer]]:
        """Return each contender's constructor by its name, ours first."""
        found: dict[str, Callable[..., Optimizer]] = {"onepass": functools.partial(self.ours, **self.arguments)}
        torchs = _TORCHS.get(self.name)
        if torchs is None:  # the peer is then the formula in torch's operations
            ours: Any = self.ours
            in_torch = type(self.name, (ours,), {"_step_params": ours.torch_step, "step": ours._step_all})
            found["default"] = functools.partial(in_torch, **self.arguments)
            return found
        known = inspect.signature(torchs).parameters
        for name, flags in PEERS.items():
            if name == "default" or name in known:
                known_flags = {flag: value for flag, value in flags.items() if flag in known}
                found[name] = functools.partial(torchs, **self.arguments, **known_flags)
        return found

    def makers(self) -> dict[str, Maker]:
        """Return a function for each contender's name that makes its step, ours first."""

        def maker(make: Callable[..., Optimizer]) -> Maker:
            return lambda params: make(params).step

        return {name: maker(make) for name, make in self.optimizers().items()}

    def check(self, peer: str, ours: list[Tensor], theirs: list[Tensor]) -> None:
        """Compare with a peer after the same steps."""
        check(f"{self.name} against {peer}", ours, theirs, self.flips, self.tolerance)


# On a CPU, torch's default is a loop over the tensors. Four of its classes have a fused form.
PEERS: dict[str, dict[str, bool]] = {
    "default": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}

# Where a peer uses eps in another way, which shows where gradients are tiny: Prodigy's adds d * eps with the new d, and
# heavyball takes the larger of the root and eps.
SMALL_EPS = 1e-15

SUBJECTS = [
    Subject(SGD, {"lr": 1e-3, "momentum": 0.9}),
    Subject(Adam, {"lr": 1e-3}),
    Subject(AdamW, {"lr": 1e-3}),
    Subject(Lion, {"lr": 1e-4, "weight_decay": 1e-2}, flips=True),
    Subject(Signum, {"lr": 1e-4, "weight_decay": 1e-2}, flips=True),
    Subject(AdaBelief, {"lr": 1e-3, "weight_decay": 1e-2}),
    Subject(Adan, {"lr": 1e-3, "weight_decay": 1e-2}),
    Subject(AdEMAMix, {"lr": 1e-3, "weight_decay": 1e-2, "eps": SMALL_EPS}),
    Subject(ADOPT, {"lr": 1e-3}),
    Subject(LaProp, {"lr": 1e-3}),  # the peers decay in another order
    Subject(LAMB, {"lr": 1e-3}, measured=("param", "grad", "exp_avg", "exp_avg_sq")),
    Subject(LARS, {"lr": 1e-1, "weight_decay": 1e-2}, measured=("param", "grad")),
    Subject(StableAdamW, {"lr": 1e-3}, measured=("grad", "exp_avg_sq")),
    Subject(MARS, {"lr": 1e-3, "weight_decay": 1e-2}, measured=("grad", "last_grad")),
    Subject(NovoGrad, {"lr": 1e-3, "weight_decay": 1e-2}, measured=("grad",)),
    Subject(
        Prodigy,
        # The same gradient in every step would let the estimate grow until it overflows.
        {"d0": 1e-3, "growth_rate": 1.0, "weight_decay": 1e-2, "use_bias_correction": True, "eps": SMALL_EPS},
        tolerance=2e-5,
    ),
    Subject(ScheduleFreeAdamW, {"lr": 1e-3, "weight_decay": 1e-2}),
    Subject(ScheduleFreeRAdam, {"lr": 1e-3, "silent_sgd_phase": False}),
    Subject(ScheduleFreeSGD, {"lr": 1e-3}),  # the peer's weight decay changes the gradients
    Subject(Adagrad, {"lr": 1e-2}),
    Subject(RMSprop, {"lr": 1e-3}),
    Subject(Adadelta, {}),
    Subject(Adamax, {"lr": 1e-3}),
    Subject(NAdam, {"lr": 1e-3, "eps": SMALL_EPS}),
    Subject(RAdam, {"lr": 1e-3}),
    Subject(ASGD, {"lr": 1e-2}),
    Subject(Rprop, {"lr": 1e-3}),
]
ADAMW = next(subject for subject in SUBJECTS if subject.ours is AdamW)

MLP: Shapes = [(64, 64), (64,)] * 3
SIZES: dict[str, tuple[Shapes, Shapes]] = {  # workload -> shapes, in full and with --quick
    "large: 16 x 1M": ([(1 << 20,)] * 16, [(64 << 10,)] * 16),
    "small: 1000 x 100": ([(100,)] * 1000, [(100,)] * 100),
    "MLP: 6 tensors": (MLP, MLP),
}
FRESH = "small, fresh gradients"


def stepped(
    subject: Subject, makers: dict[str, Maker], grads: list[Tensor], left_out: list[str] | None = None
) -> dict[str, tuple[list[Tensor], Run]]:
    """Make the first steps of every contender, compare them with ours, and return its parameters and its step.

    Args:
        subject: The optimizer.
        makers: The contenders by name, ours first.
        grads: Their gradients.
        left_out: If given, a contender that does not agree is left out, and a message is appended here. torch's default
            is never left out.

    Raises:
        AssertionError: A contender does not agree and is not left out.
    """
    made: dict[str, tuple[list[Tensor], Run]] = {}
    for name, make in makers.items():
        params = parameters(grads)
        made[name] = params, make(params)
        try:
            for _ in range(CHECKED_STEPS):
                made[name][1]()
            subject.check(name, made["onepass"][0], params)
        except AssertionError as error:
            leave_out(name, error, left_out)
            del made[name]
    return made


def compare(
    subject: Subject,
    workload: str,
    grads: list[Tensor],
    rounds: int,
    more: dict[str, Maker] | None = None,
    left_out: list[str] | None = None,
) -> Result:
    """Compare ours and all peers on the same gradients, with the memory limit where the arrays exceed the caches.

    Args:
        subject: The optimizer.
        workload: Name of the workload.
        grads: The gradients; the parameters have their shapes.
        rounds: Number of samples of each contender.
        more: Peers other than torch's.
        left_out: See :func:`stepped`.
    """
    made = stepped(subject, {**subject.makers(), **(more or {})}, grads, left_out)
    runs = {name: run for name, (_, run) in made.items()}
    elements, moved = sum(map(Tensor.numel, grads)), 0
    if elements > 1 << 22 and subject in SUBJECTS:
        step, params = runs["onepass"], made["onepass"][0]
        rows, measured = limit.arrays_of(step, params), limit.measured_of(step, params, subject.measured)
        moved = limit.moved_by(rows, measured)
        runs |= limit.runs(rows, measured)
    samples = limit.fastest(time_in_turn(runs, rounds))
    return Result(workload, subject.name, elements, len(grads), samples, moved)


def fresh(
    subject: Subject,
    workload: str,
    shapes: Shapes,
    rounds: int,
    more: dict[str, Maker] | None = None,
    left_out: list[str] | None = None,
) -> Result:
    """Compare steps on gradients that a backward pass has just made: new tensors, new Python objects."""
    inputs = gradients(shapes)
    made = stepped(subject, {**subject.makers(), **(more or {})}, inputs, left_out)

    def sample(name: str) -> float:
        params, step = made[name]
        for p in params:
            p.grad = None
        torch.stack([(p * x).sum() for p, x in zip(params, inputs, strict=True)]).sum().backward()
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    sample_in_turn(made, WARM_UP, sample)
    samples = sample_in_turn(made, rounds, sample)
    # Rounding errors accumulate over the steps since the first check.
    steps = CHECKED_STEPS + WARM_UP + rounds
    subject = subject._replace(tolerance=subject.tolerance * steps / CHECKED_STEPS)
    for name, (params, _) in made.items():
        try:
            subject.check(name, made["onepass"][0], params)
        except AssertionError as error:
            leave_out(name, error, left_out)
            del samples[name]
    return Result(workload, subject.name, sum(map(Tensor.numel, inputs)), len(inputs), samples)


def leave_out(name: str, error: AssertionError, left_out: list[str] | None) -> None:
    """Record a contender that does not agree; raise the error if there is no list, or for ours and torch's default."""
    if left_out is None or name in ("onepass", "default"):
        raise error
    left_out.append(f"{error}, so it is not timed")


def measure(quick: bool, rounds: int, chosen: list[str]) -> Iterator[Result]:
    """Yield the results of all comparisons of this command."""
    subjects = [s for s in SUBJECTS if s.name in chosen]
    for workload, sizes in SIZES.items():
        for subject in subjects:
            yield compare(subject, workload, gradients(sizes[quick]), rounds)
    for subject in subjects:
        yield fresh(subject, FRESH, SIZES["small: 1000 x 100"][quick], rounds)


def line_of(result: Result) -> str:
    """Return a result as one line: our time, per parameter, tensor or step, and the others' times relative to it."""
    ours = result.seconds()
    if result.elements >= 1 << 20:
        time_and_unit = f"{ours / result.elements * 1e9:.3f}", "ns/parameter"
    elif result.tensors > 10:
        time_and_unit = f"{ours / result.tensors * 1e6:.3f}", "us/tensor"
    else:
        time_and_unit = f"{ours * 1e6:.2f}", "us"
    others = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in result.ratios().items())
    cells = [result.workload, result.optimizer, result.first, *time_and_unit, f"+-{result.spread():.0%}", others]
    return table_line(cells, ("<28", "<11", "<15", ">7", "<12", ">5", "<"))


def machine() -> str:
    """Return one line that describes the machine, threads and versions."""
    known = facts()
    return f"{known['processor']}; {known['chosen']}, {torch.get_num_threads()} threads; torch {torch.__version__}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to the parser."""
    names = [s.name for s in SUBJECTS]
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds, to check that it works")
    parser.add_argument("--rounds", type=int, default=None, help="samples of each contender; default: 5 (3 if quick)")
    parser.add_argument("--threads", type=int, default=None, help="number of CPU threads; default: torch's")
    parser.add_argument(
        "--optimizers",
        nargs="+",
        type=class_name,
        choices=names,
        default=names,
        metavar="NAME",
        help=f"the optimizers to measure; default: all ({', '.join(names)})",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all times to this file")


def main(args: argparse.Namespace) -> int:
    """Measure, print a line for each comparison, and write the JSON file.

    Return 1 if a result is wrong, 2 if it cannot run.
    """
    rounds = (3 if args.quick else 5) if args.rounds is None else args.rounds
    try:
        if rounds < 1:
            raise ValueError(f"--rounds must be >= 1, got {rounds}")
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        if args.json is not None:
            args.json.open("a").close()  # fail before measuring if the file cannot be written
    except (OSError, ValueError, RuntimeError) as error:  # torch raises the latter for --threads 0
        print(f"onepass bench: {error}", file=sys.stderr)
        return 2
    print(machine())
    print("time of the first contender, and step times of the others relative to it (higher: onepass is faster)")
    print("(limit: the fastest of several loops that only add, with the same memory traffic)")
    print("--quick: sizes are smaller than the workloads' names say\n" if args.quick else "")
    prepare(args.quick)
    results = []
    try:
        for result in measure(args.quick, rounds, args.optimizers):
            results.append(result)
            print(line_of(result), flush=True)
    except AssertionError as error:
        print(f"wrong result, not timed: {error}", file=sys.stderr)
        return 1
    if args.json is not None:
        args.json.write_text(as_json(results, rounds))
    return 0


def as_json(results: list[Result], rounds: int, **more: Any) -> str:
    """Return all results and a description of the machine as JSON."""
    known = {name: text for name, text in facts().items() if name != "OpenMP runtime"}  # it contains paths
    rows = [
        {**asdict(r), "samples": {name: [float(f"{s:.4g}") for s in samples] for name, samples in r.samples.items()}}
        for r in results
    ]
    machine = {**known, "date": time.strftime("%Y-%m-%d")}
    metadata = {"machine": machine, "rounds": rounds, **more}
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    return json.dumps(metadata, indent=1)[:-2] + f',\n "results": [\n  {lines}\n ]\n}}\n'


def from_json(text: str) -> tuple[dict[str, Any], list[Result]]:
    """Return the contents of a file written with :func:`as_json`: everything but the results, and the results."""
    metadata = json.loads(text)
    return metadata, [Result(**row) for row in metadata.pop("results")]
