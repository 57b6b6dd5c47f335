"""The hooks around a step, and torch's profiler: called as torch's wrapper calls them, at a fraction of its cost."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias, cast

import torch
from torch.optim import Optimizer

from .torch_private import disable_dynamo, global_post_hooks, global_pre_hooks, profiler_enabled

Step: TypeAlias = Callable[..., Any]


def unhooked(cls: type[Optimizer]) -> Step:
    """The class's own step, without the hooks that torch wraps around it once an instance has been made."""
    step: Any = cls.step
    while getattr(step, "hooked", False):
        step = step.__wrapped__
    return cast(Step, step)


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer that makes the steps: of a wrapper without hooks of its own (accelerate's), what it holds."""
    while not hasattr(optimizer, "_optimizer_step_pre_hooks") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _with_hooks(update: Step, self: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The step between the hooks, as torch's wrapper calls them."""
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


# The code of torch's wrapper with the hooks around a step, by which an instance of it can be recognised.
_HOOKED_CODE = cast(Any, Optimizer.profile_hook_step(_with_hooks)).__code__


def hooked(update: Step, owner: str) -> Step:
    """The method ``step`` of the owner, a class: ``update``, with torch's hooks and its profiler's scope if needed."""
    hooked_update = Optimizer.profile_hook_step(update)

    @functools.wraps(update)
    def step(*args: Any, **kwargs: Any) -> Any:
        # torch's wrapper costs as much as the step of a small model, nearly all of it for a profiler that is off. So it
        # is put around the step only for a profiler. A subclass that overrides step has been wrapped by torch already.
        self: Optimizer = args[0]
        if torch.compiler.is_compiling():
            return untraced(*args, **kwargs)
        profiled = profiler_enabled()
        if (
            not (
                profiled
                or self._optimizer_step_pre_hooks
                or self._optimizer_step_post_hooks
                or global_pre_hooks
                or global_post_hooks
            )
            or getattr(type(self).step, "__code__", None) is _HOOKED_CODE
        ):
            return update(*args, **kwargs)
        return hooked_update(*args, **kwargs) if profiled else _with_hooks(update, self, args, kwargs)

    # torch.compile would trace into the step until it meets the core, and warn that it cannot trace that.
    untraced = disable_dynamo(step)
    step.__name__, step.__qualname__ = "step", f"{owner}.step"  # by which pickle finds it
    cast(Any, step).hooked = True  # torch leaves a step that is marked so as it is
    return step
