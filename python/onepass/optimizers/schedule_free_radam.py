"""ScheduleFreeRAdam."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from . import signatures
from .schedule_free import ScheduleFree, move
from .torch_operations import steps


@steps("ScheduleFreeRAdam", "z", "exp_avg_sq", copies=("z",), scalars=("lr_max", "weight_sum"))
def _torch_step(group: Mapping[str, Any], p: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: float) -> None:
    beta2 = group["betas"][1]
    v = state["exp_avg_sq"].mul_(beta2).add_((1 - beta2) * grad.square())
    correction = 1 - beta2**step
    rho = 2 / (1 - beta2) - 1
    rho_t = rho - 2 * step * beta2**step / correction
    if rho_t > 4:
        rectification = ((rho_t - 4) * (rho_t - 2) * rho / ((rho - 4) * (rho - 2) * rho_t)) ** 0.5
        change = grad / ((v / correction).sqrt() + group["eps"])
    else:
        rectification = 0.0 if group["silent_sgd_phase"] else 1.0
        change = grad
    if group["weight_decay"]:
        change = change + group["weight_decay"] * p
    move(p, change, state, group, group["lr"] * rectification, step)


class ScheduleFreeRAdam(ScheduleFree, signatures.ScheduleFreeRAdam):
    r"""Schedule-Free RAdam: Schedule-Free AdamW with RAdam's rectification instead of a warm-up.

    At step :math:`t`, with the gradient :math:`g_t` at :math:`y_{t-1}` (negated with ``maximize``), element by element,
    and :math:`x_0 = y_0 = z_0` the initial parameter:

    .. math::
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        \rho &= 2 / (1 - \beta_2) - 1, \qquad \rho_t = \rho - 2 t \beta_2^t / (1 - \beta_2^t) \\
        \gamma_t &= \gamma \sqrt{\frac{(\rho_t - 4) (\rho_t - 2) \rho}{(\rho - 4) (\rho - 2) \rho_t}},
        \qquad u_t = \frac{g_t}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon} \quad\text{if } \rho_t > 4 \\
        \gamma_t &= 0 \text{, or } \gamma \text{ without } \texttt{silent\_sgd\_phase},
        \qquad u_t = g_t \quad\text{else} \\
        z_t &= z_{t-1} - \gamma_t (u_t + \lambda y_{t-1}) \\
        w_t &= t^r \max(\gamma_1, \dots, \gamma_t)^q, \qquad c_t = w_t / (w_1 + \dots + w_t) \\
        x_t &= (1 - c_t) x_{t-1} + c_t z_t \\
        y_t &= (1 - \beta_1) z_t + \beta_1 x_t

    During training the parameters are at :math:`y_t`, where the next gradient is computed. Call ``optimizer.eval()``
    before evaluating or saving the model, and ``optimizer.train()`` before continuing training.
    :class:`ScheduleFreeAdamW` describes both modes, and their effect on checkpoints, batch normalization, ``average``,
    ``copy_to`` and :class:`Lookahead`.

    The paper does not have this optimizer; the formula is that of the authors' implementation. That implementation
    computes :math:`x` from :math:`y` and back, which loses bits each time, starts in evaluation mode, and writes to the
    gradient.

    Sources: Defazio et al. 2024, "The Road Less Scheduled", arXiv:2405.15682; Liu et al. 2020, arXiv:1908.03265.

    Args:
        params: Parameters, named parameters, or parameter groups, of any shape and strides. The kernels step float32,
            float64, bfloat16, float16 and their complex dtypes on CPUs and GPUs; torch operations step others.
        lr: Learning rate :math:`\gamma`; a float, or a tensor of one element.
        betas: :math:`\beta_1`, the share of the mean in the point where gradients are computed, in (0, 1), and
            :math:`\beta_2`, the decay rate of the average of squares, in [0, 1).
        eps: :math:`\epsilon`, added to the denominator.
        weight_decay: :math:`\lambda`, at :math:`y`, decoupled from the average of squares.
        r: Exponent of the step in the weights of the mean, >= 0.
        weight_lr_power: :math:`q`, exponent of the learning rate in the weights of the mean, >= 0.
        silent_sgd_phase: Whether the parameters are not changed while the rectification is undefined (4 steps with the
            default betas). False: Schedule-Free SGD steps them.
        maximize: Ascend instead of descend.
        capturable: Keep the step count and the scalars on the GPU, so that a CUDA graph can capture the step.
        state_dtype: dtype of ``z`` and ``exp_avg_sq``: torch.float32, float64, bfloat16 or float16; None: the
            parameter's, but float32 for 16-bit parameters.

    Further arguments, documented at ``__init__``: ``master`` (see :doc:`/master_weights`), ``stochastic_rounding`` and
    ``rounding_seed`` (see :doc:`/stochastic_rounding`), and those of :doc:`/step_tail`: ``max_norm``, ``norm_type``,
    ``clip_value``, ``skip_nonfinite``, ``average``, ``copy_to``, ``zero_grad``.

    Raises:
        TypeError: A hyperparameter is not a number.
        ValueError: A hyperparameter is out of range.
        RuntimeError: At the step, if a gradient is sparse, or after ``eval()`` without ``train()``.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = onepass.ScheduleFreeRAdam(model.parameters(), lr=2.5e-3)
        >>> model(torch.ones(8, 4)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.eval()  # now evaluate, or save the model
        >>> optimizer.train()  # now continue training
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg_sq', 'lr_max', 'step', 'weight_sum', 'z']
    """

    rule = "schedule_free_radam"
    torch_step = _torch_step
