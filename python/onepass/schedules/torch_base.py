"""Base class of torch's schedulers: added parameter groups, resuming, previews."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import Tensor
from torch.optim import lr_scheduler

from ..optimizers.arguments import put_number
from .added_groups import include_added_groups, remember_groups, was_loaded
from .previewed import Previewed
from .rates import copied, current_lrs
from .resuming import as_number, check_state, finished_and_active_leaves, set_last_lr, write_momentum

_SCHEDULED_KEYS = ("lr", "momentum", "betas", "weight_decay")  # hyperparameters that schedulers set


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
        remember_groups(self.optimizer)

    def _include_added_groups(self) -> None:
        include_added_groups(self)

    def _update_lr(self, epoch: int | None = None) -> None:
        if len(self.base_lrs) < len(self.optimizer.param_groups):
            try:
                self._include_added_groups()
            except ValueError:
                if epoch is None:
                    self._step_count -= 1  # step() has already counted this step
                raise
        super()._update_lr(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with torch's keys; ``_last_lr`` has the current rates of the groups."""
        with contextlib.suppress(ValueError):  # which the next step will raise
            self._include_added_groups()
        state: dict[str, Any] = super().state_dict()
        if "_last_lr" in state:
            own, lrs = state["_last_lr"], current_lrs(self.optimizer)
            set_last_lr(state, own if list(map(as_number, own)) == list(map(as_number, lrs)) else lrs)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class or of torch's, and write the rates of the saved run into the groups.

        If the optimizer was loaded after this scheduler was created, the groups keep their rates.

        Args:
            state_dict: The result of ``state_dict()``. It is not changed.

        Raises:
            ValueError: The state has another number of parameter groups or schedulers. Nothing has been changed.
        """
        check_state(self, state_dict)
        groups = self.optimizer.param_groups
        before = [{key: copied(group[key]) for key in _SCHEDULED_KEYS if key in group} for group in groups]
        super().load_state_dict(dict(state_dict))  # a copy, because torch's classes remove keys from it
        # Undo what the parts of a composition, also those that have not started, have written while they were loaded.
        for group, values in zip(groups, before, strict=True):
            group.update((key, _restored(group[key], value)) for key, value in values.items())
        if was_loaded(self.optimizer) or "_last_lr" not in state_dict:
            return
        finished, active = finished_and_active_leaves(self, state_dict)
        for leaf, leaf_state in finished + active:
            write_momentum(leaf, leaf_state)
        for group, lr in zip(groups, state_dict["_last_lr"], strict=True):
            group["lr"] = put_number(group["lr"], lr if isinstance(group["lr"], Tensor) else as_number(lr))
        self._last_lr = current_lrs(self.optimizer)


def _restored(held: Any, value: Any) -> Any:
    """Return the new value of a hyperparameter or of a tuple of them; tensors are filled in place."""
    if isinstance(value, tuple):
        return tuple(map(_restored, held, value))
    return put_number(held, value)
