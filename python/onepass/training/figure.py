"""The targets of a plot: given axes, a file, or a window."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def check_path(path: str | PathLike[str] | None) -> None:
    """Check that a plot can be saved to this path, before the work whose result is plotted begins.

    Raises:
        The same errors as :func:`axes_to_fill`.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'onepass[plots]'") from error
    if path is None:
        return
    file = Path(path)
    if not file.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file.parent))
    if file.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
    suffix, known = file.suffix.removeprefix(".").lower(), Figure().canvas.get_supported_filetypes()
    if suffix and suffix not in known:
        raise ValueError(f"{file}: {suffix!r} is not supported, only {', '.join(sorted(known))}")


@contextlib.contextmanager
def axes_to_fill(
    ax: Axes | None, path: str | PathLike[str] | None, figsize: tuple[float, float], dpi: int
) -> Iterator[Axes]:
    """Yield the axes to draw into: ``ax``, or the axes of a new figure.

    At the end of the context the figure is saved if ``path`` is given, and shown if neither is given.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: The file's folder does not exist, or ``path`` is a folder.
        ValueError: matplotlib does not support the path's suffix.
    """
    check_path(path)
    from matplotlib.figure import Figure

    options: dict[str, Any] = {"figsize": figsize, "layout": "constrained"}
    shown = ax is None and path is None
    if shown:
        from matplotlib import pyplot

        ax = pyplot.figure(**options).add_subplot()
    elif ax is None:
        ax = Figure(**options).add_subplot()
    yield ax
    if path is not None:
        # matplotlib would append a suffix to a path that has none.
        figure_of(ax).savefig(path, dpi=dpi, format=None if Path(path).suffix else "png")
    if shown:
        pyplot.show()


def figure_of(ax: Axes) -> Figure:
    """Return the whole figure, even if the axes are in a subfigure."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    return figure
