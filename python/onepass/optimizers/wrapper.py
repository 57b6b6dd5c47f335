"""The base of the optimizers that wrap another one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .hooks import unwrapped
from .tail import StepReport, Tail
from .torch_private import disable_dynamo


class Forwarded:
    """An attribute that is read from the first inner optimizer, and set on and deleted from all."""

    def __set_name__(self, _: type, name: str) -> None:
        self.name = name

    def __get__(self, outer: Any, _: type | None = None) -> Any:
        return self if outer is None else getattr(outer._inner()[0], self.name)

    def __set__(self, outer: Any, value: Any) -> None:
        for optimizer in outer._inner():
            setattr(optimizer, self.name, value)

    def __delete__(self, outer: Any) -> None:
        for optimizer in outer._inner():
            delattr(optimizer, self.name)


class Wrapper(Optimizer):
    """An optimizer whose parameters, states and groups are those of the optimizer that it wraps."""

    optimizer: Optimizer  #: The wrapped optimizer.

    param_groups = Forwarded()
    state = Forwarded()
    defaults = Forwarded()

    def _inner(self) -> list[Optimizer]:
        return [self.optimizer]

    def _own(self) -> tuple[str, dict[str, Any]]:
        """Return the key of the groups that has what is this optimizer's own, and the dict, which all groups share."""
        raise NotImplementedError

    # A subclass has a constructor that calls __setstate__, not Optimizer.__init__, which would create separate
    # param_groups and state.

    @property
    def last_step(self) -> StepReport | None:
        """The report of the wrapped optimizer's last step: its ``last_step``; None if it has none."""
        return getattr(innermost(self), "last_step", None)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients by the wrapped optimizer's ``zero_grad``."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the wrapped optimizer."""
        self.optimizer.add_param_group(param_group)
        self._share()

    def _share(self) -> None:
        key, own = self._own()
        for group in self.param_groups:
            group[key] = own

    @disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's state_dict, with one more key in each group: what is this optimizer's own."""

        def save() -> dict[str, Any]:
            state_dict = self.optimizer.state_dict()
            key, own = self._own()
            for group in state_dict["param_groups"]:
                group[key] = dict(own)
            return state_dict

        return saved_with_hooks(self, save)

    def _own_in(self, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        """Return what a state_dict has of this optimizer's own; None if it is one of the wrapped class."""
        key, _ = self._own()
        return next((group[key] for group in state_dict["param_groups"] if key in group), None)

    def _step_wrapped(self, closure: Callable[[], Any] | None = None) -> Any:
        return self.optimizer.step() if closure is None else self.optimizer.step(closure)

    def _master_names(self) -> dict[Tensor, str]:
        return master_names(self.optimizer)


def has_skipped(optimizer: Optimizer) -> bool:
    """Return whether an optimizer has skipped the step that was just called; one that has several, if all have."""
    optimizer = unwrapped(optimizer)
    if (inner := getattr(optimizer, "_inner", None)) is not None:
        return all(map(has_skipped, inner()))
    tail = getattr(optimizer, "_tail", None)
    if isinstance(tail, Tail) and not tail.may_skip():
        return False  # without reading the report, which would wait for a GPU
    report = getattr(optimizer, "last_step", None)
    return report is not None and bool(report.skipped)


def saved_with_hooks(optimizer: Optimizer, save: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what ``save`` returns, between the hooks of ``state_dict``."""
    for before in optimizer._optimizer_state_dict_pre_hooks.values():
        before(optimizer)
    state_dict = save()
    for after in optimizer._optimizer_state_dict_post_hooks.values():
        state_dict = after(optimizer, state_dict) or state_dict
    return state_dict


def loaded_with_hooks(optimizer: Optimizer, state_dict: dict[str, Any], load: Callable[[dict[str, Any]], None]) -> None:
    """Call ``load`` between the hooks of ``load_state_dict``."""
    state_dict = state_dict.copy()
    for before in optimizer._optimizer_load_state_dict_pre_hooks.values():
        state_dict = before(optimizer, state_dict) or state_dict
    load(state_dict)
    for after in optimizer._optimizer_load_state_dict_post_hooks.values():
        after(optimizer)


def master_names(optimizer: Optimizer) -> dict[Tensor, str]:
    """Return the state that holds the master, of each parameter of an optimizer that has one."""
    names: dict[Tensor, str] = getattr(unwrapped(optimizer), "_master_names", dict)()
    return names


def innermost(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer that steps, within all wrappers, also those of other libraries (accelerate's)."""
    optimizer = unwrapped(optimizer)
    while isinstance(optimizer, Wrapper):
        optimizer = unwrapped(optimizer.optimizer)
    return optimizer
