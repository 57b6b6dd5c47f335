"""``python -m onepass schedule``: plot a schedule in the terminal or to a file."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..schedules import Schedule, parse
from ..training.figure import axes_to_fill

if TYPE_CHECKING:
    from numpy.typing import NDArray

_WIDTH, _HEIGHT = 72, 14  # largest size of the plot in the terminal, in characters, without its axes


class _Strokes(NamedTuple):
    """The characters of a plot."""

    blocks: str  # from empty to full, in eighths
    tick: str
    left: str
    corner: str
    bottom: str


_UNICODE = _Strokes(" ▁▂▃▄▅▆▇█", "┤", "│", "└", "─")
_ASCII = _Strokes(" ..::||##", "+", "|", "+", "-")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to the parser."""
    parser.add_argument("expression", nargs="+", help='schedule, such as "warmup(500) >> cosine(10_000)"')
    parser.add_argument("--steps", type=int, metavar="N", help="number of optimizer steps; default: the whole schedule")
    parser.add_argument("--lr", type=float, default=1.0, help="learning rate that the schedule multiplies; default: 1")
    parser.add_argument("--png", type=Path, metavar="FILE", help="plot all schedules to this file (needs matplotlib)")


def text_picture(
    rates: NDArray[np.float64], columns: int = 80, height: int = _HEIGHT, strokes: _Strokes = _UNICODE
) -> str:
    """Return a plot of the learning rate of each step in block characters, with both axes labelled.

    Args:
        rates: Learning rate of each step; at least one.
        columns: Largest length of a line, labels included. A column of the plot shows the mean of its steps.
        height: Number of rows, without the axis.
        strokes: Characters to draw with.

    Returns:
        Lines of text. The lowest row begins at 0, or at the lowest rate if that is negative.
    """
    low, high = min(0.0, rates.min()), max(0.0, rates.max())
    span = (high - low) or 1.0
    labels = {0: f"{high:.4g}", height // 2: f"{low + span * (height - height // 2) / height:.4g}"}
    bottom = f"{low:.4g}"
    margin = max(map(len, [*labels.values(), bottom]))
    width = max(1, min(_WIDTH, columns - margin - 2, len(rates)))
    edges = np.linspace(0, len(rates), width + 1).astype(int)
    means = np.array([rates[a:b].mean() for a, b in pairwise(edges)])
    eighths = np.rint((means - low) / span * height * 8).astype(int)
    lines = []
    for row in range(height):
        filled = np.clip(eighths - 8 * (height - 1 - row), 0, 8)
        tick = strokes.tick if row in labels else strokes.left
        lines.append(f"{labels.get(row, ''):>{margin}} {tick}{''.join(strokes.blocks[n] for n in filled)}".rstrip())
    lines.append(f"{bottom:>{margin}} {strokes.corner}{strokes.bottom * width}")
    last = f"{len(rates) - 1:,}"
    lines.append(f"{'':>{margin}}  0{last:>{max(width - 1, len(last) + 1)}}")
    lines.append(f"{'':>{margin}}  {'optimizer step':^{width}}".rstrip())
    return "\n".join(lines)


def _steps(schedules: list[Schedule]) -> int:
    """Return the number of steps that shows the whole of the longest schedule, including its last value."""
    known = [schedule.length for schedule in schedules if schedule.length is not None]
    if not known:
        raise ValueError("the schedule has no end: pass the number of steps to plot as --steps")
    return max(known) + 1


def _rates(schedule: Schedule, steps: int, lr: float) -> NDArray[np.float64]:
    if not np.isfinite(lr):
        raise ValueError(f"--lr must be finite, got {lr}")
    with np.errstate(over="ignore", invalid="ignore"):
        rates = lr * schedule(np.arange(steps))
        if not np.isfinite(rates.max() - rates.min()):
            raise ValueError(f"{schedule!r} is not finite, or its range is too large to plot")
    return rates


def _draw(path: Path, rates: list[NDArray[np.float64]], labels: list[str], label: str) -> None:
    with axes_to_fill(None, path, figsize=(7, 3.6), dpi=120) as axes:
        for each, text in zip(rates, labels, strict=True):
            axes.plot(np.arange(len(each)), each, label=text)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), prop={"family": "monospace", "size": 9})


def main(args: argparse.Namespace) -> int:
    """Print or plot the schedules; return 2 if one of them cannot be parsed or plotted."""
    label = "learning rate" if args.lr != 1.0 else "factor of the learning rate"
    try:
        schedules = [parse(text) for text in args.expression]
        steps = _steps(schedules) if args.steps is None else args.steps
        if steps < 1:
            raise ValueError(f"--steps must be >= 1, got {steps}")
        rates = [_rates(schedule, steps, args.lr) for schedule in schedules]
        if args.png is not None:
            _draw(args.png, rates, [repr(schedule) for schedule in schedules], label)
            return 0
    except (ImportError, OSError, ValueError, ArithmeticError, MemoryError) as error:
        print(f"onepass schedule: {error}", file=sys.stderr)
        return 2
    columns = shutil.get_terminal_size().columns
    strokes = _UNICODE if _can_print("".join(_UNICODE)) else _ASCII
    for each, schedule in zip(rates, schedules, strict=True):
        title = textwrap.fill(f"{label}: {schedule!r}", columns, break_long_words=False, break_on_hyphens=False)
        print(f"{title}\n{text_picture(each, columns, strokes=strokes)}")
    return 0


def _can_print(text: str) -> bool:
    """Return whether standard output can encode these characters; in an ASCII locale it cannot."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
