"""Weight averaging of torch, which works with these optimizers as it is; its scheduler can be previewed."""

from torch.optim import swa_utils
from torch.optim.swa_utils import AveragedModel as AveragedModel
from torch.optim.swa_utils import __all__ as __all__
from torch.optim.swa_utils import get_ema_avg_fn as get_ema_avg_fn
from torch.optim.swa_utils import get_ema_multi_avg_fn as get_ema_multi_avg_fn
from torch.optim.swa_utils import get_swa_avg_fn as get_swa_avg_fn
from torch.optim.swa_utils import get_swa_multi_avg_fn as get_swa_multi_avg_fn
from torch.optim.swa_utils import update_bn as update_bn

from .lr_scheduler import SWALR as SWALR

# What else the installed torch has, which differs from version to version.
for _name in __all__:
    if _name not in globals():
        globals()[_name] = getattr(swa_utils, _name)
