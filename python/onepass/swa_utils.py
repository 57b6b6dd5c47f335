"""Weight averaging of torch, which works with these optimizers as it is; its scheduler can be previewed."""

from torch.optim.swa_utils import *  # noqa: F403
from torch.optim.swa_utils import __all__ as __all__

from .lr_scheduler import SWALR as SWALR
