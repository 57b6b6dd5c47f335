"""Conversion of checkpoints: states in another dtype, and those of other packages (interchange.py)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import _core
from . import block_states, interchange
from .arguments import check_keys, described, dtype_name
from .base import STATE_DTYPES
from .loading import OWN_KEYS
from .rules import RULES


@functools.cache
def _state_names() -> frozenset[str]:
    return frozenset(name for rule in RULES.values() for name in rule.states)


def convert_state_dict(
    state_dict: Mapping[str, Any], state_dtype: torch.dtype | None = None, *, layout: str = "torch"
) -> dict[str, Any]:
    """Return the ``state_dict`` of an optimizer, with its states in another dtype.

    The result loads into the optimizer of onepass that has this ``state_dtype`` and, unless the dtype is
    ``torch.float8_e4m3fn``, into torch's class. The given ``state_dict`` may be one of onepass, of torch, of an Adam,
    AdamW or Lion of bitsandbytes (8-bit states are decoded), or of the packages schedulefree, prodigyopt, timm and apex
    (:doc:`/compatibility` lists their optimizers). It is not changed; values that need no conversion are shared.
    Masters are not converted.

    Args:
        state_dict: The result of ``optimizer.state_dict()``, or of ``torch.load`` of it.
        state_dtype: dtype of the states: torch.float32, float64, bfloat16, float16, or float8_e4m3fn (see
            :doc:`/8bit_states`). Tensors of integers, scalars, and the states of optimizers that cannot have 8 bits
            stay as they are. StableAdamW is one of them, but its states have the names of Adam's and would be
            converted: do not convert them to 8 bits. None: 8-bit states become float32, others stay as they are, and
            the groups have no key ``state_dtype``. Other keys of onepass stay; torch's class ignores them.
        layout: ``"torch"``: the names of torch's states. ``"bitsandbytes"``: ``state1`` and ``state2``, as the Adam,
            AdamW and Lion of bitsandbytes read them, in float32 (its own 8-bit codes are not written).

    Returns:
        A new ``state_dict``.

    Raises:
        ValueError: ``state_dict`` is not that of an optimizer, ``state_dtype`` or ``layout`` is none of these, 8-bit
            states have no scales or wrong ones, or an option of timm or apex has no counterpart. With
            ``layout="bitsandbytes"``: ``state_dtype`` is neither None nor torch.float32, or states are neither of Adam
            nor of Lion.

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
        known = (*STATE_DTYPES, block_states.CODES)
        raise ValueError(
            f"convert_state_dict: state_dtype must be one of {known} or None, got {described(state_dtype)}"
        )
    if layout not in ("torch", "bitsandbytes"):
        raise ValueError(f"convert_state_dict: layout must be 'torch' or 'bitsandbytes', got {described(layout)}")
    if layout == "bitsandbytes" and state_dtype not in (None, torch.float32):
        raise ValueError(
            "convert_state_dict: state_dtype must be None or torch.float32 with layout='bitsandbytes', got "
            f"{state_dtype}"
        )
    check_keys("convert_state_dict: state_dict", state_dict, ("state", "param_groups"))
    state_dict = interchange.of_other_packages(state_dict)
    groups = [dict(group) for group in state_dict["param_groups"]]
    numbers = {key: number for number, key in enumerate(key for group in groups for key in group["params"])}
    group_of = {key: group for group in groups for key in group["params"]}
    states = {}
    kept: set[int] = set()  # groups whose states cannot have 8 bits
    for key, state in state_dict["state"].items():
        where = f"state of parameter {key}"
        if not isinstance(state, Mapping):
            raise ValueError(f"convert_state_dict: {where} must be a dict, got {described(state)}")
        block_states.check(where, state)
        group = group_of.get(key, {})
        held = interchange.of_bitsandbytes(state, where)
        if layout == "bitsandbytes":
            states[key] = interchange.for_bitsandbytes(block_states.decoded_state(held), where)
        else:
            random_key = 0
            if state_dtype == block_states.CODES:
                step = block_states.step_count(where, held.get("step", 0))
                random_key = _core.random_key(group.get("rounding_seed", 0), step, numbers.get(key, 0))
            names, has_codings = _rule_of(frozenset(held), frozenset(group))
            if state_dtype != block_states.CODES:
                states[key] = _converted(block_states.decoded_state(held), state_dtype, random_key, names)
            elif has_codings:
                states[key] = _converted(held, state_dtype, random_key, names)
            else:
                states[key] = dict(held)
                kept.add(id(group))
    for group in groups:
        if state_dtype == block_states.CODES and not any(key in states for key in group["params"]):
            _, has_codings = _rule_of(frozenset(), frozenset(group))
            if not has_codings:
                kept.add(id(group))
        if layout == "bitsandbytes":
            for name in OWN_KEYS:
                group.pop(name, None)
        elif state_dtype is None:
            group.pop("state_dtype", None)
        elif id(group) not in kept:
            group["state_dtype"] = dtype_name(state_dtype)
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


# The states of optimizers that have no rule of their own, by an option that only their groups have: Adafactor; Muon and
# NorMuon.
_NOT_RULES = {
    "beta2_decay": ["row_var", "col_var", "variance"],
    "ns_coefficients": ["momentum_buffer", "second_momentum_buffer"],
}


@functools.cache
def _rule_of(state: frozenset[str], group: frozenset[str]) -> tuple[list[str], bool]:
    """Return the names of the states of the rule that a state with these keys is of, and whether they can have 8 bits.

    Of several rules it is the one of whose hyperparameters the group has the most, if it has all; of these, one whose
    states can have 8 bits, and that has the fewest.
    """
    if group >= {"clip_threshold", "betas"}:
        return ["exp_avg"], False  # CAME, not a rule of this list; its second moments stay float32
    for option, names in _NOT_RULES.items():
        if option in group:
            return names, False
    held = state & _state_names()
    found = []
    for rule in RULES.values():
        if held <= {*rule.states, *rule.scalars}:
            keys = {name.partition("[")[0].rstrip("?!") for name in rule.hyper} - {*OWN_KEYS}
            found.append((-len(keys) if keys <= group else 0, not rule.codings, len(rule.states), rule.states))
    if not found:
        return sorted(held), held <= block_states.codings().keys()
    _, refuses, _, names = min(found)
    return names, not refuses
