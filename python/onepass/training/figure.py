"""Where a picture goes: into somebody's axes, a file, or a window."""

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
    """Check what :func:`axes_to_fill` needs, before work begins whose result is to be drawn.

    Raises:
        As :func:`axes_to_fill` does.
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
    """Axes to draw into: those given, or of a new figure. It is saved if there is a path, shown if there is neither.

    Raises:
        ImportError: matplotlib is missing.
        OSError: The file's folder does not exist, or the path is one.
        ValueError: matplotlib knows no such suffix.
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
    """The whole figure, also of axes in a part of it."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    return figure
