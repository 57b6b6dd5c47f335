"""Steps in torch operations of parameters that no kernel covers, for optimizers that torch does not have."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from .arguments import number
from .gradient_norm import is_dtensor
from .hooks import Step
from .torch_private import scalar_dtype

T = TypeVar("T")

# Updates a parameter in place: (group, parameter, gradient, states by name, step).
Update = Callable[[Mapping[str, Any], Tensor, Tensor, Mapping[str, Tensor], float], None]


def steps(
    name: str,
    *states: str | Callable[[Mapping[str, Any]], Collection[str]],
    counts: bool = True,
    copies: Collection[str] = (),
    scalars: Collection[str] = (),
) -> Callable[[Update], Step]:
    """Return a decorator that makes an optimizer's step of the update of one parameter.

    The step skips parameters without a gradient, refuses sparse gradients, applies ``maximize``, creates missing states
    as zeros, and counts. Complex tensors are passed as pairs of real numbers.

    Args:
        name: Name of the optimizer, for messages.
        states: Names of the states, or a function of the group that returns them.
        counts: Whether each parameter has a ``step``.
        copies: Those of the states that begin as copies of the parameter. An optimizer that has such states has float32
            states for 16-bit parameters.
        scalars: Names of the scalars that each parameter has in addition to ``step``. They begin as 0.
    """

    def decorate(update: Update) -> Step:
        @torch.no_grad()
        def step(self: Optimizer) -> None:
            check(name, self)
            for each_group in self.param_groups:
                group = {name: _number(value) for name, value in each_group.items() if name != "params"}
                names = [each for item in states for each in ((item,) if isinstance(item, str) else item(group))]
                for p in each_group["params"]:
                    if p.grad is None:
                        continue
                    state = self.state[p]
                    device = p.device if _counts_on_device(self, each_group) and not p.is_meta else "cpu"
                    for each in (*(["step"] if counts else ()), *scalars):
                        if each not in state:
                            state[each] = torch.zeros((), dtype=scalar_dtype(), device=device)
                    dtype = torch.float32 if copies and p.dtype.itemsize == 2 else p.dtype
                    for each in names:
                        if each not in state:
                            new = torch.clone if each in copies else torch.zeros_like
                            state[each] = new(p, memory_format=torch.preserve_format).to(dtype)
                    if counts:
                        state["step"] += 1
                    grad = (-p.grad if group.get("maximize") else p.grad).to(dtype)
                    held = {each: real(state[each]) for each in names} | {each: state[each] for each in scalars}
                    count = float(state["step"]) if counts else 0.0
                    # p itself, unless it has 16 bits and float32 states, or torch conjugates or negates it lazily.
                    own = p.resolve_conj().resolve_neg().to(dtype)
                    update(group, real(own), real(grad), held, count)
                    if own is not p:
                        p.copy_(own)

        return step

    return decorate


def _counts_on_device(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Return whether the kernels expect the numbers of a parameter on the parameter's device."""
    asked: Callable[[dict[str, Any]], bool] | None = getattr(optimizer, "_counts_on_device", None)
    return asked is not None and asked(group)


def check(name: str, optimizer: Optimizer) -> None:
    """Raise RuntimeError, before anything is written, if a parameter cannot be stepped."""
    for group in optimizer.param_groups:
        for p in (p for p in group["params"] if p.grad is not None):
            if p.grad.is_sparse:
                raise RuntimeError(f"{name} does not support sparse gradients")
            if not (p.is_floating_point() or p.is_complex()):
                raise RuntimeError(f"{name} does not support parameters of {p.dtype}")


def _number(value: Any) -> Any:
    """Return a hyperparameter with floats instead of tensors, which need not broadcast to the parameter."""
    if isinstance(value, tuple | list):
        return [_number(each) for each in value]
    return number(value) if isinstance(value, Tensor) else value


def real(x: Tensor) -> Tensor:
    """Return a complex tensor as pairs of real numbers, another one as it is."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def wide(x: Tensor) -> Tensor:
    """Return a tensor of 16 bits in float32, another one as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def write(target: Tensor, values: Tensor) -> Tensor:
    """Write values into a tensor in place, and return it. Operations on DTensors may have placed them otherwise."""
    if is_dtensor(target) and values.placements != target.placements:  # type: ignore[attr-defined]
        values = values.redistribute(placements=target.placements)  # type: ignore[attr-defined]
    return target.copy_(values)


def sign(x: Tensor) -> Tensor:
    """Return the sign as the kernels compute it: NaN for NaN."""
    return torch.where(x.isnan(), x, x.sign())


def norm_of(x: Tensor) -> Tensor:
    """Return the 2-norm of a tensor in float64, of a DTensor that of the whole."""
    norm: Tensor = torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float64))
    return norm


def value_of(x: Any) -> float:
    """Return the value of a tensor of one element; NaN on the device meta, where tensors have no values."""
    whole = x.full_tensor() if is_dtensor(x) else x
    return math.nan if whole.is_meta else float(whole)


def ratio_of_norms(x: Tensor, y: Tensor) -> Tensor:
    """Return the ratio of the 2-norms, or 1 if either is 0."""
    norm, other = norm_of(x), norm_of(y)
    return (norm / other).where((norm > 0) & (other > 0), 1.0)


def batches(items: Iterable[T], limit: int, size: Callable[[T], int]) -> Iterator[list[T]]:
    """Yield the items in lists whose sizes add up to at most ``limit``, or of one larger item."""
    batch: list[T] = []
    total = 0
    for item in items:
        if batch and total + size(item) > limit:
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += size(item)
    if batch:
        yield batch
