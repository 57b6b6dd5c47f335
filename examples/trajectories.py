"""Trajectories on f(x, y) = x^2 + y^2: one rate, a rate for each axis, momentum, Nesterov, RMSprop.

Each axis is a parameter, so it can be a parameter group. On this function the axes are independent: the methods differ
only by the states that they keep of past gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onepass
import torch
from matplotlib.axes import Axes
from onepass.examples.common import BLUE, GREEN, GREY, ORANGE, RED, Gallery, Numbers, alone, arrows, label, leaf
from torch import Tensor
from torch.optim import Optimizer

FAST, SLOW = 2**-7 * 16, 0.015  # a step multiplies a coordinate by 0.75, or by 0.97
Make = Callable[[Sequence[Tensor]], Optimizer]


@dataclass
class Path:
    """Both coordinates before each step and after the last, with the optimizer's state at that time."""

    at: Numbers  # of shape (steps + 1, 2)
    velocity: Numbers
    square_avg: Numbers


def travel(start: tuple[float, float], make: Make, steps: int, velocity: tuple[float, float] | None = None) -> Path:
    """Return the path of an optimizer from a point, optionally with an initial velocity (SGD's momentum buffer)."""
    axes = [leaf(number) for number in start]
    optimizer = make(axes)
    if velocity is not None:
        for p, v in zip(axes, velocity, strict=True):
            optimizer.state[p]["momentum_buffer"] = torch.full_like(p, v)

    def kept(name: str) -> list[float]:
        return [float(optimizer.state[p].get(name, 0.0)) for p in axes]

    seen = [([p.item() for p in axes], kept("momentum_buffer"), kept("square_avg"))]
    for _ in range(steps):
        optimizer.zero_grad()
        torch.stack([p**2 for p in axes]).sum().backward()
        optimizer.step()
        seen.append(([p.item() for p in axes], kept("momentum_buffer"), kept("square_avg")))
    return Path(*(np.array(column) for column in zip(*seen, strict=True)))


def rates(x: float, y: float) -> Make:
    """Return one group per axis."""
    return lambda axes: onepass.SGD([{"params": [axes[0]], "lr": x}, {"params": [axes[1]], "lr": y}])


def momentum(m: float, nesterov: bool = False) -> Make:
    return lambda axes: onepass.SGD(axes, lr=0.05, momentum=m, nesterov=nesterov)


def rmsprop(lr: float) -> Make:
    return lambda axes: onepass.RMSprop(axes, lr=lr)


BY_RATES = {
    f"one rate, {FAST:g}": rates(FAST, FAST),
    f"{FAST:g} for x, {SLOW:g} for y": rates(FAST, SLOW),
    f"{SLOW:g} for x, {FAST:g} for y": rates(SLOW, FAST),
}
BY_MOMENTUM = {"momentum 0.9": momentum(0.9), "momentum 0.8": momentum(0.8), "Nesterov, 0.9": momentum(0.9, True)}
BY_RMSPROP = {"RMSprop, 0.3": rmsprop(0.3), "RMSprop, 2: the first step is 20": rmsprop(2.0)}
VELOCITY = (80.0, -80.0)  # along the circle, so that the paths are spirals


def draw(axes: Axes, path: Path, title: str, reach: tuple[float, float], color: str) -> None:
    x, y = (np.linspace(-r, r, 200) for r in reach)
    axes.contour(x, y, x**2 + y[:, None] ** 2, 14, cmap="Greys", alpha=0.5)
    axes.set(xlim=(-reach[0], reach[0]), ylim=(-reach[1], reach[1]))
    arrows(axes, path.at[:, 0], path.at[:, 1], color)
    axes.plot(*path.at[0], "o", color=GREY, markersize=8, label="start")
    axes.plot(*path.at[-1], "*", color=RED, markersize=11, label="end")
    label(axes, title, "x", "y")
    axes.grid(False)


def run(gallery: Gallery) -> None:
    steps = 40
    by_rates = {name: travel((15, 0.1), make, steps) for name, make in BY_RATES.items()}
    by_momentum = {name: travel((15, 15), make, 2 * steps, VELOCITY) for name, make in BY_MOMENTUM.items()}
    by_rmsprop = {name: travel((15, 7.5), make, 2 * steps) for name, make in BY_RMSPROP.items()}
    gallery.table(
        ["path", "from", "x after 1", "y after 1", "x at the end", "y at the end"],
        (
            [name, str(tuple(map(float, path.at[0]))), *path.at[1], *path.at[-1]]
            for name, path in (by_rates | by_momentum | by_rmsprop).items()
        ),
    )

    with gallery.picture("trajectories_rates", 9, 3.4) as figure:
        for axes, (name, path) in zip(figure.subplots(1, 3, sharey=True), by_rates.items(), strict=True):
            draw(axes, path, name, (17, 0.13), BLUE)
        axes.legend(loc="lower left")

    with gallery.picture("trajectories_momentum", 9, 3.6) as figure:
        for axes, (name, path) in zip(figure.subplots(1, 3, sharey=True), by_momentum.items(), strict=True):
            draw(axes, path, name, (26, 26), BLUE)
            axes.set_aspect("equal")
        axes.legend(loc="lower left")

    with gallery.picture("trajectories_rmsprop", 9, 4.2) as figure:
        for axes, (name, path) in zip(figure.subplots(1, 2, sharey=True), by_rmsprop.items(), strict=True):
            draw(axes, path, name, (17, 17), BLUE)
            axes.set_aspect("equal")
        axes.legend(loc="lower left")

    with gallery.picture("trajectories_states", 9, 5.6) as figure:
        (top_left, top_right), (left, right) = figure.subplots(2, 2, sharex=True)
        for axes, path, name, what, of in (
            (top_left, by_momentum["momentum 0.9"], "momentum 0.9", "velocity", "velocity"),
            (top_right, by_momentum["Nesterov, 0.9"], "Nesterov, 0.9", "velocity", "velocity"),
            (left, by_rmsprop["RMSprop, 0.3"], "RMSprop, 0.3", "square_avg", "squared gradient"),
            (right, by_rmsprop["RMSprop, 2: the first step is 20"], "RMSprop, 2", "square_avg", "squared gradient"),
        ):
            for values, axis, color in zip(getattr(path, what).T, "xy", (GREEN, ORANGE), strict=True):
                axes.plot(values, color=color, label=axis)
            label(axes, name, "iteration", f"accumulated {of}")
            axes.legend()


if __name__ == "__main__":
    alone(run)
