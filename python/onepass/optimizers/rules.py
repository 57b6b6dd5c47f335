"""The element-wise rules of the core (without Adafactor, CAME and LBFGS), and the devices with kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import _core


class Rule(NamedTuple):
    """The data of a rule that the optimizers and the conversions of checkpoints use."""

    hyper: list[str]  # keys of a group, as in csrc/rules/table.h: "lr", "betas[0]", "momentum?", "nesterov!"
    states: list[str]
    scalars: list[str]  # that each parameter has in addition to its step
    counts_steps: bool
    codings: list[str]  # of each state in 8 bits; empty: they cannot have 8 bits


RULES = {name: Rule(*values) for name, values in _core.rules().items()}


def has_kernels(device: torch.device) -> bool:
    """Return whether there are kernels for tensors on this device."""
    return device.type == "cpu" or (device.type == "cuda" and not _core.cuda_refusal(device.index))
