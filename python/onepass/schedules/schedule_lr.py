"""The scheduler :class:`ScheduleLR`, which sets hyperparameters by schedules."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Mapping
from operator import mul
from typing import Any, SupportsFloat

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ..optimizers.arguments import put_number
from ..optimizers.hooks import unwrapped
from .previewed import Previewed
from .rates import copied, current_lrs, initial_lr
from .schedule import Schedule
from .scheduled_hyperparameter import ScheduledHyperparameter, Schedules, factors_at, schedules_of_groups
from .step_detector import StepDetector


class ScheduleLR(Previewed, LRScheduler):
    r"""Set the learning rate to its initial value times a schedule: :math:`lr_t = base\_lr \cdot schedule(t)`.

    t (``last_epoch``) is the number of ``step()`` calls so far. The rates depend on t only, so a run resumed at any
    step (by ``load_state_dict``, or by the argument ``last_epoch``) has the same rates, bit for bit.

    Args:
        optimizer: Any optimizer.
        schedule: A :class:`~onepass.schedules.Schedule`, or its text (``"warmup(500) >> cosine(10_000)"``); or a list
            with one of these for each parameter group.
        weight_decay: Schedule (or list) of ``weight_decay``, which is set to its initial value times the schedule.
        momentum: Schedule (or list) of ``momentum``, or of the first beta if the optimizer has ``betas``.
        betas: A tuple of schedules (or lists), one for each beta; None for a beta that is not scheduled.
        plateau: Arguments of ``torch.optim.lr_scheduler.ReduceLROnPlateau``, such as ``{"patience": 3}``. The plateau
            reduces base_lr when a metric stops improving, and the schedule multiplies the reduced base_lr. So
            ``min_lr`` and ``eps`` refer to base_lr.
        count_skipped: Whether ``step()`` advances the schedule if the optimizer has not stepped since the last call,
            because GradScaler has found an inf, or because the optimizer has skipped the step
            (``optimizer.last_step.skipped``). False needs a hook on the optimizer's step, which waits for the GPU if
            GradScaler's ``found_inf`` or the optimizer's norm is there.
        last_epoch: -1 for a new run. To resume after n calls of ``step()`` without a state_dict, pass n - 1, as for
            torch's schedulers, with an optimizer whose state has been loaded. The plateau is then reset.

    ``base_lrs`` may be assigned; the plateau's reductions remain in effect. If all groups have the same schedule, a
    parameter group that is added later is scheduled from the next step on, with its values then as base values.

    In addition to torch's ``initial_lr``, the parameter groups get ``initial_weight_decay``, ``initial_momentum`` and
    ``initial_betas`` if these are scheduled.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: A text is not a schedule; the number of schedules is not that of groups; the optimizer does not have
            a scheduled hyperparameter; a beta would leave [0, 1).
        KeyError: ``last_epoch`` is given, and a group does not have its initial values.

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
        self.schedules = schedules_of_groups("schedule", schedule, len(groups))
        # Otherwise the rates come from a loaded optimizer, or were changed by another scheduler.
        self._bases_given = not any("initial_lr" in group for group in groups)
        self._hyperparameters: list[ScheduledHyperparameter] = []
        if weight_decay is not None:
            self._schedule_hyperparameter(groups, last_epoch, "weight_decay", "weight_decay", None, weight_decay)
        if momentum is not None:
            key, index = ("betas", 0) if "betas" in groups[0] else ("momentum", None)
            self._schedule_hyperparameter(groups, last_epoch, "momentum", key, index, momentum)
        if betas is not None:
            if not isinstance(betas, tuple):
                raise TypeError(f"betas must be a tuple of schedules, one for each beta, got {betas!r}")
            if momentum is not None and betas and betas[0] is not None:
                raise ValueError("betas: the first beta must be None, because momentum sets it")
            for index, schedules in enumerate(betas):
                if schedules is not None:
                    self._schedule_hyperparameter(groups, last_epoch, "betas", "betas", index, schedules)
        self._plateau: ReduceLROnPlateau | None = None
        self._step_detector: StepDetector | None = None  # torch's constructor makes the first step, which counts
        super().__init__(optimizer, last_epoch)
        if plateau is not None:
            self._plateau = self._new_plateau(plateau)
        if not count_skipped:
            self._step_detector = StepDetector(unwrapped(optimizer))

    def _schedule_hyperparameter(
        self,
        groups: list[dict[str, Any]],
        last_epoch: int,
        argument: str,
        key: str,
        index: int | None,
        schedules: Schedules,
    ) -> None:
        """Add a hyperparameter to those that schedules set."""
        of_groups = schedules_of_groups(argument, schedules, len(groups))
        added = ScheduledHyperparameter(argument, key, index, of_groups, bases=[])
        added.bases = [added.initial_value(number, group, last_epoch) for number, group in enumerate(groups)]
        self._hyperparameters.append(added)

    def _include_added_groups(self) -> None:
        """Schedule the groups that were added to the optimizer since the last step, or raise and change nothing."""
        self._check_added_groups()
        self._extend_to_added_groups()

    def _all_schedules(self) -> list[tuple[str, list[Schedule]]]:
        """Return the schedules, by the argument that gave them."""
        return [("schedule", self.schedules), *((h.argument, h.schedules) for h in self._hyperparameters)]

    def _check_added_groups(self) -> None:
        """Raise if the schedules cannot serve all groups."""
        groups, scheduled = self.optimizer.param_groups, len(self.schedules)
        if scheduled > len(groups):
            raise ValueError(
                f"the optimizer has {len(groups)} parameter groups, this ScheduleLR was made for {scheduled}"
            )
        if scheduled == len(groups):
            return
        why = f"parameter group {scheduled} was added after this ScheduleLR was made, and"
        for argument, schedules in self._all_schedules():
            if any(schedule != schedules[0] for schedule in schedules):
                raise ValueError(f"{argument}: {why} those before it have different schedules. Make a new ScheduleLR")
        if self._plateau is not None and self._plateau.default_min_lr is None:
            raise ValueError(f"plateau: {why} min_lr is a list with a number for each group. Make a new ScheduleLR")
        for hyperparameter in self._hyperparameters:
            for number in range(scheduled, len(groups)):
                hyperparameter.check(number, groups[number])

    def _extend_to_added_groups(self) -> None:
        """Extend the schedules, each of which serves all groups, to new groups, with their current values as bases."""
        scheduled = len(self.schedules)
        added = self.optimizer.param_groups[scheduled:]
        for hyperparameter in self._hyperparameters:
            hyperparameter.bases = [
                *hyperparameter.bases,
                *(hyperparameter.initial_value(scheduled + i, group, -1) for i, group in enumerate(added)),
            ]
        for _, schedules in self._all_schedules():
            schedules += schedules[:1] * len(added)
        for group in added:
            base = initial_lr(group)
            self.base_lrs = [*self.base_lrs, base]
            if self._plateau is not None:
                self._plateau.optimizer.add_param_group(_plateau_group(base))

    def _new_plateau(self, options: Mapping[str, Any]) -> ReduceLROnPlateau:
        """Return torch's ReduceLROnPlateau on an optimizer whose only content is base_lrs."""
        try:
            return ReduceLROnPlateau(SGD(list(map(_plateau_group, self.base_lrs))), **options)
        except (TypeError, ValueError) as error:
            raise type(error)(f"plateau: {error}") from None

    def _reduced_bases(self, plateau: ReduceLROnPlateau) -> list[float | Tensor]:
        """Return base_lrs reduced by the plateau. If base_lrs were assigned, the plateau's factor is kept."""
        groups = plateau.optimizer.param_groups
        for group, base in zip(groups, map(float, self.base_lrs), strict=True):
            if group["initial_lr"] != base:
                factor = group["lr"] / group["initial_lr"] if group["initial_lr"] else 1.0
                group.update(lr=base * factor, initial_lr=base)
        plateau._last_lr = [group["lr"] for group in groups]
        return plateau._last_lr

    def get_lr(self) -> list[float | Tensor]:
        """Return the learning rate of each group at step ``last_epoch``."""
        bases = self.base_lrs if self._plateau is None else self._reduced_bases(self._plateau)
        return list(map(mul, bases, factors_at(self.schedules, self.last_epoch)))

    def _update_lr(self, epoch: int | None = None) -> None:
        # Not torch's method, whose guard around get_lr takes as long as all of this.
        before = self.last_epoch
        self.last_epoch = t = before + 1 if epoch is None else epoch
        groups = self.optimizer.param_groups
        try:
            if len(self.schedules) != len(groups):
                self._include_added_groups()  # torch's SequentialLR starts its parts without step()
            lrs = list(self.get_lr())
            values = [h.values(t) for h in self._hyperparameters] if self._hyperparameters else []
        except Exception:
            self.last_epoch = before
            if epoch is None:
                self._step_count -= 1  # step() has already counted this step
            raise
        for number, (group, lr) in enumerate(zip(groups, lrs, strict=True)):
            if isinstance(held := group["lr"], Tensor):
                put_number(held, lr)
                lrs[number] = held.clone()
            else:
                group["lr"] = lr
        self._last_lr = lrs
        for number, each in enumerate(values):
            self._hyperparameters[number].write(groups, each)

    def _write_hyperparameters(self) -> None:
        """Set all scheduled hyperparameters but the rate; none before the first step of a part of a sequence."""
        if self.last_epoch >= 0:
            for hyperparameter in self._hyperparameters:
                hyperparameter.write(self.optimizer.param_groups, hyperparameter.values(self.last_epoch))

    def step(self, metrics: SupportsFloat | None = None) -> None:
        """Advance the schedule by one step. Call this after the optimizer's step.

        Args:
            metrics: Metric for the plateau; None: the plateau is not updated.

        Raises:
            ValueError: There are metrics but no plateau; a beta would leave [0, 1); a parameter group was added for
                which there is no schedule. Nothing has been changed.
        """
        if len(self.schedules) != len(self.optimizer.param_groups):
            self._include_added_groups()
        if metrics is not None:
            self.feed(metrics)
        if self._step_detector is None or self._step_detector.stepped_since_last_call():
            super().step()

    def feed(self, metrics: SupportsFloat) -> None:
        """Pass a metric to the plateau without advancing the schedule, for validation that is rarer than steps.

        Args:
            metrics: Metric for the plateau.

        Raises:
            ValueError: There is no plateau.
        """
        if self._plateau is None:
            raise ValueError("metrics: this ScheduleLR has no plateau")
        self._include_added_groups()
        self._reduced_bases(self._plateau)
        self._plateau.step(metrics)
        self._update_lr(self.last_epoch)

    def _texts(self) -> dict[str, list[str]]:
        """Return the text of each schedule, by hyperparameter."""
        schedules = {"lr": self.schedules, **{h.name: h.schedules for h in self._hyperparameters}}
        return {name: list(map(repr, each)) for name, each in schedules.items()}

    def _bases(self) -> dict[str, list[float]]:
        """Return the base value of each schedule, by hyperparameter."""
        return {"lr": list(map(float, self.base_lrs)), **{h.name: list(h.bases) for h in self._hyperparameters}}

    def _values(self) -> dict[str, list[float]]:
        """Return the current values of the groups (the user may have set them), by hyperparameter."""
        groups = self.optimizer.param_groups
        held = {
            h.name: [float(g[h.key] if h.index is None else g[h.key][h.index]) for g in groups]
            for h in self._hyperparameters
        }
        return {"lr": [float(group["lr"]) for group in groups], **held}

    def __repr__(self) -> str:
        arguments = []
        for name, texts in self._texts().items():
            text = repr(texts[0] if len(set(texts)) == 1 else texts)
            arguments.append(text if name == "lr" else f"{name}={text}")
        if (plateau := self._plateau) is not None:
            arguments.append(f"plateau={{'mode': {plateau.mode!r}, 'factor': {plateau.factor}, ...}}")
        return f"ScheduleLR({type(self.optimizer).__name__}, {', '.join(arguments)}, last_epoch={self.last_epoch})"

    def state_dict(self) -> dict[str, Any]:
        """Return the state: numbers, and the schedules as text."""
        with contextlib.suppress(ValueError):  # which the next step will raise
            self._include_added_groups()
        if self._plateau is not None:
            self._reduced_bases(self._plateau)
        return {
            "last_epoch": self.last_epoch,
            "_step_count": self._step_count,
            "schedules": self._texts(),
            "bases": self._bases(),
            # None if there is a group that could not be added, and may not have these values.
            "values": self._values() if len(self.schedules) == len(self.optimizer.param_groups) else None,
            "plateau": None if self._plateau is None else dict(self._plateau.state_dict()),
        }

    def _check_state(self, state_dict: dict[str, Any]) -> None:
        """Raise if a state is not that of a ScheduleLR with the same groups and hyperparameters."""
        if "bases" not in state_dict:
            raise ValueError("state_dict is not that of a ScheduleLR; to resume without a state_dict, pass last_epoch")
        bases, own = state_dict["bases"], self._bases()
        if {name: len(each) for name, each in bases.items()} != {name: len(each) for name, each in own.items()}:
            raise ValueError(
                f"state_dict is for {', '.join(bases)} of {len(bases['lr'])} parameter groups, "
                f"but this scheduler sets {', '.join(own)} of {len(own['lr'])}"
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of a ScheduleLR, and set the optimizer's hyperparameters to the values of that state.

        Args:
            state_dict: State of a ScheduleLR. If its schedules differ from those of this one, this method warns, and
                those of this one are used. If its base values differ, this method warns, and those of the state are
                used; to change a rate, assign ``base_lrs`` afterwards. If only one of the two has a plateau, the
                plateau is reset.

        Raises:
            ValueError: The state is of another class, another number of parameter groups, or other hyperparameters.
        """
        self._include_added_groups()
        self._check_state(state_dict)
        bases: dict[str, list[float]] = state_dict["bases"]
        own = self._texts()
        for name, texts in own.items():
            for number, (text, saved) in enumerate(zip(texts, state_dict["schedules"][name], strict=True)):
                if text != saved:
                    warnings.warn(
                        f"state_dict was made with {saved} for {name} of parameter group {number}; this scheduler "
                        f"continues with {text}",
                        UserWarning,
                        stacklevel=2,
                    )
        for name, values in self._bases().items() if self._bases_given else ():
            for number, (value, base) in enumerate(zip(values, bases[name], strict=True)):
                if not math.isclose(value, base, rel_tol=1e-6):  # a tensor of float32 may hold the same rate
                    warnings.warn(
                        f"state_dict was made with a base of {base} for {name} of parameter group {number}, not "
                        f"{value}; this scheduler continues with {base}. To change a rate, assign base_lrs after "
                        "load_state_dict",
                        UserWarning,
                        stacklevel=2,
                    )
        self.base_lrs = [
            put_number(copied(base), saved) for base, saved in zip(self.base_lrs, bases["lr"], strict=True)
        ]
        for hyperparameter in self._hyperparameters:
            hyperparameter.bases = list(bases[hyperparameter.name])
        self._step_count = state_dict["_step_count"]
        if self._plateau is not None and state_dict["plateau"] is not None:
            self._plateau.load_state_dict(state_dict["plateau"])
            lrs = zip(self._plateau.optimizer.param_groups, self._plateau.get_last_lr(), bases["lr"], strict=True)
            for group, lr, base in lrs:
                group.update(lr=lr, initial_lr=base)
        if state_dict["last_epoch"] < 0:  # a part of a sequence that has not started
            self.last_epoch = state_dict["last_epoch"]
        else:
            self._update_lr(state_dict["last_epoch"])
            if state_dict["schedules"] == own and (saved_values := state_dict.get("values")):
                self._write_values(saved_values)

    def _write_values(self, values: dict[str, list[float]]) -> None:
        """Set the scheduled hyperparameters to the saved values of the groups."""
        groups = self.optimizer.param_groups
        for group, lr in zip(groups, values["lr"], strict=True):
            group["lr"] = put_number(group["lr"], lr)
        self._last_lr = current_lrs(self.optimizer)
        for hyperparameter in self._hyperparameters:
            hyperparameter.write(groups, values[hyperparameter.name])


def _plateau_group(base: float | Tensor) -> dict[str, Any]:
    """Return a parameter group that holds only a base_lr, for a plateau."""
    return {"params": [torch.empty(0)], "lr": float(base), "initial_lr": float(base)}
