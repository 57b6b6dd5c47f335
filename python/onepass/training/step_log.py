"""Log the steps of an optimizer as scalars for TensorBoard: :func:`log_to`."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from .. import _core
from ..optimizers.arguments import check_optimizer, described, hyperparameters, number, whole_at_least
from ..optimizers.combined import Combined
from ..optimizers.gradient_norm import is_dtensor, total_norm
from ..optimizers.hooks import has_found_inf, params_of, unwrapped
from ..optimizers.tail import StepReport, Tail
from ..optimizers.torch_operations import real
from ..optimizers.torch_private import foreach_norm, foreach_sub_
from ..optimizers.wrapper import innermost
from .backward import steps_in_backward


class Writer(Protocol):
    """A writer of scalars, such as ``torch.utils.tensorboard.SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Write one scalar."""


# -- norms -----------------------------------------------------------------------------------------------------------


def _real(t: Tensor) -> Tensor:
    """Return the elements of a tensor, which may be sparse or complex, as a dense real tensor."""
    if t.layout is not torch.strided:
        t = t.coalesce().values() if t.is_sparse else t.to_dense()
    return real(t)


def _place(t: Any) -> object:
    """Return a DTensor's mesh and placements; None for other tensors."""
    return (t.device_mesh, t.placements) if is_dtensor(t) else None


