"""Local SGD: several processes that average their models every H steps, instead of their gradients at every step.

DistributedDataParallel (DDP) all-reduces gradients before every step. Local SGD lets each process step on its own and
averages the parameters every H steps, which sends 1 / H of the bytes. H = 1 is DDP, but for rounding, for any optimizer
whose step is linear in its gradients: SGD, and SGD with momentum, though its buffers stay local. Adam's is not.
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
BATCH, JUDGED = 16, 512  # images: of a step of one process, and those that a loss is taken over
STEPS, EVERY = 320, 16
CLOSE_UP = 48  # steps
PATIENCE = timedelta(seconds=150)  # for other processes


@dataclass(frozen=True)
class Plan:
    """How processes share what they learn: parameters averaged every `period` steps or, without one, gradients."""

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
    """What one process has done by the start, and every few steps."""

    steps: list[int] = field(default_factory=list)
    models: list[Tensor] = field(default_factory=list)  # each as one vector
    reduced: list[int] = field(default_factory=list)  # bytes given to all-reduce
    seconds: list[float] = field(default_factory=list)


@dataclass
class Record:
    """What all processes have done together; the model that is judged is the average of theirs."""

    plan: Plan
    steps: Numbers
    sent: Numbers  # bytes, by each process: an all-reduce of n processes in a ring sends 2 (n - 1) / n of its bytes
    seconds: Numbers  # by which the slowest process was there
    loss: Numbers  # over the same training images for all; none in a close-up
    accuracy: float  # on held-out images, at the end
    spread: Numbers  # distance of a process's model from the average, the root of its mean square over processes
    apart: Numbers  # distance of the average from DDP's model, in terms of how far DDP has moved it


# ---- In each of several processes ----


@contextmanager
def metered() -> Iterator[list[int]]:
    """A list of the bytes of each call of dist.all_reduce, which is what torch's hooks and averagers communicate by."""
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
    """The module and an optimizer, set up to communicate as planned."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

    model = DistributedDataParallel(module)
    optimizer = MAKERS[plan.optimizer](model.parameters())
    if plan.period is None:
        model.register_comm_hook(None, allreduce_hook)
        return model, optimizer
    # No step is warm-up, in which gradients are all-reduced; in no other are they, not even among neighbours.
    state = PostLocalSGDState(None, None, start_localSGD_iter=0, post_local_gradient_allreduce=False)
    model.register_comm_hook(state, post_localSGD_hook)
    with warnings.catch_warnings():
        # That H = 1 is DDP at a higher price, which is what is shown; and torch's own use of torch.jit.script.
        warnings.simplefilter("ignore")
        from torch.distributed.optim import PostLocalSGDOptimizer

        averager = PeriodicModelAverager(plan.period, warmup_steps=0)  # after steps 1, 1 + H, 1 + 2 H, ...
    return model, PostLocalSGDOptimizer(optimizer, averager)


def train(task: Task, plan: Plan, steps: int, every: int) -> Run:
    """Trains on batches of this process's own, which are the same for all plans."""
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
    """A copy of all parameters."""
    return parameters_to_vector(p.detach() for p in model.parameters())


def mean(values: Tensor) -> Tensor:
    """The average over all processes, in float64."""
    total = values.double()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def slowest(seconds: list[float]) -> Numbers:
    latest = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(latest, dist.ReduceOp.MAX)
    return latest.numpy()


class Judge:
    """Judges average models, each process by its share of the images."""

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
    """Plans to train by, DDP before those that are compared with it; for how many steps, and how often to look."""

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
    """What a process does, from its start to its end."""
    torch.set_num_threads(1)
    store = dist.FileStore(file, ranks)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=PATIENCE)
    for result in job(*args):
        if rank == 0:
            results.send(result)
    dist.barrier()  # or the first to leave would cut the others off
    dist.destroy_process_group()


# ---- In the process that starts them ----


def launch(ranks: int, job: Callable[..., Iterator[Any]], *args: Any) -> Iterator[Any]:
    """Runs a job in so many new processes, which are one group of torch.distributed; gives what the first one yields.

    What a process raises is raised here, as a ProcessRaisedException with its traceback; the others are ended.
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
                    started.join(0)  # raises what the process that has ended has raised
                    continue
                try:
                    result = results.recv()
                except EOFError:  # all have ended
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
    gallery.print("Losses this close say little: DDP and H = 1 differ by rounding alone, which training magnifies.")
    ones = [r for _, r in close if r.plan.period == 1]
    last = len(ones[0].steps) - 1
    gallery.print("\nH = 1: how far it is from DDP, in terms of how far DDP has moved the parameters")
    gallery.table(
        ["optimizer in each process", *(f"step {step}" for step in (1, last // 4, last))],
        ([r.plan.inside, *r.apart[[1, last // 4, last]]] for r in ones),
    )
    draw_losses(gallery, {n: [r for m, r in long if m == n] for n in sizes})
    draw_processes(gallery, sizes[-1], [r for _, r in close if r.plan in PLANS[1:]], ones)


PALE = "#c3cad1"  # of the broad line under the one of H = 1
COLOURS = dict(zip((plan.name for plan in PLANS), (PALE, BLUE, ORANGE, GREEN), strict=True))


def draw_losses(gallery: Gallery, records: dict[int, list[Record]]) -> None:
    with gallery.picture("local_sgd_losses", 10, 2.9 * len(records) + 0.3) as figure:
        for row, (n, runs) in zip(
            figure.subplots(len(records), 3, sharey=True, squeeze=False), records.items(), strict=True
        ):
            for r in runs:
                line = {"color": COLOURS[r.plan.name], "linewidth": 5 if r.plan.period is None else 1.4}
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
            left.plot(r.steps, r.spread, color=COLOURS[r.plan.name], label=r.plan.name)
        label(left, f"How far {n} processes are from their average", "step", "distance")
        left.legend()
        for r, colour in zip(ones, (BLUE, TEAL, ORANGE, RED), strict=True):
            right.semilogy(r.steps[1:], r.apart[1:], color=colour, label=r.plan.inside)
        label(right, "How far H = 1 is from DDP", "step", "distance / way travelled")
        right.legend()


if __name__ == "__main__":
    alone(run)
