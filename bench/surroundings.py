"""Costs other than the step: schedulers, the log, the import, the size of the installation.

``python bench/surroundings.py [--quick] [--rounds N]``

- A scheduler's step: ours compared with torch's, for 1 and 10 parameter groups, with the same optimizer of torch. First
  the learning rates of 1000 steps are compared.
- ``onepass.log_to``: the step, and the whole training step, without a log ("off") and with one ("on"). The writer is
  TensorBoard's, or one that drops the scalars, which shows the cost of the log itself. A sample is an interval of ten
  steps, one of which is written. Both train from the same start, and every parameter is compared bitwise before and
  after.
- ``import torch`` in a new process, alone and together with ``import onepass``; the difference is the result.
- The installed sizes and, with ONEPASS_BENCH_INSTALL=1 in the environment, the time of ``pip install .`` in a new
  virtual environment, without dependencies. That needs a network.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onepass
import torch
from onepass import lr_scheduler as ours
from onepass.cli.demo import digits
from onepass.cli.timing import Result, Run, Samples, sample_in_turn, time_in_turn
from torch import Tensor, nn
from torch.optim import lr_scheduler as torchs

ROOT = Path(__file__).parent.parent

# ---- Schedulers ----

RATES = 1000  # number of learning rates that are compared
HORIZON = 10**8  # steps of the schedules that end: more than are timed
GROUPS = (1, 10)
WARMUP = 500

Scheduled = torch.optim.Optimizer
MakeScheduler = Callable[[Any, Scheduled, int], Any]  # from a module of schedulers, an optimizer and its steps

SCHEDULERS: dict[str, MakeScheduler] = {
    "StepLR": lambda of, optimizer, steps: of.StepLR(optimizer, step_size=30),
    "CosineAnnealingLR": lambda of, optimizer, steps: of.CosineAnnealingLR(optimizer, T_max=steps),
    "OneCycleLR": lambda of, optimizer, steps: of.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps),
    "LambdaLR": lambda of, optimizer, steps: of.LambdaLR(optimizer, lambda step: 0.95**step),
    "ReduceLROnPlateau": lambda of, optimizer, steps: of.ReduceLROnPlateau(optimizer),
    "SequentialLR": lambda of, optimizer, steps: warmup_and_cosine(of, optimizer, steps),
}
SCHEDULE_LR = "ScheduleLR"


def warmup_and_cosine(of: Any, optimizer: Scheduled, steps: int) -> Any:
    """Return torch's equivalent of ``warmup(500) >> cosine(steps)``. Its LinearLR cannot start at zero."""
    parts = [of.LinearLR(optimizer, 1e-12, total_iters=WARMUP), of.CosineAnnealingLR(optimizer, T_max=steps)]
    return of.SequentialLR(optimizer, parts, milestones=[WARMUP])


def contenders(name: str) -> dict[str, Callable[[Scheduled, int], Any]]:
    if name == SCHEDULE_LR:
        return {
            "onepass": lambda optimizer, steps: ours.ScheduleLR(optimizer, f"warmup({WARMUP}) >> cosine({steps})"),
            "torch": functools.partial(warmup_and_cosine, torchs),
        }
    make = SCHEDULERS[name]
    return {"onepass": functools.partial(make, ours), "torch": functools.partial(make, torchs)}


class Schedule:
    """A scheduler and an optimizer with a number of groups."""

    def __init__(self, make: Callable[[Scheduled, int], Any], groups: int, steps: int) -> None:
        params = [{"params": [torch.zeros(1, requires_grad=True)], "lr": 0.1 / (g + 1)} for g in range(groups)]
        self.optimizer = torch.optim.SGD(params, momentum=0.9)
        self.scheduler = make(self.optimizer, steps)
        self.optimizer.step()  # schedulers warn if they are stepped before the optimizer

    def step(self) -> None:
        if isinstance(self.scheduler, torchs.ReduceLROnPlateau):
            self.scheduler.step(1.0)  # a metric that never improves
        else:
            self.scheduler.step()

    def rates(self) -> Tensor:
        """Return the learning rates of the first steps, for all groups."""
        rates = []
        for _ in range(RATES):
            rates.append([group["lr"] for group in self.optimizer.param_groups])
            self.step()
        return torch.tensor(rates, dtype=torch.float64)


def schedulers(rounds: int) -> Iterator[Result]:
    for name in (*SCHEDULERS, SCHEDULE_LR):
        for groups in GROUPS:
            makers = contenders(name)
            first, second = (Schedule(make, groups, RATES).rates() for make in makers.values())
            # Subclasses of torch's classes compute the same. torch's recursions, which ScheduleLR is compared with,
            # have accumulated the rounding errors of all steps.
            allowed = 1e-9 if name == SCHEDULE_LR else 0.0
            if not torch.allclose(first, second, rtol=0, atol=allowed):
                raise AssertionError(f"{name}: rates differ by up to {(first - second).abs().max()}")
            runs: dict[str, Run] = {n: Schedule(make, groups, HORIZON).step for n, make in makers.items()}
            of = f"{groups} group{'s' if groups > 1 else ''}"
            yield Result(f"scheduler: {name}, {of}", "SGD", groups, groups, time_in_turn(runs, rounds))