def _each_norm(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the Euclidean norms of all tensors, in any order.

    On a CPU they are computed in double, because long sums in float32 are inaccurate. The norms of DTensors are those
    of the whole tensors, which is a collective operation.
    """
    kinds: dict[tuple[torch.device, torch.dtype, object], list[Tensor]] = {}
    for tensor in map(_real, tensors):
        if tensor.numel():
            kinds.setdefault((tensor.device, tensor.dtype, _place(tensor)), []).append(tensor)
    found: list[Any] = [
        torch.stack(foreach_norm(some, 2, torch.float64 if device.type == "cpu" else _wide(dtype)))
        for (device, dtype, _), some in kinds.items()
    ]
    return [norms.full_tensor() if is_dtensor(norms) else norms for norms in found]


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which differences are computed: at least float32."""
    return torch.promote_types(dtype, torch.float32)


# A norm, or vectors of the partial norms that it is computed from, which a GPU may still be computing.
_Norm: TypeAlias = float | list[Tensor]


def _value(norm: _Norm) -> float:
    return norm if isinstance(norm, float) else math.hypot(*(x for part in norm for x in part.tolist()))


def _norm(tensors: list[Tensor]) -> _Norm:
    found = _core.norms([tensors], None, torch.get_num_threads())
    return _each_norm(tensors) if found is None else found[0]


class _Before:
    """The values of parameter groups before a step."""

    def __init__(self, groups: list[list[Tensor]], room: Tensor | None) -> None:
        self._groups = groups
        self.vector: Tensor | None = None  # the copy made by the kernels
        self._copies: list[list[Tensor]] = []  # the copies made by torch
        self.norms: Sequence[_Norm]
        copied = _core.copy(groups, room, torch.get_num_threads())
        if copied is not None:
            self.vector, self.norms = copied
        else:
            self._copies = [[p.to(_wide(p.dtype), copy=True) for p in group] for group in groups]
            self.norms = [_each_norm(group) for group in groups]

    def moved(self) -> Sequence[_Norm]:
        """Return the norm of each group's update since then."""
        if self.vector is not None:
            found = _core.norms(self._groups, self.vector, torch.get_num_threads())
            if found is None:
                raise RuntimeError("during the step, a parameter became one that kernels cannot read")
            return found
        for copies, group in zip(self._copies, self._groups, strict=True):
            if any(map(is_dtensor, group)):  # torch does not accept DTensors and others in one call
                for copy, p in zip(copies, group, strict=True):
                    copy.sub_(p)
            elif copies:
                foreach_sub_(copies, group)
        return [_each_norm(copies) for copies in self._copies]


# -- the log ---------------------------------------------------------------------------------------------------------


class _Step(NamedTuple):
    """The values that are recorded before a logged step."""

    scalars: dict[str, float]
    before: _Before | None  # None: GradScaler will skip the step
    grad_norm: _Norm | None  # None: it is known only after the step
    began: float


class StepLog:
    """The log of an optimizer, returned by :func:`log_to`. It ends with ``remove()`` or with its ``with`` block."""

    def __init__(self, writer: Writer, optimizer: Optimizer, interval: int, prefix: str, first_step: int) -> None:
        self.step = first_step  #: The number of the next step.
        self._writer = writer
        self._interval = interval
        self._prefix = prefix
        self._pending: _Step | None = None
        self._room: Tensor | None = None  # the last copy's memory: new memory takes five times as long to write
        self._last: tuple[int, float] | None = None  # number of the last logged step, and the time its log ended
        self._hooks = (optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after))

    def remove(self) -> None:
        """End the log and remove its hooks from the optimizer. The writer stays open."""
        for hook in self._hooks:
            hook.remove()
        self._pending = None
        self._room = None

    def __enter__(self) -> StepLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.step % self._interval:
            self._pending = None  # left by a step that raised
            return
        self._pending = self._look(optimizer, any(x is not None for x in (*args[1:], *kwargs.values())))

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                self._write(optimizer, pending)
        finally:
            self.step += 1  # also if the writer raises: the step was made

    @torch.no_grad()
    def _look(self, optimizer: Optimizer, has_closure: bool) -> _Step | None:
        arrived = time.perf_counter()
        tail = _tail_of(optimizer)
        if has_found_inf(optimizer):
            return _Step({}, None, None, arrived) if tail is not None and tail.measures else None
        groups = optimizer.param_groups
        scalars = {
            f"{name}/{index}": value
            for index, group in enumerate(groups)
            for name, value in (hyperparameters(group) | _driven(group)).items()
        }
        # Before the step, the gradients that the step unscales still have GradScaler's scale; after it, they may not,
        # or they may be zero. The closure will compute other gradients.
        is_known_after = has_closure or (tail is not None and tail.measures)
        grad_norm = None if is_known_after else _grad_norm(optimizer)
        before = _Before([[p for p in group["params"] if _moves(p)] for group in groups], self._room)
        self._room = before.vector
        if self._last is not None:
            last, done = self._last
            scalars["iteration_seconds"] = (arrived - done) / (self.step - last)
        return _Step(scalars, before, grad_norm, time.perf_counter())

    @torch.no_grad()
    def _write(self, optimizer: Optimizer, step: _Step) -> None:
        seconds = time.perf_counter() - step.began
        tail = _tail_of(optimizer)
        report = tail.report if tail is not None and tail.measures else None
        if report is not None and (report.skipped or step.before is None):
            scalars = _reported(report)
        else:
            scalars = {**step.scalars, "step_seconds": seconds}
            if "iteration_seconds" in scalars and self._last is not None:
                scalars["iteration_seconds"] += seconds / (self.step - self._last[0])
            if report is not None:
                scalars |= _reported(report)
            elif step.grad_norm is not None or not _zeroes_grads(optimizer):
                scalars["grad_norm"] = _unscaled(optimizer, step.grad_norm)
            scalars |= _update_to_weight(step.before)
        for name, value in scalars.items():
            self._writer.add_scalar(f"{self._prefix}/{name}", value, self.step)
        self._last = self.step, time.perf_counter()


def _tail_of(optimizer: Optimizer) -> Tail | None:
    """Return the tail of an optimizer's steps; for a wrapper, that of the wrapped optimizer."""
    return getattr(innermost(optimizer), "_tail", None)


def _zeroes_grads(optimizer: Optimizer) -> bool:
    """Return whether an optimizer's steps zero gradients; those of Combined, if an optimizer in it does."""
    optimizer = innermost(optimizer)
    if isinstance(optimizer, Combined):
        return any(map(_zeroes_grads, optimizer.optimizers))
    tail = _tail_of(optimizer)
    return tail is not None and tail.zeroes_grads


