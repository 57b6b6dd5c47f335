"""The tail of a training step, in the same pass as the update: clipping, skipping, averages, copies and zeroing."""

from __future__ import annotations

import contextlib
import functools
import math
import operator
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer, swa_utils

from .. import _core
from ..training.averaged_model import AveragedModel, Slot, Slots, parameter_slots
from ..training.clipping_policies import ClippingPolicy
from ..training.restoring import Part, Undo
from .arguments import check_number, described, number
from .gradient_norm import local_part, mesh_of, total_norm
from .hooks import params_of

if TYPE_CHECKING:
    from .base import Native


class StepReport(NamedTuple):
    """The report of an optimizer's last step: the value of ``optimizer.last_step``.

    Attributes:
        grad_norm: Norm of all gradients, unscaled and before clipping. None if the step did not measure it: without
            ``max_norm`` and ``skip_nonfinite``, or if ``GradScaler`` skipped the step.
        coefficient: The factor by which ``max_norm`` multiplied the gradients; 1.0 if it did not change them.
        skipped: Whether the step was skipped. Parameters, states, step counts, averages and copies are then unchanged.
        reason: Why the step was skipped; ``""`` if it was not.

    Example:
        >>> p = torch.nn.Parameter(torch.zeros(4))
        >>> optimizer = onepass.SGD([p], lr=1.0, max_norm=1.0, skip_nonfinite=True)
        >>> p.grad = torch.full((4,), 2.0)
        >>> optimizer.step()
        >>> report = optimizer.last_step
        >>> report.grad_norm, round(report.coefficient, 3), report.skipped
        (4.0, 0.25, False)
        >>> p.grad = torch.full((4,), torch.nan)
        >>> optimizer.step()
        >>> optimizer.last_step.reason
        "the gradients' norm is nan"
    """

    grad_norm: float | None = None
    coefficient: float = 1.0
    skipped: bool = False
    reason: str = ""


FOUND_INF = StepReport(skipped=True, reason="GradScaler has found an infinite or NaN gradient")


class _Requests(NamedTuple):
    """The requests of a step.

    Attributes:
        first: The first request.
        norm: What it measures.
        made: Makes the second request, which comes after a fallback.
        left: The number of followers for which a request has no room.
    """

    first: _core.StepRequest
    norm: _core.NormRequest | None
    made: Callable[..., _core.StepRequest]
    left: int


class _Followers(NamedTuple):
    """The average and the copy of each parameter.

    Attributes:
        params: The parameters of all groups.
        ids: Their ids.
        slots: Where the averages and copies are held.
        average_slots: What ``AveragedModel._living_slots`` returned.
        averages: The averages, by the parameter's id.
        copies: The copies, by the parameter's id.
    """

    params: list[Tensor]
    ids: frozenset[int]
    slots: Slots
    average_slots: dict[int, Slot] | None
    averages: dict[int, Tensor]
    copies: dict[int, Tensor]

    def are_those_of(self, optimizer: Optimizer, average: AveragedModel | None) -> bool:
        """Return whether neither the parameters nor their averages and copies have been replaced."""
        lists = [group["params"] for group in optimizer.param_groups]
        return (
            sum(map(len, lists)) == len(self.params)
            and all(map(operator.is_, chain.from_iterable(lists), self.params))
            and (average is None or average._living_slots() is self.average_slots)
            and self.slots.are_unchanged()
        )


