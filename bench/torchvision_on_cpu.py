"""Make torchvision importable with a torch without CUDA, for the frameworks of frameworks.py and tests/ecosystem.

Its wheel on PyPI is built for CUDA, its operators do not load there, and the import fails at what describes them. timm
and Lightning (by torchmetrics) import it, and call none of them.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

_declared: list[torch.library.Library] = []  # held, because operators are declared only as long as these objects exist


def import_torchvision() -> ModuleType:
    """Import torchvision, with its operators declared if they are missing. Other errors are raised."""
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
    return importlib.import_module("torchvision")
