"""Weight averaging of torch, which works with these optimizers as it is."""

from torch.optim.swa_utils import *  # noqa: F403
from torch.optim.swa_utils import __all__ as __all__
