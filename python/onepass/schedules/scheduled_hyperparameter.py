"""A hyperparameter that schedules set, and the schedules that :class:`~onepass.ScheduleLR` takes as arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from ..optimizers.arguments import described, put_number
from .parser import parse
from .rates import initial_value
from .schedule import Schedule

# One schedule (or its text) for all parameter groups, or a list with one for each group.
Schedules: TypeAlias = "Schedule | str | Sequence[Schedule | str]"


def schedules_of_groups(name: str, schedules: Schedules, groups: int) -> list[Schedule]:
    """Return a schedule for each parameter group."""
    if isinstance(schedules, Schedule | str) or not isinstance(schedules, Sequence):
        return [_as_schedule(name, schedules)] * groups
    if len(schedules) != groups:
        raise ValueError(
            f"{name} must be one schedule, or one for each of {groups} parameter groups, got {len(schedules)}"
        )
    return [_as_schedule(name, schedule) for schedule in schedules]


def _as_schedule(name: str, schedule: Schedule | str) -> Schedule:
    """Return the schedule, or the one that a text describes."""
    if isinstance(schedule, str):
        try:
            return parse(schedule)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    if not isinstance(schedule, Schedule):
        hint = (
            ": schedules.function(f) makes a schedule from a function, and LambdaLR takes functions"
            if callable(schedule)
            else ""
        )
        raise TypeError(
            f"{name} must be a Schedule of onepass.schedules, such as warmup(500) >> cosine(10_000), or the text of "
            f"one, got {described(schedule)}{hint}"
        )
    return schedule


def factors_at(schedules: list[Schedule], t: int) -> list[float]:
    """Return the factor of each schedule at a step; computed once for adjacent groups with the same schedule."""
    previous, factor, factors = None, 1.0, []
    for schedule in schedules:
        if schedule is not previous:
            previous, factor = schedule, schedule._held(t)
        factors.append(factor)
    return factors


@dataclass
class ScheduledHyperparameter:
    """A hyperparameter other than the learning rate that schedules set.

    Attributes:
        argument: The argument of ScheduleLR that gave the schedules.
        key: Key of the hyperparameter in the parameter groups.
        index: Index within betas; None for hyperparameters that are not tuples.
        schedules: The schedule of each parameter group.
        bases: The base value of each group, which the schedule multiplies.
    """

    argument: str
    key: str
    index: int | None
    schedules: list[Schedule]
    bases: list[float]

    @property
    def name(self) -> str:
        """The key, with the index within betas: ``"momentum"``, ``"betas[0]"``."""
        return self.key if self.index is None else f"{self.key}[{self.index}]"

    def check(self, number: int, group: dict[str, Any]) -> None:
        """Raise if a group does not have this hyperparameter."""
        held = group.get(self.key)
        if held is None or (self.index is not None and self.index >= len(held)):
            what = self.key if self.index is None else "such beta"
            raise ValueError(f"{self.argument}: parameter group {number} has no {what}")

    def initial(self, number: int, group: dict[str, Any], last_epoch: int) -> Any:
        """Return the initial value of a group, a float or a tuple of all betas. The group is not changed."""
        self.check(number, group)
        initial = initial_value(self.key, number, group, last_epoch)
        return float(initial) if self.index is None else tuple(map(float, initial))

    def with_groups(self, groups: list[dict[str, Any]], last_epoch: int = -1) -> ScheduledHyperparameter:
        """Return this hyperparameter, with the base values of those groups that have none yet.

        The schedule of the first group is also that of groups without a schedule.
        """
        schedules = self.schedules + self.schedules[:1] * (len(groups) - len(self.schedules))
        bases = list(self.bases)
        for number, group in list(enumerate(groups))[len(bases) :]:
            initial = self.initial(number, group, last_epoch)
            bases.append(initial if self.index is None else initial[self.index])
        return replace(self, schedules=schedules, bases=bases)

    def values(self, t: int) -> list[float]:
        """Return the value of each group at a step."""
        values = [base * factor for base, factor in zip(self.bases, factors_at(self.schedules, t), strict=True)]
        if self.index is not None:
            for number, value in enumerate(values):
                if not 0.0 <= value < 1.0:
                    raise ValueError(
                        f"{self.name} of parameter group {number} would be {value} at step {t}, must be in [0, 1)"
                    )
        return values

    def write(self, groups: list[dict[str, Any]], values: list[float]) -> None:
        """Set the hyperparameter of each group; tensors are filled in place."""
        for group, value in zip(groups, values, strict=True):
            if self.index is None:
                group[self.key] = put_number(group[self.key], value)
            else:
                held = list(group[self.key])
                held[self.index] = put_number(held[self.index], value)
                group[self.key] = tuple(held)
