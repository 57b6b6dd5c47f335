"""ScheduleFreeAdamW."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from . import signatures
from .schedule_free import ScheduleFree, move, warmup
from .torch_operations import steps


@steps("ScheduleFreeAdamW", "z", "exp_avg_sq", copies=("z",), scalars=("lr_max", "weight_sum"))
def _torch_step(group: Mapping[str, Any], p: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: float) -> None:
    beta2 = group["betas"][1]
    v = state["exp_avg_sq"].mul_(beta2).add_((1 - beta2) * grad.square())
    change = grad / ((v / (1 - beta2**step)).sqrt() + group["eps"])
    if group["weight_decay"]:
        change = change + group["weight_decay"] * p
    move(p, change, state, group, group["lr"] * warmup(group, step), step)


class ScheduleFreeAdamW(ScheduleFree, signatures.ScheduleFreeAdamW):
    r"""Schedule-Free AdamW: a weighted mean of all points instead of a schedule and of momentum.

    At step :math:`t`, with the gradient :math:`g_t` at :math:`y_{t-1}` (negated with ``maximize``), element by element,
    and :math:`x_0 = y_0 = z_0` the initial parameter:

    .. math::
        \gamma_t &= \gamma \min(1, t / T_{\text{warmup}}) \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        z_t &= z_{t-1} - \gamma_t \Bigl(\frac{g_t}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon} + \lambda y_{t-1}\Bigr) \\
        w_t &= t^r \max(\gamma_1, \dots, \gamma_t)^q, \qquad c_t = w_t / (w_1 + \dots + w_t) \\
        x_t &= (1 - c_t) x_{t-1} + c_t z_t \\
        y_t &= (1 - \beta_1) z_t + \beta_1 x_t

    During training the parameters are at :math:`y_t`, where the next gradient is computed. Call ``optimizer.eval()``
    before evaluating or saving the model: it sets the parameters to :math:`x_t`. Call ``optimizer.train()`` before
    continuing training: it restores :math:`y_t` bit for bit. No scheduler is needed; a constant ``lr`` after the
    warm-up is usual.

    - A ``state_dict`` may be saved in either mode, and contains the mode; load it with a model that was saved in the
      same mode. Save and load distributed checkpoints (torch.distributed.checkpoint) only after ``train()``: they
      cannot load the state that holds :math:`y_t` after ``eval()``.
    - Before evaluating a model with batch normalization, update its statistics at :math:`x_t`
      (:func:`torch.optim.swa_utils.update_bn`).
    - ``average`` and ``copy_to`` follow :math:`y_t`, and so do the slow weights of :class:`Lookahead`, which moves
      :math:`y_t` without :math:`z_t`.

    The paper multiplies :math:`\gamma_t` by :math:`\sqrt{1 - \beta_2^t}` instead of dividing :math:`v_t`; this class
    has the form of the authors' implementation since version 1.3. That implementation computes :math:`x` from :math:`y`
    and back, which loses bits each time, starts in evaluation mode, and writes to the gradient.

    Source: Defazio et al. 2024, "The Road Less Scheduled", arXiv:2405.15682, algorithm 1.

    Args:
        params: Parameters, named parameters, or parameter groups, of any shape and strides. The kernels step float32,
            float64, bfloat16, float16 and their complex dtypes on CPUs and GPUs; torch operations step others.
        lr: Learning rate :math:`\gamma`; a float, or a tensor of one element.
        betas: :math:`\beta_1`, the share of the mean in the point where gradients are computed, in (0, 1), and
            :math:`\beta_2`, the decay rate of the average of squares, in [0, 1).
        eps: :math:`\epsilon`, added to the denominator.
        weight_decay: :math:`\lambda`, at :math:`y`, decoupled from the average of squares.
        warmup_steps: :math:`T_{\text{warmup}}`, >= 0. 0: no warm-up.
        r: Exponent of the step in the weights of the mean, >= 0.
        weight_lr_power: :math:`q`, exponent of the learning rate in the weights of the mean, >= 0.
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
        >>> optimizer = onepass.ScheduleFreeAdamW(model.parameters(), lr=2.5e-3)
        >>> model(torch.ones(8, 4)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.eval()  # now evaluate, or save the model
        >>> optimizer.train()  # now continue training
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg_sq', 'lr_max', 'step', 'weight_sum', 'z']
    """

    rule = "schedule_free_adamw"
    torch_step = _torch_step
