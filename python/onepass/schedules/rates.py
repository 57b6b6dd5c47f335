"""The rates of parameter groups, as schedulers read them: a tensor is copied, because it is changed in place later."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..optimizers.arguments import put_number


def copied(value: Any) -> Any:
    """Return a hyperparameter or a tuple of them, with copies of tensors."""
    if isinstance(value, tuple):
        return tuple(map(copied, value))
    return value.clone() if isinstance(value, Tensor) else value


def current_lrs(optimizer: Optimizer) -> list[Any]:
    """Return the learning rates of all groups."""
    return [copied(group["lr"]) for group in optimizer.param_groups]


@contextlib.contextmanager
def own_tensors(optimizer: Optimizer) -> Iterator[None]:
    """Give each group a tensor of its own as its learning rate within this context, if groups share one.

    Code that changes the rate of each group in turn then changes a shared tensor once, not once for each group.
    """
    groups = optimizer.param_groups
    lrs = [group["lr"] for group in groups]
    tensors = [id(lr) for lr in lrs if isinstance(lr, Tensor)]
    if len(set(tensors)) == len(tensors):
        yield
        return
    for group, lr in zip(groups, lrs, strict=True):
        group["lr"] = copied(lr)
    try:
        yield
    finally:
        for group, lr in zip(groups, lrs, strict=True):
            group["lr"] = put_number(lr, group["lr"])


def initial_value(key: str, number: int, group: dict[str, Any], last_epoch: int) -> Any:
    """Return a group's initial value of a hyperparameter; at the beginning of a run, by default its current value.

    Raises:
        KeyError: ``last_epoch`` is that of a later step, and the group has no initial value.
    """
    name = f"initial_{key}"
    if group.get(name) is not None:
        return copied(group[name])
    if last_epoch == -1:
        return copied(group[key])
    raise KeyError(
        f"last_epoch: parameter group {number} has no {name}, so the schedule cannot resume at {last_epoch}. Load the "
        "optimizer's state_dict first"
    )


def initial_lr(group: dict[str, Any]) -> Any:
    """Return a group's ``initial_lr``, which is set to its ``lr`` if it is missing."""
    return copied(group.setdefault("initial_lr", copied(group["lr"])))
