"""torch's learning rate schedulers, with previews and composition.

Each class is a subclass of the torch class of the same name: arguments, errors, attributes, ``state_dict`` and rates
are torch's. Each has the methods ``preview`` and ``plot`` (:func:`onepass.preview`, :func:`onepass.plot`). The
schedulers work with torch's optimizers and with onepass's. Five classes differ from torch's, as their documentation
describes: :class:`SequentialLR`, :class:`ChainedScheduler`, :class:`CosineAnnealingLR`, :class:`LinearLR`,
:class:`PolynomialLR`.

**Resuming with state_dicts.** After ``load_state_dict`` of optimizer and scheduler, the rates are those of an
uninterrupted run. The optimizer may be loaded before or after the scheduler is created, or after the scheduler is
loaded. ``state_dict()["_last_lr"]`` has the current rates of the parameter groups. ``load_state_dict`` writes these
rates into the groups, and the momentum or betas that :class:`OneCycleLR` and :class:`CyclicLR` set. It does not if the
optimizer was loaded after the scheduler was created, because the groups then already have the rates of the optimizer's
state, or rates that were set since. So several schedulers on one optimizer may be loaded in any order. In torch's state
of one of several schedulers, ``_last_lr`` has the rate that this scheduler set, not the current one. To load such
states, create the schedulers before the optimizer is loaded, as torch's documentation requires.

**Adding parameter groups.** If a scheduler has the same argument for all groups, its next step includes a group that
was added later (``add_param_group``). The group's ``initial_lr``, if it has none, is set to its current rate. Otherwise
that step raises a ValueError that names the group, and changes nothing. :class:`CyclicLR` always raises;
:class:`OneCycleLR` and :class:`SWALR` raise unless the group has the keys that they read.

**Resuming without the scheduler's state_dict.** ``last_epoch`` counts calls of ``step()``, usually one per epoch, and
one per batch for :class:`OneCycleLR` and :class:`CyclicLR`. After n calls, load the optimizer's state_dict and pass
``last_epoch=n - 1`` (the index of the last completed step) to the constructor; for :class:`SequentialLR`, pass n. Five
schedulers of torch do not resume correctly in this way, and need their ``state_dict``: :class:`StepLR`,
:class:`MultiStepLR` and :class:`ConstantLR` if the n-th call changed the rate (they change it again),
:class:`CosineAnnealingWarmRestarts` with ``T_mult`` > 1 from n = 2 ``T_0`` on, and :class:`SWALR` while it anneals.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, SupportsFloat

from torch import Tensor
from torch.optim import Optimizer, lr_scheduler, swa_utils

from .optimizers.arguments import number, put_number
from .schedules.preview import Previewed
from .schedules.preview import plot as plot
from .schedules.preview import preview as preview
from .schedules.rates import copied, current_lrs, initial_lr
from .schedules.schedule_lr import ScheduleLR as ScheduleLR
from .schedules.transformers import get_constant_schedule as get_constant_schedule
from .schedules.transformers import get_constant_schedule_with_warmup as get_constant_schedule_with_warmup
from .schedules.transformers import get_cosine_schedule_with_warmup as get_cosine_schedule_with_warmup
from .schedules.transformers import (
    get_cosine_with_hard_restarts_schedule_with_warmup as get_cosine_with_hard_restarts_schedule_with_warmup,
)
from .schedules.transformers import (
    get_cosine_with_min_lr_schedule_with_warmup as get_cosine_with_min_lr_schedule_with_warmup,
)
from .schedules.transformers import get_inverse_sqrt_schedule as get_inverse_sqrt_schedule
from .schedules.transformers import get_linear_schedule_with_warmup as get_linear_schedule_with_warmup
from .schedules.transformers import (
    get_polynomial_decay_schedule_with_warmup as get_polynomial_decay_schedule_with_warmup,
)
from .schedules.transformers import get_scheduler as get_scheduler
from .schedules.transformers import get_wsd_schedule as get_wsd_schedule

# Bound at import, because users may replace torch's names by those of this module.
_TorchScheduler = lr_scheduler.LRScheduler
_TorchPlateau = lr_scheduler.ReduceLROnPlateau
_TorchSWALR = swa_utils.SWALR
_step_sequence = lr_scheduler.SequentialLR.step
_step_chain = lr_scheduler.ChainedScheduler.step


_DRIVEN = ("lr", "momentum", "betas", "weight_decay")  # hyperparameters that schedulers set


def _put_back(held: Any, value: Any) -> Any:
    """Return the new value of a hyperparameter or of a tuple of them; tensors are filled in place."""
    if isinstance(value, tuple):
        return tuple(map(_put_back, held, value))
    return put_number(held, value)


class LRScheduler(Previewed, lr_scheduler.LRScheduler):
    """Base class of schedulers. A subclass defines ``get_lr()``, which returns each group's rate at ``last_epoch``.

    Example:
        >>> optimizer = onepass.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
        >>> class Halving(onepass.lr_scheduler.LRScheduler):
        ...     def get_lr(self):
        ...         return [lr * 0.5**self.last_epoch for lr in self.base_lrs]
        >>> Halving(optimizer).preview(3)[:, 0].tolist()
        [0.5, 0.25, 0.125]
    """

    def _initial_step(self) -> None:
        super()._initial_step()
        _note_groups(self.optimizer)

    def _take_up_groups(self) -> None:
        _take_up_groups(self)

    def _update_lr(self, epoch: int | None = None) -> None:
        if len(self.base_lrs) < len(self.optimizer.param_groups):
            try:
                self._take_up_groups()
            except ValueError:
                if epoch is None:
                    self._step_count -= 1  # step() has already counted this step
                raise
        super()._update_lr(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with torch's keys; ``_last_lr`` has the current rates of the groups."""
        with contextlib.suppress(ValueError):  # which the next step will raise
            self._take_up_groups()
        state: dict[str, Any] = super().state_dict()
        if "_last_lr" in state:
            own, lrs = state["_last_lr"], current_lrs(self.optimizer)
            _tell_rates(state, own if list(map(_plain, own)) == list(map(_plain, lrs)) else lrs)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class or of torch's, and write the rates of the saved run into the groups.

        If the optimizer was loaded after this scheduler was created, the groups keep their rates.

        Args:
            state_dict: The result of ``state_dict()``. It is not changed.

        Raises:
            ValueError: The state has another number of parameter groups or schedulers. Nothing has been changed.
        """
        _check_state(self, state_dict)
        groups = self.optimizer.param_groups
        before = [{key: copied(group[key]) for key in _DRIVEN if key in group} for group in groups]
        super().load_state_dict(dict(state_dict))  # a copy, because torch's classes remove keys from it
        if getattr(self.optimizer, "_scheduled_groups", groups) is not groups:
            # Undo what the parts of a composition have written into the groups while they were loaded.
            for group, values in zip(groups, before, strict=True):
                group.update((key, _put_back(group[key], value)) for key, value in values.items())
            return
        if "_last_lr" not in state_dict:
            return
        finished, active = _in_turn(self)
        for leaf in finished + active:
            _put_momentum(leaf)
        for group, lr in zip(groups, state_dict["_last_lr"], strict=True):
            group["lr"] = put_number(group["lr"], lr if isinstance(group["lr"], Tensor) else _plain(lr))
        self._last_lr = current_lrs(self.optimizer)


def _tell_rates(state: dict[str, Any], lrs: list[Any]) -> None:
    """Set ``_last_lr`` of a state and of the states of its parts, torch's included."""
    state["_last_lr"] = lrs
    for part in state.get("_schedulers", []):
        if "_last_lr" in part:
            _tell_rates(part, lrs)


