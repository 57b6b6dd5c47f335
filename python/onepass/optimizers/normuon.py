"""NorMuon."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import signatures
from .arguments import HyperTypes, number
from .declared import check_adjust_lr_fn
from .muon import Item, Orthogonalizing, orthogonalized
from .torch_operations import write
from .torch_private import adjusted_lr

_MATCHING = "match_rms_adamw"
_TINY = 1e-10  # keeps divisors from zero, as in the authors' implementation


def _rate(group: Mapping[str, Any], lr: float, shape: torch.Size) -> float:
    """Return the rate of an update that has been normalized."""
    return 0.2 * lr if group["adjust_lr_fn"] in (None, _MATCHING) else adjusted_lr(lr, group["adjust_lr_fn"], shape)


def _normalized(group: Mapping[str, Any], ortho: Tensor, second_momentum: Tensor) -> Tensor:
    """Advance the second moments of the rows, and return the update with normalized rows."""
    dtype = torch.promote_types(second_momentum.dtype, torch.float32)
    wide = ortho.to(dtype)
    squares = wide.square().mean(-1, keepdim=True)
    moments = torch.lerp(second_momentum.to(dtype), squares, 1 - group["beta2"])
    write(second_momentum, moments)
    factors = 1 / (moments.sqrt() + _TINY)
    # Means of squares over the whole matrix, of which each row has as many elements.
    rms = (squares * factors.square()).mean().sqrt().clamp_min(_TINY)
    wanted = squares.mean().sqrt() if group["adjust_lr_fn"] == "original" else 1.0
    return wide * (factors * (wanted / rms))


def _new_second_momentum(grad: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.zeros_like(grad[:, :1], dtype=dtype, memory_format=torch.contiguous_format)


@torch.no_grad()
def _torch_step(self: Optimizer) -> None:
    for group in self.param_groups:
        for p in (p for p in group["params"] if p.grad is not None):
            if p.is_complex():
                raise RuntimeError("NorMuon does not support complex parameters")
            if p.grad.is_sparse:
                raise RuntimeError("NorMuon does not support sparse gradients")
    for group in self.param_groups:
        lr = number(group["lr"])
        for p in (p for p in group["params"] if p.grad is not None):
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p.grad, memory_format=torch.preserve_format)
            if "second_momentum_buffer" not in state:
                state["second_momentum_buffer"] = _new_second_momentum(p.grad)
            buffer = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
            update = p.grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer.clone()
            if not p.numel():
                continue
            change = _normalized(group, orthogonalized(group, update), state["second_momentum_buffer"])
            write(p, p * (1 - lr * group["weight_decay"]) - _rate(group, lr, p.shape) * change)


class NorMuon(Orthogonalizing, signatures.NorMuon):
    r"""NorMuon: Muon with a second moment for each row (neuron), which evens out their updates. For matrices only.

    With the gradient :math:`G_t`, a matrix of :math:`n` rows and :math:`m` columns, and :math:`O_t` as in
    :class:`Muon`:

    .. math::
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) \, \mathrm{mean}_{\text{columns}}(O_t \odot O_t) \\
        \hat O_t &= O_t / (\sqrt{v_t} + 10^{-10}) \text{, row by row} \\
        \theta_t &= \theta_{t-1} - \gamma \lambda \theta_{t-1}
                    - 0.2 \gamma \frac{\sqrt{n m}}{\|\hat O_t\|_F} \hat O_t

    so the root mean square of an update is :math:`0.2 \gamma`, as with AdamW. With ``adjust_lr_fn="original"`` it is
    that of Muon's update, as in the authors' implementation: the factor is :math:`\gamma \sqrt{\max(1, n / m)} \,
    \|O_t\|_F / \|\hat O_t\|_F`.

    The iterations and the normalization run in torch operations, the other element-wise operations in the kernels.

    Source: Li et al. 2025, "NorMuon: Making Muon more efficient and scalable", arXiv:2510.05491.

    Args:
        params: Parameters, named parameters, or parameter groups: matrices of any strides. The kernels step float32,
            float64, bfloat16 and float16 on CPUs and GPUs; torch operations step DTensors.
        lr: Learning rate :math:`\gamma`; a float, or a tensor of one element.
        weight_decay: :math:`\lambda`, decoupled.
        momentum: :math:`\mu`, in [0, 1).
        beta2: :math:`\beta_2`, in [0, 1).
        nesterov: Nesterov momentum.
        ns_coefficients: :math:`a, b, c` of the iterations.
        eps: Smallest norm by which the iterations divide.
        ns_steps: Number of iterations, less than 100.
        adjust_lr_fn: ``"match_rms_adamw"`` (the default, also None) or ``"original"``.
        state_dtype: dtype of ``momentum_buffer`` and of ``second_momentum_buffer``, which has one number for each row:
            torch.float32, float64, bfloat16 or float16; None: the gradient's.

    Further arguments, documented at ``__init__``: ``cautious_weight_decay`` (see :doc:`/cautious`), and those of
    :doc:`/step_tail`: ``max_norm``, ``norm_type``, ``clip_value``, ``skip_nonfinite``, ``average``, ``copy_to``,
    ``zero_grad``.

    Raises:
        TypeError: A hyperparameter is not a number.
        ValueError: A hyperparameter is out of range, or a parameter is not a matrix.
        RuntimeError: At the step, if a parameter is complex or a gradient sparse.

    Example:
        >>> model = torch.nn.Linear(4, 2, bias=False)  # matrices only
        >>> optimizer = onepass.NorMuon(model.parameters(), lr=1e-3)
        >>> model(torch.ones(8, 4)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[model.weight]["second_momentum_buffer"].shape
        torch.Size([2, 1])
    """

    torch_step = _torch_step
    buffers = ("momentum_buffer", "second_momentum_buffer")

    @classmethod
    def _hyper_types(cls) -> HyperTypes:
        return {**super()._hyper_types(), "beta2": False}

    def _check_group(self, group: Mapping[str, Any], number: int) -> None:
        super()._check_group(group, number)
        check_adjust_lr_fn(f"NorMuon: group {number}", group.get("adjust_lr_fn"))

    def _new_state(self, group: dict[str, Any], p: Tensor, grad: Tensor, name: str) -> Tensor:
        if name == "second_momentum_buffer":
            return _new_second_momentum(grad, group.get("state_dtype"))
        return super()._new_state(group, p, grad, name)

    def _check_states(self, items: list[Item]) -> None:
        for _, p, _ in items:
            held = self.state.get(p, {}).get("second_momentum_buffer")
            shape = len(p), min(1, p.shape[1])  # as _new_second_momentum makes it
            if held is not None and (held.shape != shape or held.device != p.device):
                raise ValueError(
                    f"NorMuon: the state second_momentum_buffer of a parameter of shape {tuple(p.shape)} on {p.device} "
                    f"must have shape {shape}, got {tuple(held.shape)} on {held.device}"
                )

    def _descent(self, group: dict[str, Any], p: Tensor, ortho: Tensor) -> tuple[Tensor, float]:
        change = _normalized(group, ortho, self.state[p]["second_momentum_buffer"])
        return change, _rate(group, number(group["lr"]), p.shape)
