"""ScheduleFreeSGD."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from . import signatures
from .schedule_free import ScheduleFree, move, warmup
from .torch_operations import steps


@steps("ScheduleFreeSGD", "z", copies=("z",), scalars=("lr_max", "weight_sum"))
def _torch_step(group: Mapping[str, Any], p: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: float) -> None:
    change = grad + group["weight_decay"] * p if group["weight_decay"] else grad
    move(p, change, state, group, group["lr"] * warmup(group, step), step)


class ScheduleFreeSGD(ScheduleFree, signatures.ScheduleFreeSGD):
    r"""Schedule-Free SGD: a weighted mean of all points instead of a schedule of the learning rate.

    At step :math:`t`, with the gradient :math:`g_t` at :math:`y_{t-1}` (negated with ``maximize``), element by element,
    and :math:`x_0 = y_0 = z_0` the initial parameter:

    .. math::
        \gamma_t &= \gamma \min(1, t / T_{\text{warmup}}) \\
        z_t &= z_{t-1} - \gamma_t (g_t + \lambda y_{t-1}) \\
        w_t &= t^r \max(\gamma_1, \dots, \gamma_t)^q, \qquad c_t = w_t / (w_1 + \dots + w_t) \\
        x_t &= (1 - c_t) x_{t-1} + c_t z_t \\
        y_t &= (1 - \mu) z_t + \mu x_t

    During training the parameters are at :math:`y_t`, where the next gradient is computed. Call ``optimizer.eval()``
    before evaluating or saving the model, and ``optimizer.train()`` before continuing training.
    :class:`ScheduleFreeAdamW` describes both modes, and their effect on checkpoints, batch normalization, ``average``,
    ``copy_to`` and :class:`Lookahead`.

    The authors' implementation computes :math:`x` from :math:`y` and back, which loses bits each time, starts in
    evaluation mode, and writes to the gradient.

    Source: Defazio et al. 2024, "The Road Less Scheduled", arXiv:2405.15682.

    Args:
        params: Parameters, named parameters, or parameter groups, of any shape and strides. The kernels step float32,
            float64, bfloat16, float16 and their complex dtypes on CPUs and GPUs; torch operations step others.
        lr: Learning rate :math:`\gamma`; a float, or a tensor of one element.
        momentum: :math:`\mu`, the share of the mean in the point where gradients are computed, in (0, 1).
        weight_decay: :math:`\lambda`, at :math:`y`.
        warmup_steps: :math:`T_{\text{warmup}}`, >= 0. 0: no warm-up.
        r: Exponent of the step in the weights of the mean, >= 0.
        weight_lr_power: :math:`q`, exponent of the learning rate in the weights of the mean, >= 0.
        maximize: Ascend instead of descend.
        capturable: Keep the step count and the scalars on the GPU, so that a CUDA graph can capture the step.
        state_dtype: dtype of ``z``: torch.float32, float64, bfloat16 or float16; None: the parameter's,
            but float32 for 16-bit parameters.

    Further arguments, documented at ``__init__``: ``master`` (see :doc:`/master_weights`), ``stochastic_rounding`` and
    ``rounding_seed`` (see :doc:`/stochastic_rounding`), and those of :doc:`/step_tail`: ``max_norm``, ``norm_type``,
    ``clip_value``, ``skip_nonfinite``, ``average``, ``copy_to``, ``zero_grad``.

    Raises:
        TypeError: A hyperparameter is not a number.
        ValueError: A hyperparameter is out of range.
        RuntimeError: At the step, if a gradient is sparse, or after ``eval()`` without ``train()``.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = onepass.ScheduleFreeSGD(model.parameters(), lr=1.0)
        >>> model(torch.ones(8, 4)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.eval()  # now evaluate, or save the model
        >>> optimizer.train()  # now continue training
        >>> sorted(optimizer.state[model.weight])
        ['lr_max', 'step', 'weight_sum', 'z']
    """

    rule = "schedule_free_sgd"
    torch_step = _torch_step
