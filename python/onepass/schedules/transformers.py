"""The schedules of transformers, under the same names."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..optimizers.arguments import check_optimizer
from .parts import (
    constant,
    cosine,
    hard_restarts,
    inverse_sqrt,
    linear,
    polynomial,
    sqrt,
    warmup,
)
from .schedule import Schedule, finite_number
from .schedule_lr import ScheduleLR

__all__ = [
    "get_constant_schedule",
    "get_constant_schedule_with_warmup",
    "get_cosine_schedule_with_warmup",
    "get_cosine_with_hard_restarts_schedule_with_warmup",
    "get_cosine_with_min_lr_schedule_with_warmup",
    "get_inverse_sqrt_schedule",
    "get_linear_schedule_with_warmup",
    "get_polynomial_decay_schedule_with_warmup",
    "get_scheduler",
    "get_wsd_schedule",
]

# -- the schedules of transformers -------------------------------------------------------------------------------------
# Names, arguments and rates are those of transformers.optimization, with two exceptions. Two of its cosines rise again
# after the last training step; these are constant there. A last rate (min_lr, lr_end) applies to each parameter group;
# transformers divides it by the optimizer's default lr, and multiplies each group's own lr by the quotient.
# As in transformers, numbers of steps may be fractional: num_warmup_steps=0.1 * total.


def _count(name: str, value: Any) -> float:
    """Return a number >= 0, as an int if it has no fraction."""
    count = finite_number(name, value)
    if count < 0:
        raise ValueError(f"{name} must be >= 0, got {value!r}")
    return int(count) if count.is_integer() else count


def _positive(name: str, value: Any) -> float:
    count = _count(name, value)
    if not count:
        raise ValueError(f"{name} must be > 0, got {value!r}")
    return count


def _part(make: type[Schedule], *args: Any, **kwargs: Any) -> Schedule:
    """Return a part whose numbers of steps and cycles may be fractional, unlike those of the public constructors."""
    wanted = {**dict(zip([field.name for field in fields(make)], args, strict=False)), **kwargs}
    counts = {
        field.name: wanted[field.name] for field in fields(make) if "int" in str(field.type) and field.name in wanted
    }
    part = make(**wanted | {name: math.ceil(count) for name, count in counts.items()})
    for name, count in counts.items():
        object.__setattr__(part, name, count)
    return part


def _steps_after(steps: float, before: float) -> float:
    return max(steps - before, 0)


def _initial_rates(optimizer: Optimizer) -> list[float]:
    check_optimizer("optimizer", optimizer)
    return [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]


def _ending(optimizer: Optimizer, rate: float, make: Callable[[float], Schedule]) -> list[Schedule]:
    """Return a schedule for each group that ends at ``rate``; ``make`` takes the last factor."""
    bases = _initial_rates(optimizer)
    made = {base: make(rate / base if base else 0.0) for base in bases}
    return [made[base] for base in bases]


def get_constant_schedule(optimizer: Optimizer, last_epoch: int = -1) -> ScheduleLR:
    """Return a scheduler with ``constant()``.

    Args:
        optimizer: The optimizer whose learning rates are set.
        last_epoch: Index of the last completed step, if training is resumed without a ``state_dict``; else -1.

    Returns:
        The scheduler.

    Raises:
        TypeError: ``optimizer`` is not a ``torch.optim.Optimizer``.
        KeyError: ``last_epoch`` is given, and a group does not have its initial values.

    Example:
        >>> optimizer = onepass.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
        >>> scheduler = onepass.lr_scheduler.get_constant_schedule(optimizer)
        >>> [round(lr, 3) for lr in scheduler.preview(3)[:, 0].tolist()]
        [0.5, 0.5, 0.5]
    """
    return ScheduleLR(optimizer, constant(), last_epoch=last_epoch)


def get_constant_schedule_with_warmup(
    optimizer: Optimizer, num_warmup_steps: float, last_epoch: int = -1
) -> ScheduleLR:
    """Return a scheduler with ``warmup(num_warmup_steps) >> constant()``.

    Args:
        optimizer: The optimizer whose learning rates are set.
        num_warmup_steps: Number of steps from 0 to the initial rate, >= 0; may be fractional.
        last_epoch: Index of the last completed step, if training is resumed without a ``state_dict``; else -1.

    Returns:
        The scheduler.

    Raises:
        TypeError: ``optimizer`` is not a ``torch.optim.Optimizer``, or a number is not finite.
        ValueError: ``num_warmup_steps`` is negative.
        KeyError: ``last_epoch`` is given, and a group does not have its initial values.

    Example:
        >>> optimizer = onepass.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
        >>> scheduler = onepass.lr_scheduler.get_constant_schedule_with_warmup(optimizer, num_warmup_steps=2)
        >>> [round(lr, 3) for lr in scheduler.preview(4)[:, 0].tolist()]
        [0.0, 0.25, 0.5, 0.5]
    """
    rise = _part(warmup, _count("num_warmup_steps", num_warmup_steps))
    return ScheduleLR(optimizer, rise >> constant(), last_epoch=last_epoch)


def _rise_and_rest(num_warmup_steps: float, num_training_steps: float) -> tuple[Schedule, float]:
    """Return the warm-up, and the number of steps after it."""
    rise = _count("num_warmup_steps", num_warmup_steps)
    return _part(warmup, rise), _steps_after(_count("num_training_steps", num_training_steps), rise)


def get_linear_schedule_with_warmup(
    optimizer: Optimizer, num_warmup_steps: float, num_training_steps: float, last_epoch: int = -1
) -> ScheduleLR:
    """Return a scheduler with ``warmup(..) >> linear(..)``, which is 0 after ``num_training_steps``.

    Args:
        optimizer: The optimizer whose learning rates are set.
        num_warmup_steps: Number of steps from 0 to the initial rate, >= 0; may be fractional.
        num_training_steps: Number of all steps, including the warm-up, >= 0; may be fractional.
        last_epoch: Index of the last completed step, if training is resumed without a ``state_dict``; else -1.

    Returns:
        The scheduler.

    Raises:
        TypeError: ``optimizer`` is not a ``torch.optim.Optimizer``, or a number is not finite.
        ValueError: A number of steps is negative.
        KeyError: ``last_epoch`` is given, and a group does not have its initial values.

    Example:
        >>> optimizer = onepass.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
        >>> from onepass.lr_scheduler import get_linear_schedule_with_warmup
        >>> scheduler = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=2, num_training_steps=6)
        >>> [round(lr, 3) for lr in scheduler.preview(7)[:, 0].tolist()]
        [0.0, 0.25, 0.5, 0.375, 0.25, 0.125, 0.0]
    """
    rise, rest = _rise_and_rest(num_warmup_steps, num_training_steps)
    return ScheduleLR(optimizer, rise >> _part(linear, rest), last_epoch=last_epoch)


def get_cosine_schedule_with_warmup(
    optimizer: Optimizer,
    num_warmup_steps: float,
    num_training_steps: float,
    num_cycles: float = 0.5,
    last_epoch: int = -1,
) -> ScheduleLR:
    """Return a scheduler with ``warmup(..) >> cosine(.., cycles=num_cycles)``.

    By default, the rate is 0 after ``num_training_steps``.

    Args:
        optimizer: The optimizer whose learning rates are set.
        num_warmup_steps: Number of steps from 0 to the initial rate, >= 0; may be fractional.
        num_training_steps: Number of all steps, including the warm-up, >= 0; may be fractional.
        num_cycles: Number of whole cosine waves, from the initial rate to 0 and back; 0.5 ends at 0.
        last_epoch: Index of the last completed step, if training is resumed without a ``state_dict``; else -1.

    Returns:
        The scheduler.

    Raises:
        TypeError: ``optimizer`` is not a ``torch.optim.Optimizer``, or a number is not finite.
        ValueError: A number of steps is negative.
        KeyError: ``last_epoch`` is given, and a group does not have its initial values.

    Example:
        >>> optimizer = onepass.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
        >>> from onepass.lr_scheduler import get_cosine_schedule_with_warmup
        >>> scheduler = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=2, num_training_steps=6)
        >>> [round(lr, 3) for lr in scheduler.preview(7)[:, 0].tolist()]
        [0.0, 0.25, 0.5, 0.427, 0.25, 0.073, 0.0]
    """
    rise, rest = _rise_and_rest(num_warmup_steps, num_training_steps)
    decay = _part(cosine, rest, cycles=finite_number("num_cycles", num_cycles))
    return ScheduleLR(optimizer, rise >> decay, last_epoch=last_epoch)


def get_cosine_with_hard_restarts_schedule_with_warmup(
    optimizer: Optimizer,
    num_warmup_steps: float,
    num_training_steps: float,
    num_cycles: float = 1,
    last_epoch: int = -1,
) -> ScheduleLR:
    """Return a scheduler with ``warmup(..) >> hard_restarts(.., cycles=num_cycles)``.

    The rate is 0 after ``num_training_steps``.

    Args:
        optimizer: The optimizer whose learning rates are set.
        num_warmup_steps: Number of steps from 0 to the initial rate, >= 0; may be fractional.
        num_training_steps: Number of all steps, including the warm-up, >= 0; may be fractional.
        num_cycles: Number of falls from the initial rate to 0, each half a cosine wave, > 0. The rate restarts after
            each but the last.
        last_epoch: Index of the last completed step, if training is resumed without a ``state_dict``; else -1.

    Returns:
        The scheduler.

    Raises:
        TypeError: ``optimizer`` is not a ``torch.optim.Optimizer``, or a number is not finite.
        ValueError: A number of steps is negative, or ``num_cycles`` is not > 0.
        KeyError: ``last_epoch`` is given, and a group does not have its initial values.

    Example:
        >>> optimizer = onepass.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
        >>> from onepass.lr_scheduler import get_cosine_with_hard_restarts_schedule_with_warmup
        >>> scheduler = get_cosine_with_hard_restarts_schedule_with_warmup(optimizer, 2, 6, num_cycles=2)
        >>> [round(lr, 3) for lr in scheduler.preview(7)[:, 0].tolist()]
        [0.0, 0.25, 0.5, 0.25, 0.5, 0.25, 0.0]
    """
    rise, rest = _rise_and_rest(num_warmup_steps, num_training_steps)
    decay = _part(hard_restarts, rest, _positive("num_cycles", num_cycles))
    return ScheduleLR(optimizer, rise >> decay, last_epoch=last_epoch)


def get_polynomial_decay_schedule_with_warmup(
    optimizer: Optimizer,
    num_warmup_steps: float,
    num_training_steps: float,
    lr_end: float = 1e-7,
    power: float = 1.0,
    last_epoch: int = -1,
) -> ScheduleLR:
    """Return a scheduler with ``warmup(..) >> polynomial(.., power, end=lr_end / lr)``, with each group's lr.

    Args:
        optimizer: The optimizer whose learning rates are set.
        num_warmup_steps: Number of steps from 0 to the initial rate, >= 0; may be fractional.
        num_training_steps: Number of all steps, including the warm-up, >= 0; may be fractional.
        lr_end: Last learning rate of each parameter group.
        power: Exponent of the fraction of the steps that is left, > 0; 1.0 is a straight line.
        last_epoch: Index of the last completed step, if training is resumed without a ``state_dict``; else -1.

    Returns:
        The scheduler.

    Raises:
        TypeError: ``optimizer`` is not a ``torch.optim.Optimizer``, or a number is not finite.
        ValueError: A number of steps is negative, ``power`` is not > 0, or ``lr_end`` is not below the lr of a
            parameter group whose lr is not 0.
        KeyError: ``last_epoch`` is given, and a group does not have its initial values.

    Example:
        >>> optimizer = onepass.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
        >>> scheduler = onepass.lr_scheduler.get_polynomial_decay_schedule_with_warmup(optimizer, 2, 6, lr_end=0.1)
        >>> [round(lr, 3) for lr in scheduler.preview(7)[:, 0].tolist()]
        [0.0, 0.25, 0.5, 0.4, 0.3, 0.2, 0.1]
    """
    rise, rest = _rise_and_rest(num_warmup_steps, num_training_steps)
    lr_end = finite_number("lr_end", lr_end)
    for number, lr in enumerate(_initial_rates(optimizer)):
        if lr and not lr > lr_end:
            raise ValueError(f"lr_end must be below the lr of each parameter group, got {lr_end}; that of group "
                             f"{number} is {lr}")  # fmt: skip
    exponent = _positive("power", power)
    schedules = _ending(optimizer, lr_end, lambda end: rise >> _part(polynomial, rest, exponent, end=end))
    return ScheduleLR(optimizer, schedules, last_epoch=last_epoch)


def get_inverse_sqrt_schedule(
    optimizer: Optimizer, num_warmup_steps: float, timescale: float | None = None, last_epoch: int = -1
) -> ScheduleLR:
    """Return a scheduler with ``warmup(..) >> inverse_sqrt(timescale)``.

    Args:
        optimizer: The optimizer whose learning rates are set.
        num_warmup_steps: Number of steps from 0 to the initial rate, >= 0; may be fractional.
        timescale: Number of steps, > 0: the rate is half the initial rate 3 * timescale steps after the warm-up. None:
            ``num_warmup_steps``, or 10,000 if that is 0.
        last_epoch: Index of the last completed step, if training is resumed without a ``state_dict``; else -1.

    Returns:
        The scheduler.

    Raises:
        TypeError: ``optimizer`` is not a ``torch.optim.Optimizer``, or a number is not finite.
        ValueError: ``num_warmup_steps`` is negative, or ``timescale`` is not > 0.
        KeyError: ``last_epoch`` is given, and a group does not have its initial values.

    Example:
        >>> optimizer = onepass.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
        >>> scheduler = onepass.lr_scheduler.get_inverse_sqrt_schedule(optimizer, num_warmup_steps=2)
        >>> [round(lr, 3) for lr in scheduler.preview(5)[:, 0].tolist()]
        [0.0, 0.25, 0.5, 0.408, 0.354]
    """
    rise = _count("num_warmup_steps", num_warmup_steps)
    decay = _part(inverse_sqrt, rise or 10_000 if timescale is None else _positive("timescale", timescale))
    return ScheduleLR(optimizer, _part(warmup, rise) >> decay, last_epoch=last_epoch)


def get_cosine_with_min_lr_schedule_with_warmup(
    optimizer: Optimizer,
    num_warmup_steps: float,
    num_training_steps: float,
    num_cycles: float = 0.5,
    last_epoch: int = -1,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
) -> ScheduleLR:
    """Return a scheduler with ``warmup(..) >> cosine(.., end=min_lr_rate)``.

    Args:
        optimizer: The optimizer whose learning rates are set.
        num_warmup_steps: Number of steps from 0 to the initial rate, >= 0; may be fractional.
        num_training_steps: Number of all steps, including the warm-up, >= 0; may be fractional.
        num_cycles: Number of whole cosine waves between the initial and the last rate; 0.5 ends at the last rate.
        last_epoch: Index of the last completed step, if training is resumed without a ``state_dict``; else -1.
        min_lr: Lowest learning rate, of each parameter group.
        min_lr_rate: Lowest learning rate as a fraction of the initial rate.

    Returns:
        The scheduler.

    Raises:
        TypeError: ``optimizer`` is not a ``torch.optim.Optimizer``, or a number is not finite.
        ValueError: A number of steps is negative, or not exactly one of ``min_lr`` and ``min_lr_rate`` is given.
        KeyError: ``last_epoch`` is given, and a group does not have its initial values.

    Example:
        >>> optimizer = onepass.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
        >>> scheduler = onepass.lr_scheduler.get_cosine_with_min_lr_schedule_with_warmup(optimizer, 2, 6, min_lr=0.1)
        >>> [round(lr, 3) for lr in scheduler.preview(7)[:, 0].tolist()]
        [0.0, 0.25, 0.5, 0.441, 0.3, 0.159, 0.1]
    """
    if (min_lr is None) == (min_lr_rate is None):
        raise ValueError("min_lr, min_lr_rate: exactly one of them must be given")
    rise, rest = _rise_and_rest(num_warmup_steps, num_training_steps)

    def ending(end: float) -> Schedule:
        return rise >> _part(cosine, rest, end=end, cycles=finite_number("num_cycles", num_cycles))

    if min_lr is None:
        return ScheduleLR(optimizer, ending(finite_number("min_lr_rate", min_lr_rate)), last_epoch=last_epoch)
    return ScheduleLR(optimizer, _ending(optimizer, finite_number("min_lr", min_lr), ending), last_epoch=last_epoch)


def get_wsd_schedule(
    optimizer: Optimizer,
    num_warmup_steps: float,
    num_decay_steps: float,
    num_training_steps: float | None = None,
    num_stable_steps: float | None = None,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    min_lr_ratio: float = 0,
    num_cycles: float = 0.5,
    last_epoch: int = -1,
) -> ScheduleLR:
    """Return a scheduler with ``warmup(..) >> constant(..) >> cosine(..) >> constant(value=min_lr_ratio)``.

    Args:
        optimizer: The optimizer whose learning rates are set.
        num_warmup_steps: Number of steps of the rise, >= 0; may be fractional.
        num_decay_steps: Number of steps of the fall, >= 0; may be fractional.
        num_training_steps: Number of all steps, >= 0; may be fractional. Required without ``num_stable_steps``.
        num_stable_steps: Number of steps at the initial rate, >= 0. None: ``num_training_steps`` minus the steps of
            rise and fall.
        warmup_type: Form of the rise: "linear", "cosine" or "1-sqrt".
        decay_type: Form of the fall: one of the same.
        min_lr_ratio: First and last rate as a fraction of the initial rate.
        num_cycles: For ``decay_type="cosine"``: number of whole cosine waves; 0.5 ends at the last rate.
        last_epoch: Index of the last completed step, if training is resumed without a ``state_dict``; else -1.

    Returns:
        The scheduler.

    Raises:
        TypeError: ``optimizer`` is not a ``torch.optim.Optimizer``, or a number is not finite.
        ValueError: A number of steps is negative, neither ``num_training_steps`` nor ``num_stable_steps`` is given,
            or a type is unknown.
        KeyError: ``last_epoch`` is given, and a group does not have its initial values.

    Example:
        >>> optimizer = onepass.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
        >>> from onepass.lr_scheduler import get_wsd_schedule
        >>> scheduler = get_wsd_schedule(optimizer, num_warmup_steps=2, num_decay_steps=2, num_training_steps=6)
        >>> [round(lr, 3) for lr in scheduler.preview(7)[:, 0].tolist()]
        [0.0, 0.25, 0.5, 0.5, 0.5, 0.25, 0.0]
    """
    low = finite_number("min_lr_ratio", min_lr_ratio)
    rise, fall = _count("num_warmup_steps", num_warmup_steps), _count("num_decay_steps", num_decay_steps)
    rises = {
        "linear": _part(warmup, rise, low),
        "cosine": _part(cosine, rise, low, 1.0),
        "1-sqrt": _part(polynomial, rise, 0.5, low, 1.0),
    }
    falls = {
        "linear": _part(linear, fall, end=low),
        "cosine": _part(cosine, fall, end=low, cycles=finite_number("num_cycles", num_cycles)),
        "1-sqrt": _part(sqrt, fall, end=low),
    }
    for name, chosen in (("warmup_type", warmup_type), ("decay_type", decay_type)):
        if chosen not in rises:
            raise ValueError(f"{name}: {chosen!r} is not known; known are {', '.join(rises)}")
    if num_stable_steps is None:
        if num_training_steps is None:
            raise ValueError("num_training_steps, num_stable_steps: one of them must be given")
        stable = _steps_after(_count("num_training_steps", num_training_steps), rise + fall)
    else:
        stable = _count("num_stable_steps", num_stable_steps)
        if num_training_steps is not None:
            warnings.warn("num_stable_steps is given, so num_training_steps is not used", UserWarning, stacklevel=2)
    stages = rises[warmup_type] >> _part(constant, stable) >> falls[decay_type] >> constant(value=low)
    return ScheduleLR(optimizer, stages, last_epoch=last_epoch)


_BY_NAME: dict[str, Callable[..., ScheduleLR]] = {
    "linear": get_linear_schedule_with_warmup,
    "cosine": get_cosine_schedule_with_warmup,
    "cosine_with_restarts": get_cosine_with_hard_restarts_schedule_with_warmup,
    "polynomial": get_polynomial_decay_schedule_with_warmup,
    "constant": get_constant_schedule,
    "constant_with_warmup": get_constant_schedule_with_warmup,
    "inverse_sqrt": get_inverse_sqrt_schedule,
    "cosine_with_min_lr": get_cosine_with_min_lr_schedule_with_warmup,
    "warmup_stable_decay": get_wsd_schedule,
}


def get_scheduler(
    name: str,
    optimizer: Optimizer,
    num_warmup_steps: float | None = None,
    num_training_steps: float | None = None,
    scheduler_specific_kwargs: dict[str, Any] | None = None,
) -> LRScheduler:
    """Return a scheduler by its name in transformers (``lr_scheduler_type``).

    Args:
        name: "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
            "inverse_sqrt", "cosine_with_min_lr", "warmup_stable_decay", "reduce_lr_on_plateau"; or a member of
            transformers' ``SchedulerType``.
        optimizer: The optimizer whose learning rates are set.
        num_warmup_steps: Required unless the name is "constant" or "reduce_lr_on_plateau".
        num_training_steps: Required unless the name is one of these, "constant_with_warmup" or "inverse_sqrt".
        scheduler_specific_kwargs: Further arguments of the schedule's function; ignored by the two constant ones.

    Returns:
        A :class:`~onepass.ScheduleLR`, or :class:`~onepass.lr_scheduler.ReduceLROnPlateau`.

    Raises:
        ValueError: The name is unknown, or a number of steps is missing.
        TypeError: The schedule's function has no such argument.

    Example:
        >>> optimizer = onepass.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
        >>> from onepass.lr_scheduler import get_scheduler
        >>> scheduler = get_scheduler("linear", optimizer, num_warmup_steps=2, num_training_steps=6)
        >>> [round(lr, 3) for lr in scheduler.preview(7)[:, 0].tolist()]
        [0.0, 0.25, 0.5, 0.375, 0.25, 0.125, 0.0]
    """
    known = getattr(name, "value", name)
    more = scheduler_specific_kwargs or {}
    if known == "reduce_lr_on_plateau":
        from .. import lr_scheduler  # which imports this module

        return lr_scheduler.ReduceLROnPlateau(optimizer, **more)
    if known not in _BY_NAME:
        raise ValueError(f"name: {known!r} is not known; known are {', '.join(_BY_NAME)}, reduce_lr_on_plateau")
    make = _BY_NAME[known]
    taken = inspect.signature(make).parameters
    counts = {"num_warmup_steps": num_warmup_steps, "num_training_steps": num_training_steps}
    counts = {argument: count for argument, count in counts.items() if argument in taken}
    for argument, count in counts.items():
        if count is None and taken[argument].default is inspect.Parameter.empty:
            raise ValueError(f"{argument}: the schedule {known!r} needs it")
    return make(optimizer, **counts, **({} if known in ("constant", "constant_with_warmup") else more))
