"""RMSprop."""

from __future__ import annotations

import torch

from . import signatures
from .base import Native
from .hooks import unhooked


class RMSprop(Native, signatures.RMSprop):
    r"""RMSprop, a drop-in replacement for :class:`torch.optim.RMSprop`.

    With the gradient :math:`g_t` (negated with ``maximize``), element by element:

    .. math::
        g_t' &= g_t + \lambda \theta_{t-1} \\
        v_t &= \alpha v_{t-1} + (1 - \alpha) g_t'^2 \\
        a_t &= \alpha a_{t-1} + (1 - \alpha) g_t' \text{ with centered, else } 0 \\
        b_t &= \mu b_{t-1} + \frac{g_t'}{\sqrt{v_t - a_t^2} + \epsilon} \\
        \theta_t &= \theta_{t-1} - \gamma b_t

    If rounding makes the variance :math:`v_t - a_t^2` negative, zero is used; torch returns NaN there.

    Sources: Tieleman and Hinton 2012, "Lecture 6.5: rmsprop", in the course Neural Networks for Machine Learning;
    centered: Graves 2013, "Generating Sequences With Recurrent Neural Networks", arXiv:1308.0850.

    Args:
        params: Parameters, named parameters, or parameter groups, of any shape and strides. The kernels step float32,
            float64, bfloat16, float16 and their complex dtypes on CPUs and GPUs; torch's implementation steps others.
        lr: Learning rate :math:`\gamma`; a float, or a tensor of one element.
        alpha: Decay rate :math:`\alpha` of the averages.
        eps: :math:`\epsilon`, added to the denominator.
        weight_decay: L2 penalty :math:`\lambda`.
        momentum: :math:`\mu`.
        centered: Divide by the standard deviation of the gradient instead of its root mean square.
        capturable: As ``foreach``; True also keeps the step count on the GPU, so that a CUDA graph can capture the
            step.
        foreach: For compatibility; used only where torch's implementation steps the parameter.
        maximize: Ascend instead of descend.
        differentiable: Step by torch's implementation, so that autograd can differentiate through the step.
        state_dtype: dtype of ``square_avg``, ``momentum_buffer`` and ``grad_avg``: torch.float32, float64, bfloat16,
            float16 or float8_e4m3fn; None: the parameter's, as in torch.

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
        >>> optimizer = onepass.RMSprop(model.parameters(), lr=0.01, momentum=0.9)
        >>> model(torch.ones(8, 4)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['momentum_buffer', 'square_avg', 'step']
    """

    rule = "rmsprop"
    torch_step = unhooked(torch.optim.RMSprop)