class Tail(Part):
    """The parts of a step other than the update, for the arguments of :meth:`Native._take_arguments`.

    Attributes:
        measures: Whether the step measures the norm of the gradients.
        policy: The object that chooses the coefficient of the gradients; None without one.
        clip_value: Limit of the gradients' elements; infinity without one.
        average: The average that the step moves; None without one.
        zeroes_grads: Whether the step zeroes the gradients.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        max_norm: float | ClippingPolicy | None,
        norm_type: float,
        clip_value: float | None,
        skip_nonfinite: bool,
        average: AveragedModel | None,
        copy_to: Sequence[Tensor] | nn.Module | None,
        zero_grad: bool,
    ) -> None:
        name = type(optimizer).__name__
        if isinstance(max_norm, type):  # a policy's class has the methods of a policy
            raise TypeError(
                f"{name}: max_norm must be a number or a policy, got the class {max_norm.__name__}: pass "
                f"{max_norm.__name__}()"
            )
        self.policy = max_norm if isinstance(max_norm, ClippingPolicy) else None
        self._limit = math.inf if max_norm is None or self.policy else _limit(f"{name}: max_norm", max_norm)
        self._largest = _is_largest(name, norm_type)
        self._skip_nonfinite = skip_nonfinite
        self.measures = max_norm is not None or self._skip_nonfinite
        self.clip_value = math.inf if clip_value is None else _limit(f"{name}: clip_value", clip_value)
        self.average = average
        self.zeroes_grads = zero_grad
        self._report: StepReport | None = None
        # Instead of _report, if only the GPU has the norm: three float64 as bytes.
        self._device_clipping: Tensor | None = None
        self._weight = 1.0  # of the averages in this step
        self._last_requests: tuple[tuple[Any, ...], _Requests] | None = None
        self._copy_slots = [] if copy_to is None else _copies_of(name, optimizer, copy_to)
        self._copied = params_of(optimizer) if self._copy_slots else []  # the parameter of each copy
        self._followers: _Followers | None = None
        if average is not None and not isinstance(average, AveragedModel):
            got = "torch's AveragedModel" if isinstance(average, swa_utils.AveragedModel) else described(average)
            raise TypeError(f"{name}: average must be a onepass.swa_utils.AveragedModel, got {got}")
        if (maker := _maker_of_parts()) and (asked := self.whole_step_arguments()):
            raise ValueError(
                f"{name}: {asked[0]} needs all gradients of a step, but {maker} gives each optimizer only some of the "
                f"parameters: leave out {asked[0]}. clip_grad_norm_ before the step clips all gradients"
            )
        self._find_followers(optimizer)

    def __getstate__(self) -> dict[str, Any]:
        # A copy has other parameters, with other ids.
        left_out = {"_device_clipping": None, "_last_requests": None, "_followers": None}
        return {**self.__dict__, "_report": self.report, **left_out}

    @classmethod
    def of(cls, state: dict[str, Any]) -> Tail:
        """Return the tail of a state that ``__getstate__`` has returned."""
        tail = cls.__new__(cls)
        tail.__dict__.update(state)
        return tail

    def _prepare_followers(self, optimizer: Optimizer) -> None:
        """Find the followers and the weight of the averages for the next step."""
        if self.measures and _FSDP1 in sys.modules:
            _refuse_flattened(type(optimizer).__name__, self.whole_step_arguments()[0], params_of(optimizer))
        self._find_followers(optimizer)
        if self.average is not None:
            self._weight = self.average._step_weight(optimizer)

    def _find_followers(self, optimizer: Optimizer) -> None:
        """Find the average and the copy of each parameter again if one of these tensors was added or replaced."""
        before = self._followers
        if before is not None and before.are_those_of(optimizer, self.average):
            return
        name, params = type(optimizer).__name__, params_of(optimizer)
        ids = frozenset(map(id, params))
        copied = self._copied if before is None else _exchanged(self._copied, before.params, params)
        copies: dict[int, Tensor] = {}
        for i, (p, copy) in enumerate(zip(copied, Slots(self._copy_slots).held, strict=True)):
            if not isinstance(copy, Tensor):
                raise TypeError(f"{name}: copy_to[{i}] must be a tensor, got {described(copy)}")
            if id(p) in ids:
                _check_follower(f"{name}: copy_to[{i}]", copy, p)
                copies[id(p)] = copy
        average_slots: dict[int, Slot] | None = None
        averages: dict[int, Tensor] = {}
        slots = self._copy_slots
        if self.average is not None:
            self.average._attach(optimizer)
            average_slots, averages = self.average._living_slots(), self.average._averages_of(params)
            if not averages:
                raise ValueError(
                    f"{name}: average has no averages of this optimizer's parameters: pass the average of the model "
                    "that is trained. After a copy or an unpickling, call average.update_parameters(model) first"
                )
            for i, p in enumerate(params):
                if (averaged := averages.get(id(p))) is not None and not (is_lazy(averaged) or is_lazy(p)):
                    _check_follower(f"{name}: average of parameter {i}", averaged, p)
            slots = [*slots, *self.average._slots_of(params).values()]
        self._copied, self._last_requests = copied, None
        self._followers = _Followers(params, ids, Slots(slots), average_slots, averages, copies)

    def gradient_arguments(self) -> dict[str, Any]:
        """Return the arguments of a request that say what is done with each gradient."""
        return {"clip_value": self.clip_value, "zeroes_grads": self.zeroes_grads}

    def follows(self) -> bool:
        """Return whether the step updates an average or copies."""
        return self.average is not None or bool(self._copy_slots)

    def may_skip(self) -> bool:
        """Return whether the norm of the gradients can skip a step."""
        return self._skip_nonfinite or self.policy is not None

    def whole_step_arguments(self) -> list[str]:
        """Return the arguments that need all parameters of a step at once."""
        asked = {
            "max_norm": self.policy is not None
            or self._limit != math.inf
            or (self.measures and not self._skip_nonfinite),
            "skip_nonfinite": self._skip_nonfinite,
            "average": self.average is not None,
            "copy_to": bool(self._copy_slots),
            "zero_grad": self.zeroes_grads,
        }
        return [name for name, is_asked in asked.items() if is_asked]

    # -- requests ----------------------------------------------------------------------------------------------------

    def followers(self) -> list[_core.Follower]:
        """Return the followers of a step: the averages and the copies."""
        assert self._followers is not None
        followers = []
        if self.average is not None:
            followers.append(_core.Follower("average", "average", self._weight, False, self._followers.averages))
        if self._copy_slots:
            followers.append(_core.Follower("copy", "copy_to", 1.0, False, self._followers.copies))
        return followers

    def norm_request(self, optimizer: Optimizer) -> _core.NormRequest | None:
        """Return what the step measures; None if it measures nothing."""
        if not self.measures:
            return None
        # The request is kept for the next step. Strong references to this object, which holds the parameters, or to the
        # policy, which may hold the optimizer, would be part of a cycle that Python cannot find.
        held, held_tail = weakref.ref(optimizer), weakref.ref(self)

        def norm_of(measures: list[float | None]) -> float:
            stepped, tail = held(), held_tail()
            assert stepped is not None
            assert tail is not None
            return tail.norm_of(stepped, measures)

        def coefficient(norm: float) -> float:
            tail = held_tail()
            assert tail is not None
            assert tail.policy is not None
            return _coefficient(tail.policy, norm)

        policy = None if self.policy is None else coefficient
        return _core.NormRequest(self._largest, self._limit, self._skip_nonfinite, policy, norm_of)

    def clipping(
        self,
        optimizer: Optimizer,
        request: _core.NormRequest,
        grad_factor: float,
        measures: Sequence[float | None] = (),
    ) -> tuple[float, float, bool]:
        """Return the norm, the coefficient and whether the step is skipped. ``measures``: see :func:`total_norm`."""
        norm = abs(grad_factor) * self.norm_of(optimizer, measures)
        return norm, *request.clipping(norm)

    def norm_of(self, optimizer: Optimizer, measures: Sequence[float | None] = ()) -> float:
        """Return the norm of all gradients, not unscaled. ``measures``: see :func:`total_norm`."""
        params = params_of(optimizer)
        return total_norm(params, [p.grad for p in params], self._largest, measures)

    # -- the step ----------------------------------------------------------------------------------------------------

    def step(self, optimizer: Native, grad_factor: float, threads: int) -> None:
        """Step all parameters, with everything that the tail adds, in one request if kernels cover it."""
        update = optimizer._slow_weight_update
        requests = self._requests(optimizer, update.followers if update else [], grad_factor, threads)
        result = optimizer._plan.step(optimizer, requests.first)
        norm, coefficient, skipped = result.norm, result.coefficient, result.skipped
        device_clipping = result.device_clipping
        if not (result.stepped or skipped) and requests.norm is not None:
            measures = result.measures or ()
            norm, coefficient, skipped = self.clipping(optimizer, requests.norm, grad_factor, measures)
        if not skipped:
            if not result.stepped:
                factor = grad_factor * coefficient
                request = requests.made(factor, fallback_stepped=True)
                result = optimizer._step_by_both(result.fallback, factor, request, self.clip_value)
            left: list[list[Tensor]] = result.unfollowed
            if update:
                update.after(left[0])
                left = [*left[1:], *([params_of(optimizer)] * requests.left)]
            self.follow(optimizer, left)
            if result.unzeroed:
                self.zero(result.unzeroed)
        elif self.zeroes_grads:
            self.zero(params_of(optimizer))
        if device_clipping is None:
            self.note(norm, coefficient, skipped)
        else:
            self._device_clipping = device_clipping

    def step_with_scaler(self, optimizer: Native, grad_scale: Tensor | None, found_inf: Tensor) -> bool:
        """Step without reading GradScaler's tensors on the CPU. Return False, with nothing done, if not possible."""
        if not self.measures or self.policy or self.follows():
            return False
        request = _core.StepRequest(
            1.0,
            torch.get_num_threads(),
            norm=self.norm_request(optimizer),
            grad_scale=grad_scale,
            found_inf=found_inf,
            **self.gradient_arguments(),
        )
        result = optimizer._plan.step(optimizer, request)
        if not result.stepped:
            return False
        self.zero(result.unzeroed)
        self._device_clipping = result.device_clipping
        return True

    def _requests(
        self, optimizer: Optimizer, slow: list[_core.Follower], grad_factor: float, threads: int
    ) -> _Requests:
        """Return the requests of a step: the last step's, if they are the same."""
        self._prepare_followers(optimizer)
        key = (grad_factor, threads, self._weight, id(optimizer))
        if not slow and self._last_requests is not None and self._last_requests[0] == key:
            return self._last_requests[1]
        followers = [*slow, *self.followers()]
        norm = self.norm_request(optimizer)
        made: Callable[..., _core.StepRequest] = functools.partial(
            _core.StepRequest,
            threads=threads,
            followers=followers[: _core.MAX_FOLLOWERS],
            **self.gradient_arguments(),
        )
        requests = _Requests(made(grad_factor, norm=norm), norm, made, max(0, len(followers) - _core.MAX_FOLLOWERS))
        if not slow:
            self._last_requests = key, requests
        return requests

    # -- after the step ----------------------------------------------------------------------------------------------

    def follow(self, optimizer: Native, params: Sequence[Sequence[Tensor]] | None = None) -> None:
        """Update the followers in torch operations.

        Args:
            optimizer: The optimizer that has stepped.
            params: For each of ``followers()``, the parameters for which the kernels have not updated it; None: all.
        """
        left = [params_of(optimizer)] * 2 if params is None else list(params)
        master_names = optimizer._master_names() if any(left) else {}
        assert self._followers is not None
        if self.average is not None:
            if own := left.pop(0):
                for p in own:
                    if (averaged := self._followers.averages.get(id(p))) is not None:
                        _move(averaged, optimizer._master_or_param(p, master_names), self._weight)
            self.average._note_step(optimizer, self._followers.ids)
        if self._copy_slots:
            for p in left.pop(0):
                # Without a gradient, only Lookahead changes a parameter.
                changed = p.grad is not None or optimizer._slow_weight_update is not None
                if changed and (copy := self._followers.copies.get(id(p))) is not None:
                    source = p if copy.dtype == p.dtype else optimizer._master_or_param(p, master_names)
                    copy.detach().copy_(source.detach())

    def zero(self, params: Iterable[Tensor]) -> None:
        """Zero the gradients of these parameters in torch operations."""
        with torch.no_grad():
            for p in params:
                if p.grad is not None:
                    p.grad.zero_()

    @property
    def report(self) -> StepReport | None:
        """Return what the last step did; None before the first step. Waits for the GPU if the norm is there.

        It is read each time, because each replay of a CUDA graph writes it again.
        """
        if self._device_clipping is None:
            return self._report
        if self._device_clipping.is_cuda:
            torch.cuda.synchronize(self._device_clipping.device)  # the step may have been on any stream
        norm, coefficient, skipped_by = self._device_clipping.view(torch.float64).tolist()
        if skipped_by == _core.SKIPPED_BY_SCALER:
            return FOUND_INF
        return self._report_of(norm, coefficient, bool(skipped_by))

    def _report_of(self, norm: float | None, coefficient: float, skipped: bool) -> StepReport:
        finite = norm is not None and math.isfinite(norm)
        reason = type(self.policy).__name__ if finite else f"the gradients' norm is {norm}"
        return StepReport(norm, coefficient, skipped, reason if skipped else "")

    def note(self, norm: float | None, coefficient: float, skipped: bool) -> None:
        """Record what the step did."""
        self._report, self._device_clipping = self._report_of(norm, coefficient, skipped), None

    def note_found_inf(self, optimizer: Optimizer) -> None:
        """Record that GradScaler has found an infinite or NaN gradient, so that the step is skipped."""
        if self.zeroes_grads:
            self.zero(params_of(optimizer))
        self._report, self._device_clipping = FOUND_INF, None

    # -- steps in torch operations -----------------------------------------------------------------------------------

    def around(self, optimizer: Native, grad_factor: float, step: Callable[[float], None]) -> None:
        """Make a step that is not one request to the core: everything but ``step`` in torch operations.

        Args:
            optimizer: The optimizer.
            grad_factor: Factor of the gradients.
            step: Steps all parameters; its argument is the factor of the gradients.
        """
        params = params_of(optimizer)
        self._prepare_followers(optimizer)
        norm: float | None = None
        coefficient, skips = 1.0, False
        if (request := self.norm_request(optimizer)) is not None:
            norm, coefficient, skips = self.clipping(optimizer, request, grad_factor)
        if not skips:
            if self.clip_value == math.inf:
                step(grad_factor * coefficient)
            else:
                with scaled_gradients(params, grad_factor * coefficient, self.clip_value):
                    step(1.0)
            self.follow(optimizer)
        if self.zeroes_grads:
            self.zero(params)
        self.note(norm, coefficient, skips)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def policy_state(self) -> dict[str, Any] | None:
        """Return the policy's state; None without a policy."""
        return None if self.policy is None else self.policy.state_dict()

    def undos(self) -> Iterator[Undo]:
        """Yield the function that restores the policy's statistics (:func:`onepass.training.restoring.restored`)."""
        if self.policy is not None:
            yield functools.partial(self.policy.load_state_dict, deepcopy(self.policy.state_dict()))

    def load_policy_state(self, state: dict[str, Any]) -> None:
        """Load the policy's state, if there is a policy."""
        if self.policy is not None:
            self.policy.load_state_dict(state)