def _plain(lr: Any) -> Any:
    return number(lr) if isinstance(lr, Tensor) else lr


def _put_momentum(scheduler: Any) -> None:
    """Write the momentum or betas at ``last_epoch`` into the groups, if the scheduler sets them."""
    if isinstance(scheduler, ScheduleLR):
        scheduler._write_driven()
        return
    if not getattr(scheduler, "cycle_momentum", False):
        return
    # Parts of a sequence have a negative last_epoch before they start. OneCycleLR raises after its last step.
    if 0 <= scheduler.last_epoch <= getattr(scheduler, "total_steps", scheduler.last_epoch):
        scheduler._get_lr_called_within_step = True  # without it, get_lr, which also sets the momentum, warns
        scheduler.get_lr()
        scheduler._get_lr_called_within_step = False


def _in_turn(scheduler: Any) -> tuple[list[Any], list[Any]]:
    """Return the finished leaves of a scheduler, in the order of their last steps, and the active leaves."""
    if not hasattr(scheduler, "_schedulers"):
        return [], _leaves(scheduler)
    finished: list[Any] = []
    active: list[Any] = []
    turn = bisect_right(scheduler._milestones, scheduler.last_epoch) if hasattr(scheduler, "_milestones") else None
    for index, part in enumerate(scheduler._schedulers):
        earlier, now = _in_turn(part)
        finished += earlier
        (active if turn in (None, index) else finished).extend(now)
    return finished, active