# ---- The log ----

INTERVAL = 10


class NoWriter:
    """A writer that drops the scalars, to measure the cost of the log itself."""

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        pass


class Many(nn.Module):
    """A model of many small tensors, each of which scales its input."""

    def __init__(self, tensors: int) -> None:
        super().__init__()
        self.scales = nn.ParameterList(torch.full((100,), 1.0 + i * 1e-6) for i in range(tensors))

    def forward(self, x: Tensor) -> Tensor:
        for scale in self.scales:
            x = x * scale
        return x


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


Model = tuple[Callable[[], nn.Module], Tensor, Tensor]  # how to build it, an input and its target


def models(quick: bool) -> dict[str, Model]:
    generator = torch.Generator().manual_seed(0)
    task = digits("adamw", quick)
    x, y = task.draw(generator)
    many, wide = (100, 256) if quick else (1000, 2048)

    def inputs(width: int) -> Tensor:
        return torch.randn(64, width, generator=generator)

    return {
        "digits net": (task.build, x, y),
        "MLP": (mlp, inputs(64), y),
        "1000 x 100": (lambda: Many(many), inputs(100), y),
        "one of 4M": (lambda: nn.Linear(wide, wide, bias=False), inputs(wide), y),
    }


class Training:
    """A model in training, with or without a log."""

    def __init__(self, model: Model, writer: Any) -> None:
        torch.manual_seed(0)
        build, self.x, self.y = model
        self.model = build()
        self.optimizer = onepass.AdamW(self.model.parameters(), lr=1e-3)
        self.differentiate()
        if writer:
            onepass.log_to(writer, self.optimizer, interval=INTERVAL)

    def differentiate(self) -> None:
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(self.x), self.y).backward()

    def seconds(self, whole: bool) -> float:
        """Return the time per step over an interval."""
        start = time.perf_counter()
        for _ in range(INTERVAL):
            if whole:
                self.differentiate()
            self.optimizer.step()
        return (time.perf_counter() - start) / INTERVAL


def logged(name: str, model: Model, writer: Any, whole: bool, rounds: int) -> Result:
    runs = {"off": Training(model, None), "on": Training(model, writer)}

    def train(rounds: int) -> Samples:
        samples = sample_in_turn(runs, rounds, lambda contender: runs[contender].seconds(whole))
        for a, b in zip(*(run.model.parameters() for run in runs.values()), strict=True):
            if not torch.equal(a, b):
                raise AssertionError(f"{name}: logging has changed a parameter")
        return samples

    train(1)
    samples = train(rounds)
    params = list(runs["off"].model.parameters())
    return Result(name, "AdamW", sum(map(Tensor.numel, params)), len(params), samples)


def logs(quick: bool, rounds: int) -> Iterator[Result]:
    from torch.utils.tensorboard import SummaryWriter

    with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as tensorboard:
        for name, model in models(quick).items():
            for what, whole in (("training step", True), ("step", False)):
                for kind, writer in (("no writer", NoWriter()), ("TensorBoard", tensorboard)):
                    yield logged(f"log_to: {name}, {what}, {kind}", model, writer, whole, rounds)


# ---- The import ----

IMPORTS = {"torch": "import torch", "torch and onepass": "import torch, onepass"}


def import_seconds(contender: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", IMPORTS[contender]], check=True)
    return time.perf_counter() - start


def imports(rounds: int) -> Result:
    for contender in IMPORTS:
        import_seconds(contender)  # so that files are in the page cache
    return Result("import", "none", 0, 0, sample_in_turn(IMPORTS, rounds, import_seconds))


# ---- The installation ----


def facts(install: bool = False) -> dict[str, str]:
    """Return the sizes of the installation.

    Args:
        install: Whether to also install onepass and return the time it takes.
    """
    core = Path(onepass._core.__file__)
    folders = {Path(onepass.__file__).parent, core.parent}  # two folders if the installation is editable
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    files = [path for path in files if "__pycache__" not in path.parts]  # written by Python, not by the installation
    modules = [path for path in files if path.suffix == core.suffix]
    told = {"installed size": kilobytes(files)}
    told |= {f"size of {path.name.split('.')[0]}": kilobytes([path]) for path in modules}
    if install or os.environ.get("ONEPASS_BENCH_INSTALL"):
        told["pip install ."] = f"{install_seconds():.0f} s"
    return told


def kilobytes(files: list[Path]) -> str:
    return f"{sum(path.stat().st_size for path in files) / 1000:,.0f} KB"


def install_seconds() -> float:
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / ("Scripts" if os.name == "nt" else "bin") / "python"
        # Not the source tree's, where everything may be compiled already.
        fresh = f"--config-settings=build-dir={folder}/build"
        start = time.perf_counter()
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", fresh, ROOT], check=True)
        return time.perf_counter() - start


def measure(quick: bool, rounds: int) -> Iterator[Result]:
    """Measure schedulers, the log and the import."""
    yield from schedulers(rounds)
    yield from logs(quick, rounds)
    yield imports(rounds if quick else max(rounds, 5))


if __name__ == "__main__":
    from run import alone

    alone(measure, __doc__)
    print(*(f"{name}: {text}" for name, text in facts().items()), sep="\n")
