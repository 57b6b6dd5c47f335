"""What a training run's steps do, as scalars for TensorBoard: :func:`log_to`."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ._native import number

# Norms are taken of pieces and put together in double: a float32 sum over 16M elements is 6e-4 off.
PIECE = 1 << 14
PIECES = 1 << 5  # that torch is given at once: few calls, and what it makes of them stays in the cache

HYPERPARAMETERS = ("lr", "weight_decay")


class Writer(Protocol):
    """What takes the scalars, such as ``torch.utils.tensorboard.SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Takes one number."""


# -- norms -----------------------------------------------------------------------------------------------------------


def _real(t: Tensor) -> Tensor:
    """The numbers of a tensor, which may be sparse or complex, as a dense real one."""
    if t.layout is not torch.strided:
        t = t.coalesce().values() if t.is_sparse else t.to_dense()
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def _batches(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of small tensors of one kind, of PIECE elements or a little more in all; large ones alone."""
    batch: list[Tensor] = []
    kind, elements = None, 0
    for tensor in tensors:
        t = _real(tensor)
        if batch and (elements >= PIECE or (t.device, t.dtype) != kind):
            yield batch
            batch, elements = [], 0
        kind = (t.device, t.dtype)
        batch.append(t)
        elements += t.numel()
    if batch:
        yield batch


def _flat(batch: list[Tensor]) -> Tensor:
    """One vector of all the elements; where it can be, the memory of the tensor itself."""
    return torch._utils._flatten_dense_tensors(batch)  # type: ignore[no-untyped-call, no-any-return]


def _copied(batch: list[Tensor], to: Tensor | None) -> Tensor:
    """A copy of all the elements, in the memory of ``to`` if that is such a vector."""
    flat = _flat(batch)
    if len(batch) > 1:
        return flat
    if to is None or (to.shape, to.dtype, to.device) != (flat.shape, flat.dtype, flat.device):
        to = torch.empty_like(flat)
    return to.copy_(flat)


