"""Conversion of checkpoints: states in another dtype, and those of bitsandbytes, schedulefree and prodigyopt."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import _core
from . import block_states
from .arguments import described
from .base import OWN_KEYS, STATE_DTYPES
from .came import CAME

# Keys of groups that only onepass reads, and that need no state.
_OWN_KEYS = tuple(name for name in OWN_KEYS if name != "master")

_BITSANDBYTES_BLOCK = 256  # elements that share a scale there
_BITSANDBYTES_STATES = "__bnb_optimizer_quant_state__"  # the states are within this key in its later versions


@functools.cache
def _state_names() -> frozenset[str]:
    return frozenset(name for _, states, *_ in _core.rules().values() for name in states)


def convert_state_dict(
    state_dict: Mapping[str, Any], state_dtype: torch.dtype | None = None, *, layout: str = "torch"
) -> dict[str, Any]:
    """Return the ``state_dict`` of an optimizer, with its states in another dtype.

    The result loads into the optimizer of onepass that has this ``state_dtype``, and, unless that is
    ``torch.float8_e4m3fn``, into torch's class. The given ``state_dict`` may be of onepass, of torch, of an 8-bit Adam,
    AdamW or Lion of bitsandbytes, whose states are recognised by their names and decoded, or of the packages
    schedulefree and prodigyopt, for the class of onepass that steps alike. It is not changed; values that need no
    conversion are shared. Masters are kept as they are.

    Args:
        state_dict: What ``optimizer.state_dict()`` returned, or ``torch.load`` of it.
        state_dtype: dtype of the states: torch.float32, float64, bfloat16, float16, or float8_e4m3fn (see
            :doc:`/8bit_states`). Tensors of integers, scalars, and the states of optimizers that cannot have 8 bits
            stay as they are. StableAdamW cannot, but has the names of Adam's states: do not ask for 8 bits.
            None: float32 where states have 8 bits, and otherwise as they are. Then the groups have no key of onepass
            that concerns state dtypes.
        layout: ``"torch"``: the names of torch's states. ``"bitsandbytes"``: ``state1`` and ``state2``, as the Adam,
            AdamW and Lion of bitsandbytes read them, in float32 (its own 8-bit codes are not written).

    Returns:
        A new ``state_dict``.

    Raises:
        ValueError: ``state_dtype`` or ``layout`` is none of these, 8-bit states have no fitting scales, or states are
            neither of Adam nor of Lion with ``layout="bitsandbytes"``.

    Example:
        >>> optimizer = onepass.AdamW(torch.nn.Linear(64, 64).parameters(), state_dtype=torch.float8_e4m3fn)
        >>> for p in optimizer.param_groups[0]["params"]:
        ...     p.grad = torch.ones_like(p)
        >>> optimizer.step()
        >>> plain = onepass.convert_state_dict(optimizer.state_dict())
        >>> torch.optim.AdamW(torch.nn.Linear(64, 64).parameters()).load_state_dict(plain)
        >>> plain["state"][0]["exp_avg"].dtype
        torch.float32
    """
    if state_dtype is not None and state_dtype not in (*STATE_DTYPES, block_states.CODES):
        raise ValueError(f"state_dtype must be a floating-point dtype of states, got {described(state_dtype)}")
    if layout not in ("torch", "bitsandbytes"):
        raise ValueError(f"layout must be 'torch' or 'bitsandbytes', got {described(layout)}")
    state_dict = _of_prodigyopt(_of_schedulefree(state_dict))
    groups = [dict(group) for group in state_dict["param_groups"]]
    numbers = {key: number for number, key in enumerate(key for group in groups for key in group["params"])}
    group_of = {key: group for group in groups for key in group["params"]}
    states = {}
    kept: set[int] = set()  # groups whose states cannot have 8 bits
    for key, state in state_dict["state"].items():
        where = f"state of parameter {key}"
        block_states.check(where, state)
        group = group_of.get(key, {})
        held = _of_torch(state, where)
        if layout == "bitsandbytes":
            states[key] = _of_bitsandbytes(block_states.decoded_state(held), where)
        else:
            step: Any = held.get("step", 0)
            random_key = _core.random_key(group.get("rounding_seed", 0), int(step), numbers.get(key, 0))
            names, has_codings = _rule_of(frozenset(held), frozenset(group))
            if state_dtype != block_states.CODES:
                states[key] = _converted(block_states.decoded_state(held), state_dtype, random_key, names)
            elif has_codings:
                states[key] = _converted(held, state_dtype, random_key, names)
            else:
                states[key] = dict(held)
                kept.add(id(group))
    for group in groups:
        if state_dtype is None or layout == "bitsandbytes":
            for name in _OWN_KEYS:
                group.pop(name, None)
        elif id(group) not in kept:
            group["state_dtype"] = str(state_dtype).removeprefix("torch.")
    return {**state_dict, "state": states, "param_groups": groups}


def _converted(state: Mapping[str, Any], dtype: torch.dtype | None, key: int, names: list[str]) -> dict[str, Any]:
    """Return a state in another dtype. ``names``: of the states of its rule, which number them for the random bits."""
    if dtype is None:
        return dict(state)
    made: dict[str, Any] = {}
    for name, value in state.items():
        is_state = isinstance(value, Tensor) and name in names and value.is_floating_point()
        encodes = name in block_states.codings() and not block_states.is_in_blocks(value)
        if not is_state or (dtype == block_states.CODES and not encodes):
            made[name] = value
        elif dtype == block_states.CODES and block_states.fits(value):
            codes, scales = block_states.new_state(value)
            block_states.encode(value, name, key, names.index(name), codes, scales)
            made[name], made[name + block_states.SUFFIX] = codes, scales
        else:
            keeps = dtype == block_states.CODES and value.dtype == torch.float64
            made[name] = value if keeps else value.to(torch.float32 if dtype == block_states.CODES else dtype)
    return made


@functools.cache
def _rule_of(state: frozenset[str], group: frozenset[str]) -> tuple[list[str], bool]:
    """Return the names of the states of the rule that a state with these keys is of, and whether they can have 8 bits.

    Of several rules it is the one of whose hyperparameters the group has the most, if it has all; of these, one whose
    states can have 8 bits, and that has the fewest.
    """
    if state and state <= {"exp_avg", *CAME.wide_states} and group >= {"clip_threshold", "betas"}:
        return ["exp_avg"], False  # not a rule of this list; its second moments stay float32
    held = state & _state_names()
    found = []
    for hyper, names, scalars, _, codings in _core.rules().values():
        if held <= {*names, *scalars}:
            keys = {name.partition("[")[0].rstrip("?!") for name in hyper} - {*OWN_KEYS}
            found.append((-len(keys) if keys <= group else 0, not codings, len(names), names))
    if not found:
        return sorted(held), held <= block_states.codings().keys()
    _, refuses, _, names = min(found)
    return names, not refuses


# -- bitsandbytes ----------------------------------------------------------------------------------------------------


def _of_torch(state: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Return a state with torch's names; one of bitsandbytes is decoded to float32."""
    if isinstance(within := state.get(_BITSANDBYTES_STATES), Mapping):
        state = {**{name: value for name, value in state.items() if name != _BITSANDBYTES_STATES}, **within}
    if "state1" not in state:
        return state
    names = {"state1": "exp_avg", "state2": "exp_avg_sq"}
    made: dict[str, Any] = {}
    for name, value in state.items():
        if name in names:
            made[names[name]] = _dequantised(value, state, name.removeprefix("state"), where)
        elif name == "step":
            made[name] = torch.tensor(float(value))
    if "exp_avg_sq" not in made:
        made.pop("step", None)  # Lion's
    return made


