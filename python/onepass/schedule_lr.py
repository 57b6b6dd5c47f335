"""What drives an optimizer by schedules: :class:`ScheduleLR`, and the well-known schedules of transformers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import mul
from typing import Any, SupportsFloat, TypeAlias
from weakref import ref

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ._native import described, put_number, unwrapped
from .previewing import Previewed
from .schedules import (
    Schedule,
    constant,
    cosine,
    hard_restarts,
    inverse_sqrt,
    linear,
    parse,
    polynomial,
    sqrt,
    warmup,
)

__all__ = [
    "ScheduleLR",
    "get_constant_schedule",
    "get_constant_schedule_with_warmup",
    "get_cosine_schedule_with_warmup",
    "get_cosine_with_hard_restarts_schedule_with_warmup",
    "get_cosine_with_min_lr_schedule_with_warmup",
    "get_inverse_sqrt_schedule",
    "get_linear_schedule_with_warmup",
    "get_polynomial_decay_schedule_with_warmup",
    "get_wsd_schedule",
]

# One schedule (or the text of one) for all parameter groups, or a list with one for each.
Schedules: TypeAlias = "Schedule | str | Sequence[Schedule | str]"


def _per_group(name: str, schedules: Schedules, groups: int) -> list[Schedule]:
    """A schedule for each parameter group."""
    if isinstance(schedules, Schedule | str) or not isinstance(schedules, Sequence):
        return [_schedule(name, schedules)] * groups
    if len(schedules) != groups:
        raise ValueError(f"{name}: there are {len(schedules)} schedules for {groups} parameter groups")
    return [_schedule(name, schedule) for schedule in schedules]


def _schedule(name: str, schedule: Schedule | str) -> Schedule:
    if isinstance(schedule, str):
        try:
            return parse(schedule)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    if not isinstance(schedule, Schedule):
        hint = (
            ": schedules.function(f) makes one of a function, and LambdaLR takes functions"
            if callable(schedule)
            else ""
        )
        raise TypeError(
            f"{name}: must be a Schedule of onepass.schedules, such as warmup(500) >> cosine(10_000), or the text of "
            f"one, got {described(schedule)}{hint}"
        )
    return schedule


def _factors(schedules: list[Schedule], t: int) -> list[float]:
    """What each says at a step; one that is the same as the group before has is not asked again."""
    asked, factor, factors = None, 1.0, []
    for schedule in schedules:
        if schedule is not asked:
            asked, factor = schedule, schedule._held(t)
        factors.append(factor)
    return factors


@dataclass
class _Driven:
    """A hyperparameter beside the learning rate that schedules drive.

    Attributes:
        key: Its name in the parameter groups.
        index: Which of betas it is; None if it is no tuple.
        schedules: One for each parameter group.
        bases: For each group, the value that the schedule multiplies.
    """

    key: str
    index: int | None
    schedules: list[Schedule]
    bases: list[float]

    @property
    def name(self) -> str:
        return self.key if self.index is None else f"{self.key}[{self.index}]"

    def write(self, groups: list[dict[str, Any]], t: int) -> None:
        values = [base * factor for base, factor in zip(self.bases, _factors(self.schedules, t), strict=True)]
        if self.index is not None:
            for number, value in enumerate(values):
                if not 0.0 <= value < 1.0:
                    raise ValueError(
                        f"{self.name} of parameter group {number} would be {value} at step {t}, not in [0, 1)"
                    )
        for group, value in zip(groups, values, strict=True):
            if self.index is None:
                group[self.key] = put_number(group[self.key], value)
            else:
                held = list(group[self.key])
                held[self.index] = put_number(held[self.index], value)
                group[self.key] = tuple(held)


class _RealSteps:
    """Tells whether an optimizer has stepped, skipped steps left out.

    GradScaler does not call an optimizer's step when it has found an inf; of those that take its scale (by
    ``fused=True``) it does, with what it has found in ``found_inf``. A hook sees both.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.stepped = False
        watcher = ref(self)

        def after_step(stepped: Optimizer, _args: Any, _kwargs: Any) -> None:
            watching = watcher()
            if watching is None:
                handle.remove()
            elif not float(getattr(stepped, "found_inf", None) or 0.0):
                watching.stepped = True

        handle = optimizer.register_step_post_hook(after_step)

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        # Copies of an optimizer lose its hooks. So the copy of a scheduler (a preview's) has None, and counts all.
        return type(None), ()

    def take(self) -> bool:
        """Whether there was a step since the last call."""
        stepped, self.stepped = self.stepped, False
        return stepped


