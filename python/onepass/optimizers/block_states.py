"""8-bit states: microscaling blocks of up to 32 elements that share a scale.

The kernels read and write them (csrc/formats/microscaling.h). A state ``NAME`` has codes of the parameter's shape in
``torch.float8_e4m3fn``, and a second state ``NAME_scale`` has the scales in ``torch.float8_e8m0fnu``: a row for each
row of dimension 0, and in it a scale for each block. This module creates such states, and converts them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import _core
from .arguments import check_number, number
from .gradient_norm import is_dtensor, local_part
from .rules import RULES
from .torch_private import local_offset

CODES = torch.float8_e4m3fn
SCALES = torch.float8_e8m0fnu
SUFFIX = "_scale"
BLOCK = 32
SMALLEST = 4096  # tensors with fewer elements have float32 states

_LARGEST_SCALE = 245  # 2^118, the largest that is written of a block of numbers
_NAN_SCALE = 255  # of a block with an element that is NaN or infinite


@functools.cache
def codings() -> dict[str, str]:
    """Return how each state is stored in 8 bits, by its name."""
    found: dict[str, str] = {}
    for rule in RULES.values():
        found.update(zip(rule.states, rule.codings, strict=False))
    return found


def has_codings(rule: str) -> bool:
    """Return whether the states of a rule can have 8 bits."""
    return rule in RULES and bool(RULES[rule].codings)


def fits(p: Tensor) -> bool:
    """Return whether the states of a parameter are stored in blocks, if its group has 8-bit states."""
    return not p.is_complex() and p.ndim >= 2 and p.numel() >= SMALLEST


def is_in_blocks(state: object) -> bool:
    """Return whether a state is the codes of blocks."""
    return isinstance(state, Tensor) and state.dtype == CODES


def scales_in_row(shape: tuple[int, ...]) -> int:
    """Return the number of blocks in a row of dimension 0."""
    length = 1
    for size in shape[1:]:
        length *= size
    return -(-length // BLOCK)


def new_state(p: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes and scales of a state that is zero.

    Raises:
        ValueError: The parameter is a DTensor that does not hold whole rows.
    """
    local = local_part(p.detach())
    check_rows(p)
    codes = torch.zeros_like(local, dtype=CODES, memory_format=torch.preserve_format)
    if not _has_rows(codes):
        codes = codes.contiguous()
    scales = torch.zeros((local.shape[0], scales_in_row(local.shape)), dtype=SCALES, device=local.device)
    return placed_as(p, codes, p.shape, p.stride()), placed_as(p, scales, *_scales_geometry(p.shape))


def decoded(codes: Tensor, scales: Tensor, name: str) -> Tensor:
    """Return the values of a state, a new float32 tensor."""
    local, local_scales = local_part(codes).cpu(), local_part(scales).cpu()
    values = torch.empty_like(local, dtype=torch.float32)
    _core.decode_blocks(local, local_scales, codings()[name], values)
    return placed_as(codes, values.to(local_part(codes).device), codes.shape, codes.stride())


def decoded_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state with float32 values instead of codes and scales."""
    in_blocks = set(states_in_blocks(state))
    scales = {name + SUFFIX for name in in_blocks}
    return {
        name: decoded(value, state[name + SUFFIX], name) if name in in_blocks else value
        for name, value in state.items()
        if name not in scales
    }


def encode(values: Tensor, name: str, key: int, state: int, codes: Tensor, scales: Tensor) -> None:
    """Round values stochastically into codes and scales.

    Args:
        values: The values, of any dtype.
        name: Name of the state.
        key: Key of the parameter's random bits (``_core.random_key``).
        state: Number of the state among those of its rule.
        codes: Codes, which are overwritten.
        scales: Scales, which are overwritten.
    """
    local, local_scales = local_part(codes), local_part(scales)
    on_cpu, scales_on_cpu = local.cpu(), local_scales.cpu()
    ordered = torch.empty_like(on_cpu, dtype=torch.float32).copy_(local_part(values))
    first = 0 if not is_dtensor(codes) else (first_row(codes) or 0)
    _core.encode_blocks(ordered, codings()[name], key, state, first, on_cpu, scales_on_cpu)
    if on_cpu.data_ptr() != local.data_ptr():
        local.copy_(on_cpu)
        local_scales.copy_(scales_on_cpu)


def first_row(p: Tensor) -> int | None:
    """Return the index in the whole tensor of the first row that this process holds; None if it has no whole rows."""
    for placement in p.placements:  # type: ignore[attr-defined]
        if placement.is_partial() or (placement.is_shard() and placement.dim != 0):
            return None
    offset = local_offset(p)
    return offset[0] if offset else 0


def first_element(p: Tensor) -> int:
    """Return the index in the whole tensor, in row-major order, of the first element of a DTensor's local part."""
    if any(placement.is_partial() for placement in p.placements):  # type: ignore[attr-defined]
        return 0
    index = 0
    for size, offset in zip(p.shape, local_offset(p), strict=True):
        index = index * size + offset
    return index


