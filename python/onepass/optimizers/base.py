"""Base class of onepass's optimizers: a step that runs in the compiled core.

:class:`Native` precedes a ``torch.optim`` class in the bases of each optimizer. Everything but the step (constructor,
parameter groups, hooks, state names, ``state_dict``) is torch's. The step is one call of the core for all parameters
that the kernels cover; torch's implementation steps the others.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import _core
from ..training.averaged_model import AveragedModel
from ..training.clipping_policies import ClippingPolicy
from . import block_states, cautious
from .arguments import (
    HyperTypes,
    check_flag,
    check_hyperparameters,
    described,
    dtype_name,
    groups_kept_on_error,
    hyper_types,
    module_refused,
    noted,
)
from .constructors import constructor
from .fallback import counts_rounding, new_count, step_by_torch
from .gradient_norm import add_up_sums
from .hooks import Step, evaluate, has_found_inf, hooked, only_creates_states
from .loading import OWN_KEYS, POLICY_STATE, packed, states_restored
from .master import NAMES as MASTER_NAMES
from .master import check_master, forget_low_bits, master_name, master_of, new_master, state_to_save
from .rules import RULES
from .tail import StepReport, Tail
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
    """Allocate ``size`` bytes of workspace on a GPU, on the CPU if ``cuda`` is negative, from torch's allocator."""
    device = torch.device("cuda", cuda) if cuda >= 0 else torch.device("cpu")
    return torch.empty(size, dtype=torch.uint8, device=device)


def _set_torch(
    exchange_api: object = dlpack_exchange_api,
    workspace: Callable[[int, int], Tensor] = _workspace,
    current_device: Callable[[], int] = current_device,
    set_device: Callable[[int], None] = torch.cuda.set_device,
) -> None:
    """Pass to the core the objects of torch that it uses. Tests call this again with substitutes."""
    increment_version = torch.autograd.graph.increment_version
    _core.set_torch(
        torch.Tensor,
        torch.nn.Parameter,
        increment_version,
        exchange_api,
        workspace,
        add_up_sums,
        current_device,
        set_device,
    )


