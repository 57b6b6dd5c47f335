"""NovoGrad."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import signatures
from .base import Native
from .torch_operations import norm_of, steps, value_of


@steps("NovoGrad", "exp_avg", scalars=("exp_avg_norm_sq",))
def _torch_step(group: Mapping[str, Any], p: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: float) -> None:
    beta1, beta2 = group["betas"]
    square, before = value_of(norm_of(grad)) ** 2, float(state["exp_avg_norm_sq"])
    v = square if before == 0 else beta2 * before + (1 - beta2) * square
    state["exp_avg_norm_sq"].fill_(v)
    # Of a tensor, not a float, whose division by zero would raise.
    u = grad / (torch.tensor(v, dtype=torch.float64).sqrt() + group["eps"]).to(grad.device)
    if group["weight_decay"]:
        u = u + group["weight_decay"] * p
    m = state["exp_avg"].mul_(beta1).add_((1 - beta1) * u if group["grad_averaging"] else u)
    p.sub_(group["lr"] * m)


class NovoGrad(Native, signatures.NovoGrad):
    r"""NovoGrad: momentum of gradients that are divided by their averaged norm, with one second moment for each tensor.

    At step :math:`t`, with the gradient :math:`g_t` (negated with ``maximize``) and its 2-norm over the whole tensor:

    .. math::
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) \|g_t\|^2 \text{, and } \|g_t\|^2 \text{ while } v_{t-1} = 0 \\
        m_t &= \beta_1 m_{t-1} + a \left( \frac{g_t}{\sqrt{v_t} + \epsilon} + \lambda \theta_{t-1} \right) \\
        \theta_t &= \theta_{t-1} - \gamma m_t

    with :math:`a = 1 - \beta_1` if ``grad_averaging``, else 1. The states take half the memory of Adam's, because
    :math:`v` is one number for each tensor.

    Source: Ginsburg et al. 2019, "Stochastic Gradient Methods with Layer-wise Adaptive Moments for Training of Deep
    Networks", arXiv:1905.11286, algorithm 1.

    Args:
        params: Parameters, named parameters, or parameter groups, of any shape and strides. The kernels step float32,
            float64, bfloat16, float16 and their complex dtypes on CPUs and GPUs; torch operations step others.
            The norms of DTensors are those of the whole tensors.
        lr: Learning rate :math:`\gamma`; a float, or a tensor of one element.
        betas: Decay rates :math:`\beta_1, \beta_2`, in [0, 1).
        eps: :math:`\epsilon`, added to the denominator.
        weight_decay: :math:`\lambda`, added to the normalized gradient.
        grad_averaging: Whether the momentum is an average rather than a sum.
        maximize: Ascend instead of descend.
        capturable: A CUDA graph can capture the step only if True.
        state_dtype: dtype of ``exp_avg``: torch.float32, float64, bfloat16 or float16; None: the parameter's.

    Further arguments, documented at ``__init__``: ``master`` (see :doc:`/master_weights`), ``stochastic_rounding`` and
    ``rounding_seed`` (see :doc:`/stochastic_rounding`), and those of :doc:`/step_tail`: ``max_norm``, ``norm_type``,
    ``clip_value``, ``skip_nonfinite``, ``average``, ``copy_to``, ``zero_grad``.

    Raises:
        TypeError: A hyperparameter is not a number.
        ValueError: A hyperparameter is out of range.
        RuntimeError: At the step, if a gradient is sparse.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = onepass.NovoGrad(model.parameters(), lr=1e-3)
        >>> model(torch.ones(8, 4)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg', 'exp_avg_norm_sq', 'step']
    """

    rule = "novograd"
    torch_step = _torch_step

    def _counts_on_device(self, group: dict[str, Any]) -> bool:
        return True  # the norm is found there
