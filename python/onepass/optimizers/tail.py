"""The tail of a training step, in the same pass as the update: clipping, skipping, averages, copies and zeroing."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import _core
from ..training.averaged_model import AveragedModel
from ..training.clipping_policies import ClippingPolicy
from .arguments import check_number, described, number
from .gradient_norm import is_dtensor, mesh_of, total_norm


class StepReport(NamedTuple):
    """What the last step did, ``optimizer.last_step``.

    Attributes:
        grad_norm: Norm of all gradients, unscaled and before clipping; None if the step did not measure it.
        coefficient: The factor by which the gradients were clipped; 1.0 if they were not.
        skipped: Whether the step was skipped, so that nothing has changed.
        reason: Why it was skipped; "" if it was not.
    """

    grad_norm: float | None = None
    coefficient: float = 1.0
    skipped: bool = False
    reason: str = ""


class Tail:
    """What a step does beside the update, for the arguments of :meth:`Native._take_arguments`.

    Attributes:
        norm: The request to measure the norm of the gradients; None if nothing depends on it.
        policy: The object that chooses the coefficient of the gradients; None without one.
        clip_value: Limit of the gradients' elements; infinity without one.
        average: The average that the step moves; None without one.
        zeroes_grads: Whether the step zeroes the gradients.
        report: What the last step did; None before the first step.
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
        self.policy = max_norm if isinstance(max_norm, ClippingPolicy) else None
        self._limit = math.inf if max_norm is None or self.policy else _limit(f"{name}: max_norm", max_norm)
        self._largest = _is_largest(name, norm_type)
        self._skip_nonfinite = bool(skip_nonfinite)
        self.measures = max_norm is not None or self._skip_nonfinite
        self.clip_value = math.inf if clip_value is None else _limit(f"{name}: clip_value", clip_value)
        self.average = average
        self.zeroes_grads = bool(zero_grad)
        self.report: StepReport | None = None
        self._copy_list = [] if copy_to is None else _copies_of(name, optimizer, copy_to)
        self._found_for: tuple[tuple[int, int], ...] = ()  # the lists of parameters that the next three belong to
        self._averages: dict[int, Tensor] = {}  # by the parameter's id
        self._copies: dict[int, Tensor] = {}
        self._dtensors: list[Tensor] = []
        if average is not None and not isinstance(average, AveragedModel):
            raise TypeError(f"{name}: average must be a onepass.swa_utils.AveragedModel, got {described(average)}")
        if (maker := _maker_of_parts()) and (asked := self.whole_step_arguments()):
            raise ValueError(
                f"{name}: {asked[0]} needs all gradients of a step, but {maker} gives each optimizer only some of the "
                f"parameters: leave out {asked[0]}. clip_grad_norm_ before the step clips all gradients"
            )
        self._find_followers(optimizer)

    def __getstate__(self) -> dict[str, Any]:
        # A copy has other parameters.
        return {**self.__dict__, "_found_for": (), "_averages": {}, "_copies": {}, "_dtensors": []}

    def _find_followers(self, optimizer: Optimizer) -> None:
        """Find the average and the copy of each parameter again if parameters were added or exchanged."""
        lists = tuple((id(group["params"]), len(group["params"])) for group in optimizer.param_groups)
        if lists == self._found_for:
            return
        params = _all_params(optimizer)
        self._dtensors = [p for p in params if is_dtensor(p)]
        self._copies = {id(p): copy for p, copy in zip(params, self._copy_list, strict=False)}
        if self.average is not None:
            self.average._attach(optimizer)
            self._averages = self.average._averages_of(params)
            if not self._averages:
                raise ValueError(
                    f"{type(optimizer).__name__}: average has no averages of this optimizer's parameters: pass that of "
                    "the model that is trained. If both are copies or were unpickled, call "
                    "average.update_parameters(model) first"
                )
            for i, p in enumerate(params):
                if id(p) in self._averages:
                    _check_mesh(f"{type(optimizer).__name__}: average of parameter {i}", self._averages[id(p)], p)
        self._found_for = lists

    def whole_step_arguments(self) -> list[str]:
        """Return the arguments that need all parameters of a step at once."""
        asked = {
            "max_norm": self.policy is not None
            or self._limit != math.inf
            or (self.measures and not self._skip_nonfinite),
            "skip_nonfinite": self._skip_nonfinite,
            "average": self.average is not None,
            "zero_grad": self.zeroes_grads,
        }
        return [name for name, is_asked in asked.items() if is_asked]

    # -- requests ----------------------------------------------------------------------------------------------------

    def followers(self, optimizer: Optimizer) -> list[_core.Follower]:
        """Return the followers of a step: the averages and the copies."""
        self._find_followers(optimizer)
        followers = []
        if self.average is not None:
            weight = self.average._step_weight(optimizer)
            followers.append(_core.Follower("average", "average", weight, False, self._averages))
        if self._copy_list:
            followers.append(_core.Follower("copy", "copy_to", 1.0, False, self._copies))
        return followers

    def norm_request(self, optimizer: Optimizer) -> _core.NormRequest | None:
        """Return what the step measures; None if it measures nothing."""
        if not self.measures:
            return None

        def norm_of(measures: list[float | None]) -> float:
            return self.norm_of(optimizer, measures)

        coefficient = None if self.policy is None else self._coefficient
        return _core.NormRequest(self._largest, self._limit, self._skip_nonfinite, coefficient, norm_of)

    def has_no_part(self) -> bool:
        """Return whether there are DTensors, but this process has no gradient of any.

        Other processes may have one. They then communicate to find the norm, and so must this process, although the
        kernels would measure all its gradients.
        """
        return bool(self._dtensors) and all(p.grad is None for p in self._dtensors)

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
        """Return the norm of all gradients as they are. ``measures``: see :func:`total_norm`."""
        params = _all_params(optimizer)
        return total_norm(params, [p.grad for p in params], self._largest, measures)

    def _coefficient(self, norm: float) -> float:
        assert self.policy is not None
        coefficient = float(self.policy.coefficient(norm))
        if not 0.0 <= coefficient < math.inf:
            raise ValueError(
                f"{type(self.policy).__name__}.coefficient({norm}) must return a finite number >= 0, got {coefficient}"
            )
        return coefficient

    # -- after the step ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def follow(self, optimizer: Optimizer, params: Sequence[Sequence[Tensor]] | None = None) -> None:
        """Update the followers in torch operations.

        Args:
            optimizer: The optimizer that has stepped.
            params: For each of ``followers()``, the parameters for which the kernels have not updated it; None: all.
        """
        left = [_all_params(optimizer)] * 2 if params is None else list(params)
        if self.average is not None:
            own = left.pop(0)
            averages = self.average._averages_of(own) if own else {}
            weight = self.average._step_weight(optimizer)
            for p in own:
                if (averaged := averages.get(id(p))) is not None:
                    _move(averaged, p, weight)
            self.average._note_step(optimizer)
        if self._copy_list:
            for p in left.pop(0):
                # Without a gradient, only Lookahead changes a parameter.
                changed = p.grad is not None or optimizer._slow_weight_update is not None  # type: ignore[attr-defined]
                if changed and (copy := self._copies.get(id(p))) is not None:
                    copy.copy_(p)

    @torch.no_grad()
    def zero(self, params: Iterable[Tensor]) -> None:
        """Zero the gradients of these parameters in torch operations."""
        for p in params:
            if p.grad is not None:
                p.grad.zero_()

    def note(self, norm: float | None, coefficient: float, skipped: bool, reason: str = "") -> None:
        """Record what the step did."""
        if skipped and not reason:
            finite = norm is not None and math.isfinite(norm)
            reason = type(self.policy).__name__ if finite else f"the gradients' norm is {norm}"
        self.report = StepReport(norm, coefficient, skipped, reason)

    def note_found_inf(self, optimizer: Optimizer) -> None:
        """Record that GradScaler has found an infinite or NaN gradient, so that the step is skipped."""
        if self.zeroes_grads:
            self.zero(_all_params(optimizer))
        self.report = StepReport(skipped=True, reason="GradScaler has found an infinite or NaN gradient")

    # -- steps in torch operations -----------------------------------------------------------------------------------

    def around(self, optimizer: Optimizer, grad_factor: float, step: Callable[[float], None]) -> bool:
        """Make a step that is not one request to the core: everything beside ``step`` in torch operations.

        Args:
            optimizer: The optimizer.
            grad_factor: Factor of the gradients.
            step: Steps all parameters; its argument is the factor of the gradients.

        Returns:
            Whether the step was made rather than skipped.
        """
        params = _all_params(optimizer)
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
        return not skips

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def policy_state(self) -> dict[str, Any] | None:
        """Return the policy's state; None without a policy."""
        return None if self.policy is None else self.policy.state_dict()

    def load_policy_state(self, state: dict[str, Any]) -> None:
        """Load the policy's state, if there is a policy."""
        if self.policy is not None:
            self.policy.load_state_dict(state)


