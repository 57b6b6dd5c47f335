"""Local SGD: several processes that average their models every H steps, instead of their gradients at every step.

DistributedDataParallel (DDP) all-reduces gradients before every step. With local SGD each process steps on its own, and
the parameters are averaged every H steps, which sends 1 / H of the bytes. H = 1 equals DDP up to rounding for any
optimizer whose step is linear in its gradients: SGD, and SGD with momentum, although its buffers stay local. Adam's
step is not linear.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from itertools import chain
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onepass
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from onepass.cli.demo import Task, digits
from onepass.examples.common import BLUE, GREEN, ORANGE, RED, TEAL, Gallery, Numbers, alone, label
from torch import Tensor
from torch.multiprocessing.spawn import start_processes
from torch.nn import Module
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim import Optimizer

MAKERS: dict[str, Callable[..., Optimizer]] = {
    "SGD": partial(onepass.SGD, lr=0.1),
    "SGD, momentum 0.9": partial(onepass.SGD, lr=0.02, momentum=0.9),
    "Adam": partial(onepass.Adam, lr=2e-3),
}
MOMENTUM = "SGD, momentum 0.9"
BATCH, JUDGED = 16, 512  # numbers of images: per step and process, and per evaluation of the loss
STEPS, EVERY = 320, 16
CLOSE_UP = 48  # steps
PATIENCE = timedelta(seconds=150)  # for other processes


@dataclass(frozen=True)
class Plan:
    """How processes communicate: parameters are averaged every `period` steps or, if it is None, gradients are."""

    period: int | None
    optimizer: str = MOMENTUM
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        return f"H = {self.period}" if self.period else "DDP"

    @property
    def inside(self) -> str:
        return self.optimizer + (", float64" if self.dtype == torch.float64 else "")


PLANS = tuple(Plan(period) for period in (None, 1, 4, 16))
CLOSE_UPS = (
    *PLANS,
    *(Plan(period, MOMENTUM, torch.float64) for period in (None, 1)),
    *(Plan(period, name) for name in ("SGD", "Adam") for period in (None, 1)),
)


@dataclass
class Run:
    """The record of one process, at the start and every few steps."""

    steps: list[int] = field(default_factory=list)
    models: list[Tensor] = field(default_factory=list)  # each model as one vector
    reduced: list[int] = field(default_factory=list)  # bytes passed to all-reduce
    seconds: list[float] = field(default_factory=list)


@dataclass
class Record:
    """The record of all processes together; the average of their models is evaluated."""

    plan: Plan
    steps: Numbers
    sent: Numbers  # bytes per process: an all-reduce of n processes in a ring sends 2 (n - 1) / n of its bytes
    seconds: Numbers  # of the slowest process
    loss: Numbers  # over the same training images for all; not computed in a close-up
    accuracy: float  # on held-out images, at the end
    spread: Numbers  # distance of the processes' models from the average, root mean square over processes
    apart: Numbers  # distance of the average from DDP's model, relative to the distance of DDP's model from its start


# ---- In each of several processes ----


@contextmanager
def metered() -> Iterator[list[int]]:
    """Record the bytes of each call of dist.all_reduce, which torch's hooks and averagers use, in a list."""
    sizes: list[int] = []
    all_reduce = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.nbytes)
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted
    try:
        yield sizes
    finally:
        dist.all_reduce = all_reduce


def share(module: Module, plan: Plan) -> tuple[Module, Optimizer]:
    """Return the module and an optimizer, set up to communicate by the plan."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

    model = DistributedDataParallel(module)
    optimizer = MAKERS[plan.optimizer](model.parameters())
    if plan.period is None:
        model.register_comm_hook(None, allreduce_hook)
        return model, optimizer
    # There are no warm-up steps, which would all-reduce gradients, and no all-reduce within subgroups.
    state = PostLocalSGDState(None, None, start_localSGD_iter=0, post_local_gradient_allreduce=False)
    model.register_comm_hook(state, post_localSGD_hook)
    with warnings.catch_warnings():
        # torch warns that H = 1 equals DDP at a higher cost, which is shown here, and about its own torch.jit.script.
        warnings.simplefilter("ignore")
        from torch.distributed.optim import PostLocalSGDOptimizer

        averager = PeriodicModelAverager(plan.period, warmup_steps=0)  # after steps 1, 1 + H, 1 + 2 H, ...
    return model, PostLocalSGDOptimizer(optimizer, averager)


def train(task: Task, plan: Plan, steps: int, every: int) -> Run:
    """Train on this process's batches, which are the same for all plans."""
    torch.manual_seed(0)
    model, optimizer = share(task.build().to(plan.dtype), plan)
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    run = Run()
    dist.barrier()
    with metered() as sizes:
        start = time.perf_counter()
        for step in range(steps + 1):
            if step % every == 0:
                run.steps.append(step)
                run.models.append(flat(model))
                run.reduced.append(sum(sizes))
                run.seconds.append(time.perf_counter() - start)
            if step < steps:
                images, labels = batch(task, generator)
                optimizer.zero_grad()
                cross_entropy(model(images.to(plan.dtype)), labels).backward()
                optimizer.step()
    return run