def _dequantised(codes: Tensor, state: Mapping[str, Any], number: str, where: str) -> Tensor:
    if codes.dtype != torch.uint8:
        return codes.to(torch.float32)
    values, scales = state.get("qmap" + number), state.get("absmax" + number)
    blocks = -(-codes.numel() // _BITSANDBYTES_BLOCK)
    if not isinstance(values, Tensor) or not isinstance(scales, Tensor) or scales.numel() != blocks:
        raise ValueError(f"{where}: state{number} has 8 bits, but no qmap{number} and absmax{number} that fit")
    scale = scales.to(torch.float32).repeat_interleave(_BITSANDBYTES_BLOCK)[: codes.numel()]
    return (values[codes.flatten().long()] * scale).reshape(codes.shape)


def _of_bitsandbytes(state: Mapping[str, Any], where: str) -> dict[str, Any]:
    is_came = "exp_avg_sq" in state and "step" not in state  # of a vector
    if is_came or "exp_avg" not in state or set(state) - {"step", "exp_avg", "exp_avg_sq"}:
        raise ValueError(f"{where}: layout='bitsandbytes' needs the states of Adam or Lion, got {sorted(state)}")
    made: dict[str, Any] = {"step": int(state["step"]) if "step" in state else 0}
    for name, ours in (("state1", "exp_avg"), ("state2", "exp_avg_sq")):
        if ours in state:
            made[name] = state[ours].to(torch.float32)
    return made


# -- schedulefree ----------------------------------------------------------------------------------------------------


def _of_schedulefree(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a state_dict with the numbers that the package schedulefree has for a group at each parameter."""
    groups = state_dict["param_groups"]
    if not any("k" in group and "weight_sum" in group for group in groups):
        return state_dict
    states = dict(state_dict["state"])
    made = []
    for group in groups:
        numbers = {"step": group["k"], "lr_max": max(group["lr_max"], 0.0), "weight_sum": group["weight_sum"]}
        for key in group["params"]:
            if key in states:
                scalars = {name: torch.tensor(float(value)) for name, value in numbers.items()}
                states[key] = {**scalars, **states[key]}
        dropped = ("k", "lr_max", "weight_sum", "scheduled_lr", "foreach")
        kept = {name: value for name, value in group.items() if name not in dropped}
        made.append({"train_mode": False, **kept, "maximize": False, "capturable": False})
    return {**state_dict, "state": states, "param_groups": made}


# -- prodigyopt ------------------------------------------------------------------------------------------------------


def _of_prodigyopt(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a state_dict with the numbers that the package prodigyopt has for all groups at the parameters."""
    groups = state_dict["param_groups"]
    if not all(group.keys() >= {"k", "d0", "d_numerator", "slice_p"} for group in groups):
        return state_dict
    states = dict(state_dict["state"])
    # The numerator is of all tensors. One has all of it, of a group whose learning rate is not 0: others do not count.
    counting = sorted(groups, key=lambda group: group["lr"] == 0)
    bearer = next((key for group in counting for key in group["params"] if key in states), None)
    made = []
    for group in groups:
        for key in (key for key in group["params"] if key in states):
            state = states[key]
            s, shape = state["s"], state["exp_avg_sq"].shape
            p0 = state["p0"].expand(s.shape).clone()  # of zeros it has one
            if group["slice_p"] == 1:
                s, p0 = s.reshape(shape), p0.reshape(shape)
            states[key] = {
                "step": torch.tensor(float(state["step"])),
                "d_numerator": torch.tensor(float(group["d_numerator"] if key == bearer else 0.0)),
                "d_denom": s.abs().sum(dtype=torch.float32),
                "exp_avg": state.get("exp_avg", torch.zeros_like(state["exp_avg_sq"])),
                "exp_avg_sq": state["exp_avg_sq"],
                "s": s,
                "p0": p0,
            }
        dropped = ("d_numerator", "d_denom", "d_hat", "k", "fsdp_in_use")
        made.append({**{name: value for name, value in group.items() if name not in dropped}, "maximize": False})
    return {**state_dict, "state": states, "param_groups": made}
