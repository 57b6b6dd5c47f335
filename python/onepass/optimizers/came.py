"""CAME."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import signatures
from .arguments import HyperTypes, number
from .base import Native
from .declared import CAME_TYPES
from .torch_operations import check, norm_of, value_of, wide, write

_OF_MATRIX = ["exp_avg_sq_row", "exp_avg_sq_col", "exp_avg", "exp_avg_res_row", "exp_avg_res_col"]
_OF_VECTOR = ["exp_avg_sq", "exp_avg"]


def _names_of(p: Tensor) -> list[str]:
    return _OF_MATRIX if p.ndim > 1 else _OF_VECTOR


def _shape_of(p: Tensor, name: str) -> torch.Size:
    shape = list(p.shape)
    if name.endswith(("_row", "_col")):
        shape[-1 if name.endswith("_row") else -2] = 1
    return torch.Size(shape)


def _new_state(p: Tensor, name: str, dtype: torch.dtype | None = None) -> Tensor:
    """Return a new state: second moments are float32 at least, because a mean of squares underflows in float16."""
    if name == "exp_avg":
        return torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
    at_least_float32 = torch.promote_types(p.dtype, torch.float32)
    if name == "exp_avg_sq":
        return torch.zeros_like(p, dtype=at_least_float32, memory_format=torch.preserve_format)
    return p.new_zeros(_shape_of(p, name), dtype=at_least_float32)


def _averaged(moments: Tensor, squares: Tensor, beta: float) -> Tensor:
    return write(moments, moments * beta + (1 - beta) * squares)


def _divided(values: Tensor, squares: Tensor, rows: Tensor, columns: Tensor, beta: float) -> Tensor:
    """Advance the second moments of rows and columns, and return values divided by their roots."""
    rows = _averaged(rows, squares.mean(-1, keepdim=True), beta)
    columns = _averaged(columns, squares.mean(-2, keepdim=True), beta)
    return values * (rows / rows.mean(-2, keepdim=True)).rsqrt() * columns.rsqrt()


def _update(group: Mapping[str, Any], p: Tensor, grad: Tensor, state: Mapping[str, Tensor]) -> None:
    beta1, beta2, beta3 = map(number, group["betas"])
    eps1, eps2 = map(number, group["eps"])
    lr, grad = number(group["lr"]), wide(grad)
    squares = grad.square() + eps1
    if p.ndim > 1:
        update = _divided(grad, squares, state["exp_avg_sq_row"], state["exp_avg_sq_col"], beta2)
    else:
        update = grad * _averaged(state["exp_avg_sq"], squares, beta2).rsqrt()
    rms = value_of(norm_of(update)) / p.numel() ** 0.5
    update = update / max(1.0, rms / number(group["clip_threshold"]))
    m = state["exp_avg"]
    write(m, wide(m).lerp(update, 1 - beta1))
    change = wide(m)
    if p.ndim > 1:
        residual = (update - change).square() + eps2
        change = _divided(change, residual, state["exp_avg_res_row"], state["exp_avg_res_col"], beta3)
    write(p, wide(p) * (1 - lr * number(group["weight_decay"])) - lr * change)


@torch.no_grad()
def _torch_step(self: Optimizer) -> None:
    check("CAME", self)
    for group in self.param_groups:
        for p in (p for p in group["params"] if p.grad is not None):
            if p.is_complex():
                raise RuntimeError("CAME does not support complex parameters")
            for name in _names_of(p):
                held, shape = self.state.get(p, {}).get(name), _shape_of(p, name)
                if held is not None and held.shape != shape:
                    raise ValueError(
                        f"CAME: the state {name} of a parameter of shape {tuple(p.shape)} must have shape "
                        f"{tuple(shape)}, got {tuple(held.shape)}"
                    )
        if number(group["clip_threshold"]) == 0:
            raise ZeroDivisionError("CAME: clip_threshold is zero")
    for group in self.param_groups:
        for p in (p for p in group["params"] if p.grad is not None):
            state = self.state[p]
            for name in _names_of(p):
                if name not in state:
                    state[name] = _new_state(p, name)
            if p.numel():
                _update(group, p, -p.grad if group.get("maximize") else p.grad, state)


class CAME(Native, signatures.CAME):
    r"""CAME: Adafactor with momentum that is divided by the root of a factored average of (update - momentum)^2.

    With the gradient :math:`G_t` (negated with ``maximize``), a matrix of :math:`n` rows and :math:`m` columns, or a
    batch of such matrices:

    .. math::
        R_t &= \beta_2 R_{t-1} + (1 - \beta_2) \tfrac{1}{m} (G_t \odot G_t + \epsilon_1) 1_m \\
        C_t &= \beta_2 C_{t-1} + (1 - \beta_2) \tfrac{1}{n} 1_n^\top (G_t \odot G_t + \epsilon_1) \\
        U_t &= G_t / \sqrt{R_t C_t / (\tfrac{1}{n} 1_n^\top R_t)} \\
        \hat U_t &= U_t / \max(1, \operatorname{RMS}(U_t) / d) \\
        M_t &= \beta_1 M_{t-1} + (1 - \beta_1) \hat U_t \\
        S_t &= (\hat U_t - M_t) \odot (\hat U_t - M_t) + \epsilon_2 \\
        R'_t &= \beta_3 R'_{t-1} + (1 - \beta_3) \tfrac{1}{m} S_t 1_m \\
        C'_t &= \beta_3 C'_{t-1} + (1 - \beta_3) \tfrac{1}{n} 1_n^\top S_t \\
        \theta_t &= \theta_{t-1} - \gamma \lambda \theta_{t-1}
                    - \gamma M_t / \sqrt{R'_t C'_t / (\tfrac{1}{n} 1_n^\top R'_t)}

    For a vector, :math:`V_t = \beta_2 V_{t-1} + (1 - \beta_2) (G_t \odot G_t + \epsilon_1)` and
    :math:`U_t = G_t / \sqrt{V_t}` instead, and :math:`\theta_t = \theta_{t-1} - \gamma \lambda \theta_{t-1} - \gamma
    M_t`. RMS is the root mean square over the whole parameter. The averages have no bias correction.

    The states of a matrix have about one number for each element (``exp_avg``), where Adam's have two. An empty
    parameter is not changed.

    Source: Luo et al. 2023, "CAME: Confidence-guided Adaptive Memory Efficient Optimization", arXiv:2307.02047,
    algorithm 2. The authors' ``exp_avg_sq_row`` and the other row and column states lack the dimension of size 1 that
    they have here.

    Args:
        params: Parameters, named parameters, or parameter groups, of any shape and strides. The kernels step float32,
            float64, bfloat16 and float16 on the CPU; torch operations step others, tensors on GPUs, and DTensors.
        lr: Learning rate :math:`\gamma`; a float, or a tensor of one element. The authors use AdamW's rate, or a third
            of it.
        eps: :math:`\epsilon_1` and :math:`\epsilon_2`, which keep the second moments of gradients and of residuals
            above 0.
        clip_threshold: :math:`d`, the largest RMS of an update, above 0.
        betas: Decay rates :math:`\beta_1, \beta_2, \beta_3` of the averages, in [0, 1).
        weight_decay: :math:`\lambda`, decoupled.
        maximize: Ascend instead of descend.
        state_dtype: dtype of ``exp_avg``: torch.float32, float64, bfloat16 or float16; None: the parameter's. The other
            states are float32, or float64 for float64 parameters. Kernels use ``exp_avg`` after it has been rounded to
            its dtype; torch operations may round it at the end.

    Further arguments, documented at ``__init__`` and in :doc:`/step_tail`: ``max_norm``, ``norm_type``, ``clip_value``,
    ``skip_nonfinite``, ``average``, ``copy_to``, ``zero_grad``.

    Raises:
        TypeError: A hyperparameter is not a number.
        ValueError: A hyperparameter is out of range.
        RuntimeError: At the step, if a parameter is complex or a gradient sparse.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = onepass.CAME(model.parameters(), lr=2e-4)
        >>> model(torch.ones(8, 4)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[model.weight]["exp_avg_res_row"].shape
        torch.Size([2, 1])
    """

    rule = "came"
    is_elementwise = False
    wide_states = ("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq", "exp_avg_res_row", "exp_avg_res_col")
    torch_step = _torch_step

    @classmethod
    def _hyper_types(cls) -> HyperTypes:
        return CAME_TYPES

    @classmethod
    def _state_names(cls) -> list[str]:
        return ["exp_avg", *cls.wide_states]

    def _step_with_scaler(self, found_inf: Tensor | int) -> bool:
        return False  # CAME has no GPU kernels

    def _new_state(self, group: dict[str, Any], p: Tensor, grad: Tensor, name: str) -> Tensor:
        return _new_state(p, name, group.get("state_dtype"))
