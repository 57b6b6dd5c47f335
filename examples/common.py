"""Shared code of the gallery's experiments: plot style, output folder, progress bar, tables."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import matplotlib
import numpy as np
import torch
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray
from onepass.cli.demo import Task
from onepass.training.progress import Bar
from onepass.training.table import text_table
from PIL import Image
from torch import Tensor, nn

INK, GREY, LIGHT = "#24292f", "#6b7580", "#e3e7eb"
BLUE, ORANGE, GREEN, RED, VIOLET, YELLOW, TEAL, ROSE = CYCLE = (
    "#2f6aa8", "#d9822b", "#2f9e6e", "#cf3f54", "#8e5bb5", "#9a8a1c", "#2aa1a8", "#c76b9a",
)  # fmt: skip
HALO = [withStroke(linewidth=2.5, foreground="white")]  # for text on top of a plot
STYLE: dict[Any, Any] = {
    "figure.dpi": 110,
    "savefig.dpi": 110,
    "figure.constrained_layout.use": True,
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=CYCLE),
    "text.color": INK,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LIGHT,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "image.cmap": "Blues",
}

T = TypeVar("T")
Numbers = NDArray[np.float64]


@dataclass
class Gallery:
    """The output of an experiment: tables on standard output, plots in a folder."""

    out: Path
    quick: bool = False  # whether to run a few steps only, to check that everything works
    written: list[Path] = field(default_factory=list)

    def print(self, text: str = "") -> None:
        print(text, flush=True)

    def table(self, heads: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Print rows under their heads, with the first column left-aligned and the others right-aligned."""
        self.print(text_table([heads, *([cell(value) for value in row] for row in rows)]))

    @contextmanager
    def picture(
        self, name: str, width: float = 9.0, height: float = 4.0, colors: int | None = None
    ) -> Iterator[Figure]:
        """Yield a new figure of this size in inches, and save it as NAME.png at the end.

        If ``colors`` is given, the image is reduced to that number of colors: a plot of many lines then takes a third
        of the bytes.
        """
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(width, height))
            yield figure
            path = self.path(f"{name}.png")
            figure.savefig(path)
            if colors:
                with Image.open(path) as image:
                    reduced = image.convert("RGB").quantize(colors, dither=Image.Dither.NONE)
                reduced.save(path, optimize=True)

    def path(self, file: str) -> Path:
        """Return the path of a file that is about to be written, and print it."""
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / file
        self.written.append(path)
        self.print(f"-> {path}")
        return path

    def track(self, items: Iterable[T], name: str, note: Callable[[T], str] = lambda _: "") -> Iterator[T]:
        """Yield the items and show a progress bar."""
        items = items if isinstance(items, Sized) else list(items)
        bar = Bar(name, len(items))
        try:
            for done, item in enumerate(items, 1):
                yield item
                bar.show(done, note(item))
        finally:
            bar.close()


def cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def leaf(*numbers: float) -> Tensor:
    """Return a parameter in float64."""
    return torch.tensor(numbers, dtype=torch.float64, requires_grad=True)


@torch.no_grad()
def evaluate(model: nn.Module, task: Task) -> tuple[float, float]:
    """Return loss and accuracy on the held-out digits."""
    inputs, targets = task.held_out
    logits = model(inputs)
    accuracy = (logits.argmax(1) == targets).float().mean()
    return nn.functional.cross_entropy(logits, targets).item(), accuracy.item()


def label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set(title=title, xlabel=x, ylabel=y)


def arrows(axes: Axes, x: Numbers, y: Numbers, color: str, **line: object) -> None:
    """Draw a path as a line, with an arrow in the middle of each step that is long enough."""
    axes.plot(x, y, ".-", color=color, markersize=4, **line)  # type: ignore[arg-type]
    seen = axes.transData.transform(np.column_stack([x, y]))
    for i in range(len(x) - 1):
        if np.hypot(*(seen[i + 1] - seen[i])) > 18:
            middle = (x[i] + x[i + 1]) / 2, (y[i] + y[i + 1]) / 2
            head = {"arrowstyle": "-|>", "mutation_scale": 10, "color": color, "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", middle, (x[i], y[i]), arrowprops=head)


def alone(run: Callable[[Gallery], None]) -> None:
    """Run an experiment's file as a script."""
    module = sys.modules[run.__module__]
    parser = argparse.ArgumentParser(description=(module.__doc__ or "").splitlines()[0])
    add_options(parser)
    args = parser.parse_args()
    run(Gallery(args.out, args.quick))


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("gallery"), metavar="DIR", help="folder; default: gallery")
    parser.add_argument("--quick", action="store_true", help="run a few steps only, to check that everything works")
