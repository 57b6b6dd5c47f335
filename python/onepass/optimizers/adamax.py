"""Adamax."""

from __future__ import annotations

import torch

from . import signatures
from .base import Native
from .hooks import unhooked


class Adamax(Native, signatures.Adamax):
    r"""Adamax (Adam with the infinity norm), a drop-in replacement for :class:`torch.optim.Adamax`.

    At step :math:`t`, with the gradient :math:`g_t` (negated with ``maximize``), element by element:

    .. math::
        g_t' &= g_t + \lambda \theta_{t-1} \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t' \\
        u_t &= \max(\beta_2 u_{t-1}, |g_t'| + \epsilon) \\
        \theta_t &= \theta_{t-1} - \frac{\gamma}{1 - \beta_1^t} \frac{m_t}{u_t}

    Source: Kingma and Ba 2015, arXiv:1412.6980, algorithm 2.

    Args:
        params: Parameters, named parameters, or parameter groups, of any shape and strides. The kernels step float32,
            float64, bfloat16, float16 and their complex dtypes on CPUs and GPUs; torch's implementation steps others.
        lr: Learning rate :math:`\gamma`; a float, or a tensor of one element.
        betas: Decay rates :math:`\beta_1` of the average and :math:`\beta_2` of the norm, in [0, 1).
        eps: :math:`\epsilon`, added to the gradient's magnitude.
        weight_decay: L2 penalty :math:`\lambda`.
        foreach: For compatibility; used only where torch's implementation steps the parameter.
        maximize: Ascend instead of descend.
        differentiable: Step by torch's implementation, so that autograd can differentiate through the step.
        capturable: As ``foreach``; True also keeps the step count on the GPU, so that a CUDA graph can capture the
            step.
        state_dtype: dtype of ``exp_avg`` and ``exp_inf``: torch.float32, float64, bfloat16, float16 or float8_e4m3fn;
            None: the parameter's, as in torch.

    Further arguments, documented at ``__init__``: ``master`` (see :doc:`/master_weights`), ``stochastic_rounding`` and
    ``rounding_seed`` (see :doc:`/stochastic_rounding`), ``cautious`` (see :doc:`/cautious`), and those of
    :doc:`/step_tail`: ``max_norm``, ``norm_type``, ``clip_value``, ``skip_nonfinite``, ``average``, ``copy_to``,
    ``zero_grad``.

    Raises:
        TypeError: A hyperparameter is not a number.
        ValueError: A hyperparameter is out of range.
        RuntimeError: At the step, if a gradient is sparse.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = onepass.Adamax(model.parameters(), lr=2e-3)
        >>> model(torch.ones(8, 4)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg', 'exp_inf', 'step']
    """

    rule = "adamax"
    torch_step = unhooked(torch.optim.Adamax)
