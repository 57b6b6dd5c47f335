"""Checkpoints of other packages: bitsandbytes, schedulefree, prodigyopt, timm and apex."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


def of_other_packages(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a state_dict of schedulefree, prodigyopt, timm or apex with the names of onepass, and others unchanged."""
    return _of_timm_and_apex(_of_prodigyopt(_of_schedulefree(state_dict)))


# -- bitsandbytes ----------------------------------------------------------------------------------------------------

_BLOCK = 256  # elements that share a scale
_WITHIN = "__bnb_optimizer_quant_state__"  # the states are within this key in later versions


def _scalar(value: float | Tensor) -> Tensor:
    """Return a number as the kernels read it: in float32 on the CPU, whatever torch's defaults are."""
    return torch.tensor(float(value), dtype=torch.float32, device="cpu")


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
            made[names[name]] = _dequantized(value, state, name.removeprefix("state"), where)
        elif name == "step":
            made[name] = _scalar(value)
    if "exp_avg_sq" not in made:
        made.pop("step", None)  # Lion's
    return made


def _dequantized(codes: Tensor, state: Mapping[str, Any], number: str, where: str) -> Tensor:
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
            # On GPUs it reads states in the order of memory, beside parameters that it has made contiguous.
            made[name] = state[ours].to(torch.float32).contiguous()
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
                scalars = {name: _scalar(value) for name, value in numbers.items()}
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
    # prodigyopt has one numerator for all tensors. Each gets its share of it: that which it has of the denominator,
    # because neither changes while a tensor has no gradient. Tensors whose learning rate is 0 do not count.
    counting = [key for group in groups if group["lr"] != 0 for key in group["params"] if key in states]
    sums = {key: float(state["s"].abs().sum(dtype=torch.float64)) for key, state in states.items()}
    total = sum(sums[key] for key in counting or states)
    made = []
    for group in groups:
        part = group["d_numerator"] / total if total and (group["lr"] != 0 or not counting) else 0.0
        for key in (key for key in group["params"] if key in states):
            state = states[key]
            s, shape = state["s"], state["exp_avg_sq"].shape
            p0 = state["p0"].expand(s.shape).clone()  # prodigyopt keeps a single 0 for zeros
            if group["slice_p"] == 1:
                s, p0 = s.reshape(shape), p0.reshape(shape)
            states[key] = {
                "step": _scalar(state["step"]),
                "d_numerator": _scalar(part * sums[key]),
                "d_denom": _scalar(sums[key]),
                "exp_avg": state.get("exp_avg", torch.zeros_like(state["exp_avg_sq"])),
                "exp_avg_sq": state["exp_avg_sq"],
                "s": s,
                "p0": p0,
            }
        dropped = ("d_numerator", "d_denom", "d_hat", "k", "fsdp_in_use")
        made.append({**{name: value for name, value in group.items() if name not in dropped}, "maximize": False})
    return {**state_dict, "state": states, "param_groups": made}


# -- timm and apex ---------------------------------------------------------------------------------------------------


class _Layout(NamedTuple):
    """How an optimizer of timm or apex arranges a parameter group."""

    name: str
    keys: str  # it has all of these
    absent: str = ""  # and none of these
    required: Mapping[str, Any] = {}  # options that onepass does not have, and the values with which both step alike
    dropped: str = ""  # options that onepass does not have, and that do not change the update
    renamed: Mapping[str, str] = {}  # its name of an option -> onepass's

    def fits(self, group: Mapping[str, Any]) -> bool:
        return group.keys() >= {*self.keys.split()} and group.keys().isdisjoint(self.absent.split())


_CAUTION = {"caution": "cautious"}

