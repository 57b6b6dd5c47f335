"""Muon."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import _core
from . import signatures
from .arguments import HyperTypes, check_hyperparameters, number, whole_at_least
from .base import Native
from .fallback import step_by_torch
from .gradient_norm import is_dtensor
from .hooks import unhooked
from .torch_operations import batches
from .torch_private import adjusted_lr, newton_schulz

# Parameters are stepped in batches of at most this many elements (or of one larger parameter), to bound scratch memory.
SCRATCH = 1 << 24

_COEFFICIENTS: HyperTypes = {"ns_coefficients": (False, False, False)}

# A parameter of one step: its group, the parameter, its gradient.
Item = tuple[dict[str, Any], Tensor, Tensor]


class Orthogonalizing(Native):
    """The base of Muon and its variants: steps of matrices whose momentum torch's matrix products orthogonalize."""

    rule = "muon_momentum"
    is_elementwise = False
    buffers: ClassVar[Sequence[str]] = ("momentum_buffer",)  # names of the states

    @classmethod
    def _state_names(cls) -> list[str]:
        return [*cls.buffers]

    @classmethod
    def _hyper_types(cls) -> HyperTypes:
        return {**super()._hyper_types(), "eps": False}

    @classmethod
    def _cautious_options(cls) -> frozenset[str]:
        return frozenset({"cautious_weight_decay"})

    def _check_params(self, params: list[Tensor]) -> None:
        for p in params:
            if p.ndim != 2:  # the words of torch's constructor
                name = type(self).__name__
                raise ValueError(
                    f"{name} only supports 2D parameters whereas we found a parameter with size: {p.size()}"
                )

    def _new_state(self, group: dict[str, Any], p: Tensor, grad: Tensor, name: str) -> Tensor:
        return torch.zeros_like(grad, dtype=group.get("state_dtype"), memory_format=torch.preserve_format)

    # The step is not one element-wise rule: the plan only separates kernel parameters from fallbacks.

    def _explain(self) -> list[tuple[int, int, str, str]]:
        def path(group: int, index: int, path: str, reason: str) -> tuple[int, int, str, str]:
            if path == "kernel" and (unsupported := _unsupported_reason(self.param_groups[group]["params"][index])):
                return group, index, "torch", unsupported
            return group, index, path, reason

        return [path(*row) for row in super()._explain()]

    def _step_with_scaler(self, found_inf: Tensor | int) -> bool:
        return False

    def _step_natively(self, grad_factor: float) -> None:
        if (tail := self._tail_of_step()) is None:
            self._step_parts(grad_factor)
        else:
            tail.around(self, grad_factor, self._step_parts)

    def _step_parts(self, grad_factor: float) -> None:
        for index, group in enumerate(self.param_groups):
            self._check_types(group, index)
            if stepped := [p for p in group["params"] if p.grad is not None]:
                self._check_params(stepped)  # again, because their data may have been exchanged
                check_iterations(f"{type(self).__name__}: group {index}", group)
                self._check_group(group, index)
        items, fallback = self._divide()
        self._check_states(items)
        update = self._slow_weight_update
        if update:
            update.before(p for _, p, _ in items)
        if fallback:
            step_by_torch(self, fallback, grad_factor)
        self._create_states([(group, p, grad, self._state_names(), []) for group, p, grad in items], [], [])
        threads = torch.get_num_threads()
        for part in batches([item for item in items if item[1].numel() > 0], SCRATCH, lambda item: item[1].numel()):
            self._step_part(part, grad_factor, threads)
        if update:
            update.after(p for group in self.param_groups for p in group["params"])
        _core.count(Counter(p.device.type for _, p, _ in items), Counter(reason for _, _, reason in fallback))

    def _divide(self) -> tuple[list[Item], list[tuple[int, int, str]]]:
        """Return the parameters that the kernels step, and (group, index, reason) of each fallback."""
        kernel, fallback = self._plan.divide(self)
        items: list[Item] = []
        for g, index in kernel:
            group = self.param_groups[g]
            p = group["params"][index]
            if reason := _unsupported_reason(p):
                fallback.append((g, index, reason))
            else:
                items.append((group, p, p.grad.resolve_neg()))
        return items, fallback

    def _step_part(self, items: list[Item], grad_factor: float, threads: int) -> None:
        updates = [torch.empty_like(p, dtype=_update_dtype(p)) for _, p, _ in items]
        momentum: dict[tuple[float, ...], list[tuple[Tensor, ...]]] = {}
        for (group, p, grad), update in zip(items, updates, strict=True):
            shared = (float(group["momentum"]), float(bool(group["nesterov"])))
            momentum.setdefault(shared, []).append((update, grad, self.state[p]["momentum_buffer"]))
        for hyper, rows in momentum.items():
            _core.apply("muon_momentum", list(hyper), 1.0, rows, grad_factor, threads)

        descent: dict[tuple[float, ...], list[tuple[Tensor, ...]]] = {}
        for (group, p, _), update in zip(items, updates, strict=True):
            direction, rate = self._descent(group, p, orthogonalized(group, update))
            cautious = float(bool(group.get("cautious_weight_decay")))
            decay = number(group["lr"]) * group["weight_decay"]
            descent.setdefault((decay, rate, cautious), []).append((p, direction))
        for hyper, rows in descent.items():
            _core.apply("muon", list(hyper), 1.0, rows, 1.0, threads)

    def _check_states(self, items: list[Item]) -> None:
        """Raise ValueError, before anything is written, if a state that only this class has does not fit."""

    def _descent(self, group: dict[str, Any], p: Tensor, ortho: Tensor) -> tuple[Tensor, float]:
        """Return the direction of a parameter's step and its rate, from the orthogonalized momentum."""
        return ortho, adjusted_lr(number(group["lr"]), group["adjust_lr_fn"], p.shape)


