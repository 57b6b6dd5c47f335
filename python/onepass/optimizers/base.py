"""Base class of onepass's optimizers: a step that runs in the compiled core.

:class:`Native` precedes a ``torch.optim`` class in the bases of each optimizer. Everything but the step (constructor,
parameter groups, hooks, state names, ``state_dict``) is torch's. The step reads the optimizer, steps in one call of the
core the parameters that the kernels cover, and falls back to torch's implementation for the others.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import _core
from ..training.averaged_model import AveragedModel
from ..training.clipping_policies import ClippingPolicy
from . import block_states, cautious, stochastic
from .arguments import (
    HyperTypes,
    check_flag,
    check_hyperparameters,
    described,
    groups_kept_on_error,
    hyper_types,
    module_refused,
    noted,
)
from .constructors import constructor
from .hooks import Step, evaluate, hooked
from .master import NAMES as MASTER_NAMES
from .master import check_master, forget_low_bits, master_name, master_of, new_master, write_master
from .tail import StepReport, Tail, scaled_gradients
from .torch_private import (
    check_capturable,
    current_device,
    dlpack_exchange_api,
    interpreter,
    is_in_forward_mode,
    is_making_fx,
    scalar_dtype,
)

if TYPE_CHECKING:
    from .lookahead import SlowWeightUpdate


def _workspace(size: int, cuda: int) -> Tensor:
    """Allocate ``size`` bytes of workspace for the kernels on a GPU, from torch's allocator."""
    return torch.empty(size, dtype=torch.uint8, device=torch.device("cuda", cuda))


def _set_torch(
    exchange_api: object = dlpack_exchange_api,
    workspace: Callable[[int, int], Tensor] = _workspace,
    current_device: Callable[[], int] = current_device,
    set_device: Callable[[int], None] = torch.cuda.set_device,
) -> None:
    """Pass to the core the objects of torch that it uses. Tests call this again with substitutes."""
    increment_version = torch.autograd.graph.increment_version
    _core.set_torch(
        torch.Tensor, torch.nn.Parameter, increment_version, exchange_api, workspace, current_device, set_device
    )


_set_torch()

POLICY_STATE = "clipping_policy"  # the key of its state in the first group of a state_dict

SLOW_PARAM = "slow_param"  # the state that holds Lookahead's slow weights

# Keys of groups that torch's classes do not have, each only if its argument was given.
OWN_KEYS = ("state_dtype", "master", "stochastic_rounding", "rounding_seed", *cautious.NAMES)

STATE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _update(self: Native, closure: Callable[[], Any] | None = None) -> Any:
    """Perform a single optimization step.

    Args:
        closure: Reevaluates the model, with gradients enabled, and returns the loss.

    Returns:
        The loss that the closure returned; None without a closure.

    Raises:
        ValueError: A gradient or state does not fit its parameter, or memory overlaps. The message names the
            parameter. An invalid step changes nothing.
    """
    loss = None if closure is None else evaluate(closure)
    self._step_all()
    return loss


def _profiled_update(self: Native, closure: Callable[[], Any] | None = None) -> Any:
    """Perform a single optimization step, in a profiler scope that excludes the closure."""
    loss = None if closure is None else evaluate(closure)
    with torch.profiler.record_function(f"onepass::{self.rule}"):
        self._step_all()
    return loss


def _check_capture(optimizer: Native) -> None:
    if not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()):
        return
    if "capturable" in optimizer.param_groups[0]:
        check_capturable(optimizer)
    # Not Adafactor and CAME, which kernels do not step there.
    elif optimizer.rule in _core.rules() and _counts_steps(optimizer.rule):
        raise RuntimeError(f"{type(optimizer).__name__} cannot be captured in a CUDA graph: {optimizer.not_capturable}")


def transform() -> str:
    """Return the active function transform or tracer, which would not see the kernels; "" if none is active.

    Tensors of a transform look like ordinary tensors and have memory, but that memory does not hold their values.
    """
    if interpreter() is not None:
        return "torch.func"
    if is_making_fx():
        return "make_fx"
    return "forward-mode derivatives" if is_in_forward_mode() else ""


@functools.cache
def _counts_steps(rule: str) -> bool:
    return _core.rules()[rule][3]


@functools.cache
def _state_names_of(rule: str) -> list[str]:
    return _core.rules()[rule][1]


@functools.cache
def _scalar_names(rule: str) -> list[str]:
    rules = _core.rules()
    return rules[rule][2] if rule in rules else []  # Adafactor and CAME have none


@functools.cache
def _masks_of(rule: str) -> frozenset[str]:
    rules = _core.rules()
    return frozenset(name.rstrip("?") for name in rules[rule][0]) & {*cautious.NAMES} if rule in rules else frozenset()


@functools.cache
def _plain_request(threads: int) -> _core.StepRequest:
    """Return the request of a step without scaling and followers, cached because nearly every step uses it."""
    return _core.StepRequest(1.0, threads)


def _has_kernels(device: torch.device) -> bool:
    """Return whether there are kernels for tensors on this device."""
    return device.type == "cpu" or (device.type == "cuda" and not _core.cuda_refusal(device.index))


def new_follower(p: Tensor) -> Tensor:
    """Return a new follower of a parameter: a copy of it."""
    return p.detach().clone(memory_format=torch.preserve_format)


