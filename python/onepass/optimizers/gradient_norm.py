"""The norm of all gradients of a step, and sums over single tensors, on one process or several."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _core

# Where a tensor's parts are: its mesh, and the dimensions of the mesh over which they are spread. None: a plain tensor.
_Place = tuple[Any, tuple[int, ...]] | None


def total_norm(
    params: Sequence[Tensor], grads: Sequence[Tensor | None], largest: bool, measures: Sequence[float | None] = ()
) -> float:
    """Return the 2-norm or the largest magnitude of all gradients, measured in float64.

    Tensors that are replicated over processes count once, and so do plain tensors together with DTensors. All processes
    of a mesh must call this, with the same parameters in the same order. They get the same number, even if a tensor
    that should be replicated differs between them: the first process's tensor counts, and NaN and infinity count on
    every process. A process outside a mesh counts only the gradients that are not on this mesh.

    There is one all-reduce for each dimension of each mesh over which a tensor is sharded, of one number for each
    combination of such dimensions.

    Args:
        params: The parameters; only their placements are used.
        grads: The gradients, None where a parameter has none.
        largest: Whether to return the largest magnitude.
        measures: For each gradient, the sum of squares or the largest magnitude of this process's part, if the kernels
            have already measured it, else None. Empty: no gradient has been measured.
    """
    known = list(measures) or [None] * len(grads)
    whole: list[Tensor | None] = [_replicated_sums(grad) for grad in grads]
    missing = [
        i
        for i, grad in enumerate(whole)
        # The largest magnitude of complex numbers is not that of their parts.
        if grad is not None and (known[i] is None or grad is not grads[i] or (largest and grad.is_complex()))
    ]
    for i, found in zip(missing, _measure([local_part(whole[i]) for i in missing], largest), strict=True):
        known[i] = found

    at_place: dict[_Place, list[float]] = {}
    for p, grad, measure in zip(params, whole, known, strict=True):
        own = at_place.setdefault(_place(p if grad is None else grad), [])
        if grad is not None and measure is not None:
            own.append(measure)
    combined = {place: combine(own, largest) for place, own in at_place.items()}
    total = combine(_over_processes(combined, largest), largest)
    return total if largest else math.sqrt(total)


def add_up_sums(params: Sequence[Any], sums: Tensor) -> None:
    """Replace sums over this process's parts of DTensors by the sums over the whole tensors.

    All processes of a mesh must call this, with the same parameters in the same order. For each mesh and each set of
    its dimensions over which parameters are sharded, there is one all-reduce for each dimension of the set.

    Args:
        params: The DTensors.
        sums: For each of them, the same number of float64 sums, as bytes, on the parameters' device.
    """
    rows = sums.view(torch.float64).view(len(params), -1)
    at_place: dict[Any, list[Tensor]] = {}
    for p, row in zip(params, rows, strict=True):
        at_place.setdefault(_place(p), []).append(row)
    for (mesh, dims), own in at_place.items():
        if mesh.get_coordinate() is None:
            continue
        added = rows if len(own) == len(params) else torch.stack(own)
        if added.device.type != mesh.device_type:  # parameters that FSDP keeps on the CPU
            added = added.to(mesh.device_type)
        for dim in dims:
            if mesh.size(dim) > 1:
                dist.all_reduce(added, group=mesh.get_group(dim))
        if added is not rows:
            for row, result in zip(own, added, strict=True):
                row.copy_(result)


def combine(measures: Sequence[float], largest: bool) -> float:
    """Return the sum of the measures, or the largest; NaN if one of them is NaN."""
    if not largest:
        return math.fsum(measures) if all(map(math.isfinite, measures)) else sum(measures)
    return math.nan if any(map(math.isnan, measures)) else max(measures, default=0.0)


def is_dtensor(tensor: Any) -> bool:
    """Return whether a tensor is a DTensor, without importing ``torch.distributed.tensor``."""
    return hasattr(tensor, "device_mesh")


def is_plain(tensor: object) -> bool:
    """Return whether an object is a tensor of no subclass other than ``Parameter``."""
    return type(tensor) in (Tensor, torch.nn.Parameter)


def mesh_of(tensor: Any) -> Any:
    """Return the mesh of a DTensor; None for another tensor."""
    return tensor.device_mesh if is_dtensor(tensor) else None


def _replicated_sums(grad: Any) -> Tensor | None:
    """Return the gradient, with partial sums over processes added up."""
    if grad is None or not is_dtensor(grad) or not _spread_over(grad.placements)[1]:
        return grad  # type: ignore[no-any-return]
    from torch.distributed.tensor import Replicate

    reduced = [Replicate() if placement.is_partial() else placement for placement in grad.placements]
    return grad.redistribute(placements=reduced)  # type: ignore[no-any-return]


@functools.cache
def _spread_over(placements: tuple[Any, ...]) -> tuple[tuple[int, ...], bool]:
    """Return the dimensions of a mesh over which a tensor is spread, and whether it has partial sums."""
    dims = tuple(dim for dim, placement in enumerate(placements) if not placement.is_replicate())
    return dims, any(placement.is_partial() for placement in placements)


def local_part(tensor: Any) -> Tensor:
    """Return this process's part of a DTensor; another tensor as it is."""
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[no-any-return]


