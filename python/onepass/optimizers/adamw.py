"""AdamW."""

from __future__ import annotations

import torch

from . import signatures
from .adam import Adam
from .hooks import unhooked


class AdamW(Adam, signatures.AdamW):  # as torch's AdamW is a subclass of its Adam
    r"""Adam with decoupled weight decay, a drop-in replacement for :class:`torch.optim.AdamW`.

    At step :math:`t`, with the gradient :math:`g_t` (negated with ``maximize``), element by element:

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        w_t &= \max(w_{t-1}, v_t) \text{ with amsgrad, else } v_t \\
        \theta_t &= \theta_{t-1} - \gamma \lambda \theta_{t-1}
                    - \gamma \frac{m_t / (1 - \beta_1^t)}{\sqrt{w_t / (1 - \beta_2^t)} + \epsilon}

    A sparse gradient, which torch's class does not support, updates only the rows that have entries: their averages and
    their parameter, including the weight decay. All other rows are not changed and do not decay. The step count
    :math:`t` is that of the whole parameter.

    Source: Loshchilov and Hutter 2019, arXiv:1711.05101.

    Args:
        params: As :class:`Adam`'s.
        lr: Learning rate :math:`\gamma`; a float, or a tensor of one element.
        betas: Decay rates :math:`\beta_1, \beta_2` of the two averages, in [0, 1).
        eps: :math:`\epsilon`, added to the denominator.
        weight_decay: :math:`\lambda`, decoupled.
        amsgrad: Use the maximum of all past :math:`v_t` in the denominator.
        maximize: Ascend instead of descend.
        foreach: For compatibility; used only where torch's implementation steps the parameter.
        capturable: As ``foreach``; True also keeps the step count on the GPU, so that a CUDA graph can capture the
            step.
        differentiable: Step by torch's implementation, so that autograd can differentiate through the step.
        fused: As ``foreach``; True also makes ``GradScaler`` pass ``grad_scale`` and ``found_inf`` to ``step()``, and
            keeps the step count on the GPU.
        state_dtype: dtype of the states, as :class:`Adam`'s.

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
        >>> optimizer = onepass.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
        >>> model(torch.ones(8, 4)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg', 'exp_avg_sq', 'step']
    """

    torch_step = unhooked(torch.optim.AdamW)
