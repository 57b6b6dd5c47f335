"""All private names of torch that onepass uses, each with the reason and the first version that has it.

Other modules import these names from here. If torch lacks one, the import fails with an error that names it. Private
attributes of torch's objects, which cannot be imported, are listed in ``ATTRIBUTES``.
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
    """Return the first of these attributes that the module has."""
    for path in paths:
        found = import_module(module)
        try:
            for name in path.split("."):
                found = getattr(found, name)
        except AttributeError:
            continue
        return found
    raise ImportError(f"torch {torch.__version__} has no {module}.{' or '.join(paths)}, which onepass uses")


# torch.compile traces a step up to the compiled core and warns; the step must run untraced. Since 2.1.
_disable_dynamo = _find("torch._compile", "_disable_dynamo")


def disable_dynamo(function: F) -> F:
    """Return the function, marked so that ``torch.compile`` does not trace it."""
    return cast(F, _disable_dynamo(function))


# onepass's step calls all hooks, because torch's wrapper costs as much as the step of a small model. Since 2.2.
global_pre_hooks: dict[int, Callable[..., Any]] = _find("torch.optim.optimizer", "_global_optimizer_pre_hooks")
global_post_hooks: dict[int, Callable[..., Any]] = _find("torch.optim.optimizer", "_global_optimizer_post_hooks")

# Whether a profiler runs; only then is torch's wrapper used. Since 1.12.
profiler_enabled = _find("torch._C._autograd", "_profiler_enabled")

# The dtype of a new `step` state. Since 2.3.
scalar_dtype = _find("torch.optim.optimizer", "_get_scalar_dtype")

# Raises if a step that is not capturable is captured into a CUDA graph. 2.10 has it under the second name.
check_capturable = _find(
    "torch.optim.optimizer",
    "Optimizer._accelerator_graph_capture_health_check",
    "Optimizer._cuda_graph_capture_health_check",
)

# Active function transforms and tracers (torch.func, make_fx), which do not see kernels. Since 2.0.
interpreter = _find("torch._C._functorch", "peek_interpreter_stack")
dispatch_modes = _find("torch._C", "_len_torch_dispatch_stack")
_dispatch_mode = _find("torch._C", "_get_dispatch_mode")
_PROXY = _find("torch._C", "_TorchDispatchModeKey.PROXY")
_find("torch.autograd.forward_ad", "_current_level")


def is_making_fx() -> bool:
    """Return whether ``make_fx`` is tracing."""
    return bool(dispatch_modes()) and _dispatch_mode(_PROXY) is not None


def is_in_forward_mode() -> bool:
    """Return whether forward-mode differentiation is active."""
    return forward_ad._current_level >= 0


# Muon's Newton-Schulz iterations and learning rate, which torch computes. Since 2.9.
muon = import_module("torch.optim._muon")
newton_schulz: Callable[..., Tensor] = _find("torch.optim._muon", "_zeropower_via_newtonschulz")
adjusted_lr: Callable[..., float] = _find("torch.optim._muon", "_adjust_lr")

# Makes a subclass tensor over the same memory, used as the placeholder of a freed gradient. Since 1.0.
_make_subclass = _find("torch", "Tensor._make_subclass")


def make_subclass(cls: type[T], tensor: Tensor) -> T:
    """Return a tensor of class ``cls`` over the same memory."""
    return cast(T, _make_subclass(cls, tensor))


# Multi-tensor operations, as torch.optim uses them. Since 1.9.
foreach_add_ = _find("torch", "_foreach_add_")
foreach_copy_ = _find("torch", "_foreach_copy_")
foreach_mul_ = _find("torch", "_foreach_mul_")
foreach_norm = _find("torch", "_foreach_norm")
foreach_sub_ = _find("torch", "_foreach_sub_")
foreach_zero_ = _find("torch", "_foreach_zero_")

# Two operators, to recognize them in __torch_dispatch__: zero_grad with foreach, and `.to(...)`. Since 1.13.
foreach_zero_operator = _find("torch", "ops.aten._foreach_zero_.default")
copy_operator = _find("torch", "ops.aten._to_copy.default")

# Base class of all batch norms. Since 1.0.
NormBase = _find("torch.nn.modules.batchnorm", "_NormBase")

# The index of the current GPU, by a function in C: it runs no Python code, in which another thread could free the
# tensors of a step. Since 1.0, if torch was built with CUDA.
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)

# The DLPack exchange API, by which the core reads a tensor's address; None before 2.10.
dlpack_exchange_api: object = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)


def local_offset(dtensor: Tensor) -> tuple[int, ...]:
    """Return the indices in the whole tensor of the first element of a DTensor's local part. Since 2.2."""
    find = _find("torch.distributed.tensor._utils", "compute_local_shape_and_global_offset")  # a slow import
    _, offset = find(dtensor.shape, dtensor.device_mesh, dtensor.placements)  # type: ignore[attr-defined]
    return tuple(offset)


# Private attributes of objects, by class (a public path). csrc/bindings/lbfgs.cpp also uses torch._C._storage_Use_Count
# if torch has it.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    # Hooks of one optimizer, which onepass's step, state_dict and load_state_dict call.
    "torch.optim.Optimizer": (
        "_opt_called",  # set by the first step of an optimizer that has a scheduler, which warns otherwise
        "_optimizer_step_pre_hooks",
        "_optimizer_step_post_hooks",
        "_optimizer_state_dict_pre_hooks",
        "_optimizer_state_dict_post_hooks",
        "_optimizer_load_state_dict_pre_hooks",
        "_optimizer_load_state_dict_post_hooks",
    ),
    # The parts of a scheduler's step, which onepass's schedulers override and compositions call.
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
    # The dicts of a module. The parameters of a model are found in them in a tenth of the time of parameters(); that is
    # walked if a class overrides _named_members.
    "torch.nn.Module": ("_parameters", "_buffers", "_modules", "_named_members"),
    # Number of changes in place: whether n_averaged, which may be on a GPU, has to be read again.
    "torch.Tensor": ("_version",),
}
