"""Adan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import signatures
from .base import Native
from .torch_operations import steps


@steps("Adan", "exp_avg", "exp_avg_diff", "exp_avg_sq", "neg_pre_grad")
def _torch_step(group: Mapping[str, Any], p: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: float) -> None:
    beta1, beta2, beta3 = group["betas"]
    lr, decay = group["lr"], group["lr"] * group["weight_decay"]
    difference = grad + state["neg_pre_grad"] if step > 1 else torch.zeros_like(grad)
    m = state["exp_avg"].lerp_(grad, 1 - beta1)
    v = state["exp_avg_diff"].lerp_(difference, 1 - beta2)
    n = state["exp_avg_sq"].mul_(beta3).add_((1 - beta3) * (grad + beta2 * difference).square())
    denominator = (n / (1 - beta3**step)).sqrt() + group["eps"]
    change = lr * (m / (1 - beta1**step) + beta2 * v / (1 - beta2**step)) / denominator
    if group["no_prox"]:
        p.sub_(decay * p + change)
    else:
        p.sub_(change).div_(1 + decay)
    state["neg_pre_grad"].copy_(-grad)


class Adan(Native, signatures.Adan):
    r"""Adan: averages of the gradient, of its differences, and of the square of a Nesterov gradient.

    At step :math:`t`, with the gradient :math:`g_t` (negated with ``maximize``), element by element:

    .. math::
        d_t &= g_t - g_{t-1} \text{, and } d_1 = 0 \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) d_t \\
        n_t &= \beta_3 n_{t-1} + (1 - \beta_3) (g_t + \beta_2 d_t)^2 \\
        u_t &= \gamma \frac{m_t / (1 - \beta_1^t) + \beta_2 v_t / (1 - \beta_2^t)}
                           {\sqrt{n_t / (1 - \beta_3^t)} + \epsilon} \\
        \theta_t &= (\theta_{t-1} - u_t) / (1 + \gamma \lambda)
                    \text{, or } (1 - \gamma \lambda) \theta_{t-1} - u_t \text{ with } \texttt{no\_prox}

    The betas are decay rates, as in the authors' implementation; the paper's betas are 1 minus these. The states are
    named as in that implementation: ``neg_pre_grad`` is the last gradient, negated.

    Source: Xie et al. 2022, arXiv:2208.06677, algorithm 1.

    Args:
        params: Parameters, named parameters, or parameter groups, of any shape and strides. The kernels step float32,
            float64, bfloat16, float16 and their complex dtypes on CPUs and GPUs; torch operations step others.
        lr: Learning rate :math:`\gamma`; a float, or a tensor of one element.
        betas: Decay rates :math:`\beta_1, \beta_2, \beta_3`, in [0, 1).
        eps: :math:`\epsilon`, added to the denominator.
        weight_decay: :math:`\lambda`, decoupled.
        no_prox: Decay before the update, as AdamW does, instead of by a proximal step after it.
        maximize: Ascend instead of descend.
        capturable: Keep the step count on the GPU, so that a CUDA graph can capture the step.
        state_dtype: dtype of the states: torch.float32, float64, bfloat16 or float16; None: the parameter's.

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
        >>> optimizer = onepass.Adan(model.parameters(), lr=1e-3, weight_decay=0.02)
        >>> model(torch.ones(8, 4)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg', 'exp_avg_diff', 'exp_avg_sq', 'neg_pre_grad', 'step']
    """

    rule = "adan"
    torch_step = _torch_step

    def _decay(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[float | Tensor, bool]:
        share, _ = super()._decay(group, state)
        return (share, False) if group["no_prox"] else (share / (1 + share), True)
