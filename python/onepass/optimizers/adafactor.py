"""Adafactor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import signatures
from .arguments import HyperTypes
from .base import Native
from .hooks import unhooked

_torchs = unhooked(torch.optim.Adafactor)


def _torch_step(self: Adafactor) -> None:
    """Step by torch's implementation. It divides by the number of elements, so empty parameters are only counted."""
    groups = self.param_groups
    empty = [(group, p) for group in groups for p in group["params"] if p.grad is not None and p.numel() == 0]
    for group, p in empty:
        state = self.state[p]
        if "step" not in state:
            state["step"] = self._new_scalar(group, p, "step")
        for name in ("row_var", "col_var") if p.ndim > 1 else ("variance",):
            if name not in state:
                state[name] = self._new_state(group, p, p.grad, name)
        state["step"] += 1
    left_out = {p for _, p in empty}
    self.param_groups = [{**group, "params": [p for p in group["params"] if p not in left_out]} for group in groups]
    try:
        _torchs(self)
    finally:
        self.param_groups = groups


class Adafactor(Native, signatures.Adafactor):
    r"""Adafactor, a drop-in replacement for :class:`torch.optim.Adafactor`.

    With the gradient :math:`G_t` (negated with ``maximize``), a matrix of :math:`n` rows and :math:`m` columns, or a
    batch of such matrices:

    .. math::
        w_t &= t^\tau \\
        R_t &= R_{t-1} + w_t (\tfrac{1}{m} (G_t \odot G_t) 1_m - R_{t-1}) \\
        C_t &= C_{t-1} + w_t (\tfrac{1}{n} 1_n^\top (G_t \odot G_t) - C_{t-1}) \\
        V_t &= R_t C_t / \max(\tfrac{1}{n} 1_n^\top R_t, \epsilon_1) \\
        U_t &= G_t / \sqrt{\max(V_t, \epsilon_1^2)} \\
        \alpha_t &= \max(\epsilon_2, \operatorname{RMS}(\theta_{t-1})) \min(\gamma, 1 / \sqrt{t}) \\
        \theta_t &= \theta_{t-1} - \gamma \lambda \theta_{t-1} - \alpha_t U_t / \max(1, \operatorname{RMS}(U_t) / d)

    For a vector, :math:`V_t = V_{t-1} + w_t (G_t \odot G_t - V_{t-1})` instead. RMS is the root mean square over the
    whole parameter. All sums are accumulated in float64, in an order that depends only on the parameter's shape.

    An empty parameter is not changed; torch's class divides by zero there.

    Source: Shazeer and Stern 2018, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", arXiv:1804.04235,
    in torch's form: :math:`\gamma` bounds the relative step size, :math:`\epsilon_1` is applied to the estimate
    rather than to the squared gradients, and the weight decay is decoupled.

    Args:
        params: Parameters, named parameters, or parameter groups, of any shape and strides. The kernels step float32,
            float64, bfloat16 and float16 on the CPU; torch's implementation steps others.
        lr: Upper bound :math:`\gamma` of the relative step size, and the rate of the weight decay; a float, or a tensor
            of one element.
        beta2_decay: Exponent :math:`\tau \le 0` of the decay.
        eps: :math:`\epsilon_1` and :math:`\epsilon_2`. If the first is None, it is the machine epsilon of each
            parameter's dtype. (torch uses the first parameter's dtype for the whole group.)
        d: Clipping threshold :math:`d`, at least 1.
        weight_decay: :math:`\lambda`.
        foreach: For compatibility; used only where torch's implementation steps the parameter.
        maximize: Ascend instead of descend.
        state_dtype: dtype of ``row_var``, ``col_var`` and ``variance``: torch.float32, float64, bfloat16 or float16;
            None: the gradient's, as in torch.

    Further arguments, documented at ``__init__`` and in :doc:`/step_tail`: ``max_norm``, ``norm_type``, ``clip_value``,
    ``skip_nonfinite``, ``average``, ``copy_to``, ``zero_grad``.

    Raises:
        TypeError: A hyperparameter is not a number.
        ValueError: A hyperparameter is out of range.
        RuntimeError: At the step, if a parameter is complex or a gradient sparse.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = onepass.Adafactor(model.parameters(), lr=0.01)
        >>> model(torch.ones(8, 4)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['col_var', 'row_var', 'step']
    """

    rule = "adafactor"
    is_elementwise = False
    torch_step = _torch_step

    @classmethod
    def _hyper_types(cls) -> HyperTypes:
        return {"lr": False, "beta2_decay": False, "eps": (True, False), "d": False, "weight_decay": False}

    @classmethod
    def _state_names(cls) -> list[str]:
        return ["row_var", "col_var", "variance"]

    def _step_with_scaler(self, found_inf: Tensor | int) -> bool:
        return False  # Adafactor has no GPU kernels

    def _group_to_convert(self, group: dict[str, Any], p: Tensor) -> dict[str, Any]:
        eps1, eps2 = group["eps"]
        return {**group, "eps": (torch.finfo(p.dtype).eps if eps1 is None else eps1, eps2)}

    def _new_state(self, group: dict[str, Any], p: Tensor, grad: Tensor, name: str) -> Tensor:
        dtype = group.get("state_dtype")
        if name == "variance":
            return torch.zeros_like(grad, dtype=dtype, memory_format=torch.preserve_format)
        shape = list(grad.shape)
        shape[-1 if name == "row_var" else -2] = 1
        return grad.new_zeros(shape, dtype=dtype)
