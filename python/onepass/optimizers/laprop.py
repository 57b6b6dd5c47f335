"""LaProp."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from . import signatures
from .base import Native
from .torch_operations import steps


@steps("LaProp", "exp_avg", "exp_avg_sq")
def _torch_step(group: Mapping[str, Any], p: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: float) -> None:
    beta1, beta2 = group["betas"]
    lr = group["lr"]
    v = state["exp_avg_sq"].mul_(beta2).add_((1 - beta2) * grad.square())
    m = state["exp_avg"].lerp_(grad / ((v / (1 - beta2**step)).sqrt() + group["eps"]), 1 - beta1)
    p.sub_(lr * group["weight_decay"] * p + lr / (1 - beta1**step) * m)


class LaProp(Native, signatures.LaProp):
    r"""LaProp: momentum of gradients that Adam's denominator has divided, with decoupled weight decay.

    At step :math:`t`, with the gradient :math:`g_t` (negated with ``maximize``), element by element:

    .. math::
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) \frac{g_t}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon} \\
        \theta_t &= \theta_{t-1} - \gamma \lambda \theta_{t-1} - \frac{\gamma}{1 - \beta_1^t} m_t

    In the authors' implementation, the learning rate is part of the momentum, so a changed rate takes effect gradually,
    and the weight decay does not depend on the learning rate.

    Source: Ziyin et al. 2020, arXiv:2002.04839, algorithm 1.

    Args:
        params: Parameters, named parameters, or parameter groups, of any shape and strides. The kernels step float32,
            float64, bfloat16, float16 and their complex dtypes on CPUs and GPUs; torch operations step others.
        lr: Learning rate :math:`\gamma`; a float, or a tensor of one element.
        betas: Decay rates :math:`\beta_1, \beta_2` of the two averages, in [0, 1).
        eps: :math:`\epsilon`, added to the denominator.
        weight_decay: :math:`\lambda`, decoupled.
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
        >>> optimizer = onepass.LaProp(model.parameters(), lr=4e-4, weight_decay=0.01)
        >>> model(torch.ones(8, 4)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg', 'exp_avg_sq', 'step']
    """

    rule = "laprop"
    torch_step = _torch_step
