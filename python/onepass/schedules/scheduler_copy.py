"""Copy a scheduler with all that it may change, so that the copy can be stepped."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable, Iterator
from io import IOBase
from types import CellType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch.nn import Module, Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset

from .step_detector import StepDetector


def _own_deepcopy() -> Callable[[Any, dict[int, Any]], Any]:
    """Return deepcopy of a second instance of the module ``copy``, which looks functions up in the memo.

    Since Python 3.14, that of ``copy`` returns functions as they are.
    """
    spec = importlib.util.find_spec("copy")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if hasattr(module, "_atomic_types"):
        module._atomic_types -= {FunctionType}
        module._deepcopy_dispatch[FunctionType] = lambda function, memo: function
    return module.deepcopy  # type: ignore[no-any-return]


_deepcopy = _own_deepcopy()


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


def copy_of_scheduler(scheduler: LRScheduler) -> Any:
    """Return a copy of a scheduler and of all small objects that it may change, with stand-ins for optimizers."""
    reached = _reach(scheduler)
    copies: dict[int, Any] = {}  # deepcopy's memo: the copy, by the id of the original
    optimizers = [x for x in reached if isinstance(x, Optimizer)]
    functions = [x for x in reached if isinstance(x, FunctionType) and _keeps_values(x)]
    for x in reached:
        if isinstance(x, torch.Tensor) and not _is_heavy(x):
            copies[id(x)] = x.detach().clone()  # deepcopy supports leaf tensors only
        elif isinstance(x, StepDetector):
            copies[id(x)] = None  # a stand-in does not step: the copy of a ScheduleLR counts all of its own steps
        elif _is_heavy(x) or not (isinstance(x, Optimizer) or _can_be_copied(x)):
            if isinstance(x, Iterator) and not isinstance(x, IOBase):
                raise TypeError(f"a preview of {type(scheduler).__name__} would use up the {type(x).__name__} it reads")
            copies[id(x)] = x
    # Functions may refer to each other and to themselves, so all are created before any is filled. deepcopy does
    # not copy functions. A cell is a variable, which several functions may share.
    cells = {id(cell): (cell, CellType()) for x in functions for cell in x.__closure__ or ()}
    for x in functions:
        closure = tuple(cells[id(cell)][1] for cell in x.__closure__ or ())
        copies[id(x)] = FunctionType(x.__code__, x.__globals__, x.__name__, None, closure)
    for x in optimizers:
        for group in x.param_groups:
            copies[id(group["params"])] = group["params"]
        copies[id(x)] = _StandIn(x, [_deepcopy(group, copies) for group in x.param_groups])
    for x in functions:
        function = copies[id(x)]
        function.__defaults__ = _deepcopy(x.__defaults__, copies)
        function.__kwdefaults__ = _deepcopy(x.__kwdefaults__, copies)
        function.__dict__.update(_deepcopy(x.__dict__, copies))
    for original, cell in cells.values():
        for value in _contents(original):
            cell.cell_contents = _deepcopy(value, copies)
    return _deepcopy(scheduler, copies)


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
