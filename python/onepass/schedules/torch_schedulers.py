"""torch's schedulers whose rates are torch's in every case."""

from __future__ import annotations

from typing import SupportsFloat

from torch.optim import lr_scheduler, swa_utils

from .added_groups import remember_groups
from .rates import own_tensors
from .torch_base import LRScheduler


class ReduceLROnPlateau(LRScheduler, lr_scheduler.ReduceLROnPlateau):
    """Multiply the rate by ``factor`` when a metric has not improved for more than ``patience`` steps.

    It may be a part of :class:`SequentialLR` and :class:`ChainedScheduler`, whose ``step(metrics)`` then takes the
    metric. A rate that is one tensor of several groups is multiplied once; torch's class multiplies it for each group.

    Args:
        optimizer: The optimizer whose learning rates are set.
        mode: ``"min"`` if lower metrics are better, ``"max"`` if higher ones are.
        factor: The factor of a reduction, below 1.
        patience: Number of steps without an improvement that are tolerated.
        threshold: Smallest improvement that counts.
        threshold_mode: ``"rel"``: the threshold is a fraction of the best metric. ``"abs"``: it is a difference.
        cooldown: Number of steps after a reduction in which steps without an improvement are not counted.
        min_lr: Lowest rate; a list has one for each parameter group.
        eps: A reduction of the rate by this or less is not made.

    Example:
        >>> optimizer = onepass.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
        >>> scheduler = onepass.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1)
        >>> scheduler.preview(5, metrics=[1.0, 1.0, 1.0, 1.0])[:, 0].tolist()
        [0.5, 0.5, 0.5, 0.25, 0.25]
    """

    def _reset(self) -> None:
        super()._reset()
        remember_groups(self.optimizer)

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
            with own_tensors(self.optimizer):
                super().step(metrics, epoch)
        except RuntimeError:
            self.__dict__.update(before)
            raise


class SWALR(LRScheduler, swa_utils.SWALR):
    """Change the rate to ``swa_lr`` in ``anneal_epochs`` steps and keep it constant, for weight averaging.

    Source: Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", arXiv:1803.05407.

    Args:
        optimizer: The optimizer whose learning rates are set.
        swa_lr: Last rate; a list has one for each parameter group.
        anneal_epochs: Number of steps to ``swa_lr``; 0: it is set in the first step.
        anneal_strategy: ``"cos"``: half a cosine wave. ``"linear"``: a straight line.
        last_epoch: Index of the last completed step, if training is resumed without a ``state_dict``; else -1.

    Example:
        >>> optimizer = onepass.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
        >>> scheduler = onepass.lr_scheduler.SWALR(optimizer, swa_lr=0.1, anneal_epochs=4)
        >>> [round(lr, 3) for lr in scheduler.preview(6)[:, 0].tolist()]
        [0.5, 0.441, 0.3, 0.159, 0.1, 0.1]
    """


class CosineAnnealingWarmRestarts(LRScheduler, lr_scheduler.CosineAnnealingWarmRestarts):
    """Cosine annealing to ``eta_min``, restarted every ``T_0 T_mult ** i`` steps for i = 0, 1, 2, ...

    ``eta_min + (lr(0) - eta_min) (1 + cos(pi T_cur / T_i)) / 2``, where ``T_cur`` is the number of steps since the last
    restart, and ``T_i = T_0 T_mult ** i``.

    Source: Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", arXiv:1608.03983.

    Args:
        optimizer: The optimizer whose learning rates are set.
        T_0: Number of steps until the first restart.
        T_mult: Factor of that number after each restart, an integer >= 1.
        eta_min: Lowest rate.
        last_epoch: Index of the last completed step, if training is resumed without a ``state_dict``; else -1.

    Example:
        >>> optimizer = onepass.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
        >>> scheduler = onepass.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=2)
        >>> scheduler.preview(4)[:, 0].tolist()
        [0.5, 0.25, 0.5, 0.25]
    """

    def step(self, epoch: float | None = None) -> None:  # torch's method does not call _update_lr
        """Advance by one step, or to ``epoch``, which may be fractional."""
        if len(self.base_lrs) < len(self.optimizer.param_groups):
            self._include_added_groups()
        super().step(epoch)
