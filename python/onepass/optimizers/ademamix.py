"""AdEMAMix."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from . import signatures
from .base import Native
from .torch_operations import steps


def _half_life(beta: float) -> float:
    """Return the half-life of an average, less 1."""
    return math.log(0.5) / math.log(min(beta + 1e-8, 1 - 1e-15)) - 1


@steps("AdEMAMix", "exp_avg", "exp_avg_slow", "exp_avg_sq")
def _torch_step(group: Mapping[str, Any], p: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: float) -> None:
    beta1, beta2, beta3 = group["betas"]
    lr, alpha = group["lr"], group["alpha"]
    if (warmup := group["alpha_warmup"]) is not None and step < warmup:
        alpha = step / warmup * alpha
    if (warmup := group["beta3_warmup"]) is not None and step < warmup:
        part = step / warmup
        half_life = (1 - part) * _half_life(beta1) + part * _half_life(beta3)
        beta3 = 0.5 ** (1 / (half_life + 1))
    m, slow = state["exp_avg"].lerp_(grad, 1 - beta1), state["exp_avg_slow"].lerp_(grad, 1 - beta3)
    v = state["exp_avg_sq"].mul_(beta2).add_((1 - beta2) * grad.square())
    denominator = (v / (1 - beta2**step)).sqrt() + group["eps"]
    p.sub_(lr * (group["weight_decay"] * p + (m / (1 - beta1**step) + alpha * slow) / denominator))


class AdEMAMix(Native, signatures.AdEMAMix):
    r"""AdEMAMix: AdamW with a second, slow average of the gradients.

    At step :math:`t`, with the gradient :math:`g_t` (negated with ``maximize``), element by element:

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        m_t' &= \beta_3(t) m_{t-1}' + (1 - \beta_3(t)) g_t \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        \theta_t &= \theta_{t-1} - \gamma \lambda \theta_{t-1}
                    - \gamma \frac{m_t / (1 - \beta_1^t) + \alpha(t) m_t'}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    In the first ``alpha_warmup`` steps :math:`\alpha(t)` grows linearly from 0 to :math:`\alpha`. In the first
    ``beta3_warmup`` steps the half-life of :math:`m'` grows linearly from that of :math:`\beta_1` to that of
    :math:`\beta_3`. Both are functions of ``state["step"]``, so a resumed run continues exactly.

    Some implementations correct the bias of the slow average, or let :math:`\beta_3` itself grow linearly; this class
    does neither.

    Source: Pagliardini et al. 2024, arXiv:2409.03137, algorithm 1.

    Args:
        params: Parameters, named parameters, or parameter groups, of any shape and strides. The kernels step float32,
            float64, bfloat16, float16 and their complex dtypes on CPUs and GPUs; torch operations step others.
        lr: Learning rate :math:`\gamma`; a float, or a tensor of one element.
        betas: Decay rates :math:`\beta_1, \beta_2, \beta_3`, in [0, 1).
        alpha: :math:`\alpha`, the weight of the slow average.
        beta3_warmup: Steps of the warm-up of :math:`\beta_3`, >= 0. None: no warm-up.
        alpha_warmup: Steps of the warm-up of :math:`\alpha`, >= 0. None: no warm-up.
        eps: :math:`\epsilon`, added to the denominator.
        weight_decay: :math:`\lambda`, decoupled.
        maximize: Ascend instead of descend.
        capturable: Keep the step count on the GPU, so that a CUDA graph can capture the step.
        state_dtype: dtype of ``exp_avg``, ``exp_avg_slow`` and ``exp_avg_sq``: torch.float32, float64, bfloat16,
            float16 or float8_e4m3fn; None: the parameter's.

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
        >>> optimizer = onepass.AdEMAMix(model.parameters(), lr=1e-3, alpha_warmup=1000, beta3_warmup=1000)
        >>> model(torch.ones(8, 4)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg', 'exp_avg_slow', 'exp_avg_sq', 'step']
    """

    rule = "ademamix"
    torch_step = _torch_step
