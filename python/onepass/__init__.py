"""onepass: a faster drop-in replacement for torch.optim.

Every optimizer updates all parameters of a model in one pass over memory, in compiled kernels. ``import onepass as
optim`` in place of ``from torch import optim``; nothing else changes.
"""

import torch.optim
from torch.optim import Optimizer

from . import _core, lr_scheduler, schedules, swa_utils
from ._core import __version__
from .adadelta import Adadelta
from .adafactor import Adafactor
from .adagrad import Adagrad
from .adam import Adam
from .adamax import Adamax
from .adamw import AdamW
from .asgd import ASGD
from .backward import step_in_backward
from .catalog import create, list_optimizers
from .grouping import param_groups
from .introspect import explain, stats
from .lbfgs import LBFGS
from .lion import Lion
from .lookahead import Lookahead
from .lr_finder import LRRangeTest, lr_find
from .muon import Muon
from .nadam import NAdam
from .previewing import plot, preview
from .radam import RAdam
from .rmsprop import RMSprop
from .rprop import Rprop
from .schedule_lr import ScheduleLR
from .sgd import SGD
from .sparse_adam import SparseAdam
from .step_log import log_to

__all__ = [
    "ASGD",
    "LBFGS",
    "SGD",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "LRRangeTest",
    "Lion",
    "Lookahead",
    "Muon",
    "NAdam",
    "Optimizer",
    "RAdam",
    "RMSprop",
    "Rprop",
    "ScheduleLR",
    "SparseAdam",
    "__version__",
    "create",
    "explain",
    "list_optimizers",
    "log_to",
    "lr_find",
    "lr_scheduler",
    "param_groups",
    "plot",
    "preview",
    "schedules",
    "stats",
    "step_in_backward",
    "swa_utils",
]

# What else the installed torch has in torch.optim, which differs from version to version.
for _name in torch.optim.__all__:
    if _name not in globals():
        globals()[_name] = getattr(torch.optim, _name)
        __all__ += [_name]


def __dir__() -> list[str]:
    """The public names; the files they come from are none of them."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


# A bad ONEPASS_ISA or ONEPASS_TUNING raises here, not at the first step.
_core.isa()
_core.tuning()