def _note_groups(optimizer: Optimizer) -> None:
    """Store the list of groups for which a scheduler was created. Loading an optimizer creates a new list."""
    optimizer._scheduled_groups = optimizer.param_groups  # type: ignore[attr-defined]


def _check_state(scheduler: Any, state: dict[str, Any]) -> None:
    """Raise if a state, or that of a part, has another number of groups or schedulers."""
    if isinstance(scheduler, ScheduleLR):
        scheduler._check_state(state)
        return
    name = type(scheduler.plateau if isinstance(scheduler, _Plateau) else scheduler).__name__
    groups = len(scheduler.optimizer.param_groups)
    if "_last_lr" in state and len(state["_last_lr"]) != groups:
        raise ValueError(
            f"state_dict has {len(state['_last_lr'])} parameter groups, but the optimizer of this {name} has {groups}"
        )
    if "_schedulers" in state and hasattr(scheduler, "_schedulers"):
        if len(state["_schedulers"]) != len(scheduler._schedulers):
            raise ValueError(
                f"state_dict has {len(state['_schedulers'])} schedulers, "
                f"but this {name} has {len(scheduler._schedulers)}"
            )
        for part, part_state in zip(scheduler._schedulers, state["_schedulers"], strict=True):
            _check_state(part, part_state)


# After a group was added, torch's schedulers fail in the middle of the next or a later step, or continue without the
# new group's initial rate, which compositions need.


def _take_up_groups(scheduler: Any) -> None:
    """Include the parameter groups that were added after a scheduler was created.

    Args:
        scheduler: A scheduler of onepass or torch.

    Raises:
        ValueError: The scheduler, or a part of it, has arguments for each group. Nothing has been changed.
    """
    leaves = _leaves(scheduler)
    for leaf in leaves:
        _refuse_groups(leaf)
    for leaf in leaves:
        _add_groups(leaf)


def _leaves(scheduler: Any) -> list[Any]:
    """Return a list of the scheduler itself or, for a composition, of its parts, recursively."""
    if hasattr(scheduler, "_schedulers"):
        return [leaf for part in scheduler._schedulers for leaf in _leaves(part)]
    return [scheduler.plateau if isinstance(scheduler, _Plateau) else scheduler]


def _known_groups(scheduler: Any) -> int:
    """Return the number of groups for which a scheduler was created, or all groups if it does not store it."""
    if isinstance(scheduler, _TorchPlateau):
        return len(scheduler.min_lrs)
    return len(getattr(scheduler, "base_lrs", scheduler.optimizer.param_groups))


def _refuse_groups(scheduler: Any) -> None:
    if isinstance(scheduler, ScheduleLR):
        scheduler._refuse_groups()
        return
    for index, group in enumerate(scheduler.optimizer.param_groups):
        if index >= _known_groups(scheduler) and (refusal := _refusal(scheduler, group)):
            raise ValueError(
                f"{type(scheduler).__name__}: parameter group {index} was added after the scheduler was made, and "
                f"{refusal}. Make a new scheduler for all groups"
            )


