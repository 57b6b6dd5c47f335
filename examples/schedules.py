"""Schedules: the learning rate of every scheduler over 200 epochs.

The learning rates are measured in a loop of optimizer and scheduler steps, as the distance that each step moves a
parameter whose gradient is one. If a curve differs between groups, both are drawn.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onepass
from onepass import lr_scheduler as schedulers
from onepass.examples.common import CYCLE, Gallery, Numbers, alone, label, leaf
from onepass.schedules import cosine, inverse_sqrt, linear, warmup, wsd
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

EPOCHS, LR = 200, 0.1
Make = Callable[[Optimizer], LRScheduler]


def loss(epoch: int) -> float:
    """Return the metric of ReduceLROnPlateau: it falls and then stays constant."""
    return max(0.3, 1 - epoch / 80)


def warmup_and_cosine(optimizer: Optimizer) -> LRScheduler:
    warmup = schedulers.LinearLR(optimizer, 0.1, total_iters=20)
    cosine = schedulers.CosineAnnealingLR(optimizer, 180)
    return schedulers.SequentialLR(optimizer, [warmup, cosine], milestones=[20])


def two_at_once(optimizer: Optimizer) -> LRScheduler:
    parts = [schedulers.ExponentialLR(optimizer, 0.99), schedulers.StepLR(optimizer, 50, gamma=0.5)]
    return schedulers.ChainedScheduler(parts, optimizer)


MAKERS: dict[str, Make] = {
    "StepLR, every 50": lambda o: schedulers.StepLR(o, 50),
    "MultiStepLR, at 50, 125, 160": lambda o: schedulers.MultiStepLR(o, [50, 125, 160]),
    "ExponentialLR, 0.95": lambda o: schedulers.ExponentialLR(o, 0.95),
    "CosineAnnealingLR, T_max 50": lambda o: schedulers.CosineAnnealingLR(o, 50),
    "ReduceLROnPlateau, patience 10": lambda o: schedulers.ReduceLROnPlateau(o, patience=10),
    "LambdaLR, one for each group": lambda o: schedulers.LambdaLR(
        o, [lambda epoch: 0.1 ** (epoch // 20), lambda epoch: 0.95**epoch]
    ),
    "MultiplicativeLR, 0.98": lambda o: schedulers.MultiplicativeLR(o, lambda epoch: 0.98),
    "ConstantLR, a third for 50": lambda o: schedulers.ConstantLR(o, 1 / 3, total_iters=50),
    "LinearLR, for 100": lambda o: schedulers.LinearLR(o, 0.1, total_iters=100),
    "PolynomialLR, power 2": lambda o: schedulers.PolynomialLR(o, EPOCHS, power=2),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 20, T_mult=2),
    "CyclicLR, triangular2": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, 25, mode="triangular2", cycle_momentum=False),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=EPOCHS, cycle_momentum=False),
    "SequentialLR: linear, cosine": warmup_and_cosine,
    "ChainedScheduler": two_at_once,
    "SWALR, to 0.05 within 50": lambda o: schedulers.SWALR(o, 0.05, anneal_epochs=50),
    "warmup(20) >> cosine(180)": lambda o: onepass.ScheduleLR(o, warmup(20) >> cosine(180)),
    "wsd(20, 120, 60)": lambda o: onepass.ScheduleLR(o, wsd(20, 120, 60)),
    "warmup(20) >> inverse_sqrt(20)": lambda o: onepass.ScheduleLR(o, warmup(20) >> inverse_sqrt(20)),
    "linear(50, end=0.1).repeat(4)": lambda o: onepass.ScheduleLR(o, linear(50, end=0.1).repeat(4)),
}


def rates(make: Make, epochs: int = EPOCHS) -> Numbers:
    """Return the learning rates of the optimizer's steps, of shape (epochs, groups)."""
    groups = [leaf(0.0), leaf(0.0)]
    optimizer = onepass.SGD([{"params": [p]} for p in groups], lr=LR)
    scheduler = make(optimizer)
    seen = []
    for epoch in range(epochs):
        for p in groups:
            p.data.zero_()
            p.grad = p.new_ones(1)
        optimizer.step()
        seen.append([abs(p.item()) for p in groups])
        if isinstance(scheduler, schedulers.ReduceLROnPlateau):
            scheduler.step(loss(epoch))
        else:
            scheduler.step()
    return np.array(seen)


def run(gallery: Gallery) -> None:
    curves = {name: rates(make) for name, make in gallery.track(MAKERS.items(), "schedulers")}
    gallery.table(
        ["scheduler", "epoch 0", "10", "50", "100", "150", "199"],
        ([name, *curve[[0, 10, 50, 100, 150, 199], 0]] for name, curve in curves.items()),
    )
    rows = -(-len(curves) // 4)
    with gallery.picture("schedules", 11, 1.9 * rows) as figure:
        grid = figure.subplots(rows, 4, sharex=True, sharey=True).flat
        for axes, (name, curve) in zip(grid, curves.items(), strict=False):
            several = (curve[:, 0] != curve[:, 1]).any()
            for group, color in enumerate(CYCLE[: 1 + several]):
                axes.plot(curve[:, group], color=color, label=f"group {group}")
            label(axes, name, "", "")
            axes.title.set_fontsize(8.5)
            if several:
                axes.legend()
        figure.supxlabel("epoch")
        figure.supylabel("learning rate")


if __name__ == "__main__":
    alone(run)
