"""Steps by torch's implementation, for the parameters that no kernel covers."""

from __future__ import annotations

import contextlib
import functools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _core
from . import block_states, cautious, stochastic
from .master import NAMES as MASTER_NAMES
from .master import master_name, master_of, write_master
from .rules import RULES
from .tail import scaled_gradients

if TYPE_CHECKING:
    from .base import Native


def step_by_torch(
    optimizer: Native, fallback: Iterable[tuple[int, int, str]], grad_factor: float, clip_value: float = math.inf
) -> None:
    """Step parameters by torch's implementation, on the states that kernels also use.

    Args:
        optimizer: The optimizer.
        fallback: Group, place in the group, and reason, of each parameter.
        grad_factor: Factor of the gradients.
        clip_value: The gradients are then clamped to [-clip_value, clip_value].
    """
    params_of: dict[int, list[Tensor]] = {}
    for number, index, _ in fallback:
        params_of.setdefault(number, []).append(optimizer.param_groups[number]["params"][index])
    for number, params in params_of.items():
        _check(optimizer, number, params)
    all_params = [p for params in params_of.values() for p in params]
    if optimizer._slow_weight_update:
        optimizer._slow_weight_update.before(all_params, optimizer._master_names())
    # A stand-in that shares all attributes with the optimizer but has only these parameters.
    part = object.__new__(type(optimizer))
    part.__dict__.update({k: v for k, v in optimizer.__dict__.items() if k not in ("grad_scale", "found_inf")})
    as_they_are: list[dict[str, Any]] = []
    to_convert: list[tuple[dict[str, Any], Tensor, torch.dtype]] = []
    for number, params in params_of.items():
        group = optimizer.param_groups[number]
        dtypes = {p: _common_dtype(optimizer, group, p) for p in params}
        as_they_are.append({**group, "params": [p for p in params if dtypes[p] is None]})
        to_convert += [(group, p, dtype) for p, dtype in dtypes.items() if dtype is not None]
    with contextlib.ExitStack() as stack:
        if grad_factor != 1.0 or clip_value != math.inf:
            stack.enter_context(scaled_gradients(all_params, grad_factor, clip_value))
        if any(group["params"] for group in as_they_are):
            part.param_groups = as_they_are
            cautious.step(part)
        numbers = optimizer._param_numbers() if to_convert else {}
        for group, p, dtype in to_convert:
            _step_converted(optimizer, part, group, p, dtype, numbers[p])


def _check(optimizer: Native, number: int, params: Iterable[Tensor]) -> None:
    """Raise ValueError if torch's implementation cannot step one of these parameters of group ``number``."""
    name, group = type(optimizer).__name__, optimizer.param_groups[number]
    for option in ("master", "stochastic_rounding", *cautious.NAMES):
        if group.get(option) and group.get("differentiable"):
            raise ValueError(f"{name}: group {number}: {option} cannot be given with differentiable=True")
    for p in params:
        cautious.check_gradient(name, group, p)
        if not optimizer._in_blocks(group, p):
            continue
        block_states.check_rows(p)
        if p.grad is not None and p.grad.is_sparse:
            raise ValueError(
                f"{name}: group {number}: state_dtype cannot be {block_states.CODES} for a parameter "
                f"(shape {tuple(p.shape)}) whose sparse gradients torch's implementation steps"
            )


def _common_dtype(optimizer: Native, group: dict[str, Any], p: Tensor) -> torch.dtype | None:
    """Return the dtype to which a parameter and its states are promoted; None if they already have the same dtype.

    torch's implementation does not support states of another dtype than the parameter's.
    """
    held = [optimizer.state[p].get(name) for name in optimizer._state_names()] if p in optimizer.state else []
    dtypes = [state.dtype for state in held if isinstance(state, Tensor)]
    in_blocks = optimizer._in_blocks(group, p) or any(map(block_states.is_in_blocks, held))
    if (state_dtype := optimizer._state_dtype(group, p)) is not None:
        dtypes.append(state_dtype)
    dtypes = [torch.float32 if dtype == block_states.CODES else dtype for dtype in dtypes]
    if master_name(group, p) or _rounds(group, p) or any(_rounds(group, state) for state in held):
        dtypes.append(torch.float32)
    if (cautious.masks(group) and torch.finfo(p.dtype).bits == 16) or (optimizer.copies and stochastic.has_16_bits(p)):
        dtypes.append(torch.float32)
    if all(dtype == p.dtype for dtype in dtypes) and not in_blocks:
        return None
    return functools.reduce(torch.promote_types, dtypes, p.dtype)