class ScheduleLR(Previewed, LRScheduler):
    r"""Sets the learning rate to what it was at first, times a schedule: :math:`lr_t = base\_lr \cdot schedule(t)`.

    t (``last_epoch``) is the number of ``step()`` calls so far. Every rate depends on t alone, so a run that is resumed
    at any step goes on with the same bits: by ``load_state_dict``, or without one by ``last_epoch``.

    Args:
        optimizer: Any optimizer.
        schedule: A :class:`~onepass.schedules.Schedule`, or its text (``"warmup(500) >> cosine(10_000)"``); or a list
            with one for each parameter group.
        weight_decay: Drives ``weight_decay`` likewise: its first value times this schedule (or these).
        momentum: Drives ``momentum`` likewise, or the first of ``betas`` where the optimizer has betas.
        betas: A tuple of schedules (or lists) that drive the betas, None for those that are not driven.
        plateau: Arguments of ``torch.optim.lr_scheduler.ReduceLROnPlateau``, such as ``{"patience": 3}``. That lowers
            base_lr when a metric has stopped improving, and the schedule multiplies what is left of it. So ``min_lr``
            and ``eps`` are about base_lr.
        count_skipped: Whether a ``step()`` counts if the optimizer has not stepped since the last one, because
            GradScaler has found an inf. If not, the schedule waits. To know costs a hook on the optimizer's step, and
            that waits for the GPU where GradScaler leaves its finding there.
        last_epoch: -1 to begin. To go on after n calls of ``step()`` without a state_dict: n - 1, as torch counts, with
            an optimizer whose own state has been loaded. A plateau begins anew then.

    Beside torch's ``initial_lr`` the parameter groups get ``initial_weight_decay``, ``initial_momentum`` and
    ``initial_betas`` where these are driven.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: The text of a schedule cannot be read; there are not as many schedules as groups; the optimizer
            does not have what is to be driven; a beta would leave [0, 1).
        KeyError: ``last_epoch`` is given, and a group does not know its first values.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedule: Schedules,
        *,
        weight_decay: Schedules | None = None,
        momentum: Schedules | None = None,
        betas: tuple[Schedules | None, ...] | None = None,
        plateau: Mapping[str, Any] | None = None,
        count_skipped: bool = True,
        last_epoch: int = -1,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer: {type(optimizer).__name__} is not an Optimizer")
        groups = optimizer.param_groups
        self.schedules = _per_group("schedule", schedule, len(groups))
        self._driven: list[_Driven] = []
        if weight_decay is not None:
            self._drive(groups, last_epoch, "weight_decay", "weight_decay", None, weight_decay)
        if momentum is not None:
            key, index = ("betas", 0) if "betas" in groups[0] else ("momentum", None)
            self._drive(groups, last_epoch, "momentum", key, index, momentum)
        if betas is not None:
            if not isinstance(betas, tuple):
                raise TypeError(f"betas: a tuple of schedules is wanted, one for each beta, not {betas!r}")
            if momentum is not None and betas and betas[0] is not None:
                raise ValueError("betas: momentum drives the first of them already")
            for index, schedules in enumerate(betas):
                if schedules is not None:
                    self._drive(groups, last_epoch, "betas", "betas", index, schedules)
        self._plateau: ReduceLROnPlateau | None = None
        self._real_steps: _RealSteps | None = None  # the first step, which torch's constructor makes, counts
        super().__init__(optimizer, last_epoch)
        if plateau is not None:
            self._plateau = self._new_plateau(plateau)
        if not count_skipped:
            self._real_steps = _RealSteps(unwrapped(optimizer))

    def _drive(
        self,
        groups: list[dict[str, Any]],
        last_epoch: int,
        argument: str,
        key: str,
        index: int | None,
        schedules: Schedules,
    ) -> None:
        """Takes up one more hyperparameter to drive."""
        bases = []
        for number, group in enumerate(groups):
            held = group.get(key)
            if held is None or (index is not None and index >= len(held)):
                raise ValueError(f"{argument}: parameter group {number} has no {key if index is None else 'such beta'}")
            first = tuple(map(float, held)) if index is not None else float(held)
            initial = group.setdefault(f"initial_{key}", first) if last_epoch == -1 else group.get(f"initial_{key}")
            if initial is None:
                raise KeyError(
                    f"last_epoch: parameter group {number} has no initial_{key}, so the schedule cannot go on at "
                    f"{last_epoch}. Load the optimizer's state_dict first"
                )
            bases.append(initial if index is None else initial[index])
        self._driven.append(_Driven(key, index, _per_group(argument, schedules, len(groups)), bases))

    def _new_plateau(self, options: Mapping[str, Any]) -> ReduceLROnPlateau:
        """Torch's own, over an optimizer of nothing but base_lrs."""
        try:
            nothing = [{"params": [torch.empty(0)], "lr": float(base)} for base in self.base_lrs]
            return ReduceLROnPlateau(torch.optim.SGD(nothing), **options)
        except (TypeError, ValueError) as error:
            raise type(error)(f"plateau: {error}") from None

    def get_lr(self) -> list[float | Tensor]:
        """The rate of each group at the step ``last_epoch``."""
        bases = self.base_lrs if self._plateau is None else self._plateau.get_last_lr()
        return list(map(mul, bases, _factors(self.schedules, self.last_epoch)))

    def _update_lr(self, epoch: int | None = None) -> None:
        # Not torch's own, whose guard for get_lr takes as long as all of this.
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        groups = self.optimizer.param_groups
        lrs = list(self.get_lr())
        for number, (group, lr) in enumerate(zip(groups, lrs, strict=True)):
            if isinstance(held := group["lr"], Tensor):
                put_number(held, lr)
                lrs[number] = held.clone()
            else:
                group["lr"] = lr
        self._last_lr = lrs
        for driven in self._driven:
            driven.write(groups, self.last_epoch)

    def step(self, metrics: SupportsFloat | None = None) -> None:
        """Goes on to the next step of the schedule; to be called after the optimizer's step.

        Args:
            metrics: What the plateau watches, if it is to look at it now.

        Raises:
            ValueError: There are metrics and no plateau.
        """
        if metrics is not None:
            self.feed(metrics)
        if self._real_steps is None or self._real_steps.take():
            super().step()

    def feed(self, metrics: SupportsFloat) -> None:
        """Tells the plateau a metric, and stays at this step: for those who validate less often than they step.

        Args:
            metrics: What the plateau watches.

        Raises:
            ValueError: There is no plateau.
        """
        if self._plateau is None:
            raise ValueError("metrics: this ScheduleLR has no plateau to feed")
        self._plateau.step(metrics)
        self._update_lr(self.last_epoch)

    def _texts(self) -> dict[str, list[str]]:
        """The text of every schedule, by what it drives."""
        schedules = {"lr": self.schedules, **{driven.name: driven.schedules for driven in self._driven}}
        return {name: list(map(repr, each)) for name, each in schedules.items()}

    def state_dict(self) -> dict[str, Any]:
        """Tells where the schedule stands: numbers, and the schedules as texts."""
        return {
            "last_epoch": self.last_epoch,
            "_step_count": self._step_count,
            "schedules": self._texts(),
            "bases": {"lr": list(map(float, self.base_lrs)), **{d.name: list(d.bases) for d in self._driven}},
            "plateau": None if self._plateau is None else dict(self._plateau.state_dict()),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where another was, and sets the optimizer's hyperparameters to what they are there.

        Args:
            state_dict: Of another ScheduleLR. If its schedules were others, a warning tells so, and those given here
                hold. A plateau that only one of the two has begins anew.

        Raises:
            ValueError: It is of another number of parameter groups, or drives something else, or is of another class.
        """
        if "bases" not in state_dict:
            raise ValueError("state_dict: it is not that of a ScheduleLR; to go on without one, give last_epoch=")
        bases: dict[str, list[float]] = state_dict["bases"]
        own = self._texts()
        if {name: len(each) for name, each in bases.items()} != {name: len(each) for name, each in own.items()}:
            raise ValueError(
                f"state_dict: it drives {', '.join(bases)} of {len(bases['lr'])} parameter groups, "
                f"this scheduler {', '.join(own)} of {len(own['lr'])}"
            )
        for name, texts in own.items():
            for number, (text, saved) in enumerate(zip(texts, state_dict["schedules"][name], strict=True)):
                if text != saved:
                    warnings.warn(
                        f"state_dict: it was made with {saved} for {name} of parameter group {number}, and goes on "
                        f"with {text}",
                        UserWarning,
                        stacklevel=2,
                    )
        self.base_lrs = [
            put_number(base.clone() if isinstance(base, Tensor) else base, saved)
            for base, saved in zip(self.base_lrs, bases["lr"], strict=True)
        ]
        for driven in self._driven:
            driven.bases = list(bases[driven.name])
        self._step_count = state_dict["_step_count"]
        if self._plateau is not None and state_dict["plateau"] is not None:
            self._plateau.load_state_dict(state_dict["plateau"])
            for group, lr in zip(self._plateau.optimizer.param_groups, self._plateau.get_last_lr(), strict=True):
                group["lr"] = lr
        self._update_lr(state_dict["last_epoch"])


# -- the schedules of transformers -------------------------------------------------------------------------------------
# The same names, arguments and rates as in transformers.optimization. Where two of its cosines rise again after the
# last training step, these hold.


def get_constant_schedule(optimizer: Optimizer, last_epoch: int = -1) -> ScheduleLR:
    """``constant()``."""
    return ScheduleLR(optimizer, constant(), last_epoch=last_epoch)


def get_constant_schedule_with_warmup(optimizer: Optimizer, num_warmup_steps: int, last_epoch: int = -1) -> ScheduleLR:
    """``warmup(num_warmup_steps) >> constant()``."""
    return ScheduleLR(optimizer, warmup(num_warmup_steps) >> constant(), last_epoch=last_epoch)


def get_linear_schedule_with_warmup(
    optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int, last_epoch: int = -1
) -> ScheduleLR:
    """``warmup(..) >> linear(..)``, which is at 0 after ``num_training_steps``."""
    decay = linear(_rest(num_training_steps, num_warmup_steps))
    return ScheduleLR(optimizer, warmup(num_warmup_steps) >> decay, last_epoch=last_epoch)


def get_cosine_schedule_with_warmup(
    optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int, num_cycles: float = 0.5, last_epoch: int = -1
) -> ScheduleLR:
    """``warmup(..) >> cosine(.., cycles=num_cycles)``; by default at 0 after ``num_training_steps``."""
    decay = cosine(_rest(num_training_steps, num_warmup_steps), cycles=num_cycles)
    return ScheduleLR(optimizer, warmup(num_warmup_steps) >> decay, last_epoch=last_epoch)


def get_cosine_with_hard_restarts_schedule_with_warmup(
    optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int, num_cycles: int = 1, last_epoch: int = -1
) -> ScheduleLR:
    """``warmup(..) >> hard_restarts(.., cycles=num_cycles)``, which is at 0 after ``num_training_steps``."""
    decay = hard_restarts(_rest(num_training_steps, num_warmup_steps), num_cycles)
    return ScheduleLR(optimizer, warmup(num_warmup_steps) >> decay, last_epoch=last_epoch)


def get_polynomial_decay_schedule_with_warmup(
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    lr_end: float = 1e-7,
    power: float = 1.0,
    last_epoch: int = -1,
) -> ScheduleLR:
    """``warmup(..) >> polynomial(.., power, end=lr_end / lr)``, with the optimizer's default for lr.

    Raises:
        ValueError: ``lr_end`` is not below the optimizer's default for lr.
    """
    lr = float(optimizer.defaults["lr"])
    if not lr > lr_end:
        raise ValueError(f"lr_end: {lr_end} is not below the optimizer's lr, {lr}")
    decay = polynomial(_rest(num_training_steps, num_warmup_steps), power, end=lr_end / lr)
    return ScheduleLR(optimizer, warmup(num_warmup_steps) >> decay, last_epoch=last_epoch)


def get_inverse_sqrt_schedule(
    optimizer: Optimizer, num_warmup_steps: int, timescale: int | None = None, last_epoch: int = -1
) -> ScheduleLR:
    """``warmup(..) >> inverse_sqrt(timescale)``; the timescale is that of the warm-up, or 10,000 without one."""
    decay = inverse_sqrt(num_warmup_steps or 10_000 if timescale is None else timescale)
    return ScheduleLR(optimizer, warmup(num_warmup_steps) >> decay, last_epoch=last_epoch)


def get_cosine_with_min_lr_schedule_with_warmup(
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    num_cycles: float = 0.5,
    last_epoch: int = -1,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
) -> ScheduleLR:
    """``warmup(..) >> cosine(.., end=min_lr_rate)``, where ``min_lr`` is ``min_lr_rate`` times the default for lr.

    Raises:
        ValueError: Not exactly one of ``min_lr`` and ``min_lr_rate`` is given.
    """
    if (min_lr is None) == (min_lr_rate is None):
        raise ValueError("min_lr, min_lr_rate: exactly one of them must be given")
    end = min_lr_rate if min_lr is None else min_lr / float(optimizer.defaults["lr"])
    decay = cosine(_rest(num_training_steps, num_warmup_steps), end=end or 0.0, cycles=num_cycles)
    return ScheduleLR(optimizer, warmup(num_warmup_steps) >> decay, last_epoch=last_epoch)


def get_wsd_schedule(
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_decay_steps: int,
    num_training_steps: int | None = None,
    num_stable_steps: int | None = None,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    min_lr_ratio: float = 0,
    num_cycles: float = 0.5,
    last_epoch: int = -1,
) -> ScheduleLR:
    """Warm-up, stable, decay: ``warmup(..) >> constant(..) >> cosine(..) >> constant(value=min_lr_ratio)``.

    Warm-up and decay are each "linear", "cosine" or "1-sqrt".

    Raises:
        ValueError: Neither ``num_training_steps`` nor ``num_stable_steps`` is given, or a type is not known.
    """
    low = min_lr_ratio
    rises = {
        "linear": warmup(num_warmup_steps, low),
        "cosine": cosine(num_warmup_steps, low, 1.0),
        "1-sqrt": polynomial(num_warmup_steps, 0.5, low, 1.0),
    }
    falls = {
        "linear": linear(num_decay_steps, end=low),
        "cosine": cosine(num_decay_steps, end=low, cycles=num_cycles),
        "1-sqrt": sqrt(num_decay_steps, end=low),
    }
    for name, chosen in (("warmup_type", warmup_type), ("decay_type", decay_type)):
        if chosen not in rises:
            raise ValueError(f"{name}: {chosen!r} is not known; known are {', '.join(rises)}")
    if num_stable_steps is None:
        if num_training_steps is None:
            raise ValueError("num_training_steps, num_stable_steps: one of them must be given")
        num_stable_steps = _rest(num_training_steps, num_warmup_steps + num_decay_steps)
    elif num_training_steps is not None:
        warnings.warn("num_stable_steps is given, so num_training_steps is not used", UserWarning, stacklevel=2)
    stages = rises[warmup_type] >> constant(num_stable_steps) >> falls[decay_type] >> constant(value=low)
    return ScheduleLR(optimizer, stages, last_epoch=last_epoch)


def _rest(steps: int, before: int) -> int:
    return max(steps - before, 0)
