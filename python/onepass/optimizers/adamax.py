"""Adamax."""

from __future__ import annotations

import torch

from . import signatures
from .base import Native
from .hooks import unhooked


class Adamax(Native, signatures.Adamax):
    r"""Adamax, Adam with the infinity norm, a drop-in for :class:`torch.optim.Adamax`.

    At step :math:`t`, with the gradient :math:`g_t` (negated with ``maximize``), element by element:

    .. math::
        g_t' &= g_t + \lambda \theta_{t-1} \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t' \\
        u_t &= \max(\beta_2 u_{t-1}, |g_t'| + \epsilon) \\
        \theta_t &= \theta_{t-1} - \frac{\gamma}{1 - \beta_1^t} \frac{m_t}{u_t}

    Source: Kingma and Ba 2015, arXiv:1412.6980, algorithm 2.

    Args:
        params: Parameters, named parameters, or parameter groups; any shape and strides. float32, float64, bfloat16,
            float16 and their complex kinds on CPUs and GPUs are stepped by the kernels, anything else by torch.
        lr: Learning rate :math:`\gamma`; a float, or a tensor of one element.
        betas: Decay rates :math:`\beta_1` of the average and :math:`\beta_2` of the norm, in [0, 1).
        eps: Added to the size of the gradient, :math:`\epsilon`.
        weight_decay: L2 penalty :math:`\lambda`.
        foreach: Accepted for torch's sake; only torch's own code, where it steps a parameter, heeds it.
        maximize: Ascend instead of descend.
        differentiable: Run torch's implementation, through which autograd can differentiate.
        capturable: As ``foreach``; True counts steps on the GPU, so that a CUDA graph can capture the step.
        state_dtype: dtype of ``exp_avg`` and ``exp_inf``: torch.float32, float64, bfloat16 or float16; None for the
            parameter's, as torch has it.

    Raises:
        ValueError: A hyperparameter is out of its range.

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
