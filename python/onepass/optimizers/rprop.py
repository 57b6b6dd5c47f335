"""Rprop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import signatures
from .arguments import number
from .base import Native
from .hooks import unhooked


class Rprop(Native, signatures.Rprop):
    r"""Resilient backpropagation, a drop-in replacement for :class:`torch.optim.Rprop`.

    With the gradient :math:`g_t` (negated with ``maximize``), element by element:

    .. math::
        f_t &= \eta_+, \eta_- \text{ or } 1 \text{ if } g_t \text{ and } g_{t-1}'
               \text{ have the same sign, opposite signs, or one is zero} \\
        s_t &= \min(\max(f_t s_{t-1}, s_{\min}), s_{\max}) \\
        g_t' &= 0 \text{ after a change of sign, else } g_t \\
        \theta_t &= \theta_{t-1} - \operatorname{sign}(g_t') s_t

    with :math:`s_0 = \gamma`. The learning rate affects the first step only. The sign of NaN is zero, as in torch. The
    kernels flush denormal numbers to zero, so an element with a denormal gradient does not move; in torch, it moves by
    a whole step size.

    Sources: Riedmiller and Braun 1993, "A direct adaptive method for faster backpropagation learning: the RPROP
    algorithm"; this variant: Igel and Hüsken 2003, "Empirical evaluation of the improved Rprop learning algorithms".

    Args:
        params: Parameters, named parameters, or parameter groups, of any shape and strides. The kernels step float32,
            float64, bfloat16, float16 and their complex dtypes on CPUs and GPUs; torch's implementation steps others.
        lr: Learning rate :math:`\gamma`; a float, or a tensor of one element.
        etas: Factors :math:`(\eta_-, \eta_+)`, with :math:`\eta_- < 1 < \eta_+`.
        step_sizes: Smallest and largest step, :math:`s_{\min}, s_{\max}`.
        capturable: As ``foreach``; True also keeps the step count on the GPU, so that a CUDA graph can capture the
            step.
        foreach: For compatibility; used only where torch's implementation steps the parameter.
        maximize: Ascend instead of descend.
        differentiable: Step by torch's implementation, so that autograd can differentiate through the step.
        state_dtype: dtype of ``prev`` and ``step_size``: torch.float32, float64, bfloat16 or float16; None: the
            parameter's and the gradient's, as in torch.

    Further arguments, documented at ``__init__``: ``master`` (see :doc:`/master_weights`), ``stochastic_rounding`` and
    ``rounding_seed`` (see :doc:`/stochastic_rounding`), and those of :doc:`/step_tail`: ``max_norm``, ``norm_type``,
    ``clip_value``, ``skip_nonfinite``, ``average``, ``copy_to``, ``zero_grad``.

    Raises:
        TypeError: A hyperparameter is not a number.
        ValueError: A hyperparameter is out of range.
        RuntimeError: At the step, if a gradient is sparse.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = onepass.Rprop(model.parameters(), lr=0.01)
        >>> model(torch.ones(8, 4)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['prev', 'step', 'step_size']
    """

    rule = "rprop"
    torch_step = unhooked(torch.optim.Rprop)

    def _new_state(self, group: dict[str, Any], p: Tensor, grad: Tensor, name: str) -> Tensor:
        if name == "prev":
            return super()._new_state(group, p, grad, name)
        lr = number(group["lr"])
        if p.is_complex():
            return torch.full_like(grad, complex(lr, lr))
        return torch.full_like(grad, lr, dtype=self._state_dtype(group, p))