# The modules of torch that make optimizers of a part of the parameters of a step.
_MAKERS_OF_PARTS = {
    "torch.distributed.optim.zero_redundancy_optimizer": "ZeroRedundancyOptimizer",
    "torch.distributed.optim.apply_optimizer_in_backward": "_apply_optimizer_in_backward",
}


def _maker_of_parts() -> str | None:
    """Return the name of what makes this optimizer of a part of the parameters only; None if it is the user's code.

    Such an optimizer cannot know it but from who calls its constructor.
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
    if norm_type not in (2, math.inf, "inf"):
        raise ValueError(f"{name}: norm_type must be 2 or inf, got {described(norm_type)}")
    return bool(norm_type != 2)


def _all_params(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _copies_of(name: str, optimizer: Optimizer, copy_to: Sequence[Tensor] | nn.Module) -> list[Tensor]:
    """Return the copy of each parameter, in the order of the groups."""
    params = _all_params(optimizer)
    copies: list[Tensor]
    if isinstance(copy_to, nn.Module):
        named = dict(copy_to.named_parameters())
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
    else:
        copies = [*copy_to]
    if len(copies) != len(params):
        raise ValueError(f"{name}: copy_to must have {len(params)} tensors, one for each parameter, got {len(copies)}")
    for i, (p, copy) in enumerate(zip(params, copies, strict=True)):
        if not isinstance(copy, Tensor):
            raise TypeError(f"{name}: copy_to[{i}] must be a tensor, got {described(copy)}")
        if copy.shape != p.shape:
            raise ValueError(f"{name}: copy_to[{i}] has shape {list(copy.shape)}, its parameter {list(p.shape)}")
        _check_mesh(f"{name}: copy_to[{i}]", copy, p)
    return copies


def _check_mesh(what: str, follower: Tensor, p: Tensor) -> None:
    """Check that a tensor can follow a parameter: both are DTensors of one mesh, or neither is a DTensor."""
    mesh = mesh_of(p)
    if mesh_of(follower) != mesh:
        expected = "a plain tensor, as its parameter is" if mesh is None else f"a DTensor over its parameter's {mesh}"
        actual = "a plain tensor" if mesh_of(follower) is None else f"a DTensor over {mesh_of(follower)}"
        raise ValueError(f"{what} must be {expected}, got {actual}")


def _move(averaged: Tensor, p: Tensor, weight: float) -> None:
    """``averaged += weight * (p - averaged)``, as torch.optim.swa_utils does it; a copy if the weight is 1."""
    own = p.detach().to(averaged.device)
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
