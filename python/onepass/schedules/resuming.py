"""The additions to ``load_state_dict`` of torch's schedulers."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any, TypeAlias

from torch import Tensor

from ..optimizers.arguments import number
from .added_groups import leaf_schedulers
from .plateau_part import PlateauPart
from .schedule_lr import ScheduleLR


def check_state(scheduler: Any, state: dict[str, Any]) -> None:
    """Raise if a state, or that of a part, has another number of groups or schedulers, or cannot be loaded."""
    if isinstance(scheduler, ScheduleLR):
        scheduler._with_added_groups()._loaded(state)
        return
    name = type(scheduler.plateau if isinstance(scheduler, PlateauPart) else scheduler).__name__
    groups = len(scheduler.optimizer.param_groups)
    if "_last_lr" in state and len(state["_last_lr"]) != groups:
        raise ValueError(
            f"state_dict has {len(state['_last_lr'])} parameter groups, but the optimizer of this {name} has {groups}"
        )
    saved, parts = state.get("_schedulers"), getattr(scheduler, "_schedulers", None)
    if (held := _schedulers(saved)) != (own := _schedulers(parts)):
        raise ValueError(f"state_dict has {held}, but this {name} has {own}")
    for part, part_state in zip(parts or (), saved or (), strict=True):
        check_state(part, part_state)


def _schedulers(parts: list[Any] | None) -> str:
    return "no schedulers" if parts is None else f"{len(parts)} schedulers"


Leaf: TypeAlias = tuple[Any, dict[str, Any]]  # a scheduler that is not a composition, and its state


def finished_and_active_leaves(scheduler: Any, state: dict[str, Any]) -> tuple[list[Leaf], list[Leaf]]:
    """Return the finished leaves of a scheduler, in the order of their last steps, and the active leaves."""
    if not hasattr(scheduler, "_schedulers"):
        return [], [(leaf, state) for leaf in leaf_schedulers(scheduler)]
    finished: list[Leaf] = []
    active: list[Leaf] = []
    current = bisect_right(scheduler._milestones, scheduler.last_epoch) if hasattr(scheduler, "_milestones") else None
    for index, (part, part_state) in enumerate(zip(scheduler._schedulers, state["_schedulers"], strict=True)):
        if current is not None and index > current:
            break  # not started
        earlier, now = finished_and_active_leaves(part, part_state)
        finished += earlier
        (active if current in (None, index) else finished).extend(now)
    return finished, active


def write_momentum(scheduler: Any, state: dict[str, Any]) -> None:
    """Write the momentum or betas at ``last_epoch`` into the groups, if the scheduler sets them.

    For a ScheduleLR, write all of its hyperparameters but the rate, with the values of its state.
    """
    if isinstance(scheduler, ScheduleLR):
        scheduler._write_hyperparameters(state)
        return
    if not getattr(scheduler, "cycle_momentum", False):
        return
    # Parts of a sequence have a negative last_epoch before they start. OneCycleLR raises after its last step.
    if 0 <= scheduler.last_epoch <= getattr(scheduler, "total_steps", scheduler.last_epoch):
        scheduler._get_lr_called_within_step = True  # without it, get_lr, which also sets the momentum, warns
        scheduler.get_lr()
        scheduler._get_lr_called_within_step = False


def set_last_lr(state: dict[str, Any], lrs: list[Any]) -> None:
    """Set ``_last_lr`` of a state and of the states of its parts, including parts of torch's classes."""
    state["_last_lr"] = lrs
    for part in state.get("_schedulers", []):
        if "_last_lr" in part:
            set_last_lr(part, lrs)


def as_number(lr: Any) -> Any:
    """Return a rate, or the number in a tensor."""
    return number(lr) if isinstance(lr, Tensor) else lr
