"""Detection of steps that GradScaler or the optimizer skipped."""

from __future__ import annotations

from typing import Any
from weakref import finalize, ref

from torch.optim import Optimizer

from ..optimizers.hooks import has_found_inf
from ..optimizers.wrapper import has_skipped


class StepDetector:
    """Records whether an optimizer has stepped, without skipped steps.

    When GradScaler finds an inf, it does not call the optimizer's step, unless the optimizer unscales the gradients
    itself (``fused=True``) and so gets the result in ``found_inf``. An optimizer of onepass reports in ``last_step``
    whether it has skipped a step. A step hook detects all of these cases.

    Attributes:
        optimizer: The optimizer.
        stepped: Whether the optimizer has stepped. The reader sets it back to False.
    """

    def __init__(self, optimizer: Optimizer, stepped: bool = False) -> None:
        self.optimizer = optimizer
        self.stepped = stepped
        reference = ref(self)

        def after_step(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
            detector = reference()
            if detector is not None and not (has_found_inf(optimizer) or has_skipped(optimizer)):
                detector.stepped = True

        # The hook must not remove itself: torch is then iterating over the hooks.
        finalize(self, optimizer.register_step_post_hook(after_step).remove).atexit = False

    def __reduce__(self) -> tuple[type[StepDetector], tuple[Optimizer, bool]]:
        # A copied optimizer has no hooks, so the copy of a detector needs a hook of its own.
        return type(self), (self.optimizer, self.stepped)