def check(where: str, state: Mapping[str, Any]) -> None:
    """Check that the codes in a saved state have fitting scales.

    Raises:
        ValueError: They have not. The message begins with ``where``.
    """
    for name, codes in state.items():
        if not is_in_blocks(codes):
            continue
        scales = state.get(name + SUFFIX)
        if not isinstance(scales, Tensor):
            raise ValueError(f"{where}: its state {name} has 8 bits, but its state {name + SUFFIX} is missing")
        if name not in codings() or codes.ndim < 2:
            raise ValueError(f"{where}: its state {name} has 8 bits, which are not defined for it")
        wanted = (codes.shape[0], scales_in_row(codes.shape))
        if scales.dtype != SCALES or tuple(scales.shape) != wanted:
            raise ValueError(
                f"{where}: its state {name + SUFFIX} must have dtype {SCALES} and shape {wanted}, but has "
                f"{scales.dtype} and {tuple(scales.shape)}"
            )
        if local_part(scales).device.type == "meta":
            continue
        numbers = local_part(scales).view(torch.uint8)
        if bool(((numbers > _LARGEST_SCALE) & (numbers != _NAN_SCALE)).any()):
            raise ValueError(f"{where}: its state {name + SUFFIX} has a scale above 2^118")
        if bool((local_part(codes).view(torch.uint8) & 0x7F == 0x7F).any()):
            raise ValueError(f"{where}: its state {name} has a code that is NaN")


def check_unencoded(where: str, p: Tensor, name: str, values: Tensor, step: object) -> None:
    """Check that a saved state of a parameter, which is not in blocks, can be encoded.

    Args:
        where: What messages begin with.
        p: The parameter.
        name: Name of the state.
        values: The state.
        step: The parameter's step count, on which the random bits depend.

    Raises:
        ValueError: The state does not have the parameter's shape and placement, or the count is out of range.
        TypeError: The count is not a number.
    """
    if values.layout != torch.strided or values.shape != p.shape or local_part(values).shape != local_part(p).shape:
        raise ValueError(
            f"{where}: its state {name} must be strided and have the parameter's shape {tuple(p.shape)}, so that it "
            f"can be stored in 8 bits, but has {values.layout} and {tuple(values.shape)}"
        )
    check_rows(p)
    step_count(where, step)


def step_count(where: str, step: object) -> int:
    """Return a saved step count, on which random bits depend. Arguments and errors: see :func:`check_unencoded`."""
    check_number(f"{where}: its state step", step)
    if not 0 <= (count := number(step)) < 2**63:  # type: ignore[arg-type]
        raise ValueError(f"{where}: its state step must be >= 0 and finite, got {count}")
    return int(count)


def check_rows(p: Tensor) -> None:
    """Check that the states of a parameter can be stored in blocks: no block may be in two processes.

    Raises:
        ValueError: The parameter is a DTensor that does not hold whole rows.
    """
    if is_dtensor(p) and first_row(p) is None:
        raise ValueError(
            "state_dtype=torch.float8_e4m3fn needs DTensors that are sharded along dimension 0 only, but a parameter "
            f"has placements {p.placements}"  # type: ignore[attr-defined]
        )


def states_in_blocks(state: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of the states that are stored in blocks."""
    return (name for name, value in state.items() if is_in_blocks(value))


def _has_rows(codes: Tensor) -> bool:
    """Return whether a packed tensor has its first dimension outermost."""
    rows = codes.shape[0]
    return rows <= 1 or codes.stride(0) == codes.numel() // rows


def _scales_geometry(shape: torch.Size) -> tuple[torch.Size, tuple[int, int]]:
    in_row = scales_in_row(shape)
    return torch.Size((shape[0], in_row)), (in_row, 1)


def placed_as(p: Tensor, local: Tensor, shape: torch.Size, stride: tuple[int, ...]) -> Tensor:
    """Return a local part as a DTensor that is placed as ``p``, if ``p`` is one."""
    if not is_dtensor(p):
        return local
    from torch.distributed.tensor import DTensor

    mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined]
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)