_set_torch()

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
    # Not Adafactor and CAME, which kernels do not step on a GPU.
    elif optimizer.rule in RULES and RULES[optimizer.rule].counts_steps:
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
def _plain_request(threads: int) -> _core.StepRequest:
    """Return the request of a step without scaling and followers, cached because nearly every step uses it."""
    return _core.StepRequest(1.0, threads)


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

    # The tail of a step; None if no argument needs it.
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

            The arguments are those of the class, and these, which every optimizer but :class:`LBFGS` has. Without them,
            a step computes the same as torch's. With those of the tail of a step, ``optimizer.last_step`` reports what
            the step did.

            Args:
                master: Whether 16-bit parameters have float32 master weights (:doc:`/master_weights`). ``"split"``: for
                    bfloat16 parameters, the state ``master_low`` holds the low 16 bits of the masters. ``"float32"``:
                    for bfloat16 and float16 parameters, the state ``master`` holds the masters. The other states are
                    then in float32, unless ``state_dtype`` is given. Other parameters have no master. A parameter group
                    may have its own value. None: no masters.
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
                copy_to: Tensors with the shapes of the parameters, in the order of the groups, or a module with such
                    parameters. Each step writes the new parameters to these tensors, converted to their dtypes.
                zero_grad: Whether each step, including a skipped one, sets the gradients to zero in place.
                stochastic_rounding: Whether 16-bit parameters and states are rounded stochastically
                    (:doc:`/stochastic_rounding`), instead of to the nearest number: up with a probability that is the
                    distance from the lower number divided by the distance between the two numbers. Parameters with a
                    master are rounded to nearest. A parameter group may have its own value.
                rounding_seed: Seed of the random bits of stochastic rounding, also of 8-bit states
                    (:doc:`/8bit_states`): an integer >= 0 and below 2**64. None: 0.
                cautious: Whether an element is updated only if its update has the sign of its gradient; the remaining
                    updates are then larger (:doc:`/cautious`). A parameter group may have its own value.
                cautious_weight_decay: Whether a decoupled weight decay leaves out the elements that the update moves
                    away from zero (:doc:`/cautious`). A parameter group may have its own value.

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
        tail = Tail(  # made even if not needed, because it checks norm_type
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
            if tail.policy is not None:
                self.param_groups[0].setdefault(POLICY_STATE, "")
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
            raise ValueError(f"{name}: state_dtype cannot be {state_dtype}, because {name} has no 8-bit states")

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
                ``master`` is not valid for the group, ``rounding_seed`` is out of range, or the optimizer does not have
                ``cautious`` or ``cautious_weight_decay``.
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
        if names := self._master_names():
            own = {p: self._state_to_save(p, held) if p in names else held for p, held in self.state.items()}
            state["state"] = defaultdict(dict, own)
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
        if has_found_inf(self):
            return None
        grad_scale = getattr(self, "grad_scale", None)
        return 1.0 if grad_scale is None else 1.0 / float(grad_scale.item())

    def _step_with_scaler(self, found_inf: Tensor | int) -> bool:
        """Step without reading GradScaler's tensors on the CPU. Return False, with nothing done, if not possible."""
        if not isinstance(found_inf, Tensor) or _core.cuda_device(found_inf) < 0 or self._slow_weight_update:
            return False
        if not all(map(self._counts_on_device, self.param_groups)) and RULES[self.rule].counts_steps:
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
        elif tail := self._tail_of_step():
            tail.around(self, grad_factor, functools.partial(self._step_by_torch_alone, transformed_by))
        else:
            self._step_by_torch_alone(transformed_by, grad_factor)

    def _tail_of_step(self) -> Tail | None:
        """Return the tail of the step; None in a step that only creates states."""
        return None if self._tail is None or only_creates_states(self) else self._tail

    def _step_natively(self, grad_factor: float) -> None:
        """Step all parameters by kernels, and by torch's implementation those that no kernel covers."""
        update, threads = self._slow_weight_update, torch.get_num_threads()
        if (tail := self._tail_of_step()) is not None:
            tail.step(self, grad_factor, threads)
            return
        made = functools.partial(_core.StepRequest, grad_factor, threads, update.followers if update else [])
        is_plain = grad_factor == 1.0 and update is None
        result = self._plan.step(self, _plain_request(threads) if is_plain else made())
        if not result.stepped:
            result = self._step_by_both(result.fallback, grad_factor, made(fallback_stepped=True))
        if update:
            update.after(result.unfollowed[0])

    def _step_by_torch_alone(self, reason: str, grad_factor: float) -> None:
        """Step all parameters by torch's implementation."""
        params = [(p, g, i) for g, group in enumerate(self.param_groups) for i, p in enumerate(group["params"])]
        fallback = [(g, i, reason) for p, g, i in params if p.grad is not None]
        if fallback:
            step_by_torch(self, fallback, grad_factor)
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
        while True:
            step_by_torch(self, fallback, grad_factor, clip_value)
            result = self._plan.step(self, request)
            if result.stepped:
                return result
            fallback = result.fallback  # more parameters, because of the dtypes of states that the step has created

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

    def _param_numbers(self) -> dict[Tensor, int]:
        """Return the place of each parameter among all."""
        params = (p for group in self.param_groups for p in group["params"])
        return {p: number for number, p in enumerate(params, self._first_param)}

    def _rounds_with_random_bits(self) -> bool:
        """Return whether a group has 8-bit states or stochastic rounding."""
        groups = self.param_groups
        return any(g.get("stochastic_rounding") or g.get("state_dtype") == block_states.CODES for g in groups)

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
        hyper = RULES[cls.rule].hyper if cls.rule in RULES else []
        return frozenset(name.rstrip("?!") for name in hyper) & {*cautious.NAMES}

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
        return RULES[cls.rule].states

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
            scalar_names: The scalars that each parameter has in addition to states: ``step``, and those of the rule.
            created: Parameter and name of each state are appended, for :meth:`_discard_states`.
        """
        try:  # each is listed before it is created, because Ctrl-C may come between the two
            for group, p, grad, state_names, follower_names in wanted:
                state = self.state[p]
                own_names = [name for name in state_names if name in self._state_names()]
                if "step" not in state and counts_rounding(self, group, p, own_names):
                    created.append((p, "step"))
                    state["step"] = new_count()
                for name in scalar_names:
                    if name not in state:
                        created.append((p, name))
                        state[name] = self._new_scalar(group, p, name)
                for name in (*state_names, *follower_names):
                    if state.get(name) is None:
                        created.append((p, name))
                        if name == "step":  # of a rule that does not count, for the random bits
                            state[name] = new_count()
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

    @property
    def _chooses_device_of_counts(self) -> bool:
        """Whether the class decides where the scalars are kept, rather than torch's arguments."""
        return type(self)._counts_on_device is not Native._counts_on_device

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

    def _state_to_save(self, p: Tensor, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the state of a parameter that has a master, as it is saved or copied."""
        return state_to_save(p, state)

    def state_dict(self) -> dict[str, Any]:
        """Return the state_dict, in the form of torch's class.

        ``state_dtype`` is stored as a string, because torch.distributed.checkpoint can neither gather nor save a dtype.
        The first group has the state of a clipping policy, if ``max_norm`` is one.
        """
        saved = super().state_dict()
        if names := self._master_names():
            for group, saved_group in zip(self.param_groups, saved["param_groups"], strict=False):
                for p, key in zip(group["params"], saved_group["params"], strict=False):
                    if p in names and (held := saved["state"].get(key)) is not None:
                        saved["state"][key] = self._state_to_save(p, held)
        for group in saved["param_groups"]:
            if isinstance(state_dtype := group.get("state_dtype"), torch.dtype):
                group["state_dtype"] = dtype_name(state_dtype)
        if self._tail is not None and (policy_state := self._tail.policy_state()) is not None:
            saved["param_groups"][0][POLICY_STATE] = packed(policy_state)
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this class or of torch's.

        Differs from ``torch.optim.Optimizer.load_state_dict`` in that states keep the dtype in which they were saved
        (torch casts them to the parameter's dtype). If this optimizer was constructed with a ``state_dtype``, the
        states are converted to it, including from and to 8 bits, except those that are always float32 or wider (CAME's
        second moments). If the checkpoint has no ``master``, this optimizer keeps its own, and the parameters are the
        masters in the next step.
        """
        with states_restored(self):
            super().load_state_dict(state_dict)


def _check_rounding(where: str, group: Mapping[str, Any]) -> None:
    seed, stochastic = group.get("rounding_seed", 0), group.get("stochastic_rounding", False)
    check_flag(f"{where}: stochastic_rounding", stochastic)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"{where}: rounding_seed must be an integer >= 0 and below 2**64, got {described(seed)}")
