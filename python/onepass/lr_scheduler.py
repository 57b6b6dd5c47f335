"""Learning-rate schedulers: those of torch, which here tell beforehand what they will do, and compose.

Every class is a subclass of torch's of the same name: arguments, errors, attributes, ``state_dict`` and rates are
torch's. Each has :meth:`~onepass.preview.Previewed.preview` and :meth:`~onepass.preview.Previewed.plot`. They work on
torch's optimizers as well as on ours. Where torch has it wrong, the class says what it does instead:
:class:`SequentialLR`, :class:`ChainedScheduler`, :class:`CosineAnnealingLR`, :class:`LinearLR`, :class:`PolynomialLR`.

``last_epoch`` counts calls of ``step()``, whatever these are called after: batches for :class:`OneCycleLR` and
:class:`CyclicLR`, as a rule. A run that was stopped is best taken up again with ``load_state_dict`` of optimizer and
scheduler. Without the scheduler's, load the optimizer's and give the constructor ``last_epoch=n - 1`` after n calls
(the index of the last step that was done), but :class:`SequentialLR` n itself. There are five that torch does not take
up rightly so, and that need their ``state_dict``: :class:`StepLR`, :class:`MultiStepLR` and :class:`ConstantLR` where
the n-th call has changed the rate (they change it once more), :class:`CosineAnnealingWarmRestarts` with a ``T_mult``
above 1 from n = 2 ``T_0`` on, and :class:`SWALR` while it anneals.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, SupportsFloat

from torch import Tensor
from torch.optim import Optimizer, lr_scheduler, swa_utils

from ._native import put_number
from .preview import Previewed
from .preview import plot as plot
from .preview import preview as preview
from .schedule_lr import ScheduleLR as ScheduleLR
from .schedule_lr import get_constant_schedule as get_constant_schedule
from .schedule_lr import get_constant_schedule_with_warmup as get_constant_schedule_with_warmup
from .schedule_lr import get_cosine_schedule_with_warmup as get_cosine_schedule_with_warmup
from .schedule_lr import (
    get_cosine_with_hard_restarts_schedule_with_warmup as get_cosine_with_hard_restarts_schedule_with_warmup,
)
from .schedule_lr import get_cosine_with_min_lr_schedule_with_warmup as get_cosine_with_min_lr_schedule_with_warmup
from .schedule_lr import get_inverse_sqrt_schedule as get_inverse_sqrt_schedule
from .schedule_lr import get_linear_schedule_with_warmup as get_linear_schedule_with_warmup
from .schedule_lr import get_polynomial_decay_schedule_with_warmup as get_polynomial_decay_schedule_with_warmup
from .schedule_lr import get_scheduler as get_scheduler
from .schedule_lr import get_wsd_schedule as get_wsd_schedule


class LRScheduler(Previewed, lr_scheduler.LRScheduler):
    """The base of all schedulers, and of your own: ``get_lr()`` returns each group's rate at ``self.last_epoch``."""


def _lrs(optimizer: Optimizer) -> list[Any]:
    """The rates of all groups; of tensors, copies."""
    lrs = [group["lr"] for group in optimizer.param_groups]
    return [lr.clone() if isinstance(lr, Tensor) else lr for lr in lrs]


# Some schedulers multiply the rate before, and no factor leads out of a rate that has come down to zero. torch's begin
# at the rate that the optimizer has, so that a second one on the same optimizer stays at zero for good.


def _in_use(optimizer: Optimizer) -> bool:
    """Whether an optimizer comes out of a run, and not from an earlier link of a chain that is being built."""
    has_scheduler = hasattr(getattr(optimizer, "step", None), "_wrapped_by_lr_sched")
    return not has_scheduler or getattr(optimizer, "_opt_called", False)


