"""Cautious updates and cautious weight decay of parameters that no kernel covers, in torch operations.

The kernels have them in csrc/rules/cautious.h.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .arguments import check_flag
from .torch_operations import real

if TYPE_CHECKING:
    from .base import Native

NAMES = ("cautious", "cautious_weight_decay")


def check(name: str, options: Collection[str], where: str, group: Mapping[str, Any]) -> None:
    """Check ``cautious`` and ``cautious_weight_decay`` of a group.

    Args:
        name: Name of the optimizer, for messages.
        options: Those of the two that it has.
        where: What messages about a value begin with.
        group: The group.

    Raises:
        TypeError: One of them is neither a bool nor None.
        ValueError: The optimizer does not have it, or the group's weight decay is not decoupled.
    """
    for each in NAMES:
        value = group.get(each)
        if value is not None:
            check_flag(f"{where}: {each}", value)
        if value and each not in options:
            raise ValueError(f"{name}: {each} must be False, because {name} does not have it, got True")
    if group.get("cautious_weight_decay") and not group.get("decoupled_weight_decay", True):
        raise ValueError(
            f"{where}: cautious_weight_decay must be False, got True, because decoupled_weight_decay is False: a decay "
            "that is part of the gradient has no mask"
        )


def check_gradient(name: str, group: Mapping[str, Any], p: Tensor) -> None:
    """Check, before anything is written, that torch operations can step a parameter.

    Raises:
        RuntimeError: Its gradient is sparse, and its group has masks.
    """
    if masks(group) and p.grad is not None and p.grad.is_sparse:
        asked = " and ".join(each for each in NAMES if group.get(each))
        raise RuntimeError(f"{name} with {asked} does not support this sparse gradient")


def masks(group: Mapping[str, Any]) -> bool:
    """Return whether a group has either argument."""
    return any(group.get(name) for name in NAMES)


def step(part: Native) -> None:
    """Step all parameters of an optimizer by ``torch_step``, and those of groups that ask for it with masks."""
    torch_step, groups, states = type(part).torch_step, part.param_groups, part.state
    part.param_groups = [group for group in groups if not masks(group)]
    if any(group["params"] for group in part.param_groups):
        torch_step(part)
    for group in filter(masks, groups):
        _step_group(part, group, states)
    part.param_groups, part.state = groups, states


@torch.no_grad()
def _step_group(part: Native, group: dict[str, Any], states: Mapping[Tensor, dict[str, Any]]) -> None:
    """Step a group with masks.

    ``torch_step`` steps zeros instead of the parameters, without weight decay. They are then the negated updates.
    """
    decoupled = part._decouples_weight_decay(group)
    stand_ins: list[tuple[Tensor, Tensor, Tensor]] = []  # each with its parameter and gradient
    for p in (p for p in group["params"] if p.grad is not None):
        grad = -p.grad if group.get("maximize") else p.grad
        if not decoupled and group["weight_decay"] != 0:
            grad = grad + group["weight_decay"] * p
        stand_in = torch.zeros_like(p, memory_format=torch.preserve_format)
        stand_in.grad = grad
        stand_ins.append((stand_in, p, grad))
    part.param_groups = [{**group, "params": [x for x, _, _ in stand_ins], "weight_decay": 0.0, "maximize": False}]
    part.state = defaultdict(dict, {stand_in: states[p] for stand_in, p, _ in stand_ins})
    type(part).torch_step(part)
    for stand_in, p, grad in stand_ins:
        own = p.resolve_conj().resolve_neg()
        share, comes_last = part._decay(group, states[p]) if decoupled else (0.0, False)
        _descend(group, real(own), real(-stand_in), real(grad), share, comes_last)
        if own is not p:
            p.copy_(own)


def _descend(
    group: Mapping[str, Any], p: Tensor, u: Tensor, grad: Tensor, share: float | Tensor, comes_last: bool
) -> None:
    """Lower a parameter by an update, and by the share of it that decays.

    Args:
        group: The parameter's group.
        p: The parameter, which is overwritten.
        u: The update.
        grad: The gradient, with a coupled weight decay.
        share: What a decoupled weight decay takes of the parameter.
        comes_last: Whether it takes this of the updated parameter.
    """
    opposed = ((u > 0) & (p < 0)) | ((u < 0) & (p > 0)) if group.get("cautious_weight_decay") else None
    if group.get("cautious"):
        agree = ((u > 0) & (grad > 0)) | ((u < 0) & (grad < 0))
        remaining = agree.sum(dtype=torch.float64).clamp(min=1e-3 * p.numel())
        u = (p.numel() / remaining).to(u.dtype) * (agree * u)  # NaN stays NaN
    if not isinstance(share, Tensor) and share == 0.0:
        p.sub_(u)
        return
    if comes_last:
        p.sub_(u)
        u = torch.zeros_like(u)
    p.sub_(share * (p if opposed is None else p.where(~opposed, 0.0)) + u)