def _coefficient(policy: ClippingPolicy, norm: float) -> float:
    coefficient = policy.coefficient(norm)
    check_number(f"{type(policy).__name__}.coefficient({norm}): the result", coefficient)
    coefficient = number(coefficient)
    if not 0.0 <= coefficient < math.inf:
        raise ValueError(
            f"{type(policy).__name__}.coefficient({norm}) must return a finite number >= 0, got {coefficient}"
        )
    return coefficient


_FSDP1 = "torch.distributed.fsdp.fully_sharded_data_parallel"


def _refuse_flattened(name: str, argument: str, params: Iterable[Tensor]) -> None:
    """Raise ValueError for parameters of FSDP1: each process has flattened parts of them, which are not DTensors."""
    if any(hasattr(p, "_fsdp_flattened") for p in params):
        raise ValueError(
            f"{name}: {argument} needs whole parameters or DTensors, but FullyShardedDataParallel gives each process "
            f"flattened parts of parameters: use fully_shard, or leave out {argument}"
        )


# The modules of torch that construct optimizers for a part of the parameters.
_MAKERS_OF_PARTS = {
    "torch.distributed.optim.zero_redundancy_optimizer": "ZeroRedundancyOptimizer",
    "torch.distributed.optim.apply_optimizer_in_backward": "_apply_optimizer_in_backward",
}


