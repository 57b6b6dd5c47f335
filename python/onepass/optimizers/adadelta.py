"""Adadelta."""

from __future__ import annotations

import torch

from . import signatures
from .base import Native
from .hooks import unhooked


class Adadelta(Native, signatures.Adadelta):
    r"""Adadelta, a drop-in replacement for :class:`torch.optim.Adadelta`.

    With the gradient :math:`g_t` (negated with ``maximize``), element by element:

    .. math::
        g_t' &= g_t + \lambda \theta_{t-1} \\
        v_t &= \rho v_{t-1} + (1 - \rho) g_t'^2 \\
        d_t &= \frac{\sqrt{u_{t-1} + \epsilon}}{\sqrt{v_t + \epsilon}} g_t' \\
        u_t &= \rho u_{t-1} + (1 - \rho) d_t^2 \\
        \theta_t &= \theta_{t-1} - \gamma d_t

    Source: Zeiler 2012, "ADADELTA: An Adaptive Learning Rate Method", arXiv:1212.5701.

    Args:
        params: Parameters, named parameters, or parameter groups, of any shape and strides. The kernels step float32,
            float64, bfloat16, float16 and their complex dtypes on CPUs and GPUs; torch's implementation steps others.
        lr: Learning rate :math:`\gamma`; a float, or a tensor of one element.
        rho: Decay rate :math:`\rho` of both averages, in [0, 1].
        eps: :math:`\epsilon`, added under both square roots.
        weight_decay: L2 penalty :math:`\lambda`.
        foreach: For compatibility; used only where torch's implementation steps the parameter.
        capturable: As ``foreach``; True also keeps the step count on the GPU, so that a CUDA graph can capture the
            step.
        maximize: Ascend instead of descend.
        differentiable: Step by torch's implementation, so that autograd can differentiate through the step.
        state_dtype: dtype of ``square_avg`` and ``acc_delta``: torch.float32, float64, bfloat16, float16 or
            float8_e4m3fn; None: the parameter's, as in torch.

    Further arguments, documented at ``__init__``: ``master`` (see :doc:`/master_weights`), ``stochastic_rounding`` and
    ``rounding_seed`` (see :doc:`/stochastic_rounding`), and those of :doc:`/step_tail`: ``max_norm``, ``norm_type``,
    ``clip_value``, ``skip_nonfinite``, ``average``, ``copy_to``, ``zero_grad``.

    Raises:
        TypeError: A hyperparameter is not a number.
        ValueError: A hyperparameter is out of range.
        RuntimeError: At the step, if a gradient is sparse.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = onepass.Adadelta(model.parameters(), lr=1.0)
        >>> model(torch.ones(8, 4)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['acc_delta', 'square_avg', 'step']
    """

    rule = "adadelta"
    torch_step = unhooked(torch.optim.Adadelta)
