"""SAM."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import _core
from .arguments import check_flag, check_keys, check_number, check_optimizer
from .base import STATE_DTYPES
from .gradient_norm import is_plain, total_norm
from .hooks import evaluate, hooked, only_creates_states, params_of
from .master import confirm_low_bits, low_bits_are_valid
from .stochastic import has_16_bits
from .torch_operations import wide
from .torch_private import disable_dynamo, foreach_copy_
from .wrapper import Wrapper, loaded_with_hooks

EPS = 1e-12  # added to the norm


class SAM(Wrapper):
    r"""Sharpness-aware minimization (SAM): step any optimizer with the gradient at a nearby point of higher loss.

    With the gradient :math:`g` of all parameters :math:`\theta` together, each step evaluates the loss a second time,
    at

    .. math::
        \theta + \rho \frac{g}{\|g\| + 10^{-12}}
        \text{, or, if adaptive, } \theta + \rho \frac{\theta^2 g}{\|\theta g\| + 10^{-12}}

    with the 2-norm over all groups; the parameters of a group with ``maximize`` move against their gradient. Then the
    parameters are restored, bit for bit, and the wrapped optimizer steps them with the second gradient.

    ``step(closure)`` does all of this. It calls the closure twice, which resets the gradients, computes the loss and
    its gradients, and returns the loss, as for every optimizer of torch that takes a closure. Without a closure, call
    ``first_step()`` after the first backward pass, and ``step()`` after the second one. Use this form with
    ``torch.amp.GradScaler``; the first step does not depend on the loss scale.

    The kernels measure the norm in one pass over the gradients, and move the parameters in a second pass; if adaptive,
    torch operations do this. A copy of the parameters is kept between steps. On a GPU the first step waits for the
    norm.

    SAM is itself an optimizer, and works with schedulers and checkpoints. ``param_groups``, ``state`` and ``defaults``
    are the wrapped optimizer's, and so is the ``state_dict``, whose groups have the key ``sam``: ``rho`` and
    ``adaptive``. SAM and the wrapped optimizer can load each other's state_dict. Arguments such as ``max_norm`` and
    ``average`` belong to the wrapped optimizer, and affect only its step.

    With DistributedDataParallel, each process normally moves by the mean gradient. In the authors' method, each process
    moves by the gradient of its own batch: for this, call the first backward pass within ``model.no_sync()``.

    Sources: Foret et al. 2021, "Sharpness-Aware Minimization for Efficiently Improving Generalization",
    arXiv:2010.01412; adaptive: Kwon et al. 2021, "ASAM", arXiv:2102.11600, without its constant added to
    :math:`|\theta|`.

    Args:
        optimizer: The optimizer to wrap: torch's, onepass's or any other whose step needs no closure (not LBFGS).
        rho: :math:`\rho`, the length of the first step, >= 0. Usual values: 0.05; 0.5 to 2 if adaptive.
        adaptive: Whether the first step is scaled by the magnitude of each parameter (ASAM).

    Raises:
        TypeError: ``optimizer`` is not a ``torch.optim.Optimizer`` or needs a closure, ``rho`` is not a number, or
            ``adaptive`` is not a bool.
        ValueError: ``rho`` is negative or not finite.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = onepass.SAM(onepass.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.05)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = model(torch.ones(8, 4)).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)
        >>> closure().item() < loss.item()
        True
    """

    _setting: dict[str, Any]  # rho, adaptive; shared by all groups
    _begun: bool  # whether first_step() has been called, and the second part not yet
    _old: dict[Tensor, Tensor]  # copies of the parameters, whose memory is used again
    _moved: list[tuple[Tensor, int]]  # the parameters that the first step has moved, and their versions since
    _with_low_bits: list[Tensor]  # of these, those whose low bits (of a split master) were valid

    # GradScaler then calls step() also where it skips, so that the parameters are set back. Around the step it sets
    # grad_scale and found_inf.
    _step_supports_amp_scaling = True

    def __init__(self, optimizer: Optimizer, rho: float = 0.05, adaptive: bool = False) -> None:
        check_optimizer("SAM: optimizer", optimizer)
        if isinstance(optimizer, SAM | torch.optim.LBFGS):
            raise TypeError(f"SAM cannot wrap {type(optimizer).__name__}, whose step needs a closure")
        setting = _checked({"rho": rho, "adaptive": adaptive})
        self.__setstate__({"optimizer": optimizer, "_setting": setting})
        self._share()

    def __getstate__(self) -> dict[str, Any]:
        self._check_complete("copied")
        return {name: self.__dict__[name] for name in ("optimizer", "_setting")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._begun, self._old, self._moved, self._with_low_bits = False, {}, [], []
        super().__setstate__(state)

    def _check_complete(self, what: str) -> None:
        if self._begun:
            raise RuntimeError(f"SAM cannot be {what} between first_step() and step(): call restore() before")

    @property
    def rho(self) -> float:
        """Length of the first step. It can be set during training."""
        return float(self._setting["rho"])

    @rho.setter
    def rho(self, rho: float) -> None:
        self._setting.update(_checked({**self._setting, "rho": rho}))

    @property
    def adaptive(self) -> bool:
        """Whether the first step is scaled by the magnitude of each parameter."""
        return bool(self._setting["adaptive"])

    # -- the step ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Move the parameters that have a gradient to the nearby point of higher loss.

        If they are already there, they are first restored. If the norm is not finite, they are not moved.

        Args:
            zero_grad: Whether to reset the gradients afterwards.

        Raises:
            RuntimeError: A gradient is sparse; nothing has been moved.
        """
        self.restore()
        params = list(dict.fromkeys(params_of(self)))
        grads = [p.grad for p in params]
        if any(grad is not None and grad.layout != torch.strided for grad in grads):
            raise RuntimeError("SAM does not support sparse gradients")
        if self.adaptive:
            grads = [grad if grad is None else wide(p).abs() * grad for p, grad in zip(params, grads, strict=True)]
        is_meta = any(p.is_meta for p in params)  # its tensors have no values
        scale = 0.0 if is_meta else self.rho / (total_norm(params, grads, largest=False) + EPS)
        self._begun = True
        if math.isfinite(scale) and scale > 0.0:
            self._move([(p, grad) for p, grad in zip(params, grads, strict=True) if grad is not None], scale)
        if zero_grad:
            self.zero_grad()

    def _move(self, pairs: list[tuple[Tensor, Tensor]], scale: float) -> None:
        before, self._old = self._old, {}  # so that copies of parameters that are gone are freed
        for p, _ in pairs:
            old = before.get(p)
            if old is None or (old.dtype, old.shape, old.device) != (p.dtype, p.shape, p.device):
                old = torch.empty_like(p, memory_format=torch.preserve_format)
            self._old[p] = old
        _copy([(self._old[p], p) for p, _ in pairs])
        self._with_low_bits = [p for p, _ in pairs if low_bits_are_valid(p)]
        maximized = {p for group in self.param_groups if group.get("maximize") for p in group["params"]}
        for sign, own in (
            (1.0, [pair for pair in pairs if pair[0] not in maximized]),
            (-1.0, [pair for pair in pairs if pair[0] in maximized]),
        ):
            _add(own, sign * scale, self.adaptive)
        self._moved = [(p, _version(p)) for p, _ in pairs]

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the parameters, bit for bit, to their values before ``first_step()``; without one, do nothing.

        Parameters that have been changed since then are not restored.
        """
        same = [p for p, version in self._moved if _version(p) == version]
        _copy([(p, self._old[p]) for p in same])
        for p in set(same).intersection(self._with_low_bits):
            confirm_low_bits(p)
        self._begun, self._moved, self._with_low_bits = False, [], []

    def second_step(self, zero_grad: bool = False) -> None:
        """Restore the parameters and step the wrapped optimizer; the same as ``step()`` after ``first_step()``.

        For code that calls this method of the authors' implementation.

        Args:
            zero_grad: Whether to reset the gradients afterwards.
        """
        self.step()
        if zero_grad:
            self.zero_grad()

    def _update(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform a whole step with a closure, or its second part after ``first_step()``.

        Args:
            closure: Resets the gradients, computes the loss and the gradients, and returns the loss. It is called
                twice.

        Returns:
            What the closure returned first; without a closure, the result of the wrapped optimizer's step.

        Raises:
            RuntimeError: There is neither a closure nor a first step.
        """
        if closure is None:
            if not self._begun and not only_creates_states(self):
                raise RuntimeError("SAM: step() needs a closure, or first_step() before the second backward pass")
            self.restore()
            return self._step_scaled()
        self.restore()
        loss = evaluate(closure)
        self.first_step()
        try:
            evaluate(closure)
        finally:
            self.restore()
        self._step_scaled()
        return loss

    def _step_scaled(self) -> Any:
        """Step the wrapped optimizer by gradients that GradScaler may have left scaled, or skip the step for it."""
        scale, found_inf = self.__dict__.get("grad_scale"), self.__dict__.get("found_inf")
        if found_inf is None:
            return self._step_wrapped()
        if getattr(self.optimizer, "_step_supports_amp_scaling", False):
            inner: Any = self.optimizer
            inner.grad_scale, inner.found_inf = scale, found_inf
            try:
                return self._step_wrapped()
            finally:
                del inner.grad_scale, inner.found_inf
        if found_inf:
            return None
        if scale is not None:
            for p in params_of(self):
                if p.grad is not None:
                    p.grad.div_(scale.to(p.grad.device))
        return self._step_wrapped()

    step = hooked(_update, "SAM")

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def _own(self) -> tuple[str, dict[str, Any]]:
        return "sam", self._setting

    @disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's state_dict, with the key ``sam`` (rho and adaptive) in each group.

        Raises:
            RuntimeError: The parameters are at the point of the first step.
        """
        self._check_complete("saved")
        return super().state_dict()

    @disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this class, including rho and adaptive, or of the wrapped optimizer's class.

        Raises:
            ValueError: The state_dict does not match this optimizer; nothing has been loaded.
        """
        loaded_with_hooks(self, state_dict, self._load)

    def _load(self, state_dict: dict[str, Any]) -> None:
        found = self._own_in(state_dict)
        setting = _checked(self._setting if found is None else found)
        self.optimizer.load_state_dict(state_dict)
        self.restore()
        self._setting = setting
        self._share()


