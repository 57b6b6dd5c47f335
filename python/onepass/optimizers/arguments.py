"""Check hyperparameters, describe them in messages, and convert them to floats."""

from __future__ import annotations

import contextlib
import functools
import operator
import reprlib
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from .rules import RULES


def number(value: float | Tensor) -> float:
    """Return a hyperparameter as a float; it may be a tensor of one element, also one that requires a gradient."""
    return value.item() if isinstance(value, Tensor) else float(value)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without "torch."."""
    return str(dtype).removeprefix("torch.")


def described(value: object) -> str:
    """Return an argument's type and value, for an error message."""
    return f"the {type(value).__name__} {reprlib.repr(value)}"


def check_number(what: str, value: object) -> None:
    """Check that a value is one number: an int, a float, a tensor of one element, or convertible by ``float``.

    Raises:
        TypeError: The value is not a number. Strings are not numbers, even those that ``float`` can parse.
        ValueError: The value is a tensor with zero or several elements, or an int too large for a float.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{what} must be one number, got a tensor of shape {list(value.shape)}")
    elif isinstance(value, str | bytes):
        raise TypeError(f"{what} must be a number, got {described(value)}: convert it by float()")
    else:
        try:
            float(value.item() if hasattr(value, "item") else value)  # type: ignore[arg-type]
        except OverflowError:
            raise ValueError(f"{what} must fit a float, got an int of {int(value).bit_length()} bits") from None  # type: ignore[call-overload]
        except (TypeError, ValueError):
            raise TypeError(f"{what} must be a number, got {described(value)}") from None


def whole_at_least(what: str, value: Any, least: int) -> int:
    """Return an argument that is an integer as an int.

    NumPy's integers, and floats without a fraction, such as 1e4 and 0.1 * 50, are accepted.

    Raises:
        TypeError: The argument is not an integer, or is a bool.
        ValueError: The argument is less than ``least``.
    """
    found = None
    if isinstance(value, float | np.floating):
        found = int(value) if value.is_integer() else None
    elif not isinstance(value, bool):
        with contextlib.suppress(TypeError):
            found = operator.index(value)
    if found is None:
        raise TypeError(f"{what} must be an integer >= {least}, got {described(value)}")
    if found < least:
        raise ValueError(f"{what} must be >= {least}, got {found}")
    return found


def check_flag(what: str, value: object) -> None:
    """Check that an argument is True or False: a string such as "False" would count as True.

    Raises:
        TypeError: It is not a bool.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{what} must be True or False, got {described(value)}")


def check_keys(what: str, value: object, keys: Collection[str]) -> None:
    """Check that a part of a state_dict is a dict with these keys.

    Raises:
        ValueError: It is not a dict, or lacks a key.
    """
    if not isinstance(value, Mapping) or not all(key in value for key in keys):
        raise ValueError(f"{what} must be a dict with the keys {', '.join(keys)}, got {described(value)}")


def check_optimizer(what: str, value: object) -> None:
    """Check that an argument is an optimizer.

    Raises:
        TypeError: It is not.
    """
    if not isinstance(value, Optimizer):
        raise TypeError(f"{what} must be a torch.optim.Optimizer, got {described(value)}")


# By hyperparameter name: whether it may be None; for a tuple of numbers, one bool for each of them.
HyperTypes: TypeAlias = "Mapping[str, bool | tuple[bool, ...]]"


@functools.cache
def hyper_types(rule: str) -> HyperTypes:
    """Return the types of a rule's hyperparameters."""
    types: dict[str, bool | tuple[bool, ...]] = {"lr": False, "weight_decay": False}  # also if unused
    for text in RULES[rule].hyper:
        name, bracket, _ = text.rstrip("?!").partition("[")
        optional = text.endswith(("?", "!"))
        before = types.get(name, ())
        types[name] = (*before, optional) if bracket and isinstance(before, tuple) else optional
    return types


def check_hyperparameters(where: str, types: HyperTypes, values: Mapping[str, Any]) -> None:
    """Check the types of the hyperparameters in ``values``. torch's constructors check their ranges.

    Raises:
        TypeError: A value is not a number, or not a sequence of numbers. The message begins with ``where``.
        ValueError: A value has too many or too few numbers, or fails ``check_number``.
    """
    for name, optional in types.items():
        if name not in values:
            continue
        value = values[name]
        numbers = {name: (value, optional)}
        if isinstance(optional, tuple):
            count = len(optional)
            if isinstance(value, str) or not hasattr(value, "__len__"):
                raise TypeError(f"{where}: {name} must be {count} numbers, got {described(value)}")
            if len(value) != count:
                raise ValueError(f"{where}: {name} must be {count} numbers, got {described(value)}")
            numbers = {f"{name}[{i}]": each for i, each in enumerate(zip(value, optional, strict=True))}
        for part, (given, may_be_none) in numbers.items():
            if given is not None or not may_be_none:
                check_number(f"{where}: {part}", given)


@contextlib.contextmanager
def module_refused(where: str, params: object) -> Iterator[None]:
    """Replace torch's TypeError for a module passed as ``params`` by one that says to pass its ``parameters()``."""
    try:
        yield
    except TypeError:
        if not isinstance(params, Module):  # only on failure: a ParameterList is a Module that torch accepts
            raise
        raise TypeError(
            f"{where}: params must be parameters or groups of them, got the module {type(params).__name__}: pass its "
            "parameters()"
        ) from None


@contextlib.contextmanager
def groups_kept_on_error(optimizer: Optimizer) -> Iterator[None]:
    """Remove the parameter groups that were added within this context if it raises."""
    count = len(optimizer.param_groups)
    try:
        yield
    except BaseException:
        del optimizer.param_groups[count:]
        raise


@contextlib.contextmanager
def noted(check: Callable[[], None]) -> Iterator[None]:
    """Add the message of a check as a note to an exception of torch's constructor, which may not name the argument.

    The exception's type and text are not changed. Python prints notes from 3.11 on.
    """
    try:
        yield
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        if sys.version_info >= (3, 11):
            try:
                check()
            except (TypeError, ValueError) as fault:
                error.add_note(str(fault))
        raise


def put_number(held: float | Tensor, value: float | Tensor) -> float | Tensor:
    """Return the new value of a hyperparameter. A tensor is filled in place, because a captured graph may hold it."""
    if isinstance(held, Tensor):
        return held.fill_(value.squeeze() if isinstance(value, Tensor) else value)
    return value


def hyperparameters(group: dict[str, Any]) -> dict[str, float]:
    """Return the learning rate and weight decay of a group, if it has them."""
    names = [name for name in ("lr", "weight_decay") if isinstance(group.get(name), int | float | Tensor)]
    return {name: number(group[name]) for name in names}
