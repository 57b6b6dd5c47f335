"""torch's ReduceLROnPlateau with the interface of a part of a composition."""

from __future__ import annotations

from typing import Any, SupportsFloat

from torch.optim import Optimizer

from ..optimizers.arguments import put_number
from .rates import current_lrs, initial_lr, own_tensors


class PlateauPart:
    """A plateau as a part of a composition. A step without a metric does not change the rate."""

    def __init__(self, plateau: Any) -> None:
        self.optimizer = plateau.optimizer
        self.plateau = plateau
        self.metrics: SupportsFloat | None = None
        for group in self.optimizer.param_groups:
            initial_lr(group)  # torch's plateau is the only scheduler that does not set it

    def step(self) -> None:
        """Pass the metric of this step to the plateau, if there is one."""
        if self.metrics is not None:
            with own_tensors(self.optimizer):
                self.plateau.step(self.metrics)

    def get_last_lr(self) -> list[Any]:
        """Return the current rates of the groups."""
        return current_lrs(self.optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the plateau."""
        state: dict[str, Any] = self.plateau.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of the plateau."""
        self.plateau.load_state_dict(state_dict)

    def _initial_step(self) -> None:
        """Do nothing: a plateau has no initial rate."""

    def _update_lr(self, epoch: int) -> None:
        """Start in a sequence from the optimizer's initial rates, as all parts do."""
        reset_to_initial_lr(self.optimizer)


def reset_to_initial_lr(optimizer: Optimizer) -> None:
    """Set the rate of each group to its initial rate."""
    for group in optimizer.param_groups:
        group["lr"] = put_number(group["lr"], group["initial_lr"])
