"""What is private of torch: used in one module only, and there with the torch that is installed."""

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onepass
import pytest
import torch
from onepass.optimizers import torch_private
from torch.optim import lr_scheduler

PACKAGE = Path(onepass.__file__).parent
PRIVATE = re.compile(
    r"\btorch(\.\w+)*\._[a-zA-Z]"  # torch.optim._muon
    r"|\bfrom torch[.\w]* import [^\n]*\b_[a-zA-Z]"
    r"|\bfrom torch(\.\w+)*\._"
    r"|\bimport_module\(\"torch[.\w]*\._"
    r"|\._C\b"
)


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1)


def of(name: str, *args: Any, **kwargs: Any) -> Callable[[], Any]:
    return lambda: getattr(lr_scheduler, name)(optimizer(), *args, **kwargs)


def sequence() -> Any:
    base = optimizer()
    return lr_scheduler.SequentialLR(base, [lr_scheduler.StepLR(base, 2), lr_scheduler.StepLR(base, 3)], [4])


def chain() -> Any:
    base = optimizer()
    return lr_scheduler.ChainedScheduler([lr_scheduler.StepLR(base, 2), lr_scheduler.StepLR(base, 3)], base)


def scheduled() -> Any:
    base = optimizer()
    scheduler = lr_scheduler.StepLR(base, 2)
    base.step()
    scheduler.step()
    return base


OBJECTS: dict[str, Callable[[], Any]] = {
    "torch.optim.Optimizer": scheduled,
    "torch.optim.lr_scheduler.StepLR": of("StepLR", 2),
    "torch.optim.lr_scheduler.SequentialLR": sequence,
    "torch.optim.lr_scheduler.ChainedScheduler": chain,
    "torch.optim.lr_scheduler.ReduceLROnPlateau": of("ReduceLROnPlateau"),
    "torch.nn.Module": lambda: torch.nn.Linear(2, 2),
    "torch.Tensor": lambda: torch.zeros(2),
    "torch.optim.lr_scheduler.OneCycleLR": of("OneCycleLR", 0.1, 10, cycle_momentum=False),
}


@pytest.mark.parametrize("path", torch_private.ATTRIBUTES)
def test_objects_of_torchs_have_the_attributes(path):
    module, name = path.rsplit(".", 1)
    made = OBJECTS[path]()
    assert isinstance(made, getattr(importlib.import_module(module), name))
    missing = [attribute for attribute in torch_private.ATTRIBUTES[path] if not hasattr(made, attribute)]
    assert not missing, f"torch {torch.__version__}: {path} has no {', '.join(missing)}"


def test_the_tensors_exchange_api_is_there():
    assert torch_private.dlpack_exchange_api is not None


def test_a_missing_name_is_named_by_the_error():
    with pytest.raises(ImportError, match=r"torch .* has no torch\.optim\._gone or _lost, which onepass uses"):
        torch_private._find("torch.optim", "_gone", "_lost")


def test_no_other_module_uses_private_names():
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "torch_private.py"]
    assert len(files) > 30
    found = [f"{path.name}: {match[0]}" for path in files for match in PRIVATE.finditer(path.read_text())]
    assert not found


@pytest.mark.parametrize(
    "code",
    [
        "torch._foreach_norm(x)",
        "torch.optim._muon",
        "from torch.optim import _functional",
        "from torch.optim.optimizer import Optimizer, _use_grad_for_differentiable",
        "from torch._compile import x",
        "from torch.nn.modules.batchnorm import _NormBase",
        "import torch._C",
        "t._C.f()",
    ],
)
def test_private_names_are_recognized(code):
    assert PRIVATE.search(code)


@pytest.mark.parametrize("code", ["torch.__version__", "from torch.optim.swa_utils import __all__ as __all__"])
def test_public_names_are_not(code):
    assert not PRIVATE.search(code)
