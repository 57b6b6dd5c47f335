"""Steps within the backward pass: each gradient is used as soon as it is complete, and then freed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

from ..optimizers.arguments import check_optimizer
from ..optimizers.base import Native
from ..optimizers.combined import Combined
from ..optimizers.gradient_norm import is_plain
from ..optimizers.hooks import unhooked, unwrapped
from ..optimizers.torch_private import (
    copy_operator,
    disable_dynamo,
    foreach_zero_,
    foreach_zero_operator,
    make_subclass,
    profiler_enabled,
)
from ..optimizers.wrapper import Wrapper

_ZEROING = {torch.ops.aten.zero_.default, foreach_zero_operator}
_MOVING = {copy_operator, torch.ops.aten.detach.default}


class FreedGradient(Tensor):
    """Placeholder in ``.grad`` for a gradient that was used within ``backward()``: it has one element; using it raises.

    If ``.grad`` were None, ``clip_grad_norm_`` and ``GradScaler`` would find no gradients and silently do nothing. The
    operations of ``zero_grad`` and ``Module.to`` do not raise.
    """

    @classmethod
    def of(cls, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> FreedGradient:
        """Return a placeholder for a gradient of this shape, dtype and device."""
        element = torch.zeros((), dtype=dtype, device=device)
        return make_subclass(cls, element.expand(shape))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"FreedGradient({tuple(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in _ZEROING:
            if isinstance(args[0], list) and (others := [grad for grad in args[0] if not isinstance(grad, cls)]):
                foreach_zero_(others)
            return args[0]
        if func in _MOVING:
            made = kwargs or {}
            return cls.of(args[0].shape, made.get("dtype") or args[0].dtype, made.get("device") or args[0].device)
        raise RuntimeError(
            f"{func} reads a gradient that onepass.step_in_backward has used and freed within backward(): code that "
            "needs gradients afterwards (clip_grad_norm_, GradScaler, log_to, DistributedDataParallel) does not work"
        )


def _forget_freed(p: Tensor) -> None:
    if isinstance(p.grad, FreedGradient):
        p.grad = None


@contextlib.contextmanager
def freed_aside(params: Iterable[Tensor]) -> Iterator[None]:
    """Set freed gradients to None within this context, and put their placeholders back at its end."""
    freed = [(p, p.grad) for p in params if isinstance(p.grad, FreedGradient)]
    for p, _ in freed:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in freed:
            p.grad = grad


class StepInBackward:
    """Handle returned by :func:`step_in_backward`: parameters are updated within ``backward()`` until ``remove()``."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._steppers: dict[Tensor, tuple[_Stepper, tuple[RemovableHandle, ...]]] = {}
        self._accumulating = False
        self._hook = optimizer.register_step_pre_hook(self._before_step)
        self._join()

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Accumulate gradients within this context, without updates: for all micro-batches but the last."""
        before, self._accumulating = self._accumulating, True
        try:
            yield
        finally:
            self._accumulating = before

    def remove(self) -> None:
        """Remove all hooks: from now on ``optimizer.step()`` uses the gradients."""
        for p, (_, handles) in self._steppers.items():
            _forget_freed(p)
            for handle in handles:
                handle.remove()
        self._steppers = {}
        self._hook.remove()

    def _join(self) -> None:
        """Register hooks on parameters that were added to the optimizer or unfrozen."""
        for group in self._optimizer.param_groups:
            for p in group["params"]:
                if p.requires_grad and p not in self._steppers:
                    # The first hook runs before a gradient is put into .grad, the second after. Python's garbage
                    # collector does not see the references of the second hook, so that one holds a weak reference.
                    handles = (
                        p.register_hook(partial(self._before_gradient, p)),
                        p.register_post_accumulate_grad_hook(partial(_update_by, ref(self))),
                    )
                    self._steppers[p] = _Stepper(self._optimizer, p), handles

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(x is not None for x in (*args[1:], *kwargs.values())):
            raise RuntimeError(
                "step() takes no closure while the optimizer steps in backward: a closure's backward() updates the "
                "parameters before step() sees the loss; call remove() first, or step without a closure"
            )
        for p in self._steppers:
            _forget_freed(p)
        self._join()

    def _before_gradient(self, p: Tensor, _: Tensor) -> None:
        _forget_freed(p)

    def _update(self, p: Tensor) -> None:
        stepper = self._steppers[p][0]
        if not self._accumulating and stepper.step():
            p.grad = stepper.freed()


def _update_by(stepping: ref[StepInBackward], p: Tensor) -> None:
    # Within a compiled function, torch.compile also traces the hooks that autograd calls.
    if torch.compiler.is_compiling():
        _update_untraced(stepping, p)
    elif (held := stepping()) is not None:
        held._update(p)


_update_untraced = disable_dynamo(_update_by)


class _Stepper:
    """Step one parameter, with the states and hyperparameters that its optimizer has at that moment."""

    def __init__(self, optimizer: Optimizer, p: Tensor) -> None:
        self._optimizer, self._p = optimizer, p
        self._place = 0, 0  # the parameter's last known group, and its index in that group
        # An optimizer of the same class with this parameter only and its own plan. It has no hooks: step() of the
        # whole optimizer calls them. An attribute that replaces a method is bound to the whole optimizer: torch's
        # schedulers, for example, replace step().
        self._part = part = object.__new__(cls := type(optimizer))
        shared = {k: v for k, v in optimizer.__dict__.items() if not callable(getattr(cls, k, None))}
        shared.pop("_cached_plan", None)
        part.__dict__.update(shared, _optimizer_step_pre_hooks={}, _optimizer_step_post_hooks={})
        part.param_groups = [{}]
        self._step_unhooked = unhooked(cls)
        self._freed: FreedGradient | None = None

    def freed(self) -> FreedGradient | None:
        """Return the gradient's placeholder; None for DTensors, because FSDP would add the next gradient to it."""
        p, freed = self._p, self._freed
        if not is_plain(p):
            return None
        if freed is None or (freed.shape, freed.dtype, freed.device) != (p.shape, p.dtype, p.device):
            freed = self._freed = FreedGradient.of(p.shape, p.dtype, p.device)
        return freed

    def step(self) -> bool:
        """Step the parameter. Return False if the optimizer no longer has it."""
        place = self._find()
        if place is None:
            return False
        index, at = place
        group = self._optimizer.param_groups[index]
        own = self._part.param_groups[0]
        own.update(group)
        own["params"] = [self._p]
        if "param_names" in group:
            own["param_names"] = [group["param_names"][at]]
        self._set_number(sum(len(each["params"]) for each in self._optimizer.param_groups[:index]) + at)
        self._part.state = {self._p: self._optimizer.state[self._p]}  # type: ignore[assignment]
        try:
            self._step_part()
        except (ValueError, ZeroDivisionError) as error:
            raise type(error)(f"in the backward pass, at parameter {at} of group {index}: {error}") from error
        finally:
            if not self._optimizer.state[self._p]:
                del self._optimizer.state[self._p]
        # torch's schedulers look here, and warn if they are stepped before the optimizer.
        self._optimizer._opt_called = True  # type: ignore[attr-defined]
        return True

    def _step_part(self) -> None:
        if not profiler_enabled():
            self._step_unhooked(self._part)
            return
        with torch.profiler.record_function(f"Optimizer.step#{type(self._part).__name__}.step"):
            self._step_unhooked(self._part)

    def _set_number(self, number: int) -> None:
        """Set the parameter's number in the whole optimizer."""
        if isinstance(self._part, Native) and self._part._first_param != number:
            self._part._first_param = number
            self._part.__dict__.pop("_cached_plan", None)

    def _find(self) -> tuple[int, int] | None:
        groups = self._optimizer.param_groups
        index, at = self._place
        if index < len(groups) and at < len(groups[index]["params"]) and groups[index]["params"][at] is self._p:
            return self._place
        for index, group in enumerate(groups):
            for at, p in enumerate(group["params"]):
                if p is self._p:
                    self._place = index, at
                    return self._place
        return None