class Muon(Orthogonalizing, signatures.Muon):
    r"""Muon (orthogonalized momentum, for matrices only), a drop-in replacement for :class:`torch.optim.Muon`.

    With the gradient :math:`G_t`, a matrix of :math:`n` rows and :math:`m` columns:

    .. math::
        B_t &= \mu B_{t-1} + (1 - \mu) G_t \\
        \tilde{B}_t &= (1 - \mu) G_t + \mu B_t \text{ with nesterov, else } B_t \\
        O_t &= \mathrm{NS}_k^{(a, b, c)}(\tilde{B}_t) \\
        \theta_t &= \theta_{t-1} - \gamma \lambda \theta_{t-1} - \gamma' O_t

    NS divides by the norm (at least :math:`\epsilon`) and iterates
    :math:`X \leftarrow a X + (b X X^\top + c (X X^\top)^2) X`, :math:`k` times, in bfloat16. The iterations run torch's
    matrix products; the element-wise operations run in the kernels. The rate :math:`\gamma'` is
    :math:`\gamma \sqrt{\max(1, n / m)}` or, to match the RMS of AdamW's updates, :math:`0.2 \gamma \sqrt{\max(n, m)}`.

    For a whole model, :func:`onepass.create` returns an optimizer that steps the other parameters by AdamW:
    ``create("muon", model)``.

    There are two differences from torch's class. Without Nesterov momentum, the iterations do not overwrite a bfloat16
    momentum buffer (torch normalizes it in place). An empty parameter is not changed (torch divides by zero).

    Sources: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks",
    https://kellerjordan.github.io/posts/muon/; Liu et al. 2025, "Muon is Scalable for LLM Training", arXiv:2502.16982.

    Args:
        params: Parameters, named parameters, or parameter groups: matrices of any strides. The kernels step float32,
            float64, bfloat16 and float16 on CPUs and GPUs; torch's implementation steps others.
        lr: Learning rate :math:`\gamma`; a float, or a tensor of one element.
        weight_decay: :math:`\lambda`, decoupled.
        momentum: :math:`\mu`.
        nesterov: Nesterov momentum.
        ns_coefficients: :math:`a, b, c`.
        eps: :math:`\epsilon`.
        ns_steps: Number of iterations :math:`k`, less than 100.
        adjust_lr_fn: Formula of :math:`\gamma'`: ``"original"`` (the default, also None) or ``"match_rms_adamw"``.
        state_dtype: dtype of ``momentum_buffer``: torch.float32, float64, bfloat16 or float16; None: the gradient's, as
            in torch.

    Further arguments, documented at ``__init__``: ``cautious_weight_decay`` (see :doc:`/cautious`), and those of
    :doc:`/step_tail`: ``max_norm``, ``norm_type``, ``clip_value``, ``skip_nonfinite``, ``average``, ``copy_to``,
    ``zero_grad``.

    Raises:
        TypeError: A hyperparameter is not a number.
        ValueError: A hyperparameter is out of range, or a parameter is not a matrix.
        RuntimeError: At the step, if a parameter is complex or a gradient sparse.

    Example:
        >>> model = torch.nn.Linear(4, 2, bias=False)  # matrices only
        >>> optimizer = onepass.Muon(model.parameters(), lr=0.02)
        >>> model(torch.ones(8, 4)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['momentum_buffer']
    """

    torch_step = unhooked(torch.optim.Muon)


def _unsupported_reason(p: Tensor) -> str:
    """Return why the kernels do not step a parameter that an element-wise rule could step; "" if they do."""
    if p.is_complex():
        return "complex parameter"
    return "tensor subclass DTensor" if is_dtensor(p) else ""  # the products need the whole matrix


def _update_dtype(p: Tensor) -> torch.dtype:
    """Return the dtype of the iterations' input, in which the momentum is computed; they cast it to bfloat16 anyway."""
    return torch.float64 if p.dtype == torch.float64 else torch.bfloat16


def orthogonalized(group: dict[str, Any], update: Tensor) -> Tensor:
    """Return a matrix with its singular values brought near one. The matrix may be overwritten."""
    return newton_schulz(update, group["ns_coefficients"], int(group["ns_steps"]), group["eps"])


def check_iterations(where: str, group: dict[str, Any]) -> None:
    """Raise before anything is written what torch's iterations would raise in the middle of the step.

    Raises:
        TypeError: ``ns_steps`` is not an integer, or ``ns_coefficients`` are not numbers.
        ValueError: ``ns_steps`` or ``ns_coefficients`` is out of range.
    """
    steps, coefficients = whole_at_least(f"{where}: ns_steps", group["ns_steps"], 0), group["ns_coefficients"]
    if steps >= 100 or (hasattr(coefficients, "__len__") and len(coefficients) != 3):
        orthogonalized(group, torch.zeros(1, 1))  # raises in torch's words
    check_hyperparameters(where, _COEFFICIENTS, group)
