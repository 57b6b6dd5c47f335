"""Checkpoints of other packages: bitsandbytes, schedulefree, prodigyopt, timm and apex."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def of_other_packages(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a state_dict whose groups and states have the names of onepass; of bitsandbytes, only the groups."""
    return _of_timm_and_apex(_of_prodigyopt(_of_schedulefree(state_dict)))


# -- bitsandbytes ----------------------------------------------------------------------------------------------------

_BLOCK = 256  # elements that share a scale
_WITHIN = "__bnb_optimizer_quant_state__"  # the states are within this key in later versions


def of_bitsandbytes(state: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Return a state with torch's names; one of bitsandbytes is decoded to float32."""
    if isinstance(within := state.get(_WITHIN), Mapping):
        state = {**{name: value for name, value in state.items() if name != _WITHIN}, **within}
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
    blocks = -(-codes.numel() // _BLOCK)
    if not isinstance(values, Tensor) or not isinstance(scales, Tensor) or scales.numel() != blocks:
        raise ValueError(f"{where}: state{number} has 8 bits, but no qmap{number} and absmax{number} that fit")
    scale = scales.to(torch.float32).repeat_interleave(_BLOCK)[: codes.numel()]
    return (values[codes.flatten().long()] * scale).reshape(codes.shape)


def for_bitsandbytes(state: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a float32 state with the names of bitsandbytes. Raises ValueError for one of neither Adam nor Lion."""
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


# -- timm and apex ---------------------------------------------------------------------------------------------------

# Keys of groups by which theirs are recognised: torch's and our groups have none of them.
_FOREIGN = frozenset(
    ("step", "caution", "rectify", "bias_correction", "trust_coeff", "mars_type", "clip_exp", "corrected_weight_decay")
)
_RENAMED = {
    "caution": "cautious",
    "decoupled": "decoupled_weight_decay",
    "trust_coeff": "trust_coefficient",
    "clip_exp": "clip_exponent",
}
# Options that ours do not have, and, where another value would be another algorithm, the value with which theirs step
# as ours do.
_ANY = object()
_DROPPED: dict[str, Any] = {
    "bias_correction": True,
    "rectify": False,
    "fixed_decay": False,
    "mars_type": "adamw",
    "corrected_weight_decay": False,
    **dict.fromkeys(("step", "foreach", "max_grad_norm", "max_lr_snapshot", "degenerated_to_sgd"), _ANY),
    **dict.fromkeys(("decoupled_decay", "optimize_1d", "lr_1d_factor", "betas_1d", "always_adapt"), _ANY),
}


def _of_timm_and_apex(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a state_dict with our names of options and states. Raises ValueError where ours would step otherwise."""
    groups = state_dict["param_groups"]
    states = dict(state_dict["state"])
    made = []
    for number, group in enumerate(groups):
        keys = [key for key in group["params"] if key in states]
        is_adagrad = "lr_decay" not in group and any("sum" in states[key] for key in keys)  # of apex
        if not is_adagrad and _FOREIGN.isdisjoint(group):
            made.append(group)
            continue
        ours, dropped = _options(group, [states[key] for key in keys])
        for name, value in dropped.items():
            if value is not _ANY and group.get(name, value) != value:
                raise ValueError(f"group {number}: {name}={group[name]!r} has no counterpart in onepass")
        for key in keys:
            states[key] = _state_of(states[key], group, number)
        if is_adagrad:
            ours |= {"lr_decay": 0.0, "initial_accumulator_value": 0.0}
        kept = {_RENAMED.get(name, name): value for name, value in group.items() if name not in dropped}
        made.append({"maximize": False, "capturable": False, **ours, **kept})
    return {**state_dict, "state": states, "param_groups": made}


def _options(group: Mapping[str, Any], states: list[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return options of ours that their group does not have, and what to drop, as ``_DROPPED``."""
    adapted = {"trust_ratio": bool(group.get("weight_decay") or group.get("always_adapt"))}
    if "init_zero" in group:
        raise ValueError("the averages of apex's FusedNovoGrad are of gradients that are not normalised, unlike ours")
    if "max_grad_norm" in group:  # LAMB
        found = {"grad_averaging": True, "decoupled_decay": False, "caution": False}
        return {"trust_clip": False, **adapted}, {**_DROPPED, **found}
    if "trust_coeff" in group:  # LARS
        return adapted, {**_DROPPED, "dampening": 0, "trust_clip": False}
    if "grad_averaging" in group:  # NovoGrad
        return {}, {**_DROPPED, "amsgrad": False, "decoupled_decay": False}
    if "rectify" in group:  # AdaBelief
        return {}, {**_DROPPED, "amsgrad": False, "decoupled_decay": True if group["weight_decay"] else _ANY}
    if "mars_type" in group:
        has_vectors = any(state["exp_avg"].ndim < 2 for state in states)  # which it steps by another rule by default
        return {"clip_correction": True}, {**_DROPPED, "caution": False, "optimize_1d": True if has_vectors else _ANY}
    return {}, _DROPPED


def _state_of(state: Mapping[str, Any], group: Mapping[str, Any], number: int) -> dict[str, Any]:
    if "exp_avg_lr_1" in state:
        raise ValueError(
            f"group {number}: the averages of timm's LaProp are of gradients multiplied by learning rates, unlike ours"
        )
    made = dict(state)
    if "grad_averaging" in group and "max_grad_norm" not in group:  # NovoGrad
        made["exp_avg_norm_sq"] = made.pop("exp_avg_sq")
    step = made.get("step", group.get("step", 0.0 if "sum" in made else None))
    if step is not None:
        made["step"] = torch.tensor(float(step))  # one for each parameter
    return made
