"""Where a picture goes: into somebody's axes, a file, or a window."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from os import PathLike
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@contextlib.contextmanager
def axes_to_fill(
    ax: Axes | None, path: str | PathLike[str] | None, figsize: tuple[float, float], dpi: int
) -> Iterator[Axes]:
    """Axes to draw into: those given, or of a new figure. It is saved if there is a path, shown if there is neither.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'onepass[plots]'") from error
    options: dict[str, Any] = {"figsize": figsize, "layout": "constrained"}
    shown = ax is None and path is None
    if shown:
        from matplotlib import pyplot

        ax = pyplot.figure(**options).add_subplot()
    elif ax is None:
        ax = Figure(**options).add_subplot()
    yield ax
    if path is not None:
        figure_of(ax).savefig(path, dpi=dpi)
    if shown:
        pyplot.show()


def figure_of(ax: Axes) -> Figure:
    """The whole figure, also of axes in a part of it."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    return figure