def _maker_of_parts() -> str | None:
    """Return the class or function of torch that constructs this optimizer for a part of the parameters, or None.

    It is found in the call stack of the constructor.
    """
    frame = sys._getframe()
    while frame is not None:
        if (module := frame.f_globals.get("__name__")) in _MAKERS_OF_PARTS:
            return _MAKERS_OF_PARTS[module]
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _limit(what: str, value: Any) -> float:
    check_number(what, value)
    limit = number(value)
    if not limit >= 0.0:
        raise ValueError(f"{what} must be >= 0, got {limit}")
    return limit


def _is_largest(name: str, norm_type: Any) -> bool:
    is_one = not isinstance(norm_type, Tensor) or norm_type.numel() == 1
    if not is_one or norm_type not in (2, math.inf, "inf"):
        raise ValueError(f"{name}: norm_type must be 2 or inf, got {described(norm_type)}")
    return bool(norm_type != 2)


def _exchanged(copied: list[Tensor], before: list[Tensor], now: list[Tensor]) -> list[Tensor]:
    """Return the parameter of each copy: the new one if another one has taken the parameter's place in the groups."""
    ids_before, ids_now = set(map(id, before)), set(map(id, now))
    places = zip(before, now, strict=False)
    new = {id(old): p for old, p in places if id(old) not in ids_now and id(p) not in ids_before}
    return [new.get(id(p), p) for p in copied]


