"""Hyperparameters as users give them: checked, described in messages, and read as numbers."""

from __future__ import annotations

import contextlib
import operator
import reprlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

from torch import Tensor
from torch.nn import Module


def number(value: float | Tensor) -> float:
    """A hyperparameter, which may be a tensor of one element, one that requires a gradient, too."""
    return value.item() if isinstance(value, Tensor) else float(value)


def described(value: object) -> str:
    """An argument's type and value, for an error message."""
    return f"the {type(value).__name__} {reprlib.repr(value)}"


def check_number(what: str, value: object) -> None:
    """Check that a value is one number: an int or a float, a tensor of one element, or what converts to a float.

    Raises:
        TypeError: It is not a number; a text is none, even where ``float`` reads it.
        ValueError: It is a tensor of no or several elements, or an int too large for a float.
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


def whole(what: str, value: Any) -> int:
    """An argument that must be an integer; it may be a float without a fraction, such as 1e4.

    Raises:
        TypeError: It is no integer.
    """
    if isinstance(value, float) and value.is_integer():
        return int(value)
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{what} must be an integer, got {described(value)}") from None


# What hyperparameters are by their names: one number, or a bool for each number of a tuple. True: it may be None.
HyperTypes: TypeAlias = "Mapping[str, bool | tuple[bool, ...]]"


def check_hyperparameters(where: str, types: HyperTypes, values: Mapping[str, Any]) -> None:
    """Check the types of those hyperparameters that there are; their ranges are torch's constructors' affair.

    Raises:
        TypeError: One is not a number, or not a sequence of numbers. The message begins with ``where``.
        ValueError: One has too many or too few numbers, or is a number that no step can use.
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
    """Says what to do where torch refuses a module that was given in place of its parameters."""
    try:
        yield
    except TypeError:
        if not isinstance(params, Module):  # a ParameterList is one, and torch takes it
            raise
        raise TypeError(
            f"{where}: params must be parameters or groups of them, got the module {type(params).__name__}: pass its "
            "parameters()"
        ) from None


@contextlib.contextmanager
def noted(check: Callable[[], None]) -> Iterator[None]:
    """Adds what a check of the arguments raises to an exception of torch's constructor, which may not name them.

    Torch's type and text stay. Python prints the note below them, from 3.11 on.
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
    """What takes the place of a hyperparameter: a tensor stays that tensor, which a captured graph may hold, too."""
    if isinstance(held, Tensor):
        return held.fill_(value.squeeze() if isinstance(value, Tensor) else value)
    return value


def hyperparameters(group: dict[str, Any]) -> dict[str, float]:
    """Learning rate and weight decay of a group, where it has them."""
    names = [name for name in ("lr", "weight_decay") if isinstance(group.get(name), int | float | Tensor)]
    return {name: number(group[name]) for name in names}
