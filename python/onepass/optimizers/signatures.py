"""The classes whose constructors onepass extends: torch's, and those of declared.py.

Type checkers see them with onepass's arguments (signatures.pyi).
"""

from torch.optim import ASGD as ASGD
from torch.optim import SGD as SGD
from torch.optim import Adadelta as Adadelta
from torch.optim import Adafactor as Adafactor
from torch.optim import Adagrad as Adagrad
from torch.optim import Adam as Adam
from torch.optim import Adamax as Adamax
from torch.optim import AdamW as AdamW
from torch.optim import Muon as Muon
from torch.optim import NAdam as NAdam
from torch.optim import RAdam as RAdam
from torch.optim import RMSprop as RMSprop
from torch.optim import Rprop as Rprop
from torch.optim import SparseAdam as SparseAdam

from .declared import ADOPT as ADOPT
from .declared import CAME as CAME
from .declared import LAMB as LAMB
from .declared import LARS as LARS
from .declared import MARS as MARS
from .declared import AdaBelief as AdaBelief
from .declared import Adan as Adan
from .declared import AdEMAMix as AdEMAMix
from .declared import LaProp as LaProp
from .declared import Lion as Lion
from .declared import NorMuon as NorMuon
from .declared import NovoGrad as NovoGrad
from .declared import Prodigy as Prodigy
from .declared import ScheduleFreeAdamW as ScheduleFreeAdamW
from .declared import ScheduleFreeRAdam as ScheduleFreeRAdam
from .declared import ScheduleFreeSGD as ScheduleFreeSGD
from .declared import Signum as Signum
from .declared import StableAdamW as StableAdamW