def _step_converted(
    optimizer: Native, part: Native, group: dict[str, Any], p: Tensor, dtype: torch.dtype, number: int
) -> None:
    """Step a parameter by torch's implementation, with parameter, gradient and states converted to ``dtype``.

    Args:
        optimizer: The optimizer.
        part: The stand-in that steps.
        group: The parameter's group.
        p: The parameter.
        dtype: The dtype.
        number: The parameter's place among all.
    """
    with torch.set_grad_enabled(bool(group.get("differentiable"))):
        own = optimizer.state.get(p, {})
        master = master_name(group, p)
        copy, grad = master_of(p, own, master).to(dtype) if master else p.to(dtype), p.grad
        copy.grad = None if grad is None else grad.to(dtype)
        names = optimizer._state_names()
        state = {name: value for name, value in own.items() if name not in MASTER_NAMES}
        converted = {name: _as(dtype, state, name) for name in names if isinstance(state.get(name), Tensor)}
        part.param_groups = [{**optimizer._group_to_convert(group, p), "params": [copy]}]
        part.state = defaultdict(dict, {copy: {**state, **converted}})
        cautious.step(part)
        stepped = part.state[copy]
        values = {name: stepped[name] for name in names if isinstance(stepped.get(name), Tensor)}
        optimizer.state[p].update((name, value) for name, value in stepped.items() if name not in values)
        if counts_rounding(optimizer, group, p, values):  # before anything is rounded: the random bits depend on it
            optimizer.state[p]["step"] = optimizer.state[p].get("step", new_count()) + 1
        for name, value in values.items():
            if name in converted and not block_states.is_in_blocks(state[name]):
                _write(optimizer, group, p, state[name], value, names.index(name), number)
            elif name in converted or optimizer._in_blocks(group, p):
                encode(optimizer, group, p, name, value, number)
            else:  # created by this step
                dtype = value.dtype if p.is_complex() else optimizer._state_dtype(group, p) or p.dtype
                if name in optimizer.wide_states:
                    dtype = torch.promote_types(p.dtype, torch.float32)
                optimizer.state[p][name] = torch.empty_like(value, dtype=dtype)
                _write(optimizer, group, p, optimizer.state[p][name], value, names.index(name), number)
        if master:
            write_master(p, optimizer.state[p], master, copy)
        else:
            _write(optimizer, group, p, p, copy, _core.PARAM_STREAM, number)


def _as(dtype: torch.dtype, state: Mapping[str, Any], name: str) -> Tensor:
    """Return a copy of a state in ``dtype``."""
    held: Tensor = state[name]
    if block_states.is_in_blocks(held):
        held = block_states.decoded(held, state[name + block_states.SUFFIX], name)
    return held.to(dtype)


# -- rounding with random bits ---------------------------------------------------------------------------------------


def new_count() -> Tensor:
    """Return the ``step`` of a parameter whose rule does not count steps: float32 on the CPU, whatever the defaults."""
    return torch.zeros((), dtype=torch.float32, device="cpu")


def counts_rounding(optimizer: Native, group: dict[str, Any], p: Tensor, names: Iterable[str]) -> bool:
    """Return whether a parameter has a ``step`` only because something is rounded with random bits.

    Args:
        optimizer: The optimizer.
        group: The parameter's group.
        p: The parameter.
        names: The states that it has, or will have.
    """
    held = optimizer.state.get(p, {})
    new = block_states.CODES if optimizer._in_blocks(group, p) else optimizer._state_dtype(group, p) or p.dtype
    dtypes = {held[name].dtype if isinstance(held.get(name), Tensor) else new for name in names}
    rounds = block_states.CODES in dtypes
    if group.get("stochastic_rounding") and not p.is_complex():
        own = set() if master_name(group, p) else {p.dtype}
        rounds = rounds or bool(stochastic.DTYPES & (dtypes | own))
    return rounds and not RULES[optimizer.rule].counts_steps


def encode(optimizer: Native, group: dict[str, Any], p: Tensor, name: str, values: Tensor, number: int) -> None:
    """Write a state in blocks, which is created if it is missing.

    Args:
        optimizer: The optimizer.
        group: The parameter's group.
        p: The parameter.
        name: The state's name.
        values: The new values.
        number: The parameter's place among all.
    """
    state, scale_name = optimizer.state[p], name + block_states.SUFFIX
    if not block_states.is_in_blocks(state.get(name)):
        state[name], state[scale_name] = block_states.new_state(p)
    stream, key = optimizer._state_names().index(name), _random_key(optimizer, group, p, number)
    block_states.encode(values, name, key, stream, state[name], state[scale_name])


def _write(
    optimizer: Native, group: dict[str, Any], p: Tensor, target: Tensor, values: Tensor, stream: int, number: int
) -> None:
    """Write the new values of a parameter or of a state that is not in blocks."""
    if not _rounds(group, target):
        target.copy_(values)
        return
    in_blocks = next(block_states.states_in_blocks(optimizer.state[p]), None)
    order = p if in_blocks is None else optimizer.state[p][in_blocks]
    stochastic.write(target, values, order, _random_key(optimizer, group, p, number), stream)


def _rounds(group: Mapping[str, Any], tensor: object) -> bool:
    """Return whether a parameter without a master, or a state, is rounded stochastically to 16 bits."""
    return bool(group.get("stochastic_rounding")) and stochastic.has_16_bits(tensor)


def _random_key(optimizer: Native, group: Mapping[str, Any], p: Tensor, number: int) -> int:
    """Return the key of a parameter's random bits in the last step. ``number``: its place among all."""
    return _core.random_key(group.get("rounding_seed", 0), int(optimizer.state[p].get("step", 0)), number)
