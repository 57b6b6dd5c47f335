"""Surfaces: every optimizer in an ill-conditioned valley, near a saddle point and among several basins.

The optimizers differ by the states that they keep. In Rosenbrock's valley the gradients point across the valley; near
the saddle point of x^2 - y^2 the gradient along the way out nearly vanishes; on Beale's function the same start leads
to different ends. Curvature solves the first problem: LBFGS estimates it, and a Newton step uses the Hessian. On a
quadratic one Newton step is enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path as PathOfFile
from typing import Any

import matplotlib
import numpy as np
import onepass
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from onepass.examples.common import (
    BLUE,
    CYCLE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    STYLE,
    Gallery,
    Numbers,
    alone,
    label,
    leaf,
)
from PIL import Image
from torch import Tensor
from torch.optim import Optimizer

Span = tuple[float, float]


@dataclass(frozen=True)
class Surface:
    """A function of two variables, with the start, the frame of the plot, and the loss that counts as arrived."""

    name: str
    f: Callable[[Any, Any], Any]  # its arguments are tensors or arrays
    start: Span
    steps: int
    bound: float
    frame: tuple[Span, Span]
    levels: Numbers
    minimum: Span | None = None  # if None, a path ends where it leaves the frame

    def leaves(self, x: float, y: float) -> bool:
        (left, right), (bottom, top) = self.frame
        return not (left <= x <= right and bottom <= y <= top)


def rosenbrock(x: Any, y: Any) -> Any:
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def saddle(x: Any, y: Any) -> Any:
    return x**2 - y**2


def beale(x: Any, y: Any) -> Any:
    return (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2


CONDITION, TURN = 50, math.pi / 6


def quadratic(x: Any, y: Any) -> Any:
    """Return a quadratic whose Hessian has the eigenvalues 1 and CONDITION, along axes rotated by TURN."""
    along, across = x * math.cos(TURN) + y * math.sin(TURN), y * math.cos(TURN) - x * math.sin(TURN)
    return (along**2 + CONDITION * across**2) / 2


STEEP = np.geomspace(0.1, 3000, 12)
HILLS = np.linspace(0.1, 1.1, 6) ** 2
SURFACES = (
    Surface("Rosenbrock", rosenbrock, (-1.2, 1.0), 600, 1e-2, ((-1.8, 1.8), (-0.8, 2.2)), STEEP, (1.0, 1.0)),
    Surface(
        "x² - y²", saddle, (1.0, 1e-3), 150, -0.5, ((-0.6, 1.2), (-0.6, 1.2)), np.concatenate([-HILLS[::-1], HILLS])
    ),
    Surface("Beale", beale, (0.3, 1.3), 400, 1e-2, ((-2.8, 3.8), (-0.9, 2.0)), STEEP, (3.0, 0.5)),
)
BENT = (
    Surface(
        f"Quadratic of condition {CONDITION}",
        quadratic,
        (2.2, 2.0),
        400,
        1e-10,
        ((-0.6, 3.0), (-0.4, 2.2)),
        np.geomspace(0.03, 200, 12),
        (0.0, 0.0),
    ),
    # A Newton step ends far down, so the frame includes that point.
    Surface("Rosenbrock", rosenbrock, (-1.2, 1.0), 20_000, 1e-6, ((-1.8, 1.8), (-3.6, 1.8)), STEEP, (1.0, 1.0)),
)


# -- optimizers ------------------------------------------------------------------------------------------------------


def as_it_is(surface: Surface, p: Tensor) -> Tensor | None:
    return p.grad


def sparse(surface: Surface, p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad.to_sparse()


def newton(surface: Surface, p: Tensor) -> Tensor:
    """Return the inverse Hessian times the gradient, which leads to the minimum of a quadratic at a rate of one."""
    assert p.grad is not None
    hessian = torch.autograd.functional.hessian(lambda at: surface.f(*at), p.detach())
    direction: Tensor = torch.linalg.solve(hessian, p.grad)
    return direction


def lookahead(params: list[Tensor], lr: float, **options: Any) -> Optimizer:
    return onepass.Lookahead(onepass.SGD(params, lr=lr, **options))


@dataclass(frozen=True)
class Method:
    """An optimizer, its learning rate on each surface, and its other arguments."""

    make: Callable[..., Optimizer]
    rates: tuple[float, ...]
    options: dict[str, Any] = field(default_factory=dict)
    gradient: Callable[[Surface, Tensor], Tensor | None] = as_it_is  # what it is given as gradient
    shape: tuple[int, ...] = (2,)


# One iteration per step. max_eval is set because its default would be one evaluation, too few for a line search.
LBFGS_OPTIONS = {"max_iter": 1, "max_eval": 25, "tolerance_change": 1e-16, "line_search_fn": "strong_wolfe"}

# Learning rates are chosen by hand from 1, 2 and 5 times the powers of ten; all other arguments are defaults.
# - Where the step is proportional to the gradient, the largest stable rate on Rosenbrock's function is 0.002. RAdam
#   starts with five such steps, so its rate is small compared with Adam's.
# - Where the length of a step is about the rate (Lion, Muon, RMSprop, Adam), 0.01 to 0.2 are visible distances.
# - Rprop's rate is its first step only. Adadelta's multiplies steps of its own size, and Adafactor's is relative to the
#   size of the parameter.
# - RMSprop averages over some 10 steps (alpha 0.9), not 100. Muon has no weight decay; its default is large.
FAMILIES: dict[str, dict[str, Method]] = {
    "The gradient,\nits momentum, averages": {
        "SGD": Method(onepass.SGD, (1e-3, 0.05, 5e-3)),
        "SGD, momentum 0.9": Method(onepass.SGD, (1e-3, 0.02, 2e-3), {"momentum": 0.9}),
        "SGD, Nesterov 0.9": Method(onepass.SGD, (1e-3, 0.02, 2e-3), {"momentum": 0.9, "nesterov": True}),
        "ASGD": Method(onepass.ASGD, (1e-3, 0.05, 5e-3)),
        "Lookahead over SGD": Method(lookahead, (1e-3, 0.02, 5e-3), {"momentum": 0.9}),
    },
    "Its sign, its direction,\nthe curvature": {
        "Rprop": Method(onepass.Rprop, (0.05, 0.01, 0.1)),
        "Lion": Method(onepass.Lion, (0.01, 0.02, 0.01)),
        "Muon": Method(onepass.Muon, (0.01, 0.05, 0.05), {"weight_decay": 0.0}, shape=(1, 2)),  # accepts only matrices
        "LBFGS": Method(onepass.LBFGS, (1.0, 1.0, 1.0), LBFGS_OPTIONS),
    },
    "Divided by the root\nof past squares": {
        "Adagrad": Method(onepass.Adagrad, (0.5, 0.1, 1.0)),
        "Adadelta": Method(onepass.Adadelta, (1.0, 1.0, 2.0)),
        "RMSprop": Method(onepass.RMSprop, (0.01, 0.02, 0.1), {"alpha": 0.9}),
        "Adafactor": Method(onepass.Adafactor, (0.05, 0.1, 0.02)),
    },
    "Both: Adam\nand its kin": {
        "Adam": Method(onepass.Adam, (0.1, 0.05, 0.2)),
        "AdamW": Method(onepass.AdamW, (0.1, 0.05, 0.2)),
        "Adamax": Method(onepass.Adamax, (0.2, 0.05, 0.5)),
        "NAdam": Method(onepass.NAdam, (0.05, 0.05, 0.05)),
        "RAdam": Method(onepass.RAdam, (5e-3, 0.1, 0.01)),
        "SparseAdam": Method(onepass.SparseAdam, (0.1, 0.05, 0.2), gradient=sparse),
    },
}
METHODS = {name: method for family in FAMILIES.values() for name, method in family.items()}
# Close to twice the inverse of the largest eigenvalue, the limit of stability: the path zigzags between the walls.
CURVATURE = {
    "gradient descent": Method(onepass.SGD, (0.95 * 2 / CONDITION, 1e-3)),
    "LBFGS": Method(onepass.LBFGS, (1.0, 1.0), LBFGS_OPTIONS),
    "Newton step": Method(onepass.SGD, (1.0, 1.0), gradient=newton),
}


@dataclass
class Path:
    """The parameter before each step and after the last, with the loss and the number of evaluations."""

    at: Numbers  # of shape (steps + 1, 2)
    loss: Numbers
    evaluations: int

    def steps_to(self, bound: float) -> int | str:
        below = np.flatnonzero(self.loss < bound)
        return int(below[0]) if len(below) else "-"


def travel(surface: Surface, method: Method, lr: float, steps: int) -> Path:
    """Return the path; it ends early if it stands still, or leaves the frame of a surface without minimum.

    Rprop rests for a step where all signs have turned: it takes two to be sure.
    """
    p = leaf(*surface.start).detach().view(method.shape).requires_grad_()
    optimizer = method.make([p], lr=lr, **method.options)
    evaluations = 0

    def closure() -> float:
        nonlocal evaluations
        evaluations += 1
        optimizer.zero_grad()
        loss: Tensor = surface.f(*p.flatten())
        loss.backward()
        p.grad = method.gradient(surface, p)
        return loss.item()

    seen = [p.detach().flatten().tolist()]
    for _ in range(steps):
        optimizer.step(closure)
        seen.append(p.detach().flatten().tolist())
        if seen[-3:] == 3 * seen[-1:] or (surface.minimum is None and surface.leaves(*seen[-1])):
            break
    at = np.array(seen)
    return Path(at, surface.f(*at.T), evaluations)


# -- plots -----------------------------------------------------------------------------------------------------------


def draw_surface(axes: Axes, surface: Surface) -> None:
    x, y = (np.linspace(*span, 160) for span in surface.frame)
    axes.contour(x, y, surface.f(x, y[:, None]), surface.levels, colors="#b9c0c7", linestyles="-", linewidths=0.6)
    axes.set(xlim=surface.frame[0], ylim=surface.frame[1])
    axes.plot(*surface.start, "o", color=INK, markersize=5, zorder=4)
    if surface.minimum:
        axes.plot(*surface.minimum, "*", color=INK, markersize=10, zorder=2)
    axes.grid(False)


def marks() -> list[Line2D]:
    """Return the legend entries for start, end and minimum."""
    shapes = {"start": ("o", 5), "end": ("X", 7), "minimum": ("*", 10)}
    return [
        Line2D([], [], linestyle="", color=INK, marker=marker, markersize=size, label=name)
        for name, (marker, size) in shapes.items()
    ]


UPON = {"ASGD": (0, (4, 3)), "Lion": (0, (4, 3)), "SparseAdam": (0, (1, 2))}  # dashes for paths that cover another
COLORS = (*CYCLE[:5], INK)


def draw_all(figure: Figure, paths: dict[tuple[str, str], Path]) -> None:
    grid = figure.subplots(len(FAMILIES), len(SURFACES), sharex="col", sharey="col")
    for row, (family, methods) in zip(grid, FAMILIES.items(), strict=True):
        for axes, surface in zip(row, SURFACES, strict=True):
            draw_surface(axes, surface)
            for name, color in zip(methods, COLORS, strict=False):
                at = paths[name, surface.name].at
                axes.plot(*at.T, color=color, linestyle=UPON.get(name, "-"), linewidth=1.2, label=name, zorder=3)
                if not surface.leaves(*at[-1]):
                    axes.plot(*at[-1], "X", color=color, markersize=7, markeredgecolor="white", zorder=5)
        lines = [line for line in row[-1].lines if not line.get_label().startswith("_")]
        row[-1].legend(handles=lines, title=family, loc="center left", bbox_to_anchor=(1, 0.5), alignment="left")
        row[0].set_ylabel("y")
    for axes, surface in zip(grid[0], SURFACES, strict=True):
        axes.set_title(f"{surface.name}, {surface.steps} steps" + ("" if surface.minimum else " or until it leaves"))
    for axes in grid[-1]:
        axes.set_xlabel("x")
    figure.legend(handles=marks(), loc="outside lower right", ncols=3)


MARKERS = ("o", "s", "^", "D")  # one per family
FRAME_MS, TRAIL = 80, 12  # duration of a frame in ms, and number of frames that a trail is visible


def animate(gallery: Gallery, paths: dict[tuple[str, str], Path], frames: int) -> None:
    """Animate all optimizers; the step grows with the square of the time, so the early steps are shown slowly."""
    small: dict[Any, Any] = {"font.size": 8.5, "legend.fontsize": 8, "axes.titlesize": 9.5}
    with matplotlib.rc_context({**STYLE, **small}):
        figure = Figure(figsize=(11, 3.9), dpi=100)
        canvas = FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(SURFACES))
        for axes, surface in zip(panels, SURFACES, strict=True):
            draw_surface(axes, surface)
            label(axes, surface.name, "x", "y")
        movers = [movers_in(axes) for axes in panels]
        handles = [dot for _, dot in movers[0].values()]
        figure.legend(handles=handles, loc="outside right center")
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # the layout is the same in all frames

        images = []
        for frame in gallery.track(range(frames), "frames"):
            for axes, surface, inside in zip(panels, SURFACES, movers, strict=True):
                then, now = (shown_at(f, frames, surface.steps) for f in (frame - TRAIL, frame))
                axes.set_title(f"{surface.name}, step {now}")
                for name, (trail, dot) in inside.items():
                    at = paths[name, surface.name].at[: now + 1]
                    # A path that has left the frame keeps its whole trail, or it would not be visible.
                    begin = min(then, len(at) - 1) if surface.minimum else 0
                    trail.set_data(*at[begin:].T)
                    dot.set_data(*at[-1:].T)
            canvas.draw()
            images.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))
    write_gif(images, gallery.path("surfaces.gif"))


def movers_in(axes: Axes) -> dict[str, tuple[Line2D, Line2D]]:
    """Return a trail and a dot for each optimizer."""
    movers = {}
    for methods, marker in zip(FAMILIES.values(), MARKERS, strict=True):
        for name, color in zip(methods, COLORS, strict=False):
            (trail,) = axes.plot([], [], color=color, linewidth=1.1)
            (dot,) = axes.plot([], [], marker, color=color, markersize=6, markeredgecolor="white", label=name)
            movers[name] = trail, dot
    return movers


def write_gif(images: list[Image.Image], path: PathOfFile) -> None:
    """Save all frames with one small palette: unchanged areas are stored once, and the file is a tenth as large."""
    tints = [1 - part * (1 - np.array(to_rgb(c))) for c in (*COLORS, GREY) for part in (1, 0.8, 0.6, 0.4, 0.2, 0)]
    palette = Image.new("P", (1, 1))
    palette.putpalette(np.rint(255 * np.concatenate(tints)).astype(int).tolist())
    first, *others = (image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images)
    first.save(path, save_all=True, append_images=others, duration=FRAME_MS, loop=0)


def shown_at(frame: int, frames: int, steps: int) -> int:
    """Return the step that a frame shows; the last frames show the end."""
    return round(steps * min(max(frame, 0) / (frames - 1) / 0.9, 1.0) ** 2)


def draw_curvature(figure: Figure, paths: dict[tuple[str, str], Path]) -> None:
    for (left, right), surface in zip(figure.subplots(2, 2), BENT, strict=True):
        draw_surface(left, surface)
        lowest = surface.bound / 1e10
        for name, color in zip(CURVATURE, (ORANGE, BLUE, GREEN), strict=True):
            path = paths[name, surface.name]
            left.plot(*path.at.T, ".-", color=color, markersize=3.5, linewidth=1, label=name)
            # A loss of zero cannot be shown on a logarithmic axis: the line leaves the plot.
            right.plot(np.maximum(path.loss, 1e-99), ".-", color=color, markersize=3.5, linewidth=1.2, label=name)
        label(left, surface.name, "x", "y")
        right.set_xscale("symlog", linthresh=10)
        right.set_yscale("log")
        right.set(xlim=0, ylim=lowest)
        label(right, "Its loss", "iteration", "loss")
        right.legend(loc="upper right")


def run(gallery: Gallery) -> None:
    paths = {}
    every = [(surface, i, name) for i, surface in enumerate(SURFACES) for name in METHODS]
    for surface, i, name in gallery.track(every, "paths", lambda item: f"{item[0].name}, {item[2]}"):
        steps = min(surface.steps, 20) if gallery.quick else surface.steps
        paths[name, surface.name] = travel(surface, METHODS[name], METHODS[name].rates[i], steps)
    for i, surface in enumerate(SURFACES):
        gallery.print(f"{surface.name} from {surface.start}")
        gallery.table(
            ["optimizer", "lr", "steps", "x at the end", "y", "loss", f"steps to a loss below {surface.bound:g}"],
            (
                [name, method.rates[i], len(path.at) - 1, *path.at[-1], path.loss[-1], path.steps_to(surface.bound)]
                for name, method in METHODS.items()
                for path in [paths[name, surface.name]]
            ),
        )
        gallery.print()

    with gallery.picture("surfaces", 11, 10, colors=128) as figure:
        draw_all(figure, paths)
    animate(gallery, paths, 3 if gallery.quick else 80)

    bent = {}
    for i, surface in enumerate(BENT):
        for name, method in CURVATURE.items():
            longest = surface.steps if name == "gradient descent" else 60
            bent[name, surface.name] = travel(surface, method, method.rates[i], 20 if gallery.quick else longest)
    for surface in BENT:
        gallery.print(f"{surface.name} from {surface.start}")
        gallery.table(
            ["", "steps", "gradients", "loss at the end", f"steps to a loss below {surface.bound:g}"],
            (
                [name, len(path.at) - 1, path.evaluations, path.loss[-1], path.steps_to(surface.bound)]
                for name in CURVATURE
                for path in [bent[name, surface.name]]
            ),
        )
        gallery.print()
    with gallery.picture("surfaces_curvature", 9, 7, colors=128) as figure:
        draw_curvature(figure, bent)


if __name__ == "__main__":
    alone(run)
