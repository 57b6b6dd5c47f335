"""LARS."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from . import signatures
from .base import Native
from .torch_operations import norm_of, steps


@steps("LARS", "momentum_buffer", counts=False)
def _torch_step(group: Mapping[str, Any], p: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: float) -> None:
    weight_decay, momentum = group["weight_decay"], group["momentum"]
    change = grad + weight_decay * p if weight_decay else grad
    if group["trust_ratio"]:
        norm = norm_of(p)
        denominator = norm_of(grad) + weight_decay * norm + group["eps"]
        ratio = group["trust_coefficient"] * norm / denominator
        change = change * ratio.where((norm > 0) & (norm_of(grad) > 0), 1.0)
    buffer = state["momentum_buffer"].mul_(momentum).add_(change)
    p.sub_(group["lr"] * (change + momentum * buffer if group["nesterov"] else buffer))


class LARS(Native, signatures.LARS):
    r"""LARS: SGD with momentum, with the gradient of each tensor scaled to the tensor's norm.

    With the gradient :math:`g_t` (negated with ``maximize``):

    .. math::
        r_t &= \eta \frac{\|\theta_{t-1}\|}{\|g_t\| + \lambda \|\theta_{t-1}\| + \epsilon} \\
        b_t &= \mu b_{t-1} + r_t (g_t + \lambda \theta_{t-1}) \\
        \theta_t &= \theta_{t-1} - \gamma b_t

    with the 2-norms of the whole tensor; :math:`r_t` is 1 if either norm is 0. With ``nesterov``, :math:`b_t` in the
    last line is replaced by :math:`r_t (g_t + \lambda \theta_{t-1}) + \mu b_t`.

    As in torch's SGD, and unlike in the paper, the learning rate is not part of the buffer: a change of ``lr`` also
    applies to the gradients that are already in the buffer. Biases and the scales of normalization are usually not
    adapted: give them a group with ``trust_ratio=False`` and ``weight_decay=0``.

    timm's Lars has a momentum of 0 by default, and does not adapt tensors without weight decay.

    Source: You et al. 2017, "Large Batch Training of Convolutional Networks", arXiv:1708.03888, algorithm 1.

    Args:
        params: Parameters, named parameters, or parameter groups, of any shape and strides. The kernels step float32,
            float64, bfloat16, float16 and their complex dtypes on CPUs and GPUs; torch operations step others.
            The norms of DTensors are those of the whole tensors.
        lr: Learning rate :math:`\gamma`; a float, or a tensor of one element.
        momentum: :math:`\mu`, in [0, 1).
        weight_decay: :math:`\lambda`, added to the gradient.
        trust_coefficient: :math:`\eta`.
        eps: :math:`\epsilon`, added to the denominator of the ratio.
        nesterov: Nesterov momentum.
        trust_ratio: Whether the gradient is scaled to the norm of the tensor. False: :math:`r_t` is 1.
        maximize: Ascend instead of descend.
        state_dtype: dtype of ``momentum_buffer``: torch.float32, float64, bfloat16 or float16; None: the parameter's.

    Further arguments, documented at ``__init__``: ``master`` (see :doc:`/master_weights`), ``stochastic_rounding`` and
    ``rounding_seed`` (see :doc:`/stochastic_rounding`), and those of :doc:`/step_tail`: ``max_norm``, ``norm_type``,
    ``clip_value``, ``skip_nonfinite``, ``average``, ``copy_to``, ``zero_grad``.

    Raises:
        TypeError: A hyperparameter is not a number.
        ValueError: A hyperparameter is out of range.
        RuntimeError: At the step, if a gradient is sparse.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = onepass.LARS(model.parameters(), lr=0.1)
        >>> model(torch.ones(8, 4)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['momentum_buffer']
    """

    rule = "lars"
    torch_step = _torch_step
