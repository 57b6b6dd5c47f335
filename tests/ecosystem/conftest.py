"""The frameworks of the extra "ecosystem" and how their tests are run; the plain suite does not collect this folder."""

import importlib.util
import warnings

import pytest
import torch
from torchvision_on_cpu import import_torchvision

NEEDED = ("accelerate", "lightning", "pytorch_optimizer", "timm", "transformers")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
if MISSING:
    raise pytest.UsageError(f"{', '.join(MISSING)} not installed: pip install 'onepass[ecosystem]'")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the frameworks' own imports
    torchvision = import_torchvision()
    import accelerate
    import lightning
    import timm
    import transformers


def pytest_report_header():
    found = (accelerate, lightning, timm, torchvision, transformers)
    return "frameworks: " + ", ".join(f"{module.__name__} {module.__version__}" for module in found)


def pytest_collection_modifyitems(items):
    """Frameworks may warn of what they like; onepass may not, nor may a scheduler step before the optimizer."""
    for item in items:
        for what in ("ignore", "error:::onepass", r"error:Detected call of .lr_scheduler\.step"):
            item.add_marker(pytest.mark.filterwarnings(what), append=True)


@pytest.fixture(autouse=True)
def _one_thread(machine):
    """The models here are small: a second thread would only wait for the first."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fresh_accelerate(machine):
    """accelerate, and with it transformers' Trainer, keeps its settings for the whole process."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
