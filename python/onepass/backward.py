"""Updates within the backward pass: a gradient is used as soon as it is complete, and freed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .lookahead import Lookahead


class StepInBackward:
    """What :func:`step_in_backward` returns: updates within ``backward()``, until ``remove()``."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._steppers: dict[Tensor, tuple[_Stepper, RemovableHandle]] = {}
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
        for _, handle in self._steppers.values():
            handle.remove()
        self._steppers = {}
        self._hook.remove()

    def _join(self) -> None:
        """Takes in parameters that were added to the optimizer, or have been unfrozen."""
        for group in self._optimizer.param_groups:
            for p in group["params"]:
                if p.requires_grad and p not in self._steppers:
                    handle = p.register_post_accumulate_grad_hook(self._update)
                    self._steppers[p] = _Stepper(self._optimizer, p), handle

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(x is not None for x in (*args[1:], *kwargs.values())):
            raise RuntimeError(
                "step() takes no closure while the optimizer steps in backward: a closure's backward() has updated the "
                "parameters before step() could look at the loss; remove() the one or leave out the other"
            )
        self._join()

    def _update(self, p: Tensor) -> None:
        if not self._accumulating and self._steppers[p][0].step():
            p.grad = None


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
        except ValueError as error:
            raise ValueError(f"in the backward pass, at parameter {at} of group {index}: {error}") from error
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

    What needs all gradients before the first update cannot work with it: clipping by the global norm (clip by value, or
    by the norm of each gradient, in a hook of the parameter's own), ``GradScaler``, and DistributedDataParallel, which
    averages gradients later. (``fully_shard`` does so before.) Parameters that are added to the optimizer, or unfrozen,
    are taken in by the next ``optimizer.step()``.

    Args:
        optimizer: Any optimizer that needs no closure, of onepass or torch, whose parameters are stepped one by one.

    Returns:
        A handle with ``accumulate()``, a context, and ``remove()``.

    Raises:
        TypeError: It is no ``torch.optim.Optimizer``, or one that looks at all parameters together: LBFGS, Lookahead.
        RuntimeError: Later, from ``optimizer.step(closure)``; from ``clip_grad_norm_`` there is no gradient to clip.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, but is a {type(optimizer).__name__}")
    if isinstance(optimizer, torch.optim.LBFGS | Lookahead):
        raise TypeError(f"{type(optimizer).__name__} looks at all parameters together, and cannot step in backward")
    return StepInBackward(optimizer)
