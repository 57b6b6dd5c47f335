"""onepass: a faster drop-in replacement for torch.optim.

Every optimizer updates all parameters of a model in one pass over memory, in compiled kernels. ``import onepass as
optim`` in place of ``from torch import optim``; nothing else changes. What has no kernel yet is torch's own.
"""

from typing import Any

import torch.optim
from torch.optim import (
    ASGD,
    LBFGS,
    Adadelta,
    Adafactor,
    Adagrad,
    Adamax,
    Muon,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
    SparseAdam,
)

from . import _core, lr_scheduler, swa_utils
from ._core import __version__
from .adam import Adam
from .adamw import AdamW
from .introspect import explain, stats
from .lion import Lion
from .sgd import SGD

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
    "Lion",
    "Muon",
    "NAdam",
    "Optimizer",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SparseAdam",
    "__version__",
    "explain",
    "lr_scheduler",
    "stats",
    "swa_utils",
]

# An ONEPASS_ISA that this machine does not have is told of now, not at the first step.
_core.isa()


def __getattr__(name: str) -> Any:
    """Whatever else the installed torch has in ``torch.optim``, which differs from version to version."""
    return getattr(torch.optim, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(torch.optim)})