def _version(p: Tensor) -> int:
    """Return how often a parameter has been written; 0 for an inference tensor, which does not count."""
    return 0 if p.is_inference() else p._version


def _copy(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy the second tensor of each pair to the first."""
    plain = [pair for pair in pairs if _is_for_kernels(pair[0])]
    if plain:
        foreach_copy_([to for to, _ in plain], [source for _, source in plain])
    for to, source in pairs:
        if not _is_for_kernels(to):  # among them DTensors, for which torch has no foreach copy
            to.copy_(source)


def _add(pairs: list[tuple[Tensor, Tensor]], scale: float, adaptive: bool) -> None:
    """Add to each parameter ``scale`` times its gradient or, if adaptive, that times the parameter's magnitude."""
    rows: list[tuple[Tensor, ...]] = []
    for p, grad in pairs:
        if adaptive:
            was = wide(p)  # products of float16 numbers would overflow
            p.copy_(was + scale * (was.abs() * grad))
        elif _is_for_kernels(p) and _is_for_kernels(grad) and p.device == grad.device:
            rows.append((p, grad))
        elif has_16_bits(p):  # torch would round the scale to 16 bits
            p.copy_(wide(p) + scale * wide(grad))
        else:
            p.add_(grad, alpha=scale)
    _core.apply("muon", [0.0, -scale, 0.0], 1.0, rows, 1.0, torch.get_num_threads())  # p = p - -scale * grad


def _is_for_kernels(tensor: Tensor) -> bool:
    """Return whether a kernel takes this tensor."""
    return is_plain(tensor) and tensor.dtype in STATE_DTYPES and tensor.device.type == "cpu" and not tensor.is_neg()


def _checked(setting: Mapping[str, Any]) -> dict[str, Any]:
    """Return a new dict of rho and adaptive after checking them."""
    check_keys("SAM: the state_dict's 'sam'", setting, ("rho", "adaptive"))
    rho, adaptive = setting["rho"], setting["adaptive"]
    check_number("SAM: rho", rho)
    if not 0.0 <= rho < float("inf"):
        raise ValueError(f"SAM: rho must be >= 0 and finite, got {rho}")
    check_flag("SAM: adaptive", adaptive)
    return {"rho": float(rho), "adaptive": adaptive}
