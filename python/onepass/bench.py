"""``python -m onepass bench``: step throughput against torch.optim, in one run.

Every comparison first steps all contenders from the same start with the same gradients and compares every element;
only then does it time them: in turn, round after round, in changing order, so that what else the machine does hits all
alike. Figures are medians over the rounds, ratios medians of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import functools
import gc
import inspect
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import _core
from .adadelta import Adadelta
from .adafactor import Adafactor
from .adagrad import Adagrad
from .adam import Adam
from .adamax import Adamax
from .adamw import AdamW
from .asgd import ASGD
from .info import facts
from .lbfgs import LBFGS
from .lion import Lion
from .lookahead import Lookahead
from .muon import Muon
from .nadam import NAdam
from .radam import RAdam
from .rmsprop import RMSprop
from .rprop import Rprop
from .sgd import SGD
from .sparse_adam import SparseAdam

Run = Callable[[], Any]
Shapes = list[tuple[int, ...]]
Maker = Callable[[list[Tensor]], Run]  # parameters -> what does one step


class Subject(NamedTuple):
    """An optimizer and its peers."""

    ours: type[Optimizer]
    arguments: dict[str, Any]
    tolerance: float = 1e-6  # of parameters after three steps: 0.1 % of an update

    @property
    def name(self) -> str:
        """The class's name."""
        return self.ours.__name__

    def optimizers(self) -> dict[str, Callable[..., Optimizer]]:
        """Each contender's name and its constructor, ours first."""
        found: dict[str, Callable[..., Optimizer]] = {"onepass": functools.partial(self.ours, **self.arguments)}
        torchs = getattr(torch.optim, self.name, None)
        if torchs is None:  # then the peer is the formula in torch's operations
            in_torch = type(self.name, (self.ours,), {"step": cast(Any, self.ours).torch_step})
            found["default"] = functools.partial(in_torch, **self.arguments)
            return found
        known = inspect.signature(torchs).parameters
        for name, flags in PEERS.items():
            if name == "default" or name in known:
                known_flags = {flag: value for flag, value in flags.items() if flag in known}
                found[name] = functools.partial(torchs, **self.arguments, **known_flags)
        return found

    def makers(self) -> dict[str, Maker]:
        """Each contender's name and how to make its step, ours first."""

        def maker(make: Callable[..., Optimizer]) -> Maker:
            return lambda params: make(params).step

        return {name: maker(make) for name, make in self.optimizers().items()}

    def check(self, peer: str, ours: list[Tensor], theirs: list[Tensor]) -> None:
        """Compares with a peer after the same steps."""
        check(f"{self.name} against torch's {peer}", ours, theirs, self.ours is Lion, self.tolerance)


# torch's own choice on a CPU is its default, a loop over the tensors. Four of its classes have a fused form.
PEERS: dict[str, dict[str, bool]] = {
    "default": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}

SUBJECTS = [
    Subject(SGD, {"lr": 1e-3, "momentum": 0.9}),
    Subject(Adam, {"lr": 1e-3}),
    Subject(AdamW, {"lr": 1e-3}),
    Subject(Lion, {"lr": 1e-4, "weight_decay": 1e-2}),
    Subject(Adagrad, {"lr": 1e-2}),
    Subject(RMSprop, {"lr": 1e-3}),
    Subject(Adadelta, {}),
    Subject(Adamax, {"lr": 1e-3}),
    Subject(NAdam, {"lr": 1e-3}),
    Subject(RAdam, {"lr": 1e-3}),
    Subject(ASGD, {"lr": 1e-2}),
    Subject(Rprop, {"lr": 1e-3}),
]
PROBED = ("SGD", "Adam", "AdamW", "Lion")  # those for which groups, denormals and formats are measured, too

MLP: Shapes = [(64, 64), (64,)] * 3
SIZES: dict[str, tuple[Shapes, Shapes]] = {  # workload -> shapes, in full and for a quick look
    "large: 16 x 4M": ([(4 << 20,)] * 16, [(64 << 10,)] * 16),
    "medium: 64 x 64k": ([(64 << 10,)] * 64, [(16 << 10,)] * 16),
    "small: 1000 x 100": ([(100,)] * 1000, [(100,)] * 100),
    "MLP: 6 tensors": (MLP, MLP),
}


