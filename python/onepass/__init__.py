"""onepass: a faster drop-in replacement for torch.optim.

Each optimizer updates all parameters of a model in one pass over memory, in compiled kernels. To use it, replace ``from
torch import optim`` by ``import onepass as optim``; nothing else changes.
"""

import torch.optim
from torch.optim import Optimizer

from . import _openmp

_openmp.share()  # before anything imports the compiled module

from . import _core, lr_scheduler, schedules, swa_utils
from ._core import __version__
from .optimizers.adabelief import AdaBelief
from .optimizers.adadelta import Adadelta
from .optimizers.adafactor import Adafactor
from .optimizers.adagrad import Adagrad
from .optimizers.adam import Adam
from .optimizers.adamax import Adamax
from .optimizers.adamw import AdamW
from .optimizers.adan import Adan
from .optimizers.ademamix import AdEMAMix
from .optimizers.adopt import ADOPT
from .optimizers.asgd import ASGD
from .optimizers.came import CAME
from .optimizers.combined import Combined
from .optimizers.convert import convert_state_dict
from .optimizers.lamb import LAMB
from .optimizers.laprop import LaProp
from .optimizers.lars import LARS
from .optimizers.lbfgs import LBFGS
from .optimizers.lion import Lion
from .optimizers.lookahead import Lookahead
from .optimizers.mars import MARS
from .optimizers.muon import Muon
from .optimizers.nadam import NAdam
from .optimizers.normuon import NorMuon
from .optimizers.novograd import NovoGrad
from .optimizers.prodigy import Prodigy
from .optimizers.radam import RAdam
from .optimizers.rmsprop import RMSprop
from .optimizers.rprop import Rprop
from .optimizers.sam import SAM
from .optimizers.schedule_free_adamw import ScheduleFreeAdamW
from .optimizers.schedule_free_radam import ScheduleFreeRAdam
from .optimizers.schedule_free_sgd import ScheduleFreeSGD
from .optimizers.sgd import SGD
from .optimizers.signum import Signum
from .optimizers.sparse_adam import SparseAdam
from .optimizers.stable_adamw import StableAdamW
from .optimizers.tail import StepReport
from .schedules.plot import plot
from .schedules.preview import preview
from .schedules.schedule_lr import ScheduleLR
from .training.backward import step_in_backward
from .training.catalog import create, list_optimizers
from .training.clip_grad import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm
from .training.clipping_policies import AutoClip, ClippingPolicy, SkipSpikes, ZClip
from .training.grouping import param_groups
from .training.introspect import explain, stats
from .training.lr_finder import LRRangeTest, lr_find
from .training.step_log import log_to

__all__ = [
    "ADOPT",
    "ASGD",
    "CAME",
    "LAMB",
    "LARS",
    "LBFGS",
    "MARS",
    "SAM",
    "SGD",
    "AdEMAMix",
    "AdaBelief",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Adan",
    "AutoClip",
    "ClippingPolicy",
    "Combined",
    "LRRangeTest",
    "LaProp",
    "Lion",
    "Lookahead",
    "Muon",
    "NAdam",
    "NorMuon",
    "NovoGrad",
    "Optimizer",
    "Prodigy",
    "RAdam",
    "RMSprop",
    "Rprop",
    "ScheduleFreeAdamW",
    "ScheduleFreeRAdam",
    "ScheduleFreeSGD",
    "ScheduleLR",
    "Signum",
    "SkipSpikes",
    "SparseAdam",
    "StableAdamW",
    "StepReport",
    "ZClip",
    "__version__",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "convert_state_dict",
    "create",
    "explain",
    "get_total_norm",
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

# All other names of the installed torch.optim, which depend on its version.
for _name in torch.optim.__all__:
    if _name not in globals():
        globals()[_name] = getattr(torch.optim, _name)
        __all__ += [_name]


# Pickles store the public path, so that modules can move.
for _name in __all__:
    _public: object = globals()[_name]
    if getattr(_public, "__module__", "").startswith(f"{__name__}."):
        _public.__module__ = __name__


def __dir__() -> list[str]:
    """Return the public names, without the submodules that define them."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


# An invalid ONEPASS_ISA or ONEPASS_TUNING raises at import, not at the first step.
_core.isa()
_core.tuning()