def _copies_of(name: str, optimizer: Optimizer, copy_to: Sequence[Tensor] | nn.Module) -> list[Slot]:
    """Return the slot of the copy of each parameter, in the order of the groups. The copies are not checked."""
    number = len(params_of(optimizer))
    slots: dict[int, Slot] = {}
    copies: list[Tensor]
    if isinstance(copy_to, nn.Module):
        named, slots = dict(copy_to.named_parameters()), parameter_slots(copy_to)
        groups = optimizer.param_groups
        if all("param_names" in group for group in groups):
            names = [param_name for group in groups for param_name in group["param_names"]]
            if lacking := [each for each in names if each not in named]:
                raise ValueError(f"{name}: copy_to has no parameter {lacking[0]!r}")
            copies = [named[each] for each in names]
        elif len(groups) == 1:
            copies = [*named.values()]
        else:
            raise ValueError(
                f"{name}: copy_to: the parameters of the module cannot be matched with {len(groups)} parameter groups. "
                "Make the optimizer from named_parameters(), or pass a list of tensors in the order of the groups"
            )
    elif isinstance(copy_to, Iterable):
        copies = [*copy_to]
    else:
        raise TypeError(f"{name}: copy_to must be tensors or a module, got {described(copy_to)}")
    if len(copies) != number:
        raise ValueError(f"{name}: copy_to must have {number} tensors, one for each parameter, got {len(copies)}")
    return [slots.get(id(copy), ({0: copy}, 0)) for copy in copies]