@dataclass
class Result:
    """One comparison: seconds a step for each contender, and how many times as long as the first each takes."""

    workload: str
    optimizer: str
    elements: int
    tensors: int
    seconds: dict[str, float]
    ratio: dict[str, float] = field(default_factory=dict)


def parameters(shapes: Shapes, grads: list[Tensor], seed: int = 0) -> list[Tensor]:
    """Fresh parameters, the same at every call, with these gradients (shared, as nothing writes to them)."""
    generator = torch.Generator().manual_seed(seed)
    params: list[Tensor] = []
    for shape, grad in zip(shapes, grads, strict=True):
        p = torch.nn.Parameter(torch.randn(shape, generator=generator))
        p.grad = grad
        params.append(p)
    return params


def check(name: str, ours: list[Tensor], theirs: list[Tensor], flips: bool = False, tolerance: float = 1e-6) -> None:
    """Compares every element after the same steps; raises if one differs by more than 0.1 % of an update.

    With ``flips`` (Lion), one in a million may: where the sign's argument is zero but for rounding, the sign is open.
    """
    for a, b in zip(ours, theirs, strict=True):
        allowed = tolerance + 8 * torch.finfo(b.dtype).eps * b.abs()
        wrong = a.numel() - int(((a - b).abs() <= allowed).sum())  # a NaN is wrong, too
        if wrong > (a.numel() // 1_000_000 + 1 if flips else 0):
            raise AssertionError(f"{name}: {wrong} of {a.numel()} elements differ")


def sample_in_turn(names: Iterable[str], rounds: int, sample: Callable[[str], float]) -> dict[str, list[float]]:
    """A sample of every contender in turn, round after round, in changing order; without the garbage collector."""
    samples: dict[str, list[float]] = {name: [] for name in names}
    order = list(samples)
    gc.disable()
    try:
        for _ in range(rounds):
            for name in order:
                samples[name].append(sample(name))
            order.append(order.pop(0))
    finally:
        gc.enable()
    return samples


def ratios(samples: dict[str, list[float]]) -> dict[str, float]:
    """How many times as long as the first each takes: the medians of the rounds' ratios."""
    first = next(iter(samples.values()))
    return {n: statistics.median(b / a for a, b in zip(first, s, strict=True)) for n, s in samples.items()}


def time_in_turn(runs: dict[str, Run], rounds: int, before: Run | None = None) -> Result:
    """Times contenders in turn. With ``before``, that is called ahead of each timed call; else calls are repeated."""
    repeats = {}
    for name, run in runs.items():
        start = time.perf_counter()
        run()
        once = time.perf_counter() - start
        repeats[name] = 1 if before else max(1, min(1000, round(0.01 / max(once, 1e-9))))

    def sample(name: str) -> float:
        run = runs[name]
        if before:
            before()
        start = time.perf_counter()
        for _ in range(repeats[name]):
            run()
        return (time.perf_counter() - start) / repeats[name]

    samples = sample_in_turn(runs, rounds, sample)
    return Result(
        workload="",
        optimizer="",
        elements=0,
        tensors=0,
        seconds={name: statistics.median(s) for name, s in samples.items()},
        ratio=ratios(samples),
    )


def gradients(shapes: Shapes) -> list[Tensor]:
    """Random gradients."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def compare(subject: Subject, shapes: Shapes, rounds: int, grads: list[Tensor] | None = None) -> Result:
    """Ours and all peers on one workload, and the limit that its memory traffic sets, where that is the limit."""
    grads = gradients(shapes) if grads is None else grads
    runs: dict[str, Run] = {}
    params: dict[str, list[Tensor]] = {}
    for name, make in subject.makers().items():
        params[name] = parameters(shapes, grads)
        runs[name] = make(params[name])
        for _ in range(3):
            runs[name]()
        subject.check(name, params["onepass"], params[name])
    if subject in SUBJECTS and sum(map(Tensor.numel, grads)) > 1 << 22:
        runs["limit"] = traffic_of(runs["onepass"], params["onepass"])
    return time_in_turn(runs, rounds)


def traffic_of(step: Run, params: list[Tensor]) -> Run:
    """What reads and writes the same arrays as a step, but only adds."""
    state = step.__self__.state  # type: ignore[attr-defined]
    rows = []
    for p in params:
        assert p.grad is not None
        arrays = [value for value in state[p].values() if value.dim() > 0]  # not the step counter and other numbers
        rows.append([array.view(-1) for array in (p.grad, p.detach(), *arrays)])
    return lambda: _core.traffic(rows, torch.get_num_threads())


def fresh(subject: Subject, shapes: Shapes, rounds: int) -> Result:
    """Steps on gradients that a backward pass has just made: new tensors, new Python objects."""
    inputs = gradients(shapes)
    contenders = {}
    for name, make in subject.makers().items():
        params = parameters(shapes, inputs)
        contenders[name] = (params, make(params))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 3):
        for name, (params, step) in contenders.items():
            for p in params:
                p.grad = None
            torch.stack([(p * x).sum() for p, x in zip(params, inputs, strict=True)]).sum().backward()  # type: ignore[no-untyped-call]
            start = time.perf_counter()
            step()
            samples[name].append(time.perf_counter() - start)
    for name, (params, _) in contenders.items():
        subject.check(name, contenders["onepass"][0], params)
    timed = {name: s[3:] for name, s in samples.items()}
    return Result("", "", 0, 0, {name: statistics.median(s) for name, s in timed.items()}, ratios(timed))


def groups(subject: Subject, shapes: Shapes, rounds: int) -> Result:
    """One group of all tensors, and a group for each tensor."""
    grads = gradients(shapes)
    together = parameters(shapes, grads)
    apart = parameters(shapes, grads)
    runs: dict[str, Run] = {
        "one group": subject.ours(together, **subject.arguments).step,
        "a group each": subject.ours([{"params": [p]} for p in apart], **subject.arguments).step,
    }
    for _ in range(3):
        for run in runs.values():
            run()
    check("groups", together, apart)
    return time_in_turn(runs, rounds)


def denormals(subject: Subject, shapes: Shapes, rounds: int) -> Result:
    """States that are normal numbers, and states that are denormals."""
    grads = [torch.zeros(shape) for shape in shapes]
    runs: dict[str, Run] = {}
    refills: list[Run] = []
    for name, value in (("normal", 1e-3), ("denormal", 1e-40)):
        optimizer = subject.ours(parameters(shapes, grads), **subject.arguments)
        optimizer.step()
        states = [v for state in optimizer.state.values() for v in state.values() if v.dim() > 0]
        refills += [functools.partial(state.fill_, value) for state in states]
        runs[name] = optimizer.step
    return time_in_turn(runs, rounds, before=lambda: [refill() for refill in refills])


def state_dtypes(subject: Subject, shapes: Shapes, rounds: int) -> Result:
    """States in bfloat16, and in float32."""
    grads = gradients(shapes)
    make: Callable[..., Optimizer] = subject.ours
    runs: dict[str, Run] = {
        name: make(parameters(shapes, grads), **subject.arguments, state_dtype=dtype).step
        for name, dtype in (("bfloat16 states", torch.bfloat16), ("float32 states", torch.float32))
    }
    return time_in_turn(runs, rounds)


def embedding(rounds: int, quick: bool) -> Result:
    """SparseAdam on an embedding, of which a batch touches some rows."""
    rows, touched = (1 << 12, 1 << 8) if quick else (1 << 20, 1 << 12)
    generator = torch.Generator().manual_seed(2)
    indices = torch.randint(rows, (1, touched), generator=generator)
    values = torch.randn(touched, 64, generator=generator)
    grad = torch.sparse_coo_tensor(indices, values, (rows, 64), check_invariants=True)
    return compare(Subject(SparseAdam, {"lr": 1e-3}), [(rows, 64)], rounds, [grad])


def quasi_newton(rounds: int, quick: bool) -> Result:
    """LBFGS with a full history of 10: steps of 4 iterations, on a quadratic whose gradient is one pass."""
    size = 1 << 16 if quick else 10_000_000
    curvature = torch.linspace(1.0, 100.0, size)
    arguments: dict[str, Any] = {"lr": 0.5, "history_size": 10, "tolerance_grad": 0.0, "tolerance_change": 0.0}

    def step_of(optimizer: Callable[..., Optimizer], p: Tensor) -> Run:
        calls = 0

        def closure() -> float:
            nonlocal calls
            calls += 1
            # A gradient that never settles, and a loss that always falls: no step ends early.
            p.grad = torch.mul(curvature, p.detach()).add_(0.1 * (calls % 3 - 1))
            return -float(calls)

        made = optimizer([p], max_iter=4, **arguments)
        return lambda: made.step(closure)

    params = {name: parameters([(size,)], [torch.zeros(size)])[0] for name in ("onepass", "default")}
    runs = {"onepass": step_of(LBFGS, params["onepass"]), "default": step_of(torch.optim.LBFGS, params["default"])}
    for _ in range(3):  # the history is full after 11 iterations
        for run in runs.values():
            run()
    error = (params["onepass"] - params["default"]).detach().abs().max()
    if not error <= 1e-4 * params["default"].detach().abs().max():
        raise AssertionError(f"LBFGS against torch's default: the largest difference is {float(error):.1e}")
    return time_in_turn(runs, rounds, before=lambda: None)


def lookahead(rounds: int, quick: bool) -> Result:
    """A cycle of 5 steps of Lookahead over AdamW, and the same in torch's operations over torch's fused AdamW."""
    shapes = SIZES["large: 16 x 4M"][quick]
    grads = gradients(shapes)
    ours = parameters(shapes, grads)
    made = Lookahead(AdamW(ours, lr=1e-3))
    theirs = parameters(shapes, grads)
    slow = [p.detach().clone() for p in theirs]
    fused = torch.optim.AdamW(theirs, lr=1e-3, fused=True)

    @torch.no_grad()
    def in_torch() -> None:
        for _ in range(5):
            fused.step()
        torch._foreach_lerp_(slow, theirs, 0.5)
        torch._foreach_copy_(theirs, slow)

    def cycle() -> None:
        for _ in range(5):
            made.step()

    runs: dict[str, Run] = {"onepass": cycle, "fused": in_torch}
    for run in runs.values():
        run()
    check("Lookahead against torch's operations", ours, theirs)
    return time_in_turn(runs, rounds, before=lambda: None)


# Those that are not element-wise, each on a workload of its own.
OTHERS: dict[str, tuple[str, Callable[[int, bool], Result]]] = {
    "SparseAdam": ("1M x 64, 4096 rows", embedding),
    "Adafactor": (
        "4096 x 4096",
        # torch sums squares in float32, so it is 1e-4 off; its update is 0.05.
        lambda rounds, quick: compare(
            Subject(Adafactor, {}, tolerance=2e-4), [(256, 256) if quick else (4096, 4096)], rounds
        ),
    ),
    "Muon": (
        "4 x 1024 x 1024",
        lambda rounds, quick: compare(Subject(Muon, {"lr": 1e-4}), [(64, 64) if quick else (1024, 1024)] * 4, rounds),
    ),
    "LBFGS": ("10M, history 10", quasi_newton),
    "Lookahead": ("AdamW, 16 x 4M, k = 5", lookahead),
}


def measure(quick: bool, rounds: int, chosen: list[str]) -> Iterator[Result]:
    """Runs all comparisons."""
    subjects = [s for s in SUBJECTS if s.name in chosen]

    def done(result: Result, workload: str, subject: Subject, shapes: Shapes) -> Result:
        result.workload = workload
        result.optimizer = subject.name
        result.tensors = len(shapes)
        result.elements = sum(torch.Size(shape).numel() for shape in shapes)
        gc.collect()
        return result

    for workload, sizes in SIZES.items():
        for subject in subjects:
            yield done(compare(subject, sizes[quick], rounds), workload, subject, sizes[quick])
    small = SIZES["small: 1000 x 100"][quick]
    large = SIZES["large: 16 x 4M"][quick]
    medium = SIZES["medium: 64 x 64k"][quick]
    for subject in subjects:
        yield done(fresh(subject, small, rounds), "small, fresh gradients", subject, small)
    for subject in (s for s in subjects if s.name in PROBED):
        yield done(groups(subject, small[: len(small) // 2], rounds), "500 groups", subject, small[: len(small) // 2])
        yield done(denormals(subject, medium, rounds), "denormal states", subject, medium)
        yield done(state_dtypes(subject, large, rounds), "bfloat16 states", subject, large)
    for name, (workload, run) in OTHERS.items():
        if name in chosen:
            result = run(rounds, quick)
            result.workload, result.optimizer = workload, name
            gc.collect()
            yield result


def line_of(result: Result) -> str:
    """A result as one line: our time in the unit of its size, and every contender's as a multiple of it."""
    names = list(result.seconds)
    ours = result.seconds[names[0]]
    if not result.elements:
        time_text = f"{ours * 1e3:7.2f} ms/step     "
    elif result.elements >= 1 << 20:
        time_text = f"{ours / result.elements * 1e9:7.3f} ns/parameter"
    elif result.tensors > 10:
        time_text = f"{ours / result.tensors * 1e6:7.3f} us/tensor   "
    else:
        time_text = f"{ours * 1e6:7.2f} us/step     "
    others = ", ".join(f"{name} {result.ratio[name]:.2f}x" for name in names[1:])
    return f"{result.workload:<23} {result.optimizer:<10} {names[0]:<15} {time_text}  {others}"


def draw(results: list[Result], machine: str, path: Path) -> None:
    """The picture: how many times as fast as torch, for each optimizer and workload."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit("the picture needs matplotlib: pip install 'onepass[demo]'") from error
    rows = [r for r in results if r.workload in SIZES]
    workloads = [w for w in SIZES if any(r.workload == w for r in rows)]
    tall = max(sum(r.workload == w for r in rows) for w in workloads)
    figure = Figure(figsize=(13, (len(workloads) + 1) // 2 * (0.9 + 0.42 * tall)), layout="constrained")
    figure.suptitle(machine, fontsize=9)
    widest = max(max(r.ratio[name] for name in PEERS if name in r.ratio) for r in rows)
    colors = {"default": "#9aa5b1", "foreach": "#627d98", "fused": "#334e68"}
    for index, workload in enumerate(workloads):
        axes = figure.add_subplot((len(workloads) + 1) // 2, 2, index + 1)
        here = [r for r in rows if r.workload == workload]
        for at, result in enumerate(here):
            peers = [name for name in PEERS if name in result.ratio]
            for k, name in enumerate(peers):
                y = at + (k - (len(peers) - 1) / 2) * 0.27
                bar = axes.barh(y, result.ratio[name], height=0.25, color=colors[name], label=name if at == 0 else None)
                axes.bar_label(bar, fmt="%.1f", padding=3, fontsize=8)
        axes.axvline(1, color="#d64545", linewidth=1)
        axes.set_yticks(range(len(here)), [r.optimizer for r in here])
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_xlim(0.7, 2 * widest)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_title(workload, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        if index == 0:
            axes.legend(title="torch.optim", frameon=False, fontsize=8, title_fontsize=8, loc="lower right")
    figure.supxlabel("time of torch's step over time of onepass's (1 = equally fast)", fontsize=10)
    figure.savefig(path, dpi=150)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    names = [*(s.name for s in SUBJECTS), *OTHERS]
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds: a look, not a measurement")
    parser.add_argument("--rounds", type=int, default=None, help="samples of each contender (default 9; 3 if quick)")
    parser.add_argument("--threads", type=int, default=None, help="torch.set_num_threads")
    parser.add_argument("--optimizers", nargs="+", choices=names, default=names, help="which to measure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to a file")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the picture (needs matplotlib)")


def main(args: argparse.Namespace) -> int:
    """Measures, prints a line for each comparison, and writes the files that were asked for."""
    if args.threads:
        torch.set_num_threads(args.threads)
    rounds = args.rounds or (3 if args.quick else 9)
    known = facts()
    machine = f"{known['processor']}; {known['chosen']}, {torch.get_num_threads()} threads; torch {torch.__version__}"
    print(machine)
    print("the first contender's time, and the others' as multiples of it")
    print("(limit: the same memory traffic with additions only)\n")
    results = []
    try:
        for result in measure(args.quick, rounds, args.optimizers):
            results.append(result)
            print(line_of(result), flush=True)
    except AssertionError as error:
        print(f"wrong result, nothing timed: {error}", file=sys.stderr)
        return 1
    if args.json:
        told = {k: v for k, v in known.items() if k != "OpenMP runtime"}
        rows = [asdict(r) for r in results]
        args.json.write_text(json.dumps({"machine": told, "rounds": rounds, "results": rows}, indent=1) + "\n")
    if args.png:
        draw(results, machine, args.png)
    return 0
