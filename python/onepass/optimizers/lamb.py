"""LAMB."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from . import signatures
from .base import Native
from .torch_operations import ratio_of_norms, steps


@steps("LAMB", "exp_avg", "exp_avg_sq")
def _torch_step(group: Mapping[str, Any], p: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: float) -> None:
    beta1, beta2 = group["betas"]
    m = state["exp_avg"].lerp_(grad, 1 - beta1)
    v = state["exp_avg_sq"].mul_(beta2).add_((1 - beta2) * grad.square())
    u = m / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + group["eps"])
    if group["weight_decay"]:
        u = u + group["weight_decay"] * p
    if group["trust_ratio"]:
        ratio = ratio_of_norms(p, u)
        u = u * (ratio.clamp(max=1.0) if group["trust_clip"] else ratio)
    p.sub_(group["lr"] * u)


class LAMB(Native, signatures.LAMB):
    r"""LAMB: Adam with decoupled weight decay, with an update of each tensor that is proportional to the tensor's norm.

    At step :math:`t`, with the gradient :math:`g_t` (negated with ``maximize``):

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        u_t &= \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon} + \lambda \theta_{t-1} \\
        \theta_t &= \theta_{t-1} - \gamma \frac{\|\theta_{t-1}\|}{\|u_t\|} u_t

    with the 2-norms of the whole tensor. The trust ratio :math:`\|\theta\| / \|u\|` is 1 if either norm is 0.

    The paper does not adapt biases and the scales of normalization: give them a group with ``trust_ratio=False``, and
    usually with ``weight_decay=0``. The authors' experiments clip the gradients to a norm of 1: ``max_norm=1``. timm's
    and NVIDIA's LAMB do so by default, and do not adapt tensors without weight decay.

    Source: You et al. 2020, "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes",
    arXiv:1904.00962, algorithm 2.

    Args:
        params: Parameters, named parameters, or parameter groups, of any shape and strides. The kernels step float32,
            float64, bfloat16, float16 and their complex dtypes on CPUs and GPUs; torch operations step others.
            The norms of DTensors are those of the whole tensors.
        lr: Learning rate :math:`\gamma`; a float, or a tensor of one element.
        betas: Decay rates :math:`\beta_1, \beta_2` of the two averages, in [0, 1).
        eps: :math:`\epsilon`, added to the denominator.
        weight_decay: :math:`\lambda`, decoupled.
        trust_ratio: Whether the update is proportional to the norm of the tensor. False: the ratio is 1.
        trust_clip: Whether the ratio is at most 1.
        maximize: Ascend instead of descend.
        capturable: Keep the step count on the GPU, so that a CUDA graph can capture the step.
        state_dtype: dtype of ``exp_avg`` and ``exp_avg_sq``: torch.float32, float64, bfloat16 or float16; None: the
            parameter's.

    Further arguments, documented at ``__init__``: ``master`` (see :doc:`/master_weights`), ``stochastic_rounding`` and
    ``rounding_seed`` (see :doc:`/stochastic_rounding`), and those of :doc:`/step_tail`: ``max_norm``, ``norm_type``,
    ``clip_value``, ``skip_nonfinite``, ``average``, ``copy_to``, ``zero_grad``.

    Raises:
        TypeError: A hyperparameter is not a number.
        ValueError: A hyperparameter is out of range.
        RuntimeError: At the step, if a gradient is sparse.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = onepass.LAMB(model.parameters(), lr=1e-3)
        >>> model(torch.ones(8, 4)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg', 'exp_avg_sq', 'step']
    """

    rule = "lamb"
    torch_step = _torch_step
