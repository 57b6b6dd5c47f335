"""Schedulers that multiply the previous rate by a factor, and start at their closed form where that rate is zero.

No factor changes a rate of zero. torch's classes start at the current rate of the optimizer, so a second scheduler on
an optimizer whose rate is zero stays at zero.
"""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer, lr_scheduler

from ..optimizers.arguments import put_number
from .rates import current_lrs
from .torch_base import LRScheduler


class CosineAnnealingLR(LRScheduler, lr_scheduler.CosineAnnealingLR):
    """Cosine annealing: ``eta_min + (lr(0) - eta_min) (1 + cos(pi t / T_max)) / 2``; periodic after ``T_max``.

    If an earlier scheduler has reduced the optimizer's rate to ``eta_min``, a new scheduler starts at the value of the
    formula: the optimizer's ``initial_lr`` or, with ``last_epoch``, the rate of a later step. torch's class stays at
    ``eta_min``.

    Args:
        optimizer: The optimizer whose rates are set.
        T_max: Number of steps from the highest rate to the lowest.
        eta_min: The lowest rate.
        last_epoch: Index of the last completed step, to resume a run; -1 for a new run.

    Source: Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", arXiv:1608.03983 (without
    the restarts).

    Example:
        >>> optimizer = onepass.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
        >>> scheduler = onepass.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
        >>> [round(lr, 3) for lr in scheduler.preview(5)[:, 0].tolist()]
        [0.5, 0.427, 0.25, 0.073, 0.0]
    """

    def __init__(self, optimizer: Optimizer, T_max: int, eta_min: float = 0.0, last_epoch: int = -1) -> None:  # noqa: N803
        may_replace = _may_replace_rates(optimizer)
        super().__init__(optimizer, T_max, eta_min, last_epoch)
        if may_replace:
            _replace_stuck_rates(self, eta_min, T_max)


class LinearLR(LRScheduler, lr_scheduler.LinearLR):
    """Linear change from ``start_factor lr(0)`` to ``end_factor lr(0)`` in ``total_iters`` steps, then constant.

    On an optimizer whose rate is zero, it starts at the value of the formula; torch's class stays at zero.

    Args:
        optimizer: The optimizer whose rates are set.
        start_factor: Factor at t = 0, in (0, 1].
        end_factor: Factor at t = total_iters, in [0, 1].
        total_iters: Number of steps from ``start_factor`` to ``end_factor``.
        last_epoch: Index of the last completed step, to resume a run; -1 for a new run.

    Raises:
        ValueError: A factor is out of range.

    Example:
        >>> optimizer = onepass.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
        >>> scheduler = onepass.lr_scheduler.LinearLR(optimizer, start_factor=0.5, total_iters=2)
        >>> [round(lr, 3) for lr in scheduler.preview(4)[:, 0].tolist()]
        [0.25, 0.375, 0.5, 0.5]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        start_factor: float = 1.0 / 3,
        end_factor: float = 1.0,
        total_iters: int = 5,
        last_epoch: int = -1,
    ) -> None:
        may_replace = _may_replace_rates(optimizer)
        super().__init__(optimizer, start_factor, end_factor, total_iters, last_epoch)
        if may_replace:
            _replace_stuck_rates(self, 0.0, total_iters)


class PolynomialLR(LRScheduler, lr_scheduler.PolynomialLR):
    """Polynomial decay: ``lr(0) (1 - t / total_iters) ** power``, then zero.

    On an optimizer whose rate is zero, it starts at the value of the formula; torch's class stays at zero.

    Args:
        optimizer: The optimizer whose rates are set.
        total_iters: Number of steps to zero.
        power: The exponent.
        last_epoch: Index of the last completed step, to resume a run; -1 for a new run.

    Example:
        >>> optimizer = onepass.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
        >>> scheduler = onepass.lr_scheduler.PolynomialLR(optimizer, total_iters=4, power=2.0)
        >>> [round(lr, 3) for lr in scheduler.preview(5)[:, 0].tolist()]
        [0.5, 0.281, 0.125, 0.031, 0.0]
    """

    def __init__(self, optimizer: Optimizer, total_iters: int = 5, power: float = 1.0, last_epoch: int = -1) -> None:
        may_replace = _may_replace_rates(optimizer)
        super().__init__(optimizer, total_iters, power, last_epoch)
        if may_replace:
            _replace_stuck_rates(self, 0.0, total_iters)


def _may_replace_rates(optimizer: Optimizer) -> bool:
    """Return whether a new scheduler may replace the current rates: an earlier link of a new chain did not set them."""
    has_scheduler = hasattr(getattr(optimizer, "step", None), "_wrapped_by_lr_sched")
    return not has_scheduler or getattr(optimizer, "_opt_called", False)


def _replace_stuck_rates(scheduler: Any, floor: float, steps: int) -> None:
    """Set rates that the recursion cannot change (at ``floor``) to the scheduler's closed form."""
    groups = scheduler.optimizer.param_groups
    # The tolerance is for the recursion's rounding errors.
    stuck = [abs(g["lr"] - floor) <= 1e-12 * abs(base) for g, base in zip(groups, scheduler.base_lrs, strict=True)]
    if not steps or not any(stuck):
        return  # a schedule without steps has no closed form
    for group, is_stuck, lr in zip(groups, stuck, scheduler._get_closed_form_lr(), strict=True):
        if is_stuck:
            group["lr"] = put_number(group["lr"], lr)
    scheduler._last_lr = current_lrs(scheduler.optimizer)
