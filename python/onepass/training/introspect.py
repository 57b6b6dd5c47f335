"""Report which implementation steps each parameter, and how many tensors each has stepped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from .. import _core
from ..optimizers.arguments import described, dtype_name, hyperparameters
from ..optimizers.base import Native
from ..optimizers.block_states import SUFFIX
from ..optimizers.combined import Combined
from ..optimizers.gradient_norm import local_part
from ..optimizers.hooks import unwrapped
from ..optimizers.lbfgs import LBFGS
from ..optimizers.wrapper import innermost
from .backward import freed_aside


@dataclass(frozen=True)
class Row:
    """The implementation that steps one parameter."""

    group: int
    index: int
    name: str | None
    shape: tuple[int, ...]
    dtype: str
    path: str
    reason: str
    states: dict[str, str] = field(default_factory=dict)
    """dtype of each state that has a number per element; empty before the first step."""
    state_bytes: int = 0
    """Bytes of these states and of the scales of 8-bit states, in this process."""
    float32_bytes: int = 0
    """Their size in bytes if they were float32."""


class Explanation(list[Row]):
    """A list of :class:`Row`, one per parameter in order. ``str()`` returns a table."""

    def __init__(self, title: str, rows: list[Row], groups: list[dict[str, Any]]) -> None:
        super().__init__(rows)
        self.title = title
        self.groups = [hyperparameters(group) for group in groups]  #: learning rate and weight decay of each group

    def __str__(self) -> str:
        lines = [self.title]
        for index, group in enumerate(self.groups):
            text = ", ".join(f"{name} {value:g}" for name, value in group.items())
            lines.append(f"  group {index}: {text}" if text else f"  group {index}")
            for row in (row for row in self if row.group == index):
                name = f" {row.name}" if row.name else ""
                what = f"    parameter {row.index}{name}: {row.dtype} {list(row.shape)}"
                states = ", ".join(f"{name} {dtype}" for name, dtype in row.states.items() if dtype != row.dtype)
                reason = f" ({row.reason})" if row.reason else ""
                lines.append(f"{what} -> {row.path}{reason}" + (f"; {states}" if states else ""))
        held, in_float32 = sum(row.state_bytes for row in self), sum(row.float32_bytes for row in self)
        if held < in_float32:
            lines.append(f"  states: {held:,} bytes ({in_float32:,} in float32)")
        return "\n".join(lines)


def explain(optimizer: Optimizer) -> Explanation:
    """Report which implementation would step each parameter of an optimizer now, and why. Change nothing.

    Args:
        optimizer: Any optimizer. For an optimizer of torch, every path is ``"torch"``. For Lookahead, SAM and the
            wrapper of accelerate, the report is about the wrapped optimizer; for ZeroRedundancyOptimizer, about this
            process's share.

    Returns:
        One row per parameter. ``path`` is ``"kernel"`` (``reason`` names the GPU, if the parameter is on one),
        ``"torch"`` (``reason`` says why the kernels cannot step the parameter), or ``"error"`` (``reason`` is the
        message that a step would raise). Errors that torch's implementation raises are not predicted. ``states`` has
        the dtypes of the states. Printed, the rows are a table.

    Raises:
        TypeError: ``optimizer`` is not an optimizer, or a hyperparameter of a group is not a number.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> model(torch.ones(8, 4)).sum().backward()
        >>> [row.path for row in onepass.explain(onepass.AdamW(model.parameters()))]
        ['kernel', 'kernel']
    """
    if not hasattr(unwrapped(optimizer), "param_groups"):
        raise TypeError(f"explain: optimizer must be a torch.optim.Optimizer, got {described(optimizer)}")
    optimizer = innermost(optimizer)
    if isinstance(optimizer, Combined):
        return _of_all(optimizer)
    if isinstance(share := getattr(optimizer, "optim", None), Optimizer):  # ZeroRedundancyOptimizer's
        optimizer = share
    if isinstance(optimizer, Native | LBFGS):
        isa = _core.isa()
        with freed_aside(p for group in optimizer.param_groups for p in group["params"]):
            found = optimizer._explain()
        title = f"{type(optimizer).__name__}, kernels for {isa}"
    else:
        groups = enumerate(optimizer.param_groups)
        why = "not an optimizer of onepass"
        found = [(g, i, "torch", why) for g, group in groups for i in range(len(group["params"]))]
        title = type(optimizer).__name__
    rows = []
    for group, index, path, reason in found:
        held = optimizer.param_groups[group]
        p = held["params"][index]
        name = next(iter(held.get("param_names", [])[index : index + 1]), None)
        shape = () if is_lazy(p) else tuple(p.shape)
        states = _states(p, optimizer.state.get(p, {}))
        rows.append(Row(group, index, name, shape, dtype_name(p.dtype), path, reason, *states))
    return Explanation(title, rows, optimizer.param_groups)


def _of_all(combined: Combined) -> Explanation:
    rows: list[Row] = []
    titles = []
    groups = 0
    for optimizer in combined.optimizers:
        own = explain(optimizer)
        rows += [replace(row, group=groups + row.group) for row in own]
        titles.append(own.title)
        groups += len(optimizer.param_groups)
    return Explanation("; ".join(titles), rows, combined.param_groups)


def _states(p: Tensor, state: Mapping[str, Any]) -> tuple[dict[str, str], int, int]:
    """Return the dtypes of a parameter's element-wise states, their bytes, and their bytes in float32."""
    dtypes: dict[str, str] = {}
    held = in_float32 = 0
    for name, value in state.items() if isinstance(state, Mapping) else ():
        if not isinstance(value, Tensor) or is_lazy(p) or value.ndim == 0 or value.layout != torch.strided:
            continue
        local = local_part(value)
        if value.shape == p.shape:
            dtypes[name] = dtype_name(value.dtype)
            in_float32 += 4 * local.numel()
            held += local.nbytes
        elif name.removesuffix(SUFFIX) in state:
            held += local.nbytes
    return dtypes, held, in_float32


def stats() -> dict[str, dict[str, Any]]:
    """Return how many tensors each implementation has stepped since the import.

    Returns:
        ``{"kernel": {backend: count}, "torch": {reason: count}}``. A parameter counts once per step.

    Example:
        >>> sorted(onepass.stats())
        ['kernel', 'torch']
    """
    return _core.stats()
