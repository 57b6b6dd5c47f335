"""The methods ``preview`` and ``plot`` of onepass's schedulers."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from typing import TYPE_CHECKING

import numpy as np

from .plot import plot
from .preview import preview

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray


class Previewed:
    """Mixin that gives a scheduler the methods ``preview`` and ``plot``."""

    def preview(self, n: int, metrics: Iterable[float] | None = None) -> NDArray[np.float64]:
        """Return the learning rates of the next ``n`` steps, shape (n, groups): :func:`preview` of this scheduler."""
        return preview(self, n, metrics)  # type: ignore[arg-type]

    def plot(
        self,
        n: int,
        *,
        label: str | None = None,
        metrics: Iterable[float] | None = None,
        ax: Axes | None = None,
        path: str | PathLike[str] | None = None,
    ) -> Figure:
        """Plot the learning rates of the next ``n`` steps: :func:`plot` of this scheduler."""
        labels = None if label is None else [label]
        return plot(self, n=n, labels=labels, metrics=metrics, ax=ax, path=path)  # type: ignore[arg-type]
