"""Updates within the backward pass: a gradient is used as soon as it is complete, and freed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

from ..optimizers.hooks import unwrapped
from ..optimizers.lookahead import Lookahead
from ..optimizers.torch_private import (
    copy_operator,
    disable_dynamo,
    foreach_zero_,
    foreach_zero_operator,
    make_subclass,
)

_ZEROING = {torch.ops.aten.zero_.default, foreach_zero_operator}
_MOVING = {copy_operator, torch.ops.aten.detach.default}


class FreedGradient(Tensor):
    """What is left in ``.grad`` of a gradient that was used within ``backward()``: one element, and an error to use.

    With None there, ``clip_grad_norm_`` and ``GradScaler`` would find no gradients, and do nothing in silence. What
    ``zero_grad`` and ``Module.to`` do to gradients is no error.
    """

    @classmethod
    def of(cls, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> FreedGradient:
        """One in the place of a gradient of these."""
        element = torch.zeros((), dtype=dtype, device=device)
        return make_subclass(cls, element.expand(shape))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"FreedGradient({tuple(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in _ZEROING:
            if isinstance(args[0], list) and (others := [grad for grad in args[0] if not isinstance(grad, cls)]):
                foreach_zero_(others)
            return args[0]
        if func in _MOVING:
            made = kwargs or {}
            return cls.of(args[0].shape, made.get("dtype") or args[0].dtype, made.get("device") or args[0].device)
        raise RuntimeError(
            f"{func} asks for a gradient that onepass.step_in_backward has used, and freed, within backward(): what "
            "needs gradients afterwards (clip_grad_norm_, GradScaler, DistributedDataParallel) cannot work with it"
        )


def _forget_freed(p: Tensor) -> None:
    if isinstance(p.grad, FreedGradient):
        p.grad = None


@contextlib.contextmanager
def freed_aside(params: Iterable[Tensor]) -> Iterator[None]:
    """Within this context, gradients that have been freed are None, as if there were none."""
    freed = [(p, p.grad) for p in params if isinstance(p.grad, FreedGradient)]
    for p, _ in freed:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in freed:
            p.grad = grad


class StepInBackward:
    """What :func:`step_in_backward` returns: updates within ``backward()``, until ``remove()``."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._steppers: dict[Tensor, tuple[_Stepper, tuple[RemovableHandle, ...]]] = {}
        self._accumulating = False
        self._hook = optimizer.register_step_pre_hook(self._before_step)
        self._join()

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Backward passes in this block add up gradients, and update nothing: all micro-batches but the last."""
        before, self._accumulating = self._accumulating, True
        try:
            yield
        finally:
            self._accumulating = before

    def remove(self) -> None:
        """Ends it: gradients are left for ``optimizer.step()`` again."""
        for p, (_, handles) in self._steppers.items():
            _forget_freed(p)
            for handle in handles:
                handle.remove()
        self._steppers = {}
        self._hook.remove()

    def _join(self) -> None:
        """Takes in parameters that were added to the optimizer, or have been unfrozen."""
        for group in self._optimizer.param_groups:
            for p in group["params"]:
                if p.requires_grad and p not in self._steppers:
                    # The one before a gradient is put into .grad, the other after. Python's garbage collector does not
                    # see what the other refers to, so only the one keeps all of this alive.
                    handles = (
                        p.register_hook(partial(self._before_gradient, p)),
                        p.register_post_accumulate_grad_hook(partial(_update_by, ref(self))),
                    )
                    self._steppers[p] = _Stepper(self._optimizer, p), handles

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(x is not None for x in (*args[1:], *kwargs.values())):
            raise RuntimeError(
                "step() takes no closure while the optimizer steps in backward: a closure's backward() has updated the "
                "parameters before step() could look at the loss; remove() the one or leave out the other"
            )
        for p in self._steppers:
            _forget_freed(p)
        self._join()

    def _before_gradient(self, p: Tensor, _: Tensor) -> None:
        _forget_freed(p)

    def _update(self, p: Tensor) -> None:
        stepper = self._steppers[p][0]
        if not self._accumulating and stepper.step():
            p.grad = stepper.freed()


def _update_by(stepping: ref[StepInBackward], p: Tensor) -> None:
    # torch.compile traces what autograd calls, too, within a function that is compiled.
    if torch.compiler.is_compiling():
        _update_untraced(stepping, p)
    elif (held := stepping()) is not None:
        held._update(p)


_update_untraced = disable_dynamo(_update_by)


class _Stepper:
    """Steps one parameter, on the states and with the hyperparameters that its optimizer has at that moment."""

    def __init__(self, optimizer: Optimizer, p: Tensor) -> None:
        self._optimizer, self._p = optimizer, p
        self._place = 0, 0  # where the parameter was last: its group, and its index there
        # An optimizer of the same class that sees this parameter alone, with a plan of its own. Hooks are the whole
        # optimizer's, whose step() calls them.
        self._part = part = object.__new__(type(optimizer))
        part.__dict__.update({k: v for k, v in optimizer.__dict__.items() if k != "_cached_plan"})
        part.__dict__.update(_optimizer_step_pre_hooks={}, _optimizer_step_post_hooks={})
        part.param_groups = [{}]
        self._freed: FreedGradient | None = None

    def freed(self) -> FreedGradient | None:
        """What to put in the place of the gradient; None for DTensors, where FSDP would add the next gradient to it."""
        p, freed = self._p, self._freed
        if type(p) not in (Tensor, Parameter):
            return None
        if freed is None or (freed.shape, freed.dtype, freed.device) != (p.shape, p.dtype, p.device):
            freed = self._freed = FreedGradient.of(p.shape, p.dtype, p.device)
        return freed

    def step(self) -> bool:
        """False if the optimizer no longer has the parameter."""
        place = self._find()
        if place is None:
            return False
        index, at = place
        group = self._optimizer.param_groups[index]
        own = self._part.param_groups[0]
        own.update(group)
        own["params"] = [self._p]
        if "param_names" in group:
            own["param_names"] = [group["param_names"][at]]
        self._part.state = {self._p: self._optimizer.state[self._p]}  # type: ignore[assignment]
        try:
            self._part.step()
        except (ValueError, ZeroDivisionError) as error:
            raise type(error)(f"in the backward pass, at parameter {at} of group {index}: {error}") from error
        finally:
            if not self._optimizer.state[self._p]:
                del self._optimizer.state[self._p]
        return True

    def _find(self) -> tuple[int, int] | None:
        groups = self._optimizer.param_groups
        index, at = self._place
        if index < len(groups) and at < len(groups[index]["params"]) and groups[index]["params"][at] is self._p:
            return self._place
        for index, group in enumerate(groups):
            for at, p in enumerate(group["params"]):
                if p is self._p:
                    self._place = index, at
                    return self._place
        return None


def step_in_backward(optimizer: Optimizer) -> StepInBackward:
    """Updates each parameter within ``backward()``, as soon as its gradient is complete, and frees the gradient.

    Of the gradients, one at a time is in memory instead of all. The result is that of ``optimizer.step()`` after
    ``backward()``, to the bit. States, groups and hyperparameters stay the optimizer's: schedulers, ``state_dict`` and
    ``zero_grad`` work as ever, and a training loop may stay as it is, for ``optimizer.step()`` steps what still has a
    gradient, which is nothing, and calls hooks.

    ::

        in_backward = onepass.step_in_backward(optimizer)
        for batch in loader:
            loss_of(model, batch).backward()  # updates the model

        for micro_batches in loader:  # gradients that add up
            with in_backward.accumulate():
                for micro_batch in micro_batches[:-1]:
                    loss_of(model, micro_batch).backward()
            loss_of(model, micro_batches[-1]).backward()

    What needs gradients after the backward cannot work with it: clipping by the global norm (clip by value, or by the
    norm of each gradient, in a hook of the parameter's own), ``GradScaler``, :func:`log_to`, and
    DistributedDataParallel, which averages gradients later. (``fully_shard`` does so before.) To use a gradient that is
    gone is an error: ``.grad`` holds a stand-in for it until ``zero_grad()``, ``optimizer.step()`` or the next
    gradient; that of a DTensor is None. Parameters that are added to the optimizer, or unfrozen, are taken in by the
    next ``optimizer.step()``.

    Nothing tells of this mistake: parameters that are used in several blocks under ``torch.utils.checkpoint`` with
    ``use_reentrant=True``. Each block has a backward of its own, so they are updated between the blocks, by each
    block's part of the gradient. With ``use_reentrant=False`` the gradient is whole.

    Args:
        optimizer: Any optimizer that needs no closure, of onepass or torch, whose parameters are stepped one by one.

    Returns:
        A handle with ``accumulate()``, a context, and ``remove()``.

    Raises:
        TypeError: It is no ``torch.optim.Optimizer``, or one that looks at all parameters together: LBFGS, Lookahead.
        RuntimeError: Later, from ``optimizer.step(closure)``, and from what uses a gradient that is gone.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> before = model.weight.detach().clone()
        >>> handle = onepass.step_in_backward(onepass.SGD(model.parameters(), lr=0.1))
        >>> model(torch.ones(8, 4)).sum().backward()  # also updates the model
        >>> torch.equal(model.weight, before)
        False
        >>> handle.remove()
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, but is a {type(optimizer).__name__}")
    optimizer = unwrapped(optimizer)
    if isinstance(optimizer, LBFGS | Lookahead):
        raise TypeError(f"{type(optimizer).__name__} looks at all parameters together, and cannot step in backward")
    return StepInBackward(optimizer)
