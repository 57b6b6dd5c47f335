"""Detection of steps that GradScaler or the optimizer skipped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import ref

from torch.optim import Optimizer


class StepDetector:
    """Records whether an optimizer has stepped, without skipped steps.

    When GradScaler finds an inf, it does not call the optimizer's step, unless the optimizer unscales the gradients
    itself (``fused=True``) and so gets the result in ``found_inf``. An optimizer of onepass reports in ``last_step``
    whether it has skipped a step. A step hook detects all of these cases.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.stepped = False
        reference = ref(self)

        def after_step(stepped: Optimizer, _args: Any, _kwargs: Any) -> None:
            detector = reference()
            if detector is None:
                handle.remove()
            elif not _was_skipped(stepped):
                detector.stepped = True

        handle = optimizer.register_step_post_hook(after_step)

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        # A copied optimizer has no hooks. So a copied scheduler (as in a preview) gets None here, and counts all steps.
        return type(None), ()

    def stepped_since_last_call(self) -> bool:
        """Return whether there was a step since the last call."""
        stepped, self.stepped = self.stepped, False
        return stepped


def _was_skipped(optimizer: Optimizer) -> bool:
    if float(getattr(optimizer, "found_inf", None) or 0.0):
        return True
    report = getattr(optimizer, "last_step", None)
    return report is not None and bool(report.skipped)