def _add_groups(scheduler: Any) -> None:
    groups, known = scheduler.optimizer.param_groups, _known_groups(scheduler)
    if isinstance(scheduler, ScheduleLR):
        scheduler._add_groups()
    elif known < len(groups) and not isinstance(scheduler, _TorchPlateau):  # plateaus include new groups themselves
        scheduler.base_lrs = [*scheduler.base_lrs, *map(initial_lr, groups[known:])]
        if lambdas := getattr(scheduler, "lr_lambdas", None):
            scheduler.lr_lambdas = [*lambdas, *lambdas[:1] * (len(groups) - len(lambdas))]


def _refusal(scheduler: Any, group: dict[str, Any]) -> str:
    """Return why a scheduler cannot include a group; "" if it can."""
    lambdas = getattr(scheduler, "lr_lambdas", [])
    if any(f is not lambdas[0] for f in lambdas):
        return "lr_lambda is a list with a function for each group"
    if isinstance(scheduler, _TorchPlateau):
        return "min_lr is a list with a number for each group" if scheduler.default_min_lr is None else ""
    if hasattr(scheduler, "max_lrs"):  # CyclicLR
        return "base_lr and max_lr are those of the groups before it"
    needed = ["swa_lr"] if isinstance(scheduler, _TorchSWALR) else []
    if hasattr(scheduler, "_schedule_phases"):  # OneCycleLR
        needed = ["initial_lr", "max_lr", "min_lr"]
        needed += ["max_momentum", "base_momentum"] if scheduler.cycle_momentum else []
    missing = [key for key in needed if key not in group]
    return f"has no {', '.join(missing)}" if missing else ""


# Some schedulers multiply the previous rate, and no factor changes a rate of zero. torch's start at the current rate of
# the optimizer, so a second scheduler on an optimizer whose rate is zero stays at zero.


def _in_use(optimizer: Optimizer) -> bool:
    """Return whether an optimizer comes from a run, and not from an earlier link of a chain under construction."""
    has_scheduler = hasattr(getattr(optimizer, "step", None), "_wrapped_by_lr_sched")
    return not has_scheduler or getattr(optimizer, "_opt_called", False)


def _leave(floor: float, steps: int, scheduler: Any) -> None:
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


class CosineAnnealingLR(LRScheduler, lr_scheduler.CosineAnnealingLR):
    """Cosine annealing: ``eta_min + (lr(0) - eta_min) (1 + cos(pi t / T_max)) / 2``; periodic after ``T_max``.

    If an earlier scheduler has reduced the optimizer's rate to ``eta_min``, a new one starts at the value of the
    formula: the optimizer's ``initial_lr`` or, with ``last_epoch``, that of a later step. torch's class stays at
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
        in_use = _in_use(optimizer)
        super().__init__(optimizer, T_max, eta_min, last_epoch)
        if in_use:
            _leave(eta_min, T_max, self)


class LinearLR(LRScheduler, lr_scheduler.LinearLR):
    """Linear change from ``start_factor lr(0)`` to ``end_factor lr(0)`` in ``total_iters`` steps, then constant.

    On an optimizer whose rate is zero, a new one starts at the value of the formula; torch's class stays at zero.

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
        in_use = _in_use(optimizer)
        super().__init__(optimizer, start_factor, end_factor, total_iters, last_epoch)
        if in_use:
            _leave(0.0, total_iters, self)


