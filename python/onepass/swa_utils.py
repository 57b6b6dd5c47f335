"""torch's weight averaging, with a subclass of ``AveragedModel`` and of the scheduler ``SWALR``."""

from torch.optim import swa_utils
from torch.optim.swa_utils import __all__ as __all__
from torch.optim.swa_utils import get_ema_avg_fn as get_ema_avg_fn
from torch.optim.swa_utils import get_ema_multi_avg_fn as get_ema_multi_avg_fn
from torch.optim.swa_utils import get_swa_avg_fn as get_swa_avg_fn
from torch.optim.swa_utils import get_swa_multi_avg_fn as get_swa_multi_avg_fn
from torch.optim.swa_utils import update_bn as update_bn

from .lr_scheduler import SWALR as SWALR
from .training.averaged_model import AveragedModel as AveragedModel

AveragedModel.__module__ = __name__  # pickles store the public path

# All other names of the installed torch, which depend on its version.
for _name in __all__:
    if _name not in globals():
        globals()[_name] = getattr(swa_utils, _name)