def _reported(report: StepReport) -> dict[str, float]:
    """Return the scalars of a step from its report."""
    norm = {} if report.grad_norm is None else {"grad_norm": float(report.grad_norm)}
    return {**norm, "clip_coefficient": float(report.coefficient), "skipped": float(report.skipped)}


def _driven(group: dict[str, Any]) -> dict[str, float]:
    """Return a group's momentum and betas if a scheduler sets them, which is known by the initial values it stored."""
    driven: dict[str, float | Tensor] = {}
    if group.keys() & {"initial_momentum", "base_momentum"} and "momentum" in group:
        driven["momentum"] = group["momentum"]
    if group.keys() & {"initial_betas", "base_momentum"} and "betas" in group:
        driven |= {f"beta{i}": beta for i, beta in enumerate(group["betas"], 1)}
    return {name: number(value) for name, value in driven.items()}


def _moves(p: Tensor) -> bool:
    """Return whether a step may change a parameter. A lazy parameter has no values yet."""
    return (p.requires_grad or p.grad is not None) and not is_lazy(p)


def _update_to_weight(before: _Before | None) -> dict[str, float]:
    """Return the norm of each group's update, divided by the norm that the group had before."""
    if before is None:
        return {}
    norms = zip(before.moved(), before.norms, strict=True)
    sizes = [(_value(update), _value(weight)) for update, weight in norms]
    return {f"update_to_weight/{index}": update / size for index, (update, size) in enumerate(sizes) if size > 0}


def _unscaled(optimizer: Optimizer, grad_norm: _Norm | None) -> float:
    """Return the norm of all gradients without GradScaler's scale; measure it if it is None."""
    scale = getattr(optimizer, "grad_scale", None)
    norm = _grad_norm(optimizer) if grad_norm is None else grad_norm
    return _value(norm) / (1.0 if scale is None else float(scale.item()))


def _grad_norm(optimizer: Optimizer) -> _Norm:
    params = params_of(optimizer)
    grads = [p.grad for p in params]
    if any(map(is_dtensor, params)):  # a process may lack gradients that others have, and must communicate all the same
        return total_norm(params, grads, largest=False)
    return _norm([grad for grad in grads if grad is not None])


