"""Compute and plot the future learning rates of a scheduler."""

from __future__ import annotations

import copy
import gc
import inspect
from collections.abc import Iterable, Iterator, Sequence
from io import IOBase
from itertools import islice
from os import PathLike
from types import CellType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import Module, Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset

from ..optimizers.arguments import whole
from ..training.figure import axes_to_fill, figure_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray


def preview(scheduler: LRScheduler, n: int, metrics: Iterable[float] | None = None) -> NDArray[np.float64]:
    """Return the learning rates of the next ``n`` steps, without changing the scheduler or its optimizer.

    A copy of the scheduler is stepped on a stand-in for the optimizer with the same hyperparameters. Functions and
    objects that the scheduler uses are copied with their state, including closures. Models, parameters, data sets, data
    loaders and arrays of more than 64 KiB to which they refer are not copied. State in global variables is not copied.

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
        raise TypeError(f"{type(scheduler).__name__} is not a scheduler: it has no optimizer")
    n = whole("n", n)
    if n < 0:
        raise ValueError(f"n must be >= 0, got {n}")
    assumed = _steps(scheduler, n - 1, metrics)
    trial = _copy(scheduler)
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


class _StandIn(Optimizer):
    """A stand-in for an optimizer: it has its own param_groups and reads all other attributes from the original."""

    def __init__(self, original: Optimizer, param_groups: list[dict[str, Any]]) -> None:
        self.original = original
        self.param_groups = param_groups
        self._opt_called = True  # a scheduler warns if the optimizer was not stepped before

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["original"], name)

    def step(self, closure: Any = None) -> Any:
        raise RuntimeError("a preview does not step the optimizer")

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # a scheduler warns if step was replaced


def _copy(scheduler: LRScheduler) -> Any:
    """Return a copy of a scheduler and of all small objects that it may change, with stand-ins for optimizers."""
    reached = _reach(scheduler)
    copies: dict[int, Any] = {}  # deepcopy's memo: the copy, by the id of the original
    optimizers = [x for x in reached if isinstance(x, Optimizer)]
    functions = [x for x in reached if isinstance(x, FunctionType) and _keeps_values(x)]
    for x in reached:
        if isinstance(x, torch.Tensor) and not _is_heavy(x):
            copies[id(x)] = x.detach().clone()  # deepcopy supports leaf tensors only
        elif _is_heavy(x) or not (isinstance(x, Optimizer) or _can_be_copied(x)):
            if isinstance(x, Iterator) and not isinstance(x, IOBase):
                raise TypeError(f"a preview of {type(scheduler).__name__} would use up the {type(x).__name__} it reads")
            copies[id(x)] = x
    # Functions may refer to each other and to themselves, so all are created before any is filled. deepcopy does
    # not copy functions.
    for x in functions:
        cells = tuple(CellType() for _ in x.__closure__ or ())
        copies[id(x)] = FunctionType(x.__code__, x.__globals__, x.__name__, None, cells)
    for x in optimizers:
        for group in x.param_groups:
            copies[id(group["params"])] = group["params"]
        copies[id(x)] = _StandIn(x, [copy.deepcopy(group, copies) for group in x.param_groups])
    for x in functions:
        function = copies[id(x)]
        function.__defaults__ = copy.deepcopy(x.__defaults__, copies)
        function.__kwdefaults__ = copy.deepcopy(x.__kwdefaults__, copies)
        function.__dict__.update(copy.deepcopy(x.__dict__, copies))
        for cell, original in zip(function.__closure__ or (), x.__closure__ or (), strict=True):
            for value in _contents(original):
                cell.cell_contents = copy.deepcopy(value, copies)
    return copy.deepcopy(scheduler, copies)


def _reach(scheduler: LRScheduler) -> list[Any]:
    """Return all objects reachable from a scheduler, except immutable ones and the contents of heavy ones."""
    atoms = (type, ModuleType, str, bytes, int, float, type(None))
    reached: dict[int, Any] = {}
    found: list[Any] = [scheduler]
    while found:
        x = found.pop()
        if id(x) in reached or isinstance(x, atoms):
            continue
        reached[id(x)] = x
        if isinstance(x, Optimizer):
            found += [value for group in x.param_groups for key, value in group.items() if key != "params"]
        elif isinstance(x, FunctionType):  # without its globals, from which everything is reachable
            found += [value for cell in x.__closure__ or () for value in _contents(cell)]
            found += [x.__defaults__, x.__kwdefaults__, x.__dict__]
        elif not _is_heavy(x) and _can_be_copied(x):
            found += gc.get_referents(x)
    return list(reached.values())


def _is_heavy(x: Any) -> bool:
    """Return whether an object is too large to be the state of a scheduler: models, parameters, data, large arrays."""
    if isinstance(x, torch.Tensor | np.ndarray):
        return isinstance(x, Parameter) or x.nbytes > 1 << 16
    return isinstance(x, Module | DataLoader | Dataset)


def _keeps_values(function: FunctionType) -> bool:
    return bool(function.__closure__ or function.__defaults__ or function.__kwdefaults__)


def _contents(cell: CellType) -> list[Any]:
    """Return the content of a closure cell as a list, empty if the variable is not assigned yet."""
    try:
        return [cell.cell_contents]
    except ValueError:
        return []


def _can_be_copied(x: Any) -> bool:
    """Return whether deepcopy can copy an object. Objects that it cannot copy, such as locks and files, are shared."""
    if hasattr(x, "__deepcopy__"):
        return True
    try:
        x.__reduce_ex__(4)
    except Exception:  # user code may raise anything
        return False
    return True


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
        ValueError: There is no scheduler, or not one label for each. Exceptions of :func:`preview` are passed on.

    Example:
        >>> optimizer = onepass.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
        >>> scheduler = onepass.ScheduleLR(optimizer, "warmup(10) >> cosine(90)")
        >>> figure = onepass.plot(scheduler, n=100, path=folder / "schedule.png")
    """
    if not schedulers:
        raise ValueError("no scheduler to draw")
    if labels is None:
        labels = [type(scheduler).__name__ for scheduler in schedulers]
    if len(labels) != len(schedulers):
        raise ValueError(f"expected a label for each of {len(schedulers)} schedulers, but got {len(labels)}")
    n = whole("n", n)
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


# With more lines than this, the legend is beside the axes, and the colors follow the order of the lines.
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
