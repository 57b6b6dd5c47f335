"""Adagrad."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import signatures
from .arguments import number
from .base import Native
from .hooks import unhooked
from .master import master_name


@torch.no_grad()
def _torch_step(self: torch.optim.Optimizer) -> None:
    """Apply the decoupled weight decay, which torch's Adagrad does not have; then step by torch's implementation."""
    groups = self.param_groups
    for group in groups:  # torch raises this too, but only after it has counted the step
        coupled = not group.get("decoupled_weight_decay") and number(group["weight_decay"]) != 0
        if coupled and any(p.grad is not None and p.grad.is_sparse for p in group["params"]):
            raise RuntimeError("weight_decay option is not compatible with sparse gradients")
    if isinstance(self, Adagrad):
        self._create_missing_states()
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
    r"""Adagrad, a drop-in replacement for :class:`torch.optim.Adagrad`.

    At step :math:`t`, with the gradient :math:`g_t` (negated with ``maximize``), element by element:

    .. math::
        g_t' &= g_t + \lambda \theta_{t-1} \quad\text{(unless the decay is decoupled)} \\
        s_t &= s_{t-1} + g_t'^2 \\
        \gamma_t &= \frac{\gamma}{1 + (t - 1) \eta} \\
        \theta_t &= \theta_{t-1} - \gamma_t \lambda \theta_{t-1} \text{ (if decoupled)}
                    - \gamma_t \frac{g_t'}{\sqrt{s_t} + \epsilon}

    A sparse gradient updates only the rows that have entries. Weight decay must then be decoupled, and applies to
    these rows only. torch's class has no decoupled weight decay.

    Source: Duchi, Hazan and Singer 2011, "Adaptive Subgradient Methods for Online Learning and Stochastic
    Optimization", JMLR 12.

    Args:
        params: Parameters, named parameters, or parameter groups, of any shape and strides. The kernels step float32,
            float64, bfloat16, float16 and their complex dtypes on CPUs and GPUs; torch's implementation steps others.
        lr: Learning rate :math:`\gamma`; a float, or a tensor of one element.
        lr_decay: :math:`\eta`.
        weight_decay: :math:`\lambda`, an L2 penalty unless ``decoupled_weight_decay``.
        initial_accumulator_value: Initial sum of squares :math:`s_0`.
        eps: :math:`\epsilon`, added to the denominator.
        foreach: For compatibility; used only where torch's implementation steps the parameter.
        maximize: Ascend instead of descend.
        differentiable: Step by torch's implementation, so that autograd can differentiate through the step.
        fused: As ``foreach``; True also makes ``GradScaler`` pass ``grad_scale`` and ``found_inf`` to ``step()``, and
            keeps the step count on the GPU.
        decoupled_weight_decay: Decay the weights directly, as :class:`AdamW` does; not an option of torch's class.
        state_dtype: dtype of ``sum``: torch.float32, float64, bfloat16 or float16; None: the parameter's, as in torch.

    Further arguments, documented at ``__init__``: ``master`` (see :doc:`/master_weights`), ``stochastic_rounding`` and
    ``rounding_seed`` (see :doc:`/stochastic_rounding`), and those of :doc:`/step_tail`: ``max_norm``, ``norm_type``,
    ``clip_value``, ``skip_nonfinite``, ``average``, ``copy_to``, ``zero_grad``.

    Raises:
        TypeError: A hyperparameter is not a number.
        ValueError: A hyperparameter is out of range.
        RuntimeError: At the step, if a gradient is sparse and weight decay is neither 0 nor decoupled.

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

    def _create_missing_states(self) -> None:
        """Create the states of parameters that were added after the constructor. torch's step does so from 2.12 on."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and not self.state[p]:
                    self.state[p] = {
                        "step": self._new_scalar(group, p, "step"),
                        "sum": self._new_state(group, p, p.grad, "sum"),
                    }

    def _take_arguments(self, *, decoupled_weight_decay: bool = False, **arguments: Any) -> None:
        if self.defaults["fused"]:  # which torch tells GradScaler from 2.12 on
            self._step_supports_amp_scaling = True
        if decoupled_weight_decay:  # the default adds no key, like state_dtype=None
            self.defaults["decoupled_weight_decay"] = decoupled_weight_decay
            for group in self.param_groups:
                group.setdefault("decoupled_weight_decay", decoupled_weight_decay)
        super()._take_arguments(**arguments)
        for group in self.param_groups:  # torch's constructor has already created the states
            for p in group["params"]:
                if master_name(group, p):  # the initial value is not rounded to the parameter's dtype
                    self.state[p]["sum"] = self._new_state(group, p, p, "sum")
                elif group.get("state_dtype") is not None and not p.is_complex():
                    self.state[p]["sum"] = self.state[p]["sum"].to(group["state_dtype"])

    def _new_state(self, group: dict[str, Any], p: Tensor, grad: Tensor, name: str) -> Tensor:
        start = self.defaults["initial_accumulator_value"]
        if p.is_complex():
            return torch.full_like(p, complex(start, start))
        return torch.full_like(p, start, dtype=self._state_dtype(group, p))
