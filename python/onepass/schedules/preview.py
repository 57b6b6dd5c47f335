"""Compute the future learning rates of a scheduler."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from torch.optim.lr_scheduler import LRScheduler

from ..optimizers.arguments import described
from .schedule import Schedule, step_count
from .scheduler_copy import copy_of_scheduler

if TYPE_CHECKING:
    from numpy.typing import NDArray


def preview(scheduler: LRScheduler, n: int, metrics: Iterable[float] | None = None) -> NDArray[np.float64]:
    """Return the learning rates of the next ``n`` steps, without changing the scheduler or its optimizer.

    A copy of the scheduler is stepped on a stand-in for the optimizer with the same hyperparameters. Functions and
    objects that the scheduler uses are copied with their state, including closures. These are not copied: models,
    parameters, data sets, data loaders, arrays of more than 64 KiB, and state in global variables.

    Args:
        scheduler: Any scheduler, also torch's and your own subclasses.
        n: Number of scheduler steps (optimizer steps or epochs, depending on where ``scheduler.step()`` is called).
        metrics: The metrics assumed for :class:`~torch.optim.lr_scheduler.ReduceLROnPlateau`, alone or within other
            schedulers: at least n - 1 values, one for each step between two rows. Required if the scheduler's ``step``
            requires metrics; ignored by schedulers that take none.

    Returns:
        An array of shape (n, groups). Row 0 has the rates of the next optimizer step, row i those after i further calls
        of ``scheduler.step()``.

    Raises:
        ValueError: ``n`` is negative, or metrics are missing or too few. Exceptions of the scheduler's step are passed
            on, such as that of :class:`~torch.optim.lr_scheduler.OneCycleLR` after its last step.
        TypeError: ``n`` is not an integer, the scheduler has no optimizer, or it reads from a generator or another
            iterator, which a preview would consume.

    Example:
        >>> optimizer = onepass.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
        >>> scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
        >>> onepass.preview(scheduler, 5)[:, 0].tolist()
        [0.5, 0.5, 0.25, 0.25, 0.125]
    """
    if not hasattr(scheduler, "optimizer"):
        hint = ": pass ScheduleLR(optimizer, schedule)" if isinstance(scheduler, Schedule) else ""
        raise TypeError(f"scheduler must be a learning rate scheduler, got {described(scheduler)}{hint}")
    n = step_count("n", n)
    assumed = _steps(scheduler, n - 1, metrics)
    trial = copy_of_scheduler(scheduler)
    lrs = np.empty((n, len(trial.optimizer.param_groups)))
    for i in range(n):
        if i > 0:
            trial.step(*next(assumed))
        lrs[i] = [float(group["lr"]) for group in trial.optimizer.param_groups]
    return lrs


def _steps(scheduler: LRScheduler, n: int, metrics: Iterable[float] | None) -> Iterator[tuple[float, ...]]:
    """Return the arguments of the next n steps."""
    name = type(scheduler).__name__
    takes = inspect.signature(scheduler.step).parameters.get("metrics")
    if takes is None or (metrics is None and takes.default is not takes.empty):
        return iter([()] * n)
    if metrics is None:
        raise ValueError(f"{name} needs metrics to be previewed: one for each of its steps")
    given = [(value,) for value in islice(metrics, max(n, 0))]
    if len(given) < n:
        raise ValueError(f"{name} needs {n} metrics for a preview of {n + 1} steps, but got {len(given)}")
    return iter(given)
