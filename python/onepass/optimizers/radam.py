"""RAdam."""

from __future__ import annotations

import torch

from . import signatures
from .base import Native
from .hooks import unhooked


class RAdam(Native, signatures.RAdam):
    r"""RAdam (Adam with a rectified learning rate), a drop-in replacement for :class:`torch.optim.RAdam`.

    At step :math:`t`, with the gradient :math:`g_t` (negated with ``maximize``), element by element:

    .. math::
        g_t' &= g_t + \lambda \theta_{t-1} \quad\text{(unless the decay is decoupled)} \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t' \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t'^2 \\
        \rho_\infty &= \frac{2}{1 - \beta_2} - 1, \qquad
        \rho_t = \rho_\infty - \frac{2 t \beta_2^t}{1 - \beta_2^t} \\
        d_t &= \sqrt{\frac{(\rho_t - 4)(\rho_t - 2) \rho_\infty}{(\rho_\infty - 4)(\rho_\infty - 2) \rho_t}}
               \frac{\sqrt{1 - \beta_2^t}}{\sqrt{v_t} + \epsilon} \text{ if } \rho_t > 5 \text{, else } 1 \\
        \theta_t &= \theta_{t-1} - \gamma \lambda \theta_{t-1} \text{ (if decoupled)}
                    - \gamma \frac{m_t}{1 - \beta_1^t} d_t

    Source: Liu et al. 2020, "On the Variance of the Adaptive Learning Rate and Beyond", arXiv:1908.03265, algorithm 2.

    Args:
        params: Parameters, named parameters, or parameter groups, of any shape and strides. The kernels step float32,
            float64, bfloat16, float16 and their complex dtypes on CPUs and GPUs; torch's implementation steps others.
        lr: Learning rate :math:`\gamma`; a float, or a tensor of one element.
        betas: Decay rates :math:`\beta_1, \beta_2` of the two averages, in [0, 1).
        eps: :math:`\epsilon`, added to the denominator.
        weight_decay: :math:`\lambda`, an L2 penalty unless ``decoupled_weight_decay``.
        decoupled_weight_decay: Decay the weights directly, as :class:`AdamW` does.
        foreach: For compatibility; used only where torch's implementation steps the parameter.
        maximize: Ascend instead of descend.
        capturable: As ``foreach``; True also keeps the step count on the GPU, so that a CUDA graph can capture the
            step.
        differentiable: Step by torch's implementation, so that autograd can differentiate through the step.
        state_dtype: dtype of ``exp_avg`` and ``exp_avg_sq``: torch.float32, float64, bfloat16, float16 or
            float8_e4m3fn; None: the parameter's, as in torch.

    Further arguments, documented at ``__init__``: ``master`` (see :doc:`/master_weights`), ``stochastic_rounding`` and
    ``rounding_seed`` (see :doc:`/stochastic_rounding`), ``cautious`` and ``cautious_weight_decay`` (see
    :doc:`/cautious`), and those of :doc:`/step_tail`: ``max_norm``, ``norm_type``, ``clip_value``, ``skip_nonfinite``,
    ``average``, ``copy_to``, ``zero_grad``.

    Raises:
        TypeError: A hyperparameter is not a number.
        ValueError: A hyperparameter is out of range.
        RuntimeError: At the step, if a gradient is sparse.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = onepass.RAdam(model.parameters(), lr=1e-3)
        >>> model(torch.ones(8, 4)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg', 'exp_avg_sq', 'step']
    """

    rule = "radam"
    torch_step = unhooked(torch.optim.RAdam)
