"""Optimizers on real data: a convolutional net on handwritten digits, with every optimizer, at a rate from lr_find.

All train on the same images in the same order, from the same starts. A curve is the mean of three seeds, with a band
from the smallest to the largest value. A learning rate from one cheap test fits most of them. In so few steps Lookahead
slows SGD down, but hardly Adam and RAdam; Lion does not overtake AdamW, and large batches leave both too few steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import onepass
import torch
from matplotlib.axes import Axes
from onepass.cli import demo
from onepass.cli.demo import Task
from onepass.examples.common import BLUE, CYCLE, GREY, HALO, ORANGE, Gallery, Numbers, alone, evaluate, label
from onepass.training.lr_finder import METHODS
from torch import Tensor, nn
from torch.optim import Optimizer

BATCH = 64
SUGGESTION: Final = "minimum"  # of lr_find: a tenth of the rate at which the loss is lowest
LEFT_OUT = {"SparseAdam": "it takes sparse gradients alone, and this net has dense ones"}
Make = Callable[[nn.Module, float], Optimizer]


# -- the optimizers --------------------------------------------------------------------------------------------------


def plain(kind: Callable[..., Optimizer], **options: Any) -> Make:
    return lambda model, lr: kind(model.parameters(), lr=lr, **options)


def of_whole_model(name: str) -> Make:
    """Return what makes a Muon or NorMuon for the hidden layer's matrix, with an AdamW for the rest."""
    return lambda model, lr: onepass.create(name, model, lr=lr, weight_decay=0.01)


def lookahead(make: Make) -> Make:
    return lambda model, lr: onepass.Lookahead(make(model, lr), k=5, alpha=0.5)


@dataclass(frozen=True)
class Entry:
    name: str
    make: Make
    own_lr: float | None = None  # if lr_find does not apply
    batch: int = BATCH


LION, ADAMW = Entry("Lion", plain(onepass.Lion)), Entry("AdamW", plain(onepass.AdamW))
ENTRIES = (
    Entry("SGD", plain(onepass.SGD)),
    Entry("SGD, momentum 0.9", plain(onepass.SGD, momentum=0.9)),
    Entry("ASGD", plain(onepass.ASGD)),
    Entry("Adagrad", plain(onepass.Adagrad)),
    Entry("RMSprop", plain(onepass.RMSprop)),
    Entry("Adadelta", plain(onepass.Adadelta), own_lr=1.0),
    Entry("Adam", plain(onepass.Adam)),
    ADAMW,
    Entry("Adamax", plain(onepass.Adamax)),
    Entry("NAdam", plain(onepass.NAdam)),
    Entry("RAdam", plain(onepass.RAdam)),
    Entry("AdaBelief", plain(onepass.AdaBelief)),
    Entry("Adan", plain(onepass.Adan)),
    Entry("AdEMAMix", plain(onepass.AdEMAMix)),
    Entry("ADOPT", plain(onepass.ADOPT)),
    Entry("LaProp", plain(onepass.LaProp)),
    Entry("LAMB", plain(onepass.LAMB)),
    Entry("MARS", plain(onepass.MARS)),
    Entry("NovoGrad", plain(onepass.NovoGrad)),
    Entry("Prodigy", plain(onepass.Prodigy), own_lr=1.0),
    Entry("StableAdamW", plain(onepass.StableAdamW)),
    Entry("LARS", plain(onepass.LARS)),
    LION,
    Entry("Signum", plain(onepass.Signum)),
    Entry("ScheduleFreeSGD", plain(onepass.ScheduleFreeSGD)),
    Entry("ScheduleFreeAdamW", plain(onepass.ScheduleFreeAdamW)),
    Entry("ScheduleFreeRAdam", plain(onepass.ScheduleFreeRAdam)),
    Entry("Adafactor", plain(onepass.Adafactor)),
    Entry("CAME", plain(onepass.CAME)),
    Entry("Muon", of_whole_model("muon")),
    Entry("NorMuon", of_whole_model("normuon")),
    Entry("Rprop", plain(onepass.Rprop), own_lr=0.01),
    Entry("LBFGS, batch 512", plain(onepass.LBFGS, max_iter=4, line_search_fn="strong_wolfe"), own_lr=1.0, batch=512),
)
SCHEDULE_FREE = (onepass.ScheduleFreeSGD, onepass.ScheduleFreeAdamW, onepass.ScheduleFreeRAdam)
WRAPPED = ("SGD", "Adam", "RAdam")
BATCHES = (32, 64, 128, 256, 512, 1024)


