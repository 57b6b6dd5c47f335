"""Plot the future learning rates of schedulers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.optim.lr_scheduler import LRScheduler

from ..optimizers.arguments import described
from ..training.figure import axes_to_fill, figure_of
from .preview import preview
from .schedule import step_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray


def plot(
    *schedulers: LRScheduler,
    n: int,
    labels: Sequence[str] | None = None,
    metrics: Iterable[float] | None = None,
    ax: Axes | None = None,
    path: str | PathLike[str] | None = None,
) -> Figure:
    """Plot the learning rates of the next ``n`` steps of one or several schedulers.

    Args:
        schedulers: The schedulers to plot, which are not changed (see :func:`preview`). Parameter groups with equal
            rates share one line.
        n: Number of scheduler steps.
        labels: A label for each scheduler; by default, the name of its class.
        metrics: The metrics assumed for plateaus, as for :func:`preview`.
        ax: Axes to draw into; by default, those of a new figure.
        path: File to save the figure to. Its suffix determines the format (.svg, .pdf, ...); PNG without a suffix. With
            neither path nor axes, the figure is shown by :func:`matplotlib.pyplot.show`.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed; ``pip install onepass[plots]`` installs it.
        TypeError: ``labels`` is a string.
        ValueError: There is no scheduler, or not one label for each. Exceptions of :func:`preview` are passed on.

    Example:
        >>> optimizer = onepass.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
        >>> scheduler = onepass.ScheduleLR(optimizer, "warmup(10) >> cosine(90)")
        >>> figure = onepass.plot(scheduler, n=100, path=folder / "schedule.png")
    """
    if not schedulers:
        raise ValueError("plot: schedulers must be at least one scheduler, got none")
    if isinstance(labels, str):
        raise TypeError(f"plot: labels must be a list of labels, got {described(labels)}")
    if labels is None:
        labels = [type(scheduler).__name__ for scheduler in schedulers]
    if len(labels) != len(schedulers):
        raise ValueError(f"plot: labels must be one label for each of {len(schedulers)} schedulers, got {len(labels)}")
    n = step_count("n", n)
    assumed = None if metrics is None else list(islice(metrics, max(n - 1, 0)))  # a list: read several times
    tables = [preview(scheduler, n, assumed) for scheduler in schedulers]

    lines = [line for label, table in zip(labels, tables, strict=True) for line in _lines(label, table)]
    crowded = len(lines) > _IN_AXES
    with axes_to_fill(ax, path, figsize=(8.4 if crowded else 6.4, 3.6), dpi=120) as filled:
        if ax is None:
            filled.grid(alpha=0.3)
        filled.set_xlabel("optimizer step")
        filled.set_ylabel("learning rate")
        colors = _shades(len(lines)) if crowded else [None] * len(lines)  # None: the axes' default
        drawn = [
            filled.plot(lrs, label=label, color=color)[0] for (label, lrs), color in zip(lines, colors, strict=True)
        ]
        if crowded:
            shown = np.linspace(0, len(drawn) - 1, min(len(drawn), _IN_LEGEND)).round().astype(int)
            handles = [drawn[i] for i in shown]
            filled.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=6, frameon=False)
        else:
            filled.legend()
    return figure_of(filled)


# With more lines than this, the legend is next to the axes, and the colors follow the order of the lines.
_IN_AXES = 8
_IN_LEGEND = 24  # largest number of lines in that legend, evenly spaced


def _lines(label: str, table: NDArray[np.float64]) -> list[tuple[str, NDArray[np.float64]]]:
    """Return the labels and lines of a scheduler: one for all groups with equal rates."""
    same: dict[bytes, list[int]] = {}
    for group, lrs in enumerate(table.T):
        same.setdefault((lrs + 0.0).tobytes(), []).append(group)
    if len(same) == 1:
        return [(label, table[:, 0])]
    return [(f"{label}, {_groups(groups)}", table[:, groups[0]]) for groups in same.values()]


def _groups(numbers: list[int]) -> str:
    """Return the names of groups as text: "group 3", "groups 0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
    return f"group{'s' if len(numbers) > 1 else ''} {', '.join(texts)}"


def _shades(n: int) -> list[Any]:
    """Return the colors of n lines, from dark to light."""
    from matplotlib import colormaps

    return list(colormaps["viridis"](np.linspace(0.0, 0.92, n)))
