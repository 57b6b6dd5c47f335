"""Adagrad."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import signatures
from .arguments import number
from .base import Native
from .hooks import unhooked


@torch.no_grad()
def _torch_step(self: torch.optim.Optimizer) -> None:
    """Steps by torch, which knows no decoupled decay, after that decay."""
    groups = self.param_groups
    for group in groups:  # torch would find out when it has counted the step
        coupled = not group.get("decoupled_weight_decay") and number(group["weight_decay"]) != 0
        if coupled and any(p.grad is not None and p.grad.is_sparse for p in group["params"]):
            raise RuntimeError("weight_decay option is not compatible with sparse gradients")
    self.param_groups = []
    for group in groups:
        weight_decay = number(group["weight_decay"])
        if not group.get("decoupled_weight_decay") or weight_decay == 0:
            self.param_groups.append(group)
            continue
        for p in group["params"]:
            if p.grad is None:
                continue
            steps = number(self.state[p]["step"]) if "step" in self.state[p] else 0.0
            lr = number(group["lr"]) / (1 + steps * group["lr_decay"])
            decayed = p.sparse_mask(p.grad.coalesce()) if p.grad.is_sparse else p
            p.sub_(decayed, alpha=lr * weight_decay)
        self.param_groups.append({**group, "weight_decay": 0})
    _adagrad(self)


_adagrad = unhooked(torch.optim.Adagrad)


class Adagrad(Native, signatures.Adagrad):
    r"""Adagrad, a drop-in for :class:`torch.optim.Adagrad`.

    At step :math:`t`, with the gradient :math:`g_t` (negated with ``maximize``), element by element:

    .. math::
        g_t' &= g_t + \lambda \theta_{t-1} \quad\text{(unless the decay is decoupled)} \\
        s_t &= s_{t-1} + g_t'^2 \\
        \gamma_t &= \frac{\gamma}{1 + (t - 1) \eta} \\
        \theta_t &= \theta_{t-1} - \gamma_t \lambda \theta_{t-1} \text{ (if decoupled)}
                    - \gamma_t \frac{g_t'}{\sqrt{s_t} + \epsilon}

    A sparse gradient steps the rows that it has entries for; all others stay as they are. A decay has to be decoupled
    then, which torch does not offer, and is for these rows alone.

    Source: Duchi, Hazan and Singer 2011, "Adaptive Subgradient Methods for Online Learning and Stochastic
    Optimization", JMLR 12.

    Args:
        params: Parameters, named parameters, or parameter groups; any shape and strides. float32, float64, bfloat16,
            float16 and their complex kinds on CPUs and GPUs are stepped by the kernels, anything else by torch.
        lr: Learning rate :math:`\gamma`; a float, or a tensor of one element.
        lr_decay: :math:`\eta`.
        weight_decay: :math:`\lambda`, an L2 penalty unless ``decoupled_weight_decay``.
        initial_accumulator_value: Where the sums of squares begin, :math:`s_0`.
        eps: Added to the denominator, :math:`\epsilon`.
        foreach: Accepted for torch's sake; only torch's own code, where it steps a parameter, heeds it.
        maximize: Ascend instead of descend.
        differentiable: Run torch's implementation, through which autograd can differentiate.
        fused: As ``foreach``; True leaves ``GradScaler``'s scale to the step, and counts steps on the GPU.
        decoupled_weight_decay: Decay the weights directly, as :class:`AdamW` does. torch has no such option.
        state_dtype: dtype of ``sum``: torch.float32, float64, bfloat16 or float16; None for the parameter's, as torch
            has it.

    Raises:
        ValueError: A hyperparameter is out of its range.
        RuntimeError: At the step, if a gradient is sparse and the decay is not decoupled.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = onepass.Adagrad(model.parameters(), lr=0.01)
        >>> model(torch.ones(8, 4)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['step', 'sum']
    """

    rule = "adagrad"
    torch_step = _torch_step

    def _take_arguments(self, *, decoupled_weight_decay: bool = False, state_dtype: torch.dtype | None = None) -> None:
        if decoupled_weight_decay:  # False leaves no trace, as None does of state_dtype
            self.defaults["decoupled_weight_decay"] = decoupled_weight_decay
            for group in self.param_groups:
                group.setdefault("decoupled_weight_decay", decoupled_weight_decay)
        super()._take_arguments(state_dtype=state_dtype)
        for group in self.param_groups:  # torch's constructor has made the states already
            for p in group["params"]:
                if group.get("state_dtype") is not None and not p.is_complex():
                    self.state[p]["sum"] = self.state[p]["sum"].to(group["state_dtype"])

    def _new_state(self, group: dict[str, Any], p: Tensor, grad: Tensor, name: str) -> Tensor:
        start = self.defaults["initial_accumulator_value"]
        if p.is_complex():
            return torch.full_like(p, complex(start, start))
        return torch.full_like(p, start, dtype=group.get("state_dtype"))
