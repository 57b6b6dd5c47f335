"""Everything that onepass uses of torch beside its public names, each with the reason and the versions that have it.

Other modules take these names from here. Where torch no longer has one, the import fails and names it. Private
attributes of torch's objects, which cannot be bound once, are listed in ``ATTRIBUTES``.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T", bound=Tensor)


def _find(module: str, *paths: str) -> Any:
    """Return the first of these attributes of a module that there is."""
    for path in paths:
        found = import_module(module)
        try:
            for name in path.split("."):
                found = getattr(found, name)
        except AttributeError:
            continue
        return found
    raise ImportError(f"torch {torch.__version__} has no {module}.{' or '.join(paths)}, which onepass uses")


# torch.compile traces into a step until it meets the core, and warns; the step is to run untraced. 2.1 to 2.13.
_disable_dynamo = _find("torch._compile", "_disable_dynamo")


def disable_dynamo(function: F) -> F:
    """Return a function that ``torch.compile`` does not trace into."""
    return cast(F, _disable_dynamo(function))


# A step calls all hooks itself, because torch's wrapper costs as much as the step of a small model. 2.2 to 2.13.
global_pre_hooks: dict[int, Callable[..., Any]] = _find("torch.optim.optimizer", "_global_optimizer_pre_hooks")
global_post_hooks: dict[int, Callable[..., Any]] = _find("torch.optim.optimizer", "_global_optimizer_post_hooks")

# Whether a profiler runs, for which torch's wrapper is put around the step. 1.12 to 2.13.
profiler_enabled = _find("torch._C._autograd", "_profiler_enabled")

# The dtype of a new state `step`. 2.3 to 2.13.
scalar_dtype = _find("torch.optim.optimizer", "_get_scalar_dtype")

# Raises where a step is captured into a CUDA graph that would not be the same again. 2.10 has it by the second name.
check_capturable = _find(
    "torch.optim.optimizer",
    "Optimizer._accelerator_graph_capture_health_check",
    "Optimizer._cuda_graph_capture_health_check",
)

# What records or transforms operations now (torch.func, make_fx): kernels would be invisible to it. 2.0 to 2.13.
interpreter = _find("torch._C._functorch", "peek_interpreter_stack")
dispatch_modes = _find("torch._C", "_len_torch_dispatch_stack")
_dispatch_mode = _find("torch._C", "_get_dispatch_mode")
_PROXY = _find("torch._C", "_TorchDispatchModeKey.PROXY")
_find("torch.autograd.forward_ad", "_current_level")


def is_making_fx() -> bool:
    """Whether ``make_fx`` records operations."""
    return bool(dispatch_modes()) and _dispatch_mode(_PROXY) is not None


def is_in_forward_mode() -> bool:
    """Whether forward-mode derivatives are computed."""
    return forward_ad._current_level >= 0


# Muon's matrix products, which stay torch's, and its defaults. 2.9 to 2.13.
muon = import_module("torch.optim._muon")
newton_schulz: Callable[..., Tensor] = _find("torch.optim._muon", "_zeropower_via_newtonschulz")
adjusted_lr: Callable[..., float] = _find("torch.optim._muon", "_adjust_lr")

# A tensor of a subclass over the same memory, for what stands in the place of a freed gradient. 1.0 to 2.13.
_make_subclass = _find("torch", "Tensor._make_subclass")


def make_subclass(cls: type[T], tensor: Tensor) -> T:
    """Return a tensor of another class over the same memory."""
    return cast(T, _make_subclass(cls, tensor))


# One call for many tensors, as torch.optim's own code makes it. 1.9 to 2.13.
foreach_norm = _find("torch", "_foreach_norm")
foreach_sub_ = _find("torch", "_foreach_sub_")
foreach_zero_ = _find("torch", "_foreach_zero_")

# Two operators, to recognise them in __torch_dispatch__: zero_grad with foreach, and `.to(...)`. 1.13 to 2.13.
foreach_zero_operator = _find("torch", "ops.aten._foreach_zero_.default")
copy_operator = _find("torch", "ops.aten._to_copy.default")

# What all batch norms derive from. 1.0 to 2.13.
NormBase = _find("torch.nn.modules.batchnorm", "_NormBase")

# How the core reads where a tensor's memory is; None before 2.10.
dlpack_exchange_api: object = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)

# By class (a public path): attributes of its objects. csrc/bindings/lbfgs.cpp asks torch._C for _storage_Use_Count, and
# does without if it is not there.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    # Hooks of one optimizer, which a step calls itself; GradScaler's and schedulers' marks.
    "torch.optim.Optimizer": (
        "_optimizer_step_pre_hooks",
        "_optimizer_step_post_hooks",
        "_optimizer_state_dict_pre_hooks",
        "_optimizer_state_dict_post_hooks",
        "_optimizer_load_state_dict_pre_hooks",
        "_optimizer_load_state_dict_post_hooks",
    ),
    # The parts of a step of a scheduler, which ours override and compositions call.
    "torch.optim.lr_scheduler.StepLR": (
        "_initial_step",
        "_update_lr",
        "_step_count",
        "_last_lr",
        "_get_lr_called_within_step",
        "_get_closed_form_lr",
    ),
    "torch.optim.lr_scheduler.SequentialLR": ("_schedulers", "_milestones", "_last_lr"),
    "torch.optim.lr_scheduler.ChainedScheduler": ("_schedulers", "_last_lr"),
    "torch.optim.lr_scheduler.ReduceLROnPlateau": ("_reset", "_last_lr"),
    "torch.optim.lr_scheduler.OneCycleLR": ("_schedule_phases",),
}