def _leave(floor: float, scheduler: Any) -> None:
    """Sets rates from which recursion cannot lead away to what the scheduler's closed form says."""
    closed_form = scheduler._get_closed_form_lr()
    for group, base, lr in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, closed_form, strict=True):
        if abs(group["lr"] - floor) <= 1e-12 * abs(base):  # the recursion's rounding may leave a little
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
    """

    def __init__(self, optimizer: Optimizer, T_max: int, eta_min: float = 0.0, last_epoch: int = -1) -> None:  # noqa: N803
        in_use = _in_use(optimizer)
        super().__init__(optimizer, T_max, eta_min, last_epoch)
        if in_use:
            _leave(eta_min, self)


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
            _leave(0.0, self)


class PolynomialLR(LRScheduler, lr_scheduler.PolynomialLR):
    """``lr(0) (1 - t / total_iters) ** power``, then zero.

    A new one on an optimizer whose rate is zero begins where the formula says, not at zero as torch's does.

    Args:
        optimizer: Whose rates are driven.
        total_iters: Steps down to zero.
        power: The exponent.
        last_epoch: The index of the last step done, to take up a run again; -1 for a new one.
    """

    def __init__(self, optimizer: Optimizer, total_iters: int = 5, power: float = 1.0, last_epoch: int = -1) -> None:
        in_use = _in_use(optimizer)
        super().__init__(optimizer, total_iters, power, last_epoch)
        if in_use:
            _leave(0.0, self)


class ReduceLROnPlateau(LRScheduler, lr_scheduler.ReduceLROnPlateau):
    """Multiplies the rate by ``factor`` when a metric has not improved for more than ``patience`` steps.

    It may be a part of :class:`SequentialLR` and :class:`ChainedScheduler`, whose ``step(metrics)`` takes its metric
    then. For the arguments see :class:`torch.optim.lr_scheduler.ReduceLROnPlateau`.
    """


class _Plateau:
    """A plateau as a part of others, which are stepped without a metric, too: it leaves the rate as it is then."""

    def __init__(self, plateau: Any) -> None:
        self.optimizer = plateau.optimizer
        self.plateau = plateau
        self.metrics: SupportsFloat | None = None
        for group, lr in zip(self.optimizer.param_groups, _lrs(self.optimizer), strict=True):
            group.setdefault("initial_lr", lr)  # as all schedulers but torch's plateau do

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
    if isinstance(part, lr_scheduler.LRScheduler) and not isinstance(part, _Composition):
        part.last_epoch = -1
    part._initial_step()


def _parts(schedulers: Sequence[Any]) -> list[Any]:
    return [_Plateau(s) if isinstance(s, lr_scheduler.ReduceLROnPlateau) else s for s in schedulers]


class _Composition(LRScheduler):
    """What :class:`SequentialLR` and :class:`ChainedScheduler` have in common: they pass metrics on, and nest."""

    _schedulers: Any

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
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedulers: list[lr_scheduler.LRScheduler],
        milestones: list[int],
        last_epoch: int = -1,
    ) -> None:
        super().__init__(optimizer, _parts(schedulers), milestones)
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
            lr_scheduler.SequentialLR.step(self)  # which super() would be slower to find

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
    """

    _reductions: list[float] | None = None  # what plateaus have made of each group's rate; None without plateaus

    def __init__(self, schedulers: Sequence[lr_scheduler.LRScheduler], optimizer: Optimizer | None = None) -> None:
        super().__init__(_parts(schedulers), optimizer)
        if any(isinstance(link, _Plateau) for link in self._schedulers):
            self._reductions = [1.0] * len(self.optimizer.param_groups)

    def step(self, metrics: SupportsFloat | None = None) -> None:
        """Goes on by one step.

        Args:
            metrics: For plateaus within; without, they leave the rate as it is.
        """
        if metrics is not None:
            self._step_with(metrics)
        elif self._reductions is not None:
            self._step_reduced(self._reductions)
        else:
            lr_scheduler.ChainedScheduler.step(self)  # which super() would be slower to find

    def _step_reduced(self, reductions: list[float]) -> None:
        groups = self.optimizer.param_groups
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
    """


if TYPE_CHECKING:
    # Those to which nothing is added but the preview.

    class LambdaLR(LRScheduler, lr_scheduler.LambdaLR): ...

    class MultiplicativeLR(LRScheduler, lr_scheduler.MultiplicativeLR): ...

    class StepLR(LRScheduler, lr_scheduler.StepLR): ...

    class MultiStepLR(LRScheduler, lr_scheduler.MultiStepLR): ...

    class ConstantLR(LRScheduler, lr_scheduler.ConstantLR): ...

    class ExponentialLR(LRScheduler, lr_scheduler.ExponentialLR): ...

    class CyclicLR(LRScheduler, lr_scheduler.CyclicLR): ...

    class CosineAnnealingWarmRestarts(LRScheduler, lr_scheduler.CosineAnnealingWarmRestarts): ...

    class OneCycleLR(LRScheduler, lr_scheduler.OneCycleLR): ...

    class _LRScheduler(LRScheduler, lr_scheduler._LRScheduler): ...


EPOCH_DEPRECATION_WARNING = getattr(lr_scheduler, "EPOCH_DEPRECATION_WARNING", "")

# These and what else the installed torch has, which differs from version to version; with torch's documentation.
for _name in [*lr_scheduler.__all__, "_LRScheduler"]:
    if _name not in globals() and hasattr(lr_scheduler, _name):
        _theirs = getattr(lr_scheduler, _name)
        if isinstance(_theirs, type) and issubclass(_theirs, lr_scheduler.LRScheduler):
            _theirs = type(_name, (LRScheduler, _theirs), {"__module__": __name__, "__doc__": _theirs.__doc__})
        globals()[_name] = _theirs

__all__ = [*lr_scheduler.__all__, "SWALR"]
