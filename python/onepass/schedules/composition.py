"""Compositions of schedulers: :class:`SequentialLR` and :class:`ChainedScheduler`."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, SupportsFloat

from torch.optim import Optimizer, lr_scheduler

from ..optimizers.arguments import put_number
from .added_groups import remember_groups
from .plateau_part import PlateauPart, reset_to_initial_lr
from .rates import current_lrs, initial_lr, own_tensors
from .torch_base import LRScheduler

# Bound at import, because users may replace torch's names by onepass's.
TorchScheduler = lr_scheduler.LRScheduler
TorchPlateau = lr_scheduler.ReduceLROnPlateau
TorchSequence = lr_scheduler.SequentialLR
TorchChain = lr_scheduler.ChainedScheduler
_step_sequence = TorchSequence.step
_step_chain = TorchChain.step


class Composition(LRScheduler):
    """Base class of :class:`SequentialLR` and :class:`ChainedScheduler`, which pass metrics to their parts and nest."""

    _schedulers: Any

    def _include_added_groups(self) -> None:
        super()._include_added_groups()
        for group in self.optimizer.param_groups:
            initial_lr(group)  # parts start from initial_lr

    def _step_with(self, metrics: SupportsFloat) -> None:
        self._set_metrics(metrics)
        try:
            self.step()
        finally:
            self._set_metrics(None)

    def _set_metrics(self, metrics: SupportsFloat | None) -> None:
        """Pass the metric of this step, or None after the step, to all plateaus in this composition."""
        for part in self._schedulers:
            if isinstance(part, PlateauPart):
                part.metrics = metrics
            elif isinstance(part, Composition):
                part._set_metrics(metrics)

    def _start_parts(self) -> None:
        """Start the part or parts that are active at step 0, and set ``_last_lr``."""
        raise NotImplementedError

    def _initial_step(self) -> None:
        self._start_parts()

    def _update_lr(self, epoch: int | None = None) -> None:
        reset_to_initial_lr(self.optimizer)
        self._start_parts()


class SequentialLR(Composition, lr_scheduler.SequentialLR):
    """Several schedulers in sequence: at each milestone the next scheduler starts from the optimizer's initial rates.

    Differences from torch's class:

    - ``last_epoch=n`` resumes a run after n steps (n is the attribute ``last_epoch`` of the interrupted scheduler),
      whichever part is active. The parts are passed as for a new run, and stepped n times. torch's class starts with
      the first part for every n.
    - Parts may be :class:`ReduceLROnPlateau`, torch's or onepass's. ``step(metrics)`` passes the metric to the active
      plateau. A ``step()`` without a metric counts towards the milestones, but does not change a plateau's rate. So a
      warm-up may be stepped per batch and the plateau per epoch.
    - Parts may be :class:`SequentialLR` and :class:`ChainedScheduler`, torch's or onepass's, which start when they
      become active. In torch's class, such a part is one step ahead if it is the first, and raises an error otherwise.

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
        super().__init__(optimizer, _as_parts(schedulers), milestones)
        remember_groups(optimizer)
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
                self._include_added_groups()
            _step_sequence(self)

    def _start_parts(self) -> None:
        self.last_epoch = 0
        part = self._schedulers[bisect_right(self._milestones, 0)]
        _start_part(part)
        self._last_lr = part.get_last_lr()


class ChainedScheduler(Composition, lr_scheduler.ChainedScheduler):
    """Several schedulers at the same time: in each step, each one changes the rate that the one before it has set.

    Differences from torch's class:

    - Links may be :class:`ReduceLROnPlateau`, torch's or onepass's, in any order. The rate is then that of the other
      links times the factors by which the plateaus have reduced it so far. This also holds for links that compute the
      rate from the step alone (:class:`LambdaLR`, :class:`OneCycleLR`, ...). Stepped without ``ChainedScheduler``,
      these undo a plateau's reductions. ``step(metrics)`` passes the metric to the plateaus; ``step()`` steps the other
      links only.
    - Links may be :class:`SequentialLR` and :class:`ChainedScheduler`, torch's or onepass's.

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
        super().__init__(_as_parts(schedulers), optimizer)
        remember_groups(self.optimizer)
        if any(isinstance(link, PlateauPart) for link in self._schedulers):
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
            self._include_added_groups()
        if self._reductions is not None:
            self._step_with_reductions(self._reductions)
        else:
            _step_chain(self)

    def _step_with_reductions(self, reductions: list[float]) -> None:
        groups = self.optimizer.param_groups
        reductions = reductions + [1.0] * (len(groups) - len(reductions))  # 1 for groups that were added
        with own_tensors(self.optimizer):
            for group, reduction in zip(groups, reductions, strict=True):
                if reduction > 0.0:
                    group["lr"] = put_number(group["lr"], group["lr"] / reduction)
        try:
            for link in self._schedulers:
                if not isinstance(link, PlateauPart):
                    link.step()
        finally:  # also if a link raises, as OneCycleLR does after its last step
            with own_tensors(self.optimizer):
                for group, reduction in zip(groups, reductions, strict=True):
                    group["lr"] = put_number(group["lr"], group["lr"] * reduction)
        before = current_lrs(self.optimizer)
        for link in self._schedulers:
            if isinstance(link, PlateauPart):
                link.step()
        self._last_lr = current_lrs(self.optimizer)
        changes = zip(reductions, self._last_lr, before, strict=True)
        # A new list: a state_dict may hold the old one.
        self._reductions = [r if lr == old else r * float(lr / old) for r, lr, old in changes]

    def _start_parts(self) -> None:
        if self._reductions is not None:
            self._reductions = [1.0] * len(self.optimizer.param_groups)
        for link in self._schedulers:
            _start_part(link)
        self._last_lr = current_lrs(self.optimizer)


def _start_part(part: Any) -> None:
    """Start a part, which may have been stepped before."""
    if isinstance(part, TorchScheduler) and not isinstance(part, Composition):
        part.last_epoch = -1
    part._initial_step()


def _as_parts(schedulers: Sequence[Any]) -> list[Any]:
    """Return the schedulers, with each plateau in a :class:`PlateauPart`, and torch's compositions as onepass's."""
    return list(map(_as_part, schedulers))


def _as_part(scheduler: Any) -> Any:
    if isinstance(scheduler, TorchPlateau):
        return PlateauPart(scheduler)
    kinds = {TorchSequence: SequentialLR, TorchChain: ChainedScheduler}
    if (kind := kinds.get(type(scheduler))) is None:
        return scheduler
    part: Any = object.__new__(kind)
    part.__dict__ = scheduler.__dict__  # shared, so that torch's object remains the part
    part._schedulers = _as_parts(scheduler._schedulers)
    return part