# A group has the layout of the first that fits. max_grad_norm, by which LAMB clips, is an argument of onepass's
# optimizer (max_norm), not of its groups.
_LAYOUTS = (
    _Layout("apex's FusedNovoGrad", "bias_correction init_zero"),
    _Layout(
        "LAMB",
        "bias_correction grad_averaging max_grad_norm",
        required={"bias_correction": True, "grad_averaging": True, "decoupled_decay": False, "caution": False},
        dropped="step max_grad_norm always_adapt",
    ),
    _Layout("apex's FusedAdam", "bias_correction betas eps", required={"bias_correction": True}, dropped="step"),
    _Layout("apex's FusedAdagrad", "lr eps weight_decay", "maximize betas momentum alpha rho lr_decay d caution"),
    _Layout(
        "timm's Lars",
        "trust_coeff",
        required={"dampening": 0, "trust_clip": False},
        dropped="always_adapt",
        renamed={"trust_coeff": "trust_coefficient"},
    ),
    _Layout("timm's NvNovoGrad", "grad_averaging amsgrad", required={"amsgrad": False, "decoupled_decay": False}),
    _Layout(
        "timm's AdaBelief",
        "rectify",
        "weight_decouple",  # of pytorch_optimizer's
        required={"rectify": False, "amsgrad": False, "fixed_decay": False, "decoupled_decay": True},
        dropped="degenerated_to_sgd",
    ),
    _Layout(
        "timm's Mars",
        "mars_type",
        required={"mars_type": "adamw", "optimize_1d": True, "caution": False},
        dropped="lr_1d_factor betas_1d",
    ),
    # Its masks leave out the term of the differences.
    _Layout("timm's Adan", "no_prox caution", required={"caution": False}, dropped="step"),
    _Layout(
        "timm's Adopt",
        "clip_exp caution",
        renamed={"clip_exp": "clip_exponent", "decoupled": "decoupled_weight_decay", **_CAUTION},
    ),
    _Layout("timm's AdamWLegacy", "caution amsgrad eps", required={"clipping_threshold": None}, renamed=_CAUTION),
    _Layout("timm's Lion", "caution betas", "eps", renamed=_CAUTION),
)

# Options of every optimizer of timm.
_REQUIRED_OF_TIMM = {"corrected_weight_decay": False}
_DROPPED_OF_TIMM = ("foreach", "max_lr_snapshot")
# Groups with one of these keys are of timm, whatever the optimizer.
_KEYS_OF_TIMM = (
    "caution",
    "corrected_weight_decay",
    "max_lr_snapshot",
    "decoupled_decay",
    "lr_in_momentum",
    "normalize_spatial",
    "schedule_decay",
    "wd_ratio",
)


def _of_timm_and_apex(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a state_dict with onepass's names of options and states.

    Raises ValueError for an optimizer or an option that onepass does not have.
    """
    states = dict(state_dict["state"])
    made = []
    for number, group in enumerate(state_dict["param_groups"]):
        where = f"group {number}"
        layout = next((layout for layout in _LAYOUTS if layout.fits(group)), None)
        if layout is None:
            if not group.keys().isdisjoint(_KEYS_OF_TIMM):
                raise ValueError(f"{where} is of an optimizer of timm whose checkpoints are not converted")
            made.append(group)
            continue
        keys = [key for key in group["params"] if states.get(key)]
        _check(layout, group, [states[key] for key in keys], where)
        for key in keys:
            states[key] = _state_of(states[key], layout, group)
        dropped = {*layout.dropped.split(), *layout.required, *_REQUIRED_OF_TIMM, *_DROPPED_OF_TIMM}
        kept = {layout.renamed.get(name, name): value for name, value in group.items() if name not in dropped}
        made.append({"maximize": False, "capturable": False, **_more_options(layout, group), **kept})
    return {**state_dict, "state": states, "param_groups": made}


def _check(layout: _Layout, group: Mapping[str, Any], states: list[Mapping[str, Any]], where: str) -> None:
    if layout.name == "apex's FusedNovoGrad":
        raise ValueError(f"{where}: the averages of {layout.name} are of gradients that are not normalized")
    required = {**layout.required, **_REQUIRED_OF_TIMM}
    if layout.name == "timm's AdaBelief" and not group["weight_decay"]:
        del required["decoupled_decay"]
    if layout.name == "timm's Mars":
        matrices = [state for state in states if state["exp_avg"].ndim >= 2]
        if len(matrices) == len(group["params"]):
            del required["optimize_1d"]
    for name, value in required.items():
        if group.get(name, value) != value:
            raise ValueError(
                f"{where}: {name} of {layout.name} must be {value!r}, got {group[name]!r}: onepass has no counterpart"
            )


def _more_options(layout: _Layout, group: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of onepass that the group does not have."""
    adapts = {"trust_ratio": bool(group["weight_decay"] or group.get("always_adapt"))}
    more: dict[str, dict[str, Any]] = {
        "LAMB": {"trust_clip": False, **adapts},
        "timm's Lars": adapts,
        "timm's Mars": {"clip_correction": True},
        "apex's FusedAdagrad": {"lr_decay": 0.0, "initial_accumulator_value": 0.0},
    }
    return more.get(layout.name, {})


def _state_of(state: Mapping[str, Any], layout: _Layout, group: Mapping[str, Any]) -> dict[str, Any]:
    made = dict(state)
    if layout.name == "timm's NvNovoGrad":
        made["exp_avg_norm_sq"] = made.pop("exp_avg_sq")
    step = made.get("step", group.get("step") if "step" in layout.dropped.split() else None)
    if layout.name == "apex's FusedAdagrad":
        step = 0.0  # counts only for lr_decay
    if step is not None:
        made["step"] = _scalar(step)  # one for each parameter
    return made