# -- training --------------------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """The sizes of the experiment."""

    samples: int
    batch_samples: int  # for the comparison of batch sizes
    seeds: int
    find_steps: int
    batches: tuple[int, ...]
    check: int  # steps of BATCH samples between evaluations on the held-out digits

    @classmethod
    def of(cls, quick: bool) -> Plan:
        return (
            cls(4 * BATCH, 4 * BATCH, 2, 20, (32, 128), 2)
            if quick
            else cls(120 * BATCH, 160 * BATCH, 3, 64, BATCHES, 10)
        )


@dataclass
class Run:
    """The record of one training: losses, and evaluations along the way."""

    losses: Numbers
    steps: Numbers  # steps of the evaluations
    loss: Numbers  # mean over the steps since the last evaluation
    held_out_loss: Numbers
    accuracy: Numbers


@dataclass
class Runs:
    """The records of the same training with each seed."""

    entry: Entry
    lr: float
    seeds: list[Run]

    def band(self, what: str) -> tuple[Numbers, Numbers, Numbers]:
        """Return mean, smallest and largest value over the seeds, at each step."""
        values = np.array([getattr(run, what) for run in self.seeds])
        return values.mean(0), values.min(0), values.max(0)

    def last(self, what: str) -> tuple[float, float]:
        """Return the mean over the seeds at the end, and their range."""
        mean, least, largest = self.band(what)
        return float(mean[-1]), float(largest[-1] - least[-1])


