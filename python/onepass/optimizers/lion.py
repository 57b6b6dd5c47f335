"""Lion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from . import signatures
from .base import Native
from .torch_operations import sign, steps


@steps("Lion", "exp_avg", counts=False)
def _torch_step(group: Mapping[str, Any], p: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: float) -> None:
    beta1, beta2 = group["betas"]
    exp_avg = state["exp_avg"]
    update = sign(beta1 * exp_avg + (1 - beta1) * grad)
    p.sub_(group["lr"] * (update + group["weight_decay"] * p))
    exp_avg.lerp_(grad, 1 - beta2)


class Lion(Native, signatures.Lion):
    r"""Lion: the sign of an interpolation between momentum and gradient, with decoupled weight decay.

    With the gradient :math:`g_t` (negated with ``maximize``), element by element:

    .. math::
        c_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        \theta_t &= \theta_{t-1} - \gamma (\operatorname{sign}(c_t) + \lambda \theta_{t-1}) \\
        m_t &= \beta_2 m_{t-1} + (1 - \beta_2) g_t

    with :math:`\operatorname{sign}(0) = 0`. For a complex parameter, the signs of real and imaginary part are taken
    separately.

    A sparse gradient updates only the rows that have entries: their average and their parameter, including the weight
    decay. All other rows are not changed and do not decay.

    Source: Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", arXiv:2302.06675, algorithm 2.

    Args:
        params: Parameters, named parameters, or parameter groups, of any shape and strides. The kernels step float32,
            float64, bfloat16, float16 and their complex dtypes on CPUs and GPUs; torch operations step others.
        lr: Learning rate :math:`\gamma`; a float, or a tensor of one element. The paper uses a rate 3 to 10 times
            smaller than AdamW's, and a weight decay larger by the same factor.
        betas: :math:`\beta_1` of the interpolation and :math:`\beta_2` of the average, in [0, 1).
        weight_decay: :math:`\lambda`, decoupled.
        maximize: Ascend instead of descend.
        state_dtype: dtype of ``exp_avg``: torch.float32, float64, bfloat16, float16 or float8_e4m3fn; None: the
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
        >>> optimizer = onepass.Lion(model.parameters(), lr=1e-4, weight_decay=0.1)
        >>> model(torch.ones(8, 4)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg']
    """

    rule = "lion"
    torch_step = _torch_step
