"""AdaBelief."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from . import signatures
from .base import Native
from .torch_operations import steps


@steps("AdaBelief", "exp_avg", "exp_avg_var")
def _torch_step(group: Mapping[str, Any], p: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: float) -> None:
    beta1, beta2 = group["betas"]
    lr, eps = group["lr"], group["eps"]
    m, s = state["exp_avg"], state["exp_avg_var"]
    s.mul_(beta2).add_((1 - beta2) * (beta1 * (grad - m)).square()).add_(eps)
    m.lerp_(grad, 1 - beta1)
    change = lr / (1 - beta1**step) * m / ((s / (1 - beta2**step)).sqrt() + eps)
    p.sub_(lr * group["weight_decay"] * p + change)


class AdaBelief(Native, signatures.AdaBelief):
    r"""AdaBelief: Adam with the variance of the gradient around its average, and decoupled weight decay.

    At step :math:`t`, with the gradient :math:`g_t` (negated with ``maximize``), element by element:

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        s_t &= \beta_2 s_{t-1} + (1 - \beta_2) (g_t - m_t)^2 + \epsilon \\
        \theta_t &= \theta_{t-1} - \gamma \lambda \theta_{t-1}
                    - \gamma \frac{m_t / (1 - \beta_1^t)}{\sqrt{s_t / (1 - \beta_2^t)} + \epsilon}

    The implementations of the authors and of timm rectify the step as RAdam does, by default. This class follows the
    paper and does not.

    Source: Zhuang et al. 2020, arXiv:2010.07468, algorithm 2.

    Args:
        params: Parameters, named parameters, or parameter groups, of any shape and strides. The kernels step float32,
            float64, bfloat16, float16 and their complex dtypes on CPUs and GPUs; torch operations step others.
        lr: Learning rate :math:`\gamma`; a float, or a tensor of one element.
        betas: Decay rates :math:`\beta_1, \beta_2` of the two averages, in [0, 1).
        eps: :math:`\epsilon`, added to the variance in each step and to the denominator.
        weight_decay: :math:`\lambda`, decoupled.
        maximize: Ascend instead of descend.
        capturable: Keep the step count on the GPU, so that a CUDA graph can capture the step.
        state_dtype: dtype of ``exp_avg`` and ``exp_avg_var``: torch.float32, float64, bfloat16, float16 or
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
        >>> optimizer = onepass.AdaBelief(model.parameters(), lr=1e-3, weight_decay=0.01)
        >>> model(torch.ones(8, 4)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg', 'exp_avg_var', 'step']
    """

    rule = "adabelief"
    torch_step = _torch_step
