"""Lion."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .base import Native


def _sign(x: Tensor) -> Tensor:
    """The sign as the kernel takes it: of real and imaginary part each, and NaN where torch.sign has 0."""
    if x.is_complex():
        return torch.complex(_sign(x.real), _sign(x.imag))
    return torch.where(x.isnan(), x, x.sign())


@torch.no_grad()
def _torch_step(self: torch.optim.Optimizer) -> None:
    """Lion in torch's operations, for what the kernels do not cover: other devices, tensor subclasses."""
    for group in self.param_groups:
        beta1, beta2 = group["betas"]
        lr, weight_decay = group["lr"], group["weight_decay"]
        for p in group["params"]:
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                raise RuntimeError("Lion does not support sparse gradients")
            grad = -p.grad if group["maximize"] else p.grad
            state = self.state[p]
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            exp_avg = state["exp_avg"]
            update = _sign(beta1 * exp_avg + (1 - beta1) * grad)
            p.sub_(lr * (update + weight_decay * p))
            exp_avg.lerp_(grad, 1 - beta2)


class Lion(Native):
    r"""Lion: the sign of an interpolation between momentum and gradient, with decoupled weight decay.

    With the gradient :math:`g_t` (negated with ``maximize``), element by element:

    .. math::
        c_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        \theta_t &= \theta_{t-1} - \gamma (\operatorname{sign}(c_t) + \lambda \theta_{t-1}) \\
        m_t &= \beta_2 m_{t-1} + (1 - \beta_2) g_t

    with :math:`\operatorname{sign}(0) = 0`; of a complex parameter, real and imaginary part each have their sign.

    A sparse gradient steps the rows that it has entries for: their average, their decay and their parameters. All other
    rows stay as they are and do not decay.

    Source: Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", arXiv:2302.06675, algorithm 2.

    Args:
        params: Parameters, named parameters, or parameter groups; any shape and strides. float32, float64, bfloat16,
            float16 and their complex kinds on CPUs and GPUs are stepped by the kernels, others by torch's operations.
        lr: Learning rate :math:`\gamma`; a float, or a tensor of one element. The paper takes it 3 to 10 times smaller,
            and the weight decay as much larger, than for AdamW.
        betas: :math:`\beta_1` of the interpolation and :math:`\beta_2` of the average, in [0, 1).
        weight_decay: :math:`\lambda`.
        maximize: Ascend instead of descend.
        state_dtype: dtype of ``exp_avg``: torch.float32, float64, bfloat16 or float16; None for the parameter's.

    Raises:
        ValueError: A hyperparameter is out of its range.
        RuntimeError: At the step, if a gradient is sparse and its parameter complex, not contiguous or not on the CPU.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = onepass.Lion(model.parameters(), lr=1e-4, weight_decay=0.1)
        >>> model(torch.ones(8, 4)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg']
    """

    rule = "lion"
    torch_step = _torch_step

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        self._check_types(defaults)
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        for index, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
        if not weight_decay >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        super().__init__(params, defaults)
        self._take_arguments(state_dtype=state_dtype)