class PolynomialLR(LRScheduler, lr_scheduler.PolynomialLR):
    """Polynomial decay: ``lr(0) (1 - t / total_iters) ** power``, then zero.

    On an optimizer whose rate is zero, a new one starts at the value of the formula; torch's class stays at zero.

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
        in_use = _in_use(optimizer)
        super().__init__(optimizer, total_iters, power, last_epoch)
        if in_use:
            _leave(0.0, total_iters, self)


class ReduceLROnPlateau(LRScheduler, lr_scheduler.ReduceLROnPlateau):
    """Multiply the rate by ``factor`` when a metric has not improved for more than ``patience`` steps.

    It may be a part of :class:`SequentialLR` and :class:`ChainedScheduler`, whose ``step(metrics)`` then takes the
    metric. For the arguments see :class:`torch.optim.lr_scheduler.ReduceLROnPlateau`.

    Example:
        >>> optimizer = onepass.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
        >>> scheduler = onepass.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1)
        >>> scheduler.preview(5, metrics=[1.0, 1.0, 1.0, 1.0])[:, 0].tolist()
        [0.5, 0.5, 0.5, 0.25, 0.25]
    """

    def _reset(self) -> None:
        super()._reset()
        _note_groups(self.optimizer)

    def step(self, metrics: SupportsFloat, epoch: int | None = None) -> None:  # type: ignore[override]
        """Record a metric, and reduce the rate if the metric has not improved for more than ``patience`` steps.

        Args:
            metrics: The metric.
            epoch: Deprecated; the number of this step.

        Raises:
            RuntimeError: The rate must be reduced, but a parameter group was added and ``min_lr`` is a list without a
                value for it. Nothing has been changed.
        """
        before = dict(self.__dict__) if self.default_min_lr is None else {}
        try:
            super().step(metrics, epoch)
        except RuntimeError:
            self.__dict__.update(before)
            raise


class _Plateau:
    """A plateau as a part of a composition. A step without a metric does not change the rate."""

    def __init__(self, plateau: Any) -> None:
        self.optimizer = plateau.optimizer
        self.plateau = plateau
        self.metrics: SupportsFloat | None = None
        for group in self.optimizer.param_groups:
            initial_lr(group)  # torch's plateau is the only scheduler that does not set it

    def step(self) -> None:
        if self.metrics is not None:
            self.plateau.step(self.metrics)

    def get_last_lr(self) -> list[Any]:
        return current_lrs(self.optimizer)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self.plateau.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.plateau.load_state_dict(state_dict)

    def _initial_step(self) -> None:
        """Do nothing: a plateau has no initial rate."""

    def _update_lr(self, epoch: int) -> None:
        """Start in a sequence from the optimizer's initial rates, as all parts do."""
        _to_initial_lr(self.optimizer)


