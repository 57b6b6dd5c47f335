"""Master weights: 16-bit parameters that are stepped as the float32 numbers of which they are the rounded copies.

The kernels read and write them (csrc/cpu/master.h). This module has the same in torch operations, for parameters that
torch's implementation steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import _core
from .arguments import described
from .block_states import placed_as
from .gradient_norm import is_dtensor, local_part
from .stochastic import has_16_bits

KINDS = ("split", "float32")

WHOLE = "master"  # the state that holds the master
LOW_BITS = "master_low"  # the state that holds its low 16 bits
NAMES = (WHOLE, LOW_BITS)


def check_master(what: str, group: Mapping[str, Any]) -> None:
    """Check the value of ``master`` in a parameter group, and that its parameters can have such masters."""
    master = group.get("master")
    if master is None:
        return
    if master not in KINDS:
        raise ValueError(f"{what}: master must be 'split', 'float32' or None, got {described(master)}")
    params = group.get("params", ())
    for i, p in enumerate(params if isinstance(params, list) else ()):
        if master == "split" and isinstance(p, Tensor) and p.dtype == torch.float16:
            raise ValueError(
                f"{what}: master='split' needs bfloat16 parameters, but parameter {i} is {p.dtype}; use "
                "master='float32'"
            )


def master_name(group: Mapping[str, Any], p: Tensor) -> str | None:
    """Return the name of the state that holds a parameter's master; None if the parameter has no master."""
    master = group.get("master")
    if master is None or not has_16_bits(p):
        return None
    return LOW_BITS if master == "split" else WHOLE


def new_master(p: Tensor, name: str) -> Tensor:
    """Return the state of a parameter that is its own master."""
    if name == LOW_BITS:
        return torch.zeros_like(p, dtype=torch.int16, memory_format=torch.preserve_format)
    return p.detach().to(torch.float32, memory_format=torch.preserve_format)


def master_of(p: Tensor, state: Mapping[str, Any], name: str) -> Tensor:
    """Return the master of a parameter, a new float32 tensor. A parameter that has been changed is its own master."""
    held = state.get(name)
    if held is None or (name == LOW_BITS and not low_bits_are_valid(p)):
        return p.detach().to(torch.float32)
    return _locally(_joined if name == LOW_BITS else _unless_changed, p.detach(), held)


def write_master(p: Tensor, state: dict[str, Any], name: str, master: Tensor) -> None:
    """Set the master of a parameter, and the parameter to its rounded copy."""
    if state.get(name) is None:
        state[name] = new_master(p, name)
    with torch.no_grad():
        if name == WHOLE:
            state[name].copy_(master)
            p.copy_(master)
            return
        high, low = _split(local_part(master.detach()))
        local_part(p.detach()).view(torch.int16).copy_(high)
        local_part(state[name]).copy_(low)
        if is_dtensor(p):
            torch.autograd.graph.increment_version(p)
    remember_low_bits(p)


def _locally(function: Callable[[Tensor, Tensor], Tensor], p: Tensor, held: Tensor) -> Tensor:
    """Call a function of two tensors, or of the local parts of two DTensors that are placed alike."""
    return placed_as(p, function(local_part(p), local_part(held)), p.shape, p.stride())


def _joined(p: Tensor, low: Tensor) -> Tensor:
    # As LowBits::join (csrc/formats/low_bits.h): if the parameter is zero, negative low bits do not count.
    own = p.to(torch.float32)
    return torch.where((own == 0) & (low < 0), own, (own.view(torch.int32) + low).view(torch.float32))


def _unless_changed(p: Tensor, master: Tensor) -> Tensor:
    rounded = master.to(p.dtype)
    same = (rounded.view(torch.int16) == p.view(torch.int16)) | (rounded.isnan() & p.isnan())
    return torch.where(same, master, p.to(torch.float32))


def _split(master: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bits of the rounded bfloat16 copy, and the low bits, both as int16."""
    bits, nan = master.to(torch.float32).view(torch.int32), master.isnan()
    high = torch.where(nan, (bits >> 16) | 0x40, (bits + 0x8000) >> 16)
    return _as_int16(high), _as_int16(torch.where(nan, 0, bits))


def _as_int16(bits: Tensor) -> Tensor:
    return ((bits & 0xFFFF) - ((bits & 0x8000) << 1)).to(torch.int16)


# -- parameters that were changed between steps ----------------------------------------------------------------------


def low_bits_are_valid(p: Tensor) -> bool:
    """Return whether a parameter has not been changed since its low bits were written or loaded."""
    known = _core.master_versions.get(id(p))
    return known is None or known == p._version


def remember_low_bits(p: Tensor) -> None:
    """Remember that the low bits of a parameter belong to its present value."""
    if not p.is_inference():
        _core.remember_version(p, p._version)


def state_to_save(p: Tensor, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the state of a parameter as it is saved or copied: low bits that are not valid are zeros.

    Whoever loads them takes them as valid (:func:`forget_low_bits`).
    """
    if not isinstance(state, Mapping) or not isinstance(low := state.get(LOW_BITS), Tensor) or low_bits_are_valid(p):
        return state
    return {**state, LOW_BITS: torch.zeros_like(low, memory_format=torch.preserve_format)}


def forget_low_bits(params: Iterable[Tensor]) -> None:
    """Take the low bits of parameters as valid, whatever has happened to the parameters until now."""
    for p in params:
        _core.master_versions.pop(id(p), None)


def low_bits_versions(params: Iterable[Tensor]) -> dict[Tensor, int | None]:
    """Return the version to which the low bits of each parameter belong; None if they are valid for any."""
    return {p: _core.master_versions.get(id(p)) for p in params}


def set_low_bits_versions(versions: Mapping[Tensor, int | None]) -> None:
    """Set what :func:`low_bits_versions` has returned."""
    for p, version in versions.items():
        if version is None:
            _core.master_versions.pop(id(p), None)
        else:
            _core.remember_version(p, version)


def confirm_low_bits(p: Tensor) -> None:
    """Take the low bits of a parameter, if it has any, as those of its present value."""
    if id(p) in _core.master_versions:
        remember_low_bits(p)


@contextlib.contextmanager
def low_bits_kept(params: Iterable[Tensor]) -> Iterator[None]:
    """Keep the low bits of parameters that have the same values at the end of this context as at its beginning."""
    kept = [p for p in params if low_bits_are_valid(p)]
    try:
        yield
    finally:
        for p in kept:
            confirm_low_bits(p)
