"""What type checkers see of the optimizers' constructors, which are made when the package is imported.

``python tests/support/signatures.py`` writes python/onepass/optimizers/signatures.pyi; a test compares.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import onepass
import torch
from onepass.optimizers import signatures
from torch.optim.optimizer import ParamsT

FILE = Path(__file__).parents[2] / "python/onepass/optimizers/signatures.pyi"
RELEASE = ".".join(torch.__version__.split(".")[:2])
HEAD = f"""# Of torch {RELEASE}, written by tests/support/signatures.py: its classes, with the arguments of ours.
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim.optimizer import ParamsT

from onepass.training.averaged_model import AveragedModel
from onepass.training.clipping_policies import ClippingPolicy
"""


def _annotation(parameter: inspect.Parameter) -> str:
    if parameter.annotation == ParamsT:
        return "ParamsT"
    text = inspect.formatannotation(parameter.annotation)
    for module in ("typing", "collections.abc", "onepass.swa_utils", "onepass", "torch.nn.modules.module"):
        text = text.replace(f"{module}.", "")
    return text.replace("torch.Tensor", "Tensor")


def _argument(parameter: inspect.Parameter) -> str:
    default = "" if parameter.default is parameter.empty else " = ..."
    return f"        {parameter.name}: {_annotation(parameter)}{default},"


def stub() -> str:
    """Return the text of the file."""
    lines = [HEAD]
    names = sorted(name for name in vars(signatures) if isinstance(getattr(signatures, name), type))
    for name in names:
        parameters = list(inspect.signature(getattr(onepass, name)).parameters.values())
        ours = [base.__name__ for base in getattr(onepass, name).__bases__ if base.__name__ in names]
        torchs = f"torch.optim.{name if hasattr(torch.optim, name) else 'Optimizer'}"
        lines += [f"class {name}({', '.join([*(each for each in ours if each != name), torchs])}):"]
        lines += ["    def __init__(", "        self,"]
        for before, parameter in zip([None, *parameters], parameters, strict=False):
            if parameter.kind is parameter.KEYWORD_ONLY and (before is None or before.kind is not parameter.kind):
                lines.append("        *,")
            lines.append(_argument(parameter))
        lines += ["    ) -> None: ...", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    FILE.write_text(stub())