def _check_follower(what: str, follower: Tensor, p: Tensor) -> None:
    """Check that a tensor can follow a parameter.

    It has its shape and layout, each element has memory of its own, and both or neither are DTensors of one mesh.
    """
    if follower is p:
        raise ValueError(f"{what} must be another tensor than its parameter, got the parameter")
    if follower.shape != p.shape:
        raise ValueError(f"{what} has shape {list(follower.shape)}, its parameter {list(p.shape)}")
    if follower.layout != p.layout:
        raise ValueError(f"{what} must be {p.layout}, as its parameter is, got {follower.layout}")
    local = local_part(follower.detach())
    if (
        local.layout == torch.strided
        and local.numel()
        and any(n > 1 and not step for n, step in zip(local.shape, local.stride(), strict=True))
    ):
        raise ValueError(f"{what} must have memory for each of its elements, got an expanded tensor: clone() it")
    mesh = mesh_of(p)
    if mesh_of(follower) != mesh:
        expected = "a plain tensor, as its parameter is" if mesh is None else f"a DTensor over its parameter's {mesh}"
        actual = "a plain tensor" if mesh_of(follower) is None else f"a DTensor over {mesh_of(follower)}"
        raise ValueError(f"{what} must be {expected}, got {actual}")


def _move(averaged: Tensor, p: Tensor, weight: float) -> None:
    """``averaged += weight * (p - averaged)``, as torch.optim.swa_utils does it; a copy if the weight is 1."""
    own, averaged = p.detach().to(averaged.device), averaged.detach()
    if weight == 1.0 or not (averaged.is_floating_point() or averaged.is_complex()):
        averaged.copy_(own)
    else:
        averaged.lerp_(own.to(averaged.dtype), weight)


@contextlib.contextmanager
def scaled_gradients(params: list[Tensor], factor: float, clip_value: float = math.inf) -> Iterator[None]:
    """Replace the gradients by copies within the context, scaled and then clamped to [-clip_value, clip_value]."""
    grads = [p.grad for p in params]
    try:
        for p, grad in zip(params, grads, strict=True):
            p.grad = None if grad is None else _clamped(grad * factor, clip_value)
        yield
    finally:
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad


def _clamped(grad: Tensor, limit: float) -> Tensor:
    if limit == math.inf:
        return grad
    if grad.is_sparse:
        grad = grad.coalesce()
        values = grad.values().clamp(-limit, limit)
        return torch.sparse_coo_tensor(grad.indices(), values, grad.shape, is_coalesced=True, check_invariants=False)
    if grad.is_complex():
        return torch.view_as_complex(torch.view_as_real(grad.resolve_conj()).clamp(-limit, limit))
    return grad.clamp(-limit, limit)