def _pieces(flat: Tensor) -> Iterator[Tensor]:
    """The elements in precision that norms can be taken in: matrices, each of whose rows is a piece."""
    exact = torch.promote_types(flat.dtype, torch.float32)
    for some in flat.split(PIECE * PIECES):  # type: ignore[no-untyped-call]
        rows = max(1, some.numel() // PIECE)
        last = some.numel() if rows == 1 else rows * PIECE
        yield some[:last].view(rows, last // rows).to(exact)
        if last < some.numel():
            yield some[last:].view(1, -1).to(exact)


class _Norm:
    """A Euclidean norm, known once :func:`_read` has fetched the parts of all norms from their device."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self.value = math.nan

    def add(self, pieces: Tensor) -> None:
        self.parts.append(torch.linalg.vector_norm(pieces, dim=1))


def _read(norms: Iterable[_Norm]) -> None:
    norms = list(norms)
    parts_on: dict[torch.device, list[Tensor]] = {}
    for norm in norms:
        for part in norm.parts:
            parts_on.setdefault(part.device, []).append(part)
    values_on = {device: iter(torch.cat(parts).tolist()) for device, parts in parts_on.items()}
    for norm in norms:
        norm.value = math.hypot(*(next(values_on[part.device]) for part in norm.parts for _ in range(part.numel())))


# -- the log ---------------------------------------------------------------------------------------------------------


class _Copy(NamedTuple):
    """Some parameters of a group, and what they were before the step."""

    group: int
    params: list[Tensor]
    before: Tensor


class _Step(NamedTuple):
    """What is known of a step that is to be logged before it is made."""

    scalars: dict[str, float]
    copies: list[_Copy]
    grad_norm: _Norm | None  # None: a closure is still to make the gradients
    began: float


class StepLog:
    """What :func:`log_to` returns: the log of an optimizer, until ``remove()`` or the end of a ``with`` block."""

    def __init__(self, writer: Writer, optimizer: Optimizer, interval: int, prefix: str, first_step: int) -> None:
        self.step = first_step  #: The number of the next step.
        self._writer = writer
        self._interval = interval
        self._prefix = prefix
        self._pending: _Step | None = None
        self._kept: list[Tensor] = []
        self._last: tuple[int, float] | None = None  # the last step that was logged, and when that was done
        self._hooks = (optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after))

    def remove(self) -> None:
        """Ends the log, and leaves nothing at the optimizer. The writer stays open."""
        for hook in self._hooks:
            hook.remove()
        self._pending = None
        self._kept = []

    def __enter__(self) -> StepLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.step % self._interval:
            self._pending = None  # that of a step which raised
            return
        self._pending = self._look(optimizer, any(x is not None for x in (*args[1:], *kwargs.values())))

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            self._write(optimizer, pending)
        self.step += 1

    @torch.no_grad()
    def _look(self, optimizer: Optimizer, has_closure: bool) -> _Step | None:
        arrived = time.perf_counter()
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and found_inf.item():
            return None
        groups = optimizer.param_groups
        scalars = {
            f"{name}/{index}": number(group[name])
            for name in HYPERPARAMETERS
            for index, group in enumerate(groups)
            if isinstance(group.get(name), int | float | Tensor)
        }
        # GradScaler's scale is still in the gradients that it leaves to the step to unscale; afterwards it may be gone.
        grad_norm = None if has_closure else _grad_norm(optimizer)
        batches = [
            (index, batch)
            for index, group in enumerate(groups)
            for batch in _batches(p for p in group["params"] if _moves(p))
        ]
        # Into the memory of the last copies where it fits: fresh memory takes five times as long to write.
        kept = itertools.chain(self._kept, itertools.repeat(None))
        copies = [_Copy(index, batch, _copied(batch, to)) for (index, batch), to in zip(batches, kept, strict=False)]
        self._kept = [copy.before for copy in copies]
        if self._last is not None:
            last, done = self._last
            scalars["iteration_seconds"] = (arrived - done) / (self.step - last)
        return _Step(scalars, copies, grad_norm, time.perf_counter())

    @torch.no_grad()
    def _write(self, optimizer: Optimizer, step: _Step) -> None:
        seconds = time.perf_counter() - step.began
        scalars = step.scalars
        scalars["step_seconds"] = seconds
        if "iteration_seconds" in scalars and self._last is not None:
            scalars["iteration_seconds"] += seconds / (self.step - self._last[0])
        grad_norm = step.grad_norm or _grad_norm(optimizer)
        weights: dict[int, _Norm] = {}
        updates: dict[int, _Norm] = {}
        for group, params, before in step.copies:
            weight, update = weights.setdefault(group, _Norm()), updates.setdefault(group, _Norm())
            for was, now in zip(_pieces(before), _pieces(_flat(params)), strict=True):
                weight.add(was)
                update.add(was.sub_(now))  # the sign does not matter, and nobody reads the copy again
        _read([grad_norm, *weights.values(), *updates.values()])
        scale = getattr(optimizer, "grad_scale", None)
        scalars["grad_norm"] = grad_norm.value / (1.0 if scale is None else float(scale.item()))
        for group, weight in weights.items():
            if weight.value > 0:
                scalars[f"update_to_weight/{group}"] = updates[group].value / weight.value
        for name, value in scalars.items():
            self._writer.add_scalar(f"{self._prefix}/{name}", value, self.step)
        self._last = self.step, time.perf_counter()


def _moves(p: Tensor) -> bool:
    """Whether a step may move a parameter; one that has no shape yet cannot be looked at."""
    return (p.requires_grad or p.grad is not None) and not is_lazy(p)


def _grad_norm(optimizer: Optimizer) -> _Norm:
    norm = _Norm()
    grads = (p.grad for group in optimizer.param_groups for p in group["params"])
    for batch in _batches(grad for grad in grads if grad is not None):
        for piece in _pieces(_flat(batch)):
            norm.add(piece)
    return norm


def log_to(
    writer: Writer, optimizer: Optimizer, *, interval: int = 10, prefix: str = "optimizer", first_step: int = 0
) -> StepLog:
    r"""Logs what an optimizer's steps do, as scalars, for TensorBoard.

    Each step whose number is a multiple of ``interval`` writes, under its number,

    =========================== ======================================================================================
    ``PREFIX/lr/G``             learning rate of parameter group G (0, 1, ...) with which the step is made
    ``PREFIX/weight_decay/G``   its weight decay, where the optimizer has one
    ``PREFIX/update_to_weight/G`` :math:`\|\theta' - \theta\| / \|\theta\|`, over all parameters of group G that require
                                a gradient or have one; :math:`\theta` before the step, :math:`\theta'` after it; not
                                written where :math:`\theta = 0`
    ``PREFIX/grad_norm``        :math:`\|g\|` over the gradients of all groups, as the step takes them: clipped if they
                                have been clipped, without GradScaler's scale; with a closure, those that it has left
    ``PREFIX/step_seconds``     seconds that ``step()`` took, a closure included
    ``PREFIX/iteration_seconds`` seconds from step to step (forward, backward, data and all), the mean since the last
                                step that was logged; the log's own work is not in it
    =========================== ======================================================================================

    Norms are Euclidean: in the parameter's own precision, float32 at least, over pieces of 16,384 elements or a few
    more, and in double over the pieces. The other steps are only counted, so the cost is that of the logged ones: a
    copy of the parameters, whose memory is kept from one to the next, and a pass over parameters and gradients. On a
    GPU a logged step waits for it once, at the end, and ``step_seconds`` is the time to launch.

    Logging does not change what the step computes, nor the optimizer's ``state_dict``. It hangs on torch's step hooks,
    which a copy or a pickle of the optimizer does not take along. Of several logs on one optimizer each times the
    others' work in a step that both write. A step that raises is not counted; one that GradScaler skips is not written,
    and is counted if the optimizer's ``step()`` is called for it (by onepass's and torch's fused classes, which do the
    skipping themselves).

    Args:
        writer: A ``torch.utils.tensorboard.SummaryWriter`` (``pip install onepass[tensorboard]``), or anything with
            ``add_scalar(tag, value, step)``. It is not closed.
        optimizer: Any optimizer, of torch, of onepass (Lookahead too) or another.
        interval: Steps from one that is written to the next, at least 1.
        prefix: What all tags begin with.
        first_step: The number of the optimizer's next step; not 0 where training is resumed.

    Returns:
        The log. ``remove()`` ends it; so does the end of a ``with`` block.

    Raises:
        TypeError: ``writer`` has no ``add_scalar``, or ``optimizer`` is no ``torch.optim.Optimizer``.
        ValueError: ``interval`` or ``first_step`` is out of its range.
    """
    if not callable(getattr(writer, "add_scalar", None)):
        raise TypeError(f"writer must have a method add_scalar(tag, value, step), but is a {type(writer).__name__}")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, but is a {type(optimizer).__name__}")
    for name, value, least in (("interval", interval, 1), ("first_step", first_step, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"Invalid {name}: {value}; it must be an int of at least {least}")
    return StepLog(writer, optimizer, interval, prefix, first_step)