def log_to(
    writer: Writer, optimizer: Optimizer, *, interval: int = 10, prefix: str = "optimizer", first_step: int = 0
) -> StepLog:
    r"""Log an optimizer's steps as scalars for TensorBoard.

    At each step whose number is a multiple of ``interval``, these scalars are written with the number of the step. G is
    the index of a parameter group: 0, 1, ...

    - ``PREFIX/lr/G``: learning rate of the step.
    - ``PREFIX/weight_decay/G``: weight decay, where the optimizer has one.
    - ``PREFIX/momentum/G``: momentum, where a scheduler sets it (:class:`onepass.ScheduleLR`,
      :class:`~onepass.lr_scheduler.OneCycleLR`, :class:`~onepass.lr_scheduler.CyclicLR`).
    - ``PREFIX/beta1/G``, ``PREFIX/beta2/G``: betas, where a scheduler sets one of them.
    - ``PREFIX/update_to_weight/G``: :math:`\|\theta' - \theta\| / \|\theta\|` over the parameters of the group that
      require a gradient or have one, with :math:`\theta` before the step and :math:`\theta'` after it. Not written
      where :math:`\theta = 0`.
    - ``PREFIX/grad_norm``: :math:`\|g\|` over the gradients of all groups before the step (after ``clip_grad_norm_``),
      without GradScaler's scale. With a closure, over the gradients after the step.
    - ``PREFIX/clip_coefficient``, ``PREFIX/skipped``: factor by which the step has clipped the gradients, and whether
      it was skipped (1, else 0). Written if the optimizer measures the norm of the gradients (``max_norm``,
      ``skip_nonfinite``). Then ``grad_norm`` is the norm in its ``last_step``, which is measured before clipping and
      has its ``norm_type``, and needs no further pass over the gradients.
    - ``PREFIX/step_seconds``: time of ``step()`` in seconds, including a closure.
    - ``PREFIX/iteration_seconds``: mean time from one step to the next in seconds (forward, backward, data) since the
      last logged step, without the time of logging itself.

    Norms are Euclidean, except ``grad_norm`` of an optimizer with ``norm_type=inf``; on a CPU they are summed in
    double. The norms of DTensors are those of the whole tensors, so every process of their mesh must log the same
    steps; all write the same values.

    Steps that are not logged are only counted. A logged step copies the parameters (the memory of the copy is reused)
    and makes a pass over parameters and gradients. This takes about 0.1 ms for a small model, and about 0.5 ms more in
    ``SummaryWriter``. If a training step takes less than a millisecond, a larger interval keeps the cost below 5 %. On
    a GPU, a logged step waits for the GPU at its end, and ``step_seconds`` is the time of the launch.

    Logging changes neither the result of a step nor the optimizer's ``state_dict``. It uses torch's step hooks, which
    are not copied or pickled with the optimizer. If several logs of one optimizer write the same step, the times of
    each include the work of the others. A step that raises is not counted, except if the writer raised.

    For a step that the optimizer skips, only ``grad_norm``, ``clip_coefficient`` and ``skipped`` are written. For a
    step that GradScaler skips, ``clip_coefficient`` and ``skipped`` are written if the optimizer measures the norm,
    else nothing. Such a step is counted if the scaler calls ``step()``, as it does with ``fused=True`` or an argument
    such as ``max_norm``.

    With ``zero_grad=True`` and a closure, ``grad_norm`` is written only if the optimizer measures the norm, because the
    gradients are zero after the step. ``max_norm=math.inf`` measures the norm and does not clip.

    Args:
        writer: A ``torch.utils.tensorboard.SummaryWriter`` (``pip install onepass[tensorboard]``), or any object with
            ``add_scalar(tag, value, step)``. It is not closed.
        optimizer: Any ``torch.optim.Optimizer``, including Lookahead.
        interval: Steps between two logged steps, >= 1.
        prefix: First part of all tags.
        first_step: Number of the optimizer's next step, >= 0. Set it when training is resumed.

    Returns:
        The log. ``remove()`` or the end of a ``with`` block ends it.

    Raises:
        TypeError: ``writer`` has no ``add_scalar``, ``optimizer`` is not a ``torch.optim.Optimizer``, or ``interval``
            or ``first_step`` is not an integer.
        ValueError: ``interval`` or ``first_step`` is out of range, or ``optimizer`` steps in backward
            (:func:`step_in_backward`).

    Example:
        >>> class Writer:  # instead of torch.utils.tensorboard.SummaryWriter("runs/1")
        ...     def add_scalar(self, tag, value, step):
        ...         tags.append(tag)
        >>> tags = []
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = onepass.AdamW(model.parameters(), lr=1e-3)
        >>> model(torch.ones(8, 4)).sum().backward()
        >>> with onepass.log_to(Writer(), optimizer, interval=1):
        ...     optimizer.step()
        >>> "optimizer/lr/0" in tags, "optimizer/grad_norm" in tags
        (True, True)
    """
    if not callable(getattr(writer, "add_scalar", None)):
        raise TypeError(f"log_to: writer must have a method add_scalar(tag, value, step), got {described(writer)}")
    check_optimizer("log_to: optimizer", optimizer)
    interval = whole_at_least("log_to: interval", interval, 1)
    first_step = whole_at_least("log_to: first_step", first_step, 0)
    if steps_in_backward(optimizer):
        raise ValueError(
            f"log_to: this {type(optimizer).__name__} steps in backward, so its step() has no gradients and no updates "
            "to log"
        )
    return StepLog(writer, unwrapped(optimizer), interval, prefix, first_step)