def _place(tensor: Any) -> _Place:
    return (tensor.device_mesh, _spread_over(tensor.placements)[0]) if is_dtensor(tensor) else None


@torch.no_grad()
def _measure(grads: list[Tensor], largest: bool) -> list[float]:
    """Return the sum of squares or the largest magnitude of each tensor."""
    grads = [grad.coalesce().values() if grad.is_sparse else grad for grad in grads]
    found = _core.measure(grads, largest, torch.get_num_threads())
    others = [i for i, measure in enumerate(found) if measure is None or (largest and grads[i].is_complex())]
    measured: list[Tensor] = []
    for i in others:
        magnitudes = grads[i].abs() if largest else grads[i].to(_double(grads[i])).abs().square()
        measured.append(_reduced(magnitudes, largest).double())
    for device in {tensor.device for tensor in measured}:  # one wait for each device
        own = [j for j, tensor in enumerate(measured) if tensor.device == device]
        for j, value in zip(own, torch.stack([measured[j] for j in own]).tolist(), strict=True):
            found[others[j]] = value
    return [value for value in found if value is not None]


def _reduced(magnitudes: Tensor, largest: bool) -> Tensor:
    if not largest:
        return magnitudes.sum()
    return magnitudes.max() if magnitudes.numel() else magnitudes.new_zeros(())


def _double(tensor: Tensor) -> torch.dtype:
    return torch.complex128 if tensor.is_complex() else torch.float64


def _over_processes(at_place: dict[_Place, float], largest: bool) -> list[float]:
    """Return the measures at all places, each combined over the processes that hold parts of its tensors.

    Communication is in the order of the places, which is that of the parameters and so the same on all processes.
    """
    for mesh in dict.fromkeys(place[0] for place in at_place if place is not None):
        if mesh.get_coordinate() is None:
            continue
        own = [place for place in at_place if place is None or place[0] == mesh]
        for dim in range(mesh.ndim):
            spread = [place is not None and dim in place[1] for place in own]
            if mesh.size(dim) > 1 and any(spread):
                numbers = [at_place[place] for place in own]
                at_place.update(zip(own, _over_dimension(numbers, spread, largest, mesh, dim), strict=True))
    return list(at_place.values())


def _over_dimension(numbers: list[float], spread: list[bool], largest: bool, mesh: Any, dim: int) -> list[float]:
    """Combine numbers over one dimension of a mesh: those of tensors that are spread over it, or replicated."""
    if largest:  # a maximum over processes may lose NaN, so a second number says whether there is one
        sent = [math.inf if math.isnan(number) else number for number in numbers]
        sent += [float(math.isnan(number)) for number in numbers]
    else:  # for replicated tensors, all processes but the first send 0, or NaN if theirs is not finite
        is_first = mesh.get_local_rank(dim) == 0
        sent = [number if parts or is_first else 0.0 * number for number, parts in zip(numbers, spread, strict=True)]
    reduced = torch.tensor(sent, dtype=torch.float64, device=mesh.device_type)
    dist.all_reduce(reduced, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, mesh.get_group(dim))
    values: list[float] = reduced.tolist()
    if not largest:
        return values
    return [math.nan if lost else value for value, lost in zip(values, values[len(numbers) :], strict=False)]
