"""Signum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from . import signatures
from .base import Native
from .torch_operations import sign, steps


@steps("Signum", "momentum_buffer", counts=False)
def _torch_step(group: Mapping[str, Any], p: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: float) -> None:
    m = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
    p.sub_(group["lr"] * (sign(m) + group["weight_decay"] * p))


class Signum(Native, signatures.Signum):
    r"""Signum: the sign of the momentum, with decoupled weight decay.

    With the gradient :math:`g_t` (negated with ``maximize``), element by element:

    .. math::
        m_t &= \mu m_{t-1} + (1 - \mu) g_t \\
        \theta_t &= \theta_{t-1} - \gamma (\operatorname{sign}(m_t) + \lambda \theta_{t-1})

    with :math:`\operatorname{sign}(0) = 0`; for a complex parameter, the signs of real and imaginary part are taken
    separately. ``momentum=0`` is signSGD. Tiger is Signum with ``momentum=0.965`` and ``weight_decay=0.01``.

    A sparse gradient updates only the rows that have entries: their momentum and their parameter, including the weight
    decay. All other rows are not changed and do not decay.

    Some implementations compute the momentum as ``momentum * m + g``, which has the same sign, and add the weight decay
    to the gradient.

    Source: Bernstein et al. 2018, "signSGD: Compressed Optimisation for Non-Convex Problems", arXiv:1802.04434,
    algorithm 2.

    Args:
        params: Parameters, named parameters, or parameter groups, of any shape and strides. The kernels step float32,
            float64, bfloat16, float16 and their complex dtypes on CPUs and GPUs; torch operations step others.
        lr: Learning rate :math:`\gamma`; a float, or a tensor of one element.
        momentum: :math:`\mu` of the average, in [0, 1).
        weight_decay: :math:`\lambda`, decoupled.
        maximize: Ascend instead of descend.
        state_dtype: dtype of ``momentum_buffer``: torch.float32, float64, bfloat16, float16 or float8_e4m3fn; None: the
            parameter's.

    Further arguments, documented at ``__init__``: ``master`` (see :doc:`/master_weights`), ``stochastic_rounding`` and
    ``rounding_seed`` (see :doc:`/stochastic_rounding`), ``cautious`` and ``cautious_weight_decay`` (see
    :doc:`/cautious`), and those of :doc:`/step_tail`: ``max_norm``, ``norm_type``, ``clip_value``, ``skip_nonfinite``,
    ``average``, ``copy_to``, ``zero_grad``.

    Raises:
        TypeError: A hyperparameter is not a number.
        ValueError: A hyperparameter is out of range.
        RuntimeError: At the step, if a gradient is sparse and its parameter complex, not contiguous or not on the CPU.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = onepass.Signum(model.parameters(), lr=1e-4, weight_decay=0.1)
        >>> model(torch.ones(8, 4)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['momentum_buffer']
    """

    rule = "signum"
    torch_step = _torch_step
