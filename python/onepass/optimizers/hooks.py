"""Call step hooks and torch's profiler as torch's step wrapper does, at a fraction of its cost."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from .torch_private import disable_dynamo, global_post_hooks, global_pre_hooks, profiler_enabled

Step: TypeAlias = Callable[..., Any]


def unhooked(cls: type[Optimizer]) -> Step:
    """Return the class's own step, without the hook wrapper that torch adds when an instance is created."""
    step: Any = cls.step
    while getattr(step, "hooked", False):
        step = step.__wrapped__
    return cast(Step, step)


def has_found_inf(optimizer: Optimizer) -> bool:
    """Return whether GradScaler, in a step of an optimizer that unscales gradients, has found an infinite or NaN one.

    Waits for the GPU. Without any gradient, torch gives the optimizer the int 0 instead of a tensor.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)


def only_creates_states(optimizer: Optimizer) -> bool:
    """Return whether the next step is one by which torch.distributed.checkpoint makes an optimizer create its states.

    There are no states yet, and all learning rates and gradients are zero.
    """
    if optimizer.state or not all(_is_known_zero(group.get("lr")) for group in optimizer.param_groups):
        return False
    grads = [p.grad for p in params_of(optimizer) if p.grad is not None]
    return bool(grads) and not any(bool(grad.any()) for grad in grads)


def _is_known_zero(rate: Any) -> bool:
    """Return whether a learning rate is zero; False for a tensor on a GPU, for which a step must not wait."""
    return rate is not None and not (isinstance(rate, Tensor) and not rate.is_cpu) and float(rate) == 0.0


def params_of(optimizer: Optimizer) -> list[Tensor]:
    """Return all parameters of an optimizer, in the order of its groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def evaluate(closure: Callable[[], Any]) -> Any:
    """Return what the closure of a step returns, which computes gradients."""
    with torch.enable_grad():
        return closure()


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer that steps: the wrapped one, if this is a wrapper without hooks (accelerate's)."""
    while not hasattr(optimizer, "_optimizer_step_pre_hooks") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _with_hooks(update: Step, self: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the pre-hooks, the step and the post-hooks, in the order of torch's wrapper."""
    everyones = global_pre_hooks.values()
    for pre_hook in (*everyones, *self._optimizer_step_pre_hooks.values()):
        changed = pre_hook(self, args, kwargs)
        if changed is not None:
            if not (isinstance(changed, tuple) and len(changed) == 2):
                raise RuntimeError(
                    f"{update} must return None or a tuple of (new_args, new_kwargs), but got {changed}."
                )
            args, kwargs = changed
    result = update(*args, **kwargs)
    everyones = global_post_hooks.values()
    for post_hook in (*self._optimizer_step_post_hooks.values(), *everyones):
        post_hook(self, args, kwargs)
    return result


# The code object of torch's step wrapper, to recognize a step that torch has wrapped.
_HOOKED_CODE = cast(Any, Optimizer.profile_hook_step(_with_hooks)).__code__


def hooked(update: Step, owner: str, profiled: Step | None = None) -> Step:
    """Return the method ``step`` of the class ``owner``: ``update`` with step hooks, and a profiler scope if needed.

    Args:
        update: Performs the step.
        owner: The name of the class.
        profiled: Performs the step instead of ``update`` while a profiler runs.
    """
    profiled = profiled or update
    hooked_update = Optimizer.profile_hook_step(profiled)

    @functools.wraps(update)
    def step(*args: Any, **kwargs: Any) -> Any:
        # torch's wrapper costs as much as the step of a small model, nearly all of it for a profiler that is off. So it
        # is used only while a profiler runs. If a subclass overrides step, torch has already wrapped that step.
        self: Optimizer = args[0]
        if torch.compiler.is_compiling():
            return untraced(*args, **kwargs)
        profiling = profiler_enabled()
        if (
            not (
                profiling
                or self._optimizer_step_pre_hooks
                or self._optimizer_step_post_hooks
                or global_pre_hooks
                or global_post_hooks
            )
            or getattr(type(self).step, "__code__", None) is _HOOKED_CODE
        ):
            return profiled(*args, **kwargs) if profiling else update(*args, **kwargs)
        return hooked_update(*args, **kwargs) if profiling else _with_hooks(update, self, args, kwargs)

    # torch.compile would trace the step up to the compiled core, and warn that it cannot trace the core.
    untraced = disable_dynamo(step)
    step.__name__, step.__qualname__ = "step", f"{owner}.step"  # pickle finds the method by its qualified name
    update.__qualname__ = profiled.__qualname__ = step.__qualname__  # the name in errors about its arguments
    cast(Any, step).hooked = True  # torch does not wrap a step with this mark
    return step
