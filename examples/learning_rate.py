"""Learning rate: gradient descent on y = 4 x^2 from x = 2, with rates from diverging to very slow.

The gradient is 8 x, so a step multiplies x by 1 - 8 lr. With 0.125 the first step reaches the minimum. Below 0.25 x
converges, with 0.25 it alternates between 2 and -2, and above 0.25 it diverges.
"""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib
import numpy as np
import onepass
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from onepass.examples.common import BLUE, GREY, HALO, INK, RED, Gallery, Numbers, alone, arrows, label, leaf

START = 2.0
SHOWN = {1.0: 4, 0.5: 4, 0.2: 20, 0.125: 20, 0.1: 20, 0.01: 20}  # rate -> steps
FAN = np.linspace(0.01, 0.5, 10)


@dataclass
class Descent:
    """x before each step and after the last, with gradient and loss there."""

    lr: float
    x: Numbers
    gradient: Numbers
    loss: Numbers

    @property
    def diverges(self) -> bool:
        return bool(self.loss[-1] > self.loss[0])


def descend(lr: float, steps: int, momentum: float = 0.0) -> Descent:
    x = leaf(START)
    optimizer = onepass.SGD([x], lr=lr, momentum=momentum)
    seen = []
    for step in range(steps + 1):
        optimizer.zero_grad()
        loss = (4 * x**2).sum()
        loss.backward()
        assert x.grad is not None
        seen.append((x.item(), x.grad.item(), loss.item()))
        if step < steps:
            optimizer.step()
    return Descent(lr, *np.array(seen).T)


def draw_path(axes: Axes, descent: Descent) -> None:
    reach = max(2.2, 1.1 * np.abs(descent.x).max())
    curve = np.linspace(-reach, reach, 400)
    axes.plot(curve, 4 * curve**2, color=GREY, linewidth=1)
    arrows(axes, descent.x, descent.loss, RED if descent.diverges else BLUE)
    axes.plot(descent.x[0], descent.loss[0], "o", color=INK, markersize=5)
    label(axes, f"lr = {descent.lr:g}", "x", "y")


def run(gallery: Gallery) -> None:
    descents = [descend(lr, steps) for lr, steps in SHOWN.items()]

    first = descents[0]
    gallery.print(f"y = 4 x^2 from x = {START:g}, lr = {first.lr:g}: every step leads further away")
    rows = zip(range(len(first.x)), first.x, first.gradient, first.loss, strict=True)
    gallery.table(["step", "x", "gradient", "loss"], ([t, f"{x:g}", f"{g:g}", f"{y:g}"] for t, x, g, y in rows))
    gallery.print()
    gallery.table(
        ["lr", "x after 1 step", "x at the end", "steps"], ([d.lr, d.x[1], d.x[-1], len(d.x) - 1] for d in descents)
    )

    with gallery.picture("learning_rate_paths", 9, 6) as figure:
        for axes, descent in zip(figure.subplots(2, 3).flat, descents, strict=True):
            draw_path(axes, descent)

    with gallery.picture("learning_rate_losses", 9, 3.8) as figure:
        axes = figure.subplots()
        for descent in descents:
            # A loss of zero cannot be shown on a logarithmic axis: the line ends there.
            drawn = np.where(descent.loss > 0, descent.loss, 1e-16)
            axes.semilogy(drawn, ".-", label=f"{descent.lr:g}" + (", diverges" if descent.diverges else ""))
        axes.set_ylim(1e-16, 1e10)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.annotate(
            "0.125: x = 0 after one step", (1, 1e-16), (2, 1e-14), arrowprops={"arrowstyle": "->"}, path_effects=HALO
        )
        label(axes, "Loss of gradient descent on y = 4 x², by learning rate", "iteration", "loss y")
        axes.legend(title="learning rate", ncols=2)

    with gallery.picture("learning_rate_fan", 9, 3.8) as figure:
        axes = figure.subplots()
        falling, rising = (iter(matplotlib.colormaps[m](np.linspace(0.4, 1, 5))) for m in ("Blues", "Reds"))
        for lr in FAN:
            descent = descend(lr, 10)
            color, style, told = (next(rising), "--", " diverges") if descent.diverges else (next(falling), "-", "")
            axes.plot(descent.x, style, marker=".", color=color, label=f"{lr:.3f}{told}")
        axes.set_yscale("symlog", linthresh=1)
        label(axes, "Ten rates from 0.01 to 0.5: those above 0.25 diverge (red)", "iteration", "x")
        axes.legend(title="learning rate", loc="center left", bbox_to_anchor=(1, 0.5))


if __name__ == "__main__":
    alone(run)
