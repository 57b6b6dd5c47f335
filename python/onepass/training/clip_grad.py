"""The functions of torch.nn.utils that clip gradients outside of a step, in two passes over the gradients."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from types import GeneratorType
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import utils

from .. import _core
from ..optimizers.base import transform
from ..optimizers.gradient_norm import combine, is_dtensor, is_plain, local_part, total_norm

Tensors: TypeAlias = Tensor | Iterable[Tensor]


def get_total_norm(
    tensors: Tensors, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: bool | None = None
) -> Tensor:
    """Return the norm of all tensors as one vector, as :func:`torch.nn.utils.get_total_norm`.

    The 2-norm and the largest magnitude (``norm_type=inf``) are computed in float64, in one pass. In addition to
    torch's function, this one supports DTensors on different meshes, DTensors together with plain tensors, sparse
    tensors and, with ``inf``, empty tensors. The norm of DTensors is a plain tensor with the norm of all processes'
    parts; all processes must call this function. Torch's function computes other norms, and those of tensors on a GPU
    without DTensors.

    Args:
        tensors: Tensors of any dtypes and shapes, or a single tensor.
        norm_type: Order of the norm.
        error_if_nonfinite: Whether to raise an error if the norm is NaN or infinite.
        foreach: For compatibility; used only where torch's function is called.

    Returns:
        The norm, a tensor of shape () on the first tensor's device. Its dtype is the promoted dtype of all tensors. A
        norm of 16 bits is rounded once, from float64.

    Raises:
        RuntimeError: The norm is not finite and ``error_if_nonfinite`` is set.

    Example:
        >>> onepass.get_total_norm([torch.tensor([3.0, 0.0]), torch.tensor([4.0])])
        tensor(5.)
    """
    if torch.compiler.is_compiling():
        return utils.get_total_norm(tensors, norm_type, error_if_nonfinite, foreach)
    tensors = _listed(tensors)
    norm_type = float(norm_type)
    norm = _norm(tensors, tensors, norm_type)
    if norm is None:
        return utils.get_total_norm(tensors, norm_type, error_if_nonfinite, foreach)
    return _as_tensor(norm, tensors, norm_type, error_if_nonfinite)


def clip_grad_norm_(
    parameters: Tensors,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Clip the norm of all gradients in place, as :func:`torch.nn.utils.clip_grad_norm_`.

    All gradients are multiplied by the coefficient ``min(1, max_norm / (norm + 1e-6))``. If it is 1, nothing is
    written. The norm is that of :func:`get_total_norm`; torch's function is called in the same cases. The coefficient
    is computed in float64 from the norm in float64; torch's function rounds the norm to the dtype of the gradients.
    Numbers below the normal range of float32 (of float64 for float64 gradients) become 0.

    The optimizer's argument ``max_norm=`` gives the same parameters in less time, and does not modify the gradients.

    Args:
        parameters: Parameters, or a single one. Those without a gradient are ignored. A gradient that occurs twice is
            counted and multiplied twice, as in torch.
        max_norm: Largest norm.
        norm_type: Order of the norm.
        error_if_nonfinite: Whether to raise an error if the norm is NaN or infinite. Nothing is written then. Otherwise
            a norm of NaN makes all gradients NaN, and an infinite norm makes finite gradients 0, as in torch.
        foreach: For compatibility; used only where torch's function is called.

    Returns:
        The norm before clipping, see :func:`get_total_norm`.

    Raises:
        RuntimeError: The norm is not finite and ``error_if_nonfinite`` is set.

    Example:
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> p.grad = torch.tensor([3.0, 4.0])
        >>> onepass.clip_grad_norm_([p], max_norm=1.0)
        tensor(5.)
        >>> p.grad
        tensor([0.6000, 0.8000])
    """
    if torch.compiler.is_compiling():
        return utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
    params = _listed(parameters)
    if not params and isinstance(parameters, GeneratorType):
        warnings.warn("`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=2)
    found = [p.grad for p in params]
    grads = [grad for grad in found if grad is not None]
    norm_type = float(norm_type)
    norm = _norm(params, found, norm_type)
    if norm is None:
        return utils.clip_grad_norm_(params, max_norm, norm_type, error_if_nonfinite, foreach)
    result = _as_tensor(norm, grads, norm_type, error_if_nonfinite)
    coefficient = float(max_norm) / (norm + 1e-6)
    _multiply(grads, 1.0 if coefficient > 1.0 else coefficient)
    return result


def clip_grads_with_norm_(
    parameters: Tensors, max_norm: float, total_norm: Tensor, foreach: bool | None = None
) -> None:
    """Clip gradients in place by a known norm, as :func:`torch.nn.utils.clip_grads_with_norm_`.

    The coefficient ``min(1, max_norm / (total_norm + 1e-6))`` is computed in the dtype of ``total_norm``, as in torch.
    If it is 1, nothing is written. Torch's function is called if ``total_norm`` is not on the CPU.

    Args:
        parameters: Parameters, or a single one. Those without a gradient are ignored.
        max_norm: Largest norm.
        total_norm: The norm, a tensor of shape ().
        foreach: For compatibility; used only where torch's function is called.

    Raises:
        TypeError: ``total_norm`` is not a tensor.
        RuntimeError: ``total_norm`` has several elements.

    Example:
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> p.grad = torch.tensor([3.0, 4.0])
        >>> onepass.clip_grads_with_norm_([p], max_norm=1.0, total_norm=torch.tensor(10.0))
        >>> p.grad
        tensor([0.3000, 0.4000])
    """
    plain = is_plain(total_norm) and total_norm.device.type == "cpu" and total_norm.ndim == 0
    if not plain or torch.compiler.is_compiling() or transform():
        return utils.clip_grads_with_norm_(parameters, max_norm, total_norm, foreach)
    grads = [grad for p in _listed(parameters) if (grad := p.grad) is not None]
    max_norm = float(max_norm)
    if grads:
        with torch.no_grad():
            _multiply(grads, torch.clamp(max_norm / (total_norm + 1e-6), max=1.0).item())


def clip_grad_value_(parameters: Tensors, clip_value: float, foreach: bool | None = None) -> None:
    """Clamp gradients in place to [-clip_value, clip_value], as :func:`torch.nn.utils.clip_grad_value_`.

    In addition to torch's function, this one supports DTensors on different meshes, DTensors together with plain
    tensors, limits beyond the range of the gradients' dtype, and parameters of which none has a gradient. Numbers below
    the normal range of float32 (of float64 for float64 gradients) become 0. Torch's function is called for gradients
    that are not on the CPU.

    Args:
        parameters: Parameters, or a single one. Those without a gradient are ignored.
        clip_value: Largest magnitude.
        foreach: For compatibility; used only where torch's function is called.

    Raises:
        NotImplementedError: A gradient is complex.

    Example:
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> p.grad = torch.tensor([3.0, -0.4])
        >>> onepass.clip_grad_value_([p], clip_value=0.5)
        >>> p.grad
        tensor([ 0.5000, -0.4000])
    """
    if torch.compiler.is_compiling():
        return utils.clip_grad_value_(parameters, clip_value, foreach)
    params = _listed(parameters)
    grads = [grad for p in params if (grad := p.grad) is not None]
    clip_value = float(clip_value)
    if not grads or clip_value == math.inf:
        return
    if math.isnan(clip_value) or transform():
        return utils.clip_grad_value_(params, clip_value, foreach)
    if any(grad.is_complex() for grad in grads):  # before anything is written, because torch raises an error
        utils.clip_grad_value_([p for p in params if p.grad is not None and p.grad.is_complex()], clip_value, foreach)
    others = _scale(grads, 1.0, clip_value)
    if any(is_dtensor(grads[i]) for i in others):
        with torch.no_grad():
            for i in others:
                grads[i].clamp_(-clip_value, clip_value)
    elif others:
        with_grad = [p for p in params if p.grad is not None]
        utils.clip_grad_value_([with_grad[i] for i in others], clip_value, foreach)


def _listed(parameters: Tensors) -> list[Tensor]:
    return [parameters] if isinstance(parameters, Tensor) else list(parameters)


def _norm(params: Sequence[Tensor], grads: Sequence[Tensor | None], norm_type: float) -> float | None:
    """Return the norm of all gradients, measured in float64; None if torch's function has to measure it."""
    if norm_type not in (2.0, math.inf) or transform():
        return None
    largest = norm_type == math.inf
    measures = _core.measure(grads, largest, torch.get_num_threads())
    known = [measure for measure in measures if measure is not None]
    spread = not all(map(is_plain, params)) and any(map(is_dtensor, params))
    if len(known) < len(params):
        triples = zip(params, grads, measures, strict=True)
        others = [grad for p, grad, found in triples if found is None and (grad is not None or p is None)]
        spread = spread or any(map(is_dtensor, others))
        if not all(_can_measure(grad, spread) for grad in others):
            return None
        if len(known) == len(others) == 0 and not spread:
            return None
    else:
        others = []
    if others or spread or (largest and any(grad is not None and grad.is_complex() for grad in grads)):
        return total_norm(params, grads, largest, measures)
    total = combine(known, largest)
    return total if largest else math.sqrt(total)


def _can_measure(grad: Any, spread: bool) -> bool:
    """Return whether :func:`total_norm` measures a gradient that kernels cannot read.

    Without DTensors, dense gradients are left to torch's function, which does not wait for a GPU.
    """
    if is_dtensor(grad):
        return True
    return (
        is_plain(grad)
        and (grad.is_sparse or spread)
        and (grad.is_floating_point() or grad.is_complex())
        and grad.device.type != "meta"
    )


def _as_tensor(norm: float, grads: Sequence[Tensor], norm_type: float, error_if_nonfinite: bool) -> Tensor:
    """Return the norm in the dtype and on the device of torch's function."""
    if not grads:
        return torch.tensor(norm)
    dtype, *others = {grad.dtype for grad in grads}
    for other in others:
        dtype = torch.promote_types(dtype, other)
    result = torch.tensor(norm, dtype=dtype.to_real(), device=grads[0].device)
    if error_if_nonfinite and not result.isfinite():
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it cannot be "
            "clipped. To disable this error and scale the gradients by the non-finite norm anyway, set "
            "`error_if_nonfinite=False`"
        )
    return result


@torch.no_grad()
def _multiply(grads: list[Tensor], coefficient: float) -> None:
    """Multiply gradients in place. A coefficient of 1 would change no finite number, so nothing is done for it."""
    if coefficient == 1.0:
        return
    others = [grads[i] for i in _scale(grads, coefficient, math.inf)]
    spread = [grad for grad in others if is_dtensor(grad)]
    # Scaling is linear, so it can be done on each process's part, also of sums that are not yet reduced.
    by_torch = set(_scale([local_part(grad) for grad in spread], coefficient, math.inf)) if spread else set()
    scaled = [grad for i, grad in enumerate(spread) if i not in by_torch]
    torch.autograd.graph.increment_version(scaled)
    for grad in [*(spread[i] for i in by_torch), *(grad for grad in others if not is_dtensor(grad))]:
        grad.mul_(coefficient)


def _scale(tensors: list[Tensor], factor: float, limit: float) -> list[int]:
    """Scale and clamp in place the tensors that kernels can write; return the indices of the others."""
    threads = torch.get_num_threads()
    others = _core.scale(tensors, factor, limit, threads)
    if others:
        skipped = set(others)
        _core.scale([tensor for i, tensor in enumerate(tensors) if i not in skipped], factor, limit, threads)
    return others
