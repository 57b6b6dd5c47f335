"""Stochastic rounding to 16 bits, for parameters that torch's implementation steps.

The kernels do the same (csrc/formats/stochastic.h), with the same random bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _core
from .arguments import dtype_name
from .block_states import first_element
from .gradient_norm import is_dtensor, local_part

DTYPES = frozenset({torch.bfloat16, torch.float16})  # that are rounded stochastically, in addition to 8-bit states


def has_16_bits(tensor: object) -> bool:
    """Return whether the elements of a tensor are floating-point numbers of 16 bits."""
    return isinstance(tensor, Tensor) and tensor.dtype in DTYPES


def write(target: Tensor, values: Tensor, order: Tensor, key: int, stream: int) -> None:
    """Round values stochastically into a tensor of 16 bits.

    Args:
        target: bfloat16 or float16.
        values: The values, of any dtype, in the shape of ``target``.
        order: A tensor of that shape. The indices of elements, which the random bits depend on, have its order in
            memory.
        key: Key of the parameter's random bits (``_core.random_key``).
        stream: Number of the state among those of its rule, or ``_core.PARAM_STREAM``.
    """
    first = first_element(order) if is_dtensor(order) else 0
    local = local_part(target.detach())
    ordered = torch.empty_like(local_part(order.detach()), dtype=torch.float32, device="cpu")
    ordered.copy_(local_part(values.detach()))
    _core.round_stochastically(ordered, dtype_name(target.dtype), key, stream, first)
    local.copy_(ordered)
    if is_dtensor(target):
        torch.autograd.graph.increment_version(target)
