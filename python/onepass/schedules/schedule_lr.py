"""The scheduler :class:`ScheduleLR`, which sets hyperparameters by schedules."""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from operator import mul
from typing import Any, SupportsFloat

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ..optimizers.arguments import check_flag, check_number, check_optimizer, described, put_number, whole_at_least
from ..optimizers.hooks import unwrapped
from .previewed import Previewed
from .rates import copied, initial_lr, initial_value
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
        count_skipped: Whether ``step()`` advances the schedule even if the optimizer has not stepped since the last
            call, because GradScaler has found an infinite gradient, or because the optimizer has skipped the step
            (``optimizer.last_step.skipped``). False adds a hook to the optimizer's step, which waits for the GPU if
            GradScaler's ``found_inf`` or the optimizer's norm is there.
        last_epoch: -1 for a new run. To resume after n calls of ``step()`` without a state_dict, pass n - 1, as for
            torch's schedulers, with an optimizer whose state has been loaded. The plateau is then reset.

    ``base_lrs`` may be assigned; the plateau's reductions remain in effect. If all groups have the same schedule, a
    parameter group that is added later is scheduled from the next step on; its values at that time are the base values.

    In addition to torch's ``initial_lr``, the parameter groups get ``initial_weight_decay``, ``initial_momentum`` and
    ``initial_betas`` if these are scheduled.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: A text is not a schedule; the number of schedules is not that of groups; the optimizer does not have
            a scheduled hyperparameter; a beta would leave [0, 1); ``last_epoch`` is less than -1.
        KeyError: ``last_epoch`` is given, and a group does not have its initial values.

    If the constructor or a method raises, neither the scheduler nor the optimizer has been changed.

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
        check_optimizer("ScheduleLR: optimizer", optimizer)
        check_flag("ScheduleLR: count_skipped", count_skipped)
        last_epoch = whole_at_least("ScheduleLR: last_epoch", last_epoch, -1)
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
        self.optimizer = optimizer
        self.last_epoch = last_epoch
        self.base_lrs = [initial_value("lr", number, group, last_epoch) for number, group in enumerate(groups)]
        self._plateau = None if plateau is None else self._new_plateau(plateau)
        self._step_detector: StepDetector | None = None  # torch's constructor makes the first step, which counts
        self._computed(last_epoch + 1)
        step_detector = None if count_skipped else StepDetector(unwrapped(optimizer))
        self._store_initial_values()  # all checks have passed
        super().__init__(optimizer, last_epoch)
        self._step_detector = step_detector

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
        self._hyperparameters.append(added.with_groups(groups, last_epoch))

    def _store_initial_values(self) -> None:
        """Store the base values of the groups that have none, for constructors that are given ``last_epoch``."""
        for number, group in enumerate(self.optimizer.param_groups):
            initial_lr(group)
            for hyperparameter in self._hyperparameters:
                initial = hyperparameter.initial(number, group, -1)
                group.setdefault(f"initial_{hyperparameter.key}", initial)

    def _include_added_groups(self, t: int = -1) -> None:
        """Schedule the groups that were added to the optimizer since the last step.

        Args:
            t: The step whose values are needed next; -1 if unknown.

        Raises:
            ValueError: There is no schedule for a group, or a beta would leave [0, 1) at step t. Nothing has been
                changed.
        """
        if len(self.schedules) != len(self.optimizer.param_groups):
            extended = self._with_added_groups()
            if t >= 0:
                extended._computed(t)
            self._replace_by(extended)

    def _replace_by(self, changed: ScheduleLR) -> None:
        """Take over the attributes of a changed copy."""
        self.__dict__.update(changed.__dict__)
        self._store_initial_values()

    def _all_schedules(self) -> list[tuple[str, list[Schedule]]]:
        """Return the schedules, by the argument that gave them."""
        return [("schedule", self.schedules), *((h.argument, h.schedules) for h in self._hyperparameters)]

    def _with_added_groups(self) -> ScheduleLR:
        """Return a copy in which each schedule also serves the groups that were added, from their current values on.

        Raises:
            ValueError: The schedules cannot serve all groups.
        """
        groups, scheduled = self.optimizer.param_groups, len(self.schedules)
        if scheduled > len(groups):
            raise ValueError(
                f"the optimizer has {len(groups)} parameter groups, this ScheduleLR was made for {scheduled}"
            )
        extended = copy.copy(self)
        if scheduled == len(groups):
            return extended
        why = f"parameter group {scheduled} was added after this ScheduleLR was made, and"
        for argument, schedules in self._all_schedules():
            if any(schedule != schedules[0] for schedule in schedules):
                raise ValueError(f"{argument}: {why} those before it have different schedules. Make a new ScheduleLR")
        if self._plateau is not None and self._plateau.default_min_lr is None:
            raise ValueError(f"plateau: {why} min_lr is a list with a number for each group. Make a new ScheduleLR")
        extended.schedules = self.schedules + self.schedules[:1] * (len(groups) - scheduled)
        extended._hyperparameters = [hyperparameter.with_groups(groups) for hyperparameter in self._hyperparameters]
        added = [initial_value("lr", number, group, -1) for number, group in enumerate(groups) if number >= scheduled]
        extended.base_lrs = [*self.base_lrs, *added]
        extended._plateau = copy.deepcopy(self._plateau)
        if extended._plateau is not None:
            for base in added:
                extended._plateau.optimizer.add_param_group(_plateau_group(base))
        return extended

    def _new_plateau(self, options: Mapping[str, Any]) -> ReduceLROnPlateau:
        """Return torch's ReduceLROnPlateau on an optimizer whose only content is base_lrs."""
        if not isinstance(options, Mapping):
            raise TypeError(
                f"plateau must be a dict of arguments of ReduceLROnPlateau, such as {{'patience': 3}}, got "
                f"{described(options)}"
            )
        try:
            return ReduceLROnPlateau(SGD(list(map(_plateau_group, self.base_lrs))), **options)
        except (TypeError, ValueError) as error:
            raise type(error)(f"plateau: {error}") from None

    def _checked_bases(self) -> list[float | Tensor]:
        """Return base_lrs, which may have been assigned; raise ValueError if they are too few or too many."""
        if len(self.base_lrs) != len(self.schedules):
            raise ValueError(
                f"base_lrs must have one rate for each of {len(self.schedules)} parameter groups, "
                f"got {len(self.base_lrs)}"
            )
        return self.base_lrs

    def _reduced_bases(self, plateau: ReduceLROnPlateau) -> list[float | Tensor]:
        """Return base_lrs reduced by the plateau. If base_lrs were assigned, the plateau's factor is kept."""
        groups = plateau.optimizer.param_groups
        for group, base in zip(groups, map(float, self._checked_bases()), strict=True):
            if group["initial_lr"] != base:
                factor = group["lr"] / group["initial_lr"] if group["initial_lr"] else 1.0
                group.update(lr=base * factor, initial_lr=base)
        plateau._last_lr = [group["lr"] for group in groups]
        return plateau._last_lr

    def get_lr(self) -> list[float | Tensor]:
        """Return the learning rate of each group at step ``last_epoch``."""
        bases = self._checked_bases() if self._plateau is None else self._reduced_bases(self._plateau)
        return list(map(mul, bases, factors_at(self.schedules, self.last_epoch)))

    def _computed(self, t: int) -> tuple[list[float | Tensor], list[list[float]]]:
        """Return the rates of the groups and the values of the other hyperparameters at step t; nothing is changed.

        Raises:
            ValueError: A beta would leave [0, 1). A schedule that is a function may raise other exceptions.
        """
        before, self.last_epoch = self.last_epoch, t
        try:
            return list(self.get_lr()), [h.values(t) for h in self._hyperparameters] if self._hyperparameters else []
        finally:
            self.last_epoch = before

    def _update_lr(self, epoch: int | None = None) -> None:
        # Not torch's method, whose guard around get_lr takes as long as all of this.
        t = self.last_epoch + 1 if epoch is None else epoch
        if epoch is not None:
            self._include_added_groups(t)  # torch's SequentialLR starts its parts without step()
        try:
            lrs, values = self._computed(t)
        except Exception:
            if epoch is None:
                self._step_count -= 1  # step() has already counted this step
            raise
        self.last_epoch = t
        self._write(lrs, values)

    def _write(self, lrs: list[float | Tensor], values: list[list[float]]) -> None:
        """Set the rates of the groups and the other hyperparameters; tensors are filled in place."""
        groups = self.optimizer.param_groups
        for number, (group, lr) in enumerate(zip(groups, lrs, strict=True)):
            if isinstance(held := group["lr"], Tensor):
                put_number(held, lr)
                lrs[number] = held.clone()
            else:
                group["lr"] = lr
        self._last_lr = lrs
        for number, each in enumerate(values):
            self._hyperparameters[number].write(groups, each)

    def _write_hyperparameters(self, state_dict: dict[str, Any]) -> None:
        """Set all scheduled hyperparameters but the rate, as ``load_state_dict``; none if this has not started."""
        _, _, values = self._loaded(state_dict)
        for hyperparameter, each in zip(self._hyperparameters, values, strict=False):
            hyperparameter.write(self.optimizer.param_groups, each)

    def step(self, metrics: SupportsFloat | None = None) -> None:
        """Advance the schedule by one step. Call this after the optimizer's step.

        Args:
            metrics: Metric for the plateau; None: the plateau is not updated.

        Raises:
            TypeError: ``metrics`` is not a number. Nothing has been changed.
            ValueError: There are metrics but no plateau, a beta would leave [0, 1), a parameter group was added for
                which there is no schedule, or ``base_lrs`` has another number of rates. Nothing has been changed.
        """
        if metrics is not None:
            self._require_plateau()
            check_number("metrics", metrics)
        detector = self._step_detector
        # A sequence starts this part by step(). The start does not depend on the optimizer.
        advances = detector is None or detector.stepped or self.last_epoch < 0
        if len(self.schedules) != len(self.optimizer.param_groups):
            self._include_added_groups(self.last_epoch + advances)
        if advances:
            super().step()
            if detector is not None:
                detector.stepped = False
        if metrics is not None:
            self.feed(metrics)

    def _require_plateau(self) -> ReduceLROnPlateau:
        """Return the plateau that takes metrics; raise ValueError if there is none."""
        if self._plateau is None:
            raise ValueError("metrics: this ScheduleLR has no plateau")
        return self._plateau

    def feed(self, metrics: SupportsFloat) -> None:
        """Pass a metric to the plateau without advancing the schedule, for validation that is less frequent than steps.

        Args:
            metrics: Metric for the plateau.

        Raises:
            TypeError: ``metrics`` is not a number. Nothing has been changed.
            ValueError: There is no plateau; a parameter group was added for which there is no schedule; ``base_lrs``
                has another number of rates. Nothing has been changed.
        """
        self._require_plateau()
        check_number("metrics", metrics)
        self._include_added_groups(self.last_epoch)
        plateau = self._require_plateau()  # including a group replaces it
        self._reduced_bases(plateau)
        plateau.step(metrics)
        if self.last_epoch >= 0:  # a part of a sequence may not have started
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

    def _loaded(self, state_dict: dict[str, Any]) -> tuple[ScheduleLR, list[float | Tensor], list[list[float]]]:
        """Return a copy that has loaded a state, the rates, and the values of the other hyperparameters.

        Raises:
            ValueError: As ``load_state_dict``.
        """
        if "bases" not in state_dict:
            raise ValueError("state_dict is not that of a ScheduleLR; to resume without a state_dict, pass last_epoch")
        bases, own = state_dict["bases"], self._bases()
        saved_values = state_dict.get("values")  # states of earlier versions have none
        for saved in (bases, state_dict["schedules"], saved_values or bases):
            if {name: len(each) for name, each in saved.items()} != {name: len(each) for name, each in own.items()}:
                raise ValueError(
                    f"state_dict is for {', '.join(saved)} of {len(saved.get('lr', ()))} parameter groups, "
                    f"but this scheduler sets {', '.join(own)} of {len(own['lr'])}"
                )
        loaded = copy.copy(self)
        loaded.last_epoch, loaded._step_count = state_dict["last_epoch"], state_dict["_step_count"]
        loaded.base_lrs = [
            put_number(copied(base), saved) for base, saved in zip(self.base_lrs, bases["lr"], strict=True)
        ]
        loaded._hyperparameters = [replace(h, bases=list(bases[h.name])) for h in self._hyperparameters]
        loaded._load_plateau(state_dict["plateau"], bases["lr"])
        if loaded.last_epoch < 0:  # a part of a sequence that has not started
            return loaded, [], []
        lrs, values = loaded._computed(loaded.last_epoch)
        if saved_values and state_dict["schedules"] == self._texts():
            lrs, values = list(saved_values["lr"]), [saved_values[h.name] for h in self._hyperparameters]
        return loaded, lrs, values

    def _load_plateau(self, saved: dict[str, Any] | None, bases: list[float]) -> None:
        """Replace the plateau, if there is one, by a copy that has loaded a state or, without a state, is reset."""
        if self._plateau is None:
            return
        self._plateau = plateau = copy.deepcopy(self._plateau)
        if saved is None:
            plateau._reset()
        else:
            plateau.load_state_dict(saved)
        lrs = bases if saved is None else plateau.get_last_lr()
        for group, lr, base in zip(plateau.optimizer.param_groups, lrs, bases, strict=True):
            group.update(lr=lr, initial_lr=base)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of a ScheduleLR, and set the optimizer's hyperparameters to the values of that state.

        Args:
            state_dict: State of a ScheduleLR. If its schedules differ from those of this scheduler, this method warns,
                and this scheduler keeps its own. If its base values differ, this method warns, and the state's values
                are used; to change a rate, assign ``base_lrs`` afterwards. If only one of the two has a plateau, the
                plateau is reset.

        Raises:
            ValueError: The state is that of another class, or has another number of parameter groups or other
                hyperparameters; or a beta would leave [0, 1). Nothing has been changed.
        """
        extended = self._with_added_groups()
        loaded, lrs, values = extended._loaded(state_dict)
        extended._warn_of_differences(state_dict)
        self._replace_by(loaded)
        if self.last_epoch >= 0:
            self._write(lrs, values)

    def _warn_of_differences(self, state_dict: dict[str, Any]) -> None:
        """Warn if a state was made with other schedules or with other base values."""
        for name, texts in self._texts().items():
            for number, (text, saved) in enumerate(zip(texts, state_dict["schedules"][name], strict=True)):
                if text != saved:
                    warnings.warn(
                        f"state_dict was made with {saved} for {name} of parameter group {number}; this scheduler "
                        f"continues with {text}",
                        UserWarning,
                        stacklevel=3,
                    )
        for name, values in self._bases().items() if self._bases_given else ():
            for number, (value, base) in enumerate(zip(values, state_dict["bases"][name], strict=True)):
                if not math.isclose(value, base, rel_tol=1e-6):  # a tensor of float32 may hold the same rate
                    warnings.warn(
                        f"state_dict was made with a base of {base} for {name} of parameter group {number}, not "
                        f"{value}; this scheduler continues with {base}. To change a rate, assign base_lrs after "
                        "load_state_dict",
                        UserWarning,
                        stacklevel=3,
                    )


def _plateau_group(base: float | Tensor) -> dict[str, Any]:
    """Return a parameter group that holds only a base_lr, for a plateau."""
    return {"params": [torch.empty(0)], "lr": float(base), "initial_lr": float(base)}
