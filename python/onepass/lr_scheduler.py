"""The learning-rate schedulers of torch, which work on these optimizers as they are."""

from torch.optim.lr_scheduler import *  # noqa: F403
from torch.optim.lr_scheduler import EPOCH_DEPRECATION_WARNING as EPOCH_DEPRECATION_WARNING
from torch.optim.lr_scheduler import __all__ as __all__
from torch.optim.lr_scheduler import _LRScheduler as _LRScheduler
