"""torch's weight averaging, unchanged, except that the scheduler ``SWALR`` has ``preview`` and ``plot``."""

from torch.optim import swa_utils
from torch.optim.swa_utils import AveragedModel as AveragedModel
from torch.optim.swa_utils import __all__ as __all__
from torch.optim.swa_utils import get_ema_avg_fn as get_ema_avg_fn
from torch.optim.swa_utils import get_ema_multi_avg_fn as get_ema_multi_avg_fn
from torch.optim.swa_utils import get_swa_avg_fn as get_swa_avg_fn
from torch.optim.swa_utils import get_swa_multi_avg_fn as get_swa_multi_avg_fn
from torch.optim.swa_utils import update_bn as update_bn

from .lr_scheduler import SWALR as SWALR

# All other names of the installed torch, which depend on its version.
for _name in __all__:
    if _name not in globals():
        globals()[_name] = getattr(swa_utils, _name)