def steps_in_backward(optimizer: Optimizer) -> bool:
    """Return whether :func:`step_in_backward` is active for an optimizer."""
    hooks = unwrapped(optimizer)._optimizer_step_pre_hooks.values()
    return any(isinstance(getattr(hook, "__self__", None), StepInBackward) for hook in hooks)


def step_in_backward(optimizer: Optimizer) -> StepInBackward:
    """Update each parameter within ``backward()`` as soon as its gradient is complete, and free the gradient.

    Only one gradient is held at a time, which saves nearly the memory of all gradients. The result has the same bits as
    ``optimizer.step()`` after ``backward()``. States, groups and hyperparameters stay in the optimizer, so schedulers,
    ``state_dict`` and ``zero_grad`` work as before. The training loop need not change: ``optimizer.step()`` finds no
    gradients, updates nothing, and calls the step hooks, which ``backward()`` does not call. ``ScheduleLR`` with
    ``count_skipped=False`` needs these hooks, and so the call.

    ::

        in_backward = onepass.step_in_backward(optimizer)
        for batch in loader:
            loss_of(model, batch).backward()  # updates the model

        for micro_batches in loader:  # gradient accumulation
            with in_backward.accumulate():
                for micro_batch in micro_batches[:-1]:
                    loss_of(model, micro_batch).backward()
            loss_of(model, micro_batches[-1]).backward()

    Code that needs gradients after the backward pass does not work: clipping by the global norm, ``GradScaler``,
    :func:`log_to`, and DistributedDataParallel, which averages gradients later. ``fully_shard`` works, because it
    averages them earlier. To clip by value, use the optimizer's ``clip_value``; to clip by the norm of one gradient,
    use a hook of the parameter.

    Using a freed gradient raises: ``.grad`` holds a placeholder until ``zero_grad()``, ``optimizer.step()`` or the next
    gradient. For a DTensor, ``.grad`` is None. Parameters that are added to the optimizer or unfrozen are included from
    the next ``optimizer.step()`` on.

    One error is not detected: a parameter that is used in several blocks under ``torch.utils.checkpoint`` with
    ``use_reentrant=True``. Each block then has its own backward pass, so the parameter is updated once per block, with
    this block's part of the gradient. With ``use_reentrant=False`` the gradient is complete before the update.

    Args:
        optimizer: Any optimizer of onepass or torch that needs no closure and steps each parameter separately.

    Returns:
        A handle with the context manager ``accumulate()`` and the method ``remove()``.

    Raises:
        TypeError: ``optimizer`` is not a ``torch.optim.Optimizer``, or it uses all parameters together (LBFGS,
            Lookahead, Prodigy, SAM), or it steps by other optimizers (Combined, ZeroRedundancyOptimizer).
        ValueError: The optimizer has an argument that needs all parameters of a step at once, such as ``max_norm``; or
            it already steps in backward.
        RuntimeError: Later, from ``optimizer.step(closure)`` and from any use of a freed gradient.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> before = model.weight.detach().clone()
        >>> handle = onepass.step_in_backward(onepass.SGD(model.parameters(), lr=0.1))
        >>> model(torch.ones(8, 4)).sum().backward()  # also updates the model
        >>> torch.equal(model.weight, before)
        False
        >>> handle.remove()
    """
    check_optimizer("step_in_backward: optimizer", optimizer)
    optimizer = unwrapped(optimizer)
    if isinstance(optimizer, Combined):
        raise TypeError(
            f"{type(optimizer).__name__} steps by other optimizers, so it cannot step in backward: call "
            "step_in_backward for each of its optimizers"
        )
    together = isinstance(optimizer, Native) and not optimizer.is_separable
    if together or isinstance(optimizer, LBFGS | Wrapper):
        raise TypeError(f"{type(optimizer).__name__} uses all parameters together, so it cannot step in backward")
    for name, value in vars(optimizer).items():
        if isinstance(value, Optimizer):  # its step would step all parameters
            raise TypeError(
                f"{type(optimizer).__name__} wraps another optimizer ({name}, of the class {type(value).__name__}), "
                "so it cannot step in backward"
            )
    tail = optimizer._tail if isinstance(optimizer, Native) else None
    if tail is not None and (names := tail.whole_step_arguments()):
        raise ValueError(
            f"{type(optimizer).__name__}: {names[0]} needs all parameters of a step at once, but step_in_backward "
            f"steps one parameter at a time: create the optimizer without {names[0]}"
        )
    if steps_in_backward(optimizer):
        raise ValueError(
            f"step_in_backward: this {type(optimizer).__name__} already steps in backward: call remove() on the handle "
            "that the first call returned"
        )
    return StepInBackward(optimizer)
