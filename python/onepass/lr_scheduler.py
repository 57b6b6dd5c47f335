"""torch's learning rate schedulers, with previews and composition.

Each class is a subclass of the torch class of the same name, with torch's arguments, errors, attributes, ``state_dict``
and rates, and with the additional methods ``preview`` and ``plot`` (:func:`onepass.preview`, :func:`onepass.plot`). The
schedulers work with the optimizers of torch and of onepass. Six classes differ from torch's, as their documentation
describes: :class:`SequentialLR`, :class:`ChainedScheduler`, :class:`ReduceLROnPlateau`, :class:`CosineAnnealingLR`,
:class:`LinearLR`, :class:`PolynomialLR`.

**Resuming with state_dicts.** After ``load_state_dict`` of optimizer and scheduler, the rates are those of an
uninterrupted run. The optimizer may be loaded before or after the scheduler is created, or after the scheduler is
loaded. ``state_dict()["_last_lr"]`` has the current rates of the parameter groups. ``load_state_dict`` writes these
rates into the groups, and the momentum or betas that :class:`OneCycleLR` and :class:`CyclicLR` set. It does not write
them if the optimizer was loaded after the scheduler was created, because the groups then already have the rates of the
optimizer's state, or rates that were set since. So several schedulers on one optimizer may be loaded in any order. If
torch saved the state of one of several schedulers, its ``_last_lr`` has the rate that this scheduler set, not the
current one. To load such states, create the schedulers before the optimizer is loaded, as torch's documentation
requires.

**Adding parameter groups.** If a scheduler has the same argument for all groups, its next step includes a group that
was added later (``add_param_group``); if the group has no ``initial_lr``, this is set to its current rate. If the
arguments differ by group, the next step raises a ValueError that names the added group, and changes nothing.
:class:`CyclicLR` always raises; :class:`OneCycleLR` and :class:`SWALR` raise unless the group has the keys that they
read.

**Resuming without the scheduler's state_dict.** ``last_epoch`` counts calls of ``step()``, usually one per epoch, and
one per batch for :class:`OneCycleLR` and :class:`CyclicLR`. After n calls, load the optimizer's state_dict and pass
``last_epoch=n - 1`` (the index of the last completed step) to the constructor; for :class:`SequentialLR`, pass n. Five
schedulers of torch do not resume correctly in this way, and need their ``state_dict``: :class:`StepLR`,
:class:`MultiStepLR` and :class:`ConstantLR` if the n-th call changed the rate (they change it again),
:class:`CosineAnnealingWarmRestarts` with ``T_mult`` > 1 from n = 2 ``T_0`` on, and :class:`SWALR` while it anneals.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.optim import lr_scheduler

from .schedules.closed_forms import CosineAnnealingLR as CosineAnnealingLR
from .schedules.closed_forms import LinearLR as LinearLR
from .schedules.closed_forms import PolynomialLR as PolynomialLR
from .schedules.composition import ChainedScheduler as ChainedScheduler
from .schedules.composition import SequentialLR as SequentialLR
from .schedules.plateau_part import PlateauPart as PlateauPart
from .schedules.plot import plot as plot
from .schedules.preview import preview as preview
from .schedules.schedule_lr import ScheduleLR as ScheduleLR
from .schedules.scheduled_hyperparameter import ScheduledHyperparameter as ScheduledHyperparameter
from .schedules.step_detector import StepDetector as StepDetector
from .schedules.torch_base import LRScheduler as LRScheduler
from .schedules.torch_docstrings import DOCSTRINGS
from .schedules.torch_schedulers import SWALR as SWALR
from .schedules.torch_schedulers import CosineAnnealingWarmRestarts as CosineAnnealingWarmRestarts
from .schedules.torch_schedulers import ReduceLROnPlateau as ReduceLROnPlateau
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

if TYPE_CHECKING:
    # The classes that the loop below creates.

    class LambdaLR(LRScheduler, lr_scheduler.LambdaLR): ...

    class MultiplicativeLR(LRScheduler, lr_scheduler.MultiplicativeLR): ...

    class StepLR(LRScheduler, lr_scheduler.StepLR): ...

    class MultiStepLR(LRScheduler, lr_scheduler.MultiStepLR): ...

    class ConstantLR(LRScheduler, lr_scheduler.ConstantLR): ...

    class ExponentialLR(LRScheduler, lr_scheduler.ExponentialLR): ...

    class CyclicLR(LRScheduler, lr_scheduler.CyclicLR): ...

    class OneCycleLR(LRScheduler, lr_scheduler.OneCycleLR): ...

    class _LRScheduler(LRScheduler, lr_scheduler._LRScheduler): ...


EPOCH_DEPRECATION_WARNING = getattr(lr_scheduler, "EPOCH_DEPRECATION_WARNING", "")

# These, and all other schedulers of the installed torch, which depend on its version. Those that onepass does not
# document have torch's docstring.
for _name in [*lr_scheduler.__all__, "_LRScheduler"]:
    if _name not in globals() and hasattr(lr_scheduler, _name):
        _theirs = getattr(lr_scheduler, _name)
        if isinstance(_theirs, type) and issubclass(_theirs, lr_scheduler.LRScheduler):
            _docstring = DOCSTRINGS.get(_name, _theirs.__doc__)
            _theirs = type(_name, (LRScheduler, _theirs), {"__module__": __name__, "__doc__": _docstring})
        globals()[_name] = _theirs

__all__ = [*lr_scheduler.__all__, "SWALR"]

# Pickles store the public path, so that modules can move. They contain PlateauPart, ScheduledHyperparameter and
# StepDetector.
for _name, _found in list(globals().items()):
    if isinstance(_found, type) and _found.__module__.startswith("onepass.schedules."):
        _found.__module__ = __name__
