"""ASGD."""

from __future__ import annotations

from typing import Any

import torch

from . import signatures
from .arguments import number
from .base import Native
from .hooks import unhooked


class ASGD(Native, signatures.ASGD):
    r"""Averaged stochastic gradient descent, a drop-in for :class:`torch.optim.ASGD`.

    At step :math:`t`, with the gradient :math:`g_t` (negated with ``maximize``), element by element:

    .. math::
        g_t' &= g_t + \lambda \theta_{t-1} \\
        \theta_t &= (1 - \eta_t \, \mathrm{lambd}) \, \theta_{t-1} - \eta_t g_t' \\
        \bar\theta_t &= \bar\theta_{t-1} + \mu_t (\theta_t - \bar\theta_{t-1}) \\
        \eta_{t+1} &= \frac{\gamma}{(1 + \mathrm{lambd} \, \gamma t)^\alpha}, \qquad
        \mu_{t+1} = \frac{1}{\max(1, t - t_0)}

    from :math:`\eta_1 = \gamma` and :math:`\mu_1 = 1`. The average :math:`\bar\theta_t` is the state ``ax``; a learning
    rate that a schedule changes acts from the step after the next on, as in torch.

    Source: Polyak and Juditsky 1992, "Acceleration of stochastic approximation by averaging".

    Args:
        params: Parameters, named parameters, or parameter groups; any shape and strides. float32, float64, bfloat16,
            float16 and their complex kinds on CPUs and GPUs are stepped by the kernels, anything else by torch.
        lr: Learning rate :math:`\gamma`; a float, or a tensor of one element.
        lambd: Decay term.
        alpha: Power of the rate's decay, :math:`\alpha`.
        t0: The step at which averaging starts, :math:`t_0`.
        weight_decay: L2 penalty :math:`\lambda`.
        foreach: Accepted for torch's sake; only torch's own code, where it steps a parameter, heeds it.
        maximize: Ascend instead of descend.
        differentiable: Run torch's implementation, through which autograd can differentiate.
        capturable: As ``foreach``; only with True can a CUDA graph capture the step.
        state_dtype: dtype of ``ax``: torch.float32, float64, bfloat16 or float16; None for the parameter's, as torch
            has it.

    Raises:
        ValueError: A hyperparameter is out of its range.

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
        return True  # torch has them there always

    def _initial_scalar(self, group: dict[str, Any], name: str) -> float:
        return {"step": 0.0, "eta": number(group["lr"]), "mu": 1.0}[name]
