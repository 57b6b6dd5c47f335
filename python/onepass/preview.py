"""What a scheduler will do, told and drawn before training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch.optim.lr_scheduler import LRScheduler

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def preview(scheduler: LRScheduler, n: int, metrics: Iterable[float] | None = None) -> NDArray[np.float64]:
    """Tells the learning rates of the next ``n`` steps and leaves scheduler and optimizer as they are."""
    raise NotImplementedError


def plot(
    *schedulers: LRScheduler,
    n: int,
    labels: Sequence[str] | None = None,
    metrics: Iterable[float] | None = None,
    ax: Axes | None = None,
    path: str | PathLike[str] | None = None,
) -> Figure:
    """Draws the learning rates of the next ``n`` steps of one scheduler or several."""
    raise NotImplementedError


class Previewed:
    """A scheduler that tells beforehand what it will do."""

    def preview(self, n: int, metrics: Iterable[float] | None = None) -> NDArray[np.float64]:
        """:func:`preview` of this scheduler."""
        return preview(self, n, metrics)  # type: ignore[arg-type]

    def plot(self, n: int, **options: Any) -> Figure:
        """:func:`plot` of this scheduler."""
        return plot(self, n=n, **options)  # type: ignore[arg-type]
