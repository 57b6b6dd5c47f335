"""Learning-rate schedulers: those of torch, which here tell beforehand what they will do, and compose.

Every class is a subclass of torch's of the same name: arguments, errors, attributes, ``state_dict`` and rates are
torch's. Each has ``preview`` and ``plot`` as methods (:func:`onepass.preview`, :func:`onepass.plot`). They work on
torch's optimizers as well as on ours. Where torch has it wrong, the class says what it does instead:
:class:`SequentialLR`, :class:`ChainedScheduler`, :class:`CosineAnnealingLR`, :class:`LinearLR`, :class:`PolynomialLR`.

``load_state_dict`` of optimizer and scheduler resumes a run with the rates of the run that never stopped, whether the
optimizer is loaded before or after the scheduler is made, or last. ``state_dict()["_last_lr"]`` is the rates that the
parameter groups have when it is called. ``load_state_dict`` puts these into the groups, with the momentum or betas
that :class:`OneCycleLR` and :class:`CyclicLR` drive, unless the optimizer was loaded since the scheduler was made: then
the groups have their rates from the optimizer's state, or from what was set since. So several schedulers that are
stepped by hand may be loaded in any order. torch's states of several schedulers tell the rate that each has set, not
the last one: make the schedulers before the optimizer is loaded, as torch's documentation asks for.

A parameter group that is added later (``add_param_group``) is taken up in the next step where one argument serves all
groups: its ``initial_lr``, if it has none, is its rate then. Otherwise that step raises a ValueError which names the
group, and changes nothing. So do the steps of :class:`CyclicLR`, :class:`OneCycleLR` and :class:`SWALR`, unless the
group brings the keys that the last two read.

``last_epoch`` counts calls of ``step()``, whatever these are called after: batches for :class:`OneCycleLR` and
:class:`CyclicLR`, as a rule. To resume without the scheduler's state_dict, load the optimizer's and give the
constructor ``last_epoch=n - 1`` after n calls (the index of the last step that was done), but :class:`SequentialLR` n
itself. There are five that torch does not take up rightly so, and that need their ``state_dict``: :class:`StepLR`,
:class:`MultiStepLR` and :class:`ConstantLR` where the n-th call has changed the rate (they change it once more),
:class:`CosineAnnealingWarmRestarts` with a ``T_mult`` above 1 from n = 2 ``T_0`` on, and :class:`SWALR` while it
anneals.
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

# Bound here: someone may replace torch's names by those of this module.
_TorchScheduler = lr_scheduler.LRScheduler
_TorchPlateau = lr_scheduler.ReduceLROnPlateau
_TorchSWALR = swa_utils.SWALR
_step_sequence = lr_scheduler.SequentialLR.step
_step_chain = lr_scheduler.ChainedScheduler.step


_DRIVEN = ("lr", "momentum", "betas", "weight_decay")  # what schedulers drive


def _copied(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_copied, value))
    return value.clone() if isinstance(value, Tensor) else value


def _put_back(held: Any, value: Any) -> Any:
    """What takes the place of a hyperparameter, or of a tuple of them."""
    if isinstance(value, tuple):
        return tuple(map(_put_back, held, value))
    return put_number(held, value)


def _lrs(optimizer: Optimizer) -> list[Any]:
    """The rates of all groups; of tensors, copies."""
    return [_copied(group["lr"]) for group in optimizer.param_groups]


class LRScheduler(Previewed, lr_scheduler.LRScheduler):
    """The base of all schedulers, and of your own: ``get_lr()`` returns each group's rate at ``self.last_epoch``.

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
                    self._step_count -= 1  # step() has counted this one
                raise
        super()._update_lr(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with the keys of torch's; ``_last_lr`` is the rates that the groups have now."""
        with contextlib.suppress(ValueError):  # which the next step will raise
            self._take_up_groups()
        state: dict[str, Any] = super().state_dict()
        if "_last_lr" in state:
            own, lrs = state["_last_lr"], _lrs(self.optimizer)
            _tell_rates(state, own if list(map(_plain, own)) == list(map(_plain, lrs)) else lrs)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class or of torch's, and put the rates of the saved run into the groups.

        The groups keep the rates they have if the optimizer was loaded after this scheduler was made.

        Args:
            state_dict: What ``state_dict()`` returned. It is not changed.

        Raises:
            ValueError: It is of another number of parameter groups or of schedulers. Nothing is changed then.
        """
        _check_state(self, state_dict)
        groups = self.optimizer.param_groups
        before = [{key: _copied(group[key]) for key in _DRIVEN if key in group} for group in groups]
        super().load_state_dict(dict(state_dict))  # a copy, because torch's classes take keys out of it
        if getattr(self.optimizer, "_scheduled_groups", groups) is not groups:
            for group, values in zip(groups, before, strict=True):
                group.update((key, _put_back(group[key], value)) for key, value in values.items())  # of parts that put
            return
        if "_last_lr" not in state_dict:
            return
        finished, active = _in_turn(self)
        for leaf in finished + active:
            _put_momentum(leaf)
        for group, lr in zip(groups, state_dict["_last_lr"], strict=True):
            group["lr"] = put_number(group["lr"], lr if isinstance(group["lr"], Tensor) else _plain(lr))
        self._last_lr = _lrs(self.optimizer)


def _tell_rates(state: dict[str, Any], lrs: list[Any]) -> None:
    """Let a state and those of its parts, torch's included, tell the rates that the groups have."""
    state["_last_lr"] = lrs
    for part in state.get("_schedulers", []):
        if "_last_lr" in part:
            _tell_rates(part, lrs)


def _plain(lr: Any) -> Any:
    return number(lr) if isinstance(lr, Tensor) else lr


def _put_momentum(scheduler: Any) -> None:
    """Put the momentum or betas at ``last_epoch`` into the groups, if a scheduler drives them."""
    if isinstance(scheduler, ScheduleLR):
        scheduler._write_driven()
        return
    if not getattr(scheduler, "cycle_momentum", False):
        return
    # Parts of a sequence have a negative last_epoch before they begin. OneCycleLR raises after its last step.
    if 0 <= scheduler.last_epoch <= getattr(scheduler, "total_steps", scheduler.last_epoch):
        scheduler._get_lr_called_within_step = True  # or get_lr, which sets the momentum as well, would warn
        scheduler.get_lr()
        scheduler._get_lr_called_within_step = False


def _in_turn(scheduler: Any) -> tuple[list[Any], list[Any]]:
    """The leaves of a scheduler in the order in which they last changed something: finished ones, and those in turn."""
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
    """Remember the list of groups that a scheduler was made for. An optimizer that is loaded has a new list."""
    optimizer._scheduled_groups = optimizer.param_groups  # type: ignore[attr-defined]


def _check_state(scheduler: Any, state: dict[str, Any]) -> None:
    """Raise if a state, or that of a part, is of another number of groups or of schedulers."""
    if isinstance(scheduler, ScheduleLR):
        scheduler._check_state(state)
        return
    name = type(scheduler.plateau if isinstance(scheduler, _Plateau) else scheduler).__name__
    groups = len(scheduler.optimizer.param_groups)
    if "_last_lr" in state and len(state["_last_lr"]) != groups:
        raise ValueError(
            f"state_dict: it is of {len(state['_last_lr'])} parameter groups, the optimizer of this {name} has {groups}"
        )
    if "_schedulers" in state and hasattr(scheduler, "_schedulers"):
        if len(state["_schedulers"]) != len(scheduler._schedulers):
            raise ValueError(
                f"state_dict: it is of {len(state['_schedulers'])} schedulers, "
                f"this {name} has {len(scheduler._schedulers)}"
            )
        for part, part_state in zip(scheduler._schedulers, state["_schedulers"], strict=True):
            _check_state(part, part_state)


# torch's schedulers fail in the middle of a step after a group was added, or at a later one, or go on without knowing
# the new group's first rate, which compositions need.


def _take_up_groups(scheduler: Any) -> None:
    """Take up the parameter groups that were added since a scheduler was made.

    Args:
        scheduler: One of ours or of torch's.

    Raises:
        ValueError: The scheduler, or a part of it, has arguments for each group. Nothing has been changed.
    """
    leaves = _leaves(scheduler)
    for leaf in leaves:
        _refuse_groups(leaf)
    for leaf in leaves:
        _add_groups(leaf)


def _leaves(scheduler: Any) -> list[Any]:
    """A scheduler, or the parts of a composition and of those within."""
    if hasattr(scheduler, "_schedulers"):
        return [leaf for part in scheduler._schedulers for leaf in _leaves(part)]
    return [scheduler.plateau if isinstance(scheduler, _Plateau) else scheduler]


def _known_groups(scheduler: Any) -> int:
    """The number of groups that a scheduler was made for, where it matters to it."""
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
    elif known < len(groups) and not isinstance(scheduler, _TorchPlateau):  # which looks for new groups itself
        scheduler.base_lrs = [*scheduler.base_lrs, *map(_initial_lr, groups[known:])]
        if lambdas := getattr(scheduler, "lr_lambdas", None):
            scheduler.lr_lambdas = [*lambdas, *lambdas[:1] * (len(groups) - len(lambdas))]


def _refusal(scheduler: Any, group: dict[str, Any]) -> str:
    """Why a scheduler cannot take up a group; "" if it can."""
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


def _initial_lr(group: dict[str, Any]) -> Any:
    """The rate that a group began with; by default, that which it has."""
    return _copied(group.setdefault("initial_lr", _copied(group["lr"])))


# Some schedulers multiply the rate before, and no factor leads out of a rate that has come down to zero. torch's begin
# at the rate that the optimizer has, so that a second one on the same optimizer stays at zero for good.


def _in_use(optimizer: Optimizer) -> bool:
    """Whether an optimizer comes out of a run, and not from an earlier link of a chain that is being built."""
    has_scheduler = hasattr(getattr(optimizer, "step", None), "_wrapped_by_lr_sched")
    return not has_scheduler or getattr(optimizer, "_opt_called", False)


def _leave(floor: float, steps: int, scheduler: Any) -> None:
    """Sets rates from which recursion cannot lead away to what the scheduler's closed form says."""
    groups = scheduler.optimizer.param_groups
    # The recursion's rounding may leave a little.
    stuck = [abs(g["lr"] - floor) <= 1e-12 * abs(base) for g, base in zip(groups, scheduler.base_lrs, strict=True)]
    if not steps or not any(stuck):
        return  # a schedule without steps has no closed form
    for group, is_stuck, lr in zip(groups, stuck, scheduler._get_closed_form_lr(), strict=True):
        if is_stuck:
            group["lr"] = put_number(group["lr"], lr)
    scheduler._last_lr = _lrs(scheduler.optimizer)


class CosineAnnealingLR(LRScheduler, lr_scheduler.CosineAnnealingLR):
    """Half a period of a cosine, ``eta_min + (lr(0) - eta_min) (1 + cos(pi t / T_max)) / 2``, and back again.

    A new one on an optimizer whose rate an earlier one has brought down to ``eta_min`` begins where the formula says:
    at the optimizer's ``initial_lr``, or, with ``last_epoch``, further on. torch's stays at ``eta_min`` for good.

    Args:
        optimizer: Whose rates are driven.
        T_max: Steps from the highest rate to the lowest.
        eta_min: The lowest rate.
        last_epoch: The index of the last step done, to take up a run again; -1 for a new one.

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
    """From ``start_factor lr(0)`` to ``end_factor lr(0)`` in a straight line of ``total_iters`` steps, then constant.

    A new one on an optimizer whose rate is zero begins where the formula says, not at zero as torch's does.

    Args:
        optimizer: Whose rates are driven.
        start_factor: Factor at the first step, in (0, 1].
        end_factor: Factor at the end, in [0, 1].
        total_iters: Steps from the one to the other.
        last_epoch: The index of the last step done, to take up a run again; -1 for a new one.

    Raises:
        ValueError: If a factor is out of its range.

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
    """``lr(0) (1 - t / total_iters) ** power``, then zero.

    A new one on an optimizer whose rate is zero begins where the formula says, not at zero as torch's does.

    Args:
        optimizer: Whose rates are driven.
        total_iters: Steps down to zero.
        power: The exponent.
        last_epoch: The index of the last step done, to take up a run again; -1 for a new one.

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
    """Multiplies the rate by ``factor`` when a metric has not improved for more than ``patience`` steps.

    It may be a part of :class:`SequentialLR` and :class:`ChainedScheduler`, whose ``step(metrics)`` takes its metric
    then. For the arguments see :class:`torch.optim.lr_scheduler.ReduceLROnPlateau`.

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
        """Look at a metric, and reduce the rate if it has not improved for too long.

        Args:
            metrics: The metric.
            epoch: Deprecated; the number of this step.

        Raises:
            RuntimeError: The rate is to be reduced, a parameter group was added, and ``min_lr`` is a list without a
                number for it. Nothing has been changed.
        """
        before = dict(self.__dict__) if self.default_min_lr is None else {}
        try:
            super().step(metrics, epoch)
        except RuntimeError:
            self.__dict__.update(before)
            raise


class _Plateau:
    """A plateau as a part of others, which are stepped without a metric, too: it leaves the rate as it is then."""

    def __init__(self, plateau: Any) -> None:
        self.optimizer = plateau.optimizer
        self.plateau = plateau
        self.metrics: SupportsFloat | None = None
        for group in self.optimizer.param_groups:
            _initial_lr(group)  # which all schedulers but torch's plateau set

    def step(self) -> None:
        if self.metrics is not None:
            self.plateau.step(self.metrics)

    def get_last_lr(self) -> list[Any]:
        return _lrs(self.optimizer)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self.plateau.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.plateau.load_state_dict(state_dict)

    def _initial_step(self) -> None:
        """Has no rate of its own to begin with."""

    def _update_lr(self, epoch: int) -> None:
        """Begins in a sequence, as all parts do, from the rates that the optimizer was made with."""
        _to_initial_lr(self.optimizer)


def _to_initial_lr(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        group["lr"] = put_number(group["lr"], group["initial_lr"])


def _begin(part: Any) -> None:
    """Lets a part begin, which may have been stepped before."""
    if isinstance(part, _TorchScheduler) and not isinstance(part, _Composition):
        part.last_epoch = -1
    part._initial_step()


def _parts(schedulers: Sequence[Any]) -> list[Any]:
    return [_Plateau(s) if isinstance(s, _TorchPlateau) else s for s in schedulers]


class _Composition(LRScheduler):
    """What :class:`SequentialLR` and :class:`ChainedScheduler` have in common: they pass metrics on, and nest."""

    _schedulers: Any

    def _take_up_groups(self) -> None:
        super()._take_up_groups()
        for group in self.optimizer.param_groups:
            _initial_lr(group)  # from which parts begin

    def _step_with(self, metrics: SupportsFloat) -> None:
        self._offer(metrics)
        try:
            self.step()
        finally:
            self._offer(None)

    def _offer(self, metrics: SupportsFloat | None) -> None:
        """Hands the metric of this step, or None after it, to all plateaus within."""
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
    """One scheduler after the other: at each milestone the next begins, from the rates the optimizer was made with.

    It differs from torch's in this:

    - ``last_epoch=n`` takes up a run of which n steps were done (n is the attribute ``last_epoch`` of the scheduler
      that was stopped), whichever part's turn it is: the parts are given as for a new run and stepped n times. torch's
      begins with the first part whatever n is.
    - Parts may be :class:`ReduceLROnPlateau`, torch's or ours. ``step(metrics)`` hands the metric to the plateau whose
      turn it is; a ``step()`` without one counts towards the milestones and leaves a plateau's rate as it is, so that
      a warm-up may go by batches and the plateau by epochs.
    - Parts may be sequences and chains themselves, which begin when their turn comes. torch's are a step ahead as first
      part, and raise as a later one.

    Args:
        optimizer: Whose rates are driven.
        schedulers: The parts, all on this optimizer.
        milestones: The steps at which the second part begins, the third, ...; one less than parts.
        last_epoch: Steps done before, to take up a run again; -1 for a new one.

    Raises:
        ValueError: If there is no part, a part is on another optimizer, or milestones are not one less than parts.
        TypeError: If a part is no scheduler.

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
        optimizer._opt_called = True  # type: ignore[attr-defined]  # or the first of these steps would warn
        for _ in range(last_epoch):
            self.step()
        optimizer._opt_called = stepped  # type: ignore[attr-defined]

    def step(self, metrics: SupportsFloat | None = None) -> None:
        """Goes on by one step.

        Args:
            metrics: For plateaus within; without, they leave the rate as it is.
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
    """Several schedulers at once, stepped one after the other: each changes what the one before has left.

    It differs from torch's in this:

    - Links may be :class:`ReduceLROnPlateau`, torch's or ours. The rate is then what the other links say, times the
      factors by which the plateaus have reduced it until now, in whatever order they stand. That holds for links that
      compute the rate anew, too (:class:`LambdaLR`, :class:`OneCycleLR`, ...), which undo a plateau's work if both are
      stepped by hand. ``step(metrics)`` hands the metric to the plateaus; ``step()`` without goes on with the others.
    - Links may be sequences and chains themselves.

    Args:
        schedulers: The links, all on one optimizer.
        optimizer: Whose rates are driven; by default, that of the first link.

    Raises:
        ValueError: If there is no link, or one is on another optimizer.
        TypeError: If a link is no scheduler.

    Example:
        >>> optimizer = onepass.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
        >>> decay = onepass.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
        >>> plateau = onepass.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1)
        >>> scheduler = onepass.lr_scheduler.ChainedScheduler([decay, plateau])
        >>> scheduler.preview(3)[:, 0].tolist()
        [0.5, 0.25, 0.125]
    """

    _reductions: list[float] | None = None  # what plateaus have made of each group's rate; None without plateaus

    def __init__(self, schedulers: Sequence[lr_scheduler.LRScheduler], optimizer: Optimizer | None = None) -> None:
        super().__init__(_parts(schedulers), optimizer)
        _note_groups(self.optimizer)
        if any(isinstance(link, _Plateau) for link in self._schedulers):
            self._reductions = [1.0] * len(self.optimizer.param_groups)

    def step(self, metrics: SupportsFloat | None = None) -> None:
        """Goes on by one step.

        Args:
            metrics: For plateaus within; without, they leave the rate as it is.
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
        reductions = reductions + [1.0] * (len(groups) - len(reductions))  # of groups that were added
        for group, reduction in zip(groups, reductions, strict=True):
            if reduction > 0.0:
                group["lr"] = put_number(group["lr"], group["lr"] / reduction)
        for link in self._schedulers:
            if not isinstance(link, _Plateau):
                link.step()
        for group, reduction in zip(groups, reductions, strict=True):
            group["lr"] = put_number(group["lr"], group["lr"] * reduction)
        before = _lrs(self.optimizer)
        for link in self._schedulers:
            if isinstance(link, _Plateau):
                link.step()
        self._last_lr = _lrs(self.optimizer)
        changes = zip(reductions, self._last_lr, before, strict=True)
        # A new list: state_dict may have given the old one away.
        self._reductions = [r if lr == old else r * float(lr / old) for r, lr, old in changes]

    def _begin(self) -> None:
        if self._reductions is not None:
            self._reductions = [1.0] * len(self.optimizer.param_groups)
        for link in self._schedulers:
            _begin(link)
        self._last_lr = _lrs(self.optimizer)


class SWALR(LRScheduler, swa_utils.SWALR):
    """From the optimizer's rate to ``swa_lr`` in ``anneal_epochs`` steps, then constant; for averaging weights.

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
        """Go on by one step, or to ``epoch``, which may be between two steps."""
        if len(self.base_lrs) < len(self.optimizer.param_groups):
            self._take_up_groups()
        super().step(epoch)  # type: ignore[arg-type]


# What is ours in the classes that are made in the loop below.
_BASES = {"CosineAnnealingWarmRestarts": _WarmRestarts}

if TYPE_CHECKING:
    # Those that have nothing else to themselves.

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

# These and what else the installed torch has, which differs from version to version; with torch's documentation.
for _name in [*lr_scheduler.__all__, "_LRScheduler"]:
    if _name not in globals() and hasattr(lr_scheduler, _name):
        _theirs = getattr(lr_scheduler, _name)
        if isinstance(_theirs, type) and issubclass(_theirs, lr_scheduler.LRScheduler):
            _theirs = type(
                _name, (_BASES.get(_name, LRScheduler), _theirs), {"__module__": __name__, "__doc__": _theirs.__doc__}
            )
        globals()[_name] = _theirs

__all__ = [*lr_scheduler.__all__, "SWALR"]