def _to_initial_lr(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        group["lr"] = put_number(group["lr"], group["initial_lr"])


def _begin(part: Any) -> None:
    """Start a part, which may have been stepped before."""
    if isinstance(part, _TorchScheduler) and not isinstance(part, _Composition):
        part.last_epoch = -1
    part._initial_step()


def _parts(schedulers: Sequence[Any]) -> list[Any]:
    return [_Plateau(s) if isinstance(s, _TorchPlateau) else s for s in schedulers]


class _Composition(LRScheduler):
    """Base class of :class:`SequentialLR` and :class:`ChainedScheduler`, which pass metrics to their parts and nest."""

    _schedulers: Any

    def _take_up_groups(self) -> None:
        super()._take_up_groups()
        for group in self.optimizer.param_groups:
            initial_lr(group)  # parts start from initial_lr

    def _step_with(self, metrics: SupportsFloat) -> None:
        self._offer(metrics)
        try:
            self.step()
        finally:
            self._offer(None)

    def _offer(self, metrics: SupportsFloat | None) -> None:
        """Pass the metric of this step, or None after the step, to all plateaus in this composition."""
        for part in self._schedulers:
            if isinstance(part, _Plateau):
                part.metrics = metrics
            elif isinstance(part, _Composition):
                part._offer(metrics)

    def _begin(self) -> None:
        raise NotImplementedError

    def _initial_step(self) -> None:
        self._begin()

    def _update_lr(self, epoch: int | None = None) -> None:
        _to_initial_lr(self.optimizer)
        self._begin()


class SequentialLR(_Composition, lr_scheduler.SequentialLR):
    """Several schedulers in sequence: at each milestone the next one starts, from the optimizer's initial rates.

    Differences from torch's class:

    - ``last_epoch=n`` resumes a run after n steps (n is the attribute ``last_epoch`` of the interrupted scheduler),
      whichever part is active. The parts are passed as for a new run, and stepped n times. torch's class starts with
      the first part for every n.
    - Parts may be :class:`ReduceLROnPlateau`, torch's or onepass's. ``step(metrics)`` passes the metric to the plateau
      that is active. A ``step()`` without a metric counts towards the milestones, but does not change a plateau's rate.
      So a warm-up may be stepped per batch and the plateau per epoch.
    - Parts may be sequences and chains, which start when they become active. In torch's class, such a part is one step
      ahead if it is the first, and raises otherwise.

    Args:
        optimizer: The optimizer whose rates are set.
        schedulers: The parts, all on this optimizer.
        milestones: The steps at which the second and all later parts start; one fewer than parts.
        last_epoch: Number of steps already done, to resume a run; -1 for a new run.

    Raises:
        ValueError: There is no part, a part is on another optimizer, or the number of milestones is not one less than
            that of parts.
        TypeError: A part is not a scheduler.

    Example:
        >>> optimizer = onepass.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
        >>> warmup = onepass.lr_scheduler.LinearLR(optimizer, start_factor=0.5, total_iters=2)
        >>> decay = onepass.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
        >>> scheduler = onepass.lr_scheduler.SequentialLR(optimizer, [warmup, decay], milestones=[2])
        >>> [round(lr, 3) for lr in scheduler.preview(5)[:, 0].tolist()]
        [0.25, 0.375, 0.5, 0.25, 0.125]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedulers: list[lr_scheduler.LRScheduler],
        milestones: list[int],
        last_epoch: int = -1,
    ) -> None:
        super().__init__(optimizer, _parts(schedulers), milestones)
        _note_groups(optimizer)
        stepped = getattr(optimizer, "_opt_called", False)
        optimizer._opt_called = True  # type: ignore[attr-defined]  # otherwise the first of these steps warns
        for _ in range(last_epoch):
            self.step()
        optimizer._opt_called = stepped  # type: ignore[attr-defined]

    def step(self, metrics: SupportsFloat | None = None) -> None:
        """Advance by one step.

        Args:
            metrics: Metric for the plateaus; None: the plateaus do not change the rate.
        """
        if metrics is not None:
            self._step_with(metrics)
        else:
            if len(self._last_lr) != len(self.optimizer.param_groups):
                self._take_up_groups()
            _step_sequence(self)

    def _begin(self) -> None:
        self.last_epoch = 0
        part = self._schedulers[bisect_right(self._milestones, 0)]
        _begin(part)
        self._last_lr = part.get_last_lr()


class ChainedScheduler(_Composition, lr_scheduler.ChainedScheduler):
    """Several schedulers at the same time: in each step, each one changes the rate that the one before it has set.

    Differences from torch's class:

    - Links may be :class:`ReduceLROnPlateau`, torch's or onepass's, in any order. The rate is then that of the other
      links times the factors by which the plateaus have reduced it so far. This includes links that compute the rate
      from the step alone (:class:`LambdaLR`, :class:`OneCycleLR`, ...); stepped by hand, these undo a plateau's
      reductions. ``step(metrics)`` passes the metric to the plateaus; ``step()`` steps the other links only.
    - Links may be sequences and chains.

    Args:
        schedulers: The links, all on one optimizer.
        optimizer: The optimizer whose rates are set; by default, that of the first link.

    Raises:
        ValueError: There is no link, or a link is on another optimizer.
        TypeError: A link is not a scheduler.

    Example:
        >>> optimizer = onepass.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
        >>> decay = onepass.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
        >>> plateau = onepass.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1)
        >>> scheduler = onepass.lr_scheduler.ChainedScheduler([decay, plateau])
        >>> scheduler.preview(3)[:, 0].tolist()
        [0.5, 0.25, 0.125]
    """

    _reductions: list[float] | None = None  # the plateaus' factor of each group; None without plateaus

    def __init__(self, schedulers: Sequence[lr_scheduler.LRScheduler], optimizer: Optimizer | None = None) -> None:
        super().__init__(_parts(schedulers), optimizer)
        _note_groups(self.optimizer)
        if any(isinstance(link, _Plateau) for link in self._schedulers):
            self._reductions = [1.0] * len(self.optimizer.param_groups)

    def step(self, metrics: SupportsFloat | None = None) -> None:
        """Advance by one step.

        Args:
            metrics: Metric for the plateaus; None: the plateaus do not change the rate.
        """
        if metrics is not None:
            self._step_with(metrics)
            return
        if len(self._last_lr) != len(self.optimizer.param_groups):
            self._take_up_groups()
        if self._reductions is not None:
            self._step_reduced(self._reductions)
        else:
            _step_chain(self)

    def _step_reduced(self, reductions: list[float]) -> None:
        groups = self.optimizer.param_groups
        reductions = reductions + [1.0] * (len(groups) - len(reductions))  # 1 for groups that were added
        for group, reduction in zip(groups, reductions, strict=True):
            if reduction > 0.0:
                group["lr"] = put_number(group["lr"], group["lr"] / reduction)
        for link in self._schedulers:
            if not isinstance(link, _Plateau):
                link.step()
        for group, reduction in zip(groups, reductions, strict=True):
            group["lr"] = put_number(group["lr"], group["lr"] * reduction)
        before = current_lrs(self.optimizer)
        for link in self._schedulers:
            if isinstance(link, _Plateau):
                link.step()
        self._last_lr = current_lrs(self.optimizer)
        changes = zip(reductions, self._last_lr, before, strict=True)
        # A new list: a state_dict may hold the old one.
        self._reductions = [r if lr == old else r * float(lr / old) for r, lr, old in changes]

    def _begin(self) -> None:
        if self._reductions is not None:
            self._reductions = [1.0] * len(self.optimizer.param_groups)
        for link in self._schedulers:
            _begin(link)
        self._last_lr = current_lrs(self.optimizer)


class SWALR(LRScheduler, swa_utils.SWALR):
    """Anneal the optimizer's rate to ``swa_lr`` in ``anneal_epochs`` steps, then hold it, for weight averaging.

    For the arguments see :class:`torch.optim.swa_utils.SWALR`.

    Source: Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", arXiv:1803.05407.

    Example:
        >>> optimizer = onepass.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
        >>> scheduler = onepass.lr_scheduler.SWALR(optimizer, swa_lr=0.1, anneal_epochs=4)
        >>> [round(lr, 3) for lr in scheduler.preview(6)[:, 0].tolist()]
        [0.5, 0.441, 0.3, 0.159, 0.1, 0.1]
    """


class _WarmRestarts(LRScheduler):
    def step(self, epoch: float | None = None) -> None:
        """Advance by one step, or to ``epoch``, which may be fractional."""
        if len(self.base_lrs) < len(self.optimizer.param_groups):
            self._take_up_groups()
        super().step(epoch)  # type: ignore[arg-type]


# onepass's base classes of the classes that the loop below creates.
_BASES = {"CosineAnnealingWarmRestarts": _WarmRestarts}

if TYPE_CHECKING:
    # The classes that the loop below creates.

    class LambdaLR(LRScheduler, lr_scheduler.LambdaLR): ...

    class MultiplicativeLR(LRScheduler, lr_scheduler.MultiplicativeLR): ...

    class StepLR(LRScheduler, lr_scheduler.StepLR): ...

    class MultiStepLR(LRScheduler, lr_scheduler.MultiStepLR): ...

    class ConstantLR(LRScheduler, lr_scheduler.ConstantLR): ...

    class ExponentialLR(LRScheduler, lr_scheduler.ExponentialLR): ...

    class CyclicLR(LRScheduler, lr_scheduler.CyclicLR): ...

    class CosineAnnealingWarmRestarts(_WarmRestarts, lr_scheduler.CosineAnnealingWarmRestarts): ...

    class OneCycleLR(LRScheduler, lr_scheduler.OneCycleLR): ...

    class _LRScheduler(LRScheduler, lr_scheduler._LRScheduler): ...


EPOCH_DEPRECATION_WARNING = getattr(lr_scheduler, "EPOCH_DEPRECATION_WARNING", "")

# These, and all other schedulers of the installed torch, which depend on its version; with torch's documentation.
for _name in [*lr_scheduler.__all__, "_LRScheduler"]:
    if _name not in globals() and hasattr(lr_scheduler, _name):
        _theirs = getattr(lr_scheduler, _name)
        if isinstance(_theirs, type) and issubclass(_theirs, lr_scheduler.LRScheduler):
            _theirs = type(
                _name, (_BASES.get(_name, LRScheduler), _theirs), {"__module__": __name__, "__doc__": _theirs.__doc__}
            )
        globals()[_name] = _theirs

__all__ = [*lr_scheduler.__all__, "SWALR"]
