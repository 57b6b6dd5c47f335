"""ASGD."""

from __future__ import annotations

from typing import Any

import torch

from . import signatures
from .arguments import number
from .base import Native
from .hooks import unhooked


class ASGD(Native, signatures.ASGD):
    r"""Averaged stochastic gradient descent, a drop-in replacement for :class:`torch.optim.ASGD`.

    At step :math:`t`, with the gradient :math:`g_t` (negated with ``maximize``), element by element:

    .. math::
        g_t' &= g_t + \lambda \theta_{t-1} \\
        \theta_t &= (1 - \eta_t \, \mathrm{lambd}) \, \theta_{t-1} - \eta_t g_t' \\
        \bar\theta_t &= \bar\theta_{t-1} + \mu_t (\theta_t - \bar\theta_{t-1}) \\
        \eta_{t+1} &= \frac{\gamma}{(1 + \mathrm{lambd} \, \gamma t)^\alpha}, \qquad
        \mu_{t+1} = \frac{1}{\max(1, t - t_0)}

    with :math:`\eta_1 = \gamma` and :math:`\mu_1 = 1`. The average :math:`\bar\theta_t` is the state ``ax``. As in
    torch, a change of the learning rate takes effect one step later: the next step still uses the old rate.

    Source: Polyak and Juditsky 1992, "Acceleration of stochastic approximation by averaging".

    Args:
        params: Parameters, named parameters, or parameter groups, of any shape and strides. The kernels step float32,
            float64, bfloat16, float16 and their complex dtypes on CPUs and GPUs; torch's implementation steps others.
        lr: Learning rate :math:`\gamma`; a float, or a tensor of one element.
        lambd: Decay term.
        alpha: Exponent :math:`\alpha` of the decay of the step size.
        t0: Step :math:`t_0` at which averaging starts.
        weight_decay: L2 penalty :math:`\lambda`.
        foreach: For compatibility; used only where torch's implementation steps the parameter.
        maximize: Ascend instead of descend.
        differentiable: Step by torch's implementation, so that autograd can differentiate through the step.
        capturable: As ``foreach``; a CUDA graph can capture the step only if True.
        state_dtype: dtype of ``ax``: torch.float32, float64, bfloat16 or float16; None: the parameter's, as in torch.

    Further arguments, documented at ``__init__``: ``master`` (see :doc:`/master_weights`), ``stochastic_rounding`` and
    ``rounding_seed`` (see :doc:`/stochastic_rounding`), and those of :doc:`/step_tail`: ``max_norm``, ``norm_type``,
    ``clip_value``, ``skip_nonfinite``, ``average``, ``copy_to``, ``zero_grad``.

    Raises:
        TypeError: A hyperparameter is not a number.
        ValueError: A hyperparameter is out of range.
        RuntimeError: At the step, if a gradient is sparse.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = onepass.ASGD(model.parameters(), lr=0.01)
        >>> model(torch.ones(8, 4)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['ax', 'eta', 'mu', 'step']
    """

    rule = "asgd"
    torch_step = unhooked(torch.optim.ASGD)

    def _counts_on_device(self, group: dict[str, Any]) -> bool:
        return True  # torch always keeps ASGD's scalars on the parameter's device

    def _initial_scalar(self, group: dict[str, Any], name: str) -> float:
        return {"step": 0.0, "eta": number(group["lr"]), "mu": 1.0}[name]
