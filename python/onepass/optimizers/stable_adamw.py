"""StableAdamW."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from . import signatures
from .base import Native
from .torch_operations import norm_of, steps


@steps("StableAdamW", "exp_avg", "exp_avg_sq")
def _torch_step(group: Mapping[str, Any], p: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: float) -> None:
    beta1, beta2 = group["betas"]
    gain1, gain2 = (1 - beta1) / (1 - beta1**step), (1 - beta2) / (1 - beta2**step)
    m = state["exp_avg"].lerp_(grad, gain1)
    v = state["exp_avg_sq"].mul_(1 - gain2).add_(gain2 * grad.square())
    root = v.sqrt()
    rms = norm_of(grad / root.clamp(min=group["eps"])) / max(grad.numel(), 1) ** 0.5
    change = m / (root + group["eps"])
    if group["weight_decay"]:
        change = change + group["weight_decay"] * p
    p.sub_(group["lr"] / rms.clamp(min=1.0) * change)


class StableAdamW(Native, signatures.StableAdamW):
    r"""StableAdamW: AdamW with Adafactor's update clipping: a lower learning rate for tensors with large updates.

    At step :math:`t`, with the gradient :math:`g_t` (negated with ``maximize``):

    .. math::
        \hat\beta &= \beta \frac{1 - \beta^{t-1}}{1 - \beta^t} \text{ for both betas} \\
        m_t &= \hat\beta_1 m_{t-1} + (1 - \hat\beta_1) g_t \\
        v_t &= \hat\beta_2 v_{t-1} + (1 - \hat\beta_2) g_t^2 \\
        r_t &= \max\Bigl(1, \sqrt{\operatorname{mean}(g_t^2 / \max(v_t, \epsilon^2))}\Bigr) \\
        \theta_t &= \theta_{t-1} - \frac{\gamma}{r_t}
                    \Bigl(\frac{m_t}{\sqrt{v_t} + \epsilon} + \lambda \theta_{t-1}\Bigr)

    with the mean over the whole tensor. The averages include the bias correction, so this class cannot continue with
    the states of Adam or AdamW.

    Source: Wortsman et al. 2023, "Stable and low-precision training for large-scale vision-language models",
    arXiv:2304.13013, algorithm 2.

    Args:
        params: Parameters, named parameters, or parameter groups, of any shape and strides. The kernels step float32,
            float64, bfloat16, float16 and their complex dtypes on CPUs and GPUs; torch operations step others.
            The norms of DTensors are those of the whole tensors.
        lr: Learning rate :math:`\gamma`; a float, or a tensor of one element.
        betas: Decay rates :math:`\beta_1, \beta_2` of the two averages, in [0, 1).
        eps: :math:`\epsilon`, added to the denominator.
        weight_decay: :math:`\lambda`, decoupled.
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
        >>> optimizer = onepass.StableAdamW(model.parameters(), lr=1e-3)
        >>> model(torch.ones(8, 4)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg', 'exp_avg_sq', 'step']
    """

    rule = "stable_adamw"
    torch_step = _torch_step
