"""Steps in torch operations, for optimizers that torch does not have: of parameters that no kernel covers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .arguments import number
from .hooks import Step
from .torch_private import scalar_dtype

# Updates a parameter in place: (group, parameter, gradient, states by name, step).
Update = Callable[[Mapping[str, Any], Tensor, Tensor, Mapping[str, Tensor], float], None]


def steps(name: str, *states: str, counts: bool = True) -> Callable[[Update], Step]:
    """Return a decorator that makes an optimizer's step of the update of one parameter.

    The step skips parameters without a gradient, refuses sparse gradients, applies ``maximize``, creates missing states
    as zeros, and counts. Complex tensors are passed as pairs of real numbers.

    Args:
        name: Name of the optimizer, for messages.
        states: Names of the states.
        counts: Whether each parameter has a ``step``.
    """

    def decorate(update: Update) -> Step:
        @torch.no_grad()
        def step(self: Optimizer) -> None:
            _check(name, self)
            for each_group in self.param_groups:
                group = {name: _number(value) for name, value in each_group.items() if name != "params"}
                for p in each_group["params"]:
                    if p.grad is None:
                        continue
                    state = self.state[p]
                    if counts:
                        if "step" not in state:
                            state["step"] = torch.zeros((), dtype=scalar_dtype())
                        state["step"] += 1
                    for each in states:
                        if each not in state:
                            state[each] = torch.zeros_like(p, memory_format=torch.preserve_format)
                    grad = -p.grad if group["maximize"] else p.grad
                    held = {each: _real(state[each]) for each in states}
                    count = float(state["step"]) if counts else 0.0
                    own = p.resolve_conj().resolve_neg()  # p itself, unless torch conjugates or negates it lazily
                    update(group, _real(own), _real(grad), held, count)
                    if own is not p:
                        p.copy_(own)

        return step

    return decorate


def _check(name: str, optimizer: Optimizer) -> None:
    """Raise RuntimeError, before anything is written, if a parameter cannot be stepped."""
    for group in optimizer.param_groups:
        for p in (p for p in group["params"] if p.grad is not None):
            if p.grad.is_sparse:
                raise RuntimeError(f"{name} does not support sparse gradients")
            if not (p.is_floating_point() or p.is_complex()):
                raise RuntimeError(f"{name} does not support parameters of {p.dtype}")


def _number(value: Any) -> Any:
    """Return a hyperparameter with floats in place of tensors, which need not broadcast to the parameter."""
    if isinstance(value, tuple | list):
        return [_number(each) for each in value]
    return number(value) if isinstance(value, Tensor) else value


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def sign(x: Tensor) -> Tensor:
    """Return the sign as the kernels compute it: NaN for NaN."""
    return torch.where(x.isnan(), x, x.sign())
