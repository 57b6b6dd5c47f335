"""SparseAdam."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import signatures
from .base import Native
from .hooks import unhooked


class SparseAdam(Native, signatures.SparseAdam):
    r"""Adam for sparse gradients, a drop-in replacement for :class:`torch.optim.SparseAdam`.

    At the parameter's step :math:`t`, with the gradient :math:`g_t` (negated with ``maximize``), for the elements for
    which the gradient has entries:

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        \theta_t &= \theta_{t-1}
                    - \gamma \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \frac{m_t}{\sqrt{v_t} + \epsilon}

    All other elements and their averages are not changed. Entries with the same index are summed. :math:`\epsilon` is
    added to :math:`\sqrt{v_t}`, before the bias correction; :class:`AdamW` adds it after.

    Source: Kingma and Ba 2015, arXiv:1412.6980, in the form that torch uses.

    Args:
        params: Parameters, named parameters, or parameter groups, dense and real. The kernels step contiguous float32,
            float64, bfloat16 and float16 parameters on the CPU; torch's implementation steps others. Gradients must be
            sparse (``layout=torch.sparse_coo``), as those of ``torch.nn.Embedding(..., sparse=True)`` are.
        lr: Learning rate :math:`\gamma`, greater than 0; a float, or a tensor of one element.
        betas: Decay rates :math:`\beta_1, \beta_2` of the two averages, in [0, 1).
        eps: :math:`\epsilon`, added to the denominator; greater than 0.
        maximize: Ascend instead of descend.
        state_dtype: dtype of ``exp_avg`` and ``exp_avg_sq``: torch.float32, float64, bfloat16, float16 or
            float8_e4m3fn; None: the parameter's, as in torch.

    Further arguments, documented at ``__init__``: ``master`` (see :doc:`/master_weights`), ``stochastic_rounding`` and
    ``rounding_seed`` (see :doc:`/stochastic_rounding`), and those of :doc:`/step_tail`: ``max_norm``, ``norm_type``,
    ``clip_value``, ``skip_nonfinite``, ``average``, ``copy_to``, ``zero_grad``.

    Raises:
        TypeError: A hyperparameter is not a number.
        ValueError: A hyperparameter is out of range, or a parameter is sparse or complex; at the step, if an index is
            out of bounds.
        RuntimeError: At the step, if a gradient is dense.

    Example:
        >>> embedding = torch.nn.Embedding(1000, 16, sparse=True)
        >>> optimizer = onepass.SparseAdam(embedding.parameters(), lr=1e-3)
        >>> embedding(torch.tensor([3, 7])).sum().backward()
        >>> optimizer.step()  # updates rows 3 and 7
        >>> sorted(optimizer.state[embedding.weight])
        ['exp_avg', 'exp_avg_sq', 'step']
    """

    rule = "sparse_adam"
    torch_step = unhooked(torch.optim.SparseAdam)

    def _new_scalar(self, group: dict[str, Any], p: Tensor, name: str) -> Any:
        return 0  # torch's SparseAdam keeps the step count as a Python int
