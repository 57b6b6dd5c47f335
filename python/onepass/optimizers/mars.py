"""MARS."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from . import signatures
from .base import Native
from .torch_operations import norm_of, steps


@steps("MARS", "exp_avg", "exp_avg_sq", "last_grad")
def _torch_step(group: Mapping[str, Any], p: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: float) -> None:
    beta1, beta2 = group["betas"]
    corrected = grad
    if step > 1:
        corrected = grad + group["gamma"] * beta1 / (1 - beta1) * (grad - state["last_grad"])
    if group["clip_correction"]:
        corrected = corrected / norm_of(corrected).clamp(min=1.0).to(grad.dtype)
    m = state["exp_avg"].lerp_(corrected, 1 - beta1)
    v = state["exp_avg_sq"].mul_(beta2).add_((1 - beta2) * corrected.square())
    u = m / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + group["eps"])
    if group["weight_decay"]:
        u = u + group["weight_decay"] * p
    p.sub_(group["lr"] * u)
    state["last_grad"].copy_(grad)


class MARS(Native, signatures.MARS):
    r"""MARS with AdamW's update: AdamW with variance-reduced gradients, corrected by their change since the last step.

    At step :math:`t`, with the gradient :math:`g_t` (negated with ``maximize``):

    .. math::
        c_t &= g_t + \gamma \frac{\beta_1}{1 - \beta_1} (g_t - g_{t-1}) \text{, and } c_1 = g_1 \\
        \tilde c_t &= c_t / \max(1, \|c_t\|) \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) \tilde c_t \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) \tilde c_t^2 \\
        \theta_t &= \theta_{t-1} - \eta \left( \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}
                    + \lambda \theta_{t-1} \right)

    with the 2-norm of the whole tensor, and the learning rate :math:`\eta`. This is the approximate form:
    :math:`g_{t-1}` is the gradient of the last step, not the gradient of this step's batch at the last parameters.

    The authors' implementation steps vectors (biases, the scales of normalization) by AdamW; a group with ``gamma=0``
    and ``clip_correction=False`` does the same. It also takes :math:`g_0 = 0`, so that
    :math:`c_1 = (1 + \gamma \beta_1 / (1 - \beta_1)) g_1`. timm's first step is that of this class.

    Source: Yuan et al. 2024, "MARS: Unleashing the Power of Variance Reduction for Training Large Models",
    arXiv:2411.10438, algorithms 1 and 2.

    Args:
        params: Parameters, named parameters, or parameter groups, of any shape and strides. The kernels step float32,
            float64, bfloat16, float16 and their complex dtypes on CPUs and GPUs; torch operations step others.
            The norms of DTensors are those of the whole tensors.
        lr: Learning rate :math:`\eta`; a float, or a tensor of one element.
        betas: Decay rates :math:`\beta_1, \beta_2` of the two averages, in [0, 1).
        eps: :math:`\epsilon`, added to the denominator.
        weight_decay: :math:`\lambda`, decoupled.
        gamma: :math:`\gamma`, the strength of the correction, >= 0.
        clip_correction: Whether the corrected gradient is clipped to a norm of 1.
        maximize: Ascend instead of descend.
        capturable: Keep the step count on the GPU, so that a CUDA graph can capture the step.
        state_dtype: dtype of the states: torch.float32, float64, bfloat16 or float16; None: the parameter's.

    Further arguments, documented at ``__init__``: ``master`` (see :doc:`/master_weights`), ``stochastic_rounding`` and
    ``rounding_seed`` (see :doc:`/stochastic_rounding`), and those of :doc:`/step_tail`: ``max_norm``, ``norm_type``,
    ``clip_value``, ``skip_nonfinite``, ``average``, ``copy_to``, ``zero_grad``.

    Raises:
        TypeError: A hyperparameter is not a number.
        ValueError: A hyperparameter is out of range.
        RuntimeError: At the step, if a gradient is sparse.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = onepass.MARS(model.parameters(), lr=3e-3)
        >>> model(torch.ones(8, 4)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg', 'exp_avg_sq', 'last_grad', 'step']
    """

    rule = "mars"
    torch_step = _torch_step
