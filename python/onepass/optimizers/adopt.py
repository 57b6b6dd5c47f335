"""ADOPT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import signatures
from .base import Native
from .torch_operations import steps


@steps("ADOPT", "exp_avg", "exp_avg_sq")
def _torch_step(group: Mapping[str, Any], p: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: float) -> None:
    beta1, beta2 = group["betas"]
    lr, weight_decay, decoupled = group["lr"], group["weight_decay"], group["decoupled_weight_decay"]
    if weight_decay != 0 and not decoupled:
        grad = grad + weight_decay * p
    m, v = state["exp_avg"], state["exp_avg_sq"]
    if step == 1:
        m.zero_()
        v.copy_(grad.square())
        return
    normalized = grad / torch.where(v.sqrt() < group["eps"], torch.full_like(v, group["eps"]), v.sqrt())
    if (exponent := group["clip_exponent"]) is not None:
        limit = (step - 1) ** exponent
        normalized = normalized.clamp(-limit, limit)
    m.lerp_(normalized, 1 - beta1)
    p.sub_((lr * weight_decay * p if weight_decay != 0 and decoupled else 0) + lr * m)
    v.mul_(beta2).add_((1 - beta2) * grad.square())


class ADOPT(Native, signatures.ADOPT):
    r"""ADOPT: Adam whose denominator excludes the current gradient, so that it converges with any second beta.

    At step :math:`t`, with the gradient :math:`g_t` (negated with ``maximize``), element by element:

    .. math::
        g_t' &= g_t + \lambda \theta_{t-1} \text{ unless the decay is decoupled} \\
        u_t &= g_t' / \max(\sqrt{v_{t-1}}, \epsilon)
               \text{, clamped to } \pm (t - 1)^{c} \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) u_t \\
        \theta_t &= \theta_{t-1} - \gamma \lambda \theta_{t-1} \text{ if the decay is decoupled, } - \gamma m_t \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t'^2

    The first step only sets :math:`v_1 = g_1'^2`: it changes neither the parameter nor the momentum.

    The first version of the paper, and implementations of that time, do not clamp: ``clip_exponent=None``. timm's
    exponent is 1/3 by default. pytorch_optimizer clamps to :math:`t^c`.

    Source: Taniguchi et al. 2024, arXiv:2411.02853, algorithm 2.

    Args:
        params: Parameters, named parameters, or parameter groups, of any shape and strides. The kernels step float32,
            float64, bfloat16, float16 and their complex dtypes on CPUs and GPUs; torch operations step others.
        lr: Learning rate :math:`\gamma`; a float, or a tensor of one element.
        betas: Decay rates :math:`\beta_1, \beta_2` of the two averages, in [0, 1).
        eps: :math:`\epsilon`, the smallest denominator.
        weight_decay: :math:`\lambda`.
        clip_exponent: :math:`c`, >= 0. None: not clamped.
        decoupled_weight_decay: Decay the parameter instead of the gradient.
        maximize: Ascend instead of descend.
        capturable: Keep the step count on the GPU, so that a CUDA graph can capture the step.
        state_dtype: dtype of ``exp_avg`` and ``exp_avg_sq``: torch.float32, float64, bfloat16, float16 or
            float8_e4m3fn; None: the parameter's.

    Further arguments, documented at ``__init__``: ``master`` (see :doc:`/master_weights`), ``stochastic_rounding`` and
    ``rounding_seed`` (see :doc:`/stochastic_rounding`), ``cautious`` and ``cautious_weight_decay`` (see
    :doc:`/cautious`), and those of :doc:`/step_tail`: ``max_norm``, ``norm_type``, ``clip_value``, ``skip_nonfinite``,
    ``average``, ``copy_to``, ``zero_grad``.

    Raises:
        TypeError: A hyperparameter is not a number.
        ValueError: A hyperparameter is out of range.
        RuntimeError: At the step, if a gradient is sparse.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = onepass.ADOPT(model.parameters(), lr=1e-3)
        >>> model(torch.ones(8, 4)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg', 'exp_avg_sq', 'step']
    """

    rule = "adopt"
    torch_step = _torch_step

    def _decay(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[float | Tensor, bool]:
        share, _ = super()._decay(group, state)
        return share * (state["step"] > 1).to(torch.float64), False  # the first step only sets the average