class Native(Optimizer):
    """An optimizer whose step runs in the compiled core.

    A subclass sets ``rule``, the name of its rule in ``csrc/rules``, and ``torch_step``, which steps the parameters
    that no kernel covers.
    """

    rule: ClassVar[str]
    torch_step: ClassVar[Step]
    is_elementwise: ClassVar[bool] = True  # whether `master` and `stochastic_rounding` may be given
    is_separable: ClassVar[bool] = True  # whether parameters may be stepped one after the other, by several calls

    # Why an optimizer without `capturable` that counts its steps cannot be captured in a CUDA graph.
    not_capturable: ClassVar[str] = "its steps are counted on the CPU"

    # States that begin as copies of the parameter. The states of 16-bit parameters are then float32, because
    # differences from these copies would be lost in 16 bits.
    copies: ClassVar[Collection[str]] = ()

    # States that are float32 or wider, whatever the state_dtype.
    wide_states: ClassVar[Collection[str]] = ()

    # Set by Lookahead during its step, else None.
    _slow_weight_update: SlowWeightUpdate | None = None

    # What a step does beside the update; None if no argument asks for it.
    _tail: Tail | None = None

    # Number of the first parameter, counted over all groups of the whole optimizer. The random bits of stochastic
    # rounding depend on it. Not 0 only in the one-parameter optimizers of `step_in_backward`.
    _first_param = 0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Derive the constructor from that of the torch class, unless the subclass defines its own."""
        super().__init_subclass__(**kwargs)
        if "torch_step" in vars(cls) and "__init__" not in vars(cls):
            declared = cls.__mro__[cls.__mro__.index(Native) + 1]
            made = constructor(cls, vars(declared)["__init__"], Native.__init__)
            made.__qualname__ = f"{cls.__qualname__}.__init__"
            cls.__init__ = made  # type: ignore[method-assign]

    if not TYPE_CHECKING:  # type checkers see torch's constructors, with our arguments (signatures.pyi)

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            """Create the optimizer.

            The arguments are those of the class, and these, which every optimizer but :class:`LBFGS` has. Without them
            a step does what torch's does. ``optimizer.last_step`` reports what a step with them did.

            Args:
                master: Whether 16-bit parameters have float32 master weights (:doc:`/master_weights`). ``"split"``: for
                    bfloat16 parameters, the state ``master_low`` holds the low 16 bits of the masters. ``"float32"``:
                    for bfloat16 and float16 parameters, the state ``master`` holds the masters. The other states are
                    then in float32, unless ``state_dtype`` is given. Other parameters have no master. A parameter group
                    may have a value of its own. None: no masters.
                max_norm: Largest norm of all gradients together, a number >= 0. The gradients are multiplied by
                    ``min(1, max_norm / (norm + 1e-6))`` as the step reads them; ``.grad`` is not modified. Or a
                    :class:`ClippingPolicy`, which chooses the factor. None: gradients are not multiplied.
                norm_type: 2 for the 2-norm, ``math.inf`` for the largest magnitude of an element.
                clip_value: Largest magnitude of an element, a number >= 0. The gradients are clamped to
                    [-clip_value, clip_value] as the step reads them, after ``max_norm``; real and imaginary parts each.
                    None: gradients are not clamped.
                skip_nonfinite: Whether a step is skipped if the norm of the gradients is NaN or infinite. A skipped
                    step changes no parameter, state, step count, average, copy or policy.
                average: An :class:`onepass.swa_utils.AveragedModel` of the model. Each step moves the averages of the
                    optimizer's parameters.
                copy_to: Tensors with the shapes of the parameters, in the order of the groups, or a module that has
                    such parameters. Each step writes the new parameters to them, converted to their dtypes.
                zero_grad: Whether each step, also a skipped one, sets the gradients to zero in place.
                stochastic_rounding: Whether 16-bit parameters and states are rounded stochastically
                    (:doc:`/stochastic_rounding`), instead of to the nearest number: up with a probability that is the
                    distance from the lower number divided by the distance between the two numbers. Parameters with a
                    master are rounded to nearest. A parameter group may have a value of its own.
                rounding_seed: Seed of the random bits of stochastic rounding, of 16 bits and of 8-bit states
                    (:doc:`/8bit_states`): an integer >= 0 and below 2**64. None: 0.
                cautious: Whether an element is updated only if its update has the sign of its gradient; the updates of
                    these elements are then larger (:doc:`/cautious`). A parameter group may have a value of its own.
                cautious_weight_decay: Whether a decoupled weight decay leaves out the elements that the update moves
                    away from zero (:doc:`/cautious`). A parameter group may have a value of its own.

            Raises:
                TypeError: ``max_norm`` or ``clip_value`` is not a number, ``average`` not an ``AveragedModel``, an
                    element of ``copy_to`` not a tensor, or ``skip_nonfinite``, ``zero_grad``, ``stochastic_rounding``,
                    ``cautious`` or ``cautious_weight_decay`` not a bool.
                ValueError: ``master`` is another value, or is ``"split"`` for a float16 parameter; ``master`` or
                    ``stochastic_rounding`` is given to Adafactor, CAME, Muon or NorMuon, which have neither;
                    ``max_norm`` or ``clip_value`` is < 0; ``norm_type`` is neither 2 nor infinite; ``average`` has no
                    averages of these parameters, or computes them by a function; ``copy_to`` does not match the
                    parameters; ``rounding_seed`` is not an int in [0, 2**64); ``cautious`` or ``cautious_weight_decay``
                    is given to an optimizer that does not have it.
            """
            construct = super().__init__
            params = args[0] if args else kwargs.get("params")

            def check() -> None:
                known = inspect.signature(construct).parameters
                self._check_types({**dict(zip(known, args, strict=False)), **kwargs})

            with noted(check), module_refused(type(self).__name__, params):
                construct(*args, **kwargs)
            # torch accepts some values that no step can use, and from 2.14 on it takes the first two of many betas.
            check()
            self._check_types(self.defaults)

    def _take_arguments(
        self,
        *,
        state_dtype: torch.dtype | None = None,
        master: str | None = None,
        max_norm: float | ClippingPolicy | None = None,
        norm_type: float = 2.0,
        clip_value: float | None = None,
        skip_nonfinite: bool = False,
        average: AveragedModel | None = None,
        copy_to: Sequence[Tensor] | torch.nn.Module | None = None,
        zero_grad: bool = False,
        stochastic_rounding: bool = False,
        rounding_seed: int | None = None,
        cautious: bool = False,
        cautious_weight_decay: bool = False,
    ) -> None:
        """Store the arguments that torch's class does not have. Called after torch's constructor.

        ``__init__`` documents them, except ``state_dtype``, which each class documents.

        None adds no key to the groups: torch.distributed.checkpoint requires each key of the groups in the checkpoint,
        and checkpoints of torch's classes must load.
        """
        name = type(self).__name__
        self._check_state_dtype(state_dtype)
        check_flag(f"{name}: skip_nonfinite", skip_nonfinite)
        check_flag(f"{name}: zero_grad", zero_grad)
        flags = {
            "stochastic_rounding": stochastic_rounding,
            "cautious": cautious,
            "cautious_weight_decay": cautious_weight_decay,
        }
        self._check_flags(name, flags)
        values = {"state_dtype": state_dtype, "master": master, "rounding_seed": rounding_seed, **flags}
        for key in OWN_KEYS:
            value = values[key] or None if key in flags else values[key]
            if value is not None:
                self.defaults[key] = value
                for group in self.param_groups:
                    group.setdefault(key, value)
        for number, group in enumerate(self.param_groups):
            self._check_group(group, number)
            self._check_params(group["params"])
        tail = Tail(  # made also if nothing asks for it, because it checks norm_type
            self,
            max_norm=max_norm,
            norm_type=norm_type,
            clip_value=clip_value,
            skip_nonfinite=skip_nonfinite,
            average=average,
            copy_to=copy_to,
            zero_grad=zero_grad,
        )
        asked = (max_norm, clip_value, average, copy_to)
        if skip_nonfinite or zero_grad or any(argument is not None for argument in asked):
            self._tail = tail
            # GradScaler then calls step() also to skip it, so that the gradients are zeroed and the report is written.
            if self._tail.measures or self._tail.zeroes_grads:
                self._step_supports_amp_scaling = True

    def _check_group(self, group: Mapping[str, Any], number: int) -> None:
        """Check the arguments of a group that torch's classes do not have."""
        name = type(self).__name__
        if not self.is_elementwise and group.get("master") is not None:
            raise ValueError(f"{name}: master must be None, because {name} has no master weights")
        if not self.is_elementwise and group.get("stochastic_rounding"):
            raise ValueError(f"{name}: stochastic_rounding must be False, because {name} does not have it")
        check_master(f"{name}: group {number}", group)
        self._check_flags(f"{name}: group {number}", group)

    def _check_flags(self, where: str, group: Mapping[str, Any]) -> None:
        _check_rounding(where, group)
        cautious.check(type(self).__name__, self._cautious_options(), where, group)

    def _check_state_dtype(self, state_dtype: object) -> None:
        if state_dtype is None or state_dtype in STATE_DTYPES:
            return
        name = type(self).__name__
        if state_dtype != block_states.CODES:
            known = (*STATE_DTYPES, block_states.CODES)
            raise ValueError(f"{name}: state_dtype must be one of {known} or None, got {state_dtype!r}")
        if not block_states.has_codings(self.rule):
            raise ValueError(f"{name}: state_dtype cannot be {state_dtype}, because the states are not averages")

    def _check_types(self, values: Mapping[str, Any], group: int | None = None) -> None:
        """Check the types of arguments, or of the hyperparameters of group ``group``."""
        where = type(self).__name__ + ("" if group is None else f": group {group}")
        check_hyperparameters(where, self._hyper_types(), values)

    @classmethod
    def _hyper_types(cls) -> HyperTypes:
        return hyper_types(cls.rule)

    if TYPE_CHECKING:

        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            """Perform a single optimization step."""
    else:
        step = hooked(_update, "Native", profiled=_profiled_update)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as torch does, and check the types of its hyperparameters.

        Raises:
            TypeError: A hyperparameter is not a number, or not a sequence of numbers, or ``stochastic_rounding``,
                ``cautious`` or ``cautious_weight_decay`` is not a bool.
            ValueError: A hyperparameter has too many or too few numbers, ``state_dtype`` is not a supported dtype,
                ``master`` does not fit, ``rounding_seed`` is out of range, or the optimizer does not have ``cautious``
                or ``cautious_weight_decay``.
        """
        number = len(self.param_groups)
        group = param_group if isinstance(param_group, dict) else {}  # torch refuses others
        self._check_state_dtype(group.get("state_dtype"))
        self._check_group({**self.defaults, **group}, number)
        self._check_types(group, number)
        where = f"{type(self).__name__}: group {number}"
        with groups_kept_on_error(self), module_refused(where, group.get("params")):
            super().add_param_group(param_group)
            added = self.param_groups[number]  # torch has made a list of its params, which may be a generator
            check_master(where, added)
            if number:  # the first group is the constructor's, which checks its groups after torch has checked them all
                self._check_params(added["params"])

    def _check_params(self, params: list[Tensor]) -> None:
        """Raise ValueError if the optimizer cannot step one of these parameters, whatever its gradient."""

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        if self._tail is not None:
            state["_tail"] = self._tail.__getstate__()  # a pickle names no Tail
            if hasattr(self, "_step_supports_amp_scaling"):
                state["_step_supports_amp_scaling"] = self._step_supports_amp_scaling
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if (tail := state.get("_tail")) is not None:
            state = {**state, "_tail": Tail.of(tail)}
        for group in state["param_groups"]:
            if isinstance(name := group.get("state_dtype"), str):  # in a state_dict
                group["state_dtype"] = getattr(torch, name, name)
                self._check_state_dtype(group["state_dtype"])
        for number, group in enumerate(state["param_groups"]):
            self._check_group(group, number)
        super().__setstate__(state)
        for name in OWN_KEYS:
            if (default := self.defaults.get(name)) is not None:
                for group in self.param_groups:
                    group.setdefault(name, default)
        forget_low_bits(self._master_names())

    # -- the step ----------------------------------------------------------------------------------------------------

    @property
    def last_step(self) -> StepReport | None:
        """The norm of the gradients in the last step, and whether they were clipped or the step was skipped.

        A :class:`StepReport`. None before the first step, and if the optimizer has none of the arguments ``max_norm``,
        ``clip_value``, ``skip_nonfinite``, ``average``, ``copy_to`` and ``zero_grad``.
        """
        return None if self._tail is None else self._tail.report

    @property
    def _plan(self) -> _core.Plan:
        # Created on first use, and never pickled or copied: it caches what was read from the optimizer.
        plan: _core.Plan | None = self.__dict__.get("_cached_plan")
        if plan is None:
            plan = self.__dict__["_cached_plan"] = _core.Plan(self.rule, self._first_param)
        return plan

    def _grad_factor(self) -> float | None:
        """Return the factor that undoes GradScaler's scale of the gradients; None if GradScaler skips the step."""
        if (found_inf := getattr(self, "found_inf", None)) is not None and found_inf.item():
            return None
        grad_scale = getattr(self, "grad_scale", None)
        return 1.0 if grad_scale is None else 1.0 / float(grad_scale.item())

    def _step_with_scaler(self, found_inf: Tensor) -> bool:
        """Step without reading GradScaler's tensors on the CPU. Return False, with nothing done, if not possible."""
        if _core.cuda_device(found_inf) < 0 or self._slow_weight_update:
            return False
        if not all(map(self._counts_on_device, self.param_groups)) and _counts_steps(self.rule):
            return False
        grad_scale = getattr(self, "grad_scale", None)
        if self._tail is not None:
            return self._tail.step_with_scaler(self, grad_scale, found_inf)
        request = _core.StepRequest(1.0, torch.get_num_threads(), grad_scale=grad_scale, found_inf=found_inf)
        return self._plan.step(self, request).stepped

    def _before_step(self) -> Callable[[], None] | None:
        """Prepare a step, or raise RuntimeError if the parameters are not what a step expects.

        Returns:
            What is called after the step; None: nothing.
        """
        return None

    def _step_all(self) -> None:
        _check_capture(self)
        after = self._before_step()
        self._step_params()
        if after is not None:
            after()

    def _step_params(self) -> None:
        transformed_by = transform()
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and not transformed_by and self._step_with_scaler(found_inf):
            return
        grad_factor = self._grad_factor()
        if grad_factor is None:
            if self._tail:
                self._tail.note_found_inf(self)
        elif not transformed_by:
            self._step_natively(grad_factor)
        elif self._rounds_with_random_bits():
            raise RuntimeError(
                f"{type(self).__name__}: stochastic rounding and 8-bit states need kernels, which {transformed_by} "
                "does not see"
            )
        elif self._tail:
            self._tail.around(self, grad_factor, functools.partial(self._step_by_torch_alone, transformed_by))
        else:
            self._step_by_torch_alone(transformed_by, grad_factor)

    def _step_natively(self, grad_factor: float) -> None:
        """Step all parameters by kernels, and by torch's implementation those that no kernel covers."""
        update, threads = self._slow_weight_update, torch.get_num_threads()
        if self._tail is not None:
            self._tail.step(self, grad_factor, threads)
            return
        if grad_factor == 1.0 and update is None:
            request = _plain_request(threads)
        else:
            request = _core.StepRequest(grad_factor, threads, update.followers if update else [])
        result = self._plan.step(self, request)
        if not result.stepped:
            request = _core.StepRequest(grad_factor, threads, update.followers if update else [], fallback_stepped=True)
            result = self._step_by_both(result.fallback, grad_factor, request)
        if update:
            update.after(result.unfollowed[0])

    def _step_by_torch_alone(self, reason: str, grad_factor: float) -> None:
        """Step all parameters by torch's implementation."""
        params = [(p, g, i) for g, group in enumerate(self.param_groups) for i, p in enumerate(group["params"])]
        fallback = [(g, i, reason) for p, g, i in params if p.grad is not None]
        if fallback:
            self._step_by_torch(fallback, grad_factor)
            _core.count({}, {reason: len(fallback)})
        if self._slow_weight_update:
            self._slow_weight_update.after([p for p, _, _ in params])

    def _step_by_both(
        self,
        fallback: list[tuple[int, int, str]],
        grad_factor: float,
        request: _core.StepRequest,
        clip_value: float = math.inf,
    ) -> _core.StepResult:
        """Step the fallback parameters by torch's implementation, and then the others by kernels."""
        self._step_by_torch(fallback, grad_factor, clip_value)
        return self._plan.step(self, request)

    def _step_by_torch(
        self, fallback: list[tuple[int, int, str]], grad_factor: float, clip_value: float = math.inf
    ) -> None:
        """Step the fallback parameters by torch's implementation, on the same states.

        Their gradients are multiplied by ``grad_factor``, and then clamped to [-clip_value, clip_value].
        """
        params_of: dict[int, list[Tensor]] = {}
        for number, index, _ in fallback:
            params_of.setdefault(number, []).append(self.param_groups[number]["params"][index])
            group = self.param_groups[number]
            for name in ("master", "stochastic_rounding", *cautious.NAMES):
                if group.get(name) and group.get("differentiable"):
                    raise ValueError(
                        f"{type(self).__name__}: group {number}: {name} cannot be given with differentiable=True"
                    )
        if self._slow_weight_update:
            self._slow_weight_update.before([p for params in params_of.values() for p in params], self._master_names())
        # A stand-in that shares all attributes with this optimizer but has only the fallback parameters.
        part = object.__new__(type(self))
        part.__dict__.update({k: v for k, v in self.__dict__.items() if k not in ("grad_scale", "found_inf")})
        as_they_are: list[dict[str, Any]] = []
        to_convert: list[tuple[dict[str, Any], Tensor, torch.dtype]] = []
        for number, params in params_of.items():
            group = self.param_groups[number]
            for p in params:
                cautious.check_gradient(type(self).__name__, group, p)
                if p.grad is not None and p.grad.is_sparse and self._in_blocks(group, p):
                    raise ValueError(
                        f"{type(self).__name__}: group {number}: state_dtype cannot be {block_states.CODES} for a "
                        f"parameter (shape {tuple(p.shape)}) whose sparse gradients torch's implementation steps"
                    )
            dtypes = {p: self._common_dtype(group, p) for p in params}
            as_they_are.append({**group, "params": [p for p in params if dtypes[p] is None]})
            to_convert += [(group, p, dtype) for p, dtype in dtypes.items() if dtype is not None]
        with contextlib.ExitStack() as stack:
            if grad_factor != 1.0 or clip_value != math.inf:
                all_params = [p for params in params_of.values() for p in params]
                stack.enter_context(scaled_gradients(all_params, grad_factor, clip_value))
            if any(group["params"] for group in as_they_are):
                part.param_groups = as_they_are
                cautious.step(part)
            numbers = self._param_numbers() if to_convert else {}
            for group, p, dtype in to_convert:
                self._step_converted(part, group, p, dtype, numbers[p])

    def _common_dtype(self, group: dict[str, Any], p: Tensor) -> torch.dtype | None:
        """Return the dtype to which a parameter and its states are promoted; None if they already have the same dtype.

        torch's implementation does not support states of another dtype than the parameter's.
        """
        held = [self.state[p].get(name) for name in self._state_names()] if p in self.state else []
        dtypes = [state.dtype for state in held if isinstance(state, Tensor)]
        in_blocks = self._in_blocks(group, p) or any(map(block_states.is_in_blocks, held))
        if (state_dtype := self._state_dtype(group, p)) is not None:
            dtypes.append(state_dtype)
        dtypes = [torch.float32 if dtype == block_states.CODES else dtype for dtype in dtypes]
        if master_name(group, p) or self._rounds(group, p) or any(self._rounds(group, state) for state in held):
            dtypes.append(torch.float32)
        if cautious.masks(group) and torch.finfo(p.dtype).bits == 16:
            dtypes.append(torch.float32)
        if all(dtype == p.dtype for dtype in dtypes) and not in_blocks:
            return None
        return functools.reduce(torch.promote_types, dtypes, p.dtype)

    def _step_converted(self, part: Native, group: dict[str, Any], p: Tensor, dtype: torch.dtype, number: int) -> None:
        """Step a parameter by torch's implementation, with parameter, gradient and states converted to ``dtype``.

        ``number`` is the parameter's place among all.
        """
        with torch.set_grad_enabled(bool(group.get("differentiable"))):
            own = self.state.get(p, {})
            master = master_name(group, p)
            copy, grad = master_of(p, own, master).to(dtype) if master else p.to(dtype), p.grad
            copy.grad = None if grad is None else grad.to(dtype)
            names = self._state_names()
            state = {name: value for name, value in own.items() if name not in MASTER_NAMES}
            converted = {name: self._as(dtype, state, name) for name in names if isinstance(state.get(name), Tensor)}
            part.param_groups = [{**self._group_to_convert(group, p), "params": [copy]}]
            part.state = defaultdict(dict, {copy: {**state, **converted}})
            cautious.step(part)
            stepped = part.state[copy]
            values = {name: stepped[name] for name in names if isinstance(stepped.get(name), Tensor)}
            self.state[p].update((name, value) for name, value in stepped.items() if name not in values)
            if self._counts_rounding(group, p, values):  # before anything is rounded: the random bits depend on it
                self.state[p]["step"] = self.state[p].get("step", _new_count()) + 1
            for name, value in values.items():
                if name in converted and not block_states.is_in_blocks(state[name]):
                    self._write(group, p, state[name], value, names.index(name), number)
                elif name in converted or self._in_blocks(group, p):
                    self._encode(group, p, name, value, number)
                else:  # created by this step
                    dtype = value.dtype if p.is_complex() else self._state_dtype(group, p) or p.dtype
                    if name in self.wide_states:
                        dtype = torch.promote_types(p.dtype, torch.float32)
                    self.state[p][name] = torch.empty_like(value, dtype=dtype)
                    self._write(group, p, self.state[p][name], value, names.index(name), number)
            if master:
                write_master(p, self.state[p], master, copy)
            else:
                self._write(group, p, p, copy, _core.PARAM_STREAM, number)

    def _state_dtype(self, group: dict[str, Any], p: Tensor) -> torch.dtype | None:
        """Return the dtype of a parameter's new states that are not in blocks; None: torch's."""
        if p.is_complex():
            return None
        state_dtype: torch.dtype | None = group.get("state_dtype")
        if state_dtype == block_states.CODES:
            return None if p.dtype == torch.float64 else torch.float32
        wide = master_name(group, p) or (self.copies and p.dtype.itemsize == 2)
        return state_dtype or (torch.float32 if wide else None)

    def _in_blocks(self, group: dict[str, Any], p: Tensor) -> bool:
        """Return whether a parameter's new states are stored in blocks of 8 bits."""
        return group.get("state_dtype") == block_states.CODES and block_states.fits(p)

    def _as(self, dtype: torch.dtype, state: Mapping[str, Any], name: str) -> Tensor:
        """Return a copy of a state in ``dtype``."""
        held: Tensor = state[name]
        if block_states.is_in_blocks(held):
            held = block_states.decoded(held, state[name + block_states.SUFFIX], name)
        return held.to(dtype)

    def _encode(self, group: dict[str, Any], p: Tensor, name: str, values: Tensor, number: int) -> None:
        """Write a state in blocks, which is created if it is missing."""
        state, scale_name = self.state[p], name + block_states.SUFFIX
        if not block_states.is_in_blocks(state.get(name)):
            state[name], state[scale_name] = block_states.new_state(p)
        stream, key = self._state_names().index(name), self._random_key(group, p, number)
        block_states.encode(values, name, key, stream, state[name], state[scale_name])

    def _rounds(self, group: dict[str, Any], tensor: object) -> bool:
        """Return whether a parameter without a master, or a state, is rounded stochastically to 16 bits."""
        return bool(group.get("stochastic_rounding")) and stochastic.has_16_bits(tensor)

    def _write(
        self, group: dict[str, Any], p: Tensor, target: Tensor, values: Tensor, stream: int, number: int
    ) -> None:
        """Write the new values of a parameter or of a state that is not in blocks."""
        if not self._rounds(group, target):
            target.copy_(values)
            return
        in_blocks = next(block_states.states_in_blocks(self.state[p]), None)
        order = p if in_blocks is None else self.state[p][in_blocks]
        stochastic.write(target, values, order, self._random_key(group, p, number), stream)

    def _param_numbers(self) -> dict[Tensor, int]:
        """Return the place of each parameter among all."""
        params = (p for group in self.param_groups for p in group["params"])
        return {p: number for number, p in enumerate(params, self._first_param)}

    def _random_key(self, group: dict[str, Any], p: Tensor, number: int) -> int:
        """Return the key of a parameter's random bits in the last step. ``number``: its place among all."""
        return _core.random_key(group.get("rounding_seed", 0), int(self.state[p].get("step", 0)), number)

    def _rounds_with_random_bits(self) -> bool:
        """Return whether some group asks for 8-bit states or stochastic rounding."""
        groups = self.param_groups
        return any(g.get("stochastic_rounding") or g.get("state_dtype") == block_states.CODES for g in groups)

    def _counts_rounding(self, group: dict[str, Any], p: Tensor, names: Iterable[str]) -> bool:
        """Return whether a parameter has a ``step`` only because something is rounded with random bits.

        Args:
            group: The parameter's group.
            p: The parameter.
            names: The states that it has, or will have.
        """
        held = self.state.get(p, {})
        new = block_states.CODES if self._in_blocks(group, p) else self._state_dtype(group, p) or p.dtype
        dtypes = {held[name].dtype if isinstance(held.get(name), Tensor) else new for name in names}
        rounds = block_states.CODES in dtypes
        if group.get("stochastic_rounding") and not p.is_complex():
            own = set() if master_name(group, p) else {p.dtype}
            rounds = rounds or bool(stochastic.DTYPES & (dtypes | own))
        return rounds and not _counts_steps(self.rule)

    def _master_names(self) -> dict[Tensor, str]:
        """Return the parameters that have a master, with the name of the state that holds it."""
        groups = [group for group in self.param_groups if group.get("master") is not None]
        return {p: name for group in groups for p in group["params"] if (name := master_name(group, p))}

    def _master_or_param(self, p: Tensor, master_names: Mapping[Tensor, str]) -> Tensor:
        name = master_names.get(p)
        return p if name is None else master_of(p, self.state.get(p, {}), name)

    def _group_to_convert(self, group: dict[str, Any], p: Tensor) -> dict[str, Any]:
        """Return the group, with defaults that depend on the parameter's dtype made explicit."""
        return group

    @classmethod
    def _cautious_options(cls) -> frozenset[str]:
        """Return which of ``cautious`` and ``cautious_weight_decay`` the optimizer has."""
        return _masks_of(cls.rule)

    def _decouples_weight_decay(self, group: Mapping[str, Any]) -> bool:
        """Return whether the weight decay of an optimizer that has ``cautious`` is decoupled."""
        always = "cautious_weight_decay" in self._cautious_options()
        return bool(group.get("decoupled_weight_decay", always))

    def _decay(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[float | Tensor, bool]:
        """Return the factor of decoupled weight decay, and whether it multiplies the updated parameter."""
        lr = group["lr"]
        return (lr.squeeze() if isinstance(lr, Tensor) else lr) * group["weight_decay"], False

    @classmethod
    def _state_names(cls) -> list[str]:
        """Return the names of all state tensors that a parameter can have, scalars excluded."""
        return _state_names_of(cls.rule)

    def _explain(self) -> list[tuple[int, int, str, str]]:
        """Return group, index, path and reason of each parameter, for :func:`onepass.explain`."""
        if reason := transform():
            groups = enumerate(self.param_groups)
            return [(g, i, "torch", reason) for g, group in groups for i in range(len(group["params"]))]
        arguments = {} if self._tail is None else self._tail.gradient_arguments()
        return self._plan.explain(self, _core.StepRequest(1.0, 1, **arguments))

    def _create_states(
        self,
        wanted: list[tuple[dict[str, Any], Tensor, Tensor, list[str], list[str]]],
        scalar_names: list[str],
        created: list[tuple[Tensor, str]],
    ) -> None:
        """Create the missing states: all of them or, if an exception is raised, none.

        Args:
            wanted: Group, parameter, gradient, and the names of the states and of the followers that the step needs.
            scalar_names: The scalars that each parameter has beside its states: ``step``, and those of the rule.
            created: Parameter and name of each state are appended, for :meth:`_discard_states`.
        """
        try:  # each is listed before it is created, because Ctrl-C may come between the two
            for group, p, grad, state_names, follower_names in wanted:
                state = self.state[p]
                own_names = [name for name in state_names if name in self._state_names()]
                if "step" not in state and self._counts_rounding(group, p, own_names):
                    created.append((p, "step"))
                    state["step"] = _new_count()
                for name in scalar_names:
                    if name not in state:
                        created.append((p, name))
                        state[name] = self._new_scalar(group, p, name)
                for name in (*state_names, *follower_names):
                    if state.get(name) is None:
                        created.append((p, name))
                        if name == "step":  # of a rule that does not count, for the random bits
                            state[name] = _new_count()
                        elif name in MASTER_NAMES:
                            state[name] = new_master(p, name)
                        elif name in follower_names:
                            master = master_name(group, p)
                            state[name] = master_of(p, state, master) if master else new_follower(p)
                        elif self._in_blocks(group, p):
                            scale_name = name + block_states.SUFFIX
                            created.append((p, scale_name))
                            state[name], state[scale_name] = block_states.new_state(p)
                        else:
                            state[name] = self._new_state(group, p, grad, name)
        except BaseException:
            self._discard_states(created)
            for _, p, *_ in wanted:
                if p in self.state and not self.state[p]:
                    del self.state[p]
            raise

    def _discard_states(self, created: list[tuple[Tensor, str]]) -> None:
        """Delete states that were created, or were about to be, for a step that was not performed."""
        for p, name in created:
            if p in self.state:
                self.state[p].pop(name, None)
                if not self.state[p]:
                    del self.state[p]

    def _initial_scalar(self, group: dict[str, Any], name: str) -> float:
        """Return the value of a scalar before the first step."""
        return 0.0

    def _counts_on_device(self, group: dict[str, Any]) -> bool:
        """Return whether torch keeps the scalars of a parameter on the parameter's device."""
        return bool(group.get("capturable") or group.get("fused"))

    def _new_scalar(self, group: dict[str, Any], p: Tensor, name: str) -> Any:
        """Return a new per-parameter scalar, with the dtype and device that torch uses."""
        dtype = scalar_dtype(group.get("fused"))
        device = p.device if self._counts_on_device(group) else "cpu"
        return torch.full((), self._initial_scalar(group, name), dtype=dtype, device=device)

    def _new_state(self, group: dict[str, Any], p: Tensor, grad: Tensor, name: str) -> Tensor:
        """Return a new state tensor: torch's, except for its dtype."""
        new = torch.zeros_like(p, dtype=self._state_dtype(group, p), memory_format=torch.preserve_format)
        return new.copy_(self._master_or_param(p, self._master_names()).detach()) if name in self.copies else new

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state_dict, in the form of torch's class.

        ``state_dtype`` is stored as a string, because torch.distributed.checkpoint can neither gather nor save a dtype.
        The first group has the state of a clipping policy, if ``max_norm`` is one.
        """
        saved = super().state_dict()
        for group in saved["param_groups"]:
            if isinstance(state_dtype := group.get("state_dtype"), torch.dtype):
                group["state_dtype"] = str(state_dtype).removeprefix("torch.")
        if self._tail is not None and (policy_state := self._tail.policy_state()) is not None:
            saved["param_groups"][0][POLICY_STATE] = policy_state
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this class or of torch's.

        As ``torch.optim.Optimizer.load_state_dict``, except that states keep the dtype in which they were saved (torch
        casts them to the parameter's dtype). If this optimizer was constructed with a ``state_dtype``, the states are
        converted to it, also from and to 8 bits, except those that are always float32 or wider (CAME's second moments).
        A ``master`` of this optimizer holds if the checkpoint has none; the parameters are then the masters at the next
        step.
        """
        saved: dict[str, Any] = {}
        own: list[dict[str, Any]] = []

        def look(_: Optimizer, final: dict[str, Any]) -> None:
            saved.update(final)
            own.extend({name: group.get(name) for name in OWN_KEYS} for group in self.param_groups)
            self._check_loaded(final, own)
            if self._tail is not None and self._tail.policy is not None:
                for group in final["param_groups"]:
                    if POLICY_STATE in group:  # in a copy: an invalid state raises before anything is loaded
                        deepcopy(self._tail.policy).load_state_dict(group[POLICY_STATE])

        def restore(_: Optimizer) -> None:
            numbers = self._param_numbers()
            policy_state = [group.pop(POLICY_STATE) for group in self.param_groups if POLICY_STATE in group]
            if policy_state and self._tail is not None:
                self._tail.load_policy_state(policy_state[0])
            for saved_group, group, arguments in zip(saved["param_groups"], self.param_groups, own, strict=True):
                converts = self._converts(saved_group)
                for name, value in arguments.items():
                    if value is not None and (name not in saved_group or (name == "state_dtype" and converts)):
                        group[name] = value
                forced = arguments["state_dtype"] if converts else None
                for key, p in zip(saved_group["params"], group["params"], strict=True):
                    count = self.state[p].get("step") if p in self.state else None
                    if isinstance(count, Tensor) and self.is_elementwise and not _counts_steps(self.rule):
                        self.state[p]["step"] = count.cpu()  # which only counts for random bits
                    master = master_name(group, p)
                    held = saved["state"].get(key, {})
                    self._restore_scalars(group, p, held)
                    for name in self.wide_states:
                        if isinstance(value := held.get(name), Tensor) and value.is_floating_point():
                            wide = torch.promote_types(value.dtype, torch.float32)
                            self.state[p][name] = value.to(device=p.device, dtype=wide)
                    in_blocks = set(block_states.states_in_blocks(held))
                    if not (_has_kernels(p.device) or master or in_blocks) or key not in saved["state"]:
                        continue
                    if in_blocks and forced is not None and not self._in_blocks(group, p):
                        held = block_states.decoded_state(held)
                        for name in in_blocks:
                            self.state[p][name] = held[name].to(self.state[p][name].device)
                            del self.state[p][name + block_states.SUFFIX]
                    is_torchs = not {"state_dtype", "master"} & saved_group.keys()
                    dtype = self._state_dtype(group, p) if master and is_torchs else forced
                    if dtype == block_states.CODES:
                        dtype = None if self._in_blocks(group, p) else self._state_dtype(group, p)
                    held = {name: value for name, value in held.items() if name not in self.wide_states}
                    _restore_dtypes(self.state[p], held, self._state_names(), dtype, master)
                    if forced == block_states.CODES and self._in_blocks(group, p):
                        for name in self._state_names():
                            if isinstance(self.state[p].get(name), Tensor) and name not in in_blocks:
                                self._encode(group, p, name, self.state[p][name], numbers[p])
            for p in numbers:
                _lay_out_as(p, self.state.get(p, {}), self._state_names())

        with while_loading(self, look, restore):
            super().load_state_dict(state_dict)

    def _converts(self, saved_group: Mapping[str, Any]) -> bool:
        """Return whether the states of a saved group are converted to this optimizer's ``state_dtype``."""
        return "state_dtype" in self.defaults or "state_dtype" not in saved_group

    def _check_loaded(self, state_dict: Mapping[str, Any], own: list[dict[str, Any]]) -> None:
        """Check, before anything is loaded, that the states of a state_dict can be decoded and encoded.

        Args:
            state_dict: The state_dict.
            own: The ``OWN_KEYS`` of this optimizer's groups. torch refuses a state_dict with other groups.

        Raises:
            ValueError: A state does not fit. The message names the parameter.
        """
        for number, (saved_group, group, arguments) in enumerate(
            zip(state_dict["param_groups"], self.param_groups, own, strict=False)
        ):
            forced = arguments["state_dtype"] if self._converts(saved_group) else None
            for index, (key, p) in enumerate(zip(saved_group["params"], group["params"], strict=False)):
                where = f"{type(self).__name__}: parameter {index} of group {number}"
                held = state_dict["state"].get(key, {})
                if not isinstance(held, Mapping):
                    raise ValueError(f"{where}: its state must be a dict, got {described(held)}")
                block_states.check(where, held)
                if forced != block_states.CODES or not block_states.fits(p):
                    continue
                for name in self._state_names():
                    if isinstance(value := held.get(name), Tensor) and not block_states.is_in_blocks(value):
                        block_states.check_unencoded(where, p, name, value, held.get("step", 0))

    def _restore_scalars(self, group: dict[str, Any], p: Tensor, saved: Mapping[str, Any]) -> None:
        """Undo torch's cast of the rule's scalars to the parameter's dtype, and put all numbers on one device.

        torch leaves the device of ``step`` as it was saved, unless the group has ``capturable`` or ``fused``. Kernels
        step a parameter only if all its numbers are on the CPU or on its device.
        """
        state = self.state.get(p, {})
        if not isinstance(count := state.get("step"), Tensor) or not isinstance(saved.get("step"), Tensor):
            return
        own = type(self)._counts_on_device is not Native._counts_on_device and p.device.type != "meta"
        device = (p.device if self._counts_on_device(group) else torch.device("cpu")) if own else count.device
        if own and _counts_steps(self.rule):
            state["step"] = count.to(device)
        for name in _scalar_names(self.rule):
            held = saved.get(name)
            if isinstance(held, Tensor) and held.is_floating_point() and isinstance(state.get(name), Tensor):
                state[name] = held.to(device)


@contextlib.contextmanager
def while_loading(
    optimizer: Optimizer,
    look: Callable[[Optimizer, dict[str, Any]], None],
    restore: Callable[[Optimizer], None],
) -> Iterator[None]:
    """Call ``look`` after the user's load pre-hooks, and ``restore`` before the user's load post-hooks."""
    before = optimizer.register_load_state_dict_pre_hook(look)
    after = optimizer.register_load_state_dict_post_hook(restore, prepend=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()


def _lay_out_as(p: Tensor, state: dict[str, Any], names: Sequence[str]) -> None:
    """Give states the strides of their parameter: those of a channels_last model may have been saved without them.

    Kernels step tensors of different strides several times more slowly.
    """
    plain = Tensor, torch.nn.Parameter
    if type(p) not in plain or p.layout != torch.strided:
        return
    for name in names:
        held = state.get(name)
        if (
            isinstance(held, Tensor)
            and type(held) in plain
            and held.layout == torch.strided
            and held.shape == p.shape
            and held.stride() != p.stride()
            and held.dtype != block_states.CODES  # whose blocks are in rows
            and held.device == p.device
        ):
            state[name] = torch.empty_like(p, dtype=held.dtype, requires_grad=False).copy_(held)


def _new_count() -> Tensor:
    """Return the ``step`` of a parameter whose rule does not count steps. It is always on the CPU."""
    return torch.zeros(())


def _check_rounding(where: str, group: Mapping[str, Any]) -> None:
    seed, stochastic = group.get("rounding_seed", 0), group.get("stochastic_rounding", False)
    check_flag(f"{where}: stochastic_rounding", stochastic)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"{where}: rounding_seed must be an integer >= 0 and below 2**64, got {described(seed)}")


def _restore_dtypes(
    state: dict[str, Any],
    saved: dict[str, Any],
    state_names: Collection[str],
    forced: torch.dtype | None,
    master: str | None,
) -> None:
    """Cast a loaded state to its saved dtypes; tensors in ``state_names`` to ``forced`` instead, unless it is None.

    ``master``: the name of the state that holds the parameter's master; None if it has none.
    """
    for name, value in saved.items():
        if name == "step" or (name == SLOW_PARAM and not master) or not isinstance(value, Tensor):
            continue
        if not value.is_floating_point() and name not in MASTER_NAMES:
            continue
        dtype = (forced if name in state_names else None) or value.dtype
        if state[name].dtype != dtype:
            state[name] = value.to(device=state[name].device, dtype=dtype)
