"""The learning-rate schedulers of torch, which work on these optimizers as they are."""

from torch.optim.lr_scheduler import *  # noqa: F403
from torch.optim.lr_scheduler import __all__ as __all__