def batches(task: Task, seed: int, samples: int, batch: int) -> list[tuple[Tensor, Tensor]]:
    """Return the seed's first samples, which are the same for every batch size."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [task.draw(generator) for _ in range(samples // BATCH)]
    inputs, targets = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    return list(zip(inputs.split(batch), targets.split(batch), strict=True))


def find(task: Task, entry: Entry, steps: int) -> float:
    """Return the entry's own learning rate, or lr_find's, with a seed that is not used for training."""
    if entry.own_lr is not None:
        return entry.own_lr
    torch.manual_seed(100)
    model = task.build()
    optimizer = entry.make(model, 1e-3)
    loader = batches(task, 100, max(20 * BATCH, 4 * entry.batch), entry.batch)
    test = onepass.lr_find(
        model, optimizer, nn.functional.cross_entropy, loader, start=1e-4, end=10, steps=steps, progress=False
    )
    try:
        return test.suggestion(SUGGESTION)
    except ValueError:  # too few steps to distinguish the fall from noise, as with --quick
        return float(test.lrs[np.nanargmin(test.smoothed)]) / 10


def train(task: Task, entry: Entry, lr: float, seed: int, samples: int, check: int) -> Run:
    torch.manual_seed(seed)
    model = task.build()
    optimizer = entry.make(model, lr)
    data = batches(task, seed, samples, entry.batch)
    every = max(check * BATCH // entry.batch, 1)
    losses: list[float] = []
    looks: list[tuple[float, ...]] = []
    for step, (inputs, targets) in enumerate(data, 1):

        def closure(inputs: Tensor = inputs, targets: Tensor = targets) -> float:
            model.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            return loss.item()

        losses.append(optimizer.step(closure))  # LBFGS's first of several
        if step % every == 0 or step == len(data):
            since = losses[int(looks[-1][0]) if looks else 0 :]
            if isinstance(optimizer, SCHEDULE_FREE):
                optimizer.eval()  # to the mean of the points
            looks.append((step, float(np.mean(since)), *evaluate(model, task)))
            if isinstance(optimizer, SCHEDULE_FREE):
                optimizer.train()
    return Run(np.array(losses), *np.array(looks).T)


def repeat(gallery: Gallery, task: Task, rated: Iterable[tuple[Entry, float]], plan: Plan, title: str) -> list[Runs]:
    """Train every entry at its learning rate, with each seed."""
    runs = [Runs(entry, lr, []) for entry, lr in rated]
    jobs = [(each, seed) for each in runs for seed in range(plan.seeds)]
    for each, seed in gallery.track(jobs, title):
        each.seeds.append(train(task, each.entry, each.lr, seed, plan.samples, plan.check))
    return runs


def run(gallery: Gallery) -> None:
    plan = Plan.of(gallery.quick)
    task = demo.digits("adamw", gallery.quick)
    gallery.print(f"{plan.samples:,} images to each optimizer, {BATCH} to a step; means of {plan.seeds} seeds.")
    gallery.print(f"Rates by lr_find: {METHODS[SUGGESTION]}; of one noisy test each, so another")
    gallery.print("seed's may be half or twice as large. Those marked * are the optimizer's own:")
    gallery.print("Adadelta's is a mere factor of steps that have a size of their own, Rprop's the size of the first")
    gallery.print("step alone, LBFGS's the first trial of its line search (a few evaluations each of 512 images).")
    gallery.print("Muon has the hidden matrix, AdamW the rest, at one rate. ASGD shows its weights, not their average.")
    gallery.print("\n".join(f"{name} is left out: {why}." for name, why in LEFT_OUT.items()) + "\n")

    rates = [(e, find(task, e, plan.find_steps)) for e in gallery.track(ENTRIES, "lr_find")]
    runs = repeat(gallery, task, rates, plan, "digits")
    gallery.table(HEADS, (row(each) for each in runs))
    draw_all(gallery, runs)

    by_name = {each.entry.name: each for each in runs}
    pairs = [(Entry(f"Lookahead({name})", lookahead(by_name[name].entry.make)), by_name[name].lr) for name in WRAPPED]
    ahead = repeat(gallery, task, pairs, plan, "Lookahead")
    gallery.print("\nLookahead, k = 5, alpha = 0.5, at the rate of the optimizer that it wraps:")
    gallery.table(
        HEADS, (row(each) for name, slow in zip(WRAPPED, ahead, strict=True) for each in (by_name[name], slow))
    )
    draw_lookahead(gallery, [by_name[name] for name in WRAPPED], ahead)

    sizes = [replace(entry, batch=batch) for entry in (ADAMW, LION) for batch in plan.batches]
    rates = [(e, find(task, e, plan.find_steps)) for e in gallery.track(sizes, "lr_find")]
    by_batch = repeat(gallery, task, rates, replace(plan, samples=plan.batch_samples), "batches")
    gallery.print(
        f"\nLion beside AdamW: {plan.batch_samples:,} images in all, at rates that lr_find suggests for each batch:"
    )
    gallery.table(
        ["", "batch", "steps", *HEADS[1:]],
        ([e[0], r.entry.batch, len(r.seeds[0].losses), *e[1:]] for r in by_batch for e in [row(r)]),
    )
    draw_batches(gallery, by_batch)


# -- tables and plots ------------------------------------------------------------------------------------------------

OTHERS = "#c9ced4"
HEADS = ("", "rate", "last loss", "held-out loss", "held-out accuracy, %", "its spread over seeds")


def row(runs: Runs) -> list[object]:
    accuracy, spread = runs.last("accuracy")
    rate = f"{runs.lr:.2g}" + "*" * (runs.entry.own_lr is not None)
    return [runs.entry.name, rate, f"{runs.last('loss')[0]:.3f}", f"{runs.last('held_out_loss')[0]:.3f}",
            f"{100 * accuracy:.1f}", f"{100 * spread:.1f}"]  # fmt: skip


def curve(axes: Axes, runs: Runs, what: str, color: str, factor: float = 1, **line: Any) -> None:
    """Draw the mean, and a band from the smallest to the largest value."""
    steps = runs.seeds[0].steps
    mean, least, largest = (factor * values for values in runs.band(what))
    axes.fill_between(steps, least, largest, color=color, alpha=0.25, linewidth=0)
    axes.plot(steps, mean, color=color, **line)


def draw_all(gallery: Gallery, runs: list[Runs]) -> None:
    """Draw loss and accuracy of each optimizer in its own panel, in front of the others' curves."""
    columns = 4
    rows = -(-len(runs) // columns)
    with gallery.picture("digits_optimizers", 9.8, 2.9 * rows, colors=96) as figure:
        figure.suptitle(
            "Training loss (above) and held-out accuracy (below): mean of the seeds, band from least to largest;"
            " grey: all others", fontsize=9,
        )  # fmt: skip
        grid = figure.subplots(2 * rows, columns, sharex=True)
        for number, each in enumerate(runs):
            i, j = divmod(number, columns)
            loss, accuracy = grid[2 * i, j], grid[2 * i + 1, j]
            for other in runs:
                if other is not each:
                    steps = other.seeds[0].steps
                    loss.plot(steps, other.band("loss")[0], color=OTHERS, linewidth=0.7)
                    accuracy.plot(steps, 100 * other.band("accuracy")[0], color=OTHERS, linewidth=0.7)
            color = CYCLE[j]
            curve(loss, each, "loss", color)
            curve(accuracy, each, "accuracy", color, 100)
            loss.set_title(f"{each.entry.name}; lr {row(each)[1]}")
            loss.set(yscale="log", ylim=(0.01, 5))
            accuracy.set(ylim=(0, 104), yticks=(0, 50, 100))
            at = {"transform": accuracy.transAxes, "ha": "right", "va": "bottom", "path_effects": HALO}
            accuracy.text(0.98, 0.06, f"{100 * each.last('accuracy')[0]:.1f} %", color=color, weight="bold", **at)
            for axes, name in ((loss, "loss"), (accuracy, "accuracy, %")):
                axes.tick_params(labelleft=j == 0)
                axes.set_ylabel(name if j == 0 else "")
        for axes in grid[2 * (rows - 1) :, len(runs) - columns * (rows - 1) :].flat:  # without a run
            axes.set_axis_off()
        for axes in grid[-1]:
            axes.set_xlabel("step")


def draw_lookahead(gallery: Gallery, plain_runs: list[Runs], ahead: list[Runs]) -> None:
    with gallery.picture("digits_lookahead", 10, 5) as figure:
        above, below = figure.subplots(2, len(ahead), sharex=True, sharey="row")
        for loss, accuracy, fast, slow in zip(above, below, plain_runs, ahead, strict=True):
            for each, color, style in ((fast, GREY, "--"), (slow, BLUE, "-")):
                curve(loss, each, "loss", color, linestyle=style, label=each.entry.name)
                curve(accuracy, each, "accuracy", color, 100, linestyle=style)
            loss.set_yscale("log")
            loss.set_title(f"{fast.entry.name}, lr {fast.lr:.2g}")
            loss.legend()
            accuracy.set_xlabel("step")
        above[0].set_ylabel("training loss")
        below[0].set_ylabel("held-out accuracy, %")


def draw_batches(gallery: Gallery, by_batch: list[Runs]) -> None:
    with gallery.picture("digits_batches", 10.5, 3.8) as figure:
        loss, accuracy, rate = figure.subplots(1, 3)
        for name, color in ((ADAMW.name, BLUE), (LION.name, ORANGE)):
            runs = [each for each in by_batch if each.entry.name == name]
            sizes = [each.entry.batch for each in runs]
            for axes, what, factor in ((loss, "held_out_loss", 1), (accuracy, "accuracy", 100)):
                mean, least, largest = factor * np.array([[part[-1] for part in each.band(what)] for each in runs]).T
                axes.fill_between(sizes, least, largest, color=color, alpha=0.25, linewidth=0)
                axes.plot(sizes, mean, "o-", color=color, label=name)
            rate.plot(sizes, [each.lr for each in runs], "o-", color=color, label=name)
        for axes, title, unit in (
            (loss, "Loss after the same number of images", "held-out loss"),
            (accuracy, "Accuracy after them", "held-out accuracy, %"),
            (rate, "Rate that lr_find suggests", "learning rate"),
        ):
            axes.set_xscale("log", base=2)
            axes.set_xticks(sizes, list(map(str, sizes)))
            label(axes, title, "batch size", unit)
        loss.set_yscale("log")
        rate.set_yscale("log")
        rate.legend()


if __name__ == "__main__":
    alone(run)
