"""SGD."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import signatures
from .arguments import number
from .base import Native
from .hooks import unhooked


class SGD(Native, signatures.SGD):
    r"""Stochastic gradient descent, a drop-in replacement for :class:`torch.optim.SGD`.

    With the gradient :math:`g_t` (negated with ``maximize``), element by element:

    .. math::
        g_t' &= g_t + \lambda \theta_{t-1} \\
        b_t &= g_t' \text{ at the first step, then } \mu b_{t-1} + (1 - \tau) g_t' \\
        d_t &= g_t' + \mu b_t \text{ with nesterov, else } b_t \text{ (without momentum } g_t') \\
        \theta_t &= \theta_{t-1} - \gamma d_t

    A kernel steps a parameter with a sparse gradient if there is no momentum; otherwise torch's implementation does.
    The kernel updates only the rows that have entries; the result is that of the equal dense gradient.

    Source: Sutskever et al. 2013, "On the importance of initialization and momentum in deep learning", in the form that
    torch uses (the learning rate is not part of the momentum buffer).

    Args:
        params: Parameters, named parameters, or parameter groups, of any shape and strides. The kernels step float32,
            float64, bfloat16, float16 and their complex dtypes on CPUs and GPUs; torch's implementation steps others.
        lr: Learning rate :math:`\gamma`; a float, or a tensor of one element.
        momentum: :math:`\mu`.
        dampening: :math:`\tau`.
        weight_decay: L2 penalty :math:`\lambda`.
        nesterov: Nesterov momentum; needs a momentum and no dampening.
        maximize: Ascend instead of descend.
        foreach: For compatibility; used only where torch's implementation steps the parameter.
        differentiable: Step by torch's implementation, so that autograd can differentiate through the step.
        fused: As ``foreach``; True also makes ``GradScaler`` pass ``grad_scale`` and ``found_inf`` to ``step()``.
        state_dtype: dtype of ``momentum_buffer``: torch.float32, float64, bfloat16, float16 or float8_e4m3fn; None: the
            gradient's, as in torch.

    Further arguments, documented at ``__init__``: ``master`` (see :doc:`/master_weights`), ``stochastic_rounding`` and
    ``rounding_seed`` (see :doc:`/stochastic_rounding`), ``cautious`` (see :doc:`/cautious`), and those of
    :doc:`/step_tail`: ``max_norm``, ``norm_type``, ``clip_value``, ``skip_nonfinite``, ``average``, ``copy_to``,
    ``zero_grad``.

    Raises:
        TypeError: A hyperparameter is not a number.
        ValueError: A hyperparameter is out of range.
        RuntimeError: At the step, if a gradient is sparse and weight decay is not 0.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = onepass.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> model(torch.ones(8, 4)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['momentum_buffer']
    """

    rule = "sgd"
    torch_step = unhooked(torch.optim.SGD)

    def _new_state(self, group: dict[str, Any], p: Tensor, grad: Tensor, name: str) -> Tensor:
        # Uninitialized, because the first step writes each element before reading it. Strides are those of the gradient
        # that torch's implementation would clone.
        if group["maximize"]:
            grad = -grad
        if number(group["weight_decay"]) != 0:
            grad = grad.add(p, alpha=number(group["weight_decay"]))
        return torch.empty_like(grad, dtype=self._state_dtype(group, p))
