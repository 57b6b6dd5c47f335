"""What drives an optimizer by schedules: :class:`ScheduleLR`."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import mul
from typing import Any, SupportsFloat, TypeAlias
from weakref import ref

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ..optimizers.arguments import described, put_number
from ..optimizers.hooks import unwrapped
from .parser import parse
from .parts import Schedule
from .preview import Previewed

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
        argument: The argument of ScheduleLR that it was given as.
        key: Its name in the parameter groups.
        index: Which of betas it is; None if it is no tuple.
        schedules: One for each parameter group.
        bases: For each group, the value that the schedule multiplies.
    """

    argument: str
    key: str
    index: int | None
    schedules: list[Schedule]
    bases: list[float]

    @property
    def name(self) -> str:
        return self.key if self.index is None else f"{self.key}[{self.index}]"

    def check(self, number: int, group: dict[str, Any]) -> None:
        """Raise if a group does not have what is driven."""
        held = group.get(self.key)
        if held is None or (self.index is not None and self.index >= len(held)):
            what = self.key if self.index is None else "such beta"
            raise ValueError(f"{self.argument}: parameter group {number} has no {what}")

    def first(self, number: int, group: dict[str, Any], last_epoch: int) -> float:
        """Return the value that a group began with; by default, if it begins now, that which it has."""
        self.check(number, group)
        held = group[self.key]
        first = tuple(map(float, held)) if self.index is not None else float(held)
        name = f"initial_{self.key}"
        initial = group.setdefault(name, first) if last_epoch == -1 else group.get(name)
        if initial is None:
            raise KeyError(
                f"last_epoch: parameter group {number} has no {name}, so the schedule cannot go on at "
                f"{last_epoch}. Load the optimizer's state_dict first"
            )
        return initial if self.index is None else initial[self.index]  # type: ignore[no-any-return]

    def values(self, t: int) -> list[float]:
        """Return the value of each group at a step."""
        values = [base * factor for base, factor in zip(self.bases, _factors(self.schedules, t), strict=True)]
        if self.index is not None:
            for number, value in enumerate(values):
                if not 0.0 <= value < 1.0:
                    raise ValueError(
                        f"{self.name} of parameter group {number} would be {value} at step {t}, not in [0, 1)"
                    )
        return values

    def write(self, groups: list[dict[str, Any]], values: list[float]) -> None:
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

    ``base_lrs`` may be assigned to; a plateau's reductions of it stay. A parameter group that is added later is driven
    from the next step on, from the values it has then, if one schedule serves all groups.

    Beside torch's ``initial_lr`` the parameter groups get ``initial_weight_decay``, ``initial_momentum`` and
    ``initial_betas`` where these are driven.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: The text of a schedule cannot be read; there are not as many schedules as groups; the optimizer
            does not have what is to be driven; a beta would leave [0, 1).
        KeyError: ``last_epoch`` is given, and a group does not know its first values.

    Example:
        >>> optimizer = onepass.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
        >>> scheduler = onepass.ScheduleLR(optimizer, "warmup(2) >> linear(4)")
        >>> scheduler.preview(7)[:, 0].tolist()
        [0.0, 0.25, 0.5, 0.375, 0.25, 0.125, 0.0]
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
        # Otherwise they are those of an optimizer that was loaded, or what another scheduler has made of them.
        self._bases_given = not any("initial_lr" in group for group in groups)
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
        driven = _Driven(argument, key, index, _per_group(argument, schedules, len(groups)), [])
        driven.bases = [driven.first(number, group, last_epoch) for number, group in enumerate(groups)]
        self._driven.append(driven)

    def _take_up_groups(self) -> None:
        """Take up the parameter groups that were added to the optimizer since the last step, or change nothing."""
        self._refuse_groups()
        self._add_groups()

    def _all_schedules(self) -> list[tuple[str, list[Schedule]]]:
        """The schedules, by the arguments that they were given as."""
        return [("schedule", self.schedules), *((driven.argument, driven.schedules) for driven in self._driven)]

    def _refuse_groups(self) -> None:
        """Raise if there are groups that the schedules are not for."""
        groups, known = self.optimizer.param_groups, len(self.schedules)
        if known > len(groups):
            raise ValueError(f"the optimizer has {len(groups)} parameter groups, this ScheduleLR was made for {known}")
        if known == len(groups):
            return
        why = f"parameter group {known} was added after this ScheduleLR was made, and"
        for argument, schedules in self._all_schedules():
            if any(schedule != schedules[0] for schedule in schedules):
                raise ValueError(f"{argument}: {why} those before it have different schedules. Make a new ScheduleLR")
        if self._plateau is not None and self._plateau.default_min_lr is None:
            raise ValueError(f"plateau: {why} min_lr is a list with a number for each group. Make a new ScheduleLR")
        for driven in self._driven:
            for number in range(known, len(groups)):
                driven.check(number, groups[number])

    def _add_groups(self) -> None:
        """Let the schedules, each of which serves all groups, drive the new ones from the values they have."""
        known = len(self.schedules)
        added = self.optimizer.param_groups[known:]
        for driven in self._driven:
            driven.bases = [*driven.bases, *(driven.first(known + i, group, -1) for i, group in enumerate(added))]
        for _, schedules in self._all_schedules():
            schedules += schedules[:1] * len(added)
        for group in added:
            lr = group["lr"]
            base = group.setdefault("initial_lr", lr.clone() if isinstance(lr, Tensor) else lr)
            self.base_lrs = [*self.base_lrs, base.clone() if isinstance(base, Tensor) else base]
            if self._plateau is not None:
                self._plateau.optimizer.add_param_group(_nothing(base))

    def _new_plateau(self, options: Mapping[str, Any]) -> ReduceLROnPlateau:
        """Torch's own, over an optimizer of nothing but base_lrs."""
        try:
            return ReduceLROnPlateau(SGD(list(map(_nothing, self.base_lrs))), **options)
        except (TypeError, ValueError) as error:
            raise type(error)(f"plateau: {error}") from None

    def _reduced_bases(self, plateau: ReduceLROnPlateau) -> list[float | Tensor]:
        """Return what the plateau has left of base_lrs. If someone has set these, its factor stays."""
        groups = plateau.optimizer.param_groups
        for group, base in zip(groups, map(float, self.base_lrs), strict=True):
            if group["initial_lr"] != base:
                factor = group["lr"] / group["initial_lr"] if group["initial_lr"] else 1.0
                group.update(lr=base * factor, initial_lr=base)
        plateau._last_lr = [group["lr"] for group in groups]
        return plateau._last_lr

    def get_lr(self) -> list[float | Tensor]:
        """The rate of each group at the step ``last_epoch``."""
        bases = self.base_lrs if self._plateau is None else self._reduced_bases(self._plateau)
        return list(map(mul, bases, _factors(self.schedules, self.last_epoch)))

    def _update_lr(self, epoch: int | None = None) -> None:
        # Not torch's own, whose guard for get_lr takes as long as all of this.
        before = self.last_epoch
        self.last_epoch = t = before + 1 if epoch is None else epoch
        groups = self.optimizer.param_groups
        try:
            if len(self.schedules) != len(groups):
                self._take_up_groups()  # not done by step() where torch's SequentialLR begins its parts
            lrs = list(self.get_lr())
            values = [driven.values(t) for driven in self._driven] if self._driven else []
        except Exception:
            self.last_epoch = before
            if epoch is None:
                self._step_count -= 1  # step() has counted this one
            raise
        for number, (group, lr) in enumerate(zip(groups, lrs, strict=True)):
            if isinstance(held := group["lr"], Tensor):
                put_number(held, lr)
                lrs[number] = held.clone()
            else:
                group["lr"] = lr
        self._last_lr = lrs
        for number, each in enumerate(values):
            self._driven[number].write(groups, each)

    def _write_driven(self) -> None:
        """Set what is driven beside the rate; before its first step a part of a sequence drives nothing."""
        if self.last_epoch >= 0:
            for driven in self._driven:
                driven.write(self.optimizer.param_groups, driven.values(self.last_epoch))

    def step(self, metrics: SupportsFloat | None = None) -> None:
        """Goes on to the next step of the schedule; to be called after the optimizer's step.

        Args:
            metrics: What the plateau watches, if it is to look at it now.

        Raises:
            ValueError: There are metrics and no plateau; a beta would leave [0, 1); a parameter group was added that
                the schedules are not for. Nothing has been changed.
        """
        if len(self.schedules) != len(self.optimizer.param_groups):
            self._take_up_groups()
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
        self._take_up_groups()
        self._reduced_bases(self._plateau)
        self._plateau.step(metrics)
        self._update_lr(self.last_epoch)

    def _texts(self) -> dict[str, list[str]]:
        """The text of every schedule, by what it drives."""
        schedules = {"lr": self.schedules, **{driven.name: driven.schedules for driven in self._driven}}
        return {name: list(map(repr, each)) for name, each in schedules.items()}

    def _bases(self) -> dict[str, list[float]]:
        """The value that every schedule multiplies, by what it drives."""
        return {"lr": list(map(float, self.base_lrs)), **{d.name: list(d.bases) for d in self._driven}}

    def _values(self) -> dict[str, list[float]]:
        """What the groups hold now, which someone may have set, by what is driven."""
        groups = self.optimizer.param_groups
        held = {
            d.name: [float(g[d.key] if d.index is None else g[d.key][d.index]) for g in groups] for d in self._driven
        }
        return {"lr": [float(group["lr"]) for group in groups], **held}

    def __repr__(self) -> str:
        drives = []
        for name, texts in self._texts().items():
            text = repr(texts[0] if len(set(texts)) == 1 else texts)
            drives.append(text if name == "lr" else f"{name}={text}")
        if (plateau := self._plateau) is not None:
            drives.append(f"plateau={{'mode': {plateau.mode!r}, 'factor': {plateau.factor}, ...}}")
        return f"ScheduleLR({type(self.optimizer).__name__}, {', '.join(drives)}, last_epoch={self.last_epoch})"

    def state_dict(self) -> dict[str, Any]:
        """Tells where the schedule stands: numbers, and the schedules as texts."""
        with contextlib.suppress(ValueError):  # which the next step will raise
            self._take_up_groups()
        if self._plateau is not None:
            self._reduced_bases(self._plateau)
        return {
            "last_epoch": self.last_epoch,
            "_step_count": self._step_count,
            "schedules": self._texts(),
            "bases": self._bases(),
            # None beside a group that could not be taken up, and may not have them.
            "values": self._values() if len(self.schedules) == len(self.optimizer.param_groups) else None,
            "plateau": None if self._plateau is None else dict(self._plateau.state_dict()),
        }

    def _check_state(self, state_dict: dict[str, Any]) -> None:
        """Raise if a state is not of a ScheduleLR for the same groups that drives the same."""
        if "bases" not in state_dict:
            raise ValueError("state_dict: it is not that of a ScheduleLR; to go on without one, give last_epoch=")
        bases, own = state_dict["bases"], self._bases()
        if {name: len(each) for name, each in bases.items()} != {name: len(each) for name, each in own.items()}:
            raise ValueError(
                f"state_dict: it drives {', '.join(bases)} of {len(bases['lr'])} parameter groups, "
                f"this scheduler {', '.join(own)} of {len(own['lr'])}"
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where another was, and sets the optimizer's hyperparameters to what they are there.

        Args:
            state_dict: Of another ScheduleLR. If its schedules were others, a warning tells so, and those given here
                hold. If its base values were others than those given here, a warning tells so, and those of the state
                hold; to change a rate, assign ``base_lrs`` after this. A plateau that only one of the two has begins
                anew.

        Raises:
            ValueError: It is of another number of parameter groups, or drives something else, or is of another class.
        """
        self._take_up_groups()
        self._check_state(state_dict)
        bases: dict[str, list[float]] = state_dict["bases"]
        own = self._texts()
        for name, texts in own.items():
            for number, (text, saved) in enumerate(zip(texts, state_dict["schedules"][name], strict=True)):
                if text != saved:
                    warnings.warn(
                        f"state_dict: it was made with {saved} for {name} of parameter group {number}, and goes on "
                        f"with {text}",
                        UserWarning,
                        stacklevel=2,
                    )
        for name, values in self._bases().items() if self._bases_given else ():
            for number, (value, base) in enumerate(zip(values, bases[name], strict=True)):
                if not math.isclose(value, base, rel_tol=1e-6):  # a tensor of float32 may hold the same rate
                    warnings.warn(
                        f"state_dict: it was made with a base of {base} for {name} of parameter group {number}, not "
                        f"{value}, and goes on with {base}; to change a rate, assign base_lrs after load_state_dict",
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
            lrs = zip(self._plateau.optimizer.param_groups, self._plateau.get_last_lr(), bases["lr"], strict=True)
            for group, lr, base in lrs:
                group.update(lr=lr, initial_lr=base)
        if state_dict["last_epoch"] < 0:  # a part of a sequence that has not begun
            self.last_epoch = state_dict["last_epoch"]
        else:
            self._update_lr(state_dict["last_epoch"])
            if state_dict["schedules"] == own and (told := state_dict.get("values")):
                self._put(told)

    def _put(self, values: dict[str, list[float]]) -> None:
        """Set what is driven to what another run's groups held."""
        groups = self.optimizer.param_groups
        for group, lr in zip(groups, values["lr"], strict=True):
            group["lr"] = put_number(group["lr"], lr)
        self._last_lr = [lr.clone() if isinstance(lr := group["lr"], Tensor) else lr for group in groups]
        for driven in self._driven:
            driven.write(groups, values[driven.name])


def _nothing(base: float | Tensor) -> dict[str, Any]:
    """A parameter group of nothing but a base_lr, for a plateau."""
    return {"params": [torch.empty(0)], "lr": float(base), "initial_lr": float(base)}