def batch(task: Task, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    images, labels = task.draw(generator)
    return images[:BATCH], labels[:BATCH]


def flat(model: Module) -> Tensor:
    """Return a copy of all parameters."""
    return parameters_to_vector(p.detach() for p in model.parameters())


def mean(values: Tensor) -> Tensor:
    """Return the average over all processes, in float64."""
    total = values.double()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def slowest(seconds: list[float]) -> Numbers:
    latest = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(latest, dist.ReduceOp.MAX)
    return latest.numpy()


class Judge:
    """Evaluate average models, each process on its share of the images."""

    def __init__(self, task: Task) -> None:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        generator = torch.Generator().manual_seed(0)
        drawn = [task.draw(generator) for _ in range(JUDGED // 64)]
        self.images, self.labels = (torch.cat(part)[rank::ranks] for part in zip(*drawn, strict=True))
        self.held_out = task.held_out
        self.model = task.build()

    @torch.no_grad()
    def loss(self, parameters: Tensor) -> float:
        vector_to_parameters(parameters.float(), self.model.parameters())
        return mean(cross_entropy(self.model(self.images), self.labels)).item()

    @torch.no_grad()
    def accuracy(self, parameters: Tensor) -> float:
        vector_to_parameters(parameters.float(), self.model.parameters())
        images, labels = self.held_out
        right: Tensor = self.model(images).argmax(1) == labels
        return right.double().mean().item()


@dataclass(frozen=True)
class Series:
    """Plans (DDP before those compared with it), the number of steps, and the interval of evaluations."""

    plans: tuple[Plan, ...]
    steps: int
    every: int
    judged: bool = True


def compare(*all_series: Series) -> Iterator[Record]:
    task = digits("sgd", quick=False)
    train(task, PLANS[0], 2, 2)  # the first steps of a process are slow
    for series in all_series:
        yield from records(task, series)


def records(task: Task, series: Series) -> Iterator[Record]:
    judge = Judge(task)
    by_ddp: dict[Plan, list[Tensor]] = {}
    for plan in series.plans:
        run = train(task, plan, series.steps, series.every)
        averages = [mean(model) for model in run.models]
        ddp = by_ddp.setdefault(replace(plan, period=None), averages)
        moved = [(x - ddp[0]).norm() or 1 for x in ddp]
        n = dist.get_world_size()
        yield Record(
            plan,
            np.array(run.steps),
            np.array(run.reduced) * 2 * (n - 1) / n,
            slowest(run.seconds),
            np.array([judge.loss(x) for x in averages if series.judged]),
            judge.accuracy(averages[-1]),
            np.array([mean((x - a).square().sum()).sqrt() for x, a in zip(run.models, averages, strict=True)]),
            np.array([float((x - y).norm() / way) for x, y, way in zip(averages, ddp, moved, strict=True)]),
        )


def work(rank: int, ranks: int, file: str, results: Connection, job: Callable[..., Iterator[Any]], *args: Any) -> None:
    """Run one process from start to end."""
    torch.set_num_threads(1)
    store = dist.FileStore(file, ranks)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=PATIENCE)
    for result in job(*args):
        if rank == 0:
            results.send(result)
    dist.barrier()  # no process may leave before the others have finished
    dist.destroy_process_group()


# ---- In the process that starts them ----


def launch(ranks: int, job: Callable[..., Iterator[Any]], *args: Any) -> Iterator[Any]:
    """Run a job in new processes that form a group of torch.distributed, and yield what the first process yields.

    If a process raises, its error is raised here as a ProcessRaisedException with its traceback, and the others end.
    """
    results, end = mp.get_context("spawn").Pipe(duplex=False)
    with TemporaryDirectory() as folder:
        given = (ranks, str(Path(folder, "store")), end, job, *args)
        started = start_processes(work, given, ranks, join=False, daemon=True, start_method="spawn")
        end.close()
        try:
            while True:
                if not wait([results, *started.sentinels], PATIENCE.total_seconds()):
                    raise TimeoutError(f"{ranks} processes: nothing for {PATIENCE.total_seconds():.0f} s")
                if not results.poll():
                    started.join(0)  # raises the error of a process that has ended
                    continue
                try:
                    result = results.recv()
                except EOFError:  # all processes have ended
                    break
                yield result
            while not started.join():
                pass
        finally:
            results.close()
            for process in started.processes:
                process.terminate()
                process.join()


def run(gallery: Gallery) -> None:
    sizes = (2,) if gallery.quick else (2, 4)
    whole, start = Series(PLANS, STEPS, EVERY), Series(CLOSE_UPS, CLOSE_UP, 1, judged=False)
    if gallery.quick:
        whole, start = replace(whole, steps=16, every=4), replace(start, steps=9)
    jobs = {n: [whole] if n != sizes[-1] else [whole, start] for n in sizes}
    todo = [(n, plan) for n, all_series in jobs.items() for series in all_series for plan in series.plans]
    tracked = gallery.track(todo, "local SGD", lambda at: f"{at[0]} processes, {at[1].name}")
    found = chain.from_iterable(launch(n, compare, *all_series) for n, all_series in jobs.items())
    done = [(n, record) for (n, _), record in zip(tracked, found, strict=True)]
    long, close = done[: -len(CLOSE_UPS)], done[-len(CLOSE_UPS) :]

    gallery.print(
        f"{whole.steps} steps of {MOMENTUM} on the digits, {BATCH} images for each process; all on this machine"
    )
    gallery.table(
        ["processes", "", "loss", "held-out accuracy", "MB sent by each", "seconds", "processes apart by"],
        (
            [n, r.plan.name, r.loss[-1], f"{r.accuracy:.1%}", r.sent[-1] / 1e6, r.seconds[-1], r.spread[-1]]
            for n, r in long
        ),
    )
    gallery.print("Small differences of losses are not significant: DDP and H = 1 differ by rounding alone.")
    ones = [r for _, r in close if r.plan.period == 1]
    last = len(ones[0].steps) - 1
    gallery.print("\nH = 1: distance from DDP, relative to the distance of DDP's parameters from their start")
    gallery.table(
        ["optimizer in each process", *(f"step {step}" for step in (1, last // 4, last))],
        ([r.plan.inside, *r.apart[[1, last // 4, last]]] for r in ones),
    )
    draw_losses(gallery, {n: [r for m, r in long if m == n] for n in sizes})
    draw_processes(gallery, sizes[-1], [r for _, r in close if r.plan in PLANS[1:]], ones)


PALE = "#c3cad1"  # of the wide line behind that of H = 1
COLORS = dict(zip((plan.name for plan in PLANS), (PALE, BLUE, ORANGE, GREEN), strict=True))


def draw_losses(gallery: Gallery, records: dict[int, list[Record]]) -> None:
    with gallery.picture("local_sgd_losses", 10, 2.9 * len(records) + 0.3) as figure:
        for row, (n, runs) in zip(
            figure.subplots(len(records), 3, sharey=True, squeeze=False), records.items(), strict=True
        ):
            for r in runs:
                line = {"color": COLORS[r.plan.name], "linewidth": 5 if r.plan.period is None else 1.4}
                row[0].semilogy(r.steps, r.loss, label=r.plan.name, **line)
                row[1].loglog(r.sent[1:] / 1e6, r.loss[1:], **line)
                row[2].semilogy(r.seconds, r.loss, **line)
            label(row[0], f"{n} processes: per step", "step", "loss of the average model")
            label(row[1], "Per byte", "megabytes sent by each process", "")
            label(row[2], "Per second, all on one machine", "seconds", "")
            row[0].legend()


def draw_processes(gallery: Gallery, n: int, runs: list[Record], ones: list[Record]) -> None:
    with gallery.picture("local_sgd_processes", 10, 3.8) as figure:
        left, right = figure.subplots(1, 2)
        for r in runs:
            left.plot(r.steps, r.spread, color=COLORS[r.plan.name], label=r.plan.name)
        label(left, f"How far {n} processes are from their average", "step", "distance")
        left.legend()
        for r, color in zip(ones, (BLUE, TEAL, ORANGE, RED), strict=True):
            right.semilogy(r.steps[1:], r.apart[1:], color=color, label=r.plan.inside)
        label(right, "How far H = 1 is from DDP", "step", "distance / way travelled")
        right.legend()


if __name__ == "__main__":
    alone(run)
