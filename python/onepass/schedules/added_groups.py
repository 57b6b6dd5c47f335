"""Parameter groups that are added after a scheduler was created.

After a group was added, torch's schedulers fail in the middle of the next or a later step, or continue without the new
group's initial rate, which compositions need.
"""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer, lr_scheduler, swa_utils

from .plateau_part import PlateauPart
from .rates import initial_lr
from .schedule_lr import ScheduleLR

# Bound at import, because users may replace torch's names by onepass's.
TorchPlateau = lr_scheduler.ReduceLROnPlateau
TorchSWALR = swa_utils.SWALR


def remember_groups(optimizer: Optimizer) -> None:
    """Store the groups for which a scheduler was created."""
    # The dicts, not their list: Combined returns a new list at each access.
    optimizer._scheduled_groups = list(optimizer.param_groups)  # type: ignore[attr-defined]


def was_loaded(optimizer: Optimizer) -> bool:
    """Return whether an optimizer was loaded after the last scheduler was created: that replaces all groups."""
    groups = optimizer.param_groups
    scheduled = set(map(id, getattr(optimizer, "_scheduled_groups", groups)))
    return scheduled.isdisjoint(map(id, groups))


def include_added_groups(scheduler: Any) -> None:
    """Include the parameter groups that were added after a scheduler was created.

    Args:
        scheduler: A scheduler of onepass or torch.

    Raises:
        ValueError: The scheduler, or a part of it, has arguments for each group. Nothing has been changed.
    """
    leaves = leaf_schedulers(scheduler)
    for leaf in leaves:
        _check_added_groups(leaf)
    for leaf in leaves:
        _extend_to_added_groups(leaf)


def leaf_schedulers(scheduler: Any) -> list[Any]:
    """Return a list of the scheduler itself or, for a composition, of its parts, recursively."""
    if hasattr(scheduler, "_schedulers"):
        return [leaf for part in scheduler._schedulers for leaf in leaf_schedulers(part)]
    return [scheduler.plateau if isinstance(scheduler, PlateauPart) else scheduler]


def _scheduled_group_count(scheduler: Any) -> int:
    """Return the number of groups for which a scheduler was created, or all groups if it does not store it."""
    if isinstance(scheduler, TorchPlateau):
        return len(scheduler.min_lrs)
    return len(getattr(scheduler, "base_lrs", scheduler.optimizer.param_groups))


def _check_added_groups(scheduler: Any) -> None:
    """Raise if a scheduler cannot include all groups that were added."""
    if isinstance(scheduler, ScheduleLR):
        scheduler._with_added_groups()
        return
    for index, group in enumerate(scheduler.optimizer.param_groups):
        if index >= _scheduled_group_count(scheduler) and (reason := _unsupported_reason(scheduler, group)):
            raise ValueError(
                f"{type(scheduler).__name__}: parameter group {index} was added after the scheduler was made, and "
                f"{reason}. Make a new scheduler for all groups"
            )


def _extend_to_added_groups(scheduler: Any) -> None:
    """Extend the lists of a scheduler, which is not a composition, to the groups that were added."""
    groups, known = scheduler.optimizer.param_groups, _scheduled_group_count(scheduler)
    if isinstance(scheduler, ScheduleLR):
        scheduler._include_added_groups()
    elif known < len(groups) and not isinstance(scheduler, TorchPlateau):  # plateaus include new groups themselves
        scheduler.base_lrs = [*scheduler.base_lrs, *map(initial_lr, groups[known:])]
        if lambdas := getattr(scheduler, "lr_lambdas", None):
            scheduler.lr_lambdas = [*lambdas, *lambdas[:1] * (len(groups) - len(lambdas))]


def _unsupported_reason(scheduler: Any, group: dict[str, Any]) -> str:
    """Return why a scheduler cannot include a group; "" if it can."""
    lambdas = getattr(scheduler, "lr_lambdas", [])
    if any(f is not lambdas[0] for f in lambdas):
        return "lr_lambda is a list with a function for each group"
    if isinstance(scheduler, TorchPlateau):
        return "min_lr is a list with a number for each group" if scheduler.default_min_lr is None else ""
    if hasattr(scheduler, "max_lrs"):  # CyclicLR
        return "base_lr and max_lr are those of the groups before it"
    needed = ["swa_lr"] if isinstance(scheduler, TorchSWALR) else []
    if hasattr(scheduler, "_schedule_phases"):  # OneCycleLR
        needed = ["initial_lr", "max_lr", "min_lr"]
        needed += ["max_momentum", "base_momentum"] if scheduler.cycle_momentum else []
    missing = [key for key in needed if key not in group]
    return f"has no {', '.join(missing)}" if missing else ""
